//! The control thread against a controller that speaks the real protocols.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::support::{DOMAIN, Fake, WORKLOAD, endpoint_at, eventually};
use outrigger_api::{type_url, v1};
use outrigger_certs::CertificateAuthority;
use outrigger_core::resolve::{Knowledge, Resolution, resolve};
use outrigger_proxy::{
    config::{Config, ServiceClaim},
    context::Context,
    discovery::directory::Target,
    drain::Phase,
    run,
};
use prost::Message;
use tempfile::TempDir;

struct Sidecar {
    ctx: Arc<Context>,
    _folder: TempDir,
}

fn sidecar(fake: &Fake) -> Sidecar {
    sidecar_with(fake, |_| {})
}

fn sidecar_with(fake: &Fake, change: impl FnOnce(&mut Config)) -> Sidecar {
    let folder = tempfile::tempdir().unwrap();
    let mut config = fake.config(folder.path());
    change(&mut config);
    let (ctx, asks) = Context::from_config(config).unwrap();
    let ctx = Arc::new(ctx);
    run::start(&ctx, asks);
    Sidecar { ctx, _folder: folder }
}

impl Sidecar {
    async fn ready(&self) {
        eventually("a certificate and the mesh", || self.ctx.ready.missing() == ["listeners"]).await;
    }

    async fn target(&self, address: &str) -> Target {
        match self.ctx.directory.resolve(address.parse().unwrap()).await {
            Knowledge::Found(target) => target,
            other => panic!("{address}: {other:?}"),
        }
    }

    fn endpoint(target: &Target) -> String {
        target.service.load().endpoints[0].address.to_string()
    }
}

const ORDERS: &str = "10.1.1.1:80";

#[tokio::test]
async fn a_sidecar_that_starts_first_refuses_until_the_controller_is_there() {
    let fake = Fake::new().await;
    fake.add_service(ORDERS, "orders.shop", "1", "10.2.2.2");
    let sidecar = sidecar(&fake);
    let address: SocketAddr = ORDERS.parse().unwrap();

    let knowledge = sidecar.ctx.directory.resolve(address).await;
    assert!(matches!(knowledge, Knowledge::Silent));
    let ranges = sidecar.ctx.directory.ranges();
    assert!(matches!(resolve(address.ip(), knowledge, &ranges), Resolution::Refuse(_)));

    fake.start().await;
    sidecar.ready().await;
    let target = sidecar.target(ORDERS).await;
    assert_eq!((&**target.service.name(), target.port), ("orders.shop", 80));
    assert_eq!(Sidecar::endpoint(&target), "10.2.2.2");
    assert_eq!(sidecar.ctx.credentials.leaf().unwrap().id().as_str(), WORKLOAD);
}

#[tokio::test]
async fn a_bad_resource_is_refused_and_the_last_good_one_stays() {
    let fake = Fake::new().await;
    fake.start().await;
    fake.add_service(ORDERS, "orders.shop", "1", "10.2.2.2");
    fake.add_service("10.1.1.2:80", "payments.shop", "1", "10.2.2.3");
    let sidecar = sidecar(&fake);
    sidecar.ready().await;
    let (orders, payments) = (sidecar.target(ORDERS).await, sidecar.target("10.1.1.2:80").await);

    let service = |name: &str, address: &str| {
        let endpoints = vec![endpoint_at(address)];
        let namespace = "shop".to_owned();
        v1::Service { name: name.to_owned(), namespace, endpoints, ..Default::default() }.encode_to_vec()
    };
    fake.set_bytes(&[
        (type_url::SERVICE, "orders.shop", "2", service("orders", "no address")),
        (type_url::SERVICE, "payments.shop", "2", service("payments", "10.9.9.9")),
    ]);
    eventually("the good service is applied", || Sidecar::endpoint(&payments) == "10.9.9.9").await;
    assert_eq!(Sidecar::endpoint(&orders), "10.2.2.2");
    eventually("a NACK that names the fault", || {
        let nack = fake.state().requests.iter().rev().find_map(|request| request.error_detail.clone());
        nack.is_some_and(|nack| nack.message.contains("orders.shop") && !nack.message.contains("payments"))
    })
    .await;

    // An identity of another trust domain, bytes that are no message, another service's content.
    let mut foreign = endpoint_at("10.2.2.2");
    foreign.identity = "spiffe://elsewhere.example/ns/shop/sa/orders".to_owned();
    let foreign = v1::Service {
        name: "orders".to_owned(),
        namespace: "shop".to_owned(),
        endpoints: vec![foreign],
        ..Default::default()
    };
    for bytes in [foreign.encode_to_vec(), vec![0xff; 7], service("payments", "10.3.3.3")] {
        let nacks = || fake.state().requests.iter().filter(|request| request.error_detail.is_some()).count();
        let before = nacks();
        fake.set_bytes(&[(type_url::SERVICE, "orders.shop", "3", bytes)]);
        eventually("another NACK", || nacks() == before + 1).await;
        assert_eq!(Sidecar::endpoint(&orders), "10.2.2.2");
    }
}

