//! An HTTP/2 connection, on either side of the proxy, and the task that reads it.
//!
//! Its streams belong to exchanges, which it tells at once what came. What they send is collected in the wire; many
//! streams' frames leave together at the end of the turn.
//!
//! Towards a peer's sidecar one such connection per thread carries everybody's requests. So nobody may stop it: a stream whose
//! reader is slow keeps its own window closed, and the connection's window is large enough for many such streams.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, ready},
    time::{Duration, Instant, SystemTime},
};

use outrigger_core::reason::Reason;
use outrigger_http::{
    fields::Fields,
    h1::Framing,
    h2::{Budget, Code, Config, Connection, Event, NotOpened, Role, StreamId},
    head::{RequestHead, ResponseHead},
};

use super::{
    Worker, carry::Carry, exchanges::Key, h1::MAX_FIELDS, leg::Leg, pool::PoolKey, reasons::Refusal,
    serve::Server, wire::Wire,
};
use crate::metrics::OpenGuard;

/// Flow-control window of a stream between sidecars, which is what a reader that has stopped costs: 256 KiB carry
/// 100 Mbit/s over 20 ms, and 2 Gbit/s over the millisecond between two zones.
const MESH_WINDOW: u32 = 256 * 1024;

/// The same towards applications, which are on this host: what HTTP/2 begins with, in round numbers.
const LOCAL_WINDOW: u32 = 64 * 1024;

/// Readers that may stop before they slow down the others: the window of a connection, in those of streams.
const STOPPED_READERS: u32 = 256;

/// Bytes in one frame: four TLS records.
const FRAME_BYTES: u32 = 64 * 1024;

/// Reads of one connection before others get their turn.
const READS_PER_TURN: usize = 4;

/// How long what was said last may take to reach the peer.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Streams that all clients of a thread may reset in a second, together: less than half of what a peer's sidecar takes on one
/// connection (`PEERS_BUDGET`). Beyond that, those that reset more than a few are ended.
const SHARED_RESETS: u32 = 2000;
const FEW_RESETS: u32 = 20;

/// An application is not expected to make trouble, nor is it bounded in streams: it opens none.
const SERVERS_BUDGET: Budget = Budget { resets: 1000, errors: 1000, frames: 10_000 };

/// Which side of the proxy it is on.
enum Side {
    /// The peer sends requests.
    Client(Server),
    /// The peer answers: a sidecar, or an application.
    Endpoint {
        key: PoolKey,
        /// When it has to be replaced, for the sake of the leaf that ends first.
        move_at: Option<SystemTime>,
        _open: [Option<OpenGuard>; 2],
    },
}

pub(crate) struct H2 {
    pub(super) wire: Rc<Wire>,
    side: Side,
    codec: RefCell<Connection>,
    /// Read and not understood yet.
    carry: Carry,
    /// Since when the beginning of a frame, or of a field block, or of the connection itself, waits for its rest.
    begun: Cell<Option<Instant>>,
    /// Streams that the client has reset in this second.
    resets: Cell<u32>,
    /// When bytes came last.
    heard: Cell<Instant>,
    /// When a ping was sent that has no answer yet.
    pinged: Cell<Option<Instant>>,
    /// Since when there is no stream.
    idle_since: Cell<Instant>,
    /// Streams that were answered or asked.
    served: Cell<bool>,
    /// Nothing more is to be read.
    over: Cell<bool>,
    /// Its task has ended.
    gone: Cell<bool>,
    /// When it was over.
    over_since: Cell<Option<Instant>>,
}

impl H2 {
    /// For a client, which has sent nothing yet or whose first bytes lie in the wire.
    pub(super) fn server(
        worker: &Worker,
        wire: Wire,
        server: Server,
        streams: u32,
        budget: Budget,
    ) -> Rc<Self> {
        let config = config(worker, Role::Server, server.is_peer(), streams, budget);
        Self::new(worker, wire, Side::Client(server), &config)
    }

    /// To an endpoint.
    pub(super) fn client(
        worker: &Worker,
        wire: Wire,
        key: PoolKey,
        move_at: Option<SystemTime>,
        open: [Option<OpenGuard>; 2],
    ) -> Rc<Self> {
        let config = config(worker, Role::Client, matches!(key, PoolKey::Mesh(_)), 0, SERVERS_BUDGET);
        Self::new(worker, wire, Side::Endpoint { key, move_at, _open: open }, &config)
    }

