//! When to ask for the next certificate: pure functions, the caller owns the timer.
//!
//! Renewal starts by a third of a certificate's life, so that two thirds of it outlast a control plane that is down:
//! 16 hours of 24. The jitter is taken from that third, never from the two; it keeps a fleet that started together
//! from renewing together.

use std::time::{Duration, SystemTime};

/// The ceiling of the first retry, seconds; with jitter half of it is the fastest.
const FIRST_RETRY: f64 = 1.0;
/// Retries never come slower, seconds: a CA that returned is noticed within minutes.
const SLOWEST_RETRY: f64 = 300.0;

/// When to renew a certificate that was obtained at `obtained` and ends at `not_after`: between 4/15 and 1/3 of that
/// life. The life counts from when it was obtained, not from its backdated start, which for a life of seconds would
/// lie in the past at once.
///
/// Wall clocks jump: wait for it on a monotonic timer, and look at the wall clock again at least every few minutes.
pub fn renew_at(obtained: SystemTime, not_after: SystemTime, random: &mut fastrand::Rng) -> SystemTime {
    let life = not_after.duration_since(obtained).unwrap_or_default();
    let share = (4.0 + random.f64()) / 15.0;
    obtained + life.mul_f64(share)
}

/// How long to wait after the `failures`-th failed attempt in a row (from 1), with `remaining` left until the current
/// certificate ends (zero where there is none, or none any more). It doubles from 1 s up to 5 minutes, is never more
/// than a quarter of what remains, so that several attempts fit before the end, and has jitter of a half. It never
/// gives up: after the end the same steps go on.
pub fn retry_delay(failures: u32, remaining: Duration, random: &mut fastrand::Rng) -> Duration {
    let doubled = FIRST_RETRY * 2f64.powi(i32::try_from(failures.saturating_sub(1).min(30)).unwrap_or(30));
    let mut ceiling = doubled.min(SLOWEST_RETRY);
    if !remaining.is_zero() {
        ceiling = ceiling.min((remaining.as_secs_f64() / 4.0).max(FIRST_RETRY));
    }
    Duration::from_secs_f64(ceiling * (0.5 + random.f64() / 2.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    proptest! {
        #[test]
        fn renewal_leaves_two_thirds_of_life(start in 0u64..4_000_000_000, life in 0u64..400_000_000, seed: u64) {
            let obtained = UNIX_EPOCH + Duration::from_secs(start);
            let life = Duration::from_secs(life);
            let at = renew_at(obtained, obtained + life, &mut fastrand::Rng::with_seed(seed));
            let age = at.duration_since(obtained).unwrap();
            prop_assert!(age >= life.mul_f64(0.266) && age <= life.mul_f64(0.3334), "{age:?} of {life:?}");
        }

        #[test]
        fn a_certificate_that_ended_is_renewed_at_once(start in 1000u64..4_000_000_000, seed: u64) {
            let obtained = UNIX_EPOCH + Duration::from_secs(start);
            let ended = obtained - Duration::from_secs(1000);
            prop_assert_eq!(renew_at(obtained, ended, &mut fastrand::Rng::with_seed(seed)), obtained);
        }

        #[test]
        fn retries_are_bounded_on_both_sides(failures: u32, remaining in 0u64..10_000_000, seed: u64) {
            let delay = retry_delay(failures, Duration::from_secs(remaining), &mut fastrand::Rng::with_seed(seed));
            prop_assert!(delay >= Duration::from_millis(500) && delay <= Duration::from_mins(5), "{delay:?}");
            prop_assert!(remaining < 4 || delay <= Duration::from_secs(remaining) / 4, "{delay:?} of {remaining} s");
        }
    }

    #[test]
    fn retries_back_off() {
        let mut random = fastrand::Rng::with_seed(7);
        let hour = Duration::from_hours(1);
        assert!(retry_delay(1, hour, &mut random) <= Duration::from_secs(1));
        assert!(retry_delay(5, hour, &mut random) >= Duration::from_secs(8));
        assert!(retry_delay(40, hour, &mut random) >= Duration::from_secs(150));
    }
}