#[tokio::test]
async fn a_lost_stream_changes_nothing_and_versions_are_said_again() {
    let fake = Fake::new().await;
    fake.start().await;
    fake.add_service(ORDERS, "orders.shop", "7", "10.2.2.2");
    let sidecar = sidecar(&fake);
    sidecar.ready().await;
    let target = sidecar.target(ORDERS).await;

    fake.stop().await;
    eventually("the loss is noticed", || {
        sidecar.ctx.metrics.encode().contains("outrigger_controller_connected 0")
    })
    .await;
    assert_eq!(Sidecar::endpoint(&sidecar.target(ORDERS).await), "10.2.2.2");
    // Not known and nobody to ask: silence.
    let other = sidecar.ctx.directory.resolve("10.7.7.7:80".parse().unwrap()).await;
    assert!(matches!(other, Knowledge::Silent));

    // Long enough for the pauses between attempts to have grown to their longest.
    eventually("ten attempts have failed", || {
        let metrics = sidecar.ctx.metrics.encode();
        let prefix = "outrigger_controller_connects_total{outcome=\"failed\"} ";
        let failed = metrics.lines().find_map(|line| line.strip_prefix(prefix)?.parse().ok());
        failed.is_some_and(|failed: u32| failed >= 10)
    })
    .await;
    fake.state().requests.clear();
    fake.set(
        type_url::SERVICE,
        "orders.shop",
        "8",
        &v1::Service {
            name: "orders".to_owned(),
            namespace: "shop".to_owned(),
            endpoints: vec![endpoint_at("10.2.2.8")],
            ..Default::default()
        },
    );
    fake.start().await;
    let start = Instant::now();
    // The change made meanwhile arrives in the handle that was held all along.
    eventually("the change arrives", || Sidecar::endpoint(&target) == "10.2.2.8").await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let state = fake.state();
    let versions = |url: &str| {
        state.requests.iter().find(|r| r.type_url == url).unwrap().initial_resource_versions.clone()
    };
    assert_eq!(versions(type_url::SERVICE)["orders.shop"], "7");
    assert_eq!(versions(type_url::DESTINATION)[ORDERS], "7");
    assert_eq!(versions(type_url::MESH)["mesh"], "1");
}