    fn new(worker: &Worker, wire: Wire, side: Side, config: &Config) -> Rc<Self> {
        let wire = Rc::new(wire);
        let codec = Connection::new(config, &mut wire.out());
        worker.turn.flush(&wire);
        let now = Instant::now();
        Rc::new(Self {
            wire,
            side,
            codec: RefCell::new(codec),
            carry: Carry::default(),
            begun: Cell::new(Some(now)),
            resets: Cell::new(0),
            heard: Cell::new(now),
            pinged: Cell::new(None),
            idle_since: Cell::new(now),
            served: Cell::new(false),
            over: Cell::new(false),
            gone: Cell::new(false),
            over_since: Cell::new(None),
        })
    }

    /// Whether the peer has said anything since then.
    pub(super) fn was_heard_since(&self, at: Instant) -> bool {
        self.heard.get() >= at
    }

    /// Reads until the connection ends.
    pub(super) async fn run(self: Rc<Self>, worker: Rc<Worker>) {
        std::future::poll_fn(|cx| self.poll(cx, &worker)).await;
        self.over.set(true);
        self.gone.set(true);
        self.lose_streams(&worker);
        if let Side::Endpoint { key, .. } = &self.side {
            worker.pool.ended(&worker, key, &self);
        }
    }

    fn poll(self: &Rc<Self>, cx: &mut Context<'_>, worker: &Rc<Worker>) -> Poll<()> {
        self.wire.set_waker(cx);
        for _ in 0..READS_PER_TURN {
            if self.wire.poll_sent(cx).is_ready() {
                worker.turn.resume_waiting(&self.wire);
            }
            if self.wire.is_broken() || (self.over.get() && self.wire.is_finished()) {
                return Poll::Ready(());
            }
            if self.over.get() || self.wire.is_choked() {
                return Poll::Pending;
            }
            let read = ready!(self.wire.poll_read(cx, |bytes| {
                if !bytes.is_empty() {
                    self.take(worker, bytes);
                }
                bytes.len()
            }));
            match read {
                Ok(0) => return Poll::Ready(()),
                Ok(_) => self.heard.set(Instant::now()),
                Err(error) => {
                    tracing::trace!(%error, "a connection of HTTP/2 broke");
                    return Poll::Ready(());
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn take(self: &Rc<Self>, worker: &Rc<Worker>, bytes: &[u8]) {
        let awaited = self.codec.borrow().awaits_rest();
        let mut used = 0;
        self.carry.feed(bytes, |bytes| {
            used = self.process(worker, bytes);
            used
        });
        let awaits = self.codec.borrow().awaits_rest();
        if self.carry.is_empty() && !awaits {
            self.begun.set(None);
        } else if self.begun.get().is_none() || (used > 0 && !(awaited && awaits)) {
            self.begun.set(Some(Instant::now()));
        }
        if !self.wire.out().is_empty() {
            worker.turn.flush(&self.wire);
        }
        self.look_for_the_end();
    }

    /// Returns how many bytes are done with.
    fn process(self: &Rc<Self>, worker: &Rc<Worker>, input: &[u8]) -> usize {
        let mut fresh = worker.fresh.take();
        let used = self.process_events(worker, input, &mut fresh);
        // Only now: a request that its client takes back in the same breath costs nobody else anything.
        for key in fresh.drain(..) {
            worker.with(key, |exchange, worker| exchange.set_out(worker, key));
        }
        worker.fresh.replace(fresh);
        used
    }

    /// The same; the exchanges that have begun are in `fresh`.
    fn process_events(self: &Rc<Self>, worker: &Rc<Worker>, input: &[u8], fresh: &mut Vec<Key>) -> usize {
        let mut at = 0;
        while !self.over.get() {
            let received = {
                let mut heads = worker.heads.borrow_mut();
                self.codec.borrow_mut().receive(&input[at..], &mut heads, &mut self.wire.out())
            };
            let (used, event) = match received {
                Ok(received) => received,
                Err(fatal) => {
                    tracing::debug!(%fatal, "a connection of HTTP/2 is ended");
                    self.end_for(worker, fatal.code);
                    return input.len();
                }
            };
            at += used;
            match event {
                Event::More => break,
                Event::Request { id, end } => fresh.extend(self.request(worker, id, end)),
                Event::TooLarge { id, .. } => self.too_large(worker, id),
                Event::Response { id: _, key, end } => {
                    let key = Key::from_bits(key);
                    worker.with(key, |exchange, worker| {
                        std::mem::swap(exchange.answer_mut(), &mut worker.heads.borrow_mut().response);
                        if exchange.answer_mut().is_interim() {
                            exchange.interim(worker);
                        } else {
                            let framing = if end { Framing::Empty } else { Framing::UntilClose };
                            exchange.answered(worker, key, framing);
                        }
                    });
                }
                Event::Data { id, key, data, end } => self.data(worker, id, key, data, end),
                Event::Trailers { id: _, key } => {
                    let mut trailers = std::mem::take(&mut worker.heads.borrow_mut().trailers);
                    let key = Key::from_bits(key);
                    worker.with(key, |exchange, worker| {
                        exchange.body(worker, key, self.is_server(), &[], Some(&trailers));
                    });
                    trailers.clear();
                    worker.heads.borrow_mut().trailers = trailers;
                }
                Event::Reset { id: _, key, code, by_peer, unprocessed } => {
                    let key = Key::from_bits(key);
                    worker.with(key, |exchange, worker| {
                        exchange.reset_by(worker, key, self.is_server(), code, by_peer, unprocessed);
                    });
                    if by_peer {
                        self.took_back(worker);
                    }
                }
                Event::Writable { id: _, key } => worker.turn.ready(Key::from_bits(key)),
                Event::GoAway { .. } => {
                    if let Side::Endpoint { key, .. } = &self.side {
                        worker.pool.peer_leaves(key);
                    }
                }
                Event::Settings => {
                    if let Side::Endpoint { key, .. } = &self.side {
                        worker.pool.settled(worker, key);
                    }
                }
                Event::Pong => self.pinged.set(None),
            }
        }
        at
    }

    /// Begins the exchange of a request, which is to set out when what was read with it has been looked at.
    fn request(self: &Rc<Self>, worker: &Rc<Worker>, id: StreamId, end: bool) -> Option<Key> {
        let Side::Client(server) = &self.side else { return None };
        self.served.set(true);
        let key = worker.begin(|exchange, worker, key| {
            self.codec.borrow_mut().attach(id, key.to_bits());
            exchange.swap_head(&mut worker.heads.borrow_mut().request);
            let framing = if end { Framing::Empty } else { Framing::UntilClose };
            exchange.begin(worker, Leg::H2(self.clone(), id), server.handler(), framing);
        });
        Some(key)
    }

    /// The client has reset a stream. Each client's codec bounds that; what all of them do together goes out on connections
    /// that they share with others, and is bounded here.
    fn took_back(self: &Rc<Self>, worker: &Rc<Worker>) {
        let Side::Client(server) = &self.side else { return };
        // A peer's sidecar has done the same to its own callers.
        if server.is_peer() {
            return;
        }
        self.resets.set(self.resets.get() + 1);
        if worker.counts_reset() > SHARED_RESETS && self.resets.get() > FEW_RESETS {
            tracing::debug!("a connection of HTTP/2 is ended: it has a share in too many resets");
            self.codec.borrow_mut().close(Code::ENHANCE_YOUR_CALM, &mut self.wire.out());
            self.end_for(worker, Code::ENHANCE_YOUR_CALM);
        }
    }

    /// Ends a connection whose peer was told `code`.
    fn end_for(self: &Rc<Self>, worker: &Rc<Worker>, code: Code) {
        let outcome = if code == Code::ENHANCE_YOUR_CALM { "http2_flood" } else { "http2_error" };
        worker.ctx.metrics.refused(self.direction(), outcome);
        self.finish();
        if let Side::Endpoint { key, .. } = &self.side {
            // It takes no place from those that serve while it says its last words.
            worker.pool.ended(worker, key, self);
            worker.look_after(self);
        }
        // Not when the last words have been said: callers wait, and applications work for nobody.
        self.lose_streams(worker);
    }

    fn too_large(self: &Rc<Self>, worker: &Rc<Worker>, id: StreamId) {
        let Side::Client(server) = &self.side else { return };
        let error = outrigger_http::h1::Error::HeadTooLarge;
        worker.begin(|exchange, worker, key| {
            self.codec.borrow_mut().attach(id, key.to_bits());
            exchange.refuse_head(worker, Leg::H2(self.clone(), id), server.handler(), &error);
        });
    }

    fn data(self: &Rc<Self>, worker: &Rc<Worker>, id: StreamId, key: u64, data: &[u8], end: bool) {
        let key = Key::from_bits(key);
        let mut known = false;
        worker.with(key, |exchange, worker| {
            known = true;
            exchange.body(worker, key, self.is_server(), data, end.then_some(&worker.no_trailers));
        });
        if !known {
            // Nobody wants it any more; the connection's window opens all the same.
            self.release(worker, id, data.len());
        }
    }

    pub(super) fn is_server(&self) -> bool {
        matches!(self.side, Side::Client(_))
    }

    fn direction(&self) -> crate::metrics::Direction {
        match &self.side {
            Side::Client(server) => server.handler().direction(),
            Side::Endpoint { .. } => crate::metrics::Direction::Outbound,
        }
    }

    /// Tells every exchange on this connection that it is lost.
    fn lose_streams(&self, worker: &Rc<Worker>) {
        let streams: Vec<_> = self.codec.borrow().keys().collect();
        for (_, key) in streams {
            let key = Key::from_bits(key);
            worker.with(key, |exchange, worker| exchange.lost(worker, key, self.is_server(), None));
        }
    }

    /// Ends the connection after what was collected so far.
    fn finish(&self) {
        if !self.over.replace(true) {
            self.over_since.set(Some(Instant::now()));
        }
        self.wire.finish();
        self.wire.wake();
    }

    /// Ends a connection that serves nothing any more.
    fn look_for_the_end(&self) {
        let codec = self.codec.borrow();
        if codec.open_streams() > 0 {
            return;
        }
        if codec.is_drained() {
            drop(codec);
            self.finish();
        }
    }

    // What is sent.

    /// Opens a stream. On the endpoint's side.
    pub(super) fn send_request(
        &self,
        worker: &Worker,
        key: Key,
        head: &RequestHead,
        end: bool,
    ) -> Result<StreamId, NotOpened> {
        let opened = self.codec.borrow_mut().request(head, end, key.to_bits(), &mut self.wire.out());
        worker.turn.flush(&self.wire);
        opened
    }

    pub(super) fn send_response(&self, worker: &Worker, id: StreamId, head: &ResponseHead, end: bool) {
        self.codec.borrow_mut().response(id, head, end, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.sent_an_end(end);
    }

    pub(super) fn capacity(&self, id: StreamId) -> usize {
        self.codec.borrow_mut().capacity(id)
    }

    pub(super) fn send(&self, worker: &Worker, id: StreamId, data: &[u8], end: bool) -> usize {
        let taken = self.codec.borrow_mut().data(id, data, end, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.sent_an_end(end);
        taken
    }

    pub(super) fn send_trailers(&self, worker: &Worker, id: StreamId, trailers: &Fields) {
        self.codec.borrow_mut().trailers(id, trailers, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.sent_an_end(true);
    }

    pub(super) fn reset(&self, worker: &Worker, id: StreamId, code: Code) {
        self.codec.borrow_mut().reset(id, code, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.sent_an_end(true);
    }

    fn sent_an_end(&self, end: bool) {
        if !end {
            return;
        }
        let codec = self.codec.borrow();
        if codec.open_streams() == 0 {
            self.idle_since.set(Instant::now());
            if codec.is_leaving() {
                // Whether it is drained is looked at by the task that reads.
                self.wire.wake();
            }
        }
    }

    /// Tells this exchange of the stream from now on.
    pub(super) fn belongs_to(&self, id: StreamId, key: Key) {
        self.codec.borrow_mut().attach(id, key.to_bits());
    }

    pub(super) fn release(&self, worker: &Worker, id: StreamId, bytes: usize) {
        let mut out = self.wire.out();
        let before = out.len();
        self.codec.borrow_mut().release(id, bytes, &mut out);
        if out.len() > before {
            worker.turn.flush(&self.wire);
        }
    }

    // What the pool asks.

    /// Streams that could be opened now; 0 where the peer leaves.
    pub(super) fn available(&self) -> usize {
        if self.over.get() || self.wire.is_broken() {
            return 0;
        }
        let codec = self.codec.borrow();
        // A sidecar allows many; what an application allows is not known before it has said so.
        if self.is_unsettled() && codec.open_streams() > 0 { 0 } else { codec.available() }
    }

    /// Whether it leads to an application whose SETTINGS have not come yet.
    pub(super) fn is_unsettled(&self) -> bool {
        matches!(self.side, Side::Endpoint { key: PoolKey::Plain(_), .. })
            && !self.over.get()
            && self.codec.borrow().peer_extended_connect().is_none()
    }

    /// Whether more than one request went out on it.
    pub(super) fn was_shared(&self) -> bool {
        self.codec.borrow().opened_streams() > 1
    }

    /// Streams that are open.
    pub(super) fn open_streams(&self) -> usize {
        self.codec.borrow().open_streams()
    }

    /// Whether the peer serves extended CONNECT; `None`: it has not said.
    pub(super) fn serves_extended_connect(&self) -> Option<bool> {
        self.codec.borrow().peer_extended_connect()
    }

    /// Lets it end when its last stream has: GOAWAY.
    pub(super) fn retire(&self, worker: &Worker) {
        self.codec.borrow_mut().close(Code::NO_ERROR, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.wire.wake();
    }

    /// Whether it has not ended yet.
    pub(super) fn is_alive(&self) -> bool {
        !(self.wire.is_broken() || self.gone.get())
    }

    /// Whether it has been idle for so long.
    pub(super) fn is_idle(&self, now: Instant, limit: Duration) -> bool {
        self.open_streams() == 0 && now.saturating_duration_since(self.idle_since.get()) >= limit
    }

    /// Whether it has to be replaced.
    pub(super) fn has_to_move(&self, now: SystemTime) -> bool {
        matches!(&self.side, Side::Endpoint { move_at: Some(at), .. } if *at <= now)
    }

    /// Looks now and then whether it should end, or whether its peer still lives.
    pub(super) fn sweep(&self, worker: &Worker, now: Instant) {
        if self.over.get() {
            let since = self.over_since.get().unwrap_or(now);
            if now.saturating_duration_since(since) >= LAST_WORDS {
                self.wire.give_up();
            }
            return;
        }
        let slow = worker.ctx.config.timeouts.headers.enabled();
        if let (Some(limit), Some(begun)) = (slow, self.begun.get())
            && now.saturating_duration_since(begun) >= limit
        {
            tracing::debug!("a frame does not come to its end");
            self.codec.borrow_mut().close(Code::ENHANCE_YOUR_CALM, &mut self.wire.out());
            return self.finish();
        }
        if worker.is_new_second() {
            self.codec.borrow_mut().tick();
            self.resets.set(0);
        }
        self.look_for_the_end();
        self.look_whether_it_lives(worker, now);
        let Side::Client(server) = &self.side else { return };
        let timeouts = &worker.ctx.config.timeouts;
        let is_idle = timeouts.idle.enabled().is_some_and(|limit| self.is_idle(now, limit));
        if (is_idle || server.leaves(worker, self.served.get())) && !self.codec.borrow().is_leaving() {
            self.codec.borrow_mut().drain(&mut self.wire.out());
            worker.turn.flush(&self.wire);
        }
    }

    fn look_whether_it_lives(&self, worker: &Worker, now: Instant) {
        let timeouts = &worker.ctx.config.timeouts;
        let Some(interval) = timeouts.ping_interval.enabled() else { return };
        // A client that is idle may be silent for as long as it likes.
        if self.is_server() && self.open_streams() == 0 {
            self.pinged.set(None);
            return;
        }
        match self.pinged.get() {
            Some(at) if self.heard.get() > at => self.pinged.set(None),
            Some(at) if now.saturating_duration_since(at) >= timeouts.ping_timeout.get() => {
                tracing::debug!("a peer does not answer pings");
                self.wire.give_up();
            }
            None if now.saturating_duration_since(self.heard.get()) >= interval => {
                self.codec.borrow_mut().ping(&mut self.wire.out());
                worker.turn.flush(&self.wire);
                self.pinged.set(Some(now));
            }
            _ => {}
        }
    }
}

fn config(worker: &Worker, role: Role, is_mesh: bool, streams: u32, budget: Budget) -> Config {
    let window = if is_mesh { MESH_WINDOW } else { LOCAL_WINDOW };
    Config {
        role,
        streams,
        stream_window: window,
        connection_window: STOPPED_READERS * window,
        frame_bytes: FRAME_BYTES,
        head_bytes: worker.ctx.config.limits.header_bytes,
        fields: MAX_FIELDS,
        extended_connect: role == Role::Server,
        budget,
    }
}

/// Why a stream could not be opened, for people.
pub(super) fn not_opened(error: NotOpened) -> Refusal {
    let text = match error {
        NotOpened::Full => "all streams of the connection to the endpoint are in use",
        NotOpened::Leaving | NotOpened::Exhausted => "the endpoint is shutting down",
    };
    Refusal::new(Reason::Overloaded, text)
}
