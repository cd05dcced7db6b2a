//! An HTTP/1.x connection, on either side of the proxy, and the task that reads it.
//!
//! A connection serves one exchange at a time. What its task reads it tells the exchange at once; what the exchange answers is
//! collected in the wire and leaves at the end of the turn. So a request costs the task of its client one wake-up, for
//! the request, and none for the response.
//!
//! An idle connection is this object, its task and its socket; bytes it owns only of a message that is incomplete.

mod send;

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use outrigger_http::{
    fields::Fields,
    h1::{Asked, Decoder, Error, Framing, Limits, Piece},
};

use super::{Worker, carry::Carry, exchanges::Key, leg::Leg, line::Line, serve::Server, wire::Wire};
use crate::metrics::OpenGuard;

/// Header lines of one message: cookies and gRPC metadata come near a hundred.
pub(crate) const MAX_FIELDS: usize = 512;

/// Bytes of requests that a client may send ahead while one is under way. What does not fit waits in its socket.
const MAX_AHEAD: usize = 16 * 1024;

/// Reads of one connection before others get their turn.
const READS_PER_TURN: usize = 4;

/// How long a client may go on sending after the last answer, which it may not have read yet: to close on unread
/// bytes is a reset, and takes the answer away (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(2);

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Waits for a head; on the side of the application only while it answers.
    Head,
    /// In a body, or in what follows a switch.
    Body,
    /// Nothing of this exchange is to come: a client's request was read whole; an application's connection is idle.
    Whole,
    /// What comes is thrown away.
    Over,
}

/// Which side of the proxy it is on.
pub(crate) enum Side {
    /// The peer sends requests.
    Client(Server),
    /// The peer answers: an application, or an endpoint without a sidecar.
    /// `line`: of those who wait for its place, where a policy bounds its service's connections.
    Application { address: SocketAddr, line: Option<Rc<Line>>, _open: OpenGuard },
}

pub(crate) struct H1 {
    pub(super) wire: Rc<Wire>,
    side: Side,
    decoder: RefCell<Decoder>,
    /// Read and not understood yet.
    carry: Carry,
    key: Cell<Option<Key>>,
    reading: Cell<Reading>,
    /// The exchange takes no more bytes at the moment.
    paused: Cell<bool>,
    /// How the message that is being sent is framed; `None`: none is.
    sending: Cell<Option<Framing>>,
    /// What the response is to; on the application's side.
    asked: Cell<Asked>,
    /// Whether the connection serves more exchanges after this one.
    keep: Cell<bool>,
    /// The client has ended its half.
    read_ended: Cell<bool>,
    /// The connection is to be dropped now.
    dropped: Cell<bool>,
    /// Since when it waits: for a head, for the rest of one, or for the peer's end.
    since: Cell<Instant>,
    /// A head has begun.
    begun: Cell<bool>,
    /// Whole messages that were exchanged.
    served: Cell<u32>,
}

impl H1 {
    pub(super) fn new(worker: &Worker, wire: Wire, side: Side) -> Rc<Self> {
        let limits =
            Limits { head_bytes: worker.ctx.config.limits.header_bytes as usize, fields: MAX_FIELDS };
        let reading = match side {
            Side::Client(_) => Reading::Head,
            Side::Application { .. } => Reading::Whole,
        };
        Rc::new(Self {
            wire: Rc::new(wire),
            side,
            decoder: RefCell::new(Decoder::new(limits)),
            carry: Carry::default(),
            key: Cell::new(None),
            reading: Cell::new(reading),
            paused: Cell::new(false),
            sending: Cell::new(None),
            asked: Cell::default(),
            keep: Cell::new(true),
            read_ended: Cell::new(false),
            dropped: Cell::new(false),
            since: Cell::new(Instant::now()),
            begun: Cell::new(false),
            served: Cell::new(0),
        })
    }

    /// Reads until the connection ends.
    pub(super) async fn run(self: Rc<Self>, worker: Rc<Worker>) {
        std::future::poll_fn(|cx| self.poll(cx, &worker)).await;
        self.lost(&worker, None);
    }

