//! One end of a connection: its life from preface to GOAWAY. Bytes come in by [`receive`] and [`head`], and go out by
//! [`send`].
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "lengths of frames are 24 bits wide and windows 31, checked where they are read"
)]

mod head;
mod receive;
mod send;

use super::budget::Meters;
use super::flow::{self, ReceiveWindow, SendWindow};
use super::frame::{self, MIN_FRAME_BYTES, PREFACE};
use super::settings::{self, HEADER_TABLE_BYTES, Peer};
use super::stream::{LateFrames, Streams};
use super::{Code, Config, Event, Fatal, Heads, Role, StreamId, hpack};
use receive::Reading;
use std::collections::VecDeque;
use std::fmt;

/// Stream numbers have 31 bits; also the largest window.
const MAX_31_BITS: u32 = (1 << 31) - 1;

/// What our pings carry, so that their answers can be told apart.
const PING: [u8; 8] = *b"liveness";
const DRAIN_PING: [u8; 8] = *b"draining";

/// One end of an HTTP/2 connection.
///
/// Bytes to send are appended to the `out` of each call, in the order in which the peer must get them.
///
/// A stream is gone when both halves have ended or when either side has reset it. Every method that takes a stream's
/// number does nothing for a stream that is gone, or whose half of ours has ended: bodies may be written on without
/// asking first, [`Event::Reset`] is on its way or was told.
#[allow(clippy::struct_field_names, reason = "a window of the connection is not one of a stream")]
pub struct Connection {
    role: Role,
    streams_allowed: u32,
    stream_window: u32,
    connection_window: u32,
    frame_bytes: u32,
    head_bytes: u32,
    fields: usize,
    extended_connect: bool,

    // What comes in.
    reading: Reading,
    decoder: hpack::Decoder,
    /// A field block that comes in several frames, as far as it came.
    block: Vec<u8>,
    receive_window: ReceiveWindow,
    meters: Meters,

    // What both sides agreed on.
    peer: Peer,
    /// The peer has seen our SETTINGS.
    acknowledged: bool,
    streams: Streams,
    late: LateFrames,
    /// The highest stream that the peer has opened.
    last_of_peer: StreamId,
    /// The highest stream that we did not ignore: what GOAWAY says.
    last_taken: StreamId,
    /// The next stream that we open.
    next_own: StreamId,

    // What goes out.
    send_window: SendWindow,
    /// Streams that the connection's send window holds up, in the order in which they get their turn. May hold streams
    /// that are gone.
    line: VecDeque<StreamId>,
    /// The next block must say that we use no dynamic table, for the peer's became smaller than what it began with.
    table_update: TableUpdate,
    /// Pings that were not answered yet.
    pings: u32,

    leaving: Leaving,
    peer_leaves: bool,
    /// Streams that the peer's GOAWAY left out and that were not told yet.
    left_out: Vec<StreamId>,
}

/// RFC 7541, 4.2: a table that shrinks is acknowledged at the start of the next block. Once: ours is then empty for
/// good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TableUpdate {
    NotNeeded,
    Due,
    Done,
}

/// How far our own leaving has come (6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    No,
    /// GOAWAY without a limit is on its way; what the peer sends until it answers our PING still counts.
    Announced,
    /// GOAWAY named the last stream: later ones are not looked at.
    Final,
}

