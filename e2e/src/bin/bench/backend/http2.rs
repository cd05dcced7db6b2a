//! HTTP/2 in clear text. A request without a body gets 1 KiB; one with a body is a gRPC call: each message is
//! answered by one, and the end of the request by trailers. That is unary and streaming at once.

use std::collections::HashMap;

use anyhow::{Result, bail};

use super::{SMALL, Serve};
use crate::{
    frames::{self, Block, Connection, Meant},
    poller::{Line, Poller},
};

/// Prefix of a gRPC message.
const PREFIX: usize = 5;

pub(super) struct Http2 {
    connection: Option<Connection>,
    buffer: Vec<u8>,
    streams: HashMap<u32, Stream>,
    /// Streams whose answer waits for the peer's window, in order.
    blocked: Vec<u32>,
    answers: Answers,
    /// Whether the blocks were sent once: the peer's table then holds their fields.
    sent: [bool; 2],
}

struct Answers {
    plain: Block,
    grpc: Block,
    trailers: Vec<u8>,
    body: Vec<u8>,
    message: Vec<u8>,
}

impl Default for Http2 {
    fn default() -> Self {
        let small = u32::try_from(SMALL).expect("1 KiB");
        let trailers = Block::new(&[], &[("grpc-status", "0")]);
        Self {
            connection: None,
            buffer: Vec::new(),
            streams: HashMap::new(),
            blocked: Vec::new(),
            answers: Answers {
                // Literals: the two answers would otherwise share one table and have to know each other's entries.
                plain: Block::new(&[8], &[("content-type", "text/plain"), ("content-length", "1024")]),
                grpc: Block::new(&[8], &[("content-type", "application/grpc")]),
                trailers: trailers.bytes(true, 0).to_vec(),
                body: vec![b'x'; SMALL],
                message: frames::message(small),
            },
            sent: [false; 2],
        }
    }
}

struct Stream {
    window: i64,
    /// Bytes of the current message that came.
    partial: usize,
    /// Messages to be answered.
    owed: usize,
    /// Whether it is a call of gRPC.
    grpc: bool,
    begun: bool,
    ended: bool,
    received: u32,
}

impl Serve for Http2 {
    fn serve(&mut self, line: &mut Line, _: &Poller, bytes: &[u8]) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.extend_from_slice(bytes);
        let mut at = 0;
        if self.connection.is_none() {
            if buffer.len() < frames::PREFACE.len() {
                self.buffer = buffer;
                return Ok(());
            }
            if !buffer.starts_with(frames::PREFACE) {
                bail!("no HTTP/2 preface");
            }
            at = frames::PREFACE.len();
            self.connection = Some(Connection::new(&mut line.out));
        }
        while let Some((frame, length)) = frames::first(&buffer[at..]) {
            self.frame(&frame, &mut line.out)?;
            at += length;
        }
        buffer.drain(..at);
        self.buffer = buffer;
        Ok(())
    }
}

impl Http2 {
    fn frame(&mut self, frame: &frames::Frame<'_>, out: &mut Vec<u8>) -> Result<()> {
        let connection = self.connection.as_mut().expect("frames follow the preface");
        match connection.take(frame, out)? {
            Meant::Nothing => {}
            Meant::Room(stream, more) => {
                for (id, state) in &mut self.streams {
                    if stream == 0 || stream == *id {
                        state.window += more;
                    }
                }
                for id in std::mem::take(&mut self.blocked) {
                    self.answer(id, out);
                }
            }
            Meant::Stream => self.stream(frame, out),
        }
        Ok(())
    }

    fn stream(&mut self, frame: &frames::Frame<'_>, out: &mut Vec<u8>) {
        let id = frame.stream;
        match frame.kind {
            frames::RST_STREAM => {
                self.streams.remove(&id);
                return;
            }
            frames::HEADERS => {
                let window = self.connection.as_ref().map_or(0, |connection| connection.stream_window);
                let grpc = !frame.ends_stream();
                let owed = usize::from(!grpc);
                let new = Stream { window, partial: 0, owed, grpc, begun: false, ended: false, received: 0 };
                self.streams.entry(id).or_insert(new).ended = frame.ends_stream();
            }
            _ => {
                let Some(state) = self.streams.get_mut(&id) else { return };
                let whole = PREFIX + SMALL;
                state.partial += frame.content().len();
                state.owed += state.partial / whole;
                state.partial %= whole;
                state.ended |= frame.ends_stream();
                let received = state.received + u32::try_from(frame.payload.len()).unwrap_or(0);
                state.received = frames::top_up(out, id, received);
            }
        }
        self.answer(id, out);
    }

    /// Sends what is owed on a stream, as far as the windows go.
    fn answer(&mut self, id: u32, out: &mut Vec<u8>) {
        let (Some(state), Some(connection)) = (self.streams.get_mut(&id), &mut self.connection) else {
            return;
        };
        let Answers { plain, grpc, trailers, body, message } = &self.answers;
        while state.owed > 0 {
            let data = if state.grpc { message } else { body };
            if !connection.spend(&mut state.window, data.len()) {
                self.blocked.push(id);
                return;
            }
            if !state.begun {
                state.begun = true;
                // One of the two kinds on a connection fills the table; should both occur, the second is literal.
                let kind = usize::from(state.grpc);
                let table = if self.sent[1 - kind] { 0 } else { connection.table };
                let block = if state.grpc { grpc } else { plain };
                frames::put_headers(out, id, block.bytes(!self.sent[kind], table), false);
                self.sent[kind] |= table != 0;
            }
            state.owed -= 1;
            let last = !state.grpc;
            frames::put(out, frames::DATA, if last { frames::END_STREAM } else { 0 }, id, data);
        }
        if state.ended {
            if state.grpc {
                frames::put_headers(out, id, trailers, true);
            }
            self.streams.remove(&id);
        }
    }
}
