//! The label sets of the data path's families, and their bound.

use std::{
    hash::Hash,
    sync::atomic::{AtomicUsize, Ordering},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::family::{Family, MetricConstructor},
};

/// Series in one family. 1000 services times a few outcomes; at about 300 bytes each the worst case is a few MB.
pub(super) const MAX_SERIES: usize = 4096;

/// The free labels of a family that is full.
const OTHER: &str = "other";

/// Who talks to whom: the labels that requests, durations and bytes share.
///
/// Outbound, `service` is the service that was dialled and `peer` the endpoint's identity; inbound, `service` is
/// `port:<port>` of the workload and `peer` the caller's identity. `peer` is empty without mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EdgeLabels {
    pub(super) direction: &'static str,
    pub(super) service: String,
    pub(super) peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RequestLabels {
    pub(super) direction: &'static str,
    pub(super) service: String,
    pub(super) peer: String,
    pub(super) protocol: &'static str,
    pub(super) tls: &'static str,
    pub(super) code: u16,
    pub(super) grpc_status: &'static str,
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ConnectionLabels {
    pub(super) direction: &'static str,
    pub(super) kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct InfoLabels {
    pub(super) direction: &'static str,
    pub(super) service: String,
    pub(super) peer: String,
    pub(super) own: String,
    pub(super) tls_version: String,
    pub(super) key_exchange: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OutcomeLabels {
    pub(super) direction: &'static str,
    pub(super) outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct SourceLabels {
    pub(super) source: String,
    pub(super) port: u16,
    pub(super) outcome: &'static str,
}

/// An endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PickLabels {
    pub(super) service: String,
    pub(super) endpoint: String,
}

/// A rule that decided, or would have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AccessLabels {
    pub(super) policy: String,
    pub(super) rule: String,
    pub(super) decision: &'static str,
}

/// A limit that refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct LimitLabels {
    pub(super) policy: String,
    pub(super) limit: String,
    pub(super) outcome: &'static str,
}

/// What became of a try's failure, or of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ServiceLabels {
    pub(super) service: String,
    pub(super) outcome: &'static str,
}

/// Labels that know what to become when their family is full.
pub trait Bounded: Clone + Hash + Eq {
    /// The labels of the series that takes what the family has no room for.
    #[must_use]
    fn other(&self) -> Self;
}

impl Bounded for EdgeLabels {
    fn other(&self) -> Self {
        Self { service: OTHER.into(), peer: OTHER.into(), ..*self }
    }
}

impl Bounded for RequestLabels {
    fn other(&self) -> Self {
        Self { service: OTHER.into(), peer: OTHER.into(), ..*self }
    }
}

impl Bounded for InfoLabels {
    fn other(&self) -> Self {
        Self { service: OTHER.into(), peer: OTHER.into(), ..self.clone() }
    }
}

impl Bounded for SourceLabels {
    fn other(&self) -> Self {
        Self { source: OTHER.into(), port: 0, ..*self }
    }
}

impl Bounded for AccessLabels {
    fn other(&self) -> Self {
        Self { policy: OTHER.into(), rule: OTHER.into(), ..*self }
    }
}

impl Bounded for LimitLabels {
    fn other(&self) -> Self {
        Self { policy: OTHER.into(), limit: OTHER.into(), ..*self }
    }
}

impl Bounded for ServiceLabels {
    fn other(&self) -> Self {
        Self { service: OTHER.into(), ..*self }
    }
}

impl Bounded for PickLabels {
    fn other(&self) -> Self {
        Self { service: OTHER.into(), endpoint: OTHER.into() }
    }
}

/// A family with a bound on its series, for what is rare enough to be looked up and shared by all threads.
pub(super) struct Capped<L, M, C = fn() -> M> {
    pub(super) family: Family<L, M, C>,
    series: AtomicUsize,
}

impl<L, M, C> Capped<L, M, C>
where
    L: Bounded,
    M: Clone,
    C: MetricConstructor<M>,
{
    pub(super) fn get(&self, labels: &L) -> M {
        if let Some(series) = self.family.get(labels) {
            return series.clone();
        }
        // Threads that come at once may count one series twice: the bound is kept, which is all that matters.
        if self.series.fetch_add(1, Ordering::Relaxed) >= MAX_SERIES {
            self.series.fetch_sub(1, Ordering::Relaxed);
            return self.family.get_or_create_owned(&labels.other());
        }
        self.family.get_or_create_owned(labels)
    }
}

impl<L, M> Default for Capped<L, M>
where
    L: Bounded,
    M: Clone + Default,
{
    fn default() -> Self {
        Self { family: Family::default(), series: AtomicUsize::new(0) }
    }
}
