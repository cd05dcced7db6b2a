//! HTTP/2 by prior knowledge, closed loop: plain requests, gRPC calls of one message each way, and gRPC streams on
//! which each message is answered by one.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Load, Stretch, nanoseconds};
use crate::{
    backend::SMALL,
    cases::Call,
    frames::{self, Block, Connection, Meant},
    poller::{Line, Poller},
};

/// What one read takes at most.
const SCRATCH: usize = 256 * 1024;
/// From the connection to the peer's settings.
const SETTINGS_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a gRPC message with its prefix.
const MESSAGE: usize = 5 + SMALL;

pub(super) struct Http2 {
    poller: Poller,
    clients: Vec<Client>,
    scratch: Vec<u8>,
}

struct Client {
    line: Line,
    connection: Connection,
    buffer: Vec<u8>,
    call: Call,
    block: Block,
    message: Vec<u8>,
    next: u32,
    streams: HashMap<u32, Stream>,
    /// Streams whose message waits for the peer's window, in order.
    blocked: Vec<u32>,
}

struct Stream {
    begun: Instant,
    window: i64,
    /// Bytes of the answer that came, of this message on a stream of them.
    received: usize,
    answered: bool,
    unacknowledged: u32,
}

impl Http2 {
    pub(super) fn open(address: SocketAddr, connections: usize, streams: usize, call: Call) -> Result<Self> {
        let mut poller = Poller::new()?;
        let mut scratch = vec![0; SCRATCH];
        let mut clients = Vec::new();
        for key in 0..connections {
            clients.push(Client::connect(&poller, address, key, call)?);
        }
        let limit = Instant::now() + SETTINGS_LIMIT;
        let mut nothing = Vec::new();
        while clients.iter().any(|client| !client.connection.settings_seen) {
            let ready = poller.wait_until(limit)?.context("the peer sent no SETTINGS")?;
            for at in 0..ready {
                clients[poller.key(at)].turn(&poller, &mut scratch, &mut nothing)?;
            }
        }
        for client in &mut clients {
            for _ in 0..streams {
                client.begin(Instant::now());
            }
            client.line.flush(&poller)?;
        }
        Ok(Self { poller, clients, scratch })
    }
}

impl Load for Http2 {
    fn run(&mut self, end: Instant) -> Result<Stretch> {
        let begun = Instant::now();
        let mut latencies = Vec::new();
        while let Some(ready) = self.poller.wait_until(end)? {
            for at in 0..ready {
                let client = &mut self.clients[self.poller.key(at)];
                client.turn(&self.poller, &mut self.scratch, &mut latencies)?;
            }
        }
        Ok(Stretch::of(begun, latencies))
    }
}

impl Client {
    fn connect(poller: &Poller, address: SocketAddr, key: usize, call: Call) -> Result<Self> {
        let mut line = Line::connect(poller, address, key)?;
        line.out.extend_from_slice(frames::PREFACE);
        let connection = Connection::new(&mut line.out);
        line.flush(poller)?;
        // Static entries: 2 GET, 3 POST, 4 `/`, 6 `http` (RFC 7541, appendix A).
        let block = match call {
            Call::Get => Block::new(&[2, 4, 6], &[(":authority", "app.bench"), ("user-agent", "bench/1")]),
            Call::Unary | Call::Streaming => Block::new(
                &[3, 6],
                &[
                    (":path", "/bench.Echo/Call"),
                    (":authority", "app.bench"),
                    ("content-type", "application/grpc"),
                    ("te", "trailers"),
                    ("user-agent", "grpc-bench/1"),
                ],
            ),
        };
        let message = frames::message(u32::try_from(SMALL).expect("1 KiB"));
        let (next, streams, blocked) = (1, HashMap::new(), Vec::new());
        let buffer = Vec::new();
        Ok(Self { line, connection, buffer, call, block, message, next, streams, blocked })
    }

    /// Begins a request on a stream of its own.
    fn begin(&mut self, now: Instant) {
        let id = self.next;
        self.next += 2;
        let block = self.block.bytes(id == 1, self.connection.table);
        frames::put_headers(&mut self.line.out, id, block, self.call == Call::Get);
        let window = self.connection.stream_window;
        let stream = Stream { begun: now, window, received: 0, answered: false, unacknowledged: 0 };
        self.streams.insert(id, stream);
        if self.call != Call::Get {
            self.message(id);
        }
    }

    /// Sends a message, at once or when the windows have room.
    fn message(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !self.connection.spend(&mut stream.window, self.message.len()) {
            self.blocked.push(id);
            return;
        }
        let flags = if matches!(self.call, Call::Unary) { frames::END_STREAM } else { 0 };
        frames::put(&mut self.line.out, frames::DATA, flags, id, &self.message);
    }

    fn turn(&mut self, poller: &Poller, scratch: &mut [u8], latencies: &mut Vec<u64>) -> Result<()> {
        self.line.flush(poller)?;
        let Some(count) = self.line.read(scratch)? else { return Ok(()) };
        let now = Instant::now();
        let mut buffer = std::mem::take(&mut self.buffer);
        let whole = if buffer.is_empty() {
            &scratch[..count]
        } else {
            buffer.extend_from_slice(&scratch[..count]);
            &buffer[..]
        };
        let mut at = 0;
        while let Some((frame, length)) = frames::first(&whole[at..]) {
            self.frame(&frame, now, latencies)?;
            at += length;
        }
        self.buffer = whole[at..].to_vec();
        self.line.flush(poller)
    }

    fn frame(&mut self, frame: &frames::Frame<'_>, now: Instant, latencies: &mut Vec<u64>) -> Result<()> {
        match self.connection.take(frame, &mut self.line.out)? {
            Meant::Nothing => return Ok(()),
            Meant::Room(id, more) => {
                for (stream, state) in &mut self.streams {
                    if id == 0 || id == *stream {
                        state.window += more;
                    }
                }
                for id in std::mem::take(&mut self.blocked) {
                    self.message(id);
                }
                return Ok(());
            }
            Meant::Stream => {}
        }
        let id = frame.stream;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        match frame.kind {
            frames::RST_STREAM => bail!("a stream was reset: {:?}", frame.payload),
            frames::HEADERS if !stream.answered => {
                ensure!(frame.is_ok(), "the answer is not 200: {:02x?}", frame.content());
                stream.answered = true;
            }
            frames::HEADERS => ensure!(frame.ends_stream(), "trailers end a stream"),
            _ => {
                stream.received += frame.content().len();
                let more = u32::try_from(frame.payload.len()).expect("a frame's length has 24 bits");
                stream.unacknowledged += more;
            }
        }
        if matches!(self.call, Call::Streaming) {
            ensure!(!frame.ends_stream(), "a stream ended early");
            stream.unacknowledged = frames::top_up(&mut self.line.out, id, stream.unacknowledged);
            if stream.received >= MESSAGE {
                stream.received -= MESSAGE;
                latencies.push(nanoseconds(now - stream.begun));
                stream.begun = now;
                self.message(id);
            }
        } else if frame.ends_stream() {
            let expected = if self.call == Call::Get { SMALL } else { MESSAGE };
            ensure!(stream.received == expected, "the answer has {} bytes", stream.received);
            ensure!(
                (frame.kind == frames::HEADERS) == matches!(self.call, Call::Unary),
                "a call of gRPC ends with trailers, a plain answer with data"
            );
            latencies.push(nanoseconds(now - stream.begun));
            self.streams.remove(&id);
            self.begin(now);
        }
        Ok(())
    }
}
