//! What the controller must not forget: join tokens, claims and virtual addresses, in one redb file.
//!
//! Readers never touch the file: each module loads its table at start, answers from memory and submits its changes.
//! One thread commits them in the order of submission, many in one transaction, so that a thousand sidecars that arrive
//! at once cost a few disk flushes and not a thousand. Who must be sure before it answers waits for the [`Receipt`].
//! Values are JSON: small, readable in a rescue, and new fields can be added with a default.

use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

/// Submissions that wait for the disk. More means that the disk is stuck, and then refusing is better than memory.
const QUEUE: usize = 4096;
/// Submissions in one transaction: bounds how long the first of them waits.
const BATCH: usize = 512;

/// The tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// Join tokens by id.
    Tokens,
    /// Accepted claims by `<service> <address>`.
    Claims,
    /// Services of which an instance was ever claimed.
    Meshed,
    /// Virtual addresses by service.
    Addresses,
}

const TABLES: [Table; 4] = [Table::Tokens, Table::Claims, Table::Meshed, Table::Addresses];

impl Table {
    fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(match self {
            Self::Tokens => "tokens",
            Self::Claims => "claims",
            Self::Meshed => "meshed",
            Self::Addresses => "addresses",
        })
    }
}

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The file cannot be opened; another controller may hold it.
    #[error("cannot open the store {path}: {reason}; is another controller running on this data directory?")]
    Open {
        /// The file.
        path: String,
        /// What redb said.
        reason: String,
    },
    /// The file cannot be read, or holds what this version cannot read.
    #[error("cannot read {table:?} from the store: {reason}")]
    Read {
        /// Which table.
        table: Table,
        /// Why.
        reason: String,
    },
    /// A change could not be made durable.
    #[error("cannot write to the store: {0}")]
    Write(String),
}

/// One change of one record.
#[derive(Debug)]
pub(crate) struct Change {
    table: Table,
    key: String,
    value: Option<Vec<u8>>,
}

impl Change {
    /// Sets a record.
    pub(crate) fn put<T: Serialize>(table: Table, key: impl Into<String>, value: &T) -> Self {
        let value =
            serde_json::to_vec(value).expect("records hold strings, numbers and lists, which are JSON");
        Self { table, key: key.into(), value: Some(value) }
    }

    /// Deletes a record; deleting nothing is fine.
    pub(crate) fn delete(table: Table, key: impl Into<String>) -> Self {
        Self { table, key: key.into(), value: None }
    }

    #[cfg(test)]
    pub(crate) fn into_parts(self) -> (String, Option<Vec<u8>>) {
        (self.key, self.value)
    }
}

/// Tells when a submission is on the disk.
#[derive(Debug)]
#[must_use = "drop it with `forget` where durability need not be awaited"]
pub(crate) struct Receipt(oneshot::Receiver<Result<(), String>>);

impl Receipt {
    /// Waits until the changes are durable.
    pub(crate) async fn durable(self) -> Result<(), StoreError> {
        match self.0.await {
            Ok(result) => result.map_err(StoreError::Write),
            Err(_) => Err(StoreError::Write("the store is closed or its queue is full".to_owned())),
        }
    }

    /// The change is in memory and will be made again if it is lost: nobody waits. Failures are logged by the writer.
    pub(crate) fn forget(self) {
        drop(self);
    }
}

struct Submission {
    changes: Vec<Change>,
    done: oneshot::Sender<Result<(), String>>,
}

/// The open store. Dropping it waits for what was submitted.
#[derive(Debug)]
pub(crate) struct Store {
    submissions: Option<mpsc::SyncSender<Submission>>,
    writer: Option<JoinHandle<()>>,
    database: std::sync::Arc<Database>,
}

