//! A watch: one task that repeats one blocking query and keeps what it last learned.
//!
//! The rules of Consul's manual for blocking queries, and ours on top:
//! - *Index.* An answer is no proof of a change: values are compared. An index that goes backwards means that
//!   Consul's state was replaced: start again from nothing. An index below 1 is never asked with, for it would not
//!   block. The index moves on only after an answer was understood.
//! - *Stale reads* (any server answers, also without a leader) are checked: a server that knows no leader or has not
//!   heard from it for 10 s is asked again for the leader's view.
//! - *Streaming* agents answer blocking queries for health from a subscription, without a word on the leader
//!   (consul issue 9776) or on ACLs. What adds is believed; what would remove is asked again with a plain read.
//! - *Two grades of answer.* A complete one replaces the value. One that may lack items (filtered by ACL, or from a
//!   server without a leader) can only add to it: nobody loses an endpoint to a revoked token.
//! - *Empty after non-empty* counts when the leader still says so 10 s later.
//! - *Errors* keep everything, say so in the status, and retry as `pace` says; after three in a row without an index,
//!   for a server may be broken for blocking queries alone.

use std::{collections::BTreeMap, fmt, sync::Arc, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use http::Method;
use tokio::{sync::watch, time::Instant};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use crate::{
    Client, Error, HealthQuery, Instance, InstanceId, KvPair, Scope, Skip,
    client::parse_service_names,
    encode::{Query, key_path, segment},
    health::normalise,
    kv::parse_pairs,
    pace::{Pace, back_off_limit, jitter},
    transport::{Answer, Request},
};

/// How long Consul may hold a query: under the 60 s after which common load balancers and NATs forget a connection.
const WAIT: Duration = Duration::from_secs(55);
/// While an answer is suspect, Consul cannot be relied on to wake the query when the cause ends.
const SUSPECT_WAIT: Duration = Duration::from_secs(1);
/// Beyond `wait` and Consul's own jitter (a sixteenth): network, queues, and the body.
const SLACK: Duration = Duration::from_secs(10);
/// For the leader's view where the server just said that it knows no leader. Consul would hold the query for 7 s, and
/// look for a new leader at growing intervals: asking again sees it sooner.
const LEADERLESS_SLACK: Duration = Duration::from_secs(1);
/// An answer from a server that has not heard from the leader for longer is asked for again.
const MAX_STALENESS_MS: u64 = 10_000;
/// An empty answer after a non-empty one must hold this long.
const HOLD_DOWN: Duration = Duration::from_secs(10);
/// Failures in a row after which the next query does not block.
const FAILS_BEFORE_PLAIN_READ: u32 = 3;
/// When a watch hears that another one recovered, it retries within this.
const WAKE_SPREAD: Duration = Duration::from_millis(500);
/// The same after a 429, for each failing watch: they come back twenty a second, so that the limit that just lifted is
/// not hit again at once.
const WAKE_SHARE_AFTER_OVERLOAD: Duration = Duration::from_millis(50);
/// Skipped instances named in one log line.
const LOGGED_SKIPS: usize = 5;

/// What a watch knows.
#[derive(Debug, Clone)]
pub struct State<K, V> {
    /// The last good value; `None` until the first one.
    pub value: Option<Arc<BTreeMap<K, V>>>,
    /// How far to trust it.
    pub status: Status,
    /// Since when the status is what it is, its reason's text aside.
    pub since: Instant,
    /// Instances that the last answer held and that are not used, see [`Skip`].
    pub skipped: Arc<[Skip]>,
}

/// How far a watch's value can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// No answer yet.
    Starting,
    /// The value is what Consul says: what is not in it does not exist.
    Synced,
    /// The value is the last good one; what is not in it may exist.
    Degraded(Reason),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unauthorized(text) | Self::Unavailable(text) | Self::BadAnswer(text) => f.write_str(text),
            Self::Filtered => f.write_str(
                "Consul hides what the token may not read; give it service:read and node:read for everything",
            ),
            Self::NoLeader => f.write_str("the Consul servers have no leader"),
            Self::SuddenlyEmpty => {
                f.write_str("Consul says that nothing is left; waiting 10 s before believing it")
            }
        }
    }
}

