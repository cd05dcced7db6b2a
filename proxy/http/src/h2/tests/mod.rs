//! Tests of whole connections. What stands here: one end with its buffers, and frames written by hand.
#![allow(
    clippy::cast_possible_truncation,
    clippy::decimal_bitwise_operands,
    clippy::field_reassign_with_default,
    clippy::large_stack_arrays,
    reason = "frames made by hand, of known sizes"
)]

mod abuse;
mod exchange;
mod frames;
mod leaving;
mod messages;
mod properties;
mod windows;

use super::frame::{HEADER, Header, PREFACE, flag, kind};
use super::*;

pub(super) fn config(role: Role) -> Config {
    Config {
        role,
        streams: 100,
        stream_window: 65_535,
        connection_window: 1 << 20,
        frame_bytes: 1 << 14,
        head_bytes: 16 << 10,
        fields: 100,
        extended_connect: true,
        budget: Budget { resets: 50, errors: 50, frames: 100 },
    }
}

/// An event that owns what it tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    Request {
        id: StreamId,
        head: Vec<String>,
        end: bool,
    },
    TooLarge {
        id: StreamId,
        end: bool,
    },
    Response {
        id: StreamId,
        key: u64,
        head: Vec<String>,
        end: bool,
    },
    /// Pieces that follow each other are joined.
    Data {
        id: StreamId,
        key: u64,
        data: Vec<u8>,
        end: bool,
    },
    Trailers {
        id: StreamId,
        key: u64,
        fields: Vec<String>,
    },
    Reset {
        id: StreamId,
        key: u64,
        code: Code,
        by_peer: bool,
        unprocessed: bool,
    },
    Writable {
        id: StreamId,
        key: u64,
    },
    GoAway {
        code: Code,
    },
    Settings,
    Pong,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn lines(fields: &Fields) -> impl Iterator<Item = String> {
    fields.iter().map(|(name, value)| format!("{}: {}", text(name), text(value)))
}

/// One end of a connection and what it holds.
pub(super) struct End {
    pub(super) connection: Connection,
    pub(super) heads: Heads,
    /// To be sent.
    pub(super) out: Vec<u8>,
    /// Received and not consumed.
    pub(super) input: Vec<u8>,
    /// Whether data is released as it comes.
    pub(super) releases: bool,
}

impl End {
    pub(super) fn new(config: &Config) -> Self {
        let mut out = Vec::new();
        let connection = Connection::new(config, &mut out);
        Self { connection, heads: Heads::default(), out, input: Vec::new(), releases: true }
    }

    /// Receives bytes and returns what they say.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Told>, Fatal> {
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        let mut told = Vec::new();
        loop {
            let (used, event) = self.connection.receive(&input[at..], &mut self.heads, &mut self.out)?;
            at += used;
            let event = match event {
                Event::More => break,
                Event::Request { id, end } => Told::Request { id, head: self.request_lines(), end },
                Event::TooLarge { id, end } => Told::TooLarge { id, end },
                Event::Response { id, key, end } => {
                    Told::Response { id, key, head: self.response_lines(), end }
                }
                Event::Data { id, key, data, end } => {
                    if self.releases {
                        self.connection.release(id, data.len(), &mut self.out);
                    }
                    if let Some(Told::Data { id: last, data: joined, end: ended, .. }) = told.last_mut()
                        && *last == id
                    {
                        joined.extend_from_slice(data);
                        *ended = end;
                        continue;
                    }
                    Told::Data { id, key, data: data.to_vec(), end }
                }
                Event::Trailers { id, key } => {
                    Told::Trailers { id, key, fields: lines(&self.heads.trailers).collect() }
                }
                Event::Reset { id, key, code, by_peer, unprocessed } => {
                    Told::Reset { id, key, code, by_peer, unprocessed }
                }
                Event::Writable { id, key } => Told::Writable { id, key },
                Event::GoAway { code } => Told::GoAway { code },
                Event::Settings => Told::Settings,
                Event::Pong => Told::Pong,
            };
            told.push(event);
        }
        self.input = input[at..].to_vec();
        Ok(told)
    }

    /// Feeds what must be fine and say nothing.
    pub(super) fn quiet(&mut self, bytes: &[u8]) {
        assert_eq!(self.feed(bytes), Ok(vec![]));
    }

    /// Feeds what must be a connection error, and returns its code; GOAWAY says the same.
    pub(super) fn fails(&mut self, bytes: &[u8]) -> Code {
        let fatal = self.feed(bytes).expect_err("a connection error");
        let sent = self.sent();
        let (header, payload) = sent.last().expect("GOAWAY");
        assert_eq!(header.kind, kind::GOAWAY);
        assert_eq!(super::frame::goaway(payload).unwrap().1, fatal.code);
        assert_eq!(self.feed(b"anything"), Ok(vec![]));
        fatal.code
    }

    /// Frames to be sent, which are then gone.
    pub(super) fn sent(&mut self) -> Vec<(Header, Vec<u8>)> {
        let out = std::mem::take(&mut self.out);
        let mut rest = out.strip_prefix(PREFACE).unwrap_or(&out);
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let header = Header::parse(rest).expect("whole frames");
            let whole = HEADER + header.len as usize;
            frames.push((header, rest[HEADER..whole].to_vec()));
            rest = &rest[whole..];
        }
        frames
    }

    /// The resets among the frames to be sent.
    pub(super) fn resets(&mut self) -> Vec<(StreamId, Code)> {
        let frames = self.sent().into_iter();
        frames
            .filter(|(header, _)| header.kind == kind::RST_STREAM)
            .map(|(header, payload)| (header.stream, Code(u32::from_be_bytes(payload.try_into().unwrap()))))
            .collect()
    }

    fn request_lines(&self) -> Vec<String> {
        let head = &self.heads.request;
        assert_eq!(head.version, crate::head::Version::Http2);
        let mut told = vec![text(head.method())];
        for (name, part) in [
            (":scheme", head.scheme()),
            (":authority", head.authority()),
            (":path", head.path()),
            (":protocol", head.protocol()),
        ] {
            told.extend(part.map(|part| format!("{name}: {}", text(part))));
        }
        told.extend(lines(&head.fields));
        told
    }

    fn response_lines(&self) -> Vec<String> {
        let head = &self.heads.response;
        let mut told = vec![head.status.to_string()];
        told.extend(lines(&head.fields));
        told
    }
}

