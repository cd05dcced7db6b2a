//! How policies change: judged as a whole against what is in force, written as a whole, and answered when they hold.
//!
//! A write goes on when its caller leaves: the caller may have gone because it was slow, and half a write is what nobody
//! asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_policy::{Fault, Finding, Key, Object, validate};
use serde::Serialize;
use tokio::sync::{Mutex, watch};

use super::resolver::Resolution;
use super::{Action, Change, Past, Picture, PolicyStore, Write, WriteError, says_the_same};
use crate::metrics::{Metrics, ReasonLabel};
use crate::sources::Sync;

/// Writers that lose are judged again this often before their caller is told: more often than another controller that works
/// off a queue of callers wins in a row.
const TRIES: usize = 20;
/// How long a write waits until it is in force. What takes longer is written all the same, and comes.
const IN_FORCE: Duration = Duration::from_secs(5);

/// Changes policies.
#[derive(Debug)]
pub(crate) struct Writer {
    store: Arc<dyn PolicyStore>,
    resolutions: watch::Receiver<Option<Arc<Resolution>>>,
    metrics: Arc<Metrics>,
    /// Whoever holds it judges and writes: callers of one controller never lose against each other.
    writing: Mutex<()>,
}

/// Objects to apply.
#[derive(Debug, Clone, Default)]
pub(crate) struct Apply {
    /// Checked, each alone; their namespaces are set.
    pub(crate) objects: Vec<Object>,
    /// Objects to take away.
    pub(crate) deletions: Vec<Key>,
    /// Judge only.
    pub(crate) dry_run: bool,
    /// The revisions at which the caller knows objects; 0: it knows that there is none.
    pub(crate) expect: BTreeMap<Key, u64>,
    /// Who asks.
    pub(crate) author: String,
}

/// What an application came to.
#[derive(Debug, Serialize)]
pub(crate) struct Applied {
    /// The store's revision by then.
    pub(crate) revision: u64,
    /// For each object, in the order of the request.
    pub(crate) results: Vec<Verdict>,
}

/// What became of one object.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    /// `<Kind> <namespace>/<name>`.
    key: String,
    action: Action,
    /// At which it was last written.
    revision: u64,
    /// What is doubtful about it.
    pub(crate) warnings: Vec<String>,
}

/// Why nothing was changed.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Something is wrong with the objects.
    Invalid(Vec<Fault>),
    /// The objects, or one that they build on, have changed.
    Conflict(String),
    /// There is no such object, or no such revision of it.
    Missing(String),
    /// It does not fit into one write.
    TooLarge(String),
    /// The store cannot be written.
    Unavailable(String),
}

impl Refused {
    fn label(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Conflict(_) => "conflict",
            Self::Missing(_) => "missing",
            Self::TooLarge(_) => "too_large",
            Self::Unavailable(_) => "store_unavailable",
        }
    }
}

