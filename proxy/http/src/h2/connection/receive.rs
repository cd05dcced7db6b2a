//! What comes in: frames, one by one (RFC 9113, 4 to 6).

use super::{Connection, DRAIN_PING, Leaving, PING, TableUpdate};
use crate::h2::flow;
use crate::h2::frame::{self, HEADER, Header, PREFACE, flag, kind};
use crate::h2::settings::{self, HEADER_TABLE_BYTES};
use crate::h2::{Code, Event, Fatal, Heads, Role, StreamId};

/// What the next byte of input is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reading {
    /// Of the client's preface.
    Preface,
    /// Of a frame's header.
    Frame,
    /// Of a CONTINUATION's header, and of nothing else (6.10).
    Continuation(Block),
    /// Of a DATA frame's data.
    Data { id: StreamId, left: u32, padding: u32, end: bool },
    /// Of a payload that means nothing.
    Skip { left: u32 },
    /// Of no interest: the connection has failed.
    Dead,
}

/// A field block that is not complete.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub(super) id: StreamId,
    /// END_STREAM was set on its HEADERS.
    pub(super) end: bool,
    /// A rule of its HEADERS was broken for which the stream ends, once the block was decoded.
    pub(super) malformed: bool,
}

/// A step of reading: bytes used, and an event if there is one.
type Step<'a> = (usize, Option<Event<'a>>);

