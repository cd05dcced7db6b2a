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
    received: usize,
    /// Bytes of `out` that the caller asked for.
    asked: usize,
    streams: BTreeMap<StreamId, Stream>,
    held: usize,
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
    let budget = plan.one_of(&[2, 50, 1 << 20]);
    let config = Config {
        role,
        streams: plan.one_of(&[1, 3, 100]),
        stream_window: plan.one_of(&[0, 1, 100, 65_535, 1 << 20]),
        connection_window: plan.one_of(&[0, 65_536, 1 << 20]),
        frame_bytes: 1 << 14,
        head_bytes: plan.one_of(&[0, 200, 4096, 65_536]),
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
        received: 0,
        streams: BTreeMap::new(),
        held: 0,
        dead: false,
    };
    let mut wire = Vec::new();
    if !plan.once_in(8) {
        if role == Role::Server {
            wire.extend_from_slice(PREFACE);
        }
        frame(&mut wire, 4, 0, 0, &[]);
    }
    while !plan.is_done() && !end.dead {
        peer(plan, &mut wire);
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
}

/// What the peer sends next: anything at all, or a frame that is one at least in form.
fn peer(plan: &mut Plan<'_>, wire: &mut Vec<u8>) {
    let id =
        |plan: &mut Plan<'_>| plan.one_of(&[1_u32, 3, 5, 7, 9, 11, 13, 15, 2, 0, 1 << 30, (1 << 31) - 1]);
    match plan.byte() % 16 {
        0 => {
            let count = usize::from(plan.byte());
            wire.extend_from_slice(plan.take(count));
        }
        1 => {
            let (kind, flags, id) = (plan.byte() % 12, plan.byte(), id(plan));
            let count = usize::from(plan.byte());
            frame(wire, kind, flags, id, plan.take(count));
        }
        // HEADERS with a request, a response or trailers, and more behind it.
        2..=5 => {
            let request: &[u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'a'];
            let connect: &[u8] = &[0x02, 7, b'C', b'O', b'N', b'N', b'E', b'C', b'T', 0x41, 1, b'a'];
            let large: &[u8] =
                &[0x82, 0x86, 0x84, 0x41, 1, b'a', 0x40, 1, b'b', 2, b'c', b'd', 0xbe, 0xbe, 0xbe, 0xbe];
            let start = plan.one_of(&[
                request,
                request,
                connect,
                large,
                &[0x88],
                &[0x88],
                &[0x08, 3, b'1', b'0', b'0'],
                &[],
            ]);
            let flags = plan.one_of(&[4, 5, 4, 5, 0, 1]);
            let id = id(plan);
            let count = usize::from(plan.byte() % 64);
            let block = [start, plan.take(count)].concat();
            frame(wire, 1, flags, id, &block);
        }
        6..=8 => {
            let (flags, id) = (plan.one_of(&[0, 1, 0, 8, 9]), id(plan));
            let length = plan.one_of(&[0, 1, 10, 100, 1000, 16_384, 16_385]);
            let mut payload = vec![b'd'; length];
            if let (true, Some(first)) = (flags & 8 != 0, payload.first_mut()) {
                *first = plan.byte();
            }
            frame(wire, 0, flags, id, &payload);
        }
        9 => frame(wire, 3, 0, id(plan), &u32::from(plan.byte() % 16).to_be_bytes()),
        10 => {
            let (parameter, value) =
                (plan.byte() % 10, plan.one_of(&[0, 1, 100, 16_384, 65_535, i32::MAX as u32, u32::MAX]));
            let payload = [&[0, parameter][..], &value.to_be_bytes()].concat();
            frame(wire, 4, 0, 0, &payload);
        }
        11 => frame(wire, 4, 1, 0, &[]),
        12 => {
            let increment: u32 = plan.one_of(&[0, 1, 100, 65_535, i32::MAX as u32]);
            frame(wire, 8, 0, id(plan), &increment.to_be_bytes());
        }
        13 => {
            let payload = plan.one_of(&[b"draining", b"liveness", b"whatever"]);
            frame(wire, 6, plan.byte() % 2, 0, payload);
        }
        14 => {
            let payload = [id(plan).to_be_bytes(), u32::from(plan.byte() % 16).to_be_bytes()].concat();
            frame(wire, 7, 0, 0, &payload);
        }
        _ => {
            let count = usize::from(plan.byte());
            let (flags, id) = (plan.one_of(&[0, 4]), id(plan));
            frame(wire, 9, flags, id, plan.take(count));
        }
    }
}

fn frame(wire: &mut Vec<u8>, kind: u8, flags: u8, id: u32, payload: &[u8]) {
    wire.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    wire.extend_from_slice(&[kind, flags]);
    wire.extend_from_slice(&id.to_be_bytes());
    wire.extend_from_slice(payload);
}

impl End {
    fn feed(&mut self, bytes: &[u8]) {
        self.received += bytes.len();
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
        assert!(self.out.len() <= 300 + 4 * self.received + self.asked, "answers outgrow what they answer");
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
                let window = self.config.connection_window.max(65_535) as usize;
                assert!(self.held <= window, "more than the window came through");
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
        let id = plan.one_of(&[1_u32, 3, 5, 7, 9, 11]);
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
