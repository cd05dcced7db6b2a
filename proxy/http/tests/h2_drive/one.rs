//! One end of a connection against a peer that may send anything, in any cut, while the caller does what callers do.
//!
//! What must hold: no panic; what is to be sent is bounded by what came in and by what the caller sent; each call makes
//! progress; events come in an order that a caller can rely on; no more data is outstanding than the windows allow.

use super::Plan;
use outrigger_http::fields::Fields;
use outrigger_http::h2::{Budget, Code, Config, Connection, Event, Heads, Role, StreamId};
use outrigger_http::head::{RequestHead, ResponseHead};
use std::collections::BTreeMap;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The caller's picture of a stream.
#[derive(Default)]
struct Stream {
    /// Bytes that were received and not released.
    held: usize,
    /// The peer's half has ended.
    ended: bool,
    /// Our half has ended.
    answered: bool,
    headed: bool,
}

struct End {
    connection: Connection,
    config: Config,
    heads: Heads,
    input: Vec<u8>,
    out: Vec<u8>,
    received: Vec<u8>,
    /// Bytes of `out` that the caller asked for.
    asked: usize,
    streams: BTreeMap<StreamId, Stream>,
    held: usize,
    /// Server: one more than the last stream that the peer has opened.
    last_opened: StreamId,
    dead: bool,
}

/// One run as a server.
pub(crate) fn server(bytes: &[u8]) {
    run(Role::Server, bytes);
}

/// One run as a client.
pub(crate) fn client(bytes: &[u8]) {
    run(Role::Client, bytes);
}

fn run(role: Role, bytes: &[u8]) {
    let plan = &mut Plan::new(bytes);
    let budget = plan.one_of(&[3, 50, 1 << 20, 1 << 20]);
    let config = Config {
        role,
        streams: plan.one_of(&[1, 3, 100]),
        stream_window: plan.one_of(&[0, 1, 100, 65_535, 1 << 20]),
        connection_window: plan.one_of(&[0, 65_536, 1 << 20]),
        frame_bytes: 1 << 14,
        head_bytes: plan.one_of(&[100, 200, 4096, 65_536]),
        fields: plan.one_of(&[3, 100]),
        extended_connect: plan.once_in(2),
        budget: Budget { resets: budget, errors: budget, frames: budget },
    };
    let mut out = Vec::new();
    let connection = Connection::new(&config, &mut out);
    let mut end = End {
        connection,
        config,
        heads: Heads::default(),
        input: Vec::new(),
        asked: out.len(),
        out,
        received: Vec::new(),
        streams: BTreeMap::new(),
        held: 0,
        last_opened: 0,
        dead: false,
    };
    let mut wire = Vec::new();
    if !plan.once_in(32) {
        if role == Role::Server {
            wire.extend_from_slice(PREFACE);
        }
        frame(&mut wire, 4, 0, 0, &[]);
    }
    while !plan.is_done() && !end.dead {
        peer(plan, &mut end, &mut wire);
        while !wire.is_empty() && !end.dead {
            // Most of the time whole: the interesting states lie deep.
            let cut = if plan.once_in(4) { usize::from(plan.byte()) } else { wire.len() };
            let rest = wire.split_off(cut.clamp(1, wire.len()));
            end.feed(&wire);
            wire = rest;
        }
        end.act(plan);
    }
    // Whatever happened, all of it can be given back.
    let held: Vec<_> = end.streams.iter().map(|(&id, stream)| (id, stream.held)).collect();
    for (id, held) in held {
        end.connection.release(id, held, &mut end.out);
    }
    end.connection.tick();
    // Half a window more than there is, so that what the connection has not told yet is told.
    let extra = end.window() / 2;
    end.connection.release(0, extra, &mut end.out);
    end.check_windows(extra);
}