impl Connection {
    pub(super) fn read<'a>(
        &mut self,
        input: &'a [u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Event<'a>), Fatal> {
        let mut at = 0;
        loop {
            if let Some(event) = self.waiting_event() {
                return Ok((at, event));
            }
            let rest = &input[at..];
            let step = match self.reading {
                Reading::Frame => self.on_frame(rest, heads, out)?,
                Reading::Continuation(block) => self.on_continuation(block, rest, heads, out)?,
                Reading::Data { id, left, padding, end } => {
                    self.on_data_piece(id, left, padding, end, rest, out)
                }
                Reading::Skip { left } => self.skip(left, rest),
                Reading::Preface => self.on_preface(rest)?,
                Reading::Dead => return Ok((input.len(), Event::More)),
            };
            match step {
                None => return Ok((at, Event::More)),
                Some((used, None)) => at += used,
                Some((used, Some(event))) => return Ok((at + used, event)),
            }
        }
    }

    /// Events that an earlier frame caused beside its own.
    fn waiting_event(&mut self) -> Option<Event<'static>> {
        while let Some(id) = self.left_out.pop() {
            if let Some(stream) = self.streams.remove(&id) {
                let code = Code::REFUSED_STREAM;
                return Some(Event::Reset { id, key: stream.key, code, by_peer: true, unprocessed: true });
            }
        }
        while self.send_window.room() > 0
            && let Some(id) = self.line.pop_front()
        {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.queued = false;
            if stream.starved && stream.send.room() > 0 {
                stream.starved = false;
                return Some(Event::Writable { id, key: stream.key });
            }
        }
        None
    }

    /// The client's preface (3.4).
    fn on_preface<'a>(&mut self, input: &[u8]) -> Result<Option<Step<'a>>, Fatal> {
        let seen = &input[..input.len().min(PREFACE.len())];
        if seen != &PREFACE[..seen.len()] {
            return Err(Fatal::protocol("the client's preface is not that of HTTP/2"));
        }
        if seen.len() < PREFACE.len() {
            return Ok(None);
        }
        self.reading = Reading::Frame;
        Ok(Some((PREFACE.len(), None)))
    }

    /// Any frame outside of a field block. `None` while too little of it is there.
    fn on_frame<'a>(
        &mut self,
        input: &'a [u8],
        heads: &mut Heads,
        out: &mut Vec<u8>,
    ) -> Result<Option<Step<'a>>, Fatal> {
        let Some(header) = self.header(input)? else { return Ok(None) };
        if !self.peer.known && (header.kind != kind::SETTINGS || header.has(flag::ACK)) {
            return Err(Fatal::protocol("the first frame is not SETTINGS"));
        }
        match header.kind {
            kind::DATA => return self.on_data(header, input, out),
            kind::PUSH_PROMISE => return Err(Fatal::protocol("push is disabled")),
            kind::CONTINUATION => return Err(Fatal::protocol("CONTINUATION without a block to continue")),
            kind::HEADERS..=kind::CONTINUATION => {}
            // Unknown types are ignored (5.5).
            _ => {
                self.meters.charge_frame()?;
                self.reading = Reading::Skip { left: header.len };
                return Ok(Some((HEADER, None)));
            }
        }
        let whole = HEADER + header.len as usize;
        let Some(payload) = input.get(HEADER..whole) else { return Ok(None) };
        let event = match header.kind {
            kind::HEADERS => self.on_headers(header, payload, heads, out)?,
            kind::PRIORITY => self.on_priority(header, payload)?,
            kind::RST_STREAM => self.on_reset(header, payload)?,
            kind::SETTINGS => self.on_settings(header, payload, out)?,
            kind::PING => self.on_ping(header, payload, out)?,
            kind::GOAWAY => self.on_goaway(header, payload)?,
            _ => self.on_window_update(header, payload, out)?,
        };
        Ok(Some((whole, event)))
    }

    /// A frame's header, once it is there.
    pub(super) fn header(&self, input: &[u8]) -> Result<Option<Header>, Fatal> {
        let header = Header::parse(input);
        // 4.2 has a stream error for some types. Nobody comes here who has read our SETTINGS.
        if header.is_some_and(|header| header.len > self.frame_bytes) {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "a frame is larger than we allow"));
        }
        Ok(header)
    }

    /// DATA (6.1), up to the first byte of its data.
    fn on_data<'a>(
        &mut self,
        header: Header,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Step<'a>>, Fatal> {
        let Header { len, stream: id, .. } = header;
        let mut used = HEADER;
        let mut padding = 0;
        if header.has(flag::PADDED) {
            if len > 0 && input.len() == HEADER {
                return Ok(None);
            }
            padding = padding_of(header, &input[HEADER..])?;
            used += 1;
        }
        let padded = (used - HEADER) as u32 + padding;
        let data = len - padded;
        let end = header.has(flag::END_STREAM);

        if id == 0 || self.is_idle(id) {
            return Err(Fatal::protocol("DATA for a stream that was never opened"));
        }
        if !self.receive_window.take(len) {
            return Err(Fatal::new(Code::FLOW_CONTROL_ERROR, "DATA exceeds the connection's window"));
        }
        let error = match self.streams.get_mut(&id) {
            None => {
                self.late_frame(id, len)?;
                None
            }
            Some(stream) => {
                if let Err(code) = stream.admit(len, data, end) {
                    Some(code)
                } else {
                    self.reading = if data > 0 || end {
                        self.meters.useful_frame();
                        Reading::Data { id, left: data, padding, end }
                    } else {
                        self.meters.charge_frame()?;
                        Reading::Skip { left: padding }
                    };
                    if padded > 0 {
                        self.give_back(id, padded as usize, out);
                    }
                    return Ok(Some((used, None)));
                }
            }
        };
        self.reading = Reading::Skip { left: len - (used - HEADER) as u32 };
        let event = match error {
            None => None,
            Some(code) => self.stream_error(id, code, out)?,
        };
        // Nobody will get this data: its window opens at once.
        self.give_back(id, len as usize, out);
        Ok(Some((used, event)))
    }

    /// Data of a DATA frame, as much of it as is there.
    fn on_data_piece<'a>(
        &mut self,
        id: StreamId,
        left: u32,
        padding: u32,
        end: bool,
        input: &'a [u8],
        out: &mut Vec<u8>,
    ) -> Option<Step<'a>> {
        let used = input.len().min(left as usize);
        let left = left - used as u32;
        let is_last = left == 0;
        if used == 0 && !is_last {
            return None;
        }
        self.reading = match padding {
            _ if !is_last => Reading::Data { id, left, padding, end },
            0 => Reading::Frame,
            _ => Reading::Skip { left: padding },
        };
        let Some(stream) = self.streams.get_mut(&id) else {
            // The caller has reset it meanwhile.
            self.give_back(id, used, out);
            return Some((used, None));
        };
        let end = end && is_last;
        let event = Event::Data { id, key: stream.key, data: &input[..used], end };
        if end {
            self.end_remote(id);
        }
        Some((used, Some(event)))
    }

    fn skip<'a>(&mut self, left: u32, input: &[u8]) -> Option<Step<'a>> {
        let used = input.len().min(left as usize);
        let left = left - used as u32;
        self.reading = if left == 0 { Reading::Frame } else { Reading::Skip { left } };
        (used > 0 || left == 0).then_some((used, None))
    }

    /// PRIORITY (6.3): of no use since RFC 9113, and allowed on any stream.
    fn on_priority(&mut self, header: Header, payload: &[u8]) -> Result<Option<Event<'static>>, Fatal> {
        let Some((on, _)) = payload.split_first_chunk::<4>().filter(|(_, weight)| weight.len() == 1) else {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "PRIORITY is not five bytes long"));
        };
        if header.stream == 0 || frame::number(on) == Some(header.stream) {
            return Err(Fatal::protocol("PRIORITY for no stream, or for a stream that depends on itself"));
        }
        self.meters.charge_frame()?;
        Ok(None)
    }

    /// RST_STREAM (6.4).
    fn on_reset(&mut self, header: Header, payload: &[u8]) -> Result<Option<Event<'static>>, Fatal> {
        let id = header.stream;
        let Ok(code) = payload.try_into().map(|bytes| Code(u32::from_be_bytes(bytes))) else {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "RST_STREAM is not four bytes long"));
        };
        if id == 0 || self.is_idle(id) {
            return Err(Fatal::protocol("RST_STREAM for a stream that was never opened"));
        }
        let is_client = self.role == Role::Client;
        // Charged while the stream is known: where this ends the connection, the caller looks for all that it has open.
        if !is_client && self.streams.get(&id).is_some_and(|stream| !stream.local_ended) {
            self.meters.charge_reset()?;
        }
        let Some(stream) = self.streams.remove(&id) else {
            self.late.end(id);
            self.harmless_late_frame()?;
            return Ok(None);
        };
        let unprocessed = is_client && code == Code::REFUSED_STREAM;
        Ok(Some(Event::Reset { id, key: stream.key, code, by_peer: true, unprocessed }))
    }

    /// SETTINGS (6.5).
    fn on_settings(
        &mut self,
        header: Header,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        if header.stream != 0 {
            return Err(Fatal::protocol("SETTINGS on a stream"));
        }
        if header.has(flag::ACK) {
            return self.on_settings_ack(payload);
        }
        let first = !self.peer.known;
        let window = self.peer.window;
        self.peer.apply(payload, self.role)?;
        settings::write_ack(out);
        if self.peer.table_bytes < HEADER_TABLE_BYTES && self.table_update == TableUpdate::NotNeeded {
            self.table_update = TableUpdate::Due;
        }
        if self.peer.window != window {
            self.shift_send_windows(self.peer.window - window)?;
        }
        if first {
            return Ok(Some(Event::Settings));
        }
        self.meters.charge_frame()?;
        Ok(None)
    }

    fn on_settings_ack(&mut self, payload: &[u8]) -> Result<Option<Event<'static>>, Fatal> {
        if !payload.is_empty() {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "an acknowledgement of SETTINGS is not empty"));
        }
        if self.acknowledged {
            self.meters.charge_frame()?;
            return Ok(None);
        }
        // Until now the peer could count on the larger one of what it was born with and of what we set (6.9.3).
        let shrink = flow::INITIAL - self.stream_window as i32;
        if shrink > 0 {
            self.streams.values_mut().for_each(|stream| stream.receive.shrink(shrink));
        }
        self.acknowledged = true;
        Ok(None)
    }

    /// INITIAL_WINDOW_SIZE changed, which moves the windows of all streams (6.9.2).
    fn shift_send_windows(&mut self, by: i32) -> Result<(), Fatal> {
        for (&id, stream) in &mut self.streams {
            if !stream.send.shift(by) {
                return Err(Fatal::new(Code::FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE overflows a window"));
            }
            if stream.starved && !stream.queued && stream.send.room() > 0 {
                stream.queued = true;
                self.line.push_back(id);
            }
        }
        Ok(())
    }

    /// PING (6.7).
    fn on_ping(
        &mut self,
        header: Header,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let Ok(payload) = <[u8; 8]>::try_from(payload) else {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "PING is not eight bytes long"));
        };
        if header.stream != 0 {
            return Err(Fatal::protocol("PING on a stream"));
        }
        if !header.has(flag::ACK) {
            self.meters.charge_frame()?;
            frame::write_ping(flag::ACK, payload, out);
        } else if payload == PING && self.pings > 0 {
            self.pings -= 1;
            return Ok(Some(Event::Pong));
        } else if payload == DRAIN_PING && self.leaving == Leaving::Announced {
            self.close(Code::NO_ERROR, out);
        } else {
            self.meters.charge_frame()?;
        }
        Ok(None)
    }

    /// GOAWAY (6.8).
    fn on_goaway(&mut self, header: Header, payload: &[u8]) -> Result<Option<Event<'static>>, Fatal> {
        let Some((last, code)) = frame::goaway(payload) else {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "GOAWAY is shorter than eight bytes"));
        };
        if header.stream != 0 {
            return Err(Fatal::protocol("GOAWAY on a stream"));
        }
        self.meters.charge_frame()?;
        self.peer_leaves = true;
        if self.role == Role::Client {
            // Told from the end of this list: the oldest first.
            self.left_out = self.streams.keys().copied().filter(|&id| id > last).collect();
            self.left_out.sort_unstable_by(|a, b| b.cmp(a));
        }
        Ok(Some(Event::GoAway { code }))
    }

    /// WINDOW_UPDATE (6.9).
    fn on_window_update(
        &mut self,
        header: Header,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        let id = header.stream;
        let Some(increment) = frame::number(payload).map(|increment| increment as i32) else {
            return Err(Fatal::new(Code::FRAME_SIZE_ERROR, "WINDOW_UPDATE is not four bytes long"));
        };
        if id == 0 {
            if increment == 0 {
                return Err(Fatal::protocol("WINDOW_UPDATE by nothing"));
            }
            if !self.send_window.shift(increment) {
                return Err(Fatal::new(Code::FLOW_CONTROL_ERROR, "WINDOW_UPDATE overflows the window"));
            }
            return Ok(None);
        }
        if self.is_idle(id) {
            return Err(Fatal::protocol("WINDOW_UPDATE for a stream that was never opened"));
        }
        let Some(stream) = self.streams.get_mut(&id) else {
            self.harmless_late_frame()?;
            return Ok(None);
        };
        if increment == 0 {
            return self.stream_error(id, Code::PROTOCOL_ERROR, out);
        }
        if !stream.send.shift(increment) {
            return self.stream_error(id, Code::FLOW_CONTROL_ERROR, out);
        }
        if !stream.starved || stream.queued || stream.send.room() == 0 {
            return Ok(None);
        }
        // It takes its place behind those that waited for the connection's window before.
        stream.queued = true;
        self.line.push_back(id);
        Ok(None)
    }

    /// A stream error (5.4.2): RST_STREAM, and the caller hears of it if it knew the stream.
    pub(super) fn stream_error(
        &mut self,
        id: StreamId,
        code: Code,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event<'static>>, Fatal> {
        self.meters.charge_error()?;
        frame::write_reset(id, code, out);
        let stream = self.streams.remove(&id);
        match &stream {
            None => self.late.expect(id, self.new_receive_window()),
            Some(stream) if stream.remote_ended => {}
            Some(stream) => self.late.expect(id, stream.receive.left()),
        }
        Ok(stream.map(|stream| Event::Reset {
            id,
            key: stream.key,
            code,
            by_peer: false,
            unprocessed: false,
        }))
    }

    /// A frame that means something came for a closed stream (5.1); `len` bytes of DATA.
    pub(super) fn late_frame(&mut self, id: StreamId, len: u32) -> Result<(), Fatal> {
        if !self.late.is_expected(id) {
            return Err(Fatal::new(Code::STREAM_CLOSED, "a frame came for a closed stream"));
        }
        if self.late.take(len) { Ok(()) } else { self.meters.charge_frame() }
    }

    /// RST_STREAM or WINDOW_UPDATE came for a closed stream: allowed however the stream came to its end (5.1).
    fn harmless_late_frame(&mut self) -> Result<(), Fatal> {
        if self.late.take(0) { Ok(()) } else { self.meters.charge_frame() }
    }

    /// The receive window of a new stream, in bytes. Until the peer has acknowledged our SETTINGS it may count on what
    /// it was born with, or already on ours (6.9.3).
    pub(super) fn new_receive_window(&self) -> u32 {
        if self.acknowledged { self.stream_window } else { self.stream_window.max(flow::INITIAL as u32) }
    }

    /// Whether nobody has opened this stream yet (5.1.1). Servers open none.
    pub(super) fn is_idle(&self, id: StreamId) -> bool {
        match self.role {
            _ if id.is_multiple_of(2) => true,
            Role::Client => id >= self.next_own,
            Role::Server => id > self.last_of_peer,
        }
    }

    /// The peer's half has ended.
    pub(super) fn end_remote(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.remote_ended = true;
            if stream.is_closed() {
                self.complete(id);
            }
        }
    }

    /// Both halves have ended.
    pub(super) fn complete(&mut self, id: StreamId) {
        self.streams.remove(&id);
        self.meters.stream_completed();
    }

    /// Bytes of DATA are of no more use to anyone: the windows open again.
    pub(super) fn give_back(&mut self, id: StreamId, bytes: usize, out: &mut Vec<u8>) {
        if let Some(increment) = self.receive_window.release(bytes, self.connection_window) {
            frame::write_window_update(0, increment, out);
        }
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.remote_ended
            && let Some(increment) = stream.receive.release(bytes, self.stream_window)
        {
            frame::write_window_update(id, increment, out);
        }
    }
}

/// The padding of DATA and HEADERS (6.1): the length that stands in the first byte of the payload.
pub(super) fn padding_of(header: Header, payload: &[u8]) -> Result<u32, Fatal> {
    let padding = payload.first().copied().filter(|_| header.len > 0).map(u32::from);
    // The padding's own length counts too.
    padding
        .filter(|&padding| padding < header.len)
        .ok_or(Fatal::protocol("a frame is padded beyond its own length"))
}
