//! Policies in the controller's own store file.
//!
//! Answers come from memory. A write is judged and published under one lock, and published only when the disk has it:
//! what a caller was told is never lost, and what it was told to have failed is undone. While the disk takes no changes
//! writes fail, and everything else goes on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use outrigger_policy::{Key, Policies, Stored};
use tokio::sync::{Mutex, watch};

use super::{HISTORY, MAX_DELETED, Past, Picture, PolicyStore, Write, WriteError, outcome};
use crate::sources::Sync;
use crate::store::{Change as Record, Store, StoreError, Table};

/// The one record of [`Table::PolicyRevision`].
const REVISION: &str = "revision";
/// Digits of a revision in the key of a record, so that records stand in the order in which they were written.
const REVISION_DIGITS: usize = 20;

type Histories = BTreeMap<Key, VecDeque<Arc<Past>>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Embedded {
    store: Arc<Store>,
    pictures: watch::Sender<Arc<Picture>>,
    /// The newest last. Whoever holds it writes.
    histories: Mutex<Histories>,
}

impl Embedded {
    /// Takes what the store file holds.
    pub(crate) fn load(store: Arc<Store>) -> Result<Self, StoreError> {
        let unreadable = |record: &str, reason: String| StoreError::Read {
            table: Table::Policies,
            reason: format!("record `{}`: {reason}", record.escape_debug()),
        };
        let mut policies = Policies::new();
        for (record, stored) in store.load::<Stored>(Table::Policies)? {
            let key = stored.object.key();
            if record != key.to_string() {
                return Err(unreadable(&record, format!("it holds {key}")));
            }
            policies.insert(key, Arc::new(stored));
        }
        let mut histories = Histories::new();
        for (record, past) in store.load::<Past>(Table::PolicyHistory)? {
            let key = record.rsplit_once(' ').and_then(|(key, _)| key.parse().ok());
            let key = key.ok_or_else(|| unreadable(&record, "it names no object".to_owned()))?;
            histories.entry(key).or_default().push_back(Arc::new(past));
        }
        let revision =
            store.load::<u64>(Table::PolicyRevision)?.into_iter().map(|(_, revision)| revision).max();
        let picture = Picture {
            revision: revision.unwrap_or(0),
            policies: Arc::new(policies),
            grants: None,
            sync: Sync::Synced,
            faults: Vec::new(),
        };
        Ok(Self { store, pictures: watch::Sender::new(Arc::new(picture)), histories: Mutex::new(histories) })
    }
}

#[tonic::async_trait]
impl PolicyStore for Embedded {
    fn pictures(&self) -> watch::Receiver<Arc<Picture>> {
        self.pictures.subscribe()
    }

    async fn commit(&self, write: Write) -> Result<Arc<Picture>, WriteError> {
        let mut histories = self.histories.lock().await;
        let before = Arc::clone(&self.pictures.borrow());
        if before.revision != write.based_on {
            return Err(WriteError::Conflict);
        }
        if let Some(failing) = self.store.failing() {
            return Err(WriteError::Unavailable(format!(
                "the store's disk takes no changes: {}; see the controller's log",
                failing.reason
            )));
        }
        let revision = before.revision + 1;
        let outcome = outcome(&before.policies, &write, revision)?;
        let mut records = vec![Record::put(Table::PolicyRevision, REVISION, &revision)];
        let mut undo = vec![Record::put(Table::PolicyRevision, REVISION, &before.revision)];
        let mut after = histories.clone();
        for (key, past) in outcome.pasts {
            let name = key.to_string();
            records.push(record_of(&name, outcome.policies.get(&key)));
            undo.push(record_of(&name, before.policies.get(&key)));
            let at = history_record(&key, past.revision);
            records.push(Record::put(Table::PolicyHistory, at.clone(), &past));
            undo.push(Record::delete(Table::PolicyHistory, at));
            after.entry(key).or_default().push_back(Arc::new(past));
        }
        for (key, past) in forget(&mut after, &outcome.policies) {
            let at = history_record(&key, past.revision);
            records.push(Record::delete(Table::PolicyHistory, at.clone()));
            undo.push(Record::put(Table::PolicyHistory, at, &*past));
        }
        if let Err(error) = self.store.submit(records).durable().await {
            // It waits for the disk still: what comes after it makes it as if it had never been.
            self.store.submit(undo).forget();
            return Err(WriteError::Unavailable(error.to_string()));
        }
        *histories = after;
        let picture =
            Arc::new(Picture { revision, policies: Arc::new(outcome.policies), ..Picture::clone(&before) });
        self.pictures.send_replace(Arc::clone(&picture));
        Ok(picture)
    }

    async fn history(&self, key: &Key) -> Result<Vec<Past>, String> {
        let histories = self.histories.lock().await;
        Ok(histories.get(key).into_iter().flatten().rev().map(|past| Past::clone(past)).collect())
    }
}

fn record_of(name: &str, stored: Option<&Arc<Stored>>) -> Record {
    match stored {
        Some(stored) => Record::put(Table::Policies, name, &**stored),
        None => Record::delete(Table::Policies, name),
    }
}

fn history_record(key: &Key, revision: u64) -> String {
    format!("{key} {revision:0REVISION_DIGITS$}")
}

/// Takes out what is beyond the bounds, and returns it.
fn forget(histories: &mut Histories, policies: &Policies) -> Vec<(Key, Arc<Past>)> {
    let mut gone = Vec::new();
    for (key, pasts) in histories.iter_mut() {
        let excess = pasts.len().saturating_sub(HISTORY);
        gone.extend(pasts.drain(..excess).map(|past| (key.clone(), past)));
    }
    let mut deleted: Vec<(u64, Key)> = histories
        .iter()
        .filter(|(key, _)| !policies.contains_key(key))
        .map(|(key, pasts)| (pasts.back().map_or(0, |past| past.revision), key.clone()))
        .collect();
    deleted.sort_unstable();
    let excess = deleted.len().saturating_sub(MAX_DELETED);
    for (_, key) in deleted.drain(..excess) {
        let pasts = histories.remove(&key).unwrap_or_default();
        gone.extend(pasts.into_iter().map(|past| (key.clone(), past)));
    }
    gone
}
