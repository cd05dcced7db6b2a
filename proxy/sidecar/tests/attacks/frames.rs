//! HTTP/2 by hand: frames as bytes, header blocks of literals only, and a peer that may break every rule.
//!
//! Libraries refuse to send what these tests are about. What comes back is only looked at as far as a test asks:
//! which frames, which error codes, which status. The peer says that it keeps no dynamic table, so that a status can
//! be read without one (RFC 7541, 4.2).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    sync::Notify,
    task::AbortHandle,
    time::timeout,
};

use crate::harness::{PATIENCE, soon};

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// Frame types (RFC 9113, 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

// Flags.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

// Error codes (RFC 9113, 7).
pub(crate) const NO_ERROR: u32 = 0;
pub(crate) const PROTOCOL_ERROR: u32 = 1;
pub(crate) const FLOW_CONTROL_ERROR: u32 = 3;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const CANCEL: u32 = 8;
pub(crate) const COMPRESSION_ERROR: u32 = 9;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

// Settings.
pub(crate) const HEADER_TABLE_SIZE: u16 = 1;
pub(crate) const ENABLE_PUSH: u16 = 2;
pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;
pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;

/// The largest window (RFC 9113, 6.9.1).
pub(crate) const MAX_WINDOW: u32 = 0x7fff_ffff;

/// How long a write may be stuck before the other side counts as one that takes no more.
const STALLED_AFTER: Duration = Duration::from_secs(2);

/// How long an answer or an end is waited for before it counts as one that does not come.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long a flood goes on, whatever becomes of it.
const LONGEST_FLOOD: Duration = Duration::from_secs(1);

/// Frames that are remembered, and bytes of each.
const MOST_FRAMES: usize = 20_000;
const MOST_PAYLOAD: usize = 1024;

/// A frame in bytes.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub(crate) fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> = values
        .iter()
        .flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
        .collect();
    frame(SETTINGS, 0, 0, &payload)
}

pub(crate) fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

pub(crate) fn window_update(stream: u32, bytes: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes())
}

pub(crate) fn goaway(last: u32, code: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat())
}

/// A whole header block in one frame.
pub(crate) fn headers(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, flags | END_HEADERS, stream, &block(fields))
}

/// A header block cut into frames that fit the default limit.
pub(crate) fn long_headers(stream: u32, flags: u8, block: &[u8]) -> Vec<u8> {
    let mut pieces = block.chunks(16_384).peekable();
    let mut bytes = Vec::new();
    let mut kind = HEADERS;
    while let Some(piece) = pieces.next() {
        let end = if pieces.peek().is_none() { END_HEADERS } else { 0 };
        let flags = end | if kind == HEADERS { flags } else { 0 };
        bytes.extend(frame(kind, flags, stream, piece));
        kind = CONTINUATION;
    }
    bytes
}

/// Literals without indexing and without Huffman (RFC 7541, 6.2.2).
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        string(&mut block, name);
        string(&mut block, value);
    }
    block
}

/// A reference to the youngest entry of the dynamic table (RFC 7541, 6.1).
pub(crate) const YOUNGEST: u8 = 0xbe;

/// A literal that becomes entry 62, the youngest of the dynamic table (RFC 7541, 6.2.1).
pub(crate) fn indexed_literal(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0x40];
    string(&mut block, name);
    string(&mut block, value);
    block
}

fn string(block: &mut Vec<u8>, text: &str) {
    integer(block, 0, 7, text.len());
    block.extend_from_slice(text.as_bytes());
}

/// An integer behind the bits of `first` (RFC 7541, 5.1).
pub(crate) fn integer(block: &mut Vec<u8>, first: u8, prefix: u32, value: usize) {
    let most = (1 << prefix) - 1;
    if value < most {
        return block.push(first | u8::try_from(value).unwrap());
    }
    block.push(first | u8::try_from(most).unwrap());
    let mut rest = value - most;
    while rest >= 128 {
        block.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    block.push(u8::try_from(rest).unwrap());
}

/// The fields of a request for `path`.
pub(crate) fn request(method: &'static str, path: &str) -> Vec<(&'static str, String)> {
    let pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "app.example")];
    pseudo.map(|(name, value)| (name, value.to_owned())).to_vec()
}

