//! Keeps one kind of object in step with the API server: a list, then a watch from where it ended, for ever.
//!
//! By hand on the client, because what matters here is what a ready-made watcher hides: the version of a list, and
//! whether a failure means "not now" or "start over".
//!
//! - A list is read in pages and counts when its last page is there. A page that comes too late (410) starts it over.
//! - A watch goes on from the last version that it or a bookmark named. Where bookmarks are lost it goes on from
//!   an older one, and sees again what it knows: that changes nothing.
//! - 410, or a server that does not answer for our version at all, means a new list. Its complete answer replaces what is known.
//! - A list that is older than what was read before comes from a server that lags behind, and is not believed; after
//!   [`OLDER_FOR`] it is: the cluster was restored from a backup.
//! - Each watch ends after two minutes or so, by the server's clock and by ours: a connection that died unnoticed is
//!   found then.
//! - Whatever fails is tried again, with full jitter, for ever, and what was read stays.

use std::time::Duration;

use futures_util::TryStreamExt;
use kube::Client;
use kube::core::params::{ListParams, WatchParams};
use kube::core::{Request, WatchEvent};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::objects::{Kind, ObjectKey, version};

/// Objects of a page: what API servers use themselves.
const PAGE: u32 = 500;
/// For each page, however many there are. A server that takes longer is overloaded; asking again later helps it more.
const PAGE_LIMIT: Duration = Duration::from_mins(1);
/// A watch is opened within this or not at all.
const OPEN_LIMIT: Duration = Duration::from_secs(15);
/// The shortest watch; half of that again is drawn on top, so that not all kinds end at once.
const WATCH_SECONDS: u32 = 100;
/// What a watch may take beyond what it was asked for.
const WATCH_SLACK: Duration = Duration::from_secs(5);
/// Between tries, at least and at most: an API server that is back is noticed within seconds, and a handful of requests
/// every few seconds weigh nothing.
const PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Watches that the server itself refused, one after the other, until a list is tried instead.
const REFUSALS: u32 = 5;
/// A kind that the server does not know is asked for again: it may be upgraded.
const MISSING_PAUSE: Duration = Duration::from_mins(10);
/// How long a list may be older than what was read before without being believed: members of a control plane are
/// seconds apart.
const OLDER_FOR: Duration = Duration::from_mins(1);

/// What became known of a kind.
#[derive(Debug)]
pub(super) enum Event<K> {
    /// All there is.
    Listed(Vec<(ObjectKey, K)>),
    /// One object is new or differs.
    Set(ObjectKey, K),
    /// One object is gone.
    Gone(ObjectKey),
    /// It cannot be read now, for this reason.
    Failing(String),
    /// It can again, and nothing was missed.
    Well,
}

/// Reads a kind until nobody listens. `older_for` is [`OLDER_FOR`] but in tests.
pub(super) struct Reader<K, U> {
    client: Client,
    /// What an event is to the listener.
    wrap: fn(Event<K>) -> U,
    events: mpsc::Sender<U>,
    /// The newest version that was read.
    newest: u64,
    /// Since when lists are older than that.
    older_since: Option<Instant>,
    older_for: Duration,
    /// Failures in a row.
    failures: u32,
}

/// Nobody listens any more.
struct Closed;

/// Why a watch ended.
enum Ended {
    /// As all do: go on from the version.
    InTime,
    /// The server no longer has what follows our version.
    Expired,
    /// It could not be opened, or broke.
    Failed(kube::Error),
    /// Too late.
    Slow,
}

/// Why there is no list.
enum NoList {
    Refused(kube::Error),
    /// A page came too late.
    Slow,
}

impl From<kube::Error> for NoList {
    fn from(error: kube::Error) -> Self {
        Self::Refused(error)
    }
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "T: serde::de::DeserializeOwned"))]
struct Page<T> {
    #[serde(default)]
    metadata: PageMeta,
    items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PageMeta {
    resource_version: String,
    r#continue: Option<String>,
}

impl<K: Kind, U> Reader<K, U> {
    pub(super) fn new(client: Client, wrap: fn(Event<K>) -> U, events: mpsc::Sender<U>) -> Self {
        Self { client, wrap, events, newest: 0, older_since: None, older_for: OLDER_FOR, failures: 0 }
    }

    #[cfg(test)]
    pub(super) fn believing_older_after(self, older_for: Duration) -> Self {
        Self { older_for, ..self }
    }

    pub(super) async fn run(mut self) {
        // Ends only when nobody listens.
        while let Ok(version) = self.list().await {
            if self.watch(version).await.is_err() {
                return;
            }
        }
    }

    /// Lists until it succeeds; returns the version to watch from.
    async fn list(&mut self) -> Result<String, Closed> {
        loop {
            match self.pages().await {
                Ok((found, at)) => {
                    if self.is_too_old(version(&at)) {
                        let text = format!(
                            "the API server's list of {} (version {at}) is older than what was read before ({})",
                            K::NAME,
                            self.newest
                        );
                        self.failed(text).await?;
                        continue;
                    }
                    self.failures = 0;
                    self.newest = version(&at);
                    self.tell(Event::Listed(found)).await?;
                    return Ok(at);
                }
                Err(NoList::Refused(kube::Error::Api(status))) if status.code == 404 && K::OPTIONAL => {
                    tracing::info!(kind = K::NAME, "the API server does not know this kind");
                    self.tell(Event::Listed(Vec::new())).await?;
                    tokio::time::sleep(MISSING_PAUSE).await;
                }
                Err(NoList::Refused(error)) => {
                    self.failed(format!("cannot list {}: {}", K::NAME, reason(&error))).await?;
                }
                Err(NoList::Slow) => {
                    self.failed(format!("cannot list {}: no answer within {PAGE_LIMIT:?}", K::NAME)).await?;
                }
            }
        }
    }

