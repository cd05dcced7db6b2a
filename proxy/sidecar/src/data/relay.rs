//! Bytes from one side to the other, both ways, until both have ended.
//!
//! Each direction ends for itself (half-close): an end of file is passed on as a shutdown of the other side's sending
//! half, and the opposite direction goes on. An error is not an end: it is passed on as a reset, because a peer that
//! reads an orderly end believes that it has everything.
//!
//! Reads go into one scratch buffer per thread; a connection owns memory only while its reader is slower than its
//! writer, and then at most one scratch buffer's worth in each direction. That is also the back-pressure: nothing more is read
//! before it has gone.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Instant,
};

use super::{Worker, inbound::Entry, serve::Connection, wire::Wire};
use crate::{
    drain::Side,
    metrics::{Direction, Edge, OpenGuard},
};

/// Reads in one direction before others get their turn.
const READS_PER_TURN: usize = 8;

/// Two connections that are joined.
pub(crate) struct Relay {
    /// Of whoever dialled.
    pub(crate) client: Wire,
    /// Of whoever was dialled.
    pub(crate) server: Wire,
    /// Which way it goes, seen from the workload.
    pub(crate) direction: Direction,
    /// What is counted.
    pub(crate) edge: Option<Rc<Edge>>,
    /// Inbound: who was let in.
    entry: Option<Entry>,
    /// What counts the two connections.
    _open: Vec<OpenGuard>,
    state: State,
}

#[derive(Default)]
struct State {
    /// When a byte went last.
    moved: Cell<Option<Instant>>,
    expired: Cell<bool>,
    /// The policy by which it was judged last, and whether it may go on.
    judged: Cell<u64>,
    refused: Cell<bool>,
    forth: Half,
    back: Half,
}

/// One direction.
#[derive(Default)]
struct Half {
    ended: Cell<bool>,
    done: Cell<bool>,
    total: Cell<u64>,
}

/// How a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// Both directions ended in order.
    Closed,
    /// One side failed, or a policy refuses it now.
    Broken,
    /// No byte went either way for the idle time-out.
    Idle,
}

impl Relay {
    pub(crate) fn new(
        client: Wire,
        server: Wire,
        direction: Direction,
        edge: Option<Rc<Edge>>,
        open: Vec<OpenGuard>,
    ) -> Rc<Self> {
        Rc::new(Self { client, server, direction, edge, entry: None, _open: open, state: State::default() })
    }

    /// From a caller to the own workload.
    pub(crate) fn inbound(client: Wire, server: Wire, entry: Entry) -> Rc<Self> {
        let edge = Some(entry.edge().clone());
        let (direction, state) = (Direction::Inbound, State::default());
        Rc::new(Self { client, server, direction, edge, entry: Some(entry), _open: Vec::new(), state })
    }

    /// Relays to the end. `greeting` was read from the server.
    pub(crate) async fn run(self: Rc<Self>, worker: Rc<Worker>, greeting: Vec<u8>) {
        let _busy = worker.busy(match self.direction {
            Direction::Inbound => Side::Inbound,
            Direction::Outbound => Side::Outbound,
        });
        let _listed = worker.list(Connection::Relay(self.clone()));
        self.state.moved.set(Some(Instant::now()));
        self.client.write(&greeting);
        self.state.back.total.set(greeting.len() as u64);
        drop(greeting);
        let ended = poll_fn(|cx| self.poll(cx)).await;
        if let Some(edge) = &self.edge {
            let (forth, back) = (self.state.forth.total.get(), self.state.back.total.get());
            let inbound = self.direction == Direction::Inbound;
            edge.sent.inc_by(if inbound { back } else { forth });
            edge.received.inc_by(if inbound { forth } else { back });
        }
        match ended {
            Ended::Closed | Ended::Idle => {}
            Ended::Broken => {
                self.client.reset_on_close();
                self.server.reset_on_close();
            }
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.client.set_waker(cx);
        self.server.set_waker(cx);
        let before = self.total();
        let one = poll_half(cx, &self.client, &self.server, &self.state.forth);
        let two = poll_half(cx, &self.server, &self.client, &self.state.back);
        match (one, two) {
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => return Poll::Ready(Ended::Broken),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ended::Closed),
            _ => {}
        }
        if self.state.refused.get() {
            return Poll::Ready(Ended::Broken);
        }
        if self.total() != before {
            self.state.moved.set(Some(Instant::now()));
        } else if self.state.expired.get() {
            return Poll::Ready(Ended::Idle);
        }
        Poll::Pending
    }

    fn total(&self) -> u64 {
        self.state.forth.total.get() + self.state.back.total.get()
    }

    /// Ends it if nothing has passed for too long, or if a new policy refuses it. Called now and then.
    pub(super) fn sweep(&self, worker: &Worker, now: Instant) {
        if let Some(entry) = &self.entry
            && self.state.judged.get() != worker.ctx.inbound.load().epoch
        {
            match entry.still_admits(worker, None) {
                Ok(epoch) => self.state.judged.set(epoch),
                Err(refusal) => {
                    worker.ctx.metrics.refused(Direction::Inbound, refusal.reason.code());
                    self.state.refused.set(true);
                    self.client.wake();
                }
            }
        }
        if let (Some(limit), Some(moved)) =
            (worker.ctx.config.timeouts.idle.enabled(), self.state.moved.get())
            && now.saturating_duration_since(moved) >= limit
        {
            self.state.expired.set(true);
            self.client.wake();
        }
    }
}

fn poll_half(cx: &mut Context<'_>, from: &Wire, to: &Wire, half: &Half) -> Poll<io::Result<()>> {
    if half.done.get() {
        return Poll::Ready(Ok(()));
    }
    for _ in 0..READS_PER_TURN {
        ready!(to.poll_sent(cx))?;
        if half.ended.get() {
            to.finish();
            ready!(to.poll_sent(cx))?;
            half.done.set(true);
            return Poll::Ready(Ok(()));
        }
        let read = ready!(from.poll_read(cx, |bytes| {
            to.write(bytes);
            bytes.len()
        }))?;
        half.total.set(half.total.get() + read as u64);
        half.ended.set(read == 0);
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}
