//! What goes out: heads, data, trailers, resets, and window for what came in.

use super::{Connection, MAX_31_BITS, TableUpdate};
use crate::fields::Fields;
use crate::h2::frame::{self, HEADER, Header, flag, kind};
use crate::h2::stream::{Asked, Stream};
use crate::h2::{Code, NotOpened, Role, StreamId, hpack};
use crate::head::{RequestHead, ResponseHead};

/// RFC 7541, 6.3: from now on our table has 0 bytes.
const EMPTY_TABLE: u8 = 0x20;

impl Connection {
    /// Client: opens a stream. `end`: there is no body. The caller sees to it that the head is a valid one; names may
    /// have upper case.
    pub fn request(
        &mut self,
        head: &RequestHead,
        end: bool,
        key: u64,
        out: &mut Vec<u8>,
    ) -> Result<StreamId, NotOpened> {
        if self.is_leaving() || self.role == Role::Server {
            return Err(NotOpened::Leaving);
        }
        if self.next_own > MAX_31_BITS {
            return Err(NotOpened::Exhausted);
        }
        if self.available() == 0 {
            return Err(NotOpened::Full);
        }
        let id = self.next_own;
        self.next_own += 2;
        let mut stream = Stream::new(Some(key), self.peer.window, self.new_receive_window());
        stream.local_ended = end;
        stream.asked = match head.method() {
            b"HEAD" => Asked::Head,
            b"CONNECT" => Asked::Connect,
            _ => Asked::Other,
        };
        self.streams.insert(id, stream);
        self.write_block(id, end, out, |out| {
            hpack::encode_method(head.method(), out);
            // 8.5: CONNECT has neither, unless it is an extended one.
            if head.protocol().is_some() || head.method() != b"CONNECT" {
                hpack::encode_scheme(head.scheme().unwrap_or(b"http"), out);
                hpack::encode_path(head.path().unwrap_or(b"/"), out);
            }
            if let Some(authority) = head.authority() {
                hpack::encode_authority(authority, out);
            }
            if let Some(protocol) = head.protocol() {
                hpack::encode_protocol(protocol, out);
            }
            encode_fields(&head.fields, out);
        });
        Ok(id)
    }

    /// Server: answers, with an interim response (1xx) or the final one. `end`: there is no body; interim responses
    /// never end.
    pub fn response(&mut self, id: StreamId, head: &ResponseHead, end: bool, out: &mut Vec<u8>) {
        let end = end && !head.is_interim();
        if self.streams.get(&id).is_none_or(|stream| stream.local_ended) {
            return;
        }
        self.write_block(id, end, out, |out| {
            hpack::encode_status(head.status, out);
            encode_fields(&head.fields, out);
        });
        if end {
            self.end_local(id);
        }
    }

    /// Sends trailers and ends our half.
    pub fn trailers(&mut self, id: StreamId, fields: &Fields, out: &mut Vec<u8>) {
        if fields.is_empty() {
            self.data(id, &[], true, out);
            return;
        }
        if self.streams.get(&id).is_some_and(|stream| !stream.local_ended) {
            self.write_block(id, true, out, |out| encode_fields(fields, out));
            self.end_local(id);
        }
    }

    /// Bytes of DATA that the windows let this stream send now. If there are none,
    /// [`Event::Writable`](crate::h2::Event::Writable) will come. A stream that is gone has none and gets no event.
    pub fn capacity(&mut self, id: StreamId) -> usize {
        let Some(stream) = self.streams.get(&id).filter(|stream| !stream.local_ended) else { return 0 };
        let room = stream.send.room().min(self.send_window.room());
        if room == 0 {
            self.starve(id);
        }
        room
    }