    async fn pages(&self) -> Result<(Vec<(ObjectKey, K)>, String), NoList> {
        let mut params = ListParams::default().limit(PAGE);
        let mut found = Vec::new();
        loop {
            let request = Request::new(K::PATH).list(&params).map_err(kube::Error::BuildRequest)?;
            let page = timeout(PAGE_LIMIT, self.client.request::<Page<K::Raw>>(request)).await;
            let page = page.map_err(|_| NoList::Slow)??;
            found.extend(page.items.into_iter().flatten().map(|raw| {
                let (meta, object) = K::prune(raw);
                (meta.key(), object)
            }));
            match page.metadata.r#continue.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok((found, page.metadata.resource_version)),
            }
        }
    }

    fn is_too_old(&mut self, version: u64) -> bool {
        if version >= self.newest {
            self.older_since = None;
            return false;
        }
        let since = *self.older_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.older_for {
            return true;
        }
        tracing::warn!(
            kind = K::NAME,
            version,
            before = self.newest,
            "the API server stays older than what was read before: it is believed"
        );
        self.older_since = None;
        false
    }

    /// Watches from `version` until a list is needed.
    async fn watch(&mut self, mut version: String) -> Result<(), Closed> {
        let mut refused = 0;
        loop {
            let opened = Instant::now();
            match self.watch_once(&mut version).await? {
                Ended::Expired => return Ok(()),
                Ended::InTime => {
                    refused = 0;
                    // A server that ends each watch at once is not asked in a loop.
                    if opened.elapsed() < PAUSE {
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                Ended::Slow => {
                    self.failed(format!("cannot watch {}: no answer within {OPEN_LIMIT:?}", K::NAME)).await?;
                }
                Ended::Failed(error) => {
                    if let kube::Error::Api(status) = &error
                        // "Forbidden" and "slow down" would be said to a list, too.
                        && !matches!(status.code, 401 | 403 | 429)
                    {
                        refused += 1;
                        if refused >= REFUSALS {
                            return Ok(());
                        }
                    }
                    self.failed(format!("cannot watch {}: {}", K::NAME, reason(&error))).await?;
                }
            }
        }
    }

    async fn watch_once(&mut self, version: &mut String) -> Result<Ended, Closed> {
        let seconds = fastrand::u32(WATCH_SECONDS..WATCH_SECONDS * 3 / 2);
        let params = WatchParams { timeout: Some(seconds), bookmarks: true, ..WatchParams::default() };
        let request = match Request::new(K::PATH).watch(&params, version) {
            Ok(request) => request,
            Err(error) => return Ok(Ended::Failed(kube::Error::BuildRequest(error))),
        };
        let events = match timeout(OPEN_LIMIT, self.client.request_events::<K::Raw>(request)).await {
            Ok(Ok(events)) => events,
            Ok(Err(kube::Error::Api(status))) if status.code == 410 => return Ok(Ended::Expired),
            Ok(Err(error)) => return Ok(Ended::Failed(error)),
            Err(_) => return Ok(Ended::Slow),
        };
        tokio::pin!(events);
        if std::mem::take(&mut self.failures) > 0 {
            self.tell(Event::Well).await?;
        }
        let end = Instant::now() + Duration::from_secs(seconds.into()) + WATCH_SLACK;
        loop {
            let event = match tokio::time::timeout_at(end, events.try_next()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) | Err(_) => return Ok(Ended::InTime),
                Ok(Err(error)) => return Ok(Ended::Failed(error)),
            };
            match event {
                WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
                    let (meta, object) = K::prune(raw);
                    self.tell(Event::Set(meta.key(), object)).await?;
                    self.reached(version, meta.resource_version);
                }
                WatchEvent::Deleted(raw) => {
                    let (meta, _) = K::prune(raw);
                    self.tell(Event::Gone(meta.key())).await?;
                    self.reached(version, meta.resource_version);
                }
                WatchEvent::Bookmark(bookmark) => {
                    self.reached(version, bookmark.metadata.resource_version);
                }
                WatchEvent::Error(status) if status.code == 410 => return Ok(Ended::Expired),
                WatchEvent::Error(status) => return Ok(Ended::Failed(kube::Error::Api(status))),
            }
        }
    }

    fn reached(&mut self, version: &mut String, now: String) {
        if !now.is_empty() {
            self.newest = self.newest.max(self::version(&now));
            *version = now;
        }
    }

    /// Says so, and waits.
    async fn failed(&mut self, reason: String) -> Result<(), Closed> {
        self.failures = self.failures.saturating_add(1);
        if self.failures == 1 {
            tracing::warn!(reason, "Kubernetes cannot be read; what was read stays");
        }
        self.tell(Event::Failing(reason)).await?;
        let most = PAUSE.saturating_mul(1 << self.failures.min(6)).min(MAX_PAUSE);
        tokio::time::sleep(PAUSE / 2 + most.mul_f64(fastrand::f64())).await;
        Ok(())
    }

    async fn tell(&self, event: Event<K>) -> Result<(), Closed> {
        self.events.send((self.wrap)(event)).await.map_err(|_| Closed)
    }
}

fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!("{} (the controller's ClusterRole must grant get, list and watch)", status.message)
        }
        error => format!("{:#}", anyhow::Error::msg(chain(error))),
    }
}

/// The error with its causes: "connection refused" is the innermost.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
