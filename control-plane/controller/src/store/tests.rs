use std::io;
use std::ops::Bound;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

use super::*;

#[tokio::test]
async fn what_was_acknowledged_survives_reopening_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    {
        let store = Store::open(&path).unwrap();
        store.submit(vec![Change::put(Table::Tokens, "a", &1), Change::put(Table::Tokens, "b", &2)]).forget();
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

#[tokio::test]
async fn closing_lets_go_of_the_file_whoever_holds_the_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = Store::open(&path).unwrap();
    store.submit(vec![Change::put(Table::Tokens, "a", &1)]).forget();
    store.close();
    let next = Store::open(&path).unwrap();
    assert_eq!(next.load::<i32>(Table::Tokens).unwrap(), [("a".to_owned(), 1)]);
    // What comes too late is told so, at once.
    let late = store.submit(vec![Change::put(Table::Tokens, "b", &2)]);
    assert!(matches!(late.durable().await, Err(StoreError::Refused)));
    assert!(store.load::<i32>(Table::Tokens).is_err());
}

/// A disk that can be broken: then nothing is written to its file any more, nor synced.
#[derive(Clone)]
pub(crate) struct Disk {
    path: PathBuf,
    broken: Arc<AtomicBool>,
    patience: Duration,
}

impl Disk {
    pub(crate) fn new(directory: &Path, patience: Duration) -> Self {
        Self { path: directory.join("store.redb"), broken: Arc::default(), patience }
    }

    pub(crate) fn breaks(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) -> Arc<Store> {
        let disk = self.clone();
        let open = move |create: bool| {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(create)
                .truncate(false)
                .open(&disk.path);
            let file = FileBackend::new(file.map_err(redb::StorageError::from)?)?;
            Database::builder().create_with_backend(Backend { file, broken: Arc::clone(&disk.broken) })
        };
        Arc::new(Store::over(&self.path, Box::new(open), self.patience).unwrap())
    }
}

#[derive(Debug)]
struct Backend {
    file: FileBackend,
    broken: Arc<AtomicBool>,
}

impl Backend {
    fn works(&self) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.works()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.works()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.works()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    // The file's own lock, so that a store that reopened it without closing it first would fail.
    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }
}

/// Waits until the store says so.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn a_disk_that_failed_gets_everything_in_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::new(directory.path(), Duration::from_millis(50));
    let store = disk.open();
    store
        .submit(vec![Change::put(Table::Tokens, "old", &1), Change::put(Table::Tokens, "kept", &1)])
        .forget();
    until("the first changes", || store.waiting() == 0);

    disk.breaks(true);
    let waited = store.submit(vec![Change::put(Table::Tokens, "new", &1)]).durable().await;
    assert!(matches!(waited, Err(StoreError::NotYet)), "{waited:?}");
    until("the failure to show", || store.failing().is_some() && store.waiting() == 1);
    assert_eq!(store.writable().get(), 0);
    store.submit(vec![Change::delete(Table::Tokens, "old")]).forget();
    store.submit(vec![Change::put(Table::Tokens, "new", &2), Change::put(Table::Claims, "c", &1)]).forget();
    // Attempts that fail go on beside; none of them may put older values over newer ones.
    until("both submissions to wait", || store.waiting() == 3);

    disk.breaks(false);
    until("the recovery", || store.failing().is_none() && store.waiting() == 0);
    assert_eq!(store.writable().get(), 1);
    drop(store);
    let store = disk.open();
    let tokens = store.load::<i32>(Table::Tokens).unwrap();
    assert_eq!(tokens, [("kept".to_owned(), 1), ("new".to_owned(), 2)]);
    assert_eq!(store.load::<i32>(Table::Claims).unwrap().len(), 1);
}

#[tokio::test]
async fn who_waits_for_a_disk_that_recovers_in_time_hears_of_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::new(directory.path(), 4 * PATIENCE);
    let store = disk.open();
    disk.breaks(true);
    let receipt = store.submit(vec![Change::put(Table::Tokens, "a", &1)]);
    until("the failure to show", || store.failing().is_some());
    disk.breaks(false);
    receipt.durable().await.unwrap();
}

#[tokio::test]
async fn a_store_on_a_broken_disk_closes_and_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::new(directory.path(), 4 * PATIENCE);
    let store = disk.open();
    disk.breaks(true);
    let receipt = store.submit(vec![Change::put(Table::Tokens, "a", &1)]);
    until("the failure to show", || store.failing().is_some());
    drop(store);
    assert!(matches!(receipt.durable().await, Err(StoreError::Refused)));
}

#[test]
fn what_waits_is_bounded_by_records_and_a_deletion_finds_room() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store.redb")).unwrap();
    let many = (0..=WAITING).map(|n| Change::put(Table::Claims, n.to_string(), &0)).collect();
    assert!(store.submit(many).number.is_none());
    let many = (0..=WAITING).map(|n| Change::delete(Table::Claims, n.to_string())).collect();
    assert!(store.submit(many).number.is_some());
}

#[test]
fn each_reason_not_to_open_has_its_own_advice() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = Store::open(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let said = |path: &Path| Store::open(path).unwrap_err().to_string();
    assert!(said(&path).contains("another controller"), "{}", said(&path));
    drop(store);

    let whole = std::fs::read(&path).unwrap();
    let mut header_lost = whole.clone();
    header_lost[..64].fill(0xa5);
    let half = whole[..whole.len() / 2].to_vec();
    for damaged in [b"not a store at all".to_vec(), header_lost, half] {
        std::fs::write(&path, damaged).unwrap();
        let said = said(&path);
        assert!(said.contains("damaged") && said.contains("backup"), "{said}");
        assert!(!said.contains("another controller"), "{said}");
    }
    let said = said(&directory.path().join("nowhere/store.redb"));
    assert!(said.contains("cannot open") && !said.contains("damaged"), "{said}");
}
