//! Frames as bytes (RFC 9113, 4 and 6): the header of each, and the small frames written whole.
//!
//! What a frame means is decided in [`connection`](super::connection); nothing here knows a state.
#![allow(clippy::many_single_char_names, reason = "the bytes of a header")]

use super::{Code, StreamId};

/// Bytes of a frame's header (4.1).
pub(super) const HEADER: usize = 9;

/// The largest payload that every endpoint must take (4.2), in bytes.
pub(super) const MIN_FRAME_BYTES: u32 = 1 << 14;

/// What a client sends first (3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types (6).
pub(super) mod kind {
    pub(in super::super) const DATA: u8 = 0;
    pub(in super::super) const HEADERS: u8 = 1;
    pub(in super::super) const PRIORITY: u8 = 2;
    pub(in super::super) const RST_STREAM: u8 = 3;
    pub(in super::super) const SETTINGS: u8 = 4;
    pub(in super::super) const PUSH_PROMISE: u8 = 5;
    pub(in super::super) const PING: u8 = 6;
    pub(in super::super) const GOAWAY: u8 = 7;
    pub(in super::super) const WINDOW_UPDATE: u8 = 8;
    pub(in super::super) const CONTINUATION: u8 = 9;
}

/// Flags (6). A bit means something only on the types that define it.
pub(super) mod flag {
    pub(in super::super) const NONE: u8 = 0;
    pub(in super::super) const END_STREAM: u8 = 0x1;
    pub(in super::super) const ACK: u8 = 0x1;
    pub(in super::super) const END_HEADERS: u8 = 0x4;
    pub(in super::super) const PADDED: u8 = 0x8;
    pub(in super::super) const PRIORITY: u8 = 0x20;
}

/// The header of a frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// Bytes of payload; 24 bits.
    pub(super) len: u32,
    pub(super) kind: u8,
    pub(super) flags: u8,
    /// 0 is the connection itself.
    pub(super) stream: StreamId,
}

impl Header {
    /// The header at the start of `input`; `None` while it is not complete. The reserved bit is ignored (4.1).
    pub(super) fn parse(input: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, ref stream @ ..] = input.first_chunk::<HEADER>()?;
        Some(Self { len: u32::from_be_bytes([0, a, b, c]), kind, flags, stream: id(*stream) })
    }

    /// Whether a flag is set.
    pub(super) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn bytes(self) -> [u8; HEADER] {
        let [_, a, b, c] = self.len.to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }

    /// Appends the header.
    pub(super) fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes());
    }

    /// Writes the header over the [`HEADER`] bytes at `at`, which were kept free for it.
    pub(super) fn write_at(self, at: usize, out: &mut [u8]) {
        out[at..at + HEADER].copy_from_slice(&self.bytes());
    }
}

/// 31 bits; the reserved one is ignored.
fn id(bytes: [u8; 4]) -> StreamId {
    u32::from_be_bytes(bytes) & 0x7fff_ffff
}

/// A payload that is one 31-bit number: WINDOW_UPDATE.
pub(super) fn number(payload: &[u8]) -> Option<u32> {
    Some(id(payload.try_into().ok()?))
}

/// The last stream and the code of a GOAWAY (6.8); the debug data behind them is ignored.
pub(super) fn goaway(payload: &[u8]) -> Option<(StreamId, Code)> {
    let (last, rest) = payload.split_first_chunk::<4>()?;
    Some((id(*last), Code(u32::from_be_bytes(*rest.first_chunk::<4>()?))))
}

/// Appends RST_STREAM (6.4).
pub(super) fn write_reset(stream: StreamId, code: Code, out: &mut Vec<u8>) {
    write_number(kind::RST_STREAM, stream, code.0, out);
}

/// Appends WINDOW_UPDATE (6.9).
pub(super) fn write_window_update(stream: StreamId, increment: u32, out: &mut Vec<u8>) {
    write_number(kind::WINDOW_UPDATE, stream, increment, out);
}

fn write_number(kind: u8, stream: StreamId, number: u32, out: &mut Vec<u8>) {
    Header { len: 4, kind, flags: flag::NONE, stream }.write(out);
    out.extend_from_slice(&number.to_be_bytes());
}

/// Appends PING (6.7).
pub(super) fn write_ping(flags: u8, payload: [u8; 8], out: &mut Vec<u8>) {
    Header { len: 8, kind: kind::PING, flags, stream: 0 }.write(out);
    out.extend_from_slice(&payload);
}

/// Appends GOAWAY (6.8) with a text for whoever reads the peer's log.
pub(super) fn write_goaway(last: StreamId, code: Code, text: &'static str, out: &mut Vec<u8>) {
    let len = 8 + u32::try_from(text.len()).expect("our texts are short");
    Header { len, kind: kind::GOAWAY, flags: flag::NONE, stream: 0 }.write(out);
    out.extend_from_slice(&last.to_be_bytes());
    out.extend_from_slice(&code.0.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
