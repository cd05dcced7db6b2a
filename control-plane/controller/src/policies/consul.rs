//! Policies in Consul's key-value store, for controllers on several hosts and for backups that people have already.
//!
//! ```text
//! outrigger/policies/revision                            a number, written with every change
//! outrigger/policies/<kind>/<namespace>/<name>           what is in force
//! outrigger/history/<kind>/<namespace>/<name>/<revision> the last 20 writes of each object
//! ```
//!
//! A write is one transaction that compares the revision's key and each object's key with what was read: of two writers
//! one loses, and judges again. One watch reads everything in force with its revision, so that a picture is never a
//! mixture. History is apart, because a watch is woken with all that it covers.
//!
//! A transaction's writer knows what it wrote before the watch tells; a watch that reads from a server behind the leader
//! must not take that back, so that for a while an older revision than the own last one is not believed; nor must a watch
//! that breaks before it has read the write, however long Consul is away then. A revision that is *gone* while policies
//! are held is never believed: somebody has wiped the store, and a mesh without its policies would let in what they keep
//! out. (A store that was restored to an older state has its older revision, and is.)

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use outrigger_consul::{
    Client, KvOperation, KvOutcome, KvPair, MAX_TRANSACTION, MAX_TRANSACTION_BYTES, Reason, Scope, State,
    Status, Watch,
};
use outrigger_policy::{Key, Policies, Stored, parse};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{Change, HISTORY, MAX_DELETED, Past, Picture, PolicyStore, Write, WriteError, outcome};
use crate::sources::{Fault, MAX_FAULTS, Sync};

const POLICIES: &str = "outrigger/policies/";
const REVISION: &str = "outrigger/policies/revision";
const HISTORIES: &str = "outrigger/history/";
/// What the controller's token must be allowed, as an ACL rule of Consul.
const NEEDED: &str = r#"`key_prefix "outrigger/" { policy = "write" }`"#;
/// Digits of a revision in a key: keys stand in the order in which they were written.
const REVISION_DIGITS: usize = 20;
/// Each object takes two operations, and the revision one.
const MAX_CHANGES: usize = (MAX_TRANSACTION - 1) / 2;
/// How long a server may be behind its leader: Outrigger's own watches take no answer that is older.
const BEHIND: Duration = Duration::from_secs(10);

/// See the module. Dropping it ends its tasks.
#[derive(Debug)]
pub(crate) struct ConsulStore {
    shared: Arc<Shared>,
    /// Whoever holds it writes: of writers in this process none need lose.
    writing: tokio::sync::Mutex<()>,
    _watch: Watch<String, KvPair>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

struct Shared {
    client: Client,
    scope: Scope,
    pictures: watch::Sender<Arc<Picture>>,
    held: Mutex<Held>,
    written: Notify,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// What was read last.
#[derive(Debug, Default)]
struct Held {
    records: BTreeMap<Key, Record>,
    /// Version of the revision's key; 0: there is none.
    revision_version: u64,
    /// The own last write, and until when nothing older is believed. `None`: that time begins when Consul can be read again.
    floor: Option<(u64, Option<Instant>)>,
    /// Every record could be read, at least once since the start.
    complete: bool,
}

/// One object's key.
#[derive(Debug, Clone)]
struct Record {
    /// Consul's `ModifyIndex`.
    version: u64,
    /// The last good.
    stored: Option<Arc<Stored>>,
    /// Why the newest cannot be used.
    fault: Option<String>,
}

impl ConsulStore {
    /// Starts to watch. Must be called in a tokio runtime.
    pub(crate) fn start(client: Client) -> Result<Self, outrigger_consul::Error> {
        let scope = Scope::default();
        let watch = client.watch_kv(POLICIES, &scope)?;
        let shared = Arc::new(Shared {
            client,
            scope,
            pictures: watch::Sender::new(Arc::default()),
            held: Mutex::default(),
            written: Notify::new(),
        });
        let follow = tokio::spawn(Arc::clone(&shared).follow(watch.states()));
        let trim = tokio::spawn(Arc::clone(&shared).trim_after_writes());
        let tasks = [AbortOnDropHandle::new(follow), AbortOnDropHandle::new(trim)];
        Ok(Self { shared, writing: tokio::sync::Mutex::new(()), _watch: watch, _tasks: tasks })
    }
}

#[tonic::async_trait]
impl PolicyStore for ConsulStore {
    fn pictures(&self) -> watch::Receiver<Arc<Picture>> {
        self.shared.pictures.subscribe()
    }

