//! What the sidecar counts, in Prometheus' text format.
//!
//! Two rules. Every label set is bounded: a family that is full answers with one series whose free labels say
//! `other`, because a peer that can make up names must not be able to fill our memory (reliability B8). And on a
//! request's path threads share nothing: a worker asks for the handles of an edge once, and what it counts with them
//! are cells of its own that a scrape sums (`summed`). What is counted once per connection or less stays with the
//! atomics that all threads share.

mod durations;
mod edge;
mod labels;
mod summed;

use std::{
    cell::RefCell,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use outrigger_core::bulkhead::Place;
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use durations::Durations;
pub use edge::{Bytes, Edge, Outcome};
use labels::{
    AccessLabels, Capped, ConnectionLabels, EdgeLabels, InfoLabels, LimitLabels, OutcomeLabels, PickLabels,
    RequestLabels, ServiceLabels, SourceLabels,
};
use summed::{Count, Handle, Summed};

/// Which way traffic goes, seen from the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

impl Direction {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// Counts the picks of an endpoint.
pub type Picks = Handle<PickLabels, Count>;

/// Counts what became of the failed tries of a service.
pub type Retries = Handle<ServiceLabels, Count>;

/// Counts what a rule of an access policy, or the default, has decided.
pub type Decided = Handle<AccessLabels, Count>;

/// Every family of the data path, and the registry that prints them with whatever else was registered.
pub struct Metrics {
    registry: Mutex<Registry>,
    requests: Summed<RequestLabels, Count>,
    durations: Summed<EdgeLabels, Durations>,
    sent: Summed<EdgeLabels, Count>,
    received: Summed<EdgeLabels, Count>,
    connections: Family<ConnectionLabels, Counter>,
    open: Family<ConnectionLabels, Gauge>,
    info: Capped<InfoLabels, Gauge>,
    handshake_failures: Family<OutcomeLabels, Counter>,
    refusals: Family<OutcomeLabels, Counter>,
    detections: Family<OutcomeLabels, Counter>,
    unmeshed: Capped<SourceLabels, Counter>,
    passthrough: Family<OutcomeLabels, Counter>,
    picks: Summed<PickLabels, Count>,
    retries: Summed<ServiceLabels, Count>,
    access: Summed<AccessLabels, Count>,
    limited: Capped<LimitLabels, Counter>,
    panics: Counter,
    accept_errors: Counter,
    admitted: Arc<AtomicUsize>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(Registry::with_prefix("outrigger"))
    }
}

impl Metrics {
    /// Registers the data path's families in `registry`, which should have the prefix `outrigger`.
    pub fn new(mut registry: Registry) -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::default()),
            requests: Summed::default(),
            durations: Summed::default(),
            sent: Summed::default(),
            received: Summed::default(),
            connections: Family::default(),
            open: Family::default(),
            info: Capped::default(),
            handshake_failures: Family::default(),
            refusals: Family::default(),
            detections: Family::default(),
            unmeshed: Capped::default(),
            passthrough: Family::default(),
            picks: Summed::default(),
            retries: Summed::default(),
            access: Summed::default(),
            limited: Capped::default(),
            panics: Counter::default(),
            accept_errors: Counter::default(),
            admitted: Arc::default(),
        };
        let r = &mut registry;
        r.register("requests", "Requests answered", metrics.requests.clone());
        r.register(
            "request_duration_seconds",
            "From the request's head to the response's head",
            metrics.durations.clone(),
        );
        r.register("sent_bytes", "Bytes relayed to the peer", metrics.sent.clone());
        r.register("received_bytes", "Bytes relayed from the peer", metrics.received.clone());
        r.register("connections", "Connections that were opened", metrics.connections.clone());
        r.register("open_connections", "Connections that are open", metrics.open.clone());
        r.register(
            "connection_info",
            "Open mesh connections: both identities, TLS version and key exchange",
            metrics.info.family.clone(),
        );
        r.register("handshake_failures", "TLS handshakes that failed", metrics.handshake_failures.clone());
        r.register("refused", "Connections that the mesh refused", metrics.refusals.clone());
        r.register("detections", "What the first bytes of connections were", metrics.detections.clone());
        r.register(
            "unmeshed_inbound",
            "Inbound connections without mutual TLS, by source and port",
            metrics.unmeshed.family.clone(),
        );
        r.register(
            "passthrough",
            "Connections to destinations outside the mesh",
            metrics.passthrough.clone(),
        );
        r.register("balancer_picks", "Endpoints chosen", metrics.picks.clone());
        r.register(
            "retries",
            "Failed tries of requests, by whether another one followed, or why not",
            metrics.retries.clone(),
        );
        r.register(
            "access_decisions",
            "What access policies decided, or would have, by policy and rule",
            metrics.access.clone(),
        );
        r.register(
            "rate_limited",
            "What limits refused, or would have, by policy and limit",
            metrics.limited.family.clone(),
        );
        r.register("panics", "Connections that ended with a panic", metrics.panics.clone());
        r.register("accept_errors", "Connections that could not be accepted", metrics.accept_errors.clone());
        Self { registry: Mutex::new(registry), ..metrics }
    }

    /// Adds families of other parts of the proxy.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// Everything in the text format of `OpenMetrics`.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        text::encode(&mut out, &registry).expect("writing to a String cannot fail");
        out
    }

    /// The handles of one edge, for one worker thread.
    pub fn edge(&self, direction: Direction, service: &str, peer: Option<&str>) -> Edge {
        let labels = Arc::new(EdgeLabels {
            direction: direction.as_str(),
            service: service.to_owned(),
            peer: peer.unwrap_or_default().to_owned(),
        });
        Edge {
            tls: if peer.is_some() { "mutual" } else { "none" },
            requests: self.requests.clone(),
            durations: self.durations.handle(labels.clone()),
            sent: self.sent.handle(labels.clone()),
            received: self.received.handle(labels.clone()),
            outcomes: RefCell::default(),
            labels,
        }
    }

    /// Counts a connection while the guard lives. `kind` is one of few words.
    pub fn connection(&self, direction: Direction, kind: &'static str) -> OpenGuard {
        let labels = ConnectionLabels { direction: direction.as_str(), kind };
        self.connections.get_or_create(&labels).inc();
        OpenGuard::new(self.open.get_or_create_owned(&labels))
    }

    /// Shows a mesh connection's properties while the guard lives.
    pub fn mesh_connection(&self, direction: Direction, service: &str, tls: &TlsFacts) -> OpenGuard {
        let labels = InfoLabels {
            direction: direction.as_str(),
            service: service.to_owned(),
            peer: tls.peer.clone(),
            own: tls.own.clone(),
            tls_version: tls.version.clone(),
            key_exchange: tls.key_exchange.clone(),
        };
        OpenGuard::new(self.info.get(&labels))
    }

    /// A TLS handshake failed.
    pub fn handshake_failed(&self, direction: Direction, outcome: &'static str) {
        self.handshake_failures
            .get_or_create(&OutcomeLabels { direction: direction.as_str(), outcome })
            .inc();
    }

    /// A connection was refused with a reason code.
    pub fn refused(&self, direction: Direction, outcome: &'static str) {
        self.refusals.get_or_create(&OutcomeLabels { direction: direction.as_str(), outcome }).inc();
    }

    /// What detection found.
    pub fn detected(&self, direction: Direction, outcome: &'static str) {
        self.detections.get_or_create(&OutcomeLabels { direction: direction.as_str(), outcome }).inc();
    }

    /// An inbound connection without mutual TLS.
    pub fn unmeshed(&self, source: std::net::IpAddr, port: u16, outcome: &'static str) {
        let labels = SourceLabels { source: source.to_string(), port, outcome };
        self.unmeshed.get(&labels).inc();
    }

    /// A connection to a destination outside the mesh. `outcome`: `allowed` or `audited`.
    pub fn passed_through(&self, outcome: &'static str) {
        self.passthrough
            .get_or_create(&OutcomeLabels { direction: Direction::Outbound.as_str(), outcome })
            .inc();
    }

    /// The counter of an endpoint's picks, for one worker thread.
    pub fn picks(&self, service: &str, endpoint: &str) -> Picks {
        let labels = PickLabels { service: service.to_owned(), endpoint: endpoint.to_owned() };
        self.picks.handle(Arc::new(labels))
    }

    /// The counter of what became of a service's failed tries, for one worker thread. `outcome` is one of few words.
    pub fn retries(&self, service: &str, outcome: &'static str) -> Retries {
        self.retries.handle(Arc::new(ServiceLabels { service: service.to_owned(), outcome }))
    }

    /// The counter of what a rule decides, or would, for one worker thread: `allowed`, `denied`, `audited`, `would_allow`,
    /// `would_deny`.
    pub fn decided(&self, policy: &str, rule: &str, decision: &'static str) -> Decided {
        let labels = AccessLabels { policy: policy.to_owned(), rule: rule.to_owned(), decision };
        self.access.handle(Arc::new(labels))
    }

    /// A limit refused, or would have: `refused`, `would_refuse`.
    pub fn limited(&self, policy: &str, limit: &str, outcome: &'static str) {
        let labels = LimitLabels { policy: policy.to_owned(), limit: limit.to_owned(), outcome };
        self.limited.get(&labels).inc();
    }

    /// Counts an accepted connection against a limit that holds for all threads together; `None`: it is reached.
    pub fn admit(&self, limit: usize) -> Option<Admission> {
        let admission = Admission(self.admitted.clone());
        (self.admitted.fetch_add(1, Ordering::Relaxed) < limit).then_some(admission)
    }

    /// A connection's task panicked.
    pub fn panicked(&self) {
        self.panics.inc();
    }

    /// `accept` failed.
    pub fn accept_failed(&self) {
        self.accept_errors.inc();
    }
}

/// What a mutual TLS connection agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFacts {
    /// The peer's SPIFFE id.
    pub peer: String,
    /// Our own.
    pub own: String,
    /// As in `TLSv1_3`.
    pub version: String,
    /// As in `X25519MLKEM768`.
    pub key_exchange: String,
}

/// Lowers a gauge when it goes.
pub struct OpenGuard {
    gauge: Gauge,
    /// The place that the connection takes among those that a policy allows.
    place: Option<Place>,
}

impl OpenGuard {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self { gauge, place: None }
    }

    /// Keeps a place, if there is one, as long.
    #[must_use]
    pub fn holding(mut self, place: Option<Place>) -> Self {
        self.place = place;
        self
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// A place among the admitted connections.
pub struct Admission(Arc<AtomicUsize>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