/// A request in one frame.
pub(crate) fn ask(stream: u32, flags: u8, method: &'static str, path: &str) -> Vec<u8> {
    let fields = request(method, path);
    let fields: Vec<_> = fields.iter().map(|(name, value)| (*name, value.as_str())).collect();
    headers(stream, flags, &fields)
}

/// The status in a header block, if it is the first field, as it has to be (RFC 9113, 8.3).
fn status(mut block: &[u8]) -> Option<u16> {
    // Table size updates come first.
    while block.first().is_some_and(|byte| byte & 0xe0 == 0x20) {
        block = &block[1..];
    }
    match block {
        [index @ 0x88..=0x8e, ..] => Some([200, 204, 206, 304, 400, 404, 500][usize::from(index - 0x88)]),
        // A literal whose name is one of the entries for `:status`.
        [0x08..=0x0e | 0x48..=0x4e | 0x18..=0x1e, length, value @ ..] => {
            let value = value.get(..usize::from(length & 0x7f))?;
            let digits = if length & 0x80 == 0 { value.to_vec() } else { huffman_digits(value) };
            String::from_utf8(digits).ok()?.parse().ok()
        }
        _ => None,
    }
}

/// Digits alone: codes of five bits for 0 to 2, of six for the others (RFC 7541, appendix B).
fn huffman_digits(bytes: &[u8]) -> Vec<u8> {
    let bits: Vec<u8> = bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1)).collect();
    let number = |bits: &[u8]| bits.iter().fold(0, |number, bit| number * 2 + bit);
    let (mut digits, mut at) = (Vec::new(), 0);
    while at + 5 <= bits.len() {
        let five = number(&bits[at..at + 5]);
        if five <= 2 {
            digits.push(b'0' + five);
            at += 5;
        } else if at + 6 <= bits.len() && (0x19..=0x1f).contains(&number(&bits[at..at + 6])) {
            digits.push(b'3' + number(&bits[at..at + 6]) - 0x19);
            at += 6;
        } else {
            break;
        }
    }
    digits
}

/// A frame that came.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    fn number(&self, at: usize) -> u32 {
        self.payload.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().unwrap()))
    }
}

/// What has come from the other side.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// The first ones.
    pub(crate) frames: Vec<Frame>,
    /// How many of each kind.
    pub(crate) counts: [usize; 10],
    /// Bytes of DATA by stream.
    pub(crate) data: HashMap<u32, usize>,
    /// The connection has ended.
    pub(crate) ended: bool,
}

impl Log {
    fn note(&mut self, frame: Frame, length: usize) {
        if let Some(count) = self.counts.get_mut(usize::from(frame.kind)) {
            *count += 1;
        }
        if frame.kind == DATA {
            *self.data.entry(frame.stream).or_default() += length;
        }
        let ends_half = matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0;
        let end = ends_half || frame.kind == GOAWAY || frame.kind == RST_STREAM;
        if self.frames.len() < MOST_FRAMES || end {
            self.frames.push(frame);
        }
    }

    /// The last GOAWAY's error code: before it there may be one that announces it.
    pub(crate) fn goaway(&self) -> Option<u32> {
        self.frames.iter().rfind(|frame| frame.kind == GOAWAY).map(|frame| frame.number(4))
    }

    /// The code with which a stream was reset.
    pub(crate) fn reset(&self, stream: u32) -> Option<u32> {
        self.frames
            .iter()
            .find(|frame| frame.kind == RST_STREAM && frame.stream == stream)
            .map(|frame| frame.number(0))
    }

    /// The final status on a stream.
    pub(crate) fn status(&self, stream: u32) -> Option<u16> {
        self.frames
            .iter()
            .filter(|frame| frame.kind == HEADERS && frame.stream == stream)
            .filter_map(|frame| status(&frame.payload))
            .find(|status| *status >= 200)
    }

    pub(crate) fn bytes(&self, stream: u32) -> usize {
        self.data.get(&stream).copied().unwrap_or_default()
    }

    /// Whether a stream ended by itself.
    pub(crate) fn finished(&self, stream: u32) -> bool {
        self.frames.iter().any(|frame| {
            (frame.kind == DATA || frame.kind == HEADERS)
                && frame.stream == stream
                && frame.flags & END_STREAM != 0
        })
    }

    /// Whether the connection was given up.
    pub(crate) fn is_over(&self) -> bool {
        self.ended || self.goaway().is_some_and(|code| code != NO_ERROR)
    }