    async fn commit(&self, write: Write) -> Result<Arc<Picture>, WriteError> {
        let _writing = self.writing.lock().await;
        let before = Arc::clone(&self.shared.pictures.borrow());
        before.takes(&write, "Consul's")?;
        if write.changes.len() > MAX_CHANGES {
            return Err(WriteError::TooLarge(format!(
                "{} objects are too many for one transaction of Consul; apply at most {MAX_CHANGES} at once",
                write.changes.len()
            )));
        }
        let revision = before.revision + 1;
        let outcome = outcome(&before.policies, &write, revision)?;
        let operations = self.shared.operations(&write, revision, &outcome.policies, &outcome.pasts);
        // In base64, a third longer; keys and punctuation are the rest.
        let bytes: usize = operations.iter().map(|operation| size(operation) * 4 / 3 + 400).sum();
        if bytes > MAX_TRANSACTION_BYTES {
            return Err(WriteError::TooLarge(format!(
                "{bytes} bytes are too many for one transaction of Consul, which takes {MAX_TRANSACTION_BYTES}; \
                 apply fewer objects at once"
            )));
        }
        match self.shared.client.kv_txn(&operations, &self.shared.scope).await {
            Ok(KvOutcome::Committed(version)) => {
                let picture = self.shared.wrote(&write, revision, version, outcome.policies);
                self.shared.written.notify_one();
                Ok(picture)
            }
            Ok(KvOutcome::Conflict) => {
                // The watch would tell, but the caller shall judge again at once.
                match self.shared.client.kv_list(POLICIES, &self.shared.scope).await {
                    Ok(pairs) => drop(self.shared.take(&pairs, &Status::Synced)),
                    Err(error) => return Err(WriteError::Unavailable(error.to_string())),
                }
                Err(WriteError::Conflict)
            }
            Err(error) => Err(WriteError::Unavailable(failed(&error))),
        }
    }

    async fn history(&self, key: &Key) -> Result<Vec<Past>, String> {
        let prefix = format!("{HISTORIES}{}/", path(key));
        let pairs = self.shared.client.kv_list(&prefix, &self.shared.scope).await;
        let pairs = pairs.map_err(|error| error.to_string())?;
        // What cannot be read is no history.
        let pasts = pairs.values().rev().filter_map(|pair| serde_json::from_slice(&pair.value).ok());
        Ok(pasts.take(HISTORY).collect())
    }
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        // Each change is a whole assignment: a panic elsewhere leaves it whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn follow(self: Arc<Self>, mut states: watch::Receiver<State<String, KvPair>>) {
        loop {
            let state = states.borrow_and_update().clone();
            let again = if let Some(pairs) = &state.value {
                self.take(pairs, &state.status)
            } else {
                if let Status::Degraded(reason) = &state.status {
                    let reason = why(reason);
                    tracing::warn!(
                        reason,
                        "policies cannot be read from Consul yet: proxies are told nothing that policies decide"
                    );
                }
                None
            };
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {}
            }
        }
    }

    /// Publishes what was read. `Some`: it is older than the own last write, and is looked at again then.
    fn take(&self, pairs: &BTreeMap<String, KvPair>, status: &Status) -> Option<Instant> {
        let mut held = self.held();
        let last = Arc::clone(&self.pictures.borrow());
        let revision = pairs.get(REVISION).map(|pair| serde_json::from_slice::<u64>(&pair.value));
        let mut faults = Vec::new();
        let revision = match revision {
            None if last.revision > 0 => {
                let reason = format!(
                    "Consul's key {REVISION} is gone: the store was wiped; keeping the last policies. \
                     Restore it, or write the key with the number {} to go on without what is missing",
                    last.revision + 1
                );
                self.publish(Picture { sync: degraded(&last.sync, reason), ..Picture::clone(&last) });
                return None;
            }
            None => 0,
            Some(Ok(revision)) => revision,
            Some(Err(error)) => {
                faults.push(Fault { subject: REVISION.to_owned(), reason: format!("not a number: {error}") });
                last.revision
            }
        };
        if let Some((floor, until)) = held.floor {
            if *status == Status::Synced {
                let until = until.unwrap_or_else(|| Instant::now() + BEHIND);
                held.floor = (Instant::now() < until).then_some((floor, Some(until)));
                if revision < floor && held.floor.is_some() {
                    return Some(until);
                }
            } else {
                // What the watch read before it broke says nothing of what has become of the write since.
                held.floor = Some((floor, None));
                if revision < floor {
                    self.publish(Picture { sync: sync(&last.sync, status), ..Picture::clone(&last) });
                    return None;
                }
            }
        }
        held.revision_version = pairs.get(REVISION).map_or(0, |pair| pair.modify_index);
        let mut records = BTreeMap::new();
        for (name, pair) in pairs.iter().filter(|(name, _)| *name != REVISION) {
            match key_of(name) {
                Some(key) => {
                    let record = read(&key, pair, held.records.get(&key));
                    if let Some(fault) = &record.fault {
                        faults.push(Fault { subject: name.clone(), reason: fault.clone() });
                    }
                    records.insert(key, record);
                }
                None => {
                    faults
                        .push(Fault { subject: name.clone(), reason: "the key names no object".to_owned() });
                }
            }
        }
        held.records = records;
        // At the start a record that cannot be read may say anything, among it what must be refused: until all were read
        // once nothing is said. One that is broken later keeps what it last said.
        held.complete |= held.records.values().all(|record| record.stored.is_some());
        faults.truncate(MAX_FAULTS);
        let policies: Policies = held
            .records
            .iter()
            .filter_map(|(key, record)| Some((key.clone(), record.stored.clone()?)))
            .collect();
        let sync = if held.complete { sync(&last.sync, status) } else { Sync::Never };
        self.publish(Picture { revision, policies: Arc::new(policies), grants: None, sync, faults });
        None
    }

