//! What the controller must not forget: join tokens, claims, virtual addresses, policies and which CA it has, in one redb
//! file.
//!
//! Readers never touch the file: each module loads its table at start, answers from memory and submits its changes.
//! What the disk does not have yet waits in one map with the newest value of each record, and one thread commits the
//! whole map in one transaction: the file is always what memory was at some moment, a thousand sidecars that arrive at
//! once cost a few disk flushes, and however long the disk fails no more waits than there are records. Who must be sure
//! before it answers waits for the [`Receipt`], but not for ever.
//!
//! After an I/O error redb wants its file closed and opened again: the writer does that and tries once a second, until
//! the disk takes what waits. Nothing that was accepted is dropped meanwhile, and the controller stays ready: it still
//! serves discovery and renews certificates from memory, and taking it out of service would add a failure of the mesh to
//! one of a disk. That it cannot remember new things is said by `outrigger_store_writable`, in the text of `/ready`, by
//! `/api/v1/sources`, once in the log, and to whoever asked for a change that must be durable.
//!
//! Values are JSON: small, readable in a rescue, and new fields can be added with a default.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use prometheus_client::metrics::gauge::Gauge;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

/// Changed records that wait for the disk: as many as the largest table has, ~100 MiB. Beyond, puts are refused;
/// deletions find room for twice as many, because a revocation must.
const WAITING: usize = 500_000;
/// How long somebody waits for the disk before it is told that the change is not durable.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts on a disk that fails.
const RETRY: Duration = Duration::from_secs(1);

/// The tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Table {
    /// Join tokens by id.
    Tokens,
    /// Accepted claims by `<service> <address>`.
    Claims,
    /// Services of which an instance was ever claimed.
    Meshed,
    /// Virtual addresses by service.
    Addresses,
    /// Which CA this mesh has, so that a lost one is not silently replaced.
    Authority,
    /// Policies by kind, namespace and name.
    Policies,
    /// What they were, by the same and the revision.
    PolicyHistory,
    /// The number of the last write of policies.
    PolicyRevision,
}

impl Table {
    fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(match self {
            Self::Tokens => "tokens",
            Self::Claims => "claims",
            Self::Meshed => "meshed",
            Self::Addresses => "addresses",
            Self::Authority => "authority",
            Self::Policies => "policies",
            Self::PolicyHistory => "policy-history",
            Self::PolicyRevision => "policy-revision",
        })
    }
}

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Another process has the file open.
    #[error(
        "the store {} is in use: another controller runs on this data directory; stop it, or set another `data_dir`",
        .0.display()
    )]
    InUse(PathBuf),
    /// The file is there and is not what redb wrote.
    #[error(
        "the store {} is damaged: {reason}; restore it from a backup, or move it away to go on without it: the CA stays, \
         but every join token, claim and virtual address is lost, and workloads must join anew",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What redb said.
        reason: String,
    },
    /// The file cannot be opened.
    #[error("cannot open the store {}: {reason}; check its permissions and the room on its disk", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
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
    /// The change waits for the disk still, and goes on doing so.
    #[error("the store's disk took no changes for {} s; is it full? The controller's log says why", PATIENCE.as_secs())]
    NotYet,
    /// The change was not taken at all.
    #[error("too many changes wait for the store's disk, or the controller is stopping; try again later")]
    Refused,
}

impl StoreError {
    fn opening(path: &Path, error: DatabaseError) -> Self {
        let path = path.to_owned();
        match error {
            DatabaseError::DatabaseAlreadyOpen => Self::InUse(path),
            DatabaseError::Storage(redb::StorageError::Io(error))
                if !matches!(
                    error.kind(),
                    std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof
                ) =>
            {
                Self::Open { path, reason: error.to_string() }
            }
            other => Self::Damaged { path, reason: other.to_string() },
        }
    }
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
pub(crate) struct Receipt {
    /// `None`: the submission was refused.
    number: Option<u64>,
    committed: watch::Receiver<u64>,
    patience: Duration,
}

impl Receipt {
    /// Waits until the changes are durable, for 5 s at most. After [`StoreError::NotYet`] they wait on for the disk: who
    /// does not want them any more submits what undoes them.
    pub(crate) async fn durable(mut self) -> Result<(), StoreError> {
        let number = self.number.ok_or(StoreError::Refused)?;
        let committed = self.committed.wait_for(|committed| *committed >= number);
        match tokio::time::timeout(self.patience, committed).await {
            Ok(Ok(_)) => Ok(()),
            // The writer has ended: the store was closed on a disk that fails.
            Ok(Err(_)) => Err(StoreError::Refused),
            Err(_) => Err(StoreError::NotYet),
        }
    }

