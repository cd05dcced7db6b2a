//! Who is an endpoint: an instance without an identity in its source is meshed only when its sidecar has claimed it.

use outrigger_api::v1::{Destination, Health, Inbound, Service};

use crate::harness::{Announcing, Bench, Discovery, identity};

/// Two instances that the source does not vouch for, as from Consul, and one that it does.
const ORDERS: &str = "kind: Service\nname: orders\nnamespace: shop\nports: [{port: 80, targetPort: 8080, protocol: GRPC}]\nendpoints:\n- {address: 127.0.0.1}\n- {address: 127.0.0.2}\n- {address: 127.0.0.3, identity: 'spiffe://outrigger.local/ns/shop/sa/payments'}\n";

async fn identities(proxy: &mut Discovery) -> Vec<String> {
    let (service, _): (Service, _) = proxy.one("Service").await;
    service.endpoints.into_iter().map(|endpoint| endpoint.identity).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_meshes_an_instance_and_stays_with_it() {
    let mut bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let web = bench.workload("web", &[]).await;
    let orders = bench.workload("orders", &["orders.shop"]).await;
    let (me, vouched) = (identity("orders").to_string(), identity("payments").to_string());
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    assert_eq!(identities(&mut proxy).await, ["", "", &vouched]);

    let channel = orders.channel(&bench).await;
    let mut own = Discovery::open(channel.clone()).await.unwrap();
    own.subscribe("Inbound", &[&me]).await;
    let (inbound, _): (Inbound, _) = own.one("Inbound").await;
    assert!(inbound.claims.is_empty());
    let mut announcing = Announcing::open(channel).await.unwrap();
    // An empty address is the one that the stream comes from.
    assert_eq!(announcing.say(&[("orders.shop", "", 8080)], false).await, [(true, String::new())]);
    assert_eq!(identities(&mut proxy).await, [&me, "", &vouched]);
    let (inbound, _): (Inbound, _) = own.one("Inbound").await;
    assert_eq!((inbound.claims.len(), inbound.claims[0].accepted), (1, true));
    assert_eq!(inbound.claims[0].protocol(), outrigger_api::v1::Protocol::Grpc);

    // Leaving: told, and kept when the stream is lost.
    announcing.say(&[("orders.shop", "", 8080)], true).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(service.endpoints[0].health(), Health::Draining);
    drop((announcing, own));

    bench.down().await;
    bench.up().await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!((&service.endpoints[0].identity, service.endpoints[0].health()), (&me, Health::Draining));

    // Back again.
    let mut announcing = orders.announce(&bench).await;
    announcing.say(&[("orders.shop", "127.0.0.1", 8080)], false).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!((&service.endpoints[0].identity, service.endpoints[0].health()), (&me, Health::Healthy));
    drop(announcing);

    // The instance leaves its source, and comes back as nobody's.
    bench.write("orders.yaml", &ORDERS.replace("- {address: 127.0.0.1}\n", ""));
    assert_eq!(identities(&mut proxy).await, ["", &vouched]);
    // The stream may be seen to end only now; until it does, the claim waits for its instance.
    crate::harness::soon("the end of the announcement", async {
        while bench.monitoring("/metrics").await.lines().all(|line| line != "outrigger_announcers 0") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    bench.write("orders.yaml", ORDERS);
    assert_eq!(identities(&mut proxy).await, ["", "", &vouched]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_outside_the_token_is_refused_and_gets_no_traffic() {
    let bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    let before = identities(&mut proxy).await;

    // A valid workload whose token names another service.
    let thief = bench.workload("thief", &["thief.shop"]).await;
    let mut announcing = thief.announce(&bench).await;
    let verdict = announcing.say(&[("orders.shop", "127.0.0.1", 8080)], false).await;
    assert!(!verdict[0].0 && verdict[0].1.contains("orders.shop"), "{verdict:?}");

    // The right service from an address that its token does not hold, be it the peer's own.
    let token = bench.token("far", &["orders.shop"], &["10.0.0.0/8"]).await;
    let far = bench.join(&token).await.unwrap();
    let mut announcing = far.announce(&bench).await;
    let verdict = announcing
        .say(
            &[
                ("orders.shop", "127.0.0.1", 8080),
                ("orders.shop", "", 8080),
                ("orders.shop", "nowhere", 8080),
                ("orders.shop", "10.0.0.1", 0),
                ("../etc", "10.0.0.1", 1),
                ("orders.shop", "10.0.0.1", 8080),
            ],
            false,
        )
        .await;
    assert_eq!(
        verdict.iter().map(|claim| claim.0).collect::<Vec<_>>(),
        [false, false, false, false, false, true]
    );

    // A token without networks holds for the peer's address alone; and what the source vouches for is not claimed.
    let token = bench.token("near", &["orders.shop"], &[]).await;
    let near = bench.join(&token).await.unwrap();
    let mut announcing = near.announce(&bench).await;
    let verdict = announcing
        .say(&[("orders.shop", "127.0.0.2", 8080), ("orders.shop", "127.0.0.3", 8080)], false)
        .await;
    assert_eq!(verdict.iter().map(|claim| claim.0).collect::<Vec<_>>(), [false, false], "{verdict:?}");
    proxy.assert_silent().await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    assert_eq!(identities(&mut proxy).await, before);

    let metrics = bench.monitoring("/metrics").await;
    for (reason, count) in [("service", 1), ("address", 3), ("malformed", 3), ("other_identity", 1)] {
        let line = format!("outrigger_claims_refused_total{{reason=\"{reason}\"}} {count}");
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_services_at_one_address_the_older_claim_is_meant() {
    let service =
        |name: &str| format!("kind: Service\nname: {name}\nendpoints: [{{address: 127.0.0.1, port: 7}}]\n");
    let bench = Bench::of(&[("a.yaml", &service("a")), ("b.yaml", &service("b"))]).await;
    let b = bench.workload("b", &["b"]).await;
    let mut proxy = b.discover(&bench).await;
    proxy.subscribe("Destination", &["127.0.0.1:7"]).await;
    let (found, _): (Destination, _) = proxy.one("Destination").await;
    assert_eq!(found.service, "a.default", "by name, while nobody has claimed it");
    let mut announcing = b.announce(&bench).await;
    assert!(announcing.say(&[("b", "", 7)], false).await[0].0);
    let (found, _): (Destination, _) = proxy.one("Destination").await;
    assert_eq!(found.service, "b.default");
    let (_, sources) = bench.api("GET", "/api/v1/sources", None).await;
    assert_eq!(sources["shared_addresses"][0]["services"][1], "b.default");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workloads_never_hold_one_instance() {
    let bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let first = bench.workload("first", &["orders.shop"]).await;
    let second = bench.workload("second", &["orders.shop"]).await;
    let mut proxy = first.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    identities(&mut proxy).await;
    let mut one = first.announce(&bench).await;
    assert!(one.say(&[("orders.shop", "127.0.0.1", 8080)], false).await[0].0);
    assert_eq!(identities(&mut proxy).await[0], identity("first").as_str());
    let mut two = second.announce(&bench).await;
    let verdict = two.say(&[("orders.shop", "127.0.0.1", 8080)], false).await;
    assert!(!verdict[0].0, "{verdict:?}");
    // When the first has gone the second is judged again by itself, and told.
    drop(one);
    assert_eq!(identities(&mut proxy).await[0], identity("second").as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_may_come_before_its_instance_and_learns_its_protocol() {
    let mut bench = Bench::start().await;
    let orders = bench.workload("orders", &["orders.shop"]).await;
    let channel = orders.channel(&bench).await;
    let mut announcing = Announcing::open(channel.clone()).await.unwrap();
    let verdict = announcing.say(&[("orders.shop", "", 8080)], false).await;
    assert!(verdict[0].0 && verdict[0].1.contains("no source"), "{verdict:?}");
    let mut own = Discovery::open(channel).await.unwrap();
    own.subscribe("Inbound", &[identity("orders").as_str()]).await;
    let (inbound, _): (Inbound, _) = own.one("Inbound").await;
    assert_eq!(inbound.claims[0].protocol(), outrigger_api::v1::Protocol::Unspecified);

    bench.write("orders.yaml", ORDERS);
    let (inbound, _): (Inbound, _) = own.one("Inbound").await;
    assert_eq!(inbound.claims[0].protocol(), outrigger_api::v1::Protocol::Grpc);
    own.subscribe("Service", &["orders.shop"]).await;
    assert_eq!(identities(&mut own).await[0], identity("orders").as_str());
}
