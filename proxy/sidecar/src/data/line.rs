//! Requests that wait for a connection to their service, where a policy bounds how many there are.
//!
//! Two things let a request go on: a place comes back, which `outrigger_core::bulkhead` gives to whoever has waited for longest on any
//! thread, and then a connection is made; or a connection of this thread to the same endpoint has done with another request, which
//! saves making one. What is idle and of no use to anybody here is closed, for its place is wanted.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::{Wake, Waker},
};

use outrigger_core::{
    bulkhead::{Bulkhead, Ticket},
    live::Live,
};
use tokio::sync::Notify;

use super::{Worker, exchanges::Key};

/// Requests to one endpoint that this thread's connections serve in a row while others wait for their places. To make a connection
/// costs more than most requests: others wait for a few of them, not for all.
const IN_A_ROW: u32 = 16;

/// Those who wait on one thread for a connection to one service.
pub(super) struct Line {
    live: Arc<Live>,
    /// By the order in which they came.
    waiting: RefCell<BTreeMap<u64, Waiter>>,
    came: Cell<u64>,
    bell: Arc<Bell>,
    is_served: Cell<bool>,
    in_a_row: Cell<u32>,
}

struct Waiter {
    key: Key,
    address: SocketAddr,
    /// It can go out on a connection that has served others.
    takes_used: bool,
    ticket: Ticket,
    /// A connection of this thread was left open for it.
    is_offered: bool,
}

/// Rings where the line is served, from whichever thread.
#[derive(Default)]
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

impl Line {
    pub(super) fn new(live: Arc<Live>) -> Rc<Self> {
        Rc::new(Self {
            live,
            waiting: RefCell::default(),
            came: Cell::new(0),
            bell: Arc::default(),
            is_served: Cell::new(false),
            in_a_row: Cell::new(0),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.borrow().is_empty()
    }

    /// Has an exchange wait, for as long as the guard lives, until it is [called](super::exchange::Exchange::called).
    pub(super) fn enter(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        bulkhead: Option<&Bulkhead>,
        (key, address, takes_used): (Key, SocketAddr, bool),
    ) -> InLine {
        let ticket = self.live.permits().line_up(bulkhead, Waker::from(self.bell.clone()));
        let at = self.came.get();
        self.came.set(at + 1);
        let waiter = Waiter { key, address, takes_used, ticket, is_offered: false };
        self.waiting.borrow_mut().insert(at, waiter);
        if !self.is_served.replace(true) {
            worker.spawn(self.clone().serve(worker.clone()));
        }
        InLine { line: self.clone(), at }
    }

    /// Calls those who may go on, until nobody waits.
    async fn serve(self: Rc<Self>, worker: Rc<Worker>) {
        while !self.is_empty() {
            self.bell.0.notified().await;
            // Collected first: who goes on leaves the line.
            let mut called = Vec::new();
            for waiter in self.waiting.borrow_mut().values_mut() {
                let place = waiter.ticket.place();
                if std::mem::take(&mut waiter.is_offered) || place.is_some() {
                    called.push((waiter.key, place));
                }
            }
            for (key, place) in called {
                worker.with(key, |exchange, worker| exchange.called(worker, key, place));
            }
        }
        self.is_served.set(false);
    }

    /// Whether a connection to `address` that has nothing more to do stays open: where others wait for its place, only for one of
    /// them.
    pub(super) fn keeps(&self, address: SocketAddr) -> bool {
        let all = self.live.permits().waiting();
        if all == 0 {
            return true;
        }
        let mut waiting = self.waiting.borrow_mut();
        let others = all > waiting.len() || waiting.values().any(|waiter| waiter.address != address);
        let fits =
            |waiter: &&mut Waiter| waiter.address == address && waiter.takes_used && !waiter.is_offered;
        let in_a_row = if others { self.in_a_row.get() + 1 } else { 0 };
        let Some(waiter) = waiting.values_mut().find(fits).filter(|_| in_a_row <= IN_A_ROW) else {
            self.in_a_row.set(0);
            return false;
        };
        self.in_a_row.set(in_a_row);
        waiter.is_offered = true;
        self.bell.0.notify_one();
        true
    }

    /// Whether an idle connection holds a place that others wait for.
    pub(super) fn is_wanted(&self) -> bool {
        self.live.permits().waiting() > 0
    }
}

/// A place in the line.
pub(super) struct InLine {
    line: Rc<Line>,
    at: u64,
}

impl Drop for InLine {
    fn drop(&mut self) {
        let waiter = self.line.waiting.borrow_mut().remove(&self.at);
        // Outside of the borrow: its ticket may call somebody else.
        drop(waiter);
        if self.line.is_empty() {
            // Who serves the line has nothing more to do.
            self.line.bell.0.notify_one();
        }
    }
}