/// What the peer sends next. Mostly what a peer may send, for the first error ends it all; now and then anything.
fn peer(plan: &mut Plan<'_>, end: &mut End, wire: &mut Vec<u8>) {
    let any = plan.once_in(48);
    let id = if any {
        plan.one_of(&[1, 3, 5, 9, 15, 2, 0, 1 << 30, (1 << 31) - 1])
    } else {
        end.some_stream(plan, |stream| !stream.ended)
    };
    match plan.byte() % 16 {
        // Nothing is open, and only a client can change that.
        3..=9 | 15 if id == 0 && !any => {}
        0..=2 if id == 0 && end.config.role == Role::Client => {}
        0 if any => {
            let count = usize::from(plan.byte());
            wire.extend_from_slice(plan.take(count));
        }
        1..=2 if any => {
            let (kind, flags) = (plan.byte() % 12, plan.byte());
            let count = usize::from(plan.byte());
            frame(wire, kind, flags, id, plan.take(count));
        }
        0..=2 => match end.config.role {
            Role::Server => {
                end.last_opened += 2;
                headers(plan, end.last_opened - 1, REQUESTS, any, wire);
            }
            Role::Client => headers(plan, id, RESPONSES, any, wire),
        },
        3 => headers(plan, id, RESPONSES, any, wire),
        // Trailers.
        4 => headers(plan, id, &[&[], &[0x40, 1, b'b', 1, b'c'], &[0x40, 1, b'd', 0, 0xbe]], any, wire),
        5..=8 => {
            let length = plan.one_of(&[0, 1, 10, 100, 1000, 16_384 + usize::from(any)]);
            let flags = plan.one_of(if length > 0 || any { &[0, 0, 0, 1, 8, 8, 8, 9] } else { &[0, 1] });
            let mut payload = vec![b'd'; length];
            if let (true, Some(padding)) = (flags & 8 != 0, payload.first_mut()) {
                *padding = if any { plan.byte() } else { (length - 1).min(usize::from(plan.byte())) as u8 };
            }
            frame(wire, 0, flags, id, &payload);
        }
        9 => frame(wire, 3, 0, id, &u32::from(plan.byte() % 16).to_be_bytes()),
        10 => {
            let values = [0, 1, 100, 16_384, 65_535, i32::MAX as u32, u32::MAX];
            let (parameter, value) = if any {
                (plan.byte() % 10, plan.one_of(&values))
            } else {
                let usual =
                    [(1, 0), (1, 4096), (3, 1), (3, 100), (4, 1), (4, 65_535), (4, 1 << 20), (5, 65_536)];
                plan.one_of(&usual)
            };
            let payload = [&[0, parameter][..], &value.to_be_bytes()].concat();
            frame(wire, 4, 0, 0, &payload);
        }
        11 => frame(wire, 4, 1, 0, &[]),
        12..=13 => {
            let id = if plan.once_in(2) { 0 } else { id };
            let increment: u32 =
                if any { plan.one_of(&[0, i32::MAX as u32]) } else { plan.one_of(&[1, 100, 65_535]) };
            frame(wire, 8, 0, id, &increment.to_be_bytes());
        }
        14 => {
            let payload = plan.one_of(&[b"draining", b"liveness", b"whatever"]);
            frame(wire, 6, plan.byte() % 2, 0, payload);
        }
        _ if any => {
            let payload = [id.to_be_bytes(), u32::from(plan.byte() % 16).to_be_bytes()].concat();
            frame(wire, 7, 0, 0, &payload);
        }
        _ => frame(wire, 2, 0, id, &[0, 0, 0, 0, 7]),
    }
}

const REQUESTS: &[&[u8]] = &[
    &[0x82, 0x86, 0x84, 0x41, 1, b'a'],
    &[0x02, 7, b'C', b'O', b'N', b'N', b'E', b'C', b'T', 0x41, 1, b'a'],
    &[0x83, 0x86, 0x84, 0x0f, 13, 2, b'1', b'0'],
    &[0x82, 0x86, 0x84, 0x40, 1, b'b', 2, b'c', b'd', 0xbe, 0xbe, 0xbe, 0xbe],
];

const RESPONSES: &[&[u8]] =
    &[&[0x88], &[0x8d, 0x40, 1, b'b', 1, b'c'], &[0x08, 3, b'1', b'0', b'0'], &[0x88, 0x0f, 13, 1, b'9']];

/// HEADERS, and CONTINUATION now and then.
fn headers(plan: &mut Plan<'_>, id: u32, starts: &[&[u8]], any: bool, wire: &mut Vec<u8>) {
    let count = if any { usize::from(plan.byte() % 64) } else { 0 };
    let block = [plan.one_of(starts), plan.take(count)].concat();
    let end = u8::from(plan.once_in(2));
    if plan.once_in(8) {
        let (first, second) = block.split_at(block.len() / 2);
        frame(wire, 1, end, id, first);
        frame(wire, 9, 4 * u8::from(!any), id, second);
    } else {
        frame(wire, 1, 4 | end, id, &block);
    }
}

fn frame(wire: &mut Vec<u8>, kind: u8, flags: u8, id: u32, payload: &[u8]) {
    wire.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    wire.extend_from_slice(&[kind, flags]);
    wire.extend_from_slice(&id.to_be_bytes());
    wire.extend_from_slice(payload);
}

/// Type, flags, stream and payload.
type Frame<'a> = (u8, u8, u32, &'a [u8]);

