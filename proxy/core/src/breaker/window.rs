//! How many successes and failures there were lately, over all threads, without a lock.
//!
//! The window is cut into ten slots; what counts is the current one and the nine before it. A slot's counts and the number of the slot
//! are one word, so that to begin a new one and to count are one step, and nothing is lost or counted twice.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Slots that a window is cut into.
const SLOTS: u64 = 10;

/// Slots that are kept: more, so that threads whose clocks were read at different moments do not meet in one word.
const KEPT: usize = 16;

/// The shortest slot: with it, a slot's number has room for three years.
const MIN_SLOT: Duration = Duration::from_millis(100);

const COUNT_BITS: u32 = 17;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;

/// Successes and failures of a window.
#[derive(Debug, Default)]
pub(super) struct Window {
    slots: [AtomicU64; KEPT],
}

/// How long a slot of a window is, in milliseconds.
pub(super) fn slot_length(window: Duration) -> u64 {
    let slot = (window / 10).max(MIN_SLOT);
    u64::try_from(slot.as_millis()).unwrap_or(u64::MAX)
}

#[derive(Clone, Copy)]
struct Counts {
    slot: u64,
    successes: u64,
    failures: u64,
}

impl Counts {
    fn unpack(word: u64) -> Self {
        Self {
            slot: word >> (2 * COUNT_BITS),
            successes: (word >> COUNT_BITS) & MAX_COUNT,
            failures: word & MAX_COUNT,
        }
    }

    fn pack(self) -> u64 {
        (self.slot << (2 * COUNT_BITS)) | (self.successes << COUNT_BITS) | self.failures
    }
}

impl Window {
    fn word(&self, slot: u64) -> &AtomicU64 {
        #[expect(clippy::cast_possible_truncation, reason = "less than KEPT")]
        let at = (slot % KEPT as u64) as usize;
        &self.slots[at]
    }

    /// Counts one in this slot: the time by [`slot_length`].
    pub(super) fn count(&self, slot: u64, success: bool) {
        let counted = |word| {
            let mut counts = Counts::unpack(word);
            if counts.slot < slot {
                counts = Counts { slot, successes: 0, failures: 0 };
            }
            if counts.successes.max(counts.failures) == MAX_COUNT {
                // Full, at more than a hundred thousand: what matters is the share.
                counts.successes /= 2;
                counts.failures /= 2;
            }
            *(if success { &mut counts.successes } else { &mut counts.failures }) += 1;
            Some(counts.pack())
        };
        // It always counts.
        let _ = self.word(slot).fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted);
    }

    /// Successes and failures of the window that ends with this slot.
    pub(super) fn counts(&self, slot: u64) -> (u64, u64) {
        let counts = self.slots.iter().map(|word| Counts::unpack(word.load(Ordering::Relaxed)));
        let recent = counts.filter(|counts| counts.slot + SLOTS > slot);
        recent.fold((0, 0), |sum, counts| (sum.0 + counts.successes, sum.1 + counts.failures))
    }

    pub(super) fn clear(&self) {
        for word in &self.slots {
            word.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_are_those_of_a_list(steps in prop::collection::vec((0_u64..12, any::<bool>()), 0..200)) {
            let window = Window::default();
            // As after a while: slots of long ago are not the present ones.
            let mut slot = 1000;
            let mut all: Vec<(u64, bool)> = Vec::new();
            for (wait, success) in steps {
                slot += wait.saturating_sub(8);
                window.count(slot, success);
                all.push((slot, success));
                let of = |wanted| {
                    let recent = all.iter().filter(|(at, success)| *at + SLOTS > slot && *success == wanted);
                    recent.count() as u64
                };
                prop_assert_eq!(window.counts(slot), (of(true), of(false)));
                prop_assert_eq!(window.counts(slot + SLOTS), (0, 0));
            }
        }
    }

    #[test]
    fn threads_lose_nothing() {
        let window = Window::default();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let window = &window;
                scope.spawn(move || {
                    for n in 0..10_000 {
                        window.count(20 + n / 1000, (n + thread) % 4 != 0);
                    }
                });
            }
        });
        assert_eq!(window.counts(29), (30_000, 10_000));
    }

    #[test]
    fn a_full_slot_keeps_its_share() {
        let window = Window::default();
        for n in 0..1_000_000_u32 {
            window.count(1, n % 4 != 0);
        }
        let (successes, failures) = window.counts(1);
        assert!(successes > 60_000 && (successes / 3).abs_diff(failures) < 10, "{successes} {failures}");
    }
}
