//! Who leads: the one replica that writes what only one may write.
//!
//! Every replica serves proxies; leading is for upkeep in the cluster alone. The election is client-go's, on a `Lease`,
//! because that is what people know how to read (`kubectl get lease`) and what is known to hold: a holder renews every
//! [`RETRY`]; another takes over when the record has not changed for the duration that it names, *as seen on its own
//! clock*, so that clocks need not agree; and a holder that could not renew for [`RENEW_DEADLINE`] stops working, which is
//! before anybody else may begin. Every write names the resource version that it was judged against, so of two that try
//! at once the API server lets one win.
//!
//! What a request that was under way when leadership ended still does at the API server nobody can take back. So leading
//! is no lock: all that is done under it is idempotent and names the version that it replaces.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{CONTROLLER, Trouble};

/// How long a holder that is silent keeps the Lease, seconds: client-go's default.
const LEASE_SECONDS: i32 = 15;
/// A holder that could not renew for this long stops leading: client-go's default.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two renewals: client-go's default. Who waits for the Lease looks as often or, by jitter, up to twice as often,
/// so that one that was given up is taken within this time.
const RETRY: Duration = Duration::from_secs(2);
/// The longest that one look at the Lease takes: two fit into the deadline.
const ATTEMPT: Duration = Duration::from_secs(4);
/// The longest that giving the Lease up takes: a stop must not wait for an API server that is gone.
const RELEASE: Duration = Duration::from_secs(1);

/// Whether this replica leads. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Leadership {
    leads: watch::Receiver<bool>,
    /// Holds a token for all that runs under this leadership.
    working: TaskTracker,
}

impl Leadership {
    /// Says when this replica leads, to work that keeps something between its turns.
    pub(crate) fn leads(&self) -> watch::Receiver<bool> {
        self.leads.clone()
    }

    /// Runs `work` while this replica leads: it is begun each time that the leadership begins, and dropped when that ends.
    /// Work that ends by itself is begun again only under the next leadership.
    pub(crate) async fn run<F: Future<Output = ()>>(mut self, mut work: impl FnMut() -> F) {
        while self.leads.wait_for(|leads| *leads).await.is_ok() {
            let working = self.working.token();
            let ended = async {
                let _ = self.leads.wait_for(|leads| !leads).await;
            };
            tokio::pin!(ended);
            tokio::select! {
                biased;
                () = &mut ended => {}
                () = work() => {
                    drop(working);
                    ended.await;
                }
            }
        }
    }
}

/// What this replica calls itself: the pod's name, which is its host's, and what makes it another after a restart.
pub(crate) fn replica() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{:08x}", host.trim(), fastrand::u32(..))
}

/// Takes part in the election as `me` until `stop`; then the Lease is given up, after all work under it has ended.
pub(crate) fn start(
    client: Client,
    namespace: &str,
    me: String,
    leader: Gauge,
    stop: CancellationToken,
    tasks: &TaskTracker,
) -> Leadership {
    let (sender, leads) = watch::channel(false);
    let working = TaskTracker::new();
    working.close();
    let leases = Api::namespaced(client, namespace);
    let trouble = Trouble::new("take part in the election of the leader");
    let mut elector = Elector {
        leases,
        me,
        seen: None,
        held: None,
        leads: sender,
        leader,
        working: working.clone(),
        trouble,
    };
    tasks.spawn(async move {
        stop.run_until_cancelled(elector.elect()).await;
        elector.resign().await;
    });
    Leadership { leads, working }
}

struct Elector {
    leases: Api<Lease>,
    me: String,
    /// The last record that was read, and when it was seen to change.
    seen: Option<(LeaseSpec, Instant)>,
    /// The Lease as we last wrote it, while it is ours.
    held: Option<Lease>,
    leads: watch::Sender<bool>,
    leader: Gauge,
    working: TaskTracker,
    trouble: Trouble,
}

/// What came of a look at the Lease.
enum Outcome {
    /// It is ours until a duration after this moment, which lies before the request.
    Ours(Instant),
    /// Somebody else has it.
    Theirs(String),
}

impl Elector {
    async fn elect(&mut self) {
        loop {
            let since = self.acquire().await;
            tracing::info!(me = self.me, "this replica leads");
            self.leader.set(1);
            self.leads.send_replace(true);
            let reason = self.hold(since).await;
            tracing::warn!(me = self.me, reason, "this replica does not lead any more");
            self.held = None;
            self.end().await;
        }
    }

