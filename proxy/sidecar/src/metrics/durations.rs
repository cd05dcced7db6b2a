//! A histogram of durations with fixed buckets.
//!
//! The buckets' bounds are whole nanoseconds and each is at least twice the one before. So among the durations that
//! take the same number of bits at most one bound lies, and a table of that number and one comparison find the bucket.

use std::{array, fmt, time::Duration};

use prometheus_client::{
    encoding::{MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{
    labels::Bounded,
    summed::{Cells, Handle, Tally},
};

const MICROSECOND: u64 = 1000;
const MILLISECOND: u64 = 1000 * MICROSECOND;
const SECOND: u64 = 1000 * MILLISECOND;

/// Nanoseconds. From a local call to the longest wait that people tolerate.
const BOUNDS: [u64; 15] = [
    500 * MICROSECOND,
    MILLISECOND,
    2500 * MICROSECOND,
    5 * MILLISECOND,
    10 * MILLISECOND,
    25 * MILLISECOND,
    50 * MILLISECOND,
    100 * MILLISECOND,
    250 * MILLISECOND,
    500 * MILLISECOND,
    SECOND,
    2500 * MILLISECOND,
    5 * SECOND,
    10 * SECOND,
    30 * SECOND,
];

/// The last one is for what is longer than all bounds.
const BUCKETS: usize = BOUNDS.len() + 1;

/// By the number of bits that a duration takes in nanoseconds: the lowest bucket that it can be in.
const LOWEST: [u8; 65] = lowest();

const fn lowest() -> [u8; 65] {
    let mut lowest = [0; 65];
    let mut bucket = 0;
    let mut bits = 1;
    while bits < lowest.len() {
        while (bucket as usize) < BOUNDS.len() && BOUNDS[bucket as usize] < 1 << (bits - 1) {
            bucket += 1;
        }
        lowest[bits] = bucket;
        bits += 1;
    }
    lowest
}

const _: () = {
    let mut at = 1;
    while at < BOUNDS.len() {
        assert!(BOUNDS[at] >= 2 * BOUNDS[at - 1], "two bounds may take the same number of bits");
        at += 1;
    }
};

/// A bucket's bound belongs to it.
fn bucket(nanos: u64) -> usize {
    let lowest = usize::from(LOWEST[(u64::BITS - nanos.leading_zeros()) as usize]);
    lowest + usize::from(BOUNDS.get(lowest).is_some_and(|bound| nanos > *bound))
}

/// A thread's part of a histogram.
#[derive(Debug, Default)]
pub struct Durations {
    buckets: [Tally; BUCKETS],
    /// Wraps when the durations come to 584 years; readers take that for a restart.
    nanos: Tally,
}

/// The numbers of all threads.
#[derive(Debug, Clone, Default)]
pub struct Sum {
    buckets: [u64; BUCKETS],
    /// Not a float: adding those in another order could make a sum smaller than it was at the last scrape.
    nanos: u64,
}

impl Cells for Durations {
    type Sum = Sum;
    const TYPE: MetricType = MetricType::Histogram;

    fn add_to(&self, sum: &mut Sum) {
        for (sum, tally) in sum.buckets.iter_mut().zip(&self.buckets) {
            *sum = sum.wrapping_add(tally.get());
        }
        sum.nanos = sum.nanos.wrapping_add(self.nanos.get());
    }

    fn encode(sum: &Sum, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let buckets: [(f64, u64); BUCKETS] = array::from_fn(|at| {
            let bound = BOUNDS.get(at).map_or(f64::INFINITY, |nanos| seconds(*nanos));
            (bound, sum.buckets[at])
        });
        // Not a tally of its own: then a scrape amid an observation could print a count that the buckets deny.
        let count = sum.buckets.iter().copied().fold(0, u64::wrapping_add);
        encoder.encode_histogram::<NoLabelSet>(seconds(sum.nanos), count, &buckets, None)
    }
}

fn seconds(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64()
}

impl<L: Bounded> Handle<L, Durations> {
    /// Counts one duration.
    pub(super) fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.cells.buckets[bucket(nanos)].add(1);
        self.cells.nanos.add(nanos);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_comparing_all(nanos: u64) -> usize {
        BOUNDS.iter().filter(|bound| nanos > **bound).count()
    }

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        for (at, bound) in BOUNDS.into_iter().enumerate() {
            assert_eq!((bucket(bound - 1), bucket(bound), bucket(bound + 1)), (at, at, at + 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BOUNDS.len()));
    }

    #[test]
    fn bounds_are_printed_as_round_seconds() {
        let printed = BOUNDS.map(|bound| seconds(bound).to_string()).join(" ");
        assert_eq!(printed, "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30");
    }

    proptest! {
        #[test]
        fn a_bucket_is_found_as_by_comparing_with_all_bounds(nanos: u64, shift in 0..64_u32) {
            prop_assert_eq!(bucket(nanos >> shift), by_comparing_all(nanos >> shift));
        }
    }
}
