//! As much of HTTP/2 as a load generator and its backend need: frames, windows, and requests that are always the same.
//!
//! Header blocks are written by rote and not decoded but for a response's first byte: no library, so that nothing
//! of the product's or of hyper's is measured against itself, and a request costs the generator next to nothing.
//! Sections are of RFC 9113 (frames) and RFC 7541 (HPACK).

use anyhow::{Result, ensure};

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// What a stream may send before the peer says otherwise (6.9.2).
const INITIAL_WINDOW: i64 = 65_535;
/// What we let the peer send on a stream: more than any message here.
const OUR_WINDOW: u32 = 4 << 20;
/// After so many bytes a window is topped up: well below what it holds.
const TOP_UP: u32 = 1 << 20;
/// The windows' limit (6.9.1).
const MAX_WINDOW: u32 = (1 << 31) - 1;
/// The default of `SETTINGS_HEADER_TABLE_SIZE`: enough for the one table that the load builds.
const TABLE: u32 = 4096;

/// One frame.
pub(crate) struct Frame<'a> {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: &'a [u8],
}

impl Frame<'_> {
    pub(crate) fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// Payload without padding and priority; nobody here uses either, but a peer may.
    pub(crate) fn content(&self) -> &[u8] {
        let mut payload = self.payload;
        if self.flags & PADDED != 0
            && let Some((padding, rest)) = payload.split_first()
        {
            payload = &rest[..rest.len().saturating_sub(usize::from(*padding))];
        }
        if self.kind == HEADERS && self.flags & PRIORITY != 0 {
            payload = payload.get(5..).unwrap_or_default();
        }
        payload
    }

    /// The status is 200: the first field is entry 8 of the static table, after any change of the table's size.
    pub(crate) fn is_ok(&self) -> bool {
        let field = self.content().iter().find(|byte| **byte & 0xe0 != 0x20);
        field == Some(&0x88)
    }
}

/// The first frame of `bytes`, and its whole length; `None`: not all there.
pub(crate) fn first(bytes: &[u8]) -> Option<(Frame<'_>, usize)> {
    let head = bytes.first_chunk::<9>()?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
    let payload = bytes.get(9..9 + length)?;
    Some((Frame { kind: head[3], flags: head[4], stream, payload }, 9 + length))
}

/// Writes a frame.
pub(crate) fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("frames here are small");
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Writes a header block in one frame.
pub(crate) fn put_headers(out: &mut Vec<u8>, stream: u32, block: &[u8], end: bool) {
    put(out, HEADERS, END_HEADERS | if end { END_STREAM } else { 0 }, stream, block);
}

/// What both ends of a connection keep count of.
pub(crate) struct Connection {
    /// What the peer may still be sent, over all streams.
    window: i64,
    /// What a new stream may be sent.
    pub(crate) stream_window: i64,
    /// Bytes that came since the connection's window was topped up.
    received: u32,
    /// How large a table of header fields the peer keeps for us.
    pub(crate) table: u32,
    pub(crate) settings_seen: bool,
}

/// What a frame meant for the connection.
pub(crate) enum Meant {
    /// Handled here, or of no interest.
    Nothing,
    /// Streams may be sent more: this one (0: any), by so much.
    Room(u32, i64),
    /// It belongs to a stream.
    Stream,
}

impl Connection {
    /// Writes our settings and a window that is never in the way.
    pub(crate) fn new(out: &mut Vec<u8>) -> Self {
        let mut settings = Vec::new();
        settings.extend_from_slice(&4_u16.to_be_bytes()); // SETTINGS_INITIAL_WINDOW_SIZE
        settings.extend_from_slice(&OUR_WINDOW.to_be_bytes());
        put(out, SETTINGS, 0, 0, &settings);
        put(out, WINDOW_UPDATE, 0, 0, &(MAX_WINDOW - 65_535).to_be_bytes());
        Self {
            window: INITIAL_WINDOW,
            stream_window: INITIAL_WINDOW,
            received: 0,
            table: TABLE,
            settings_seen: false,
        }
    }

