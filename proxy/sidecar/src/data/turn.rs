//! What happens once at the end of each turn of the run queue: exchanges that waited go on, and every connection that
//! was written to sends all of it at once.
//!
//! This is where the proxy's speed comes from: requests of many clients that were read in one turn leave in one batch
//! of TLS records and one write, and so do the answers. The task that does it is woken by the first connection that has
//! something to send, and so runs after all connections that were ready at the same time.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    rc::Rc,
    task::{Poll, Waker},
};

use super::{Worker, exchanges::Key, wire::Wire};

#[derive(Default)]
pub(crate) struct Turn {
    ready: RefCell<VecDeque<Key>>,
    dirty: RefCell<Vec<Rc<Wire>>>,
    waker: RefCell<Option<Waker>>,
    scheduled: Cell<bool>,
}

impl Turn {
    /// Has an exchange go on.
    pub(crate) fn ready(&self, key: Key) {
        self.ready.borrow_mut().push_back(key);
        self.schedule();
    }

    /// Has a connection send what it collected.
    pub(crate) fn flush(&self, wire: &Rc<Wire>) {
        if !wire.dirty.replace(true) {
            self.dirty.borrow_mut().push(wire.clone());
            self.schedule();
        }
    }

    /// Has those go on that waited for room.
    pub(crate) fn resume_waiting(&self, wire: &Wire) {
        if let Some(waiting) = wire.take_waiting() {
            for key in waiting {
                self.ready(key);
            }
        }
    }

    fn schedule(&self) {
        if !self.scheduled.replace(true)
            && let Some(waker) = &*self.waker.borrow()
        {
            waker.wake_by_ref();
        }
    }
}

impl Worker {
    /// Ends turns, for ever.
    pub(super) async fn turns(self: Rc<Self>) {
        let mut dirty = Vec::new();
        poll_fn(|cx| {
            let turn = &self.turn;
            *turn.waker.borrow_mut() = Some(cx.waker().clone());
            // What is written now is flushed below: nobody needs to wake us for it.
            turn.scheduled.set(true);
            // Those that become ready meanwhile have their turn in the next one.
            let count = turn.ready.borrow().len();
            for _ in 0..count {
                let Some(key) = turn.ready.borrow_mut().pop_front() else { break };
                self.with(key, |exchange, worker| exchange.go_on(worker, key));
            }
            std::mem::swap(&mut dirty, &mut *turn.dirty.borrow_mut());
            for wire in dirty.drain(..) {
                wire.dirty.set(false);
                wire.flush();
                turn.resume_waiting(&wire);
            }
            turn.scheduled.set(false);
            if !turn.ready.borrow().is_empty() || !turn.dirty.borrow().is_empty() {
                turn.schedule();
            }
            Poll::<()>::Pending
        })
        .await;
    }
}
