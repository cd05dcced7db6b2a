//! The source against an API server that breaks in the ways that real ones do (reliability E7).

use std::collections::BTreeSet;
use std::time::Duration;

use outrigger_api::v1::Health;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::fake::{Fake, NODES, PODS, RANGES, SERVICES, SLICES};
use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

struct Bench {
    api: Fake,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    stop: CancellationToken,
    recorder: JoinHandle<Vec<Arc<Snapshot>>>,
}

fn settings() -> Settings {
    Settings { cluster_domain: "cluster.local".into(), trust_domain: "t".into() }
}

fn client(api: &Fake) -> Client {
    Client::try_from(kube::Config::new(api.url().parse().unwrap())).unwrap()
}

impl Bench {
    fn on(api: Fake) -> Self {
        let stop = CancellationToken::new();
        let source = spawn(&client(&api), settings(), &stop);
        let mut recorded = source.snapshots.clone();
        // Keeps every snapshot that it sees: what stays must be in each.
        let recorder = tokio::spawn(async move {
            let mut seen = Vec::new();
            loop {
                seen.push(Arc::clone(&recorded.borrow_and_update()));
                if recorded.changed().await.is_err() {
                    return seen;
                }
            }
        });
        Self { api, snapshots: source.snapshots, stop, recorder }
    }

    async fn until(&mut self, what: &str, is_it: impl FnMut(&Arc<Snapshot>) -> bool) -> Arc<Snapshot> {
        let found = tokio::time::timeout(DEADLINE, self.snapshots.wait_for(is_it)).await;
        let found = found.map(|found| found.map(|found| Arc::clone(&found)));
        found.unwrap_or_else(|_| panic!("{what}: {:?}", self.snapshots.borrow())).unwrap()
    }

    async fn synced(&mut self) -> Arc<Snapshot> {
        self.until("synced", |snapshot| snapshot.sync == Sync::Synced).await
    }

    /// Ends it; every snapshot since the first complete one had this service with its one endpoint.
    async fn never_lost(self, service: &str) {
        self.stop.cancel();
        let seen = tokio::time::timeout(DEADLINE, self.recorder).await.unwrap().unwrap();
        for snapshot in seen.iter().filter(|snapshot| snapshot.sync != Sync::Never) {
            let known = snapshot
                .services
                .get(&key(service))
                .unwrap_or_else(|| panic!("{service} is gone: {snapshot:?}"));
            assert_eq!(known.instances.len(), 1, "{snapshot:?}");
        }
    }
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::parse(name).unwrap()
}

fn service(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}})
}

fn slice(name: &str, service: &str, address: &str, pod: Option<&str>) -> Value {
    let target = pod.map(|pod| json!({"kind": "Pod", "name": pod, "namespace": "shop"}));
    json!({"metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}, "targetRef": target, "nodeName": "n1"}]})
}

fn pod(name: &str, address: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "labels": {"app": name}},
        "spec": {"serviceAccountName": "web", "nodeName": "n1", "containers": [{"name": "app"}],
            "initContainers": [{"name": "outrigger-proxy"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}], "hostIPs": [{"ip": "192.168.0.1"}]}})
}

async fn shop() -> Fake {
    let api = Fake::start().await;
    api.put(SERVICES, service("web"));
    api.put(SLICES, slice("web-1", "web", "10.0.0.1", Some("web-0")));
    api.put(PODS, pod("web-0", "10.0.0.1"));
    api.put(
        NODES,
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDRs": ["10.0.0.0/24"]}}),
    );
    api.put(RANGES, json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}));
    api
}

