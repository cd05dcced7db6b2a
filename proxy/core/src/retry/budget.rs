//! How many retries a service may get, over all threads.
//!
//! A retry is let go if, with it, the retries of the last ten seconds are no more than a share of the requests of the last ten seconds and
//! a few beside. So a service that fails wholly is asked little more often than without retries, whatever each request's own policy is.
//!
//! **Exact**: a second's counts are one word, so that to begin a new second and to count are one step. A retry is counted first and looked
//! at afterwards: of two at once each sees the other, and both may be refused where one would have fitted; too many are never let go.
//! Seconds are cut off the conservative way: requests count for at most ten seconds, retries for at least ten.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use super::Retry;
use crate::padded::Padded;

/// How far a budget looks back, in seconds: as long as a usual restart, as short as an incident should be felt.
const WINDOW: u64 = 10;

/// Seconds that are remembered: more than the window, so that threads whose clocks were read at different moments do not
/// meet in one word.
const SECONDS: usize = 16;

const REQUEST_BITS: u32 = 20;
const RETRY_BITS: u32 = 16;
const MAX_REQUESTS: u64 = (1 << REQUEST_BITS) - 1;
const MAX_RETRIES: u64 = (1 << RETRY_BITS) - 1;

/// The requests and retries of one service, of all threads.
#[derive(Debug)]
pub struct Budget {
    begun: Instant,
    /// By second since `begun`, modulo [`SECONDS`].
    seconds: Padded<[AtomicU64; SECONDS]>,
}

/// What one word holds: the second that it counts (28 bits, eight years), requests, retries. A full count stays full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counts {
    second: u64,
    requests: u64,
    retries: u64,
}

impl Counts {
    fn unpack(word: u64) -> Self {
        Self {
            second: word >> (REQUEST_BITS + RETRY_BITS),
            requests: (word >> RETRY_BITS) & MAX_REQUESTS,
            retries: word & MAX_RETRIES,
        }
    }

    fn pack(self) -> u64 {
        (self.second << (REQUEST_BITS + RETRY_BITS)) | (self.requests << RETRY_BITS) | self.retries
    }
}

impl Budget {
    /// A budget in which nothing has happened yet. `begun` is the earliest time that it can be asked about.
    pub fn new(begun: Instant) -> Self {
        Self { begun, seconds: Padded::default() }
    }

    /// Counts a request; not its retries.
    pub fn request(&self, now: Instant) {
        self.count(self.second(now), |counts| counts.requests = MAX_REQUESTS.min(counts.requests + 1));
    }

