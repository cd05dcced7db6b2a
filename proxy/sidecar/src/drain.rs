//! How a sidecar leaves.
//!
//! The workload beside it gets its SIGTERM at the same moment, may go on serving for seconds, and needs its own
//! outgoing connections for as long. So inbound goes first and outbound waits for it: [`Phase::Inbound`] tells callers
//! to go elsewhere while everything still works, [`Phase::Outbound`] follows when the last inbound work is done (and
//! `drain.min` has passed, for callers that have not heard yet), [`Phase::Now`] at `drain.max`.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::config::DrainTimes;

/// How far a shutdown has come. Later phases are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Phase {
    /// No shutdown.
    #[default]
    Serving,
    /// Inbound: accept still, but send GOAWAY and `Connection: close`. Outbound is as always.
    Inbound,
    /// Accept nothing any more; end as soon as what is under way is done.
    Outbound,
    /// Cut what is left.
    Now,
}

/// Which direction a piece of work belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// To the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

/// The shutdown of this proxy, shared by all threads. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    phase: watch::Sender<Phase>,
    inbound: AtomicUsize,
    outbound: AtomicUsize,
    changed: Notify,
}

impl Drain {
    /// Where we are.
    pub fn phase(&self) -> Phase {
        *self.0.phase.borrow()
    }

    /// Waits until `phase` or a later one is reached.
    pub async fn reached(&self, phase: Phase) {
        let mut phases = self.0.phase.subscribe();
        // The sender lives in `self`.
        let _ = phases.wait_for(|current| *current >= phase).await;
    }

    /// Goes on to `phase`; never goes back.
    pub fn advance(&self, phase: Phase) {
        self.0.phase.send_if_modified(|current| {
            let later = phase > *current;
            if later {
                *current = phase;
            }
            later
        });
    }

    /// Counts one connection (or stream) as under way until the guard is dropped. An inbound connection that is only
    /// kept open for a next request need not be counted.
    pub fn work(&self, side: Side) -> Work {
        self.0.counter(side).fetch_add(1, Ordering::Relaxed);
        Work { shared: self.0.clone(), side }
    }

    /// Pieces of work under way.
    pub fn under_way(&self, side: Side) -> usize {
        self.0.counter(side).load(Ordering::Acquire)
    }

    /// Waits until nothing is under way on this side.
    pub async fn idle(&self, side: Side) {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.under_way(side) == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Goes through all phases. The caller has told the controller already.
    pub async fn run(&self, times: &DrainTimes) {
        let start = Instant::now();
        self.advance(Phase::Inbound);
        let end = start + times.max.get();
        let quiet = async {
            tokio::time::sleep_until(start + times.min.get()).await;
            self.idle(Side::Inbound).await;
            self.advance(Phase::Outbound);
            self.idle(Side::Outbound).await;
            // Work may still have come in between the two.
            self.idle(Side::Inbound).await;
        };
        if tokio::time::timeout_at(end, quiet).await.is_err() {
            let (inbound, outbound) = (self.under_way(Side::Inbound), self.under_way(Side::Outbound));
            tracing::warn!(inbound, outbound, "drain.max has passed: cutting what is left");
        }
        self.advance(Phase::Now);
    }
}

impl Shared {
    fn counter(&self, side: Side) -> &AtomicUsize {
        match side {
            Side::Inbound => &self.inbound,
            Side::Outbound => &self.outbound,
        }
    }
}

/// A piece of work under way.
#[derive(Debug)]
pub struct Work {
    shared: Arc<Shared>,
    side: Side,
}

impl Drop for Work {
    fn drop(&mut self) {
        if self.shared.counter(self.side).fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::ConfigDuration;

    const TIMES: DrainTimes =
        DrainTimes { min: ConfigDuration::from_millis(5_000), max: ConfigDuration::from_millis(25_000) };

    #[tokio::test(start_paused = true)]
    async fn outbound_stays_until_inbound_is_done() {
        let drain = Drain::default();
        let (inbound, outbound) = (drain.work(Side::Inbound), drain.work(Side::Outbound));
        let start = Instant::now();
        let run = tokio::spawn({
            let drain = drain.clone();
            async move { drain.run(&TIMES).await }
        });
        drain.reached(Phase::Inbound).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(drain.phase(), Phase::Inbound);
        drop(inbound);
        drain.reached(Phase::Outbound).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(drain.phase(), Phase::Outbound);
        drop(outbound);
        run.await.unwrap();
        assert_eq!(drain.phase(), Phase::Now);
        assert!(start.elapsed() < Duration::from_millis(11_010));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_proxy_still_waits_for_callers_to_hear_of_it() {
        let drain = Drain::default();
        let start = Instant::now();
        drain.run(&TIMES).await;
        assert!(start.elapsed() >= Duration::from_secs(5) && start.elapsed() < Duration::from_millis(5_010));
    }

    #[tokio::test(start_paused = true)]
    async fn endless_work_is_cut() {
        let drain = Drain::default();
        let _work = drain.work(Side::Outbound);
        let start = Instant::now();
        drain.run(&TIMES).await;
        assert!(
            start.elapsed() >= Duration::from_secs(25) && start.elapsed() < Duration::from_millis(25_010)
        );
    }

    #[test]
    fn phases_never_go_back() {
        let drain = Drain::default();
        drain.advance(Phase::Now);
        drain.advance(Phase::Inbound);
        assert_eq!(drain.phase(), Phase::Now);
    }
}