    fn poll(self: &Rc<Self>, cx: &mut Context<'_>, worker: &Rc<Worker>) -> Poll<()> {
        self.wire.set_waker(cx);
        for _ in 0..READS_PER_TURN {
            if self.wire.poll_sent(cx).is_ready() {
                worker.turn.resume_waiting(&self.wire);
            }
            self.read_ahead(worker);
            if self.dropped.get() || (self.wire.is_finished() && self.read_ended.get()) {
                return Poll::Ready(());
            }
            if !self.wants_bytes() {
                return Poll::Pending;
            }
            let read = ready!(self.wire.poll_read(cx, |bytes| {
                self.take(worker, bytes);
                bytes.len()
            }));
            match read {
                Ok(0) => self.ended(worker),
                Ok(_) => {}
                Err(error) => {
                    self.broke(worker, &error);
                    return Poll::Ready(());
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn wants_bytes(&self) -> bool {
        if self.read_ended.get() || self.wire.is_choked() {
            return false;
        }
        match self.reading.get() {
            Reading::Over => true,
            Reading::Head | Reading::Body => !self.paused.get(),
            Reading::Whole => self.carry.len() < MAX_AHEAD,
        }
    }

    /// Goes on with bytes that were read before.
    fn read_ahead(self: &Rc<Self>, worker: &Rc<Worker>) {
        if self.paused.get() || self.reading.get() == Reading::Whole || self.carry.is_empty() {
            return;
        }
        // A head that was incomplete is so until more comes.
        if self.reading.get() == Reading::Head && self.begun.get() {
            return;
        }
        self.take(worker, &[]);
        if self.read_ended.get() {
            self.ended(worker);
        }
    }

    /// Takes what was read, keeps what is incomplete.
    fn take(self: &Rc<Self>, worker: &Rc<Worker>, bytes: &[u8]) {
        self.carry.feed(bytes, |bytes| self.process(worker, bytes));
    }

    /// Returns how many bytes are done with.
    fn process(self: &Rc<Self>, worker: &Rc<Worker>, input: &[u8]) -> usize {
        let mut at = 0;
        while !self.paused.get() {
            let rest = &input[at..];
            let used = match (self.reading.get(), &self.side) {
                (Reading::Over, _) => return input.len(),
                (Reading::Whole, Side::Client(_)) => break,
                (Reading::Whole, Side::Application { .. }) => {
                    if rest.is_empty() {
                        break;
                    }
                    // An answer to nothing.
                    self.drop_now();
                    return input.len();
                }
                (Reading::Head, Side::Client(server)) => self.read_request(worker, server, rest),
                (Reading::Head, Side::Application { .. }) => self.read_response(worker, rest),
                (Reading::Body, _) => self.read_body(worker, rest),
            };
            match used {
                Some(used) => at += used,
                None => break,
            }
        }
        at
    }

    /// `None`: more is needed.
    fn read_request(self: &Rc<Self>, worker: &Rc<Worker>, server: &Server, input: &[u8]) -> Option<usize> {
        if input.is_empty() {
            return None;
        }
        let mut head = worker.spare_request.take();
        let read = self.decoder.borrow_mut().request(input, &mut head);
        let used = match read {
            Ok(Some(used)) => used,
            Ok(None) => {
                *worker.spare_request.borrow_mut() = head;
                if !self.begun.replace(true) {
                    self.since.set(Instant::now());
                }
                return None;
            }
            Err(error) => {
                self.keep.set(false);
                self.reading.set(Reading::Over);
                worker.begin(|exchange, worker, key| {
                    self.key.set(Some(key));
                    let down = Leg::H1(self.clone());
                    exchange.refuse_head(worker, down, server.handler(), &error);
                });
                *worker.spare_request.borrow_mut() = head;
                return Some(input.len());
            }
        };
        self.begun.set(false);
        let (framing, keeps) = {
            let decoder = self.decoder.borrow();
            (decoder.framing(), decoder.keeps_alive())
        };
        self.keep.set(keeps && !server.is_last_request(worker));
        let whole = framing.is_empty();
        self.reading.set(if whole { Reading::Whole } else { Reading::Body });
        worker.begin(|exchange, worker, key| {
            self.key.set(Some(key));
            *worker.spare_request.borrow_mut() = exchange.take_head(head);
            exchange.begin(worker, Leg::H1(self.clone()), server.handler(), framing);
            exchange.set_out(worker, key);
        });
        Some(used)
    }

    fn read_response(self: &Rc<Self>, worker: &Rc<Worker>, input: &[u8]) -> Option<usize> {
        if input.is_empty() {
            return None;
        }
        let Some(key) = self.key.get() else {
            self.drop_now();
            return None;
        };
        let mut used = None;
        worker.with(key, |exchange, worker| {
            let read = self.decoder.borrow_mut().response(input, self.asked.get(), exchange.answer_mut());
            match read {
                Ok(None) => {}
                Ok(Some(count)) => {
                    used = Some(count);
                    let framing = self.decoder.borrow().framing();
                    if exchange.answer_mut().is_interim() && framing != Framing::Tunnel {
                        exchange.interim(worker);
                        return;
                    }
                    self.reading.set(Reading::Body);
                    exchange.answered(worker, key, framing);
                }
                Err(error) => {
                    self.drop_now();
                    exchange.bad_answer(worker, &error);
                }
            }
        });
        used
    }

    fn read_body(self: &Rc<Self>, worker: &Rc<Worker>, input: &[u8]) -> Option<usize> {
        let Some(key) = self.key.get() else {
            self.drop_now();
            return None;
        };
        let mut trailers = worker.spare_trailers.take();
        trailers.clear();
        let outcome = self.read_piece(worker, key, input, &mut trailers);
        *worker.spare_trailers.borrow_mut() = trailers;
        outcome
    }

    fn read_piece(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        key: Key,
        input: &[u8],
        trailers: &mut Fields,
    ) -> Option<usize> {
        let mut decoder = self.decoder.borrow_mut();
        let (used, data, end) = match decoder.body(input, trailers) {
            Ok((used, Piece::More)) => return (used > 0).then_some(used),
            Ok((used, Piece::End)) => (used, &[][..], true),
            // Whether a body of a known length ends here is known at once, and saves the peer a frame.
            Ok((used, Piece::Data(data))) => {
                let end = matches!(decoder.framing(), Framing::Length(_))
                    && matches!(decoder.body(&[], trailers), Ok((0, Piece::End)));
                (used, data, end)
            }
            Err(error) => {
                drop(decoder);
                self.malformed(worker, key, &error);
                return None;
            }
        };
        let keeps = decoder.keeps_alive();
        drop(decoder);
        self.pass_on(worker, key, data, end.then_some(&*trailers), keeps);
        Some(used)
    }

    /// Hands the exchange a piece of a body; `end`: the last, with trailers.
    fn pass_on(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        key: Key,
        data: &[u8],
        end: Option<&Fields>,
        keeps: bool,
    ) {
        let server = self.is_server();
        if end.is_some() {
            self.reading.set(Reading::Whole);
            if !server && !keeps {
                self.keep.set(false);
            }
        }
        let mut takes_more = true;
        worker.with(key, |exchange, worker| {
            takes_more = exchange.body(worker, key, server, data, end);
        });
        if end.is_none() {
            self.paused.set(!takes_more);
        } else if !server {
            self.answered_whole(worker);
        }
    }

    fn malformed(self: &Rc<Self>, worker: &Rc<Worker>, key: Key, error: &Error) {
        self.keep.set(false);
        self.reading.set(Reading::Over);
        if self.is_server() {
            worker.with(key, super::exchange::Exchange::bad_body);
        } else {
            self.drop_now();
            worker.with(key, |exchange, worker| exchange.bad_answer(worker, error));
        }
    }

    /// The peer has ended its half.
    fn ended(self: &Rc<Self>, worker: &Rc<Worker>) {
        self.read_ended.set(true);
        let waits = self.paused.get() || self.reading.get() == Reading::Whole;
        if waits && !self.carry.is_empty() {
            // Not looked at yet; the end comes after it.
            return;
        }
        let Some(key) = self.key.get() else {
            // Nobody waits for anything. What was answered still goes out.
            self.reading.set(Reading::Over);
            if self.is_server() {
                self.wire.finish();
            } else {
                self.drop_now();
            }
            return;
        };
        match self.reading.get() {
            Reading::Body => {
                if self.decoder.borrow().end().is_ok() {
                    self.pass_on(worker, key, &[], Some(&Fields::default()), false);
                } else if self.is_server() {
                    self.malformed(worker, key, &Error::Truncated);
                } else {
                    self.lost(worker, None);
                }
            }
            // A client that ended its half may still wait for its answer.
            Reading::Whole | Reading::Over if self.is_server() => self.keep.set(false),
            Reading::Head | Reading::Whole | Reading::Over => self.lost(worker, None),
        }
    }

    fn broke(self: &Rc<Self>, worker: &Rc<Worker>, error: &io::Error) {
        tracing::trace!(%error, "a connection of HTTP/1.x broke");
        self.read_ended.set(true);
        self.lost(worker, Some(error));
    }

    /// The connection has gone under its exchange.
    fn lost(self: &Rc<Self>, worker: &Rc<Worker>, error: Option<&io::Error>) {
        self.drop_now();
        if let Some(key) = self.key.take() {
            let server = self.is_server();
            worker.with(key, |exchange, worker| exchange.lost(worker, key, server, error));
        }
    }

    pub(super) fn is_server(&self) -> bool {
        matches!(self.side, Side::Client(_))
    }

    /// Has the task end the connection.
    pub(super) fn drop_now(&self) {
        self.dropped.set(true);
        self.wire.wake();
    }

    /// Ends it so that the peer cannot take what it has for all.
    pub(super) fn abort(&self) {
        self.key.set(None);
        self.wire.reset_on_close();
        self.drop_now();
    }

    /// Tells this exchange from now on.
    pub(super) fn belongs_to(&self, key: Key) {
        self.key.set(Some(key));
    }

    /// The exchange takes bytes again.
    pub(super) fn resume(&self) {
        if self.paused.replace(false) {
            self.wire.wake();
        }
    }

    /// The response was read to its end. On the application's side.
    fn answered_whole(self: &Rc<Self>, worker: &Worker) {
        let Side::Application { address, .. } = &self.side else { return };
        if self.sending.get() == Some(Framing::Tunnel) {
            return;
        }
        self.key.set(None);
        let clean = self.sending.get().is_none()
            && self.keep.get()
            && !self.read_ended.get()
            && !self.dropped.get()
            && !self.wire.is_broken();
        if !clean {
            return self.drop_now();
        }
        self.served.set(self.served.get().saturating_add(1));
        self.since.set(Instant::now());
        if self.is_wanted_elsewhere() {
            return self.drop_now();
        }
        worker.apps.give(*address, self.clone());
    }

    /// Whether its place is wanted for another connection, now that it is idle.
    pub(super) fn is_wanted_elsewhere(&self) -> bool {
        matches!(&self.side, Side::Application { address, line: Some(line), .. } if !line.keeps(*address))
    }

    /// The same of one that has been idle.
    pub(super) fn is_wanted(&self) -> bool {
        matches!(&self.side, Side::Application { line: Some(line), .. } if line.is_wanted())
    }

    /// Whether those who wait for its place stand in this line.
    pub(super) fn is_of(&self, line: &Rc<Line>) -> bool {
        matches!(&self.side, Side::Application { line: Some(own), .. } if Rc::ptr_eq(own, line))
    }

    /// Whether an idle connection to an application can carry a request.
    pub(super) fn is_usable(&self) -> bool {
        !self.dropped.get() && !self.read_ended.get() && !self.wire.is_broken()
    }

    /// Since when it has been idle.
    pub(super) fn idle_since(&self) -> Instant {
        self.since.get()
    }

    /// Whether it has served an exchange before.
    pub(super) fn was_used(&self) -> bool {
        self.served.get() > 0
    }

    /// Ends it if it has waited for too long, or if its client should go elsewhere. On the client's side, now and then.
    pub(super) fn sweep(&self, worker: &Worker, now: Instant) {
        let Side::Client(server) = &self.side else { return };
        if self.reading.get() == Reading::Over {
            if self.wire.is_finishing() && now.saturating_duration_since(self.since.get()) >= LINGER {
                self.drop_now();
            }
            return;
        }
        let leave = server.leaves(worker, self.served.get() > 0);
        if self.key.get().is_some() {
            if leave {
                self.keep.set(false);
            }
            return;
        }
        let timeouts = &worker.ctx.config.timeouts;
        let waited = now.saturating_duration_since(self.since.get());
        if self.begun.get() {
            if timeouts.headers.enabled().is_some_and(|limit| waited >= limit) {
                self.drop_now();
            }
        } else if leave || timeouts.idle.enabled().is_some_and(|limit| waited >= limit) {
            self.reading.set(Reading::Over);
            self.since.set(now);
            self.wire.finish();
            self.wire.wake();
        }
    }
}
