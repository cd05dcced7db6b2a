//! Pods, as their own sidecars and others meet them: attested by their tokens, told of their own side, dialled at any port.

use outrigger_api::v1::{Destination, Health, Inbound, Mesh, Protocol, Service};
use outrigger_certs::KeyPair;
use serde_json::{Value, json};
use tonic::Code;

use crate::fake::{Fake, NODES, PODS, SERVICES, SLICES};
use crate::harness::{Bench, Discovery, Workload, bring_ca, identity, soon};

/// A JWT by its form. The fake API server is asked what it means.
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ3ZWIifQ.c2lnbmF0dXJl";

fn account(namespace: &str, name: &str, pod: &str, uid: &str, audiences: &[&str]) -> Value {
    json!({"authenticated": true, "audiences": audiences, "user": {
        "username": format!("system:serviceaccount:{namespace}:{name}"),
        "extra": {"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid]},
    }})
}

/// A pod with a sidecar at the address that this process connects from.
fn pod() -> Value {
    json!({"metadata": {"name": "web-0", "namespace": "shop", "uid": "u1", "labels": {"app": "web"}},
        "spec": {"serviceAccountName": "web", "nodeName": "n1", "initContainers": [{"name": "outrigger-proxy"}],
            "containers": [{"name": "app", "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}}}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "127.0.0.1"}], "hostIPs": [{"ip": "192.168.0.1"}]}})
}

async fn cluster() -> (Bench, Fake) {
    let api = Fake::start().await;
    api.put(PODS, pod());
    api.put(
        PODS,
        json!({"metadata": {"name": "bare", "namespace": "shop", "uid": "u2"},
        "spec": {"containers": [{"name": "app"}]}, "status": {"phase": "Running", "podIP": "127.0.0.9"}}),
    );
    api.put(
        NODES,
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDRs": ["10.0.0.0/24"]}}),
    );
    api.put(
        SERVICES,
        json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.1",
        "ports": [{"name": "http", "port": 80, "appProtocol": "http"}, {"name": "db", "port": 5432}]}}),
    );
    api.put(SLICES, json!({"metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["127.0.0.1"], "targetRef": {"kind": "Pod", "name": "web-0"}, "nodeName": "n1"}]}));
    api.world().reviews.insert(TOKEN.to_owned(), account("shop", "web", "web-0", "u1", &["outrigger"]));
    (start(&api).await, api)
}

async fn start(api: &Fake) -> Bench {
    let server = api.url();
    Bench::start_with(&[], move |config| {
        bring_ca(config);
        let kubeconfig = config.data_dir.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: \"{server}\"}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
        );
        std::fs::write(&kubeconfig, text).unwrap();
        config.kubernetes.enabled = true;
        config.kubernetes.kubeconfig = Some(kubeconfig);
        config.mesh_cidrs = vec!["10.200.0.0/16".parse().unwrap()];
    })
    .await
}

async fn joined() -> (Bench, Fake, Workload) {
    let (bench, api) = cluster().await;
    let web = bench.join(TOKEN).await.unwrap();
    (bench, api, web)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_proves_its_pod_and_nothing_else_does() {
    let (bench, api) = cluster().await;
    let web = bench.join(TOKEN).await.unwrap();
    assert_eq!(web.credentials.leaf().unwrap().id(), &identity("web"));

    let with = |token: &str, answer: Value| {
        let jwt = format!("eyJh.{token}.x");
        api.world().reviews.insert(jwt.clone(), answer);
        jwt
    };
    let mut unbound = account("shop", "web", "web-0", "u1", &["outrigger"]);
    unbound["user"]["extra"] = json!({});
    let refused = [
        // Expired, of another issuer, forged: the API server says so.
        ("eyJh.forged.x".to_owned(), "does not accept"),
        (
            with("audience", account("shop", "web", "web-0", "u1", &["https://kubernetes.default.svc"])),
            "audience",
        ),
        (with("noaudience", account("shop", "web", "web-0", "u1", &[])), "audience"),
        (with("unbound", unbound), "bound to no pod"),
        (with("gone", account("shop", "web", "web-7", "u7", &["outrigger"])), "is gone"),
        (with("reborn", account("shop", "web", "web-0", "u0", &["outrigger"])), "is gone"),
        (with("elsewhere", account("shop", "default", "bare", "u2", &["outrigger"])), "comes from 127.0.0.1"),
        (with("other", account("shop", "db", "web-0", "u1", &["outrigger"])), "another service account"),
        (
            with(
                "user",
                json!({"authenticated": true, "audiences": ["outrigger"], "user": {"username": "admin"}}),
            ),
            "service account",
        ),
    ];
    for (token, reason) in refused {
        let status = bench.join(&token).await.err().unwrap();
        assert_eq!(status.code(), Code::Unauthenticated, "{token}: {status}");
        assert!(status.message().contains(reason), "{token}: {status}");
    }
    // Nobody is believed because nobody can be asked.
    api.world().down = true;
    assert_eq!(bench.join(TOKEN).await.err().unwrap().code(), Code::Unavailable);
    api.world().down = false;
    bench.join(TOKEN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_is_renewed_for_as_long_as_its_pod_is_there() {
    let (bench, api, web) = joined().await;
    let csr = KeyPair::generate().unwrap().csr().unwrap();
    let renew = async || bench.sign(web.channel(&bench).await, csr.clone(), "").await;
    let wanted = async |code: Code| {
        soon(&format!("{code}"), async {
            while renew().await.map_or_else(|status| status.code(), |_| Code::Ok) != code {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    };
    wanted(Code::Ok).await;
    // What is known of the cluster stays while it cannot be asked.
    api.world().down = true;
    api.cut();
    renew().await.unwrap();
    api.world().down = false;
    api.delete(PODS, "shop/web-0");
    wanted(Code::PermissionDenied).await;
}

/// The own side, as soon as it is as wanted.
async fn own(proxy: &mut Discovery, what: &str, is_it: impl Fn(&Inbound) -> bool) -> Inbound {
    soon(what, async {
        loop {
            let (inbound, _): (Inbound, _) = proxy.one("Inbound").await;
            if is_it(&inbound) {
                return inbound;
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_told_of_its_own_side_without_a_claim() {
    let (bench, api, web) = joined().await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Inbound", &[identity("web").as_str()]).await;
    let inbound = own(&mut proxy, "its claims", |inbound| !inbound.claims.is_empty()).await;
    let claims: Vec<_> =
        inbound.claims.iter().map(|claim| (claim.service.as_str(), claim.port, claim.protocol())).collect();
    assert_eq!(
        claims,
        [("web.shop", 8080, Protocol::Http1)],
        "the port that has no target is none of its own"
    );
    assert_eq!(inbound.locality.unwrap().zone, "a");
    let probes = inbound.access.unwrap().probes;
    assert_eq!((probes[0].port, probes[0].method.as_str(), probes[0].path.as_str()), (8080, "GET", "/ready"));
    assert!(!inbound.terminating);

    // Policies know it by its labels and by its services.
    let policy = |name: &str, target: Value| {
        json!({"apiVersion": "outrigger.dev/v1alpha1", "kind": "AccessPolicy",
        "metadata": {"name": name, "namespace": "shop"}, "spec": {"targetRef": target, "rules": [{"action": "Deny"}]}})
    };
    let objects = [
        policy("labels", json!({"kind": "Workload", "labels": {"app": "web"}})),
        policy("service", json!({"kind": "Service", "name": "web"})),
        policy("others", json!({"kind": "Workload", "labels": {"app": "db"}})),
    ];
    let (status, answer) =
        bench.api("POST", "/api/v1/policies/apply", Some(json!({"objects": objects}))).await;
    assert!(status < 300, "{answer}");
    let ruled = own(&mut proxy, "its policies", |inbound| {
        inbound.access.as_ref().is_some_and(|a| !a.policies.is_empty())
    })
    .await;
    let policies = ruled.access.unwrap().policies;
    let names: Vec<_> =
        policies.iter().map(|policy| (policy.name.as_str(), policy.ports.as_slice())).collect();
    assert_eq!(names, [("shop/labels", &[][..]), ("shop/service", &[8080])]);

    let mut leaving = pod();
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    api.put(PODS, leaving);
    own(&mut proxy, "that it ends", |inbound| inbound.terminating).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_pod_can_dial_leads_where_it_led_without_a_mesh() {
    let (bench, api, web) = joined().await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Mesh", &["mesh"]).await;
    let (mesh, _): (Mesh, _) = proxy.one("Mesh").await;
    assert_eq!(mesh.cidrs, ["10.200.0.0/16", "10.0.0.0/24"], "configured, and of nodes");
    let dial = async |proxy: &mut Discovery, address: &str| {
        proxy.subscribe("Destination", &[address]).await;
        let (found, _): (Destination, _) = proxy.one("Destination").await;
        (found.service, found.port, found.endpoint)
    };
    let led = |service: &str, port: u32, endpoint: &str| (service.to_owned(), port, endpoint.to_owned());
    assert_eq!(dial(&mut proxy, "10.96.0.1:80").await, led("web.shop", 80, ""));
    assert_eq!(dial(&mut proxy, "127.0.0.1:8080").await, led("web.shop", 80, "web-0"), "a StatefulSet's pod");
    assert_eq!(
        dial(&mut proxy, "127.0.0.1:9100").await,
        led("web-0._pod.shop", 9100, "127.0.0.1"),
        "a scrape"
    );
    assert_eq!(dial(&mut proxy, "127.0.0.9:9100").await, led("bare._pod.shop", 9100, "127.0.0.9"));
    proxy.subscribe("Destination", &["127.0.0.77:80"]).await;
    let nobody = proxy.take("Destination").await;
    assert_eq!(nobody.removed_resources, ["127.0.0.77:80"]);

    let endpoint = async |proxy: &mut Discovery, name: &str| {
        proxy.subscribe("Service", &[name]).await;
        let (service, _): (Service, _) = proxy.one("Service").await;
        assert_eq!(service.source, "kubernetes");
        service.endpoints[0].clone()
    };
    let meshed = endpoint(&mut proxy, "web-0._pod.shop").await;
    assert_eq!(meshed.identity, identity("web").as_str());
    assert!(meshed.ports.is_empty(), "each port leads to itself");
    assert_eq!(endpoint(&mut proxy, "bare._pod.shop").await.identity, "", "plaintext");

    // A pod whose address another takes over: who dialled it is told.
    api.delete(PODS, "shop/bare");
    api.put(
        PODS,
        json!({"metadata": {"name": "next", "namespace": "shop", "uid": "u3"},
        "spec": {"containers": [{"name": "app"}]}, "status": {"phase": "Running", "podIP": "127.0.0.9"}}),
    );
    soon("the next pod", async {
        loop {
            let response = proxy.next().await;
            proxy.ack(&response).await;
            let found = response.resources.iter().filter(|_| response.type_url.ends_with("Destination"));
            let names: Vec<String> = found
                .map(|found| {
                    <Destination as prost::Message>::decode(&*found.resource.as_ref().unwrap().value)
                        .unwrap()
                        .service
                })
                .collect();
            if names == ["next._pod.shop"] {
                return;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_never_reached_the_cluster_says_nothing_of_ranges() {
    let api = Fake::start().await;
    api.world().down = true;
    let bench = start(&api).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Mesh", &["mesh"]).await;
    proxy.assert_silent().await;
    // Renewal of a leaf that a join token stands for does not need the cluster.
    let csr = KeyPair::generate().unwrap().csr().unwrap();
    bench.sign(web.channel(&bench).await, csr, "").await.unwrap();
    api.world().down = false;
    let (mesh, _): (Mesh, _) = proxy.one("Mesh").await;
    assert_eq!(mesh.cidrs, ["10.200.0.0/16"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unready_endpoint_is_told_as_one_that_nobody_may_choose() {
    let (bench, api, web) = joined().await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["web.shop"]).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(service.endpoints[0].health(), Health::Healthy);
    api.put(SLICES, json!({"metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": false},
            "targetRef": {"kind": "Pod", "name": "web-0"}, "nodeName": "n1"}]}));
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!((service.endpoints[0].health(), service.endpoints.len()), (Health::Unready, 1));
}