    /// What became of a request that must not be served: `None` as long as nothing has.
    pub(crate) fn refusal(&self, stream: u32) -> Option<Refused> {
        if let Some(code) = self.reset(stream) {
            return Some(Refused::Reset(code));
        }
        if let Some(status) = self.status(stream) {
            return Some(Refused::Status(status));
        }
        self.is_over().then(|| Refused::Connection(self.goaway()))
    }
}

/// How a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Reset(u32),
    Status(u16),
    Connection(Option<u32>),
    /// Nothing has come.
    Never,
}

/// How a connection was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// With this error code.
    Goaway(u32),
    Closed,
    Never,
}

impl Refused {
    /// Whether this is a refusal at all.
    pub(crate) fn is_one(self) -> bool {
        !matches!(self, Self::Status(..400) | Self::Never)
    }
}

/// What became of bytes that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    Yes,
    /// The other side has closed.
    Closed,
    /// The other side reads no more.
    Stalled,
}

pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static> Io for T {}

/// One end of an HTTP/2 connection.
pub(crate) struct Peer {
    write: WriteHalf<Box<dyn Io>>,
    /// `None` once it is being read from.
    read: Option<ReadHalf<Box<dyn Io>>>,
    log: Arc<Mutex<Log>>,
    news: Arc<Notify>,
    reader: Option<AbortHandle>,
}

impl Drop for Peer {
    /// Closes the connection: the reader holds it open as well.
    fn drop(&mut self) {
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}

impl Peer {
    /// A client, with its SETTINGS and the other side's exchanged and nothing read since.
    pub(crate) async fn dial_unread(io: impl Io, values: &[(u16, u32)]) -> Self {
        let mut io: Box<dyn Io> = Box::new(io);
        let values = [&[(HEADER_TABLE_SIZE, 0)], values].concat();
        let hello = [PREFACE, &settings(&values)].concat();
        io.write_all(&hello).await.unwrap();
        Self::greeted(io).await
    }

    pub(crate) async fn dial(io: impl Io, values: &[(u16, u32)]) -> Self {
        let mut peer = Self::dial_unread(io, values).await;
        peer.listen();
        peer
    }

    /// A server. `None`: whoever came is no HTTP/2 client.
    pub(crate) async fn accept(io: impl Io, values: &[(u16, u32)]) -> Option<Self> {
        let mut io: Box<dyn Io> = Box::new(io);
        let mut preface = [0; PREFACE.len()];
        io.read_exact(&mut preface).await.ok().filter(|_| preface == PREFACE)?;
        let values = [&[(HEADER_TABLE_SIZE, 0)], values].concat();
        io.write_all(&settings(&values)).await.ok()?;
        let mut peer = Self::greeted(io).await;
        peer.listen();
        Some(peer)
    }

    async fn greeted(mut io: Box<dyn Io>) -> Self {
        let mut log = Log::default();
        loop {
            let (frame, length) = soon("SETTINGS", next(&mut io)).await.expect("SETTINGS come first");
            let are_settings = frame.kind == SETTINGS && frame.flags & ACK == 0;
            log.note(frame, length);
            if are_settings {
                break;
            }
        }
        io.write_all(&frame(SETTINGS, ACK, 0, &[])).await.unwrap();
        let (read, write) = split(io);
        Self { write, read: Some(read), log: Arc::new(Mutex::new(log)), news: Arc::default(), reader: None }
    }

