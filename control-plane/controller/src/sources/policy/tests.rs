//! External services without DNS: the look-up is the test's.

use std::sync::Mutex;
use std::time::SystemTime;

use outrigger_policy::{Catalog, Object, Policies, Stored};
use serde_json::{Value, json};

use super::*;
use crate::policies::Picture;

/// Host -> what a look-up of it says.
type Zone = Arc<Mutex<BTreeMap<&'static str, Result<Found, String>>>>;

#[expect(clippy::unnecessary_wraps, reason = "as the channel of resolutions has it")]
fn resolution(revision: u64, specs: &[(&str, Value)]) -> Option<Arc<Resolution>> {
    let policies: Policies = specs
        .iter()
        .map(|(name, spec)| {
            let object: Object = serde_json::from_value(json!({
                "apiVersion": "outrigger.dev/v1alpha1",
                "kind": "ExternalService",
                "metadata": { "name": name, "namespace": "shop" },
                "spec": spec,
            }))
            .unwrap();
            let stored = Stored { object, revision, created: 0, updated: 0, author: String::new() };
            (stored.object.key(), Arc::new(stored))
        })
        .collect();
    let picture = Picture {
        revision,
        policies: Arc::new(policies),
        grants: None,
        sync: Sync::Synced,
        faults: Vec::new(),
    };
    Some(Arc::new(Resolution::new(&picture, Catalog::default())))
}

struct Bench {
    resolutions: watch::Sender<Option<Arc<Resolution>>>,
    source: Source,
    zone: Zone,
    asked: Arc<Mutex<Vec<String>>>,
    _stop: tokio_util::sync::DropGuard,
}

