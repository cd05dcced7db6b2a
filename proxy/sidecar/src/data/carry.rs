//! Bytes that a connection has read and does not understand yet.

use std::cell::RefCell;

/// The beginning of something whose rest has not come. Owns memory only while there is one: an idle connection owns no bytes.
#[derive(Default)]
pub(super) struct Carry(RefCell<Vec<u8>>);

impl Carry {
    /// Hands `process` what waited and `bytes` behind it, in one piece, and keeps what it did not use: it returns how many
    /// bytes it did. While it runs, nothing waits here.
    pub(super) fn feed(&self, bytes: &[u8], process: impl FnOnce(&[u8]) -> usize) {
        let mut carry = self.0.take();
        if carry.is_empty() {
            let used = process(bytes);
            carry.extend_from_slice(&bytes[used..]);
        } else {
            carry.extend_from_slice(bytes);
            let used = process(&carry);
            if used == carry.len() {
                carry = Vec::new();
            } else {
                carry.drain(..used);
            }
        }
        *self.0.borrow_mut() = carry;
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.0.borrow().len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_seen_once_and_in_order(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..20)) {
            let (carry, mut seen) = (Carry::default(), Vec::new());
            for piece in &pieces {
                // Understands threes.
                carry.feed(piece, |bytes| {
                    let used = bytes.len() / 3 * 3;
                    seen.extend_from_slice(&bytes[..used]);
                    used
                });
                prop_assert!(carry.len() < 3);
            }
            let all = pieces.concat();
            prop_assert_eq!(&seen[..], &all[..all.len() / 3 * 3]);
            prop_assert_eq!(carry.len(), all.len() % 3);
        }
    }
}