impl Status {
    /// True where absence from the value means absence.
    pub fn is_synced(&self) -> bool {
        *self == Self::Synced
    }
}

/// Why a watch is degraded. The texts are for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Consul refuses the token (403), or the token cannot be read.
    Unauthorized(String),
    /// Consul left items out that the token may not see: the value holds what was ever seen.
    Filtered,
    /// The servers have no leader: the value holds what was ever seen.
    NoLeader,
    /// Consul cannot be reached, is overloaded or failing.
    Unavailable(String),
    /// Consul's answer makes no sense.
    BadAnswer(String),
    /// Consul says that nothing is left; believed when it still says so after 10 s.
    SuddenlyEmpty,
}

/// A running watch. Dropping it ends its task.
#[derive(Debug)]
pub struct Watch<K, V> {
    states: watch::Receiver<State<K, V>>,
    _task: AbortOnDropHandle<()>,
}

impl<K, V> Watch<K, V> {
    /// The states, the newest only. The receiver outlives the watch but then learns nothing more.
    pub fn states(&self) -> watch::Receiver<State<K, V>> {
        self.states.clone()
    }
}

impl Client {
    /// Watches the instances of a service. Must be called in a tokio runtime, like all of these.
    pub fn watch_health(
        &self,
        name: &str,
        query: &HealthQuery,
    ) -> Result<Watch<InstanceId, Instance>, Error> {
        Ok(self.watch(self.health_target(name, query)?))
    }

    /// Like [`Self::watch_health`], but reads every `every` (and a bit of chance) instead of holding a connection:
    /// for more services than an agent admits connections.
    pub fn poll_health(
        &self,
        name: &str,
        query: &HealthQuery,
        every: Duration,
    ) -> Result<Watch<InstanceId, Instance>, Error> {
        let target = self.health_target(name, query)?;
        Ok(self.watch(Target { min_gap: every, blocking: false, ..target }))
    }

    fn health_target(&self, name: &str, query: &HealthQuery) -> Result<Target<InstanceId, Instance>, Error> {
        let rules = self.inner.rules;
        Ok(Target {
            path: segment("/v1/health/service/", "service name", name)?,
            query: self.health_query(query),
            min_gap: Duration::ZERO,
            blocking: true,
            parse: Box::new(move |answer| {
                let normalised = normalise(&answer, rules)?;
                Ok((normalised.instances, normalised.skipped))
            }),
        })
    }

    /// Watches the names of all services. Consul wakes this one for every change of any service, so it asks at most
    /// once per `min_gap`.
    pub fn watch_services(&self, scope: &Scope, min_gap: Duration) -> Watch<String, Vec<String>> {
        self.watch(Target {
            path: "/v1/catalog/services".into(),
            query: self.query(scope),
            min_gap,
            blocking: true,
            parse: Box::new(|answer| Ok((parse_service_names(&answer)?, Vec::new()))),
        })
    }

    /// Watches all keys that begin with `prefix`.
    pub fn watch_kv(&self, prefix: &str, scope: &Scope) -> Result<Watch<String, KvPair>, Error> {
        let mut query = self.query(scope);
        query.flag("recurse");
        Ok(self.watch(Target {
            path: key_path("/v1/kv/", prefix)?,
            query,
            min_gap: Duration::ZERO,
            blocking: true,
            parse: Box::new(|answer| Ok((parse_pairs(answer)?, Vec::new()))),
        }))
    }

