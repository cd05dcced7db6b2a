//! What proxies are told, when, and when not.

use outrigger_api::discovery::DeltaDiscoveryRequest;
use outrigger_api::v1::{Destination, Inbound, Mesh, Service, TrustBundle, inbound, mesh};
use tonic::Code;

use crate::harness::{Announcing, Bench, Discovery, identity, soon, url};

pub(crate) const ORDERS: &str = "kind: Service\nname: orders\nnamespace: shop\nports: [{port: 80, protocol: HTTP1, targetPort: 8080}]\nendpoints:\n- {address: 127.0.0.1, port: 9001, identity: 'spiffe://outrigger.local/ns/shop/sa/orders'}\n- {address: 127.0.0.2}\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_gets_what_it_asks_for_and_its_changes() {
    let mut bench =
        Bench::of(&[("orders.yaml", ORDERS), ("other.yaml", "kind: Service\nname: other\n")]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;

    proxy.subscribe("Mesh", &["mesh"]).await;
    let (mesh, _): (Mesh, _) = proxy.one("Mesh").await;
    assert_eq!(mesh.trust_domain, "outrigger.local");
    assert_eq!(mesh.virtual_cidrs, ["253.0.0.0/8", "fd00:240::/32"]);
    assert_eq!(mesh.outbound(), mesh::OutboundDefault::Allow);
    proxy.subscribe("TrustBundle", &["trust-bundle"]).await;
    let (bundle, _): (TrustBundle, _) = proxy.one("TrustBundle").await;
    assert_eq!(bundle.roots.len(), 1);
    proxy.subscribe("Inbound", &[identity("web").as_str()]).await;
    let (own, _): (Inbound, _) = proxy.one("Inbound").await;
    assert_eq!((own.mode(), own.terminating), (inbound::Mode::Strict, false));

    proxy.subscribe("Service", &["orders.shop"]).await;
    let (orders, first): (Service, _) = proxy.one("Service").await;
    assert_eq!(
        (orders.name.as_str(), orders.namespace.as_str(), orders.source.as_str()),
        ("orders", "shop", "file")
    );
    assert_eq!(orders.endpoints[0].ports, [(80, 9001)].into());
    assert_eq!(orders.endpoints[0].identity, identity("orders").as_str());
    assert_eq!(
        (orders.endpoints[1].ports.clone(), orders.endpoints[1].identity.as_str()),
        ([(80, 8080)].into(), "")
    );

    // Each form of an address.
    for (asked, port, endpoint) in [
        ("127.0.0.1:9001", 80, "127.0.0.1/9001"),
        ("127.0.0.2:8080", 80, "127.0.0.2/8080"),
        ("orders.shop.mesh", 0, ""),
    ] {
        proxy.subscribe("Destination", &[asked]).await;
        let (found, _): (Destination, _) = proxy.one("Destination").await;
        assert_eq!(
            (found.service.as_str(), found.port, found.endpoint.as_str()),
            ("orders.shop", port, endpoint),
            "{asked}"
        );
        if asked.ends_with(".mesh") {
            assert_eq!(found.virtual_addresses.len(), 2);
            for (asked, found) in found.virtual_addresses.iter().zip([true, false]) {
                let asked = if found { format!("{asked}:80") } else { format!("[{asked}]:80") };
                proxy.subscribe("Destination", &[&asked]).await;
                let (dialled, _): (Destination, _) = proxy.one("Destination").await;
                assert_eq!(
                    (dialled.service.as_str(), dialled.port, dialled.endpoint.as_str()),
                    ("orders.shop", 80, "")
                );
            }
        }
    }
    for absent in ["127.0.0.1:9002", "orders.mesh", "127.0.0.2:80", "nothing.shop.mesh"] {
        proxy.subscribe("Destination", &[absent]).await;
        assert_eq!(proxy.take("Destination").await.removed_resources, [absent]);
    }

    // A service that nobody asked for changes: silence. One that was asked for: only that.
    bench.write("other.yaml", "kind: Service\nname: other\nports: [{port: 1}]\n");
    bench.write("orders.yaml", &ORDERS.replace("127.0.0.2", "127.0.0.3"));
    let (orders, second): (Service, _) = proxy.one("Service").await;
    assert_eq!(orders.endpoints[1].address, "127.0.0.3");
    assert_ne!(first, second);
    assert_eq!(proxy.take("Destination").await.removed_resources, ["127.0.0.2:8080"]);
    proxy.assert_silent().await;

    // The service leaves with its file.
    std::fs::remove_file(bench.file("orders.yaml")).unwrap();
    let gone = proxy.take("Service").await;
    assert_eq!(gone.removed_resources, ["orders.shop"]);
    let gone = proxy.take("Destination").await;
    assert_eq!(gone.removed_resources.len(), 4, "{gone:?}");

    let (_, proxies) = bench.api("GET", "/api/v1/proxies", None).await;
    assert_eq!(proxies["proxies"][0]["identity"], identity("web").as_str());
    assert!(proxies["proxies"][0]["types"]["Destination"]["subscriptions"].as_array().unwrap().len() >= 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_not_sent_again_until_it_changes() {
    let mut bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    let response = proxy.next().await;
    proxy.nack(&response, "two endpoints share a port").await;
    proxy.assert_silent().await;
    let (_, proxies) = bench.api("GET", "/api/v1/proxies", None).await;
    let service = &proxies["proxies"][0]["types"]["Service"];
    assert_eq!(service["nack"]["message"], "two endpoints share a port");
    assert_eq!(service["subscriptions"][0]["state"], "refused");

    bench.write("orders.yaml", &ORDERS.replace("127.0.0.2", "127.0.0.3"));
    let (orders, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(orders.endpoints[1].address, "127.0.0.3");
    let metrics = bench.monitoring("/metrics").await;
    assert!(metrics.contains("outrigger_ads_nacks_total{type=\"Service\"} 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reconnect_only_what_changed_is_sent_even_by_a_restarted_controller() {
    let mut bench =
        Bench::of(&[("orders.yaml", ORDERS), ("other.yaml", "kind: Service\nname: other\n")]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop", "other.default", "gone.shop"]).await;
    // In one response or two: the controller may know the absent before the present has its policies.
    let (mut present, mut absent) = (Vec::new(), Vec::new());
    while present.len() + absent.len() < 3 {
        let response = proxy.take("Service").await;
        present.extend(response.resources);
        absent.extend(response.removed_resources);
    }
    assert_eq!(absent, ["gone.shop"]);
    let version = |name: &str| present.iter().find(|r| r.name == name).unwrap().version.clone();
    let (orders, other) = (version("orders.shop"), version("other.default"));
    proxy.subscribe("Destination", &["orders.shop.mesh"]).await;
    let (destination, named): (Destination, _) = proxy.one("Destination").await;

    bench.down().await;
    assert_eq!(proxy.end().await.map(|status| status.code()), Some(Code::Unavailable), "told to reconnect");
    // What is on disk changes while the controller is away.
    bench.write("other.yaml", "kind: Service\nname: other\nports: [{port: 1}]\n");
    bench.up().await;
    let mut proxy = web.discover(&bench).await;
    proxy.resume("Destination", &["orders.shop.mesh"], &[("orders.shop.mesh", &named)]).await;
    let held = [("orders.shop", orders.as_str()), ("other.default", &other), ("gone.shop", "x")];
    proxy.resume("Service", &["orders.shop", "other.default", "gone.shop"], &held).await;
    // What left while we were away is told as gone, the changed is sent, the unchanged is not: in one response or two,
    // because the controller may know the present before it knows the absent.
    let mut told = Vec::new();
    while told.len() < 2 {
        let response = proxy.take("Service").await;
        told.extend(response.resources.into_iter().map(|resource| resource.name));
        told.extend(response.removed_resources);
    }
    told.sort();
    assert_eq!(told, ["gone.shop", "other.default"]);
    proxy.assert_silent().await;
    assert!(!destination.virtual_addresses.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_said_not_to_exist_before_every_source_is_synced() {
    // There from the start, and never read: it may hold anything.
    let mut bench = Bench::of(&[("broken.yaml", "kind: Service\nname: ["), ("orders.yaml", ORDERS)]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.resume("Service", &["late.shop", "never.shop"], &[("late.shop", "a"), ("never.shop", "b")]).await;
    proxy.subscribe("Destination", &["127.0.0.9:1"]).await;
    proxy.assert_silent().await;
    // What is there is answered all the same.
    proxy.subscribe("Service", &["orders.shop"]).await;
    let _: (Service, _) = proxy.one("Service").await;
    proxy.assert_silent().await;
    let ready = bench.monitoring("/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");

    bench.write("broken.yaml", "kind: Service\nname: late\nnamespace: shop\n");
    // What is there comes with its policies, and so perhaps a moment after what is not.
    let mut told = Vec::new();
    while told.len() < 3 {
        let response = proxy.next().await;
        proxy.ack(&response).await;
        told.extend(response.resources.into_iter().map(|resource| resource.name));
        told.extend(response.removed_resources.into_iter().map(|name| format!("no {name}")));
    }
    told.sort();
    assert_eq!(told, ["late.shop", "no 127.0.0.9:1", "no never.shop"]);
    let ready = bench.monitoring("/ready").await;
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");

    // Later faults remove nothing.
    bench.write("broken.yaml", "kind: Service\nname: late\nnamespace: shop\ncolour: red\n");
    let fault = soon("the fault", async {
        loop {
            let (_, sources) = bench.api("GET", "/api/v1/sources", None).await;
            if let Some(fault) = sources["sources"][0]["faults"].get(0) {
                assert_eq!(sources["sources"][0]["state"], "synced");
                break fault.clone();
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(fault["subject"].as_str().unwrap().ends_with("broken.yaml:4"), "{fault}");
    assert!(fault["reason"].as_str().unwrap().contains("colour"), "{fault}");
    proxy.assert_silent().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_workloads_with_a_leaf_discover_and_announce() {
    let bench = Bench::start().await;
    let refused = Discovery::open(bench.stranger().await).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    let refused = Announcing::open(bench.stranger().await).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");

    // A leaf of another mesh's CA, however alike, does not even get a connection.
    let other = Bench::start().await;
    let forged = other.workload("web", &[]).await;
    let credentials = outrigger_certs::Credentials::new(bench.bundle());
    let _ = credentials.set_leaf(forged.credentials.leaf().unwrap());
    let tls = credentials.client_config(&bench.config.identity().unwrap(), &[b"h2"]).unwrap();
    let refused = match bench.channel(tls).await {
        Err(_) => true,
        // TLS 1.3 lets the client finish first; the refusal comes with the first use.
        Ok(channel) => Discovery::open(channel).await.is_err(),
    };
    assert!(refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_sees_its_own_inbound_configuration_only() {
    let bench = Bench::start().await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    let (own, other) = (identity("web"), identity("orders"));
    proxy.subscribe("Inbound", &[other.as_str(), own.as_str()]).await;
    let response = proxy.take("Inbound").await;
    assert_eq!(response.removed_resources, [other.as_str()]);
    assert_eq!(response.resources[0].name, own.as_str());

    proxy
        .send(DeltaDiscoveryRequest {
            type_url: "type.googleapis.com/envoy.config.listener.v3.Listener".to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            ..Default::default()
        })
        .await;
    proxy.assert_silent().await;
    let metrics = bench.monitoring("/metrics").await;
    assert!(metrics.contains("outrigger_ads_unknown_types_total 1"), "{metrics}");
    assert!(metrics.contains("outrigger_ads_refused_total{reason=\"other_inbound\"} 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_of_a_stream_are_bounded() {
    let bench = Bench::start_with(&[], |config| config.max_subscriptions = 3).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["a.x", "b.x", "c.x", "d.x"]).await;
    assert_eq!(proxy.take("Service").await.removed_resources, ["a.x", "b.x", "c.x"]);
    let request = DeltaDiscoveryRequest {
        type_url: url("Service"),
        resource_names_subscribe: vec!["d.x".to_owned()],
        resource_names_unsubscribe: vec!["a.x".to_owned()],
        ..Default::default()
    };
    proxy.send(request.clone()).await;
    proxy.send(request).await;
    assert_eq!(
        proxy.take("Service").await.removed_resources,
        ["d.x"],
        "there is room after the unsubscription"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_acknowledges_delays_nobody_and_gets_the_latest() {
    let mut bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let web = bench.workload("web", &[]).await;
    let mut slow = web.discover(&bench).await;
    let mut quick = web.discover(&bench).await;
    for proxy in [&mut slow, &mut quick] {
        proxy.subscribe("Service", &["orders.shop"]).await;
    }
    let unacknowledged = slow.next().await;
    let _: (Service, _) = quick.one("Service").await;
    for host in 10..20 {
        let address = format!("127.0.0.{host}");
        bench.write("orders.yaml", &ORDERS.replace("127.0.0.2", &address));
        let (orders, _): (Service, _) = quick.one("Service").await;
        assert_eq!(orders.endpoints[1].address, address);
    }
    slow.assert_silent().await;
    slow.ack(&unacknowledged).await;
    let (orders, _): (Service, _) = slow.one("Service").await;
    assert_eq!(orders.endpoints[1].address, "127.0.0.19", "one push with the latest, not ten");
    slow.assert_silent().await;
}