    /// Waits until the Lease is ours; returns the moment from which its duration counts.
    async fn acquire(&mut self) -> Instant {
        loop {
            match timeout(ATTEMPT, self.attempt()).await {
                Ok(Ok(Outcome::Ours(since))) => {
                    self.trouble.over();
                    return since;
                }
                Ok(Ok(Outcome::Theirs(holder))) => {
                    self.trouble.over();
                    tracing::debug!(holder, "another replica leads");
                }
                Ok(Err(error)) => self.trouble.is(&error),
                Err(_) => self.trouble.is(&"the API server did not answer in time"),
            }
            sleep(RETRY.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        }
    }

    /// Renews until that fails; returns why.
    async fn hold(&mut self, mut since: Instant) -> String {
        loop {
            let deadline = since + RENEW_DEADLINE;
            sleep_until(deadline.min(Instant::now() + RETRY)).await;
            if Instant::now() >= deadline {
                return format!("the Lease could not be renewed for {} s", RENEW_DEADLINE.as_secs());
            }
            match timeout_at(deadline.min(Instant::now() + ATTEMPT), self.attempt()).await {
                Ok(Ok(Outcome::Ours(now))) => {
                    self.trouble.over();
                    since = now;
                }
                Ok(Ok(Outcome::Theirs(holder))) => return format!("{holder} has taken the Lease"),
                Ok(Err(error)) => self.trouble.is(&error),
                Err(_) => self.trouble.is(&"the API server did not answer in time"),
            }
        }
    }

    /// Reads the Lease, and takes or renews it if that is our right.
    async fn attempt(&mut self) -> kube::Result<Outcome> {
        let since = Instant::now();
        let write = PostParams::default();
        let Some(found) = self.leases.get_opt(CONTROLLER).await? else {
            let metadata = ObjectMeta { name: Some(CONTROLLER.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(claim(&LeaseSpec::default(), &self.me)) };
            let made = self.leases.create(&write, &lease).await?;
            return Ok(self.ours(made, since));
        };
        let spec = found.spec.clone().unwrap_or_default();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != spec) {
            self.seen = Some((spec.clone(), since));
        }
        let changed = self.seen.as_ref().map_or(since, |(_, at)| *at);
        if let Some(holder) = holder(&spec, &self.me, since.duration_since(changed)) {
            return Ok(Outcome::Theirs(holder.to_owned()));
        }
        // With the version that was read: whoever wrote meanwhile makes this a conflict.
        let lease = Lease { spec: Some(claim(&spec, &self.me)), ..found };
        let written = self.leases.replace(CONTROLLER, &write, &lease).await?;
        Ok(self.ours(written, since))
    }

    fn ours(&mut self, lease: Lease, since: Instant) -> Outcome {
        self.seen = lease.spec.clone().map(|spec| (spec, since));
        self.held = Some(lease);
        Outcome::Ours(since)
    }

    /// Ends all work, and returns when it has ended.
    async fn end(&self) {
        self.leader.set(0);
        self.leads.send_replace(false);
        self.working.wait().await;
    }

    async fn resign(&mut self) {
        self.end().await;
        let Some(mut lease) = self.held.take() else { return };
        // As client-go does: nobody holds it, so nobody has to wait.
        lease.spec = lease.spec.map(|spec| LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            renew_time: now(),
            ..spec
        });
        let write = PostParams::default();
        match timeout(RELEASE, self.leases.replace(CONTROLLER, &write, &lease)).await {
            Ok(Ok(_)) => tracing::info!(me = self.me, "the leadership is given up"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot give the leadership up; it ends by itself"),
            Err(_) => tracing::warn!(
                "cannot give the leadership up: the API server does not answer; it ends by itself"
            ),
        }
    }
}

/// Who has the Lease and is not `me`, where the record has been the same for `unchanged`.
fn holder<'a>(spec: &'a LeaseSpec, me: &str, unchanged: Duration) -> Option<&'a str> {
    let holder = spec.holder_identity.as_deref().filter(|holder| !holder.is_empty() && *holder != me)?;
    let seconds = u64::try_from(spec.lease_duration_seconds.unwrap_or(LEASE_SECONDS)).unwrap_or_default();
    (unchanged < Duration::from_secs(seconds)).then_some(holder)
}

/// The record that follows `old` when `me` takes or renews it.
fn claim(old: &LeaseSpec, me: &str) -> LeaseSpec {
    let renewed = old.holder_identity.as_deref() == Some(me);
    LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: Some(LEASE_SECONDS),
        renew_time: now(),
        acquire_time: if renewed { old.acquire_time.clone() } else { now() },
        lease_transitions: Some(old.lease_transitions.unwrap_or_default() + i32::from(!renewed)),
        ..old.clone()
    }
}

/// For people only: no decision rests on it.
#[expect(clippy::unnecessary_wraps, reason = "every time of a Lease is optional")]
fn now() -> Option<MicroTime> {
    Some(MicroTime(Timestamp::now()))
}

#[cfg(test)]
mod tests;
