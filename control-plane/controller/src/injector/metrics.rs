//! What the injector counts. Every label has a fixed set of values.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::metrics::ReasonLabel;

/// Seconds. The API server waits for 10 at most by default.
const BUCKETS: [f64; 10] = [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0, 10.0];

/// Every metric of the injector; [`Metrics::register`] names and explains them.
#[derive(Debug)]
pub(super) struct Metrics {
    pub(super) reviews: Family<ReasonLabel, Counter>,
    pub(super) refusals: Family<ReasonLabel, Counter>,
    pub(super) duration: Histogram,
    pub(super) events_dropped: Counter,
    pub(super) certificate_expiry: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            reviews: Family::default(),
            refusals: Family::default(),
            duration: Histogram::new(BUCKETS),
            events_dropped: Counter::default(),
            certificate_expiry: Gauge::default(),
        }
    }
}

impl Metrics {
    /// A registry that holds them all.
    pub(super) fn register(&self) -> Registry {
        let mut registry = Registry::with_prefix("outrigger_injector");
        registry.register(
            "reviews",
            "Admission reviews, by what became of the pod or the policy",
            self.reviews.clone(),
        );
        registry.register("refusals", "What stood in the way of pods, by reason", self.refusals.clone());
        registry.register(
            "review_duration_seconds",
            "From a review's head to its answer",
            self.duration.clone(),
        );
        registry.register(
            "events_dropped",
            "Events that were not written because there were too many",
            self.events_dropped.clone(),
        );
        registry.register(
            "certificate_expiry_timestamp_seconds",
            "When the webhook's certificate ends; 0 while there is none",
            self.certificate_expiry.clone(),
        );
        registry
    }
}
