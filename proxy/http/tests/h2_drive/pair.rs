//! Our client against our server: what one end sends must arrive at the other, whatever the order of things, the cut of
//! the bytes and the size of the windows; and when both have done their part nothing is left over.

use super::Plan;
use outrigger_http::fields::Fields;
use outrigger_http::h2::{Budget, Code, Config, Connection, Event, Heads, NotOpened, Role, StreamId};
use outrigger_http::head::{RequestHead, ResponseHead};
use std::collections::BTreeMap;

/// One direction of one stream, as the sender decided it.
#[derive(Clone, Default)]
struct Message {
    /// Decides what the head says.
    seed: u8,
    body: usize,
    trailers: bool,
    /// Of the body, so far.
    sent: usize,
    ended: bool,
    /// The last write was short: the end waits for `Writable`.
    waits: bool,
}

/// What arrived of a message.
#[derive(Default)]
struct Arrived {
    head: bool,
    interim: u8,
    body: usize,
    held: usize,
    trailers: bool,
    ended: bool,
}

#[derive(Default)]
struct Stream {
    request: Message,
    /// Once the server has decided.
    response: Option<Message>,
    interim: u8,
    at_server: Arrived,
    at_client: Arrived,
    /// Somebody has reset it; then nothing has to arrive any more.
    reset: bool,
}

struct End {
    connection: Connection,
    heads: Heads,
    /// Bytes on their way to this end.
    incoming: Vec<u8>,
    input: Vec<u8>,
    out: Vec<u8>,
    pings: usize,
}

impl End {
    fn new(config: &Config) -> Self {
        let mut out = Vec::new();
        let connection = Connection::new(config, &mut out);
        Self { connection, heads: Heads::default(), incoming: Vec::new(), input: Vec::new(), out, pings: 0 }
    }
}

struct Pair {
    client: End,
    server: End,
    streams: BTreeMap<StreamId, Stream>,
    /// Bodies are this long at most: a window of one byte would make long ones last.
    longest: usize,
}

/// One run.
pub(crate) fn run(bytes: &[u8]) {
    let plan = &mut Plan::new(bytes);
    let windows = [1, 7, 1000, 65_535, 1 << 20];
    let config = |plan: &mut Plan<'_>, role| Config {
        role,
        streams: plan.one_of(&[1, 2, 100]),
        stream_window: plan.one_of(&windows),
        connection_window: plan.one_of(&[65_535, 100_000, 1 << 20]),
        frame_bytes: plan.one_of(&[16_384, 20_000, 1 << 20]),
        head_bytes: 1 << 17,
        fields: 100,
        extended_connect: true,
        budget: Budget { resets: 1 << 20, errors: 1 << 20, frames: 1 << 20 },
    };
    let (client, server) = (config(plan, Role::Client), config(plan, Role::Server));
    let longest = match client.stream_window.min(server.stream_window) {
        0..100 => 200,
        100..10_000 => 20_000,
        _ => 100_000,
    };
    let mut pair =
        Pair { client: End::new(&client), server: End::new(&server), streams: BTreeMap::new(), longest };
    while !plan.is_done() {
        pair.step(plan);
    }
    pair.finish();
}

impl Pair {
    fn step(&mut self, plan: &mut Plan<'_>) {
        let id = StreamId::from(plan.byte() % 16) * 2 + 1;
        match plan.byte() % 20 {
            0..=2 => self.request(plan),
            3..=4 => self.respond(id, plan),
            5 => self.interim(id),
            6..=7 => self.send(id, Role::Client, plan.number()),
            8..=9 => self.send(id, Role::Server, plan.number()),
            10..=11 => self.deliver(Role::Server, plan.number()),
            12..=13 => self.deliver(Role::Client, plan.number()),
            14 => self.release(id, Role::Client, plan.number()),
            15 => self.release(id, Role::Server, plan.number()),
            16 if plan.once_in(2) => self.reset(id, plan.one_of(&[Role::Client, Role::Server])),
            17 => {
                let end = if plan.once_in(2) { &mut self.client } else { &mut self.server };
                end.connection.ping(&mut end.out);
                end.pings += 1;
            }
            18 => {
                self.client.connection.tick();
                self.server.connection.tick();
            }
            19 => match plan.byte() {
                0..8 => self.server.connection.drain(&mut self.server.out),
                8..10 => self.client.connection.drain(&mut self.client.out),
                10..12 => self.server.connection.close(Code::NO_ERROR, &mut self.server.out),
                _ => {}
            },
            _ => {}
        }
    }