    /// Nobody waits: the change is in memory, and is tried until the disk has it.
    pub(crate) fn forget(self) {
        drop(self);
    }
}

/// A disk that takes no changes.
#[derive(Debug, Clone)]
pub(crate) struct Failing {
    /// Since when.
    pub(crate) since: SystemTime,
    /// What it last said.
    pub(crate) reason: String,
}

type Batch = BTreeMap<(Table, String), Option<Vec<u8>>>;

/// Opens the file; makes it where the argument is `true`. A file that vanished while we ran is not made anew: it would
/// lack all but the newest changes.
type Opener = Box<dyn Fn(bool) -> Result<Database, DatabaseError> + Send>;

#[derive(Default)]
struct State {
    waiting: Batch,
    /// Counts submissions; a receipt holds its own.
    submitted: u64,
    closed: bool,
    failing: Option<Failing>,
    /// Changes were refused and the log says so.
    full: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// `None` while the disk fails.
    database: Mutex<Option<Database>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment or insertion: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The open store. Closing it waits for what was submitted, unless the disk fails.
pub(crate) struct Store {
    shared: Arc<Shared>,
    committed: watch::Receiver<u64>,
    writable: Gauge,
    patience: Duration,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the file, creating it at first start for its owner only.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let file = path.to_owned();
        let open = move |create: bool| {
            // redb would make it readable for everybody.
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(create)
                .truncate(false)
                .mode(0o600)
                .open(&file)
                .map_err(redb::StorageError::from)?;
            // Unchecked, redb panics on a damaged file.
            let mut builder = Database::builder();
            builder.set_check_integrity_on_open(true);
            if create { builder.create(&file) } else { builder.open(&file) }
        };
        Self::over(path, Box::new(open), PATIENCE)
    }

    fn over(path: &Path, open: Opener, patience: Duration) -> Result<Self, StoreError> {
        let database = open(true).map_err(|error| StoreError::opening(path, error))?;
        let shared = Arc::new(Shared { database: Mutex::new(Some(database)), ..Shared::default() });
        let (sender, committed) = watch::channel(0);
        let writable = Gauge::default();
        writable.set(1);
        let writer =
            Writer { open, shared: Arc::clone(&shared), committed: sender, writable: writable.clone() };
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| StoreError::Open {
                path: path.to_owned(),
                reason: format!("cannot start its thread: {error}"),
            })?;
        Ok(Self { shared, committed, writable, patience, writer: Mutex::new(Some(writer)) })
    }

    /// Every record of a table.
    pub(crate) fn load<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        let failed = |reason: String| StoreError::Read { table, reason };
        let database = self.shared.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(|| failed("its disk fails".to_owned()))?;
        let read = || -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let records = match database.begin_read()?.open_table(table.definition()) {
                Ok(records) => records,
                // Nothing was ever written to it.
                Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
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

    /// Hands changes to the writer; they become durable together, and not before what was submitted earlier.
    /// Never blocks: where too much waits already, the changes are refused and the receipt fails.
    pub(crate) fn submit(&self, changes: Vec<Change>) -> Receipt {
        let mut state = self.shared.state();
        let deletions = changes.iter().all(|change| change.value.is_none());
        let room = if deletions { 2 * WAITING } else { WAITING };
        let refused = state.closed || state.waiting.len() + changes.len() > room;
        let number = if refused {
            if !state.closed && !std::mem::replace(&mut state.full, true) {
                tracing::error!(
                    waiting = state.waiting.len(),
                    "too much waits for the store's disk: changes live in memory only until it takes some"
                );
            }
            None
        } else {
            for Change { table, key, value } in changes {
                state.waiting.insert((table, key), value);
            }
            state.submitted += 1;
            self.shared.changed.notify_all();
            Some(state.submitted)
        };
        Receipt { number, committed: self.committed.clone(), patience: self.patience }
    }

    /// Makes durable what was submitted, takes nothing more, and lets go of the file, whoever else still holds the store: a
    /// connection that outlives its controller must not keep the next one from starting. Blocks.
    pub(crate) fn close(&self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            // The thread cannot panic in a way that matters here: redb recovers to the last commit.
            let _ = writer.join();
        }
        *self.shared.database.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What is wrong with the disk, if it takes no changes now.
    pub(crate) fn failing(&self) -> Option<Failing> {
        self.shared.state().failing.clone()
    }

    /// Records whose newest state is not on the disk yet.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.state().waiting.len()
    }

