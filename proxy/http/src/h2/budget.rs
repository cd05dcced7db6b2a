//! How much useless work a peer may cause (RFC 9113, 10.5): cheap to ask for, dear to serve, and no legal frame among
//! it is wrong in itself.
//!
//! Fixed rates would punish busy connections that many callers share: one call in a hundred that is cancelled is many a
//! second. So a bucket is refilled by time *and* by useful work. Whoever wants to waste one unit more must first do an
//! honest one.

use super::{Code, Fatal};

/// How much useless work a peer may cause; each is a bucket that [`tick`](super::Connection::tick) fills up, about once
/// a second, and that useful work refills one by one: a stream that came to its end, a frame with data.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Streams that the peer opened and reset before they were answered (rapid reset, CVE-2023-44487).
    pub resets: u32,
    /// Streams that we reset because the peer broke a rule or opened too many (MadeYouReset, CVE-2025-8671).
    pub errors: u32,
    /// Frames without use: SETTINGS, PING, PRIORITY, empty DATA, small CONTINUATION, frames for closed streams, unknown
    /// types, interim responses.
    pub frames: u32,
}

/// What is left of a [`Budget`].
#[derive(Debug)]
pub(super) struct Meters {
    full: Budget,
    left: Budget,
}

impl Meters {
    pub(super) fn new(budget: Budget) -> Self {
        Self { full: budget, left: budget }
    }

    pub(super) fn refill(&mut self) {
        self.left = self.full;
    }

    /// A stream came to its end in both directions.
    pub(super) fn stream_completed(&mut self) {
        earn(&mut self.left.resets, self.full.resets);
        earn(&mut self.left.errors, self.full.errors);
        // Its head, and what may come late for it: a window, a reset.
        self.useful_frame();
        self.useful_frame();
    }

    /// A frame brought something.
    pub(super) fn useful_frame(&mut self) {
        earn(&mut self.left.frames, self.full.frames);
    }

    pub(super) fn charge_reset(&mut self) -> Result<(), Fatal> {
        charge(&mut self.left.resets, "too many streams were opened and reset")
    }

    pub(super) fn charge_error(&mut self) -> Result<(), Fatal> {
        charge(&mut self.left.errors, "too many streams had to be reset")
    }

    pub(super) fn charge_frame(&mut self) -> Result<(), Fatal> {
        charge(&mut self.left.frames, "too many frames without use")
    }
}

fn earn(left: &mut u32, full: u32) {
    *left = full.min(*left + 1);
}

fn charge(left: &mut u32, text: &'static str) -> Result<(), Fatal> {
    *left = left.checked_sub(1).ok_or(Fatal { code: Code::ENHANCE_YOUR_CALM, text })?;
    Ok(())
}
