//! A body on its way from one side of an exchange to the other.
//!
//! What the other side has room for goes on at once, from the buffer that it was read into. The rest waits here, and its sender
//! is not told that it has gone: in HTTP/2 its window stays closed, HTTP/1.x is not read. So a slow reader costs as much memory
//! as one window, and holds up nobody but its own sender.
//!
//! A request's first bytes are kept until there is an answer, so that a request which its peer has provably not looked at can go to
//! another with its body.

use outrigger_http::{fields::Fields, h1::Framing};

use super::super::{Worker, buffers, exchanges::Key, leg::Leg};

/// Bytes of a request's body that are remembered where no policy says how many: enough for most calls, and little enough that their copies stay in the
/// cache.
const MAX_KEPT: usize = 32 * 1024;

/// Bytes that wait before a sender of HTTP/1.x is not read any more: what one read brings.
const PAUSE_AT: usize = 64 * 1024;

/// A piece of a body that is joined with others of its turn: a copy of so little costs less than a frame.
const SMALL_PIECE: usize = 2 * 1024;

#[derive(Default)]
pub(super) struct Pipe {
    /// What was not sent, and in front of it what is kept.
    buffer: Vec<u8>,
    /// How much of it was sent.
    sent: usize,
    keep: bool,
    /// Bytes that are kept at most.
    most: usize,
    /// Bytes that came and whose sender has not been told that they have gone.
    owed: usize,
    /// The last of it has come.
    pub(super) ended: bool,
    /// And was sent.
    pub(super) end_sent: bool,
    trailers: Option<Box<Fields>>,
    /// Bytes that were sent.
    pub(super) total: u64,
}

impl Pipe {
    /// Keeps what is sent from now on, unless it is known to be too much.
    pub(super) fn keep(&mut self, framing: Framing, most: Option<usize>) {
        self.most = most.unwrap_or(MAX_KEPT);
        self.keep = !matches!(framing, Framing::Length(length) if length > self.most as u64);
    }

    /// As another one that is kept, for another peer.
    pub(super) fn copy(&mut self, of: &Self) {
        debug_assert!(of.is_repeatable(), "what was sent is still there");
        self.buffer = buffers::take(of.buffer.len());
        self.buffer.extend_from_slice(&of.buffer);
        self.keep = true;
        self.most = of.most;
        self.ended = of.ended;
        self.trailers.clone_from(&of.trailers);
    }

    /// Whether everything that was sent can be sent again.
    pub(super) fn is_repeatable(&self) -> bool {
        self.keep || self.total == 0
    }

    /// Ends [`keep`](Self::keep).
    pub(super) fn forget(&mut self) {
        self.keep = false;
        if self.is_empty() {
            return self.let_go();
        }
        self.buffer.drain(..self.sent);
        self.sent = 0;
    }

    /// Begins again with the first byte, for another peer.
    pub(super) fn again(&mut self) {
        self.sent = 0;
        self.end_sent = false;
        self.total = 0;
    }

    /// Nothing waits to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.sent == self.buffer.len()
    }

    /// Whether a sender of HTTP/1.x may go on.
    pub(super) fn takes_more(&self) -> bool {
        self.buffer.len() - self.sent < PAUSE_AT
    }

    /// Takes what came; `end`: the last of it, with trailers. Sends what there is room for, if there is a `sink`.
    pub(super) fn take(
        &mut self,
        worker: &Worker,
        key: Key,
        (data, end): (&[u8], Option<&Fields>),
        source: Option<&Leg>,
        sink: Option<&Leg>,
    ) {
        if let Some(trailers) = end {
            self.ended = true;
            self.trailers = (!trailers.is_empty()).then(|| Box::new(trailers.clone()));
        }
        if self.keep && self.buffer.len() + data.len() > self.most {
            self.forget();
        }
        let mut rest = data;
        if self.keep {
            // It is ours now, and bounded.
            release(worker, source, data.len());
        } else {
            self.owed += data.len();
            // Small pieces go on as one when the turn ends, which is when they would be flushed: each frame costs whoever reads it,
            // and may count as an attack.
            let waits = end.is_none() && data.len() < SMALL_PIECE;
            if waits && self.takes_more() && sink.is_some() {
                // Where others wait already, somebody has seen to it that they go on.
                if self.is_empty() {
                    worker.turn.ready(key);
                }
                return self.hold(data);
            }
            if let (true, Some(sink)) = (self.is_empty(), sink) {
                let sent = self.send(worker, key, rest, source, sink);
                rest = &rest[sent..];
            }
        }
        self.hold(rest);
        if let Some(sink) = sink {
            self.pump(worker, key, source, sink);
        }
    }

    fn hold(&mut self, data: &[u8]) {
        if self.buffer.capacity() == 0 && !data.is_empty() {
            self.buffer = buffers::take(data.len());
        }
        self.buffer.extend_from_slice(data);
    }

    fn let_go(&mut self) {
        buffers::give(std::mem::take(&mut self.buffer));
        self.sent = 0;
    }

    /// Sends what there is room for.
    pub(super) fn pump(&mut self, worker: &Worker, key: Key, source: Option<&Leg>, sink: &Leg) {
        if !self.is_empty() {
            let buffer = std::mem::take(&mut self.buffer);
            let sent = self.send(worker, key, &buffer[self.sent..], source, sink);
            self.buffer = buffer;
            self.sent += sent;
            if !self.keep && self.is_empty() {
                self.let_go();
            } else if !self.keep && self.sent >= PAUSE_AT {
                self.buffer.drain(..self.sent);
                self.sent = 0;
            }
        }
        if let Some(source) = source.filter(|_| self.takes_more()) {
            source.resume();
        }
        if self.ended && !self.end_sent && self.is_empty() {
            self.end_sent = true;
            match &self.trailers {
                Some(trailers) => sink.send_trailers(worker, trailers),
                None => {
                    sink.send(worker, &[], true);
                }
            }
        }
    }

    /// Returns how much of `data` was sent.
    fn send(&mut self, worker: &Worker, key: Key, data: &[u8], source: Option<&Leg>, sink: &Leg) -> usize {
        let mut sent = 0;
        while sent < data.len() {
            let room = sink.room(key).min(data.len() - sent);
            if room == 0 {
                break;
            }
            let last = self.ended && self.trailers.is_none() && sent + room == data.len();
            let taken = sink.send(worker, &data[sent..sent + room], last);
            sent += taken;
            self.end_sent |= last && taken == room;
            if taken < room {
                break;
            }
        }
        self.total += sent as u64;
        let gone = sent.min(self.owed);
        self.owed -= gone;
        release(worker, source, gone);
        sent
    }

    /// Lets the sender go: what waits here is ours now.
    pub(super) fn settle_debts(&mut self, worker: &Worker, source: &Leg) {
        release(worker, Some(source), std::mem::take(&mut self.owed));
    }

    /// Nothing of it is wanted any more.
    pub(super) fn drop_rest(&mut self, worker: &Worker, source: Option<&Leg>) {
        release(worker, source, std::mem::take(&mut self.owed));
        self.let_go();
        self.keep = false;
    }

    /// As new.
    pub(super) fn reset(&mut self) {
        self.let_go();
        *self = Self::default();
    }
}

fn release(worker: &Worker, source: Option<&Leg>, bytes: usize) {
    if let Some(source) = source {
        source.release(worker, bytes);
    }
}