/// The frames in these bytes, behind a preface if there is one, and whether nothing was left over.
fn frames(bytes: &[u8]) -> (Vec<Frame<'_>>, bool) {
    let mut rest = bytes.strip_prefix(PREFACE).unwrap_or(bytes);
    let mut frames = Vec::new();
    while let [a, b, c, kind, flags, d, e, f, g, tail @ ..] = rest {
        let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some((payload, tail)) = tail.split_at_checked(len) else { return (frames, false) };
        frames.push((*kind, *flags, u32::from_be_bytes([*d, *e, *f, *g]) & !(1 << 31), payload));
        rest = tail;
    }
    (frames, rest.is_empty())
}

impl End {
    fn feed(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        // Each frame has nine bytes; streams that were left out or may send again cost none.
        let mut steps = input.len() + 2 * self.streams.len() + 2;
        loop {
            steps = steps.checked_sub(1).expect("no event without progress");
            let step = self.connection.receive(&input[at..], &mut self.heads, &mut self.out);
            let (used, event) = match step {
                Ok(step) => step,
                Err(fatal) => return self.fail(&fatal.to_string()),
            };
            at += used;
            if event == Event::More {
                break;
            }
            self.note(event);
        }
        self.input.extend_from_slice(&input[at..]);
        // A frame, or the preface and less than a frame's header.
        assert!(self.input.len() <= self.config.frame_bytes as usize + 33, "too much is left to the caller");
        self.check_out();
    }

    /// A `WINDOW_UPDATE` for a byte and one for its stream are the dearest that a byte in a frame of its own can cause.
    fn check_out(&self) {
        assert!(
            self.out.len() <= 300 + 4 * self.received.len() + self.asked,
            "answers outgrow what they answer"
        );
    }

    /// One of the latest streams for which this is so; 0 if there is none.
    fn some_stream(&self, plan: &mut Plan<'_>, is_so: impl Fn(&Stream) -> bool) -> StreamId {
        let fitting = self.streams.iter().rev().filter(|(_, stream)| is_so(stream)).take(4);
        let fitting: Vec<_> = fitting.map(|(&id, _)| id).collect();
        if fitting.is_empty() { 0 } else { plan.one_of(&fitting) }
    }

    /// Of the connection, in bytes.
    fn window(&self) -> usize {
        self.config.connection_window.max(65_535) as usize
    }

