//! HTTP/2 (RFC 9113), with HPACK (RFC 7541) and extended CONNECT (RFC 8441).
//!
//! [`Connection`] is one end of a connection, client or server. Nothing is buffered but what cannot be told yet: a
//! field block that comes in several frames. Data is handed out as slices of the caller's input, in pieces as they
//! come, and its window opens again when the caller says that the bytes are gone ([`Connection::release`]):
//! back-pressure is the caller's, per stream and for the whole connection. Likewise nothing is queued for sending: what
//! a window does not allow stays with the caller, who hears of it when there is room ([`Event::Writable`]).
//!
//! Where the RFC leaves the choice between a stream error and a connection error we take the connection error if only a
//! broken peer could get there, and the stream error if a good proxy could be made to pass on somebody's bad request.
//!
//! - [`connection`]: states and rules, in the order in which bytes meet them
//! - [`frame`], [`settings`], [`hpack`]: bytes
//! - [`message`]: what may stand in a head (8.2, 8.3)
//! - [`stream`], [`flow`], [`budget`]: the state of a stream, windows, and how much nonsense a peer may send

mod budget;
mod code;
mod connection;
mod flow;
mod frame;
mod hpack;
mod message;
mod settings;
mod stream;
#[cfg(test)]
mod tests;

pub use budget::Budget;
pub use code::Code;
pub use connection::Connection;

use crate::fields::Fields;
use crate::head::{RequestHead, ResponseHead};

/// The number of a stream: odd if the client opened it. Only clients open any here, for push is off.
pub type StreamId = u32;

/// Which end of the connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We open streams.
    Client,
    /// The peer opens streams.
    Server,
}

/// What a [`Connection`] allows its peer.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which end we are.
    pub role: Role,
    /// Streams that the peer may have open at once (server).
    pub streams: u32,
    /// Bytes of one stream that we take before they are released; at most 2^31-1.
    pub stream_window: u32,
    /// Bytes of all streams that we take before they are released; 65,535 to 2^31-1 (less counts as 65,535, which the
    /// protocol gives).
    pub connection_window: u32,
    /// The largest frame that we take, 2^14 to 2^24-1 bytes (what is outside counts as the nearer end). Also the
    /// largest DATA frame that we send, where the peer takes it.
    pub frame_bytes: u32,
    /// The largest head or trailer section: names, values and 32 bytes for each line (RFC 9113, 6.5.2). Compressed, a
    /// head may take up to twice that before the connection ends.
    pub head_bytes: u32,
    /// The most lines of one head, without pseudo-fields.
    pub fields: usize,
    /// Whether extended CONNECT (RFC 8441) is offered (server).
    pub extended_connect: bool,
    /// How much useless work the peer may cause.
    pub budget: Budget,
}

/// Where heads are read into: one for all connections of a thread, since an event is dealt with before the next is
/// asked for.
#[derive(Debug, Default)]
pub struct Heads {
    /// Of [`Event::Request`].
    pub request: RequestHead,
    /// Of [`Event::Response`].
    pub response: ResponseHead,
    /// Of [`Event::Trailers`].
    pub trailers: Fields,
}

/// What the peer has said. `key` is what [`Connection::attach`] or [`Connection::request`] gave the stream, else 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Nothing more to tell. Bytes that were not consumed are the beginning of something: call again with more behind
    /// them.
    More,
    /// Server: a request, in [`Heads::request`].
    Request {
        /// The stream.
        id: StreamId,
        /// There is no body.
        end: bool,
    },
    /// Server: a request whose head exceeds [`Config::head_bytes`] or [`Config::fields`]. It was decoded and thrown
    /// away. The caller answers 431.
    TooLarge {
        /// The stream.
        id: StreamId,
        /// There is no body.
        end: bool,
    },
    /// Client: a response, in [`Heads::response`]; interim ones (1xx) too, after which another follows.
    Response {
        /// The stream.
        id: StreamId,
        /// The caller's key.
        key: u64,
        /// There is no body.
        end: bool,
    },
    /// A piece of a body. The caller releases every byte of it, sooner or later ([`Connection::release`]).
    Data {
        /// The stream.
        id: StreamId,
        /// The caller's key.
        key: u64,
        /// A slice of the input; empty only with `end`.
        data: &'a [u8],
        /// The peer's half ends here.
        end: bool,
    },
    /// Trailers, in [`Heads::trailers`]; the peer's half ends here.
    Trailers {
        /// The stream.
        id: StreamId,
        /// The caller's key.
        key: u64,
    },
    /// The stream is gone, by the peer's decision or because the peer broke a rule. Not told after
    /// [`Connection::reset`], nor of requests that were never told.
    Reset {
        /// The stream.
        id: StreamId,
        /// The caller's key.
        key: u64,
        /// Why.
        code: Code,
        /// Whether the peer reset it; else we did.
        by_peer: bool,
        /// The peer says that it did nothing with the request (GOAWAY left it out, or `REFUSED_STREAM`): it may be sent
        /// again.
        unprocessed: bool,
    },
    /// There is room for a stream for which [`Connection::capacity`] was 0 or [`Connection::data`] took less than all.
    Writable {
        /// The stream.
        id: StreamId,
        /// The caller's key.
        key: u64,
    },
    /// The peer takes no more streams. Client: those that it left out follow, as [`Event::Reset`] with `unprocessed`.
    GoAway {
        /// Why.
        code: Code,
    },
    /// The peer's first SETTINGS came.
    Settings,
    /// The answer to [`Connection::ping`].
    Pong,
}

/// A connection error (RFC 9113, 5.4.1). GOAWAY has been appended to the output: write that and close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{text} ({code})")]
pub struct Fatal {
    /// The code that GOAWAY says.
    pub code: Code,
    /// What the peer did, for people; also GOAWAY's debug data.
    pub text: &'static str,
}

impl Fatal {
    const fn new(code: Code, text: &'static str) -> Self {
        Self { code, text }
    }

    const fn protocol(text: &'static str) -> Self {
        Self::new(Code::PROTOCOL_ERROR, text)
    }
}

/// Why no stream was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotOpened {
    /// As many streams are open as the peer allows: wait for one to end.
    #[error("the peer allows no further stream now")]
    Full,
    /// GOAWAY was sent or received: another connection is needed.
    #[error("the connection is leaving")]
    Leaving,
    /// The numbers of streams are used up: another connection is needed.
    #[error("the connection has no stream number left")]
    Exhausted,
}
