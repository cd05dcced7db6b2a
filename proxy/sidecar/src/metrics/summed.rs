//! Families whose numbers belong to one thread each and are summed when scraped.
//!
//! A counter that all threads raise costs each of them a cache line that the others keep taking away. Here a thread
//! has cells of its own for each series it counts, and adds with a plain load and store: nobody else writes them, so
//! nothing can be lost in between. A scrape reads the cells of all threads while they go on writing. It may miss what
//! is being counted at that moment, but no number that it prints is ever lower than one it printed before.
//!
//! Handles are asked for once per edge or connection, under the family's lock. The last handle that a thread drops
//! leaves its numbers with the series, under the same lock: a scrape finds them in one place or the other, never in
//! both.

use std::{
    collections::HashMap,
    fmt,
    marker::PhantomData,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::labels::{Bounded, MAX_SERIES};

/// A number that one thread writes and others may read. Wraps like any Prometheus counter that starts again.
#[derive(Debug, Default)]
pub(super) struct Tally(AtomicU64);

impl Tally {
    /// Only for the thread that owns it: two that add at once would lose one of the additions.
    pub(super) fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    // Relaxed is enough: each number stands for itself, and a single atomic is never seen to go back.
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one thread counts of one series.
pub trait Cells: Default + Send + Sync + 'static {
    /// The numbers of all threads.
    type Sum: Default + Clone + Send + 'static;
    /// As the family is printed.
    const TYPE: MetricType;

    /// Adds this thread's numbers.
    fn add_to(&self, sum: &mut Self::Sum);

    /// Prints the numbers.
    fn encode(sum: &Self::Sum, encoder: MetricEncoder<'_>) -> fmt::Result;
}

/// A thread's part of a counter.
#[derive(Debug, Default)]
pub struct Count(Tally);

impl Cells for Count {
    type Sum = u64;
    const TYPE: MetricType = MetricType::Counter;

    fn add_to(&self, sum: &mut u64) {
        *sum = sum.wrapping_add(self.0.get());
    }

    fn encode(sum: &u64, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_counter::<NoLabelSet, _, u64>(sum, None)
    }
}

/// A family with a bound on its series. Clones are the same family.
pub(super) struct Summed<L, C: Cells>(Arc<Mutex<Table<L, C>>>);

type Table<L, C> = HashMap<Arc<L>, Series<C>>;

struct Series<C: Cells> {
    /// What threads counted whose handles are gone.
    left: C::Sum,
    /// At most one entry per thread.
    threads: Vec<(ThreadId, Arc<C>)>,
}

impl<C: Cells> Default for Series<C> {
    fn default() -> Self {
        Self { left: C::Sum::default(), threads: Vec::new() }
    }
}

impl<C: Cells> Series<C> {
    fn sum(&self) -> C::Sum {
        let mut sum = self.left.clone();
        for (_, cells) in &self.threads {
            cells.add_to(&mut sum);
        }
        sum
    }
}

impl<L, C: Cells> Summed<L, C> {
    fn lock(&self) -> MutexGuard<'_, Table<L, C>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<L: Bounded, C: Cells> Summed<L, C> {
    /// This thread's handle of a series.
    pub(super) fn handle(&self, labels: Arc<L>) -> Handle<L, C> {
        let mut table = self.lock();
        let fits = table.len() < MAX_SERIES || table.contains_key(&labels);
        let labels = if fits { labels } else { Arc::new(labels.other()) };
        let series = table.entry(labels.clone()).or_default();
        let this = thread::current().id();
        let known = series.threads.iter().find(|(thread, _)| *thread == this);
        let cells = if let Some((_, cells)) = known {
            cells.clone()
        } else {
            // The memory comes from the thread that will write it, so that its neighbours are mostly its own as well.
            let cells = Arc::new(C::default());
            series.threads.push((this, cells.clone()));
            cells
        };
        Handle { family: self.clone(), labels, cells, one_thread: PhantomData }
    }
}

impl<L, C: Cells> Clone for Summed<L, C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<L, C: Cells> Default for Summed<L, C> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<L, C: Cells> fmt::Debug for Summed<L, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Summed")
    }
}