#[tokio::test]
async fn services_pods_and_ranges_follow_the_cluster() {
    let mut bench = Bench::on(shop().await);
    let first = bench.synced().await;
    let web = &first.services[&key("web.shop")];
    assert_eq!(web.instances[0].identity.as_deref(), Some("spiffe://t/ns/shop/sa/web"));
    assert_eq!(web.instances[0].zone, "a");
    let expected: BTreeSet<IpNet> =
        ["10.0.0.0/24", "10.96.0.0/16"].map(|range| range.parse().unwrap()).into();
    assert_eq!(*first.ranges, expected);

    // A slice is there before its pod: no traffic until the pod is known.
    bench.api.put(SERVICES, service("new"));
    bench.api.put(SLICES, slice("new-1", "new", "10.0.0.2", Some("new-0")));
    let early = bench
        .until("the slice", |s| s.services.get(&key("new.shop")).is_some_and(|new| !new.instances.is_empty()))
        .await;
    assert_eq!(early.services[&key("new.shop")].instances[0].health, Health::Unready);
    bench.api.put(PODS, pod("new-0", "10.0.0.2"));
    let whole =
        bench.until("the pod", |s| s.services[&key("new.shop")].instances[0].health == Health::Healthy).await;
    assert!(whole.services[&key("new.shop")].instances[0].identity.is_some());
    assert!(Arc::ptr_eq(&whole.services[&key("web.shop")], web), "what did not change is the same");

    let mut leaving = pod("new-0", "10.0.0.2");
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    bench.api.put(PODS, leaving);
    let pod_key = ServiceKey::of_workload("new-0", "shop").unwrap();
    bench.until("terminating", |s| s.workloads[&pod_key].terminating).await;
    bench.api.delete(PODS, "shop/new-0");
    bench.api.delete(SLICES, "shop/new-1");
    bench.api.delete(SERVICES, "shop/new");
    bench
        .until("gone", |s| !s.services.contains_key(&key("new.shop")) && !s.workloads.contains_key(&pod_key))
        .await;

    bench.api.put(
        NODES,
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "b"}},
        "spec": {"podCIDRs": ["10.0.0.0/24", "10.0.1.0/24"]}}),
    );
    let moved = bench.until("the zone", |s| s.services[&key("web.shop")].instances[0].zone == "b").await;
    assert_eq!(moved.ranges.len(), 3);
    bench.never_lost("web.shop").await;
}

#[tokio::test]
async fn a_first_list_comes_in_pages_and_starts_over_when_one_is_late() {
    let api = shop().await;
    for number in 0..1200 {
        api.put(SERVICES, service(&format!("s{number}")));
    }
    api.world().late_pages = 1;
    let mut bench = Bench::on(api);
    let synced = bench.synced().await;
    assert_eq!(synced.services.len(), 1201);
    let (lists, pages) = {
        let world = bench.api.world();
        (world.lists.len(), world.pages)
    };
    assert_eq!((lists, pages), (6, 1 + 3 + 4), "five kinds and one more list; its pages are 500, 500, 201");
}

#[tokio::test]
async fn a_watch_that_expired_is_followed_by_a_list_and_nothing_flaps() {
    for in_stream in [false, true] {
        let api = shop().await;
        api.put(SERVICES, service("old"));
        api.world().expires_in_stream = in_stream;
        let mut bench = Bench::on(api);
        bench.synced().await;
        // What happens while nobody watches, and cannot be seen by a watch any more.
        bench.api.delete(SERVICES, "shop/old");
        bench.api.put(SERVICES, service("new"));
        bench.api.compact();
        let after = bench.until("the new list", |s| s.services.contains_key(&key("new.shop"))).await;
        assert!(!after.services.contains_key(&key("old.shop")));
        bench.synced().await;
        bench.never_lost("web.shop").await;
    }
}

#[tokio::test]
async fn a_watch_goes_on_from_a_bookmark_and_a_lost_one_costs_a_list() {
    for has_bookmarks in [true, false] {
        let mut bench = Bench::on(shop().await);
        bench.synced().await;
        let present = bench.api.version();
        let told = if has_bookmarks { bench.api.bookmark() } else { present + 1 };
        // Shows that what came before it was read.
        bench.api.put_unversioned(SERVICES, service("after"));
        bench.until("the event behind it", |s| s.services.contains_key(&key("after.shop"))).await;
        bench.api.world().compacted = told;
        bench.api.cut();
        bench.api.put(SERVICES, service("later"));
        bench.until("it goes on", |s| s.services.contains_key(&key("later.shop"))).await;
        let lists = bench.api.world().lists.iter().filter(|kind| *kind == SERVICES).count();
        assert_eq!(lists, if has_bookmarks { 1 } else { 2 });
        bench.never_lost("web.shop").await;
    }
}

