//! The streams of a connection (RFC 9113, 5.1).
//!
//! Only streams that are open or half-closed are kept. "Idle" and "closed" follow from the number: streams are opened
//! in rising order, so one above the highest is idle, and one below it that is not kept is closed. The one thing that
//! this cannot tell is *why* a stream is closed, and that matters: after our own reset the peer's frames may still be
//! on their way. [`LateFrames`] knows.
#![allow(clippy::cast_possible_truncation, reason = "a hasher mixes the halves of a word")]

use super::flow::{ReceiveWindow, SendWindow};
use super::{Code, StreamId};
use std::collections::HashMap;

use std::hash::{BuildHasherDefault, Hasher};

/// One stream that is open or half-closed.
#[derive(Debug)]
pub(super) struct Stream {
    /// The caller's, 0 before it has one.
    pub(super) key: u64,
    pub(super) keyed: bool,
    pub(super) send: SendWindow,
    pub(super) receive: ReceiveWindow,
    /// Bytes of the peer's body that its content-length still promises.
    pub(super) promised: Option<u64>,
    /// We have sent END_STREAM.
    pub(super) local_ended: bool,
    /// The peer has sent END_STREAM.
    pub(super) remote_ended: bool,
    /// The peer's final head came: the next one is trailers. Always so on the server.
    pub(super) head_seen: bool,
    /// What the request was, for its response decides by it whether there is a body (RFC 9110, 6.4.1).
    pub(super) asked: Asked,
    /// The caller waits for [`Writable`](super::Event::Writable).
    pub(super) starved: bool,
    /// The stream is in the line for the connection's send window.
    pub(super) queued: bool,
}

/// What a response answers (client).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Head,
    Connect,
    Other,
}

impl Stream {
    pub(super) fn new(key: Option<u64>, send: i32, receive: u32) -> Self {
        Self {
            key: key.unwrap_or(0),
            keyed: key.is_some(),
            send: SendWindow::new(send),
            receive: ReceiveWindow::new(receive),
            promised: None,
            local_ended: false,
            remote_ended: false,
            head_seen: false,
            asked: Asked::Other,
            starved: false,
            queued: false,
        }
    }

    /// A DATA frame came: `len` bytes for the windows, `data` of them without padding. An error is why the stream ends.
    pub(super) fn admit(&mut self, len: u32, data: u32, end: bool) -> Result<(), Code> {
        if self.remote_ended {
            return Err(Code::STREAM_CLOSED);
        }
        // A body before its head.
        if !self.head_seen {
            return Err(Code::PROTOCOL_ERROR);
        }
        if !self.receive.take(len) {
            return Err(Code::FLOW_CONTROL_ERROR);
        }
        // The sum of all DATA must be the content-length (8.1.1).
        if let Some(promised) = &mut self.promised {
            *promised = promised.checked_sub(data.into()).ok_or(Code::PROTOCOL_ERROR)?;
            if end && *promised > 0 {
                return Err(Code::PROTOCOL_ERROR);
            }
        }
        Ok(())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.local_ended && self.remote_ended
    }
}

pub(super) type Streams = HashMap<StreamId, Stream, BuildHasherDefault<Spread>>;

/// Hashes a stream's number. Peers choose the numbers of their streams, but no more than
/// [`Config::streams`](super::Config::streams) of them at once: collisions cannot hurt, so one multiplication will do.
#[derive(Debug, Default)]
pub(super) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u32(&mut self, id: u32) {
        // 2^64 divided by the golden ratio. The table takes its index from the low bits, and the product's best are in
        // its middle.
        self.0 = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_right(32);
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((self.0 as u32).wrapping_shl(8) ^ u32::from(*byte));
        }
    }
}

/// How many streams that we reset are known one by one.
const REMEMBERED: usize = 128;

/// Frames without data that an honest peer may have on its way when it learns of a reset: an interim and a final head,
/// trailers, a window, its own reset.
const FRAMES_ON_THEIR_WAY: u32 = 5;

/// Which closed streams the peer may still send for, because it may not have seen our reset (5.1, "closed"), and how
/// much of it is no abuse.
///
/// Memory is bounded by number and by time. What is forgotten is judged leniently: all closed streams up to the highest
/// forgotten one may be late, for an error that a broken peer gets away with is better than a good peer's connection
/// that ends.
#[derive(Debug, Default)]
pub(super) struct LateFrames {
    reset: Vec<StreamId>,
    forgotten: StreamId,
    /// What peers may have had on its way, over all streams.
    frames: u32,
    bytes: u32,
}

impl LateFrames {
    /// We reset this stream before the peer had ended it, when it could still send `window` bytes.
    pub(super) fn expect(&mut self, id: StreamId, window: u32) {
        if self.reset.len() == REMEMBERED {
            self.forget();
        }
        self.reset.push(id);
        self.frames = self.frames.saturating_add(FRAMES_ON_THEIR_WAY);
        self.bytes = self.bytes.saturating_add(window);
    }

    /// The peer has reset this stream as well: whatever it sends for it from now on is no late frame.
    pub(super) fn end(&mut self, id: StreamId) {
        self.reset.retain(|other| *other != id);
    }

    /// Whether frames for this closed stream may be late, not wrong.
    pub(super) fn is_expected(&self, id: StreamId) -> bool {
        id <= self.forgotten || self.reset.contains(&id)
    }

    /// A frame came late. False if honest peers have no more than what came before. Data counts by its bytes, for it
    /// may be cut small.
    #[must_use]
    pub(super) fn take(&mut self, data: u32) -> bool {
        let (left, one) = if data > 0 { (&mut self.bytes, data) } else { (&mut self.frames, 1) };
        left.checked_sub(one).inspect(|rest| *left = *rest).is_some()
    }

    /// Frees the memory.
    pub(super) fn forget(&mut self) {
        let highest = std::mem::take(&mut self.reset).into_iter().max();
        self.forgotten = self.forgotten.max(highest.unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_frames_are_expected_where_we_reset() {
        let mut late = LateFrames::default();
        late.expect(5, 0);
        assert!(late.is_expected(5));
        assert!(!late.is_expected(3) && !late.is_expected(7));
        late.forget();
        assert!(late.is_expected(3) && late.is_expected(5));
        assert!(!late.is_expected(7));
    }

    #[test]
    fn nothing_is_late_after_the_peers_own_reset() {
        let mut late = LateFrames::default();
        late.expect(5, 10);
        late.expect(7, 10);
        late.end(5);
        assert!(!late.is_expected(5) && late.is_expected(7));
    }

    #[test]
    fn late_frames_are_no_more_than_the_window_and_a_few() {
        let mut late = LateFrames::default();
        assert!(!late.take(1) && !late.take(0));
        late.expect(5, 10);
        assert!(late.take(9) && !late.take(2) && late.take(1));
        assert_eq!((0..10).filter(|_| late.take(0)).count(), 5);
    }

    #[test]
    fn the_memory_of_resets_is_bounded() {
        let mut late = LateFrames::default();
        for id in (1..100_000).step_by(2) {
            late.expect(id, u32::MAX);
            assert!(late.is_expected(id));
        }
        assert!(late.reset.capacity() <= 2 * REMEMBERED);
    }
}
