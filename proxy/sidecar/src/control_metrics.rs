//! What the control thread counts. The data path's families are in `metrics`.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// Families of the control thread. Labels are words from this source, so their number is bounded.
#[derive(Debug, Clone, Default)]
pub struct ControlMetrics {
    connected: Gauge,
    connects: Family<Outcome, Counter>,
    pushes: Family<Outcome, Counter>,
    destinations: Gauge,
    services: Gauge,
    destinations_full: Counter,
    signs: Family<Outcome, Counter>,
    leaf_not_after: Gauge,
    claims_refused: Gauge,
    dns: Family<Query, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Query {
    kind: &'static str,
    outcome: &'static str,
}

impl ControlMetrics {
    /// Adds the families to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry;
        r.register("controller_connected", "Whether the controller's stream is up", self.connected.clone());
        r.register("controller_connects", "Attempts to reach the controller", self.connects.clone());
        r.register("discovery_resources", "Pushed resources, taken or refused", self.pushes.clone());
        r.register("discovery_destinations", "Destinations that are subscribed", self.destinations.clone());
        r.register("discovery_services", "Services that are subscribed", self.services.clone());
        r.register(
            "discovery_full",
            "Destinations that were not asked for because limits.destinations was reached",
            self.destinations_full.clone(),
        );
        r.register("certificate_signs", "Attempts to get a certificate", self.signs.clone());
        r.register_with_unit(
            "certificate_not_after",
            "When the certificate in use ends, Unix time",
            Unit::Seconds,
            self.leaf_not_after.clone(),
        );
        r.register("claims_refused", "Claims that the controller refuses", self.claims_refused.clone());
        r.register("dns_queries", "DNS queries, by who answered", self.dns.clone());
    }

    /// The controller's stream came up or went down.
    pub fn set_connected(&self, connected: bool) {
        self.connected.set(connected.into());
    }

    /// An attempt to reach the controller: `ok` or `failed`.
    pub fn connect(&self, outcome: &'static str) {
        self.connects.get_or_create(&Outcome { outcome }).inc();
    }

    /// A pushed resource: `applied`, `removed` or `refused`.
    pub fn resource(&self, outcome: &'static str) {
        self.pushes.get_or_create(&Outcome { outcome }).inc();
    }

    /// What is subscribed.
    pub fn set_subscribed(&self, destinations: usize, services: usize) {
        self.destinations.set(i64::try_from(destinations).unwrap_or(i64::MAX));
        self.services.set(i64::try_from(services).unwrap_or(i64::MAX));
    }

    /// A destination was not asked for.
    pub fn full(&self) {
        self.destinations_full.inc();
    }

    /// An attempt to get a certificate: `ok` or `failed`.
    pub fn signed(&self, outcome: &'static str) {
        self.signs.get_or_create(&Outcome { outcome }).inc();
    }

    /// A certificate is in use.
    pub fn set_leaf_not_after(&self, not_after: SystemTime) {
        let seconds = not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.leaf_not_after.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// Claims that stand refused.
    pub fn set_claims_refused(&self, refused: usize) {
        self.claims_refused.set(i64::try_from(refused).unwrap_or(i64::MAX));
    }

    /// A DNS query. `kind`: `mesh`, `external`, `consul`, `forward`; `outcome`: a word.
    pub fn dns(&self, kind: &'static str, outcome: &'static str) {
        self.dns.get_or_create(&Query { kind, outcome }).inc();
    }
}
