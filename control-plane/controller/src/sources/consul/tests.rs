//! The mapping and the judgement without I/O; the whole against a Consul of a few lines on loopback. What can go wrong
//! with single answers is tested in `outrigger_consul`.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use http_body_util::Full;
use hyper::{Request, Response, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use outrigger_api::v1;
use outrigger_consul::Health;
use serde_json::json;
use tokio::{net::TcpListener, time::Instant};

use super::*;

fn instance(dc: &str, id: &str, address: &str) -> Instance {
    Instance {
        id: InstanceId { datacenter: dc.into(), node: "n1".into(), service_id: id.into() },
        service: "web".into(),
        namespace: None,
        address: address.parse().unwrap(),
        weight: 10,
        health: Health::Passing,
        meta: BTreeMap::new(),
        tags: Vec::new(),
        virtual_address: None,
        zone: None,
        protocol: None,
    }
}

#[test]
fn instances_become_a_service() {
    let key = ServiceKey::new("Web", "default").unwrap();
    let mut a = instance("dc1", "a", "10.0.0.1:80");
    a.zone = Some("z1".into());
    a.virtual_address = Some("240.0.0.1".parse().unwrap());
    let mut b = instance("DC2", "b", "[2001:db8::1]:81");
    b.protocol = Some("http2".into());
    let service = merge::service(&key, "consul", "default", [&b, &a].into_iter());
    assert_eq!(service.key.as_str(), "web.default");
    assert_eq!(
        service.names,
        ["web.service.consul", "web.service.dc2.consul", "web.service.dc1.consul", "web.virtual.consul"]
    );
    assert_eq!(service.virtual_addresses, ["240.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(service.protocol, v1::Protocol::Http2);
    assert!(service.ports.is_empty());
    let ids: Vec<_> = service.instances.iter().map(|i| i.id.as_str()).collect();
    assert_eq!(ids, ["DC2/n1/b", "dc1/n1/a"]);
    let last = &service.instances[1];
    assert_eq!(
        (last.ports[&0], last.weight, last.zone.as_str(), last.region.as_str()),
        (80, 10, "z1", "dc1")
    );
    assert_eq!(last.identity, None, "Consul proves no identity");

    // Instances that contradict each other give no hint.
    a.protocol = Some("tcp".into());
    assert_eq!(
        merge::service(&key, "consul", "default", [&a, &b].into_iter()).protocol,
        v1::Protocol::Unspecified
    );
    let key = ServiceKey::new("web", "shop").unwrap();
    let service = merge::service(&key, "consul", "default", [&a].into_iter());
    assert_eq!(
        service.names,
        ["web.service.shop.ns.consul", "web.service.shop.ns.dc1.dc.consul", "web.virtual.shop.ns.consul"]
    );
}

#[test]
fn checks_become_health_and_weight() {
    let key = ServiceKey::new("web", "default").unwrap();
    for (health, weight, want, want_weight) in [
        (Health::Passing, 10, v1::Health::Healthy, 10),
        (Health::Warning, 2, v1::Health::Degraded, 2),
        (Health::Warning, 0, v1::Health::Unhealthy, 1),
        (Health::Critical, 10, v1::Health::Unhealthy, 10),
        (Health::Maintenance, 10, v1::Health::Draining, 10),
    ] {
        let from = Instance { health, weight, ..instance("dc1", "a", "10.0.0.1:80") };
        let service = merge::service(&key, "consul", "default", [&from].into_iter());
        let got = &service.instances[0];
        assert_eq!((got.health, got.weight), (want, want_weight), "{health:?} {weight}");
    }
}

#[test]
fn synced_only_when_all_answered_and_degraded_since_the_first_trouble() {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let none = || Trouble::default();
    let starting = || Trouble { starting: true, degraded: None };
    let bad = |text: &str| Trouble { starting: false, degraded: Some(text.into()) };
    assert_eq!(next_sync(&Sync::Never, starting(), at(1)), Sync::Never);
    assert_eq!(next_sync(&Sync::Never, bad("x"), at(1)), Sync::Never);
    assert_eq!(next_sync(&Sync::Never, none(), at(1)), Sync::Synced);
    assert_eq!(next_sync(&Sync::Synced, starting(), at(2)), Sync::Synced);
    let degraded = next_sync(&Sync::Synced, bad("x"), at(3));
    assert_eq!(degraded, Sync::Degraded { since: at(3), reason: "x".into() });
    let later = next_sync(&degraded, bad("y"), at(4));
    assert_eq!(later, Sync::Degraded { since: at(3), reason: "y".into() });
    assert_eq!(next_sync(&later, none(), at(5)), Sync::Synced);

    let mut trouble = Trouble::default();
    assert!(trouble.add(&Status::Degraded(Reason::SuddenlyEmpty), String::new).is_some());
    assert_eq!(trouble, none());
    assert!(trouble.add(&Status::Degraded(Reason::Filtered), || "names".into()).is_some());
    assert!(trouble.degraded.unwrap().starts_with("names: "));
}

/// A Consul of a few lines.
#[derive(Clone)]
struct Fake {
    world: Arc<Mutex<World>>,
    changed: watch::Sender<()>,
    connections: Arc<AtomicUsize>,
    most_connections: Arc<AtomicUsize>,
}

struct World {
    index: u64,
    /// Name -> addresses.
    services: BTreeMap<String, Vec<String>>,
    listed: bool,
    broken: bool,
}

impl Fake {
    async fn start() -> (Self, SocketAddr) {
        let world = World { index: 5, services: BTreeMap::new(), listed: true, broken: false };
        let fake = Self {
            world: Arc::new(Mutex::new(world)),
            changed: watch::Sender::new(()),
            connections: Arc::default(),
            most_connections: Arc::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let fake = server.clone();
                tokio::spawn(async move {
                    let now = fake.connections.fetch_add(1, Ordering::SeqCst) + 1;
                    fake.most_connections.fetch_max(now, Ordering::SeqCst);
                    let answer = |request| {
                        let fake = fake.clone();
                        async move { Ok::<_, Infallible>(fake.answer(request).await) }
                    };
                    let http = hyper::server::conn::http1::Builder::new();
                    let _ = http.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
                    fake.connections.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        (fake, address)
    }

    fn change(&self, change: impl FnOnce(&mut World)) {
        {
            let mut world = self.world.lock().unwrap();
            world.index += 1;
            change(&mut world);
        }
        self.changed.send_replace(());
    }

    fn set(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
        self.change(|world| {
            world.services.insert(name.to_owned(), addresses);
        });
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let mut changes = self.changed.subscribe();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let number = |name: &str| {
            let pair = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
            pair.trim_end_matches("ms").parse::<u64>().ok()
        };
        if let (Some(index), Some(wait)) = (number("index"), number("wait")) {
            let moved = async {
                while self.world.lock().unwrap().index == index {
                    changes.changed().await.unwrap();
                }
            };
            let _ = tokio::time::timeout(Duration::from_millis(wait), moved).await;
        }
        let world = self.world.lock().unwrap();
        let entries = |name: &str| {
            let addresses = world.services.get(name).into_iter().flatten().enumerate();
            let entry = |(at, address): (usize, &String)| {
                json!({
                    "Node": {"Node": "n1", "Address": "10.0.0.9", "Datacenter": "dc1"},
                    "Service": {"ID": format!("{name}-{at}"), "Service": name, "Address": address, "Port": 80},
                    "Checks": [],
                })
            };
            addresses.map(entry).collect::<Vec<_>>()
        };
        let body = match request.uri().path().strip_prefix("/v1/health/service/") {
            _ if world.broken => "{".to_owned(),
            Some(name) => json!(entries(name)).to_string(),
            None if world.listed => json!(world.services).to_string(),
            None => json!({}).to_string(),
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        response.headers_mut().insert("x-consul-index", world.index.into());
        response
    }
}

fn start(address: SocketAddr) -> (watch::Receiver<Arc<Snapshot>>, impl Drop) {
    let stop = CancellationToken::new();
    let guard = stop.clone().drop_guard();
    let config = Config { addresses: vec![address.to_string()], ..Config::default() };
    (spawn(config, stop).unwrap().snapshots, guard)
}

async fn until(
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    seconds: u64,
    what: &str,
    condition: impl Fn(&Snapshot) -> bool,
) -> Arc<Snapshot> {
    let limit = Duration::from_secs(seconds);
    let found = tokio::time::timeout(limit, snapshots.wait_for(|snapshot| condition(snapshot))).await;
    let found = found.ok().map(|snapshot| snapshot.unwrap().clone());
    found.unwrap_or_else(|| panic!("not within {limit:?}: {what}; now: {:#?}", snapshots.borrow()))
}

fn addresses(snapshot: &Snapshot, key: &str) -> Vec<String> {
    let service = snapshot.services.get(&ServiceKey::parse(key).unwrap());
    service.iter().flat_map(|s| &s.instances).map(|i| i.address.to_string()).collect()
}

#[tokio::test]
async fn follows_consul_and_keeps_the_last_good() {
    let (fake, address) = Fake::start().await;
    fake.set("web", &["10.0.0.1", "127.0.0.1"]);
    fake.set("db", &["10.0.0.2"]);
    fake.set("bad name", &["10.0.0.3"]);
    let (mut snapshots, _guard) = start(address);
    let first = until(&mut snapshots, 5, "synced", |s| s.sync == Sync::Synced).await;
    assert_eq!(first.services.len(), 2);
    assert_eq!(addresses(&first, "web"), ["10.0.0.1"]);
    let faults: Vec<_> = first.faults.iter().map(|fault| fault.subject.as_str()).collect();
    assert_eq!(faults, ["instance dc1/n1/web-1 of web", "a service in the agent's datacenter"]);

    // A change of one service leaves the other's `Arc` alone.
    fake.set("web", &["10.0.0.1", "10.0.0.4"]);
    let second = until(&mut snapshots, 2, "change", |s| addresses(s, "web").len() == 2).await;
    let db = ServiceKey::parse("db").unwrap();
    assert!(Arc::ptr_eq(&first.services[&db], &second.services[&db]));

    // Nonsense from Consul: all stays, and it says so.
    fake.change(|world| world.broken = true);
    let broken = until(&mut snapshots, 2, "degraded", |s| matches!(s.sync, Sync::Degraded { .. })).await;
    assert_eq!(broken.services, second.services);
    fake.change(|world| {
        world.broken = false;
        world.services.insert("new".into(), vec!["10.0.0.5".into()]);
    });
    let new = |s: &Snapshot| s.sync == Sync::Synced && addresses(s, "new").len() == 1;
    let third = until(&mut snapshots, 3, "recovered", new).await;
    assert_eq!(third.services.len(), 3);
}

/// Takes the hold-down's ten seconds twice over, side by side: a name that is no longer listed stays while the service
/// has instances, and leaves once its own watch knows that it has none.
#[tokio::test]
async fn a_service_leaves_when_names_and_health_agree() {
    let (fake, address) = Fake::start().await;
    fake.set("web", &["10.0.0.1"]);
    fake.set("db", &["10.0.0.2"]);
    let (mut snapshots, _guard) = start(address);
    until(&mut snapshots, 5, "synced", |s| s.sync == Sync::Synced && s.services.len() == 2).await;
    let before = Instant::now();
    fake.change(|world| {
        world.services.insert("web".into(), Vec::new());
        world.listed = false;
    });
    let last = until(&mut snapshots, 20, "web is gone", |s| addresses(s, "web").is_empty()).await;
    assert!(before.elapsed() >= Duration::from_secs(10));
    let gone = |s: &Snapshot| s.services.len() == 1;
    let last = if gone(&last) { last } else { until(&mut snapshots, 10, "the service leaves", gone).await };
    assert_eq!(addresses(&last, "db"), ["10.0.0.2"]);
}

#[tokio::test]
async fn more_services_than_connections() {
    let (fake, address) = Fake::start().await;
    fake.change(|world| {
        for n in 0..MAX_BLOCKING + 60 {
            world.services.insert(format!("s{n}"), vec!["10.0.0.1".into()]);
        }
    });
    let (mut snapshots, _guard) = start(address);
    let all = until(&mut snapshots, 20, "synced", |s| s.sync == Sync::Synced).await;
    assert_eq!(all.services.len(), MAX_BLOCKING + 60);
    assert!(all.services.values().all(|service| service.instances.len() == 1));
    assert!(fake.most_connections.load(Ordering::SeqCst) <= 180);
}

#[tokio::test]
async fn configuration_that_cannot_work_is_refused() {
    let stop = CancellationToken::new();
    for config in [
        Config::default(),
        Config { addresses: vec!["ftp://x".into()], ..Config::default() },
        Config { addresses: vec!["https://10.0.0.1".into()], ..Config::default() },
        Config {
            addresses: vec!["https://10.0.0.1".into()],
            ca_file: Some("/nonexistent/ca.pem".into()),
            ..Config::default()
        },
    ] {
        let error = format!("{:#}", spawn(config.clone(), stop.clone()).unwrap_err());
        assert!(error.contains("consul"), "{config:?}: {error}");
    }
}