/// A server whose client has begun the connection, with nothing left to send.
pub(super) fn server() -> End {
    server_with(&config(Role::Server))
}

pub(super) fn server_with(config: &Config) -> End {
    let mut server = End::new(config);
    let begin =
        [PREFACE, &frame(kind::SETTINGS, 0, 0, &[]), &frame(kind::SETTINGS, flag::ACK, 0, &[])].concat();
    assert_eq!(server.feed(&begin), Ok(vec![Told::Settings]));
    server.out.clear();
    server
}

/// A client whose server has begun the connection, with nothing left to send.
pub(super) fn client() -> End {
    let mut client = End::new(&config(Role::Client));
    let begin = [frame(kind::SETTINGS, 0, 0, &[]), frame(kind::SETTINGS, flag::ACK, 0, &[])].concat();
    assert_eq!(client.feed(&begin), Ok(vec![Told::Settings]));
    client.out.clear();
    client
}

/// Carries what both have to say to and fro, until nobody says anything.
pub(super) fn pump(client: &mut End, server: &mut End) -> (Vec<Told>, Vec<Told>) {
    let mut told = (Vec::new(), Vec::new());
    while !client.out.is_empty() || !server.out.is_empty() {
        let bytes = std::mem::take(&mut client.out);
        told.1.extend(server.feed(&bytes).unwrap());
        let bytes = std::mem::take(&mut server.out);
        told.0.extend(client.feed(&bytes).unwrap());
    }
    told
}

/// A client and a server that have seen each other's SETTINGS.
pub(super) fn pair(client: &Config, server: &Config) -> (End, End) {
    let (mut client, mut server) = (End::new(client), End::new(server));
    assert_eq!(pump(&mut client, &mut server), (vec![Told::Settings], vec![Told::Settings]));
    (client, server)
}

/// A frame.
pub(super) fn frame(kind: u8, flags: u8, stream: StreamId, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Header { len: payload.len() as u32, kind, flags, stream }.write(&mut out);
    out.extend_from_slice(payload);
    out
}

/// Field lines as literals, exactly as given.
pub(super) fn block(lines: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in lines {
        out.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            out.push(text.len() as u8);
            out.extend_from_slice(text.as_bytes());
        }
    }
    out
}

/// HEADERS with a whole block.
pub(super) fn headers(id: StreamId, end: bool, lines: &[(&str, &str)]) -> Vec<u8> {
    let end = if end { flag::END_STREAM } else { flag::NONE };
    frame(kind::HEADERS, flag::END_HEADERS | end, id, &block(lines))
}

pub(super) const GET: &[(&str, &str)] =
    &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")];

pub(super) fn get(id: StreamId) -> Vec<u8> {
    headers(id, true, GET)
}

/// A request whose body is to come.
pub(super) fn post(id: StreamId) -> Vec<u8> {
    headers(id, false, &[(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a")])
}

pub(super) fn data(id: StreamId, end: bool, bytes: &[u8]) -> Vec<u8> {
    frame(kind::DATA, if end { flag::END_STREAM } else { flag::NONE }, id, bytes)
}

pub(super) fn number(kind: u8, id: StreamId, number: u32) -> Vec<u8> {
    frame(kind, flag::NONE, id, &number.to_be_bytes())
}

pub(super) fn setting(parameter: u16, value: u32) -> Vec<u8> {
    let payload = [&parameter.to_be_bytes()[..], &value.to_be_bytes()].concat();
    frame(kind::SETTINGS, flag::NONE, 0, &payload)
}

pub(super) fn request_head(method: &str, path: &str) -> RequestHead {
    let mut head = RequestHead::default();
    head.set_method(method.as_bytes());
    head.set_authority(Some(b"a"));
    head.set_path(Some(path.as_bytes()));
    head
}

pub(super) fn response_head(status: u16) -> ResponseHead {
    let mut head = ResponseHead::default();
    head.status = status;
    head
}