#[tokio::test]
async fn an_api_server_that_is_away_takes_nothing_with_it() {
    let mut bench = Bench::on(shop().await);
    let before = bench.synced().await;
    bench.api.world().down = true;
    bench.api.cut();
    let away = bench.until("degraded", |s| matches!(s.sync, Sync::Degraded { .. })).await;
    assert_eq!(
        (&away.services, &away.workloads, &away.ranges),
        (&before.services, &before.workloads, &before.ranges)
    );
    let Sync::Degraded { reason, .. } = &away.sync else { unreachable!() };
    assert!(reason.contains("cannot watch"), "{reason}");
    bench.api.world().down = false;
    bench.synced().await;
    bench.api.put(SERVICES, service("new"));
    bench.until("it goes on", |s| s.services.contains_key(&key("new.shop"))).await;
    bench.never_lost("web.shop").await;
}

#[tokio::test]
async fn a_list_of_a_server_that_lags_is_not_believed() {
    let api = shop().await;
    api.put(SERVICES, service("late"));
    let mut bench = Bench::on(api.clone());
    bench.until("all of it", |s| s.sync == Sync::Synced && s.services.contains_key(&key("late.shop"))).await;
    api.put(SERVICES, service("later"));
    bench.until("the event", |s| s.services.contains_key(&key("later.shop"))).await;
    let lists = api.world().lists.len();
    api.world().show_instead(101, BTreeMap::new());
    api.compact();
    let degraded = bench.until("degraded", |s| matches!(s.sync, Sync::Degraded { .. })).await;
    assert!(api.world().lists.len() > lists);
    assert!(
        degraded.services.contains_key(&key("late.shop"))
            && degraded.services.contains_key(&key("later.shop"))
    );
    api.catch_up();
    let after = bench.synced().await;
    assert!(after.services.contains_key(&key("later.shop")));
    bench.never_lost("web.shop").await;
}

#[tokio::test]
async fn a_cluster_that_stays_older_was_restored() {
    let api = Fake::start().await;
    api.put(SERVICES, service("web"));
    let (events, mut receiver) = mpsc::channel(16);
    let reader = Reader::<Service, _>::new(client(&api), |event| event, events);
    let reader = tokio::spawn(reader.believing_older_after(Duration::from_millis(500)).run());
    let next = async |receiver: &mut mpsc::Receiver<Event<Service>>| {
        tokio::time::timeout(DEADLINE, receiver.recv()).await.unwrap().unwrap()
    };
    assert!(matches!(next(&mut receiver).await, Event::Listed(all) if all.len() == 1));
    api.world().show_instead(7, BTreeMap::new());
    api.compact();
    let mut doubts = 0;
    loop {
        match next(&mut receiver).await {
            Event::Failing(reason) if reason.contains("is older") => doubts += 1,
            Event::Failing(_) => {}
            Event::Listed(all) => break assert!(all.is_empty()),
            other => panic!("{other:?}"),
        }
    }
    assert!(doubts > 0, "not at once");
    reader.abort();
}

#[tokio::test]
async fn a_kind_that_may_not_be_read_keeps_all_of_it_unsaid_and_one_that_may_be_missing_does_not() {
    let api = shop().await;
    api.world().forbidden = vec![PODS];
    api.world().unknown = vec![RANGES];
    let mut bench = Bench::on(api);
    let asked = async {
        while bench.api.world().watches < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asked).await.expect("the other kinds are watched");
    assert_eq!(bench.snapshots.borrow().sync, Sync::Never, "without pods nobody knows who is in the mesh");
    bench.api.world().forbidden.clear();
    let synced = bench.synced().await;
    assert_eq!(synced.ranges.len(), 1, "of the node alone");
}