    fn publish(&self, picture: Picture) {
        self.pictures.send_if_modified(|last| {
            if **last == picture {
                return false;
            }
            if let Sync::Degraded { reason, .. } = &picture.sync
                && !matches!(last.sync, Sync::Degraded { .. })
            {
                tracing::warn!(
                    reason,
                    "policies cannot be read from Consul: the last good stay, writes fail"
                );
            }
            for fault in picture.faults.iter().filter(|fault| !last.faults.contains(fault)) {
                tracing::warn!(
                    key = fault.subject,
                    reason = fault.reason,
                    "a policy in Consul cannot be used"
                );
            }
            *last = Arc::new(picture);
            true
        });
    }

    fn operations(
        &self,
        write: &Write,
        revision: u64,
        policies: &Policies,
        pasts: &BTreeMap<Key, Past>,
    ) -> Vec<KvOperation> {
        let json = "objects hold strings, numbers and lists, which are JSON";
        let held = self.held();
        let mut operations = vec![KvOperation::Cas {
            key: REVISION.to_owned(),
            value: revision.to_string().into_bytes(),
            modify_index: held.revision_version,
        }];
        for change in &write.changes {
            let key = change.key();
            let modify_index = held.records.get(&key).map_or(0, |record| record.version);
            let name = format!("{POLICIES}{}", path(&key));
            operations.push(match policies.get(&key) {
                Some(stored) => {
                    let value = serde_json::to_vec(&**stored).expect(json);
                    KvOperation::Cas { key: name, value, modify_index }
                }
                None => KvOperation::DeleteCas { key: name, modify_index },
            });
            if let Some(past) = pasts.get(&key) {
                let at = format!("{HISTORIES}{}/{revision:0REVISION_DIGITS$}", path(&key));
                operations.push(KvOperation::Set { key: at, value: serde_json::to_vec(past).expect(json) });
            }
        }
        operations
    }

    /// Publishes the own write.
    fn wrote(&self, write: &Write, revision: u64, version: u64, policies: Policies) -> Arc<Picture> {
        let mut held = self.held();
        held.revision_version = version;
        held.floor = Some((revision, Some(Instant::now() + BEHIND)));
        for key in write.changes.iter().map(Change::key) {
            match policies.get(&key) {
                Some(stored) => {
                    let record = Record { version, stored: Some(Arc::clone(stored)), fault: None };
                    held.records.insert(key, record);
                }
                None => _ = held.records.remove(&key),
            }
        }
        let last = Arc::clone(&self.pictures.borrow());
        let picture = Picture { revision, policies: Arc::new(policies), ..Picture::clone(&last) };
        self.publish(picture.clone());
        Arc::new(picture)
    }

    /// History is cut after the write, for a transaction has room for few operations; what fails is cut the next time.
    async fn trim_after_writes(self: Arc<Self>) {
        loop {
            self.written.notified().await;
            if let Err(error) = self.trim().await {
                tracing::debug!(%error, "the history of policies in Consul was not cut");
            }
        }
    }

    async fn trim(&self) -> Result<(), outrigger_consul::Error> {
        let names = self.client.kv_keys(HISTORIES, &self.scope).await?;
        let gone = beyond_bounds(names, &self.pictures.borrow().policies.clone());
        let deletions: Vec<KvOperation> = gone.into_iter().map(|key| KvOperation::Delete { key }).collect();
        for part in deletions.chunks(MAX_TRANSACTION) {
            self.client.kv_txn(part, &self.scope).await?;
        }
        Ok(())
    }
}

