use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::*;
use crate::kubernetes::fake::{Cluster, Way};

struct Replica {
    leadership: Leadership,
    leader: Gauge,
    way: watch::Sender<Way>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Replica {
    fn start(cluster: &Cluster, me: &str) -> Self {
        let (client, way) = cluster.client();
        let (stop, tasks, leader) = (CancellationToken::new(), TaskTracker::new(), Gauge::default());
        tasks.close();
        let leadership = start(client, "mesh", me.to_owned(), leader.clone(), stop.clone(), &tasks);
        Self { leadership, leader, way, stop, tasks }
    }

    fn leads(&self) -> bool {
        *self.leadership.leads.borrow()
    }

    /// How long it took until this replica led, or did not any more.
    async fn until(&self, leads: bool) -> Duration {
        let since = Instant::now();
        let mut changes = self.leadership.leads.clone();
        let waited = timeout(Duration::from_mins(10), changes.wait_for(|now| *now == leads)).await;
        waited.expect("in vain").expect("the elector has ended");
        since.elapsed()
    }

    async fn stopped(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

fn holder_of(cluster: &Cluster) -> String {
    let lease = cluster.get("leases", "mesh", CONTROLLER).expect("there is a Lease");
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(start_paused = true)]
async fn the_first_leads_and_hands_over_within_two_seconds() {
    let cluster = Cluster::new();
    let first = Replica::start(&cluster, "first");
    first.until(true).await;
    let second = Replica::start(&cluster, "second");
    sleep(Duration::from_mins(5)).await;
    assert!(first.leads() && !second.leads());
    assert_eq!((first.leader.get(), second.leader.get()), (1, 0));

    first.stopped().await;
    let gap = second.until(true).await;
    assert!(gap <= RETRY, "{gap:?}");
    let lease = cluster.get("leases", "mesh", CONTROLLER).unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 2);
    second.stopped().await;
    assert_eq!(holder_of(&cluster), "");
}

#[tokio::test(start_paused = true)]
async fn whoever_loses_the_api_server_stops_before_another_begins() {
    for way in [Way::Down, Way::Silent] {
        let cluster = Cluster::new();
        let first = Replica::start(&cluster, "first");
        first.until(true).await;
        let second = Replica::start(&cluster, "second");
        sleep(Duration::from_secs(31)).await;
        first.way.send_replace(way);
        let since = Instant::now();
        first.until(false).await;
        let stopped = since.elapsed();
        assert!(stopped <= RENEW_DEADLINE, "{stopped:?}");
        assert!(!second.leads());
        second.until(true).await;
        let begun = since.elapsed();
        let duration = Duration::from_secs(LEASE_SECONDS.try_into().unwrap());
        assert!(begun > stopped && begun <= duration + RETRY, "{begun:?}");
        // It comes back and waits in line.
        first.way.send_replace(Way::Open);
        sleep(Duration::from_mins(1)).await;
        assert!(second.leads() && !first.leads());
    }
}

#[tokio::test(start_paused = true)]
async fn clocks_of_others_do_not_count() {
    for time in ["2001-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z"] {
        let cluster = Cluster::new();
        let spec = json!({ "holderIdentity": "lost", "leaseDurationSeconds": 15, "renewTime": time });
        cluster
            .put("leases", json!({ "metadata": { "name": CONTROLLER, "namespace": "mesh" }, "spec": spec }));
        let replica = Replica::start(&cluster, "next");
        let waited = replica.until(true).await;
        assert!(waited >= Duration::from_secs(15) && waited <= Duration::from_secs(15) + RETRY, "{waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_deleted_or_taken_is_noticed() {
    let cluster = Cluster::new();
    let replica = Replica::start(&cluster, "one");
    replica.until(true).await;
    cluster.remove("leases", "mesh", CONTROLLER);
    sleep(RETRY * 2).await;
    assert_eq!(holder_of(&cluster), "one");
    assert!(replica.leads());

    let spec = json!({ "holderIdentity": "a person", "leaseDurationSeconds": 3600 });
    cluster.put("leases", json!({ "metadata": { "name": CONTROLLER, "namespace": "mesh" }, "spec": spec }));
    assert!(replica.until(false).await <= RETRY);
}

/// Counts itself while it runs.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn work_ends_with_the_leadership_and_begins_with_the_next() {
    let cluster = Cluster::new();
    let replica = Replica::start(&cluster, "one");
    let (running, begun) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let work = {
        let (running, begun) = (Arc::clone(&running), Arc::clone(&begun));
        move || {
            let running = Running::new(&running);
            begun.fetch_add(1, Ordering::SeqCst);
            async move {
                let _running = running;
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::spawn(replica.leadership.clone().run(work));
    for times in 1..=3 {
        replica.until(true).await;
        sleep(Duration::from_secs(1)).await;
        assert_eq!((running.load(Ordering::SeqCst), begun.load(Ordering::SeqCst)), (1, times));
        replica.way.send_replace(Way::Down);
        replica.until(false).await;
        tokio::task::yield_now().await;
        assert_eq!(running.load(Ordering::SeqCst), 0);
        replica.way.send_replace(Way::Open);
    }
    replica.until(true).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(running.load(Ordering::SeqCst), 1);
    // The Lease is free only when nothing runs any more.
    let (cluster, watched) = (cluster.clone(), Arc::clone(&running));
    let watching = tokio::spawn(async move {
        cluster.until("the Lease is given up", |cluster| holder_of(cluster).is_empty()).await;
        watched.load(Ordering::SeqCst)
    });
    tokio::task::yield_now().await;
    replica.stopped().await;
    assert_eq!(watching.await.unwrap(), 0);
}

/// Three replicas whose ways to the API server fail at random, by themselves and all at once.
#[tokio::test(start_paused = true)]
async fn never_do_two_lead() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let cluster = Cluster::new();
        let replicas = ["a", "b", "c"].map(|me| Replica::start(&cluster, me));
        let mut led = 0;
        for _ in 0..60 {
            for replica in &replicas {
                if random.u8(..4) == 0 {
                    replica
                        .way
                        .send_replace([Way::Open, Way::Open, Way::Down, Way::Silent][random.usize(..4)]);
                }
            }
            let end = Instant::now() + Duration::from_millis(random.u64(100..20_000));
            while Instant::now() < end {
                let leaders = replicas.iter().filter(|replica| replica.leads()).count();
                assert!(leaders <= 1, "seed {seed}");
                led += leaders;
                sleep(Duration::from_millis(100)).await;
            }
        }
        for replica in &replicas {
            replica.stop.cancel();
        }
        assert!(led > 0, "seed {seed}: nobody ever led");
    }
}

#[test]
fn a_holder_is_one_only_for_its_time() {
    let spec = |holder: &str, seconds| LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: seconds,
        ..LeaseSpec::default()
    };
    let seconds = Duration::from_secs;
    assert_eq!(holder(&spec("b", Some(15)), "a", seconds(14)), Some("b"));
    assert_eq!(holder(&spec("b", Some(15)), "a", seconds(15)), None);
    assert_eq!(holder(&spec("b", None), "a", seconds(14)), Some("b"));
    assert_eq!(holder(&spec("b", Some(-1)), "a", seconds(0)), None);
    assert_eq!(holder(&spec("a", Some(15)), "a", seconds(0)), None);
    assert_eq!(holder(&spec("", Some(15)), "a", seconds(0)), None);
    assert_eq!(holder(&LeaseSpec::default(), "a", seconds(0)), None);
}