    /// All data was released, and `extra` bytes: what is sent is frames, and of the connection's window nothing was lost.
    fn check_windows(&self, extra: usize) {
        let (sent, whole) = frames(&self.out);
        assert!(whole, "what is sent is frames");
        let (received, whole) = frames(&self.received);
        if self.dead || !whole {
            return;
        }
        let more = |&(_, _, id, payload): &Frame<'_>| match payload.first_chunk::<4>() {
            Some(increment) if id == 0 => u32::from_be_bytes(*increment) as usize,
            _ => 0,
        };
        let told: usize = sent.iter().filter(|frame| frame.0 == 8).map(more).sum();
        let used: usize = received.iter().filter(|frame| frame.0 == 0).map(|frame| frame.3.len()).sum();
        assert_eq!(told, used + self.window() - 65_535 + extra, "window was lost or made up");
    }

    fn fail(&mut self, text: &str) {
        assert!(!text.is_empty());
        self.dead = true;
        self.check_out();
        let before = self.out.len();
        let after = self.connection.receive(b"more", &mut self.heads, &mut self.out);
        assert_eq!(after, Ok((4, Event::More)));
        assert_eq!(self.out.len(), before, "the dead are silent");
        assert!(self.connection.is_leaving());
    }

    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Request { id, end } | Event::TooLarge { id, end } => {
                assert_eq!(self.config.role, Role::Server);
                self.connection.attach(id, u64::from(id));
                let old = self.streams.insert(id, Stream { ended: end, headed: true, ..Stream::default() });
                assert!(old.is_none(), "a stream is opened twice");
                if matches!(event, Event::Request { .. }) {
                    let head = &self.heads.request;
                    assert!(!head.method().is_empty());
                    assert!(head.fields.len() <= self.config.fields);
                    assert!(head.fields.list_size() <= self.config.head_bytes as usize);
                    check_lines(&head.fields);
                }
            }
            Event::Response { id, key, end } => {
                assert_eq!(self.config.role, Role::Client);
                let stream = self.open(id, key);
                assert!(!stream.headed && !stream.ended);
                stream.ended = end;
                let head = &self.heads.response;
                assert!((100..1000).contains(&head.status) && head.status != 101);
                let final_one = !head.is_interim();
                assert!(final_one || !end);
                check_lines(&head.fields);
                self.streams.get_mut(&id).unwrap().headed = final_one;
            }
            Event::Data { id, key, data, end } => {
                let stream = self.open(id, key);
                assert!(stream.headed && !stream.ended);
                assert!(!data.is_empty() || end);
                stream.ended = end;
                stream.held += data.len();
                self.held += data.len();
                assert!(self.held <= self.window(), "more than the window came through");
            }
            Event::Trailers { id, key } => {
                let stream = self.open(id, key);
                assert!(stream.headed && !stream.ended);
                stream.ended = true;
                check_lines(&self.heads.trailers);
            }
            Event::Reset { id, key, .. } => {
                let stream = self.open(id, key);
                (stream.ended, stream.answered) = (true, true);
            }
            Event::Writable { id, key } => {
                let stream = self.open(id, key);
                assert!(!stream.answered);
                assert!(self.connection.capacity(id) > 0, "room was promised");
            }
            Event::GoAway { .. } => assert!(self.connection.is_leaving()),
            Event::Settings => assert!(self.connection.peer_extended_connect().is_some()),
            Event::Pong => {}
            Event::More => unreachable!("the loop ends with it"),
        }
    }

    /// A stream that events may still come for.
    fn open(&mut self, id: StreamId, key: u64) -> &mut Stream {
        assert_eq!(key, u64::from(id));
        let stream = self.streams.get_mut(&id).expect("a stream that the caller knows");
        assert!(!(stream.ended && stream.answered), "an event for a stream that is gone");
        stream
    }

    /// What the caller does next.
    fn act(&mut self, plan: &mut Plan<'_>) {
        let before = self.out.len();
        let likely = plan.byte();
        let id = self.some_stream(plan, |stream| likely < 16 || !stream.answered || stream.held > 0);
        match plan.byte() % 16 {
            0..=2 => self.head(plan, id),
            3..=4 => {
                let (body, end) = (vec![b'x'; plan.number()], plan.once_in(2));
                if let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.answered) {
                    let room = self.connection.capacity(id);
                    let taken = self.connection.data(id, &body, end, &mut self.out);
                    assert_eq!(taken, room.min(body.len()));
                    stream.answered = end && taken == body.len();
                } else {
                    assert_eq!(self.connection.capacity(id), 0);
                    assert_eq!(self.connection.data(id, &body, end, &mut self.out), body.len());
                    assert_eq!(self.out.len(), before);
                }
            }
            5 => {
                let mut fields = Fields::default();
                fields.push(b"Grpc-Status", b"0");
                self.connection.trailers(id, &fields, &mut self.out);
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.answered = true;
                }
            }
            6 => {
                self.connection.reset(id, Code::CANCEL, &mut self.out);
                if let Some(stream) = self.streams.get_mut(&id) {
                    (stream.ended, stream.answered) = (true, true);
                }
            }
            7..=9 => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    let bytes = stream.held.min(plan.number());
                    stream.held -= bytes;
                    self.held -= bytes;
                    self.connection.release(id, bytes, &mut self.out);
                }
            }
            10 => self.connection.tick(),
            11 => self.connection.ping(&mut self.out),
            12 if plan.once_in(8) => self.connection.drain(&mut self.out),
            13 if plan.once_in(8) => self.connection.close(Code::NO_ERROR, &mut self.out),
            _ => assert!(self.connection.open_streams() <= self.streams.len() + 1),
        }
        self.asked += self.out.len() - before;
    }

    fn head(&mut self, plan: &mut Plan<'_>, id: StreamId) {
        let end = plan.once_in(2);
        match self.config.role {
            Role::Server => {
                let mut head = ResponseHead::default();
                head.status = plan.one_of(&[200, 204, 100, 503]);
                head.fields.push(b"Server", b"driven");
                self.connection.response(id, &head, end, &mut self.out);
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.answered |= end && !head.is_interim();
                }
            }
            Role::Client => {
                let mut head = RequestHead::default();
                head.set_method(plan.one_of(&[b"GET", b"PUT"]));
                head.set_path(Some(b"/"));
                head.set_authority(Some(b"a"));
                let next = self.streams.keys().next_back().map_or(1, |last| last + 2);
                let room = self.connection.available();
                match self.connection.request(&head, end, u64::from(next), &mut self.out) {
                    Ok(id) => {
                        assert!(room > 0);
                        assert_eq!(id, next);
                        self.streams.insert(id, Stream { answered: end, ..Stream::default() });
                    }
                    Err(_) => assert_eq!(room, 0),
                }
            }
        }
    }
}

/// Lines that can be written into an HTTP/1.1 message without becoming two.
fn check_lines(fields: &Fields) {
    for (name, value) in fields.iter() {
        assert!(!name.is_empty());
        assert!(
            name.iter().all(|byte| byte.is_ascii_graphic() && *byte != b':' && !byte.is_ascii_uppercase())
        );
        assert!(!value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')));
    }
}
