//! Flow-control windows (RFC 9113, 5.2 and 6.9). Bytes are those of whole DATA payloads, padding included.

/// Every window before SETTINGS or WINDOW_UPDATE change it, in bytes (6.9.2).
pub(super) const INITIAL: i32 = 65_535;

/// What we may still send. Below 0 after the peer has shrunk INITIAL_WINDOW_SIZE under what was sent already (6.9.2).
#[derive(Debug, Clone, Copy)]
pub(super) struct SendWindow(i32);

impl SendWindow {
    pub(super) fn new(bytes: i32) -> Self {
        Self(bytes)
    }

    /// Bytes that may be sent now.
    pub(super) fn room(self) -> usize {
        usize::try_from(self.0).unwrap_or(0)
    }

    /// `bytes` were sent, no more than [`room`](Self::room).
    pub(super) fn spend(&mut self, bytes: usize) {
        self.0 -= i32::try_from(bytes).expect("no more than the room");
    }

    /// The window moves; false if it would then exceed 2^31-1.
    #[must_use]
    pub(super) fn shift(&mut self, by: i32) -> bool {
        match self.0.checked_add(by) {
            Some(bytes) => {
                self.0 = bytes;
                true
            }
            None => false,
        }
    }
}

/// What the peer may still send, and what was given back to it but not told yet.
///
/// Bytes received = bytes that the caller holds + `released` + what WINDOW_UPDATE told.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReceiveWindow {
    left: i32,
    released: u32,
}

impl ReceiveWindow {
    /// Of at most 2^31-1 bytes.
    pub(super) fn new(bytes: u32) -> Self {
        Self { left: i32::try_from(bytes).unwrap_or(i32::MAX), released: 0 }
    }

    /// Bytes that the peer may still send.
    pub(super) fn left(self) -> u32 {
        u32::try_from(self.left).unwrap_or(0)
    }

    /// A payload came; false if it is more than the peer was allowed.
    #[must_use]
    pub(super) fn take(&mut self, bytes: u32) -> bool {
        match i32::try_from(bytes) {
            Ok(bytes) if bytes <= self.left || bytes == 0 => {
                self.left -= bytes;
                true
            }
            _ => false,
        }
    }

    /// The peer learnt of a smaller initial window (6.9.2); may go below 0.
    pub(super) fn shrink(&mut self, by: i32) {
        self.left = self.left.saturating_sub(by);
    }

    /// Bytes were used up and may be sent anew. Returns the increment to tell once it is half of the window: fewer,
    /// larger updates, and the peer still never runs dry while we keep up.
    pub(super) fn release(&mut self, bytes: usize, window: u32) -> Option<u32> {
        self.released = self.released.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.released < (window / 2).max(1) {
            return None;
        }
        // A caller that releases what it never got must not overflow the peer's window.
        let increment = i32::try_from(self.released).unwrap_or(i32::MAX).min(i32::MAX - self.left.max(0));
        self.released = 0;
        self.left += increment;
        u32::try_from(increment).ok().filter(|&increment| increment > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_send_window_goes_below_zero_and_not_over_its_limit() {
        let mut window = SendWindow::new(10);
        window.spend(10);
        assert!(window.shift(-5));
        assert_eq!(window.room(), 0);
        assert!(window.shift(6));
        assert_eq!(window.room(), 1);
        assert!(!window.shift(i32::MAX));
        assert_eq!(window.room(), 1);
    }

    #[test]
    fn a_receive_window_is_told_by_halves() {
        let mut window = ReceiveWindow::new(100);
        assert!(window.take(60));
        assert!(!window.take(41));
        assert_eq!(window.release(49, 100), None);
        assert_eq!(window.release(1, 100), Some(50));
        assert!(window.take(90));
        assert!(!window.take(1));
        assert!(window.take(0));
    }

    #[test]
    fn releasing_too_much_overflows_nothing() {
        let mut window = ReceiveWindow::new((1 << 31) - 2);
        assert_eq!(window.release(usize::MAX, 100), Some(1));
        assert_eq!(window.release(usize::MAX, 100), None);
    }
}