    /// 1 while the disk takes changes, else 0.
    pub(crate) fn writable(&self) -> Gauge {
        self.writable.clone()
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("failing", &self.failing()).finish_non_exhaustive()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

struct Writer {
    open: Opener,
    shared: Arc<Shared>,
    committed: watch::Sender<u64>,
    writable: Gauge,
}

impl Writer {
    fn run(self) {
        while let Some((batch, number)) = self.next() {
            match self.commit(&batch) {
                Ok(()) => {
                    let mut state = self.shared.state();
                    state.full = false;
                    if state.failing.take().is_some() {
                        tracing::info!(changes = batch.len(), "the store's disk takes changes again");
                    }
                    drop(state);
                    self.writable.set(1);
                    self.committed.send_replace(number);
                }
                Err(error) => {
                    let closed = self.failed(batch, &error);
                    if closed {
                        return;
                    }
                }
            }
        }
    }

    /// What waits, when something does, and the number of the last submission in it. `None`: the store is closed.
    fn next(&self) -> Option<(Batch, u64)> {
        let idle = |state: &mut State| state.waiting.is_empty() && !state.closed;
        let mut state =
            self.shared.changed.wait_while(self.shared.state(), idle).unwrap_or_else(PoisonError::into_inner);
        let batch = std::mem::take(&mut state.waiting);
        (!batch.is_empty()).then_some((batch, state.submitted))
    }

    fn commit(&self, batch: &Batch) -> Result<(), redb::Error> {
        let mut database = self.shared.database.lock().unwrap_or_else(PoisonError::into_inner);
        // Closed before it is tried again: redb takes no more changes after an I/O error, and holds the file's lock.
        let open = match database.take() {
            Some(open) => open,
            None => (self.open)(false)?,
        };
        let transaction = open.begin_write()?;
        for ((table, key), value) in batch {
            let mut table = transaction.open_table(table.definition())?;
            match value {
                Some(value) => table.insert(key.as_str(), value.as_slice())?,
                None => table.remove(key.as_str())?,
            };
        }
        transaction.commit()?;
        *database = Some(open);
        Ok(())
    }

    /// Puts the batch back, under what was submitted since, and waits for the next attempt. `true`: the store is closed.
    fn failed(&self, batch: Batch, error: &redb::Error) -> bool {
        self.writable.set(0);
        let mut state = self.shared.state();
        for (key, value) in batch {
            state.waiting.entry(key).or_insert(value);
        }
        if state.closed {
            tracing::error!(%error, lost = state.waiting.len(), "the store is closed without its last changes");
            return true;
        }
        let since = state.failing.as_ref().map(|failing| failing.since);
        if since.is_none() {
            tracing::error!(%error, changes = state.waiting.len(),
                "cannot write to the store: changes live in memory and are tried again until its disk takes them");
        }
        let since = since.unwrap_or_else(SystemTime::now);
        state.failing = Some(Failing { since, reason: error.to_string() });
        let open = |state: &mut State| !state.closed;
        drop(self.shared.changed.wait_timeout_while(state, RETRY, open));
        false
    }
}

#[cfg(test)]
pub(crate) mod tests;
