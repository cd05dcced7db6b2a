//! How often a watch may ask.
//!
//! Two limits. *Polls*: a blocking query returns whenever anything near it changes, also without a change of its own,
//! and a broken server returns it at once for ever; a token bucket lets a few changes through immediately and then
//! one a second, never two within 100 ms. (Sleeping in each round instead would make each index stale, so that no
//! call ever blocked: consul issue 3890.) *Retries*: exponential with full jitter up to 30 s, but never longer than
//! the number of failing watches warrants: a lone watch that retries within a second harms nobody and sees the end of
//! an outage at once, while two hundred share the same four attempts a second. Only a server that asked for less (429)
//! gets the whole back-off. The first watch that succeeds wakes the rest.

use std::time::Duration;

use tokio::time::Instant;

/// Never two polls closer than this.
const MIN_GAP: Duration = Duration::from_millis(100);
/// Polls that may follow each other at `MIN_GAP`, before `REFILL` holds.
const BURST: u32 = 10;
/// One more poll per this.
const REFILL: Duration = Duration::from_secs(1);

const BACK_OFF_BASE: Duration = Duration::from_millis(250);
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// A lone failing watch waits at most this; each further one adds `BACK_OFF_SHARE` for all.
const BACK_OFF_ALONE: Duration = Duration::from_secs(1);
const BACK_OFF_SHARE: Duration = Duration::from_millis(500);

/// The token bucket of one watch.
#[derive(Debug)]
pub(crate) struct Pace {
    tokens: u32,
    refilled: Instant,
    last: Option<Instant>,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: BURST, refilled: now, last: None }
    }

    /// Takes a token; the poll may go out at the instant returned.
    pub(crate) fn next(&mut self, now: Instant) -> Instant {
        let earned =
            u32::try_from(now.duration_since(self.refilled).as_secs() / REFILL.as_secs()).unwrap_or(BURST);
        if self.tokens.saturating_add(earned) >= BURST {
            (self.tokens, self.refilled) = (BURST, now);
        } else {
            self.tokens += earned;
            self.refilled += REFILL * earned;
        }
        let mut at = now;
        if self.tokens == 0 {
            self.refilled += REFILL;
            at = self.refilled;
        } else {
            self.tokens -= 1;
        }
        if let Some(last) = self.last {
            at = at.max(last + MIN_GAP);
        }
        self.last = Some(at);
        at
    }
}

/// The longest that a watch may wait after its `fails`-th failure in a row (from 1), while `failing` watches of the
/// client fail. `overloaded`: the server asked for less (429), so the number of watches does not count.
pub(crate) fn back_off_limit(fails: u32, failing: usize, overloaded: bool) -> Duration {
    let exponential = BACK_OFF_BASE * 2_u32.pow(fails.saturating_sub(1).min(7));
    let others = u32::try_from(failing.saturating_sub(1)).unwrap_or(u32::MAX);
    let cap = if overloaded {
        BACK_OFF_MAX
    } else {
        BACK_OFF_ALONE.saturating_add(BACK_OFF_SHARE.saturating_mul(others)).min(BACK_OFF_MAX)
    };
    exponential.min(cap)
}

/// Full jitter: anything from nothing to `limit`.
pub(crate) fn jitter(limit: Duration) -> Duration {
    limit.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the server does, `n` polls take at least what bucket and gap say.
        #[test]
        fn polls_are_bounded(waits in prop::collection::vec(0_u64..3000, 1..80)) {
            let start = Instant::now();
            let mut now = start;
            let mut pace = Pace::new(start);
            let mut sent: Vec<Instant> = Vec::new();
            for wait in waits {
                let at = pace.next(now);
                prop_assert!(at >= now);
                if let Some(last) = sent.last() {
                    prop_assert!(at - *last >= MIN_GAP);
                }
                sent.push(at);
                for window in 1..=sent.len() {
                    let first = sent[sent.len() - window];
                    let allowed = u64::from(BURST) + (at - first).as_secs() + 1;
                    prop_assert!(window as u64 <= allowed, "{window} polls in {:?}", at - first);
                }
                now = at + Duration::from_millis(wait);
            }
        }

        #[test]
        fn back_off_is_bounded(fails in 1_u32.., failing in 1_usize.., overloaded: bool) {
            let limit = back_off_limit(fails, failing, overloaded);
            prop_assert!(limit >= BACK_OFF_BASE && limit <= BACK_OFF_MAX);
            prop_assert!(back_off_limit(fails.saturating_add(1), failing, overloaded) >= limit);
            prop_assert!(overloaded || limit <= BACK_OFF_ALONE + BACK_OFF_SHARE * u32::try_from(failing).unwrap_or(60));
            prop_assert!(jitter(limit) <= limit);
        }
    }

    /// In the happy path a poll goes out at once.
    #[test]
    fn a_rested_watch_does_not_wait() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        for minute in 1..5 {
            let later = now + Duration::from_secs(60 * minute);
            assert_eq!(pace.next(later), later);
        }
    }
}
