//! What comes in: field blocks, which open streams and end them (RFC 9113, 4.3, 6.2, 6.10 and 8).
//!
//! Every block is decoded, whatever becomes of its stream: the decoder's table must follow the peer's encoder (4.3).

use super::receive::{Block, Reading, padding_of};
use super::{Connection, Leaving};
use crate::h2::frame::{self, HEADER, Header, flag, kind};
use crate::h2::hpack::{Decoded, HpackError};
use crate::h2::message::{Malformed, Request, Response, Trailers};
use crate::h2::stream::{Asked, Stream};
use crate::h2::{Code, Event, Fatal, Heads, Role};

/// A CONTINUATION that is shorter than this and not the last is charged as useless: no encoder cuts so small, and the
/// number of frames in a block becomes bounded (CVE-2024-27316). In bytes.
const SMALL_CONTINUATION: usize = 1024;

impl Connection {
    /// HEADERS (6.2).
    pub(super) fn on_headers(
        &mut self,
        header: Header,
        payload: &[u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let mut fragment = payload;
        if header.has(flag::PADDED) {
            let padding = padding_of(header, payload)? as usize;
            fragment = &payload[1..payload.len() - padding];
        }
        let mut malformed = false;
        if header.has(flag::PRIORITY) {
            let Some((priority, rest)) = fragment.split_first_chunk::<5>() else {
                return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "HEADERS has no room for its priority"));
            };
            // RFC 7540, 5.3.1: a stream cannot depend on itself. RFC 9113 has no use for it, but it stays wrong.
            malformed = frame::number(&priority[..4]) == Some(header.stream);
            fragment = rest;
        }
        if header.stream.is_multiple_of(2) {
            return Err(Fatal::protocol("HEADERS for a stream that only a server could open"));
        }
        let block = Block { id: header.stream, end: header.has(flag::END_STREAM), malformed };
        if header.has(flag::END_HEADERS) {
            return self.block(block, fragment, heads, out);
        }
        self.collect(block, fragment)?;
        Ok(None)
    }

    /// CONTINUATION (6.10), the only frame that may come within a block.
    pub(super) fn on_continuation<'a>(
        &mut self,
        block: Block,
        input: &'a [u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<(usize, Option<Event<'a>>)>, Fatal> {
        let Some(header) = self.header(input)? else { return Ok(None) };
        if header.kind != kind::CONTINUATION || header.stream != block.id {
            return Err(Fatal::protocol("a field block is interrupted"));
        }
        let whole = HEADER + header.len as usize;
        let Some(fragment) = input.get(HEADER..whole) else { return Ok(None) };
        let last = header.has(flag::END_HEADERS);
        if fragment.len() < SMALL_CONTINUATION && !last {
            self.meters.charge_frame()?;
        }
        self.collect(block, fragment)?;
        if !last {
            return Ok(Some((whole, None)));
        }
        self.reading = Reading::Frame;
        let fragments = std::mem::take(&mut self.block);
        let event = self.block(block, &fragments, heads, out)?;
        Ok(Some((whole, event)))
    }

    /// Keeps a fragment until its block is complete. Twice the limit for the decoded head leaves room to answer 431;
    /// what is beyond cannot be decoded, so the connection ends.
    fn collect(&mut self, block: Block, fragment: &[u8]) -> Result<(), Fatal> {
        if self.block.len() + fragment.len() > 2 * self.head_bytes as usize {
            return Err(Fatal::new(Code::ENHANCE_YOUR_CALM, "a field block is too large"));
        }
        self.block.extend_from_slice(fragment);
        self.reading = Reading::Continuation(block);
        Ok(())
    }

    /// A complete block: a request, a response, or trailers.
    fn block(
        &mut self,
        block: Block,
        bytes: &[u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let id = block.id;
        let error = match self.streams.get(&id) {
            None if self.role == Role::Server && id > self.last_of_peer => {
                return self.request_head(block, bytes, heads, out);
            }
            None if self.is_idle(id) => {
                return Err(Fatal::protocol("HEADERS for a stream that was never opened"));
            }
            None => {
                self.discard(bytes)?;
                self.late_frame(id, 0)?;
                return Ok(None);
            }
            Some(stream) if stream.remote_ended => Code::STREAM_CLOSED,
            // Only trailers can follow (8.1), and only they can end.
            Some(stream) if block.malformed || (stream.head_seen && !block.end) => Code::PROTOCOL_ERROR,
            Some(stream) if stream.head_seen => return self.trailer_section(block, bytes, heads, out),
            Some(_) => return self.response_head(block, bytes, heads, out),
        };
        self.discard(bytes)?;
        self.stream_error(id, error, out)
    }

    fn request_head(
        &mut self,
        block: Block,
        bytes: &[u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let Block { id, end, malformed } = block;
        if self.leaving == Leaving::Final {
            // GOAWAY said so; nothing is owed (6.8). What follows for this stream is late in the same way.
            self.discard(bytes)?;
            self.last_of_peer = id;
            self.late.expect(id, self.new_receive_window());
            self.meters.charge_frame()?;
            return Ok(None);
        }
        self.last_of_peer = id;
        self.last_taken = id;
        if self.streams.len() >= self.streams_allowed as usize {
            self.discard(bytes)?;
            return self.stream_error(id, Code::REFUSED_STREAM, out);
        }
        let mut request = Request::new(&mut heads.request, self.fields);
        let decoded = self
            .decoder
            .decode(bytes, self.head_bytes as usize, &mut |name, value| request.line(name, value));
        let too_large = decoded.map_err(undecodable)?.truncated || request.is_too_long();
        let promised = match malformed {
            true => Err(Malformed),
            false if too_large => Ok(None),
            false => request.finish(self.extended_connect),
        };
        let Ok(promised) = promised else { return self.stream_error(id, Code::PROTOCOL_ERROR, out) };
        if end && promised.is_some_and(|length| length > 0) {
            return self.stream_error(id, Code::PROTOCOL_ERROR, out);
        }
        let mut stream = Stream::new(None, self.peer.window, self.new_receive_window());
        stream.head_seen = true;
        stream.remote_ended = end;
        stream.promised = promised;
        self.streams.insert(id, stream);
        Ok(Some(if too_large { Event::TooLarge { id, end } } else { Event::Request { id, end } }))
    }

    fn response_head(
        &mut self,
        block: Block,
        bytes: &[u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let Block { id, end, .. } = block;
        let asked = self.streams.get(&id).map_or(Asked::Other, |stream| stream.asked);
        let mut response = Response::new(&mut heads.response, self.fields);
        let decoded = self
            .decoder
            .decode(bytes, self.head_bytes as usize, &mut |name, value| response.line(name, value));
        if decoded.map_err(undecodable)?.truncated || response.is_too_long() {
            return self.stream_error(id, Code::ENHANCE_YOUR_CALM, out);
        }
        let promised = response.finish(asked);
        let interim = heads.response.is_interim();
        let promised = match promised {
            Ok(promised) if !end || (!interim && promised.is_none_or(|length| length == 0)) => promised,
            _ => return self.stream_error(id, Code::PROTOCOL_ERROR, out),
        };
        if interim {
            self.meters.charge_frame()?;
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(None) };
        let key = stream.key;
        if !interim {
            stream.head_seen = true;
            stream.promised = promised;
        }
        if end {
            self.end_remote(id);
        }
        Ok(Some(Event::Response { id, key, end }))
    }

    fn trailer_section(
        &mut self,
        block: Block,
        bytes: &[u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let id = block.id;
        let mut trailers = Trailers::new(&mut heads.trailers, self.fields);
        let decoded = self
            .decoder
            .decode(bytes, self.head_bytes as usize, &mut |name, value| trailers.line(name, value));
        if decoded.map_err(undecodable)?.truncated || trailers.is_too_long() {
            return self.stream_error(id, Code::ENHANCE_YOUR_CALM, out);
        }
        let fine = trailers.finish().is_ok();
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(None) };
        // The end must not come before the promised length (8.1.1).
        if !fine || stream.promised.is_some_and(|left| left > 0) {
            return self.stream_error(id, Code::PROTOCOL_ERROR, out);
        }
        let key = stream.key;
        self.end_remote(id);
        Ok(Some(Event::Trailers { id, key }))
    }

    /// Decodes a block for the table's sake only.
    fn discard(&mut self, bytes: &[u8]) -> Result<Decoded, Fatal> {
        self.decoder.decode(bytes, 0, &mut |_, _| {}).map_err(undecodable)
    }
}

fn undecodable(error: HpackError) -> Fatal {
    let code = match error {
        HpackError::Excess => Code::ENHANCE_YOUR_CALM,
        _ => Code::COMPRESSION_ERROR,
    };
    Fatal::new(code, error.text())
}
