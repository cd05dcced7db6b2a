//! Our HTTP/2 against the `h2` crate, both ways round: bodies, trailers, heads of several frames, windows of odd sizes,
//! resets, more requests than streams may be open; over a pipe that holds few bytes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use outrigger_http::fields::Fields;
use outrigger_http::h2::{Budget, Code, Config, Connection, Event, Heads, Role, StreamId};
use outrigger_http::head::{RequestHead, ResponseHead};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// How long a run may take: far more than it needs, far less than for ever.
const DEADLINE: Duration = Duration::from_secs(30);

/// One request and its response.
#[derive(Debug, Clone)]
struct Exchange {
    up: Message,
    down: Message,
    reset: Reset,
}

#[derive(Debug, Clone)]
struct Message {
    body: usize,
    trailers: bool,
    /// Bytes of one field: more than a frame makes CONTINUATION.
    field: usize,
}

/// Who gives up when the response has begun.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reset {
    Nobody,
    Client,
    Server,
}

#[derive(Debug, Clone)]
struct Setting {
    exchanges: Vec<Exchange>,
    /// Ours and theirs.
    windows: (u32, u32),
    frames: (u32, u32),
    streams: u32,
    /// Bytes of the pipe, each way.
    pipe: usize,
    /// Bytes that our end sends or releases at a time.
    step: usize,
}

fn message() -> impl Strategy<Value = Message> {
    let body = prop_oneof![Just(0_usize), 1..100_usize, 1..70_000_usize];
    let field = prop_oneof![8 => 0..100_usize, 1 => 16_000..17_000_usize, 1 => Just(40_000_usize)];
    (body, any::<bool>(), field).prop_map(|(body, trailers, field)| Message { body, trailers, field })
}