/// Of the keys of all histories, in order, those that are to be forgotten.
fn beyond_bounds(names: Vec<String>, policies: &Policies) -> Vec<String> {
    let mut histories: BTreeMap<Key, Vec<String>> = BTreeMap::new();
    let sorted: BTreeSet<String> = names.into_iter().collect();
    for name in sorted {
        let key = name.strip_prefix(HISTORIES).and_then(|rest| key_of_path(rest.rsplit_once('/')?.0));
        if let Some(key) = key {
            histories.entry(key).or_default().push(name);
        }
    }
    let mut gone = Vec::new();
    for names in histories.values_mut() {
        let excess = names.len().saturating_sub(HISTORY);
        gone.extend(names.drain(..excess));
    }
    let revision = |names: &[String]| names.last().and_then(|name| Some(name.rsplit_once('/')?.1.to_owned()));
    let mut deleted: Vec<_> = histories
        .into_iter()
        .filter(|(key, _)| !policies.contains_key(key))
        .map(|(_, names)| (revision(&names), names))
        .collect();
    deleted.sort_unstable();
    let excess = deleted.len().saturating_sub(MAX_DELETED);
    gone.extend(deleted.drain(..excess).flat_map(|(_, names)| names));
    gone
}

fn read(key: &Key, pair: &KvPair, before: Option<&Record>) -> Record {
    if let Some(before) = before
        && before.version == pair.modify_index
    {
        return before.clone();
    }
    let parsed = serde_json::from_slice::<Stored>(&pair.value).map_err(|error| error.to_string());
    let checked = parsed.and_then(|stored| {
        let found = stored.object.key();
        if found != *key {
            return Err(format!("the value holds {found}"));
        }
        // Whoever may write to Consul can write more than the API takes.
        let text = serde_json::to_string(&stored.object).map_err(|error| error.to_string())?;
        let all = |faults: Vec<outrigger_policy::Fault>| {
            let texts = faults.iter().map(|fault| format!("{}: {}", fault.path, fault.message));
            texts.collect::<Vec<_>>().join("; ")
        };
        parse(&key.to_string(), &text, &key.namespace).map_err(all)?;
        Ok(stored)
    });
    let last_good = before.and_then(|before| before.stored.clone());
    let version = pair.modify_index;
    match checked {
        Ok(stored) => {
            let stored = last_good.filter(|last| **last == stored).unwrap_or_else(|| Arc::new(stored));
            Record { version, stored: Some(stored), fault: None }
        }
        Err(reason) => Record { version, stored: last_good, fault: Some(reason) },
    }
}

/// Why a write failed, and what that means for it.
fn failed(error: &outrigger_consul::Error) -> String {
    if error.may_have_happened() {
        return format!("{error}; the write may have taken effect");
    }
    let text = error.to_string();
    // Consul's words, wherever in a transaction it finds that the token may not.
    if error.is_unauthorized() || text.contains("Permission denied") {
        return format!("{text}; the controller's token needs {NEEDED}");
    }
    text
}

fn sync(before: &Sync, status: &Status) -> Sync {
    match status {
        Status::Synced => Sync::Synced,
        Status::Starting => before.clone(),
        Status::Degraded(reason) => degraded(before, why(reason)),
    }
}

/// Why the store cannot be read.
fn why(reason: &Reason) -> String {
    match reason {
        Reason::Filtered => {
            format!("Consul hides what the token may not read; the controller's token needs {NEEDED}")
        }
        reason => reason.to_string(),
    }
}

fn degraded(before: &Sync, reason: String) -> Sync {
    match before {
        Sync::Never => Sync::Never,
        Sync::Synced => Sync::Degraded { since: SystemTime::now(), reason },
        Sync::Degraded { since, .. } => Sync::Degraded { since: *since, reason },
    }
}

fn size(operation: &KvOperation) -> usize {
    match operation {
        KvOperation::Set { value, .. } | KvOperation::Cas { value, .. } => value.len(),
        KvOperation::DeleteCas { .. } | KvOperation::Delete { .. } => 0,
    }
}

fn path(key: &Key) -> String {
    format!("{}/{}/{}", key.kind, key.namespace, key.name)
}

fn key_of(name: &str) -> Option<Key> {
    key_of_path(name.strip_prefix(POLICIES)?)
}

fn key_of_path(path: &str) -> Option<Key> {
    let (kind, rest) = path.split_once('/')?;
    format!("{kind} {rest}").parse().ok()
}