#[tokio::test]
async fn not_found_is_an_answer_and_silence_is_none() {
    let fake = Fake::new().await;
    fake.start().await;
    fake.state().absent.insert("10.1.1.9:80".to_owned());
    let sidecar = sidecar(&fake);
    sidecar.ready().await;
    let ask = |address: &str| {
        let directory = &sidecar.ctx.directory;
        let address = address.parse().unwrap();
        async move { directory.resolve(address).await }
    };
    let start = Instant::now();
    assert!(matches!(ask("10.1.1.9:80").await, Knowledge::NotFound));
    assert!(start.elapsed() < Duration::from_millis(900));
    assert!(matches!(ask("10.1.1.8:80").await, Knowledge::Silent));
    assert!(start.elapsed() >= Duration::from_secs(1));

    // The same address comes to be: the live subscription brings it.
    fake.add_service("10.1.1.8:80", "late.shop", "1", "10.2.2.2");
    eventually("the push arrives", || sidecar.ctx.metrics.encode().contains("discovery_services 1")).await;
    assert_eq!(&**sidecar.target("10.1.1.8:80").await.service.name(), "late.shop");
    // And goes: who holds it sees it without endpoints.
    let held = sidecar.target("10.1.1.8:80").await;
    fake.remove(type_url::SERVICE, "late.shop");
    eventually("the removal arrives", || held.service.load().endpoints.is_empty()).await;
    fake.remove(type_url::DESTINATION, "10.1.1.8:80");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !matches!(ask("10.1.1.8:80").await, Knowledge::NotFound) {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn names_and_services_resolve_with_the_dialled_port() {
    let fake = Fake::new().await;
    fake.start().await;
    fake.add_service("orders.shop.mesh", "orders.shop", "1", "10.2.2.2");
    let sidecar = sidecar(&fake);
    sidecar.ready().await;
    let directory = &sidecar.ctx.directory;
    let Knowledge::Found(by_name) = directory.resolve_name("Orders.SHOP.mesh.", 8080).await else { panic!() };
    let Knowledge::Found(by_service) = directory.resolve_service("orders.shop", 81).await else { panic!() };
    assert_eq!((by_name.port, by_service.port), (8080, 81));
    assert_eq!(by_name.service, by_service.service);
}

#[tokio::test]
async fn a_certificate_renews_by_the_one_before_and_outlives_refusals() {
    let fake = Fake::new().await;
    fake.start().await;
    {
        let mut state = fake.state();
        state.leaf_life = Duration::from_secs(3);
        // The first answer is for another key: it must not be taken.
        state.forge = 1;
    }
    let sidecar = sidecar(&fake);
    sidecar.ready().await;
    assert_eq!(fake.state().signed_by_token, 2);
    let first = sidecar.ctx.credentials.leaf().unwrap();
    // What is signed is not held yet: `first` may be a renewed one itself on a busy machine.
    let renewed = || {
        let now = sidecar.ctx.credentials.leaf().unwrap();
        now.chain()[0] != first.chain()[0] && now.not_after() > first.not_after()
    };
    eventually("a renewal by the leaf", || fake.state().signed_by_leaf >= 2 && renewed()).await;
    assert_eq!(fake.state().signed_by_token, 2, "the one-time token was used again");

    // The controller is away past the end of the leaf: the token's way begins anew.
    fake.stop().await;
    eventually("the leaf has ended", || sidecar.ctx.ready.missing().contains(&"certificate".to_owned()))
        .await;
    fake.state().token_uses = 1;
    fake.start().await;
    sidecar.ready().await;
    assert_eq!(fake.state().signed_by_token, 3);
}

#[tokio::test]
async fn a_pushed_trust_bundle_is_used_and_an_old_one_is_not() {
    let fake = Fake::new().await;
    fake.start().await;
    let sidecar = sidecar(&fake);
    sidecar.ready().await;
    let domain = DOMAIN.parse().unwrap();
    let store = CertificateAuthority::generate_pem(&domain).unwrap();
    let next = CertificateAuthority::from_store(&store, &domain).unwrap();
    let set = |epoch: u64, more: &[&CertificateAuthority]| {
        fake.set(type_url::TRUST_BUNDLE, "trust-bundle", &epoch.to_string(), &fake.bundle(epoch, more));
    };
    set(5, &[&next]);
    eventually("both roots are trusted", || sidecar.ctx.credentials.bundle().roots().len() == 2).await;
    let refusals = || sidecar.ctx.metrics.encode().matches("outcome=\"refused\"} 1").count();
    set(4, &[]);
    eventually("the older one is refused", || refusals() == 1).await;
    assert_eq!(sidecar.ctx.credentials.bundle().epoch(), 5);
}

#[tokio::test]
async fn only_the_controllers_identity_is_believed() {
    let fake = Fake::new().await.impostor();
    fake.start().await;
    let sidecar = sidecar(&fake);
    eventually("an attempt has failed", || {
        sidecar.ctx.metrics.encode().contains("controller_connects_total{outcome=\"failed\"}")
    })
    .await;
    assert!(sidecar.ctx.credentials.leaf().is_none());
    assert_eq!(fake.state().token_uses, 1, "the token was shown to an impostor");
}

#[tokio::test]
async fn claims_are_announced_and_leaving_is_said() {
    let fake = Fake::new().await;
    fake.state().accept_claims = false;
    fake.start().await;
    let sidecar = sidecar_with(&fake, |config| {
        config.services = vec![ServiceClaim { service: "web.shop".to_owned(), port: 8080, address: None }];
    });
    sidecar.ready().await;
    eventually("the refusal is counted", || sidecar.ctx.metrics.encode().contains("claims_refused 1")).await;
    let first = fake.state().announcements[0].clone();
    assert_eq!((&*first.claims[0].service, first.claims[0].port, first.draining), ("web.shop", 8080, false));
    sidecar.ctx.drain.advance(Phase::Inbound);
    eventually("leaving is said", || fake.state().announcements.last().unwrap().draining).await;
}

#[tokio::test]
async fn the_number_of_destinations_is_bounded() {
    let fake = Fake::new().await;
    fake.start().await;
    let sidecar = sidecar_with(&fake, |config| config.limits.destinations = 8);
    sidecar.ready().await;
    let asked: Vec<_> = (1..=40)
        .map(|n| {
            let ctx = sidecar.ctx.clone();
            tokio::spawn(async move { ctx.directory.resolve(SocketAddr::from(([10, 9, 9, n], 80))).await })
        })
        .collect();
    for answer in asked {
        assert!(matches!(answer.await.unwrap(), Knowledge::Silent));
    }
    assert!(sidecar.ctx.metrics.encode().contains("outrigger_discovery_destinations 8"));
}