    /// Begins to read, to the end of the connection.
    pub(crate) fn listen(&mut self) {
        let Some(mut read) = self.read.take() else { return };
        let (log, news) = (self.log.clone(), self.news.clone());
        let reading = tokio::spawn(async move {
            while let Some((frame, length)) = next(&mut read).await {
                log.lock().unwrap().note(frame, length);
                news.notify_one();
            }
            log.lock().unwrap().ended = true;
            news.notify_one();
        });
        self.reader = Some(reading.abort_handle());
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Sent {
        match timeout(STALLED_AFTER, self.write.write_all(bytes)).await {
            Ok(Ok(())) => Sent::Yes,
            Ok(Err(_)) => Sent::Closed,
            Err(_) => Sent::Stalled,
        }
    }

    /// Sends `bytes` again and again, `times` at most, until the other side has had enough.
    pub(crate) async fn flood(&mut self, times: usize, mut bytes: impl FnMut(usize) -> Vec<u8>) -> Sent {
        let end = Instant::now() + LONGEST_FLOOD;
        for at in (0..times).take_while(|_| Instant::now() < end) {
            let sent = self.send(&bytes(at)).await;
            if sent != Sent::Yes || self.look(Log::is_over) {
                return sent;
            }
            // A write that never has to wait would keep the reader, a task of the same thread, from its turn.
            tokio::task::yield_now().await;
        }
        Sent::Yes
    }

    pub(crate) fn look<T>(&self, see: impl FnOnce(&Log) -> T) -> T {
        see(&self.log.lock().unwrap())
    }

    /// Waits until `see` sees what it looks for.
    pub(crate) async fn wait<T>(&self, what: &str, see: impl Fn(&Log) -> Option<T>) -> T {
        match timeout(PATIENCE, self.seen(see)).await {
            Ok(seen) => seen,
            Err(_) => self.look(|log| {
                let tail = &log.frames[log.frames.len().saturating_sub(10)..];
                let brief = |frame: &Frame| (frame.kind, frame.flags, frame.stream, frame.payload.len());
                let tail: Vec<_> = tail.iter().map(brief).collect();
                let (counts, data) = (log.counts, &log.data);
                panic!("{what}: not within {PATIENCE:?}; frames {counts:?}, data {data:?}, the last {tail:?}")
            }),
        }
    }

    /// The same for a table of cases, and only as long as an answer is waited for.
    pub(crate) async fn within<T>(&self, see: impl Fn(&Log) -> Option<T>) -> Option<T> {
        timeout(ANSWER_WITHIN, self.seen(see)).await.ok()
    }

    /// The same, for ever.
    async fn seen<T>(&self, see: impl Fn(&Log) -> Option<T>) -> T {
        loop {
            if let Some(seen) = self.look(&see) {
                return seen;
            }
            self.news.notified().await;
        }
    }

    /// Waits until the connection is given up.
    pub(crate) async fn given_up(&self) -> Over {
        let over = self.seen(|log| log.is_over().then(|| log.goaway().map_or(Over::Closed, Over::Goaway)));
        timeout(ANSWER_WITHIN, over).await.unwrap_or(Over::Never)
    }

    /// Waits until a request is answered or refused in some way.
    pub(crate) async fn refused(&self, stream: u32) -> Refused {
        timeout(ANSWER_WITHIN, self.seen(|log| log.refusal(stream))).await.unwrap_or(Refused::Never)
    }

    /// Waits, as a server, for the `n`th request, from 0: its stream. `None`: the connection has ended.
    pub(crate) async fn request(&self, n: usize) -> Option<u32> {
        self.seen(|log| {
            let mut requests = log.frames.iter().filter(|frame| frame.kind == HEADERS);
            let request = requests.nth(n).map(|frame| Some(frame.stream));
            request.or_else(|| log.ended.then_some(None))
        })
        .await
    }

    /// Waits, as a server, for the end of the connection.
    pub(crate) async fn end(&self) {
        self.seen(|log| log.ended.then_some(())).await;
    }

    /// Waits until a PING, and with it whatever was sent before it, has been seen by the other side.
    pub(crate) async fn round_trip(&mut self) {
        let before = self.look(|log| log.counts[usize::from(PING)]);
        self.send(&frame(PING, 0, 0, b"are you?")).await;
        self.wait("the answer to a PING", |log| {
            (log.counts[usize::from(PING)] > before || log.ended).then_some(())
        })
        .await;
    }
}

/// The next frame, cut, and its whole length.
async fn next(io: &mut (impl AsyncRead + Unpin)) -> Option<(Frame, usize)> {
    let mut head = [0; 9];
    io.read_exact(&mut head).await.ok()?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let mut payload = vec![0; length];
    io.read_exact(&mut payload).await.ok()?;
    payload.truncate(MOST_PAYLOAD);
    payload.shrink_to_fit();
    let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
    Some((Frame { kind: head[3], flags: head[4], stream, payload }, length))
}

#[test]
fn statuses_are_read_in_every_form() {
    assert_eq!(status(&[0x88]), Some(200));
    assert_eq!(status(&[0x20, 0x8c]), Some(400));
    assert_eq!(status(b"\x08\x03431"), Some(431));
    // The example of RFC 7541, C.6.1: 302.
    assert_eq!(status(&[0x48, 0x82, 0x64, 0x02]), Some(302));
}
