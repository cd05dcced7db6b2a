//! When exchanges want to be woken: for a pause between two tries, a time-out of one try, a delay that a policy injects.
//!
//! A request has no timer of its own. Each exchange knows the one moment at which it has something to do next, the thread
//! knows the earliest of these, and one task sleeps until then and looks through what is under way. That costs nothing
//! for a request that is answered before its moment comes, which is nearly all of them, and a look costs nanoseconds for each that
//! is under way.

use std::{cell::Cell, rc::Rc, time::Instant};

use tokio::{
    sync::Notify,
    time::{Duration, sleep_until},
};

use super::Worker;

/// Between two looks, at least: what a pause or a time-out may come late by.
const GRAIN: Duration = Duration::from_millis(1);

#[derive(Default)]
pub(crate) struct Alarm {
    next: Cell<Option<Instant>>,
    earlier: Notify,
}

impl Alarm {
    /// Has the exchanges looked at no later than at `at`.
    pub(crate) fn set(&self, at: Instant) {
        if self.next.get().is_none_or(|next| at < next) {
            self.next.set(Some(at));
            self.earlier.notify_one();
        }
    }
}

impl Worker {
    /// Wakes exchanges when their moment has come, for ever.
    pub(super) async fn alarms(self: Rc<Self>) {
        let mut looked = Instant::now();
        loop {
            let Some(next) = self.alarm.next.get() else {
                self.alarm.earlier.notified().await;
                continue;
            };
            let at = next.max(looked + GRAIN);
            tokio::select! {
                () = sleep_until(at.into()) => {}
                () = self.alarm.earlier.notified() => continue,
            }
            looked = Instant::now();
            self.alarm.next.set(None);
            for key in self.exchanges.due(looked, |later| self.alarm.set(later)) {
                self.with(key, |exchange, worker| exchange.woken(worker, key, looked));
            }
        }
    }
}