fn start() -> Bench {
    let (resolutions, receiver) = watch::channel(None);
    let zone: Zone = Arc::default();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let (of_zone, of_asked) = (Arc::clone(&zone), Arc::clone(&asked));
    let lookup: Lookup = Arc::new(move |host| {
        of_asked.lock().unwrap().push(host.clone());
        let answer = of_zone.lock().unwrap().get(&*host).cloned();
        Box::pin(async move {
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    });
    let stop = CancellationToken::new();
    let source = spawn(receiver, lookup, stop.clone());
    Bench { resolutions, source, zone, asked, _stop: stop.drop_guard() }
}

impl Bench {
    fn answers(&self, host: &'static str, addresses: &[&str], ttl: u64) {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        self.zone.lock().unwrap().insert(host, Ok(Found { addresses, ttl: Duration::from_secs(ttl) }));
    }

    async fn until(&mut self, condition: impl FnMut(&Arc<Snapshot>) -> bool) -> Arc<Snapshot> {
        let limit = Duration::from_hours(1);
        let found = tokio::time::timeout(limit, self.source.snapshots.wait_for(condition)).await;
        Arc::clone(&found.expect("within an hour").unwrap())
    }
}

fn addresses(snapshot: &Snapshot, service: &str) -> Vec<String> {
    let service = &snapshot.services[&ServiceKey::parse(service).unwrap()];
    service.instances.iter().map(|instance| instance.address.to_string()).collect()
}

fn api(host: &str) -> Value {
    json!({ "hosts": [host], "ports": [{ "port": 443, "protocol": "TCP" }] })
}

#[tokio::test(start_paused = true)]
async fn hosts_are_looked_up_again_by_their_ttl_and_keep_their_last_addresses() {
    let mut bench = start();
    assert_eq!(bench.source.snapshots.borrow().sync, Sync::Never, "the policies were not read");
    bench.answers("api.example.com", &["192.0.2.1", "192.0.2.2"], 60);
    bench.resolutions.send_replace(resolution(1, &[("api", api("api.example.com"))]));
    let snapshot = bench.until(|snapshot| snapshot.sync == Sync::Synced).await;
    assert_eq!(addresses(&snapshot, "api.shop"), ["192.0.2.1", "192.0.2.2"]);
    let service = &snapshot.services[&ServiceKey::parse("api.shop").unwrap()];
    assert_eq!(service.names, ["api.example.com"]);
    assert_eq!((service.instances[0].ports[&443], service.instances[0].identity.as_deref()), (443, None));

    bench.answers("api.example.com", &["192.0.2.3"], 0);
    let before = Instant::now();
    bench.until(|snapshot| addresses(snapshot, "api.shop") == ["192.0.2.3"]).await;
    assert_eq!(before.elapsed().as_secs(), 60, "the TTL");
    bench.answers("api.example.com", &["192.0.2.4"], 1_000_000);
    bench.until(|snapshot| addresses(snapshot, "api.shop") == ["192.0.2.4"]).await;
    assert_eq!(before.elapsed().as_secs(), 65, "a TTL of 0 is no flood");

    bench.zone.lock().unwrap().insert("api.example.com", Err("SERVFAIL".into()));
    let failed = bench.until(|snapshot| !snapshot.faults.is_empty()).await;
    assert_eq!(before.elapsed().as_secs(), 65 + 300, "a long TTL does not hide a move for ever");
    assert_eq!(addresses(&failed, "api.shop"), ["192.0.2.4"], "last good");
    assert_eq!(failed.sync, Sync::Synced);
    bench.answers("api.example.com", &["192.0.2.5"], 60);
    let back = bench.until(|snapshot| snapshot.faults.is_empty()).await;
    assert_eq!(addresses(&back, "api.shop"), ["192.0.2.5"]);

    bench.answers("api.example.com", &["253.0.0.9"], 60);
    let looped = bench.until(|snapshot| !snapshot.faults.is_empty()).await;
    assert!(looped.faults[0].reason.contains("a sidecar answered it"), "{looped:?}");
    assert_eq!(addresses(&looped, "api.shop"), ["192.0.2.5"], "last good");

    bench.resolutions.send_replace(resolution(2, &[]));
    bench.until(|snapshot| snapshot.services.is_empty()).await;
    let asked = bench.asked.lock().unwrap().len();
    tokio::time::sleep(Duration::from_hours(1)).await;
    assert_eq!(bench.asked.lock().unwrap().len(), asked, "nobody looks up what nobody wants");
}

#[tokio::test(start_paused = true)]
async fn a_host_without_an_answer_is_a_service_without_endpoints_and_holds_nobody_up_for_long() {
    let mut bench = start();
    let fixed = json!({
        "hosts": ["db.example.com"], "ports": [{ "port": 5432, "protocol": "TCP" }],
        "endpoints": [{ "address": "192.0.2.9" }, { "address": "192.0.2.8", "weight": 0 }],
        "identity": "spiffe://outrigger.local/ns/x/sa/db",
    });
    let now = SystemTime::now();
    bench.resolutions.send_replace(resolution(1, &[("api", api("silent.example.com")), ("db", fixed)]));
    let snapshot = bench.until(|snapshot| !snapshot.services.is_empty()).await;
    assert_eq!(snapshot.services.len(), 1, "what needs no look-up is there at once");
    assert_eq!(addresses(&snapshot, "db.shop"), ["192.0.2.9"], "a weight of 0 takes nothing");
    let db = &snapshot.services[&ServiceKey::parse("db.shop").unwrap()];
    assert_eq!(db.instances[0].identity.as_deref(), Some("spiffe://outrigger.local/ns/x/sa/db"));
    assert_eq!(snapshot.sync, Sync::Never);
    let snapshot = bench.until(|snapshot| snapshot.sync == Sync::Synced).await;
    assert!(addresses(&snapshot, "api.shop").is_empty());
    assert!(snapshot.faults[0].reason.contains("no answer within 5 s"), "{snapshot:?}");
    assert!(now.elapsed().unwrap() < Duration::from_mins(1));

    // A second host of a known service is tried before the service changes.
    bench.answers("silent.example.com", &["192.0.2.1"], 60);
    bench.until(|snapshot| addresses(snapshot, "api.shop") == ["192.0.2.1"]).await;
    let two = json!({ "hosts": ["silent.example.com", "Other.example.com"], "ports": [{ "port": 80, "protocol": "HTTP" }] });
    bench.answers("other.example.com", &["192.0.2.2"], 60);
    bench.resolutions.send_replace(resolution(2, &[("api", two)]));
    let snapshot = bench.until(|snapshot| addresses(snapshot, "api.shop").len() == 2).await;
    assert_eq!(snapshot.services.len(), 1);
}