    /// Sends data, as much as the windows allow, and returns how much. If that is less than all,
    /// [`Event::Writable`](crate::h2::Event::Writable) will come; `end` counts only when all was sent. A stream that is
    /// gone takes everything: it goes nowhere, and nobody hangs.
    pub fn data(&mut self, id: StreamId, data: &[u8], end: bool, out: &mut Vec<u8>) -> usize {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.local_ended) else {
            return data.len();
        };
        let taken = data.len().min(stream.send.room()).min(self.send_window.room());
        stream.send.spend(taken);
        self.send_window.spend(taken);
        let end = end && taken == data.len();
        let most = self.frame_bytes.min(self.peer.frame_bytes) as usize;
        let mut rest = &data[..taken];
        while rest.len() > most {
            let (chunk, others) = rest.split_at(most);
            write_data(id, chunk, flag::NONE, out);
            rest = others;
        }
        if end {
            write_data(id, rest, flag::END_STREAM, out);
            self.end_local(id);
        } else if !rest.is_empty() {
            write_data(id, rest, flag::NONE, out);
        }
        if taken < data.len() {
            self.starve(id);
        }
        taken
    }

    /// Resets a stream. No event follows.
    pub fn reset(&mut self, id: StreamId, code: Code, out: &mut Vec<u8>) {
        if let Some(stream) = self.streams.remove(&id) {
            frame::write_reset(id, code, out);
            if !stream.remote_ended {
                self.late.expect(id, stream.receive.left());
            }
        }
    }

    /// Bytes of [`Event::Data`](crate::h2::Event::Data) are gone: the windows open again, and the peer hears of it once
    /// half of a window was released. To be called for streams that are gone too, for the connection's window has to
    /// open.
    pub fn release(&mut self, id: StreamId, bytes: usize, out: &mut Vec<u8>) {
        self.give_back(id, bytes, out);
    }

    /// Remembers that a stream waits for a window.
    fn starve(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.starved = true;
        // While its own window is shut it would only be in the way of others; WINDOW_UPDATE or SETTINGS puts it in the
        // line.
        if stream.send.room() == 0 || stream.queued {
            return;
        }
        stream.queued = true;
        // Streams that are gone leave their numbers behind.
        if self.line.len() > 2 * self.streams.len() {
            self.line.retain(|waiting| self.streams.get(waiting).is_some_and(|stream| stream.queued));
        }
        self.line.push_back(id);
    }

    fn end_local(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.local_ended = true;
            stream.starved = false;
            if stream.is_closed() {
                self.complete(id);
            }
        }
    }

    /// HEADERS, and CONTINUATION where the peer's frames are too small for the block (4.3).
    fn write_block(
        &mut self,
        stream: StreamId,
        end: bool,
        out: &mut Vec<u8>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER]);
        if self.table_update == TableUpdate::Due {
            self.table_update = TableUpdate::Done;
            out.push(EMPTY_TABLE);
        }
        encode(out);
        let first = start + HEADER;
        let most = self.peer.frame_bytes as usize;
        let flags = if end { flag::END_STREAM } else { flag::NONE };
        let len = out.len() - first;
        if len <= most {
            let len = len as u32;
            Header { len, kind: kind::HEADERS, flags: flags | flag::END_HEADERS, stream }
                .write_at(start, out);
            return;
        }
        Header { len: self.peer.frame_bytes, kind: kind::HEADERS, flags, stream }.write_at(start, out);
        let rest = out.split_off(first + most);
        let mut chunks = rest.chunks(most).peekable();
        while let Some(chunk) = chunks.next() {
            let flags = if chunks.peek().is_none() { flag::END_HEADERS } else { flag::NONE };
            Header { len: chunk.len() as u32, kind: kind::CONTINUATION, flags, stream }.write(out);
            out.extend_from_slice(chunk);
        }
    }
}

fn encode_fields(fields: &Fields, out: &mut Vec<u8>) {
    for (name, value) in fields.iter() {
        hpack::encode_line(name, value, out);
    }
}

fn write_data(stream: StreamId, data: &[u8], flags: u8, out: &mut Vec<u8>) {
    Header { len: data.len() as u32, kind: kind::DATA, flags, stream }.write(out);
    out.extend_from_slice(data);
}
