//! Several controllers of one mesh: a proxy that loses one goes on with another as if nothing had been.

use outrigger_api::v1::Destination;
use outrigger_certs::CertificateAuthority;

use crate::discovery::ORDERS;
use crate::harness::Bench;

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_says_the_same_and_sends_nothing_twice() {
    let files = tempfile::tempdir().unwrap();
    let made = CertificateAuthority::generate(&"outrigger.local".parse().unwrap()).unwrap();
    let [certificate, key, roots] = ["ca.pem", "key.pem", "roots.pem"].map(|name| files.path().join(name));
    std::fs::write(&certificate, &made.certificates).unwrap();
    std::fs::write(&key, &*made.key).unwrap();
    std::fs::write(&roots, &made.roots).unwrap();
    let replica = async || {
        Bench::start_with(&[("orders.yaml", ORDERS)], |config| {
            config.ca.certificate_file = Some(certificate.clone());
            config.ca.key_file = Some(key.clone());
            config.ca.roots_file = Some(roots.clone());
        })
        .await
    };
    let (mut first, second) = (replica().await, replica().await);
    let web = first.workload("web", &[]).await;
    let mut proxy = web.discover(&first).await;
    let mut held = Vec::new();
    let names = [
        ("Mesh", "mesh"),
        ("TrustBundle", "trust-bundle"),
        ("Service", "orders.shop"),
        // Before the name: a service's virtual address comes with the first question for its name, and what was said of its
        // endpoints before is not said again for that. The other replica is asked in the same order.
        ("Destination", "127.0.0.1:9001"),
        ("Destination", "orders.shop.mesh"),
    ];
    for (kind, name) in names {
        proxy.subscribe(kind, &[name]).await;
        let response = proxy.take(kind).await;
        assert_eq!(response.resources.len(), 1, "{kind} {name}");
        held.push((kind, name, response.resources[0].version.clone()));
    }
    // It goes as a deployment goes: with GOAWAY, and a word to each stream.
    first.down().await;
    assert_eq!(proxy.end().await.map(|status| status.code()), Some(tonic::Code::Unavailable));

    // The other has started empty, and never heard of this proxy.
    let mut proxy = web.discover(&second).await;
    for kind in ["Mesh", "TrustBundle", "Service", "Destination"] {
        let of_kind = held.iter().filter(|(of, ..)| *of == kind);
        let (names, versions): (Vec<_>, Vec<_>) =
            of_kind.map(|(_, name, version)| (*name, (*name, version.as_str()))).unzip();
        proxy.resume(kind, &names, &versions).await;
    }
    proxy.assert_silent().await;
    let mut fresh = web.discover(&second).await;
    fresh.subscribe("Destination", &["orders.shop.mesh"]).await;
    let (destination, version): (Destination, _) = fresh.one("Destination").await;
    assert_eq!(version, held[4].2);
    assert!(!destination.virtual_addresses.is_empty());
}