    /// Counts a retry, if there is room for it.
    pub fn take(&self, retry: &Retry, now: Instant) -> bool {
        let second = self.second(now);
        let counted = self.count(second, |counts| counts.retries = MAX_RETRIES.min(counts.retries + 1));
        let (requests, retries) = self.sum(second);
        let most = requests * u64::from(retry.budget_percent) + u64::from(retry.budget_floor) * WINDOW * 100;
        let fits = retries * 100 <= most && counted.retries < MAX_RETRIES;
        if !fits {
            self.forget_retry(counted.second);
        }
        fits
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begun).as_secs()
    }

    fn word(&self, second: u64) -> &AtomicU64 {
        #[expect(clippy::cast_possible_truncation, reason = "less than SECONDS")]
        let at = (second % SECONDS as u64) as usize;
        &self.seconds.0[at]
    }

    /// Changes a second's counts, from zero where they were an earlier second's. Returns what they are now.
    fn count(&self, second: u64, change: impl Fn(&mut Counts)) -> Counts {
        let word = self.word(second);
        let mut old = word.load(Ordering::Relaxed);
        loop {
            let mut counts = Counts::unpack(old);
            if counts.second < second {
                counts = Counts { second, requests: 0, retries: 0 };
            }
            change(&mut counts);
            // Sequentially consistent: of two takes in different seconds, one must see the other's retry.
            match word.compare_exchange_weak(old, counts.pack(), Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return counts,
                Err(other) => old = other,
            }
        }
    }

    fn forget_retry(&self, second: u64) {
        // Where a later second has begun meanwhile, it was forgotten already.
        let forgotten = |word| {
            let counts = Counts::unpack(word);
            (counts.second == second && counts.retries > 0).then(|| word - 1)
        };
        let _ = self.word(second).fetch_update(Ordering::SeqCst, Ordering::Relaxed, forgotten);
    }

    /// Requests and retries of the window.
    fn sum(&self, second: u64) -> (u64, u64) {
        let (mut requests, mut retries) = (0, 0);
        for word in &self.seconds.0 {
            let counts = Counts::unpack(word.load(Ordering::SeqCst));
            if counts.second + WINDOW > second {
                requests += counts.requests;
            }
            if counts.second + WINDOW >= second {
                retries += counts.retries;
            }
        }
        (requests, retries)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn policy(budget_percent: u32, budget_floor: u32) -> Retry {
        Retry { budget_percent, budget_floor, ..Retry::default() }
    }

    #[test]
    fn a_budget_is_a_share_and_a_floor_and_comes_back() {
        let begun = Instant::now();
        let budget = Budget::new(begun);
        let taken = |retry: &Retry, now| (0..1000).take_while(|_| budget.take(retry, now)).count();
        assert_eq!(taken(&policy(20, 0), begun), 0);
        assert_eq!(taken(&policy(20, 2), begun), 20);
        for _ in 0..100 {
            budget.request(begun);
        }
        assert_eq!(taken(&policy(20, 2), begun), 20);
        assert_eq!(taken(&policy(20, 2), begun + Duration::from_secs(9)), 0);
        assert_eq!(taken(&policy(20, 2), begun + Duration::from_secs(11)), 20, "the floor alone");
    }

    /// Threads ask for as many retries as they make requests, at one moment.
    fn hammer(threads: u32, retry: &Retry) -> (u64, u64) {
        let now = Instant::now();
        let budget = Budget::new(now);
        let each = 4000;
        let granted = std::thread::scope(|scope| {
            let work = || {
                (0..each).filter(|_| {
                    budget.request(now);
                    budget.take(retry, now)
                })
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(move || work().count())).collect();
            running.into_iter().map(|thread| thread.join().unwrap() as u64).sum::<u64>()
        });
        let rest = (0..u32::MAX).take_while(|_| budget.take(retry, now)).count() as u64;
        (granted + rest, u64::from(threads) * each)
    }

    #[test]
    fn threads_together_get_what_one_gets() {
        for threads in [1, 2, 4] {
            for (percent, floor) in [(20, 0), (20, 10), (0, 10), (100, 3)] {
                let (granted, requests) = hammer(threads, &policy(percent, floor));
                let most = requests * u64::from(percent) / 100 + u64::from(floor) * WINDOW;
                // What was refused while another was looked at is there to be taken afterwards.
                assert_eq!(granted, most, "{threads} threads, {percent} percent and {floor}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_window_ever_has_too_many_retries(
            steps in prop::collection::vec((any::<bool>(), 0_u64..1500), 1..300), percent in 0_u32..=100, floor in 0_u32..3,
        ) {
            let mut now = Instant::now();
            let budget = Budget::new(now);
            let (mut requests, mut retries) = (Vec::new(), Vec::new());
            let within = |times: &[Instant], now: Instant| {
                times.iter().filter(|at| now.duration_since(**at) < Duration::from_secs(WINDOW)).count() as u64
            };
            for (is_request, wait) in steps {
                now += Duration::from_millis(wait.saturating_sub(1000));
                if is_request {
                    budget.request(now);
                    requests.push(now);
                } else if budget.take(&policy(percent, floor), now) {
                    retries.push(now);
                    let most = within(&requests, now) * u64::from(percent) + u64::from(floor) * WINDOW * 100;
                    prop_assert!(within(&retries, now) * 100 <= most);
                }
            }
        }
    }
}
