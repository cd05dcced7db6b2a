//! Who must be told of which change: an index from what resources depend on to the streams that hold such resources.
//!
//! A change costs one look-up for each key that it touches, however many streams there are. Each stream has a
//! mailbox, which is a set and not a queue: a change while the stream is busy is remembered once, and a stream that
//! never reads costs no more than its own subscriptions.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::catalog::Key;

/// The index. One per controller.
#[derive(Debug, Default)]
pub(crate) struct Fanout {
    next_id: AtomicU64,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    mailboxes: HashMap<u64, Arc<Mailbox>>,
    watchers: HashMap<Key, HashSet<u64>>,
}

/// What changed for one stream since it looked last.
#[derive(Debug, Default)]
struct Mailbox {
    dirty: Mutex<Dirty>,
    notify: Notify,
}

/// The content of a mailbox.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Dirty {
    /// Look at everything again.
    pub(crate) all: bool,
    /// Look at what depends on these again.
    pub(crate) keys: HashSet<Key>,
}

/// A stream's place in the index; it leaves when dropped.
#[derive(Debug)]
pub(crate) struct Watcher<'a> {
    fanout: &'a Fanout,
    id: u64,
    mailbox: Arc<Mailbox>,
    keys: HashSet<Key>,
}

impl Fanout {
    /// Tells every stream that watches one of `keys`.
    pub(crate) fn touch(&self, keys: &HashSet<Key>) {
        if keys.is_empty() {
            return;
        }
        let mut touched: HashMap<u64, (Arc<Mailbox>, Vec<Key>)> = HashMap::new();
        {
            let index = self.index();
            for key in keys {
                for id in index.watchers.get(key).into_iter().flatten() {
                    let Some(mailbox) = index.mailboxes.get(id) else { continue };
                    touched
                        .entry(*id)
                        .or_insert_with(|| (Arc::clone(mailbox), Vec::new()))
                        .1
                        .push(key.clone());
                }
            }
        }
        for (mailbox, keys) in touched.into_values() {
            lock(&mailbox.dirty).keys.extend(keys);
            mailbox.notify.notify_one();
        }
    }

    /// Tells every stream to look at everything again.
    pub(crate) fn touch_all(&self) {
        let mailboxes: Vec<_> = self.index().mailboxes.values().cloned().collect();
        for mailbox in mailboxes {
            lock(&mailbox.dirty).all = true;
            mailbox.notify.notify_one();
        }
    }

    /// Joins the index, watching nothing yet.
    pub(crate) fn watcher(&self) -> Watcher<'_> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mailbox = Arc::new(Mailbox::default());
        self.index().mailboxes.insert(id, Arc::clone(&mailbox));
        Watcher { fanout: self, id, mailbox, keys: HashSet::new() }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }
}

impl Watcher<'_> {
    /// From now on changes of `added` are told, those of `removed` are not. Look at the resources after this, so that
    /// no change falls between.
    pub(crate) fn watch(&mut self, added: &[Key], removed: &[Key]) {
        let mut index = self.fanout.index();
        for key in removed {
            index.unwatch(key, self.id);
            self.keys.remove(key);
        }
        for key in added {
            self.keys.insert(key.clone());
            index.watchers.entry(key.clone()).or_default().insert(self.id);
        }
    }

    /// Waits for a change. Safe to cancel.
    pub(crate) async fn changed(&self) {
        self.mailbox.notify.notified().await;
    }

    /// Empties the mailbox.
    pub(crate) fn take(&self) -> Dirty {
        std::mem::take(&mut *lock(&self.mailbox.dirty))
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        let mut index = self.fanout.index();
        index.mailboxes.remove(&self.id);
        for key in &self.keys {
            index.unwatch(key, self.id);
        }
    }
}

impl Index {
    fn unwatch(&mut self, key: &Key, id: u64) {
        if let Some(watchers) = self.watchers.get_mut(key) {
            watchers.remove(&id);
            if watchers.is_empty() {
                self.watchers.remove(key);
            }
        }
    }
}

// Sets and maps of which every change is one insertion or removal: a panic elsewhere leaves them whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_coalesce_and_nothing_stays_behind() {
        let name = |n: &str| Key::Name(n.into());
        let fanout = Fanout::default();
        let mut first = fanout.watcher();
        let mut second = fanout.watcher();
        first.watch(&[name("a"), name("b")], &[]);
        second.watch(&[name("b")], &[]);
        for _ in 0..1000 {
            fanout.touch(&[name("a"), name("b"), name("c")].into());
        }
        assert_eq!(first.take(), Dirty { all: false, keys: [name("a"), name("b")].into() });
        assert_eq!(second.take(), Dirty { all: false, keys: [name("b")].into() });
        second.watch(&[], &[name("b")]);
        fanout.touch(&[name("b")].into());
        assert_eq!(second.take(), Dirty::default());
        fanout.touch_all();
        assert!(second.take().all);
        drop((first, second));
        assert!(fanout.index().watchers.is_empty() && fanout.index().mailboxes.is_empty());
    }
}