    /// Handles what concerns the connection; answers go to `out`.
    pub(crate) fn take(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) -> Result<Meant> {
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                let before = self.stream_window;
                for setting in frame.payload.chunks_exact(6) {
                    let value = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                    match (setting[0], setting[1]) {
                        (0, 1) => self.table = value.min(TABLE),
                        (0, 4) => self.stream_window = i64::from(value),
                        _ => {}
                    }
                }
                self.settings_seen = true;
                put(out, SETTINGS, ACK, 0, &[]);
                Ok(Meant::Room(0, self.stream_window - before))
            }
            PING if frame.flags & ACK == 0 => {
                put(out, PING, ACK, 0, frame.payload);
                Ok(Meant::Nothing)
            }
            WINDOW_UPDATE => {
                let more = frame.payload.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
                if frame.stream == 0 {
                    self.window += i64::from(more);
                    return Ok(Meant::Room(0, 0));
                }
                Ok(Meant::Room(frame.stream, i64::from(more)))
            }
            GOAWAY => {
                let code = frame.payload.get(4..8).unwrap_or_default();
                ensure!(code == [0; 4], "GOAWAY with error {code:?}");
                Ok(Meant::Nothing)
            }
            DATA => {
                self.received += u32::try_from(frame.payload.len()).expect("a frame's length has 24 bits");
                if self.received >= TOP_UP {
                    put(out, WINDOW_UPDATE, 0, 0, &self.received.to_be_bytes());
                    self.received = 0;
                }
                Ok(Meant::Stream)
            }
            HEADERS | RST_STREAM => Ok(Meant::Stream),
            _ => Ok(Meant::Nothing),
        }
    }

    /// Takes `count` bytes off both windows, if both have them.
    pub(crate) fn spend(&mut self, stream: &mut i64, count: usize) -> bool {
        let count = i64::try_from(count).expect("messages here are small");
        if self.window < count || *stream < count {
            return false;
        }
        self.window -= count;
        *stream -= count;
        true
    }
}

/// Tops up a stream's window after `received` bytes; returns what has come since.
pub(crate) fn top_up(out: &mut Vec<u8>, stream: u32, received: u32) -> u32 {
    if received < TOP_UP {
        return received;
    }
    put(out, WINDOW_UPDATE, 0, stream, &received.to_be_bytes());
    0
}

/// A header block that is sent on every stream. The first time it fills the peer's dynamic table, from then on it
/// refers to it: what client libraries do.
pub(crate) struct Block {
    first: Vec<u8>,
    again: Vec<u8>,
    /// For a peer that keeps no table.
    literal: Vec<u8>,
}

impl Block {
    /// `indexed`: fields that stand in the static table whole. `fields`: the others.
    pub(crate) fn new(indexed: &[u8], fields: &[(&str, &str)]) -> Self {
        let indexed: Vec<u8> = indexed.iter().map(|index| 0x80 | index).collect();
        let (mut first, mut again, mut literal) = (indexed.clone(), indexed.clone(), indexed);
        for (at, (name, value)) in fields.iter().enumerate() {
            first.push(0x40); // literal, to be indexed, with a new name (6.2.1)
            literal.push(0x00); // literal, not to be indexed, with a new name (6.2.2)
            for block in [&mut first, &mut literal] {
                for text in [name, value] {
                    block.push(u8::try_from(text.len()).expect("short texts"));
                    block.extend_from_slice(text.as_bytes());
                }
            }
            // The table's newest entry is 62 (2.3.3).
            again.push(0x80 | u8::try_from(62 + fields.len() - 1 - at).expect("few fields"));
        }
        Self { first, again, literal }
    }

    /// The block for a connection's first stream or a later one.
    pub(crate) fn bytes(&self, first: bool, table: u32) -> &[u8] {
        if table < TABLE {
            &self.literal
        } else if first {
            &self.first
        } else {
            &self.again
        }
    }
}

/// A gRPC message of `length` bytes with its prefix (flag and length).
pub(crate) fn message(length: u32) -> Vec<u8> {
    let mut message = vec![0];
    message.extend_from_slice(&length.to_be_bytes());
    message.resize(5 + length as usize, b'x');
    message
}