impl Store {
    /// Opens the file, creating it at first start.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let open = || -> Result<Database, redb::Error> {
            let database = Database::create(path)?;
            let transaction = database.begin_write()?;
            for table in TABLES {
                transaction.open_table(table.definition())?;
            }
            transaction.commit()?;
            Ok(database)
        };
        let database = open().map_err(|error| StoreError::Open {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        let database = std::sync::Arc::new(database);
        let (submissions, queue) = mpsc::sync_channel(QUEUE);
        let for_writer = std::sync::Arc::clone(&database);
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || write_all(&for_writer, &queue))
            .map_err(|error| StoreError::Write(format!("cannot start the writer thread: {error}")))?;
        Ok(Self { submissions: Some(submissions), writer: Some(writer), database })
    }

    /// Every record of a table.
    pub(crate) fn load<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        let failed = |reason: String| StoreError::Read { table, reason };
        let read = || -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let transaction = self.database.begin_read()?;
            let records = transaction.open_table(table.definition())?;
            let mut found = Vec::new();
            for record in records.iter()? {
                let (key, value) = record?;
                found.push((key.value().to_owned(), value.value().to_vec()));
            }
            Ok(found)
        };
        let records = read().map_err(|error| failed(error.to_string()))?;
        records
            .into_iter()
            .map(|(key, value)| match serde_json::from_slice(&value) {
                Ok(parsed) => Ok((key, parsed)),
                Err(error) => Err(failed(format!("record `{}`: {error}", key.escape_debug()))),
            })
            .collect()
    }

    /// Hands changes to the writer; they become durable together, after all that was submitted before.
    /// Never blocks: where the queue is full the receipt fails.
    pub(crate) fn submit(&self, changes: Vec<Change>) -> Receipt {
        let (done, receipt) = oneshot::channel();
        if let Some(submissions) = &self.submissions
            && submissions.try_send(Submission { changes, done }).is_err()
        {
            tracing::error!(
                queue = QUEUE,
                "the store's queue is full; a change was not kept. Is the disk stuck?"
            );
        }
        Receipt(receipt)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.submissions = None;
        if let Some(writer) = self.writer.take() {
            // The thread cannot panic in a way that matters here: redb recovers to the last commit.
            let _ = writer.join();
        }
    }
}

fn write_all(database: &Database, queue: &mpsc::Receiver<Submission>) {
    while let Ok(first) = queue.recv() {
        let batch: Vec<Submission> = std::iter::once(first).chain(queue.try_iter().take(BATCH - 1)).collect();
        let result = commit(database, &batch).map_err(|error| error.to_string());
        if let Err(error) = &result {
            tracing::error!(%error, changes = batch.len(), "cannot write to the store; changes live in memory only");
        }
        for submission in batch {
            // Nobody waits where the receipt was dropped.
            let _ = submission.done.send(result.clone());
        }
    }
}

fn commit(database: &Database, batch: &[Submission]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for change in batch.iter().flat_map(|submission| &submission.changes) {
        let mut table = transaction.open_table(change.table.definition())?;
        match &change.value {
            Some(value) => table.insert(change.key.as_str(), value.as_slice())?,
            None => table.remove(change.key.as_str())?,
        };
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_acknowledged_survives_reopening_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        {
            let store = Store::open(&path).unwrap();
            store
                .submit(vec![Change::put(Table::Tokens, "a", &1), Change::put(Table::Tokens, "b", &2)])
                .forget();
            store.submit(vec![Change::put(Table::Tokens, "a", &3)]).forget();
            store.submit(vec![Change::delete(Table::Tokens, "b")]).durable().await.unwrap();
            assert!(Store::open(&path).is_err(), "two controllers must not share a store");
        }
        let store = Store::open(&path).unwrap();
        assert_eq!(store.load::<i32>(Table::Tokens).unwrap(), [("a".to_owned(), 3)]);
        assert!(store.load::<i32>(Table::Claims).unwrap().is_empty());
        assert!(
            store.load::<String>(Table::Tokens).is_err(),
            "a record of another shape is an error, not nothing"
        );
    }
}