/// Without what was read: the decoder's table holds other people's secrets.
impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("role", &self.role)
            .field("open", &self.streams.len())
            .field("leaving", &self.leaving)
            .field("peer_leaves", &self.peer_leaves)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Begins a connection: SETTINGS, a larger connection window, and before them the client's preface. The server
    /// expects that preface as its first input.
    pub fn new(config: &Config, out: &mut Vec<u8>) -> Self {
        let config = Config {
            stream_window: config.stream_window.min(MAX_31_BITS),
            connection_window: config.connection_window.clamp(flow::INITIAL as u32, MAX_31_BITS),
            frame_bytes: config.frame_bytes.clamp(MIN_FRAME_BYTES, (1 << 24) - 1),
            ..config.clone()
        };
        if config.role == Role::Client {
            out.extend_from_slice(PREFACE);
        }
        settings::write(&config, out);
        let more = config.connection_window - flow::INITIAL as u32;
        if more > 0 {
            frame::write_window_update(0, more, out);
        }
        Self {
            role: config.role,
            streams_allowed: config.streams,
            stream_window: config.stream_window,
            connection_window: config.connection_window,
            frame_bytes: config.frame_bytes,
            head_bytes: config.head_bytes,
            fields: config.fields,
            extended_connect: config.extended_connect,
            reading: match config.role {
                Role::Client => Reading::Frame,
                Role::Server => Reading::Preface,
            },
            decoder: hpack::Decoder::new(HEADER_TABLE_BYTES as usize),
            block: Vec::new(),
            receive_window: ReceiveWindow::new(config.connection_window),
            meters: Meters::new(config.budget),
            peer: Peer::new(),
            acknowledged: false,
            streams: Streams::default(),
            late: LateFrames::default(),
            last_of_peer: 0,
            last_taken: 0,
            next_own: 1,
            send_window: SendWindow::new(flow::INITIAL),
            line: VecDeque::new(),
            table_update: TableUpdate::NotNeeded,
            pings: 0,
            leaving: Leaving::No,
            peer_leaves: false,
            left_out: Vec::new(),
        }
    }

    /// What the input says: bytes consumed, and the event. To be called in a loop until [`Event::More`]; `input` must
    /// begin with the bytes that were not consumed the last time. Frames other than DATA are consumed whole, so never
    /// more than [`Config::frame_bytes`] and 9 have to be kept.
    ///
    /// After an error everything else is swallowed in silence.
    pub fn receive<'a>(
        &mut self,
        input: &'a [u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Event<'a>), Fatal> {
        self.read(input, heads, out).inspect_err(|fatal| {
            frame::write_goaway(self.last_taken, fatal.code, fatal.text, out);
            self.reading = Reading::Dead;
            (self.line, self.left_out) = (VecDeque::new(), Vec::new());
            self.block = Vec::new();
            self.leaving = Leaving::Final;
        })
    }

    /// Leaves in peace (6.8): GOAWAY without a limit, and once the peer has seen it, which the answer to a PING shows,
    /// another one that names the last stream. What is open goes on. A client needs one step only, for its peer opens
    /// nothing. Safe to repeat.
    pub fn drain(&mut self, out: &mut Vec<u8>) {
        if self.leaving != Leaving::No {
            return;
        }
        match self.role {
            Role::Client => {
                self.leaving = Leaving::Final;
                frame::write_goaway(self.last_taken, Code::NO_ERROR, "", out);
            }
            Role::Server => {
                self.leaving = Leaving::Announced;
                frame::write_goaway(MAX_31_BITS, Code::NO_ERROR, "", out);
                frame::write_ping(frame::flag::NONE, DRAIN_PING, out);
            }
        }
    }

    /// Says GOAWAY with the last stream at once. The caller then closes, at the latest when what is open has ended.
    pub fn close(&mut self, code: Code, out: &mut Vec<u8>) {
        self.leaving = Leaving::Final;
        frame::write_goaway(self.last_taken, code, "", out);
    }

    /// Asks whether the peer is there: [`Event::Pong`] will come.
    pub fn ping(&mut self, out: &mut Vec<u8>) {
        self.pings = self.pings.saturating_add(1);
        frame::write_ping(frame::flag::NONE, PING, out);
    }

    /// Time passes: to be called about once a second. Budgets are refilled, and what an idle connection does not need
    /// is freed.
    pub fn tick(&mut self) {
        self.meters.refill();
        self.late.forget();
        if self.streams.is_empty() {
            self.streams = Streams::default();
            self.line = VecDeque::new();
            self.decoder.rest();
        }
    }

    /// Streams that are open or half-closed.
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// Client: how many streams were opened so far.
    pub fn opened_streams(&self) -> u32 {
        self.next_own / 2
    }

    /// Client: how many streams could be opened now.
    pub fn available(&self) -> usize {
        if self.is_leaving() || self.role == Role::Server || self.next_own > MAX_31_BITS {
            return 0;
        }
        (self.peer.streams as usize).saturating_sub(self.streams.len())
    }

    /// Whether GOAWAY was sent or received.
    pub fn is_leaving(&self) -> bool {
        self.leaving != Leaving::No || self.peer_leaves
    }

    /// Whether either side leaves and nothing is open any more: the connection can be closed. A server that drains is
    /// not through before its peer has seen that.
    pub fn is_drained(&self) -> bool {
        self.streams.is_empty() && (self.leaving == Leaving::Final || self.peer_leaves)
    }

    /// Whether the peer takes extended CONNECT (RFC 8441); `None` before its first SETTINGS.
    pub fn peer_extended_connect(&self) -> Option<bool> {
        self.peer.known.then_some(self.peer.extended_connect)
    }

    /// Whether the peer has begun something that an honest one brings to its end at once: the connection, with preface
    /// and SETTINGS, or a field block (6.10).
    pub fn awaits_rest(&self) -> bool {
        !self.peer.known || matches!(self.reading, Reading::Continuation(_))
    }

    /// Streams with a key, in no order.
    pub fn keys(&self) -> impl Iterator<Item = (StreamId, u64)> + '_ {
        self.streams.iter().filter(|(_, stream)| stream.keyed).map(|(&id, stream)| (id, stream.key))
    }

    /// Gives a stream the caller's key, which comes with all of its later events.
    pub fn attach(&mut self, id: StreamId, key: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.key = key;
            stream.keyed = true;
        }
    }
}

#[cfg(test)]
impl Connection {
    /// Streams in the line, alive or not.
    pub(super) fn memory_of_waiting(&self) -> usize {
        self.line.capacity()
    }

    /// Bytes kept of a field block.
    pub(super) fn memory_of_block(&self) -> usize {
        self.block.capacity()
    }

    /// As if all stream numbers but one had been used.
    pub(super) fn use_up_numbers(&mut self) {
        self.next_own = MAX_31_BITS;
    }
}
