//! SETTINGS (RFC 9113, 6.5; RFC 8441): what the peer asked for, and what we ask for.

use super::frame::{Header, MIN_FRAME_BYTES, flag, kind};
use super::{Code, Config, Fatal, Role, flow};

const HEADER_TABLE_SIZE: u16 = 0x1;
const ENABLE_PUSH: u16 = 0x2;
const MAX_CONCURRENT_STREAMS: u16 = 0x3;
const INITIAL_WINDOW_SIZE: u16 = 0x4;
const MAX_FRAME_SIZE: u16 = 0x5;
const MAX_HEADER_LIST_SIZE: u16 = 0x6;
const ENABLE_CONNECT_PROTOCOL: u16 = 0x8;

/// The size of an HPACK dynamic table unless SETTINGS say otherwise, in bytes. We keep it for our decoder.
pub(super) const HEADER_TABLE_BYTES: u32 = 4096;

/// How many streams a client opens before it has seen the server's SETTINGS. The RFC has no limit there; 100 is the
/// least that it asks servers to allow (6.5.2), so more would risk refusals.
const STREAMS_UNTOLD: u32 = 100;

/// What the peer set, as far as it binds us. Its MAX_HEADER_LIST_SIZE is advice (6.5.2) that only the application could
/// follow.
#[derive(Debug)]
pub(super) struct Peer {
    /// Bytes of dynamic table that the peer's decoder keeps for us.
    pub(super) table_bytes: u32,
    pub(super) streams: u32,
    /// The send window of a new stream.
    pub(super) window: i32,
    pub(super) frame_bytes: u32,
    pub(super) extended_connect: bool,
    /// Whether SETTINGS came at all.
    pub(super) known: bool,
}

impl Peer {
    pub(super) fn new() -> Self {
        Self {
            table_bytes: HEADER_TABLE_BYTES,
            streams: STREAMS_UNTOLD,
            window: flow::INITIAL,
            frame_bytes: MIN_FRAME_BYTES,
            extended_connect: false,
            known: false,
        }
    }

    /// Takes over a SETTINGS payload. Of several values for one parameter the last counts, as if each had been applied
    /// in turn.
    pub(super) fn apply(&mut self, payload: &[u8], role: Role) -> Result<(), Fatal> {
        let (entries, rest) = payload.as_chunks::<6>();
        if !rest.is_empty() {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "SETTINGS is no multiple of six bytes"));
        }
        if !self.known {
            self.known = true;
            // Silence about it in the first SETTINGS means: no limit.
            self.streams = u32::MAX;
        }
        for &[a, b, c, d, e, f] in entries {
            let value = u32::from_be_bytes([c, d, e, f]);
            match (u16::from_be_bytes([a, b]), value) {
                (HEADER_TABLE_SIZE, _) => self.table_bytes = value,
                (ENABLE_PUSH, 0) => {}
                // Clients may allow it: we never push.
                (ENABLE_PUSH, 1) if role == Role::Server => {}
                (ENABLE_PUSH, _) => {
                    return Err(Fatal::new(Code::PROTOCOL_ERROR, "ENABLE_PUSH has no such value"));
                }
                (MAX_CONCURRENT_STREAMS, _) => self.streams = value,
                (INITIAL_WINDOW_SIZE, _) => {
                    self.window = i32::try_from(value).map_err(|_| {
                        Fatal::new(Code::FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE exceeds 2^31-1")
                    })?;
                }
                (MAX_FRAME_SIZE, MIN_FRAME_BYTES..0x0100_0000) => self.frame_bytes = value,
                (MAX_FRAME_SIZE, _) => {
                    return Err(Fatal::new(Code::PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range"));
                }
                (ENABLE_CONNECT_PROTOCOL, 1) => self.extended_connect = true,
                (ENABLE_CONNECT_PROTOCOL, 0) if !self.extended_connect => {}
                (ENABLE_CONNECT_PROTOCOL, _) => {
                    return Err(Fatal::new(
                        Code::PROTOCOL_ERROR,
                        "ENABLE_CONNECT_PROTOCOL has no such value",
                    ));
                }
                // Unknown parameters are ignored (6.5.2), and so is the advice about field sections.
                _ => {}
            }
        }
        Ok(())
    }
}

/// Appends our SETTINGS.
pub(super) fn write(config: &Config, out: &mut Vec<u8>) {
    let mut entries = [(0, 0); 6];
    let mut count = 0;
    let mut add = |parameter: u16, value: u32| {
        entries[count] = (parameter, value);
        count += 1;
    };
    match config.role {
        Role::Client => add(ENABLE_PUSH, 0),
        Role::Server => add(MAX_CONCURRENT_STREAMS, config.streams),
    }
    add(INITIAL_WINDOW_SIZE, config.stream_window);
    add(MAX_FRAME_SIZE, config.frame_bytes);
    add(MAX_HEADER_LIST_SIZE, config.head_bytes);
    if config.role == Role::Server && config.extended_connect {
        add(ENABLE_CONNECT_PROTOCOL, 1);
    }
    let len = u32::try_from(count * 6).expect("a handful of parameters");
    Header { len, kind: kind::SETTINGS, flags: flag::NONE, stream: 0 }.write(out);
    for (parameter, value) in &entries[..count] {
        out.extend_from_slice(&parameter.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

/// Appends the acknowledgement of the peer's SETTINGS.
pub(super) fn write_ack(out: &mut Vec<u8>) {
    Header { len: 0, kind: kind::SETTINGS, flags: flag::ACK, stream: 0 }.write(out);
}