    fn watch<K, V>(&self, target: Target<K, V>) -> Watch<K, V>
    where
        K: Ord + Clone + Send + Sync + 'static,
        V: PartialEq + Clone + Send + Sync + 'static,
    {
        let now = Instant::now();
        let state = State { value: None, status: Status::Starting, since: now, skipped: Arc::from([]) };
        let (sender, states) = watch::channel(state);
        let task = Task {
            client: self.clone(),
            target,
            states: sender,
            index: 0,
            complete: false,
            wait: WAIT,
            empty_since: None,
            failures: Failures { client: self.clone(), count: 0 },
            pace: Pace::new(now),
        };
        Watch { states, _task: AbortOnDropHandle::new(tokio::spawn(task.run())) }
    }
}

type Parse<K, V> = dyn Fn(Answer) -> Result<(BTreeMap<K, V>, Vec<Skip>), Error> + Send + Sync;

/// What is asked, and how the answer is read.
struct Target<K, V> {
    path: String,
    /// Without `index`, `wait` and `stale`.
    query: Query,
    min_gap: Duration,
    /// Let Consul hold the query until something changes.
    blocking: bool,
    parse: Box<Parse<K, V>>,
}

struct Task<K, V> {
    client: Client,
    target: Target<K, V>,
    states: watch::Sender<State<K, V>>,
    /// What the next query asks with; 0: do not block.
    index: u64,
    /// The published value is a complete answer as of `index`.
    complete: bool,
    /// How long the next query may be held.
    wait: Duration,
    /// Since when Consul says that nothing is left although something was.
    empty_since: Option<Instant>,
    failures: Failures,
    pace: Pace,
}

/// Failures in a row of one watch; counts among the client's failing watches while there are any.
struct Failures {
    client: Client,
    count: u32,
}

impl Failures {
    fn add(&mut self) {
        if self.count == 0 {
            self.client.inner.failing.fetch_add(1, Ordering::Relaxed);
        }
        self.count = self.count.saturating_add(1);
    }