impl<L: EncodeLabelSet, C: Cells> EncodeMetric for Summed<L, C> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        // Printing thousands of series takes milliseconds: no thread that wants a handle shall wait for that.
        let sums: Vec<_> =
            self.lock().iter().map(|(labels, series)| (labels.clone(), series.sum())).collect();
        for (labels, sum) in sums {
            C::encode(&sum, encoder.encode_family(&*labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        C::TYPE
    }

    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

/// One thread's handle of one series. All handles that a thread has of a series count into the same cells.
pub struct Handle<L: Bounded, C: Cells> {
    family: Summed<L, C>,
    labels: Arc<L>,
    pub(super) cells: Arc<C>,
    /// Neither `Send` nor `Sync`: what makes the cells' plain load and store correct.
    one_thread: PhantomData<*const ()>,
}

impl<L: Bounded> Handle<L, Count> {
    /// Counts one.
    pub fn inc(&self) {
        self.inc_by(1);
    }

    /// Counts `n`.
    pub fn inc_by(&self, n: u64) {
        self.cells.0.add(n);
    }
}

impl<L: Bounded, C: Cells> Drop for Handle<L, C> {
    fn drop(&mut self) {
        // One is the table's and one ours. All others are handles of this thread, so that the number stands still.
        if Arc::strong_count(&self.cells) > 2 {
            return;
        }
        let mut table = self.family.lock();
        let Some(series) = table.get_mut(&self.labels) else { return };
        if let Some(at) = series.threads.iter().position(|(_, cells)| Arc::ptr_eq(cells, &self.cells)) {
            series.threads.swap_remove(at);
            self.cells.add_to(&mut series.left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::labels::PickLabels, *};

    fn labels(endpoint: &str) -> Arc<PickLabels> {
        Arc::new(PickLabels { service: "orders.default".into(), endpoint: endpoint.into() })
    }

    fn only_sum(family: &Summed<PickLabels, Count>) -> u64 {
        let table = family.lock();
        assert_eq!(table.len(), 1);
        table.values().next().unwrap().sum()
    }

    fn threads(family: &Summed<PickLabels, Count>) -> usize {
        family.lock().values().map(|series| series.threads.len()).sum()
    }

    #[test]
    fn handles_of_one_thread_share_its_cells() {
        let family = Summed::default();
        let first: Handle<_, Count> = family.handle(labels("a"));
        let second = family.handle(labels("a"));
        first.inc_by(3);
        second.inc_by(4);
        assert_eq!((threads(&family), only_sum(&family)), (1, 7));
    }

    #[test]
    fn what_was_counted_stays_when_the_handles_go() {
        let family = Summed::default();
        let first: Handle<_, Count> = family.handle(labels("a"));
        let second = family.handle(labels("a"));
        first.inc();
        drop(first);
        second.inc();
        assert_eq!((threads(&family), only_sum(&family)), (1, 2));
        drop(second);
        assert_eq!((threads(&family), only_sum(&family)), (0, 2));
        family.handle(labels("a")).inc();
        assert_eq!((threads(&family), only_sum(&family)), (0, 3));
    }

    #[test]
    fn a_full_family_counts_what_is_new_as_other_and_what_it_knows_as_itself() {
        let family: Summed<PickLabels, Count> = Summed::default();
        for endpoint in 0..MAX_SERIES + 10 {
            family.handle(labels(&endpoint.to_string())).inc();
        }
        family.handle(labels("7")).inc();
        let table = family.lock();
        assert_eq!(table.len(), MAX_SERIES + 1);
        assert_eq!(table[&labels("x").other()].sum(), 10);
        assert_eq!(table[&labels("7")].sum(), 2);
    }
}