fn setting() -> impl Strategy<Value = Setting> {
    let reset = prop_oneof![6 => Just(Reset::Nobody), 1 => Just(Reset::Client), 1 => Just(Reset::Server)];
    let exchange = (message(), message(), reset).prop_map(|(up, down, reset)| Exchange { up, down, reset });
    let window = || prop_oneof![Just(1000_u32), 1000..70_000_u32, Just(65_535), Just(1 << 20)];
    let frame = || prop_oneof![Just(16_384_u32), 16_384..70_000_u32];
    (
        prop::collection::vec(exchange, 1..12),
        (window(), window()),
        (frame(), frame()),
        prop_oneof![1..4_u32, Just(100)],
        prop_oneof![Just(64_usize), 100..5000_usize, Just(1 << 16)],
        prop_oneof![100..2000_usize, Just(1 << 20)],
    )
        .prop_map(|(exchanges, windows, frames, streams, pipe, step)| Setting {
            exchanges,
            windows,
            frames,
            streams,
            pipe,
            step,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn our_server_understands_their_client(setting in setting()) {
        run(setting, async |setting, pipe| {
            tokio::join!(their_client(setting.clone(), pipe.0), our_server(setting, pipe.1));
        });
    }

    #[test]
    fn our_client_understands_their_server(setting in setting()) {
        run(setting, async |setting, pipe| {
            tokio::join!(their_server(setting.clone(), pipe.0), our_client(setting, pipe.1));
        });
    }
}

fn run(setting: Setting, both: impl AsyncFnOnce(Arc<Setting>, (DuplexStream, DuplexStream))) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let pipe = tokio::io::duplex(setting.pipe);
    runtime.block_on(async {
        tokio::time::timeout(DEADLINE, both(Arc::new(setting), pipe)).await.expect("both ends finish");
    });
}

/// What stands at a place of any body.
fn letter(at: usize) -> u8 {
    (at % 253) as u8
}

fn letters(from: usize, to: usize) -> Vec<u8> {
    (from..to).map(letter).collect()
}

// Our ends.

struct End {
    connection: Connection,
    heads: Heads,
    input: Vec<u8>,
    out: Vec<u8>,
    pipe: DuplexStream,
}

impl End {
    fn new(role: Role, setting: &Setting, pipe: DuplexStream) -> Self {
        let config = Config {
            role,
            streams: setting.streams,
            stream_window: setting.windows.0,
            connection_window: setting.windows.0 * 2,
            frame_bytes: setting.frames.0,
            head_bytes: 1 << 17,
            fields: 100,
            extended_connect: true,
            budget: Budget { resets: 100, errors: 100, frames: 100 },
        };
        let mut out = Vec::new();
        let connection = Connection::new(&config, &mut out);
        Self { connection, heads: Heads::default(), input: Vec::new(), out, pipe }
    }

    /// Moves bytes both ways; waits only if `idle`. False when the peer has closed.
    async fn turn(&mut self, idle: bool) -> bool {
        if !idle {
            tokio::task::yield_now().await;
        }
        let Self { input, out, pipe, .. } = self;
        poll_fn(|context| {
            let mut moved = false;
            while !out.is_empty() {
                match Pin::new(&mut *pipe).poll_write(context, out) {
                    Poll::Ready(Ok(count)) => drop(out.drain(..count)),
                    // It reads no more; what it wrote before is still to be read.
                    Poll::Ready(Err(_)) => out.clear(),
                    Poll::Pending => break,
                }
                moved = true;
            }
            let mut bytes = [0; 4096];
            let mut buffer = ReadBuf::new(&mut bytes);
            if Pin::new(&mut *pipe).poll_read(context, &mut buffer).is_ready() {
                if buffer.filled().is_empty() {
                    return Poll::Ready(false);
                }
                input.extend_from_slice(buffer.filled());
                moved = true;
            }
            if moved || !idle { Poll::Ready(true) } else { Poll::Pending }
        })
        .await
    }

    /// Tells what came in.
    fn events(&mut self, mut on: impl FnMut(&mut Connection, &Heads, &mut Vec<u8>, Event<'_>)) {
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        loop {
            let (used, event) = self
                .connection
                .receive(&input[at..], &mut self.heads, &mut self.out)
                .expect("h2 breaks no rule");
            at += used;
            if event == Event::More {
                break;
            }
            on(&mut self.connection, &self.heads, &mut self.out, event);
        }
        self.input.extend_from_slice(&input[at..]);
    }
}

/// A stream as our end sees it.
struct Stream {
    exchange: usize,
    sent: usize,
    sent_all: bool,
    waits: bool,
    got: usize,
    held: usize,
    got_all: bool,
}

impl Stream {
    fn new(exchange: usize) -> Self {
        Self { exchange, sent: 0, sent_all: false, waits: false, got: 0, held: 0, got_all: false }
    }

    fn take(&mut self, data: &[u8], end: bool, message: &Message) {
        assert!(data.iter().enumerate().all(|(at, &byte)| byte == letter(self.got + at)));
        self.got += data.len();
        self.held += data.len();
        if end {
            assert!(!message.trailers);
            self.finish(message);
        }
    }

    fn finish(&mut self, message: &Message) {
        assert_eq!(self.got, message.body);
        self.got_all = true;
    }

    /// Sends and releases a step. True if there is more that could be done at once.
    fn step(
        &mut self,
        id: StreamId,
        message: &Message,
        step: usize,
        connection: &mut Connection,
        out: &mut Vec<u8>,
    ) -> bool {
        let released = self.held.min(step);
        self.held -= released;
        connection.release(id, released, out);
        if !self.sent_all && !self.waits {
            let chunk = letters(self.sent, message.body.min(self.sent + step));
            let last = self.sent + chunk.len() == message.body;
            let taken = connection.data(id, &chunk, last && !message.trailers, out);
            self.sent += taken;
            self.waits = taken < chunk.len();
            self.sent_all = last && !self.waits;
            if self.sent_all && message.trailers {
                connection.trailers(id, &our_trailers(), out);
            }
        }
        self.held > 0 || !(self.sent_all || self.waits)
    }
}

fn our_fields(fields: &mut Fields, message: &Message) {
    fields.push(b"X-Field", &vec![b'f'; message.field]);
    fields.push(b"Content-Length", message.body.to_string().as_bytes());
}

fn check_fields(fields: &Fields, message: &Message) {
    assert_eq!(fields.get("x-field").unwrap(), vec![b'f'; message.field]);
    assert_eq!(fields.get_all("x-twice").collect::<Vec<_>>(), [b"one", b"two"]);
}

fn our_trailers() -> Fields {
    let mut fields = Fields::default();
    fields.push(b"X-Trailer", b"last");
    fields
}

async fn our_server(setting: Arc<Setting>, pipe: DuplexStream) {
    let mut end = End::new(Role::Server, &setting, pipe);
    let mut streams: BTreeMap<StreamId, Stream> = BTreeMap::new();
    let mut idle = false;
    while end.turn(idle).await {
        end.events(|connection, heads, out, event| match event {
            Event::Request { id, end } => {
                let exchange: usize =
                    str::from_utf8(&heads.request.path().unwrap()[1..]).unwrap().parse().unwrap();
                let Exchange { up, down, .. } = &setting.exchanges[exchange];
                assert_eq!(heads.request.method(), b"POST");
                assert_eq!(heads.request.authority(), Some(&b"example.test"[..]));
                check_fields(&heads.request.fields, up);
                connection.attach(id, exchange as u64);
                let mut stream = Stream::new(exchange);
                if end {
                    stream.finish(up);
                }
                let mut head = ResponseHead::default();
                head.status = 103;
                connection.response(id, &head, false, out);
                head.status = 200;
                our_fields(&mut head.fields, down);
                stream.sent_all = down.body == 0 && !down.trailers;
                connection.response(id, &head, stream.sent_all, out);
                assert!(streams.insert(id, stream).is_none());
            }
            Event::Data { id, key, data, end } => {
                let stream = streams.get_mut(&id).unwrap();
                assert_eq!(key, stream.exchange as u64);
                stream.take(data, end, &setting.exchanges[stream.exchange].up);
            }
            Event::Trailers { id, .. } => {
                assert_eq!(heads.trailers.get("x-trailer"), Some(&b"last"[..]));
                let stream = streams.get_mut(&id).unwrap();
                stream.finish(&setting.exchanges[stream.exchange].up);
            }
            Event::Writable { id, .. } => streams.get_mut(&id).unwrap().waits = false,
            Event::Reset { id, code, by_peer, .. } => {
                let stream = streams.remove(&id).unwrap();
                assert!(by_peer);
                assert_eq!(code, Code::CANCEL);
                assert_eq!(setting.exchanges[stream.exchange].reset, Reset::Client);
                connection.release(id, stream.held, out);
            }
            Event::Settings | Event::GoAway { .. } => {}
            other => panic!("unexpected: {other:?}"),
        });
        idle = true;
        for (&id, stream) in &mut streams {
            let exchange = &setting.exchanges[stream.exchange];
            let (connection, out) = (&mut end.connection, &mut end.out);
            if exchange.reset == Reset::Server {
                // What was sent so far is in order; the reset overtakes nothing.
                connection.reset(id, Code::INTERNAL_ERROR, out);
                connection.release(id, std::mem::take(&mut stream.held), out);
                (stream.sent_all, stream.waits) = (true, false);
                continue;
            }
            idle &= !stream.step(id, &exchange.down, setting.step, connection, out);
        }
    }
    for stream in streams.values() {
        let Exchange { down, reset, .. } = &setting.exchanges[stream.exchange];
        assert!(*reset != Reset::Nobody || (stream.got_all && stream.sent_all && stream.sent == down.body));
    }
    assert_eq!(end.connection.open_streams(), 0);
}

async fn our_client(setting: Arc<Setting>, pipe: DuplexStream) {
    let mut end = End::new(Role::Client, &setting, pipe);
    let mut streams: BTreeMap<StreamId, Stream> = BTreeMap::new();
    let mut done = 0;
    let mut next = 0;
    let mut idle = false;
    let mut settled = false;
    while done < setting.exchanges.len() {
        while settled && next < setting.exchanges.len() && end.connection.available() > 0 {
            let Exchange { up, .. } = &setting.exchanges[next];
            let mut head = RequestHead::default();
            head.set_method(b"POST");
            head.set_authority(Some(b"example.test"));
            head.set_path(Some(format!("/{next}").as_bytes()));
            our_fields(&mut head.fields, up);
            let mut stream = Stream::new(next);
            stream.sent_all = up.body == 0 && !up.trailers;
            let id = end.connection.request(&head, stream.sent_all, next as u64, &mut end.out).unwrap();
            streams.insert(id, stream);
            next += 1;
            idle = false;
        }
        assert!(end.turn(idle).await, "the server stays");
        end.events(|connection, heads, out, event| match event {
            Event::Response { id, key, end } => {
                let stream = streams.get_mut(&id).unwrap();
                assert_eq!(key, stream.exchange as u64);
                let exchange = &setting.exchanges[stream.exchange];
                assert_eq!(heads.response.status, 200);
                check_fields(&heads.response.fields, &exchange.down);
                if end {
                    stream.finish(&exchange.down);
                }
                if exchange.reset == Reset::Client {
                    connection.reset(id, Code::CANCEL, out);
                    streams.remove(&id);
                    done += 1;
                }
            }
            Event::Data { id, data, end, .. } => {
                let stream = streams.get_mut(&id).unwrap();
                stream.take(data, end, &setting.exchanges[stream.exchange].down);
            }
            Event::Trailers { id, .. } => {
                assert_eq!(heads.trailers.get("x-trailer"), Some(&b"last"[..]));
                let stream = streams.get_mut(&id).unwrap();
                stream.finish(&setting.exchanges[stream.exchange].down);
            }
            Event::Writable { id, .. } => streams.get_mut(&id).unwrap().waits = false,
            Event::Reset { id, code, by_peer, .. } => {
                let stream = streams.remove(&id).unwrap();
                assert!(by_peer);
                assert_eq!(code, Code::INTERNAL_ERROR);
                assert_eq!(setting.exchanges[stream.exchange].reset, Reset::Server);
                connection.release(id, stream.held, out);
                done += 1;
            }
            Event::Settings => settled = true,
            other => panic!("unexpected: {other:?}"),
        });
        idle = true;
        streams.retain(|&id, stream| {
            let up = &setting.exchanges[stream.exchange].up;
            idle &= !stream.step(id, up, setting.step, &mut end.connection, &mut end.out);
            let finished = stream.got_all && stream.sent_all && stream.held == 0;
            done += usize::from(finished);
            !finished
        });
    }
    assert_eq!(end.connection.open_streams(), 0);
    end.connection.drain(&mut end.out);
    while !end.out.is_empty() && end.turn(true).await {}
}

// Their ends.

fn their_fields(message: &Message) -> http::HeaderMap {
    let mut fields = http::HeaderMap::new();
    fields.insert("x-field", "f".repeat(message.field).parse().unwrap());
    fields.insert("content-length", message.body.into());
    fields.append("x-twice", "one".parse().unwrap());
    fields.append("x-twice", "two".parse().unwrap());
    fields
}

fn their_trailers() -> http::HeaderMap {
    let mut fields = http::HeaderMap::new();
    fields.insert("x-trailer", "last".parse().unwrap());
    fields
}

async fn send(stream: &mut SendStream<Bytes>, message: &Message) -> Result<(), h2::Error> {
    let mut sent = 0;
    while sent < message.body {
        stream.reserve_capacity(message.body - sent);
        let Some(room) = poll_fn(|context| stream.poll_capacity(context)).await else { break };
        let next = message.body.min(sent + room?);
        let end = next == message.body && !message.trailers;
        stream.send_data(letters(sent, next).into(), end)?;
        sent = next;
    }
    if message.trailers { stream.send_trailers(their_trailers()) } else { Ok(()) }
}

async fn receive(stream: &mut RecvStream, message: &Message) -> Result<(), h2::Error> {
    let mut got = 0;
    while let Some(data) = stream.data().await {
        let data = data?;
        assert!(data.iter().enumerate().all(|(at, &byte)| byte == letter(got + at)));
        got += data.len();
        stream.flow_control().release_capacity(data.len())?;
    }
    let trailers = stream.trailers().await?;
    assert_eq!(got, message.body);
    assert_eq!(trailers.is_some(), message.trailers);
    assert!(trailers.is_none_or(|trailers| trailers["x-trailer"] == "last"));
    Ok(())
}

async fn their_client(setting: Arc<Setting>, pipe: DuplexStream) {
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(setting.windows.1)
        .initial_connection_window_size(setting.windows.1.max(65_535))
        .max_frame_size(setting.frames.1)
        .max_header_list_size(1 << 17)
        .initial_max_send_streams(setting.streams as usize)
        .handshake(pipe)
        .await
        .unwrap();
    let driver = tokio::spawn(connection);
    let mut tasks = Vec::new();
    for (index, exchange) in setting.exchanges.clone().into_iter().enumerate() {
        let requests = requests.clone();
        tasks.push(tokio::spawn(async move {
            let Exchange { up, down, reset } = exchange;
            let mut request = http::Request::post(format!("http://example.test/{index}")).body(()).unwrap();
            *request.headers_mut() = their_fields(&up);
            let ends = up.body == 0 && !up.trailers;
            let (response, mut body) = requests.ready().await.unwrap().send_request(request, ends).unwrap();
            if reset == Reset::Client {
                let head = response.await;
                body.send_reset(Reason::CANCEL);
                assert_eq!(head.unwrap().status(), 200);
                return;
            }
            let sending = async { if ends { Ok(()) } else { send(&mut body, &up).await } };
            let receiving = async {
                let response = response.await?;
                assert_eq!(response.status(), 200);
                assert_eq!(response.headers()["x-field"].len(), down.field);
                receive(&mut response.into_body(), &down).await
            };
            let (sent, received) = tokio::join!(sending, receiving);
            if reset == Reset::Nobody {
                sent.unwrap();
                received.unwrap();
            } else if down.body > 0 || down.trailers || !ends {
                // It may have had all before the reset; an error says which one.
                for error in [sent.err(), received.err()].into_iter().flatten() {
                    assert!(error.reason().is_none_or(|reason| reason == Reason::INTERNAL_ERROR), "{error}");
                }
            }
        }));
    }
    drop(requests);
    for task in tasks {
        task.await.unwrap();
    }
    driver.await.unwrap().unwrap();
}

async fn their_server(setting: Arc<Setting>, pipe: DuplexStream) {
    let mut connection = h2::server::Builder::new()
        .initial_window_size(setting.windows.1)
        .initial_connection_window_size(setting.windows.1.max(65_535))
        .max_frame_size(setting.frames.1)
        .max_header_list_size(1 << 17)
        .max_concurrent_streams(setting.streams)
        .handshake::<_, Bytes>(pipe)
        .await
        .unwrap();
    let mut tasks = Vec::new();
    while let Some(accepted) = connection.accept().await {
        // Our client closes the pipe when it has all that it wants.
        let Ok((request, mut respond)) = accepted else { break };
        let setting = setting.clone();
        tasks.push(tokio::spawn(async move {
            let index: usize = request.uri().path()[1..].parse().unwrap();
            let Exchange { up, down, reset } = &setting.exchanges[index];
            assert_eq!(request.method(), "POST");
            assert_eq!(request.uri().authority().unwrap(), "example.test");
            assert_eq!(request.headers()["x-field"].len(), up.field);
            let mut response = http::Response::new(());
            *response.headers_mut() = their_fields(down);
            if *reset == Reset::Server {
                respond.send_reset(Reason::INTERNAL_ERROR);
                return;
            }
            let ends = down.body == 0 && !down.trailers;
            let sent = respond.send_response(response, ends);
            let mut body = request.into_body();
            let sending = async {
                match sent? {
                    _ if ends => Ok(()),
                    mut stream => send(&mut stream, down).await,
                }
            };
            let (sent, received) = tokio::join!(sending, receive(&mut body, up));
            if *reset == Reset::Nobody {
                sent.unwrap();
                received.unwrap();
            } else if let Err(error) = received {
                assert!(error.is_reset() || error.is_io() || error.is_go_away(), "{error}");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}