    fn clear(&mut self) {
        if self.count > 0 {
            self.count = 0;
            self.client.inner.failing.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Failures {
    fn drop(&mut self) {
        self.clear();
    }
}

impl<K, V> Task<K, V>
where
    K: Ord + Clone + Send + Sync + 'static,
    V: PartialEq + Clone + Send + Sync + 'static,
{
    async fn run(mut self) {
        if !self.target.blocking {
            // Thousands may start at once, and then keep the distance that chance gives them here.
            tokio::time::sleep(jitter(self.target.min_gap / 6)).await;
        }
        loop {
            tokio::time::sleep_until(self.pace.next(Instant::now())).await;
            let started = Instant::now();
            match self.poll().await {
                Ok(()) => {
                    if self.failures.count > 0 {
                        self.failures.clear();
                        self.client.inner.recovered.notify_waiters();
                    }
                    tokio::time::sleep_until(started + self.gap()).await;
                }
                Err(error) => self.fail(&error).await,
            }
        }
    }

    /// From one successful poll to the next.
    fn gap(&self) -> Duration {
        let gap = self.target.min_gap;
        if self.target.blocking { gap } else { gap.mul_f64(0.9) + jitter(gap / 5) }
    }

    async fn poll(&mut self) -> Result<(), Error> {
        let asked = self.index;
        let mut answer = self.ask(asked).await?;
        let settled = self.complete && self.empty_since.is_none() && answer.missing.is_none();
        if asked != 0 && settled && next_index(asked, &answer.raw) == asked {
            self.set_status(Status::Synced);
            return Ok(());
        }
        let mut index = next_index(asked, &answer.raw);
        let (mut value, mut skipped) = (self.target.parse)(answer.raw)?;
        if answer.streamed && (!self.complete || self.lacks_some(&value)) {
            answer = self.ask(0).await?;
            index = next_index(asked, &answer.raw);
            (value, skipped) = (self.target.parse)(answer.raw)?;
        }
        self.index = if self.target.blocking { index } else { 0 };
        self.report_skips(skipped);
        match answer.missing {
            None => self.accept_complete(value),
            Some(reason) => self.accept_additions(value, reason),
        }
        Ok(())
    }

    /// One query; where a stale answer cannot be trusted, a second one for the leader's view.
    async fn ask(&self, index: u64) -> Result<Graded, Error> {
        let view = if self.empty_since.is_some() { View::Leader } else { View::Stale };
        let raw = self.exchange(view, index, SLACK).await?;
        let streamed = raw.header("x-consul-query-backend") == Some("streaming");
        if streamed || is_fresh(&raw) {
            return Ok(Graded { missing: filtered(&raw), raw, streamed });
        }
        let slack = if knows_leader(&raw) { SLACK } else { LEADERLESS_SLACK };
        match self.exchange(View::Leader, 0, slack).await {
            Ok(raw) => Ok(Graded { missing: filtered(&raw), raw, streamed: false }),
            Err(error) => {
                debug!(path = self.target.path, %error, "no leader's view: a stale answer can add, not remove");
                Ok(Graded { missing: Some(Reason::NoLeader), raw, streamed: false })
            }
        }
    }

    /// The published value holds a key that `value` does not.
    fn lacks_some(&self, value: &BTreeMap<K, V>) -> bool {
        self.states.borrow().value.iter().flat_map(|last| last.keys()).any(|key| !value.contains_key(key))
    }

    async fn exchange(&self, view: View, index: u64, slack: Duration) -> Result<Answer, Error> {
        let mut query = self.target.query.clone();
        if view == View::Stale {
            query.flag("stale");
        }
        let mut deadline = slack;
        if index > 0 {
            query.add("index", &index.to_string());
            query.add("wait", &format!("{}ms", self.wait.as_millis()));
            deadline += self.wait + self.wait / 16;
        }
        let path = self.target.path.clone();
        self.client.once(&Request { method: Method::GET, path, query, body: Bytes::new(), deadline }).await
    }

    fn accept_complete(&mut self, value: BTreeMap<K, V>) {
        let had_some = self.states.borrow().value.as_ref().is_some_and(|last| !last.is_empty());
        if value.is_empty() && had_some {
            let held = self.empty_since.get_or_insert_with(Instant::now).elapsed();
            if held < HOLD_DOWN {
                // Never 0, which Consul takes for its default of five minutes.
                self.wait = HOLD_DOWN.saturating_sub(held).max(Duration::from_millis(100));
                self.set_status(Status::Degraded(Reason::SuddenlyEmpty));
                return;
            }
        }
        self.empty_since = None;
        self.complete = true;
        self.wait = WAIT;
        self.set(Some(value), Status::Synced);
    }

    /// Takes what is new or changed, and keeps what is missing.
    fn accept_additions(&mut self, value: BTreeMap<K, V>, reason: Reason) {
        let lacks_some = self.lacks_some(&value);
        self.empty_since = None;
        self.complete = false;
        self.wait =
            if lacks_some || value.is_empty() || reason == Reason::NoLeader { SUSPECT_WAIT } else { WAIT };
        let mut merged = self.states.borrow().value.as_deref().cloned().unwrap_or_default();
        merged.extend(value);
        let merged = Some(merged).filter(|merged| !merged.is_empty());
        self.set(merged, Status::Degraded(reason));
    }

    async fn fail(&mut self, error: &Error) {
        let client = self.client.clone();
        let mut recovered = std::pin::pin!(client.inner.recovered.notified());
        // From here on a wake-up counts, also one before the first poll below.
        recovered.as_mut().enable();
        self.failures.add();
        self.complete = false;
        self.empty_since = None;
        self.wait = WAIT;
        if self.failures.count >= FAILS_BEFORE_PLAIN_READ {
            self.index = 0;
        }
        self.set_status(Status::Degraded(reason(error)));
        let overloaded = error.status() == Some(429);
        let failing = client.inner.failing.load(Ordering::Relaxed);
        let delay = jitter(back_off_limit(self.failures.count, failing, overloaded));
        let others = u32::try_from(failing).unwrap_or(u32::MAX);
        let spread = if overloaded { WAKE_SHARE_AFTER_OVERLOAD.saturating_mul(others) } else { WAKE_SPREAD };
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = recovered => tokio::time::sleep(jitter(spread)).await,
        }
    }

    fn set_status(&self, status: Status) {
        self.set(None, status);
    }

    /// Value and status in one step, so that nobody sees a value beside another one's status.
    fn set(&self, value: Option<BTreeMap<K, V>>, status: Status) {
        let path = &self.target.path;
        self.states.send_if_modified(|state| {
            let new_value = value.filter(|value| state.value.as_deref() != Some(value));
            if new_value.is_none() && state.status == status {
                return false;
            }
            if let Some(value) = new_value {
                state.value = Some(Arc::new(value));
            }
            if !same_kind(&state.status, &status) {
                state.since = Instant::now();
                // Not louder: an outage degrades each of hundreds of watches. Whoever owns them reports it once.
                match &status {
                    Status::Degraded(reason) => {
                        debug!(path, ?reason, "Consul watch degraded: keeping the last good");
                    }
                    Status::Synced | Status::Starting => debug!(path, "Consul watch synced"),
                }
            }
            state.status = status;
            true
        });
    }

    fn report_skips(&self, skipped: Vec<Skip>) {
        let path = &self.target.path;
        self.states.send_if_modified(|state| {
            if *state.skipped == *skipped {
                return false;
            }
            for skip in skipped.iter().take(LOGGED_SKIPS) {
                warn!(path, instance = ?skip.id.to_string(), reason = skip.reason, "Consul instance is not used");
            }
            if skipped.len() > LOGGED_SKIPS {
                warn!(path, more = skipped.len() - LOGGED_SKIPS, "further Consul instances are not used");
            }
            state.skipped = skipped.into();
            true
        });
    }
}

/// An answer, and how far to trust it.
struct Graded {
    raw: Answer,
    /// Why items may be missing from it, if they may.
    missing: Option<Reason>,
    /// From an agent's subscription: says nothing about what may be missing.
    streamed: bool,
}

/// Whose view of the data a query asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    /// Any server's.
    Stale,
    /// The leader's (Consul's `default` consistency).
    Leader,
}

/// The index to ask with after an answer to a query with index `asked`; 0: start again.
fn next_index(asked: u64, answer: &Answer) -> u64 {
    let index: u64 = answer.header("x-consul-index").and_then(|text| text.parse().ok()).unwrap_or(0);
    if index < asked { 0 } else { index.max(1) }
}

fn filtered(answer: &Answer) -> Option<Reason> {
    (answer.header("x-consul-results-filtered-by-acls") == Some("true")).then_some(Reason::Filtered)
}

/// The answering server knows a leader and heard from it lately. Servers that say nothing are believed.
fn is_fresh(answer: &Answer) -> bool {
    let staleness = answer.header("x-consul-lastcontact").and_then(|text| text.parse::<u64>().ok());
    knows_leader(answer) && staleness.unwrap_or(0) <= MAX_STALENESS_MS
}

fn knows_leader(answer: &Answer) -> bool {
    answer.header("x-consul-knownleader") != Some("false")
}

fn reason(error: &Error) -> Reason {
    let text = error.to_string();
    match error {
        Error::Token { .. } => Reason::Unauthorized(text),
        error if error.is_unauthorized() => Reason::Unauthorized(text),
        Error::Answer { .. } | Error::TooLarge { .. } => Reason::BadAnswer(text),
        _ => Reason::Unavailable(text),
    }
}

/// Equal but for the texts.
fn same_kind(a: &Status, b: &Status) -> bool {
    use std::mem::discriminant;
    match (a, b) {
        (Status::Degraded(a), Status::Degraded(b)) => discriminant(a) == discriminant(b),
        (a, b) => discriminant(a) == discriminant(b),
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
