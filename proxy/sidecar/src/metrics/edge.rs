//! What a worker counts of one edge: requests by outcome, their durations, and bytes.

use std::{cell::RefCell, ptr, sync::Arc, time::Duration};

use super::{
    durations::Durations,
    labels::{EdgeLabels, RequestLabels},
    summed::{Count, Handle, Summed},
};

/// Outcomes whose counters an edge keeps at hand. Services answer with a handful; a peer that makes up status codes
/// pays with a look-up for each that is rarer than these.
const MAX_OUTCOMES: usize = 32;

/// Counts the bytes of an edge.
pub type Bytes = Handle<EdgeLabels, Count>;

/// Handles of one edge. Belongs to one thread.
pub struct Edge {
    pub(super) labels: Arc<EdgeLabels>,
    pub(super) tls: &'static str,
    pub(super) requests: Summed<RequestLabels, Count>,
    pub(super) durations: Handle<EdgeLabels, Durations>,
    /// Bytes to the peer.
    pub sent: Bytes,
    /// Bytes from the peer.
    pub received: Bytes,
    /// The last one that was counted comes first: mostly it is the next as well.
    pub(super) outcomes: RefCell<Vec<(Outcome, Handle<RequestLabels, Count>)>>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// `http1` or `http2`, as the application spoke it.
    pub protocol: &'static str,
    /// The status code.
    pub code: u16,
    /// The gRPC status, `none` where a gRPC response was cut off; empty for others.
    pub grpc_status: &'static str,
    /// The mesh's own reason, else empty.
    pub reason: &'static str,
}

impl Outcome {
    /// Equal, found out without reading the words where they are the same constants.
    fn is(&self, other: &Self) -> bool {
        let same = |a: &'static str, b: &'static str| ptr::eq(a, b) || a == b;
        self.code == other.code
            && same(self.protocol, other.protocol)
            && same(self.grpc_status, other.grpc_status)
            && same(self.reason, other.reason)
    }
}

impl Edge {
    /// Counts a request. `duration` is from its head to the response's head.
    pub fn request(&self, outcome: Outcome, duration: Duration) {
        self.durations.observe(duration);
        if let Some((last, counter)) = self.outcomes.borrow().first()
            && last.is(&outcome)
        {
            return counter.inc();
        }
        self.other_outcome(outcome);
    }

    #[cold]
    fn other_outcome(&self, outcome: Outcome) {
        let mut outcomes = self.outcomes.borrow_mut();
        if let Some(at) = outcomes.iter().position(|(known, _)| known.is(&outcome)) {
            outcomes[..=at].rotate_right(1);
        } else {
            outcomes.truncate(MAX_OUTCOMES - 1);
            outcomes.insert(0, (outcome, self.counter(outcome)));
        }
        outcomes[0].1.inc();
    }

    fn counter(&self, outcome: Outcome) -> Handle<RequestLabels, Count> {
        let EdgeLabels { direction, service, peer } = (*self.labels).clone();
        let Outcome { protocol, code, grpc_status, reason } = outcome;
        let tls = self.tls;
        let labels = RequestLabels { direction, service, peer, protocol, tls, code, grpc_status, reason };
        self.requests.handle(Arc::new(labels))
    }
}
