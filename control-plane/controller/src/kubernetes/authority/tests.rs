use serde_json::json;

use super::*;
use crate::kubernetes::fake::{Cluster, Way};

fn domain() -> TrustDomain {
    "outrigger.local".parse().unwrap()
}

async fn open_in(cluster: &Cluster) -> anyhow::Result<Authority> {
    Authority::open(cluster.client().0, "mesh", &domain(), false).await
}

fn root_of(authority: &Authority) -> String {
    fingerprint(&authority.current.borrow())
}

fn put(cluster: &Cluster, material: &Material) {
    let data = [(CERTIFICATES, &material.certificates), (KEY, &*material.key), (ROOTS, &material.roots)]
        .map(|(key, text)| (key.to_owned(), json!(ByteString(text.clone().into_bytes()))));
    let data: serde_json::Map<_, _> = data.into_iter().collect();
    cluster.put("secrets", json!({ "metadata": { "name": SECRET, "namespace": "mesh" }, "data": data }));
}

fn certificates(cluster: &Cluster) -> String {
    let secret = cluster.get("secrets", "mesh", SECRET).expect("there is a Secret");
    material(serde_json::from_value(secret).unwrap()).unwrap().certificates
}

/// Another issuing certificate under the same root, as cert-manager renews one.
fn renewed(under: &rcgen::Issuer<'_, &rcgen::KeyPair>, root: &str) -> Material {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "issuer");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    let issuer = params.signed_by(&key, under).unwrap();
    Material { certificates: issuer.pem(), key: Zeroizing::new(key.serialize_pem()), roots: root.to_owned() }
}

#[tokio::test(start_paused = true)]
async fn controllers_that_start_at_once_have_one_root() {
    for _ in 0..10 {
        let cluster = Cluster::new();
        let opened = futures_util::future::join_all((0..5).map(|_| open_in(&cluster))).await;
        let roots: Vec<String> = opened.iter().map(|opened| root_of(opened.as_ref().unwrap())).collect();
        assert!(roots.iter().all(|root| *root == roots[0]), "{roots:?}");
        // And it is remembered before anybody serves.
        let map = cluster.get("configmaps", "mesh", bundles::NAME).unwrap();
        assert_eq!(map["data"][bundles::KEY], opened[0].as_ref().unwrap().current.borrow().bundle().to_pem());
        assert_eq!(root_of(&open_in(&cluster).await.unwrap()), roots[0]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_or_exchanged_ca_is_not_replaced() {
    let cluster = Cluster::new();
    open_in(&cluster).await.unwrap();
    let secret = cluster.get("secrets", "mesh", SECRET).unwrap();

    cluster.remove("secrets", "mesh", SECRET);
    let error = open_in(&cluster).await.err().unwrap().to_string();
    assert!(error.contains("has gone") && error.contains("restore"), "{error}");
    assert!(cluster.get("secrets", "mesh", SECRET).is_none());

    put(&cluster, &CertificateAuthority::generate(&domain()).unwrap());
    let error = open_in(&cluster).await.err().unwrap().to_string();
    assert!(error.contains("none that this mesh's workloads trust"), "{error}");

    let mut broken = secret.clone();
    broken["data"][KEY] = json!(ByteString(b"nonsense".to_vec()));
    cluster.put("secrets", broken);
    let error = open_in(&cluster).await.err().unwrap().to_string();
    assert!(error.contains("cannot be used") && error.contains("left as it is"), "{error}");

    cluster.put("secrets", secret);
    open_in(&cluster).await.unwrap();
    // A person decides to start a new mesh.
    cluster.remove("secrets", "mesh", SECRET);
    cluster.remove("configmaps", "mesh", bundles::NAME);
    open_in(&cluster).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_memory_is_written_again_where_it_was_lost() {
    let cluster = Cluster::new();
    let root = root_of(&open_in(&cluster).await.unwrap());
    for damage in [None, Some(json!({})), Some(json!({ bundles::KEY: "nonsense" }))] {
        cluster.remove("configmaps", "mesh", bundles::NAME);
        if let Some(data) = damage {
            let metadata = json!({ "name": bundles::NAME, "namespace": "mesh" });
            cluster.put("configmaps", json!({ "metadata": metadata, "data": data }));
        }
        let opened = open_in(&cluster).await.unwrap();
        assert_eq!(root_of(&opened), root);
        let map = cluster.get("configmaps", "mesh", bundles::NAME).unwrap();
        assert_eq!(map["data"][bundles::KEY], opened.material.roots);
    }
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_the_api_server_and_for_what_is_brought() {
    let cluster = Cluster::new();
    let (client, way) = cluster.client();
    way.send_replace(Way::Down);
    let opening = tokio::spawn(async move { Authority::open(client, "mesh", &domain(), true).await });
    sleep(Duration::from_mins(2)).await;
    way.send_replace(Way::Open);
    sleep(Duration::from_mins(2)).await;
    assert!(!opening.is_finished());
    assert!(cluster.get("secrets", "mesh", SECRET).is_none(), "a brought CA is never made");
    let brought = CertificateAuthority::generate(&domain()).unwrap();
    put(&cluster, &brought);
    let opened = opening.await.unwrap().unwrap();
    assert_eq!(opened.material.certificates, brought.certificates);
}

#[tokio::test(start_paused = true)]
async fn while_it_runs_a_renewed_issuer_is_taken_and_another_root_is_not() {
    let root_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "root");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).unwrap().pem();
    let under = rcgen::Issuer::from_params(&params, &root_key);
    let cluster = Cluster::new();
    put(&cluster, &renewed(&under, &root));

    let authority = open_in(&cluster).await.unwrap();
    let (mut issuer, metrics) = (authority.issuer(), Arc::new(Metrics::default()));
    tokio::spawn(authority.keep(Arc::clone(&metrics)));
    let current = metrics.ca_secret_current.clone();
    let says = |value| {
        let current = current.clone();
        async move {
            while current.get() != value {
                sleep(Duration::from_millis(10)).await;
            }
        }
    };
    says(1).await;
    let next = renewed(&under, &root);
    put(&cluster, &next);
    issuer.changed().await.unwrap();
    assert!(
        issuer
            .borrow_and_update()
            .is_trusted_by(&TrustBundle::from_pem(domain(), root.as_bytes(), 0).unwrap())
    );

    put(&cluster, &CertificateAuthority::generate(&domain()).unwrap());
    says(0).await;
    put(&cluster, &next);
    says(1).await;
    cluster.put("secrets", json!({ "metadata": { "name": SECRET, "namespace": "mesh" }, "data": {} }));
    says(0).await;
    // Brought: who brought it brings it again.
    cluster.remove("secrets", "mesh", SECRET);
    sleep(Duration::from_mins(5)).await;
    assert!(cluster.get("secrets", "mesh", SECRET).is_none());
    assert!(!issuer.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_secret_of_ours_that_goes_is_put_back_as_it_was() {
    let cluster = Cluster::new();
    let replicas = futures_util::future::join_all((0..3).map(|_| open_in(&cluster))).await;
    let before = certificates(&cluster);
    for replica in replicas {
        tokio::spawn(replica.unwrap().keep(Arc::default()));
    }
    for _ in 0..3 {
        cluster.remove("secrets", "mesh", SECRET);
        cluster.until("it is back", |cluster| cluster.get("secrets", "mesh", SECRET).is_some()).await;
        assert_eq!(certificates(&cluster), before);
        sleep(Duration::from_secs(5)).await;
    }
}