    fn request(&mut self, plan: &mut Plan<'_>) {
        let request = self.message(plan);
        let end = request.body == 0 && !request.trailers;
        let head = request_head(&request);
        let next = self.streams.keys().next_back().map_or(1, |last| last + 2);
        let End { connection, out, .. } = &mut self.client;
        match connection.request(&head, end, key(next), out) {
            Ok(id) => {
                assert_eq!(id, next);
                let request = Message { ended: end, ..request };
                self.streams.insert(id, Stream { request, ..Stream::default() });
            }
            Err(NotOpened::Full) => assert_eq!(connection.available(), 0),
            Err(NotOpened::Leaving) => assert!(connection.is_leaving()),
            Err(NotOpened::Exhausted) => panic!("there are more numbers than bytes in a plan"),
        }
    }

    fn message(&self, plan: &mut Plan<'_>) -> Message {
        let body = match plan.byte() % 4 {
            0 => 0,
            1 => usize::from(plan.byte()),
            _ => plan.number() * 5,
        };
        Message {
            seed: plan.byte(),
            body: body.min(self.longest),
            trailers: plan.once_in(4),
            ..Message::default()
        }
    }

    fn respond(&mut self, id: StreamId, plan: &mut Plan<'_>) {
        let response = self.message(plan);
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.at_server.head) else { return };
        if stream.response.is_some() {
            return;
        }
        let end = response.body == 0 && !response.trailers;
        let head = response_head(&response);
        self.server.connection.response(id, &head, end, &mut self.server.out);
        stream.response = Some(Message { ended: end, ..response });
    }

    fn interim(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.at_server.head) else { return };
        if stream.response.is_none() && stream.interim < 3 {
            let mut head = ResponseHead::default();
            head.status = 103;
            head.fields.push(b"Link", &[b'0' + stream.interim]);
            self.server.connection.response(id, &head, false, &mut self.server.out);
            stream.interim += 1;
        }
    }

    /// Sends up to `count` bytes of the body, and what follows it.
    fn send(&mut self, id: StreamId, role: Role, count: usize) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let (end, message) = match role {
            Role::Client => (&mut self.client, Some(&mut stream.request)),
            Role::Server => (&mut self.server, stream.response.as_mut()),
        };
        let Some(message) = message.filter(|message| !message.ended && !message.waits) else { return };
        let chunk: Vec<u8> =
            (message.sent..message.body.min(message.sent + count)).map(|at| letter(id, at)).collect();
        let last = message.sent + chunk.len() == message.body;
        let taken = end.connection.data(id, &chunk, last && !message.trailers, &mut end.out);
        message.sent += taken;
        message.waits = taken < chunk.len();
        if last && !message.waits {
            message.ended = true;
            if message.trailers {
                end.connection.trailers(id, &trailers(message), &mut end.out);
            }
        }
    }

    fn release(&mut self, id: StreamId, role: Role, count: usize) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let (end, arrived) = match role {
            Role::Client => (&mut self.client, &mut stream.at_client),
            Role::Server => (&mut self.server, &mut stream.at_server),
        };
        let bytes = arrived.held.min(count);
        arrived.held -= bytes;
        end.connection.release(id, bytes, &mut end.out);
    }

    fn reset(&mut self, id: StreamId, role: Role) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let end = match role {
            Role::Client => &mut self.client,
            // It cannot reset what it has not heard of.
            Role::Server if stream.at_server.head => &mut self.server,
            Role::Server => return,
        };
        stream.reset = true;
        end.connection.reset(id, Code::CANCEL, &mut end.out);
    }

    /// Moves up to `count` bytes to an end, which reads them.
    fn deliver(&mut self, to: Role, count: usize) {
        let (from, end) = match to {
            Role::Client => (&mut self.server, &mut self.client),
            Role::Server => (&mut self.client, &mut self.server),
        };
        end.incoming.append(&mut from.out);
        end.input.extend(end.incoming.drain(..count.min(end.incoming.len())));
        let input = std::mem::take(&mut end.input);
        let mut at = 0;
        loop {
            let (used, event) = end
                .connection
                .receive(&input[at..], &mut end.heads, &mut end.out)
                .expect("two good ends have no connection error");
            at += used;
            let id = match event {
                Event::More => break,
                Event::GoAway { .. } | Event::Settings => continue,
                Event::Pong => {
                    end.pings = end.pings.checked_sub(1).expect("an answer to a ping");
                    continue;
                }
                Event::TooLarge { .. } => panic!("no head was too large"),
                Event::Request { id, .. }
                | Event::Response { id, .. }
                | Event::Data { id, .. }
                | Event::Trailers { id, .. }
                | Event::Reset { id, .. }
                | Event::Writable { id, .. } => id,
            };
            let stream = self.streams.get_mut(&id).expect("a stream that was opened");
            if let Event::Request { .. } = event {
                end.connection.attach(id, key(id));
            }
            let (message, arrived) = match to {
                Role::Client => (stream.response.as_ref(), &mut stream.at_client),
                Role::Server => (Some(&stream.request), &mut stream.at_server),
            };
            match event {
                Event::Request { end: ended, .. } => {
                    assert_eq!(to, Role::Server);
                    let expected = request_head(&stream.request);
                    let head = &end.heads.request;
                    assert_eq!(head.method(), expected.method());
                    assert_eq!(head.path(), expected.path());
                    assert_eq!(head.scheme(), expected.scheme());
                    assert_eq!(head.authority(), expected.authority());
                    assert_eq!(head.fields, lower_case(&expected.fields));
                    arrived.head = true;
                    arrived.ended = ended;
                }
                Event::Response { end: ended, key: got, .. } => {
                    assert_eq!(got, key(id));
                    if end.heads.response.is_interim() {
                        assert_eq!(
                            end.heads.response.fields.get("link"),
                            Some(&[b'0' + arrived.interim][..])
                        );
                        arrived.interim += 1;
                        continue;
                    }
                    let expected = response_head(message.expect("a response was sent"));
                    assert_eq!(end.heads.response.status, expected.status);
                    assert_eq!(end.heads.response.fields, lower_case(&expected.fields));
                    arrived.head = true;
                    arrived.ended = ended;
                }
                Event::Data { data, end: ended, key: got, .. } => {
                    assert_eq!(got, key(id));
                    assert!(arrived.head && !arrived.ended);
                    assert!(data.iter().enumerate().all(|(at, &byte)| byte == letter(id, arrived.body + at)));
                    arrived.body += data.len();
                    arrived.held += data.len();
                    arrived.ended = ended;
                }
                Event::Trailers { key: got, .. } => {
                    assert_eq!(got, key(id));
                    assert!(arrived.head && !arrived.ended);
                    let expected = trailers(message.expect("a message was sent"));
                    assert_eq!(end.heads.trailers, lower_case(&expected));
                    arrived.trailers = true;
                    arrived.ended = true;
                }
                // The server turns streams away that exceed what it allows or that come too late.
                Event::Reset { unprocessed, by_peer, .. } => {
                    assert!(by_peer);
                    assert!(stream.reset || unprocessed, "nobody had a reason");
                    assert!(!unprocessed || (to == Role::Client && !stream.at_server.head));
                    stream.reset = true;
                }
                Event::Writable { key: got, .. } => {
                    assert_eq!(got, key(id));
                    match to {
                        Role::Client => stream.request.waits = false,
                        Role::Server => {
                            if let Some(response) = &mut stream.response {
                                response.waits = false;
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        end.input.extend_from_slice(&input[at..]);
    }

    /// Both ends do all that is left to do; then all must be done.
    fn finish(&mut self) {
        let mut quiet = 0;
        while quiet < 3 {
            let before = self.progress();
            self.deliver(Role::Server, usize::MAX);
            let ids: Vec<_> = self.streams.keys().copied().collect();
            for &id in &ids {
                self.release(id, Role::Server, usize::MAX);
                self.respond(id, &mut Plan::new(&[1, 77, 3, 0]));
                self.send(id, Role::Server, self.longest);
                self.send(id, Role::Client, self.longest);
            }
            self.deliver(Role::Client, usize::MAX);
            for &id in &ids {
                self.release(id, Role::Client, usize::MAX);
            }
            quiet = if self.progress() == before { quiet + 1 } else { 0 };
        }
        for (id, stream) in &self.streams {
            if stream.reset {
                continue;
            }
            for (message, arrived) in
                [(Some(&stream.request), &stream.at_server), (stream.response.as_ref(), &stream.at_client)]
            {
                let message = message.expect("all were answered");
                assert!(message.ended, "{id}: sending stalled at {} of {}", message.sent, message.body);
                assert_eq!(arrived.body, message.body, "{id}");
                assert!(arrived.ended, "{id}: the end is missing");
                assert_eq!(arrived.trailers, message.trailers, "{id}");
            }
            assert_eq!(stream.at_client.interim, stream.interim, "{id}");
        }
        for end in [&self.client, &self.server] {
            assert_eq!(end.connection.open_streams(), 0);
            assert_eq!(end.connection.keys().count(), 0);
            assert!(end.input.is_empty() && end.incoming.is_empty());
            assert_eq!(end.pings, 0, "a ping was not answered");
        }
    }

    fn progress(&self) -> (usize, usize) {
        let bytes = |stream: &Stream| {
            stream.request.sent
                + stream.at_server.body
                + stream.response.as_ref().map_or(0, |response| response.sent)
                + stream.at_client.body
        };
        let marks = |stream: &Stream| {
            [
                stream.request.ended,
                stream.response.is_some(),
                stream.response.as_ref().is_some_and(|response| response.ended),
                stream.request.waits,
                stream.at_server.ended,
                stream.at_client.ended,
                stream.reset,
            ]
            .into_iter()
            .fold(0, |marks, mark| marks << 1 | usize::from(mark))
        };
        let on_the_way = self.client.out.len() + self.server.out.len();
        let streams = self.streams.values();
        (streams.clone().map(bytes).sum::<usize>(), streams.map(marks).sum::<usize>() + on_the_way)
    }
}

/// What the caller knows a stream by.
fn key(id: StreamId) -> u64 {
    u64::from(id) + 1000
}

/// What stands at a place of any body of this stream.
fn letter(id: StreamId, at: usize) -> u8 {
    (at % 251) as u8 ^ id as u8
}

/// Lines that a seed stands for: names in both cases, values short and long, some that take several frames.
fn fields(seed: u8) -> Fields {
    let mut fields = Fields::default();
    fields.push(b"X-First", &[b'a' + seed % 26]);
    fields.push(b"accept-encoding", b"gzip, deflate");
    fields.push(b"Cookie", b"a=b");
    fields.push(b"cookie", b"c=d");
    let long = match seed % 16 {
        0 => 60_000,
        1 => 16_300,
        2..8 => usize::from(seed),
        _ => 0,
    };
    fields.push(b"X-Last", &vec![b'v'; long]);
    fields
}

fn request_head(message: &Message) -> RequestHead {
    let mut head = RequestHead::default();
    head.fields = fields(message.seed);
    if message.seed.is_multiple_of(2) {
        head.fields.push(b"Content-Length", message.body.to_string().as_bytes());
    }
    head.set_method([&b"GET"[..], b"POST", b"PUT"][usize::from(message.seed % 3)]);
    head.set_scheme(Some(b"https"));
    head.set_authority(Some(b"example.test:8443"));
    head.set_path(Some([&b"/"[..], b"/a?b=c"][usize::from(message.seed % 2)]));
    head
}

fn response_head(message: &Message) -> ResponseHead {
    let mut head = ResponseHead::default();
    head.status = [200, 404, 418][usize::from(message.seed % 3)];
    head.fields = fields(message.seed);
    if message.seed.is_multiple_of(2) {
        head.fields.push(b"Content-Length", message.body.to_string().as_bytes());
    }
    head
}

fn trailers(message: &Message) -> Fields {
    let mut fields = fields(message.seed.wrapping_add(1));
    fields.push(b"Grpc-Status", b"0");
    fields
}

fn lower_case(fields: &Fields) -> Fields {
    let mut lower = Fields::default();
    for (name, value) in fields.iter() {
        lower.push(&name.to_ascii_lowercase(), value);
    }
    lower
}