impl Writer {
    /// Writes to `store`; judges by the catalog of the newest resolution.
    pub(crate) fn new(
        store: Arc<dyn PolicyStore>,
        resolutions: watch::Receiver<Option<Arc<Resolution>>>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self { store, resolutions, metrics, writing: Mutex::new(()) })
    }

    /// What the store holds.
    pub(crate) fn picture(&self) -> Arc<Picture> {
        Arc::clone(&self.store.pictures().borrow())
    }

    /// What is in force.
    pub(crate) fn resolution(&self) -> Option<Arc<Resolution>> {
        self.resolutions.borrow().clone()
    }

    /// The last writes of an object, the newest first.
    pub(crate) async fn history(&self, key: &Key) -> Result<Vec<Past>, Refused> {
        self.store.history(key).await.map_err(Refused::Unavailable)
    }

    /// Applies all of it or nothing. Returns when it is in force.
    pub(crate) async fn apply(self: &Arc<Self>, apply: Apply) -> Result<Applied, Refused> {
        let writer = Arc::clone(self);
        let written = tokio::spawn(async move {
            let result = writer.try_apply(&apply).await;
            let label = result
                .as_ref()
                .map_or_else(Refused::label, |_| if apply.dry_run { "dry_run" } else { "done" });
            writer.metrics.policy_writes.get_or_create(&ReasonLabel::new(label)).inc();
            if let Err(refused) = &result {
                let keys = apply.objects.iter().map(Object::key).chain(apply.deletions.iter().cloned());
                let objects: Vec<String> = keys.map(|key| key.to_string()).collect();
                tracing::info!(target: "audit", author = apply.author, ?objects, reason = label, "policies not changed: {refused:?}");
            }
            result
        });
        let failed = |error| Err(Refused::Unavailable(format!("the write failed in itself: {error}")));
        written.await.unwrap_or_else(failed)
    }

    /// Brings back what an object was at a revision.
    pub(crate) async fn roll_back(
        self: &Arc<Self>,
        key: &Key,
        revision: u64,
        dry_run: bool,
        author: String,
    ) -> Result<Applied, Refused> {
        let history = self.history(key).await?;
        let past = history.iter().find(|past| past.revision == revision);
        let past = past.ok_or_else(|| {
            let known: Vec<String> = history.iter().map(|past| past.revision.to_string()).collect();
            Refused::Missing(format!(
                "{key} was not written at revision {revision}; known are {}",
                known.join(", ")
            ))
        })?;
        let (objects, deletions) = match past.object.clone() {
            Some(object) => (vec![object], Vec::new()),
            None => (Vec::new(), vec![key.clone()]),
        };
        self.apply(Apply { objects, deletions, dry_run, author, ..Apply::default() }).await
    }

    async fn try_apply(&self, apply: &Apply) -> Result<Applied, Refused> {
        let _writing = self.writing.lock().await;
        for _ in 0..TRIES {
            let picture = self.picture();
            match &picture.sync {
                Sync::Synced => self.await_first().await,
                Sync::Never => return Err(Refused::Unavailable(never_read(&picture))),
                Sync::Degraded { reason, .. } => {
                    return Err(Refused::Unavailable(format!(
                        "the store of policies cannot be read: {reason}"
                    )));
                }
            }
            let (changes, mut results) = self.judge(apply, &picture)?;
            if changes.is_empty() || apply.dry_run {
                return Ok(Applied { revision: picture.revision, results });
            }
            let write = Write {
                based_on: picture.revision,
                author: apply.author.clone(),
                at: SystemTime::now(),
                changes,
            };
            let written = match self.store.commit(write).await {
                Ok(written) => written,
                Err(WriteError::Conflict) => continue,
                Err(WriteError::TooLarge(reason)) => return Err(Refused::TooLarge(reason)),
                Err(WriteError::Unavailable(reason)) => return Err(Refused::Unavailable(reason)),
            };
            for result in results.iter_mut().filter(|result| result.action != Action::Unchanged) {
                let stored = result.key.parse().ok().and_then(|key: Key| written.policies.get(&key));
                let to = stored.map_or(written.revision, |stored| stored.revision);
                let from = std::mem::replace(&mut result.revision, to);
                tracing::info!(target: "audit", author = apply.author, policy = result.key, action = result.action.name(),
                    from, to, "policy written");
            }
            self.await_in_force(written.revision).await;
            return Ok(Applied { revision: written.revision, results });
        }
        Err(Refused::Conflict(format!("others wrote {TRIES} times meanwhile; try again")))
    }

    /// A controller that has just started has read the policies before it knows what they come to.
    async fn await_first(&self) {
        let mut resolutions = self.resolutions.clone();
        // Said by whoever looks for it.
        let _ = tokio::time::timeout(IN_FORCE, resolutions.wait_for(Option::is_some)).await;
    }

    /// What is to be written, and what to say of each object.
    fn judge(&self, apply: &Apply, picture: &Picture) -> Result<(Vec<Change>, Vec<Verdict>), Refused> {
        let mut seen = BTreeSet::new();
        for key in apply.objects.iter().map(Object::key).chain(apply.deletions.iter().cloned()) {
            if !seen.insert(key.clone()) {
                let message = "the object is there twice".to_owned();
                return Err(Refused::Invalid(vec![Fault {
                    file: key.to_string(),
                    message,
                    ..Fault::default()
                }]));
            }
        }
        for (key, expected) in &apply.expect {
            let found = picture.policies.get(key).map_or(0, |stored| stored.revision);
            if found != *expected {
                let is = |revision| match revision {
                    0 => "not to be there".to_owned(),
                    revision => format!("at revision {revision}"),
                };
                return Err(Refused::Conflict(format!(
                    "{key} was expected {}, and is {}; read it again",
                    is(*expected),
                    if found == 0 { "not there".to_owned() } else { is(found) }
                )));
            }
        }
        let Some(resolution) = self.resolution() else {
            return Err(Refused::Unavailable("the policies were not resolved yet".to_owned()));
        };
        let findings = validate(&apply.objects, &apply.deletions, &picture.policies, &resolution.catalog);
        if !findings.errors.is_empty() {
            return Err(Refused::Invalid(findings.errors.into_iter().map(fault).collect()));
        }
        let mut warnings: BTreeMap<Key, Vec<String>> = BTreeMap::new();
        for Finding { key, path, message } in findings.warnings {
            let text = if path.is_empty() { message } else { format!("{path}: {message}") };
            warnings.entry(key).or_default().push(text);
        }
        let (mut changes, mut results) = (Vec::new(), Vec::new());
        let mut verdict = |key: &Key, action, revision| {
            let warnings = warnings.remove(key).unwrap_or_default();
            results.push(Verdict { key: key.to_string(), action, revision, warnings });
        };
        for object in &apply.objects {
            let key = object.key();
            match picture.policies.get(&key) {
                Some(stored) if says_the_same(&stored.object, object) => {
                    verdict(&key, Action::Unchanged, stored.revision);
                }
                before => {
                    let action = if before.is_some() { Action::Configured } else { Action::Created };
                    verdict(&key, action, before.map_or(0, |stored| stored.revision));
                    changes.push(Change::Put(object.clone()));
                }
            }
        }
        for key in &apply.deletions {
            let Some(stored) = picture.policies.get(key) else {
                return Err(Refused::Missing(format!("there is no {key}")));
            };
            verdict(key, Action::Deleted, stored.revision);
            changes.push(Change::Delete(key.clone()));
        }
        Ok((changes, results))
    }

    async fn await_in_force(&self, revision: u64) {
        let mut resolutions = self.resolutions.clone();
        let there =
            resolutions.wait_for(|resolution| resolution.as_ref().is_some_and(|r| r.revision >= revision));
        if tokio::time::timeout(IN_FORCE, there).await.is_err() {
            tracing::warn!(
                revision,
                "policies are written, but were not resolved within {} s",
                IN_FORCE.as_secs()
            );
        }
    }
}

fn fault(finding: Finding) -> Fault {
    Fault { file: finding.key.to_string(), path: finding.path, message: finding.message, ..Fault::default() }
}

fn never_read(picture: &Picture) -> String {
    match picture.faults.first() {
        Some(fault) => format!("the store of policies was not read yet: {}: {}", fault.subject, fault.reason),
        None => "the store of policies was not read yet".to_owned(),
    }
}
