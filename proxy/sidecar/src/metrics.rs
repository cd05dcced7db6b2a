//! What the sidecar counts, in Prometheus' text format.
//!
//! Two rules. Every label set is bounded: a family that is full answers with one series whose free labels say
//! `other`, because a peer that can make up names must not be able to fill our memory (reliability B8). And nothing on
//! a request's path looks a series up under a lock that other threads share: a worker asks once per edge and per
//! connection, and keeps the handle.

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

/// Series in one family. 1000 services times a few outcomes; at about 300 bytes each the worst case is a few MB.
const MAX_SERIES: usize = 4096;

/// The free labels of a family that is full.
const OTHER: &str = "other";

/// Seconds. From a local call to the longest wait that people tolerate.
const DURATION_BUCKETS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

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

/// Who talks to whom: the labels that requests, durations and bytes share.
///
/// Outbound, `service` is the service that was dialled and `peer` the endpoint's identity; inbound, `service` is
/// `port:<port>` of the workload and `peer` the caller's identity. `peer` is empty without mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EdgeLabels {
    direction: &'static str,
    service: String,
    peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    direction: &'static str,
    service: String,
    peer: String,
    protocol: &'static str,
    tls: &'static str,
    code: u16,
    grpc_status: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    direction: &'static str,
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InfoLabels {
    direction: &'static str,
    service: String,
    peer: String,
    own: String,
    tls_version: String,
    key_exchange: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    direction: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source: String,
    port: u16,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PickLabels {
    service: String,
    endpoint: String,
}

/// Labels that know what to become when their family is full.
trait Bounded: Clone + std::hash::Hash + Eq {
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

impl Bounded for PickLabels {
    fn other(&self) -> Self {
        Self { service: OTHER.into(), endpoint: OTHER.into() }
    }
}

/// A family with a bound on its series.
struct Capped<L, M, C = fn() -> M> {
    family: Family<L, M, C>,
    series: AtomicUsize,
}

impl<L, M, C> Capped<L, M, C>
where
    L: Bounded,
    M: Clone,
    C: MetricConstructor<M>,
{
    fn new(family: Family<L, M, C>) -> Self {
        Self { family, series: AtomicUsize::new(0) }
    }

    fn get(&self, labels: &L) -> M {
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
        Self::new(Family::default())
    }
}

/// Every family of the data path, and the registry that prints them with whatever else was registered.
pub struct Metrics {
    registry: Mutex<Registry>,
    requests: Arc<Capped<RequestLabels, Counter>>,
    durations: Capped<EdgeLabels, Histogram>,
    sent: Capped<EdgeLabels, Counter>,
    received: Capped<EdgeLabels, Counter>,
    connections: Family<ConnectionLabels, Counter>,
    open: Family<ConnectionLabels, Gauge>,
    info: Capped<InfoLabels, Gauge>,
    handshake_failures: Family<OutcomeLabels, Counter>,
    refusals: Family<OutcomeLabels, Counter>,
    detections: Family<OutcomeLabels, Counter>,
    unmeshed: Capped<SourceLabels, Counter>,
    passthrough: Family<OutcomeLabels, Counter>,
    picks: Capped<PickLabels, Counter>,
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
        let durations: Family<EdgeLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS));
        let metrics = Self {
            registry: Mutex::new(Registry::default()),
            requests: Arc::default(),
            durations: Capped::new(durations),
            sent: Capped::default(),
            received: Capped::default(),
            connections: Family::default(),
            open: Family::default(),
            info: Capped::default(),
            handshake_failures: Family::default(),
            refusals: Family::default(),
            detections: Family::default(),
            unmeshed: Capped::default(),
            passthrough: Family::default(),
            picks: Capped::default(),
            panics: Counter::default(),
            accept_errors: Counter::default(),
            admitted: Arc::default(),
        };
        let r = &mut registry;
        r.register("requests", "Requests answered", metrics.requests.family.clone());
        r.register(
            "request_duration_seconds",
            "From the request's head to the response's head",
            metrics.durations.family.clone(),
        );
        r.register("sent_bytes", "Bytes relayed to the peer", metrics.sent.family.clone());
        r.register("received_bytes", "Bytes relayed from the peer", metrics.received.family.clone());
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
        r.register("balancer_picks", "Endpoints chosen", metrics.picks.family.clone());
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
        let labels = EdgeLabels {
            direction: direction.as_str(),
            service: service.to_owned(),
            peer: peer.unwrap_or_default().to_owned(),
        };
        Edge {
            requests: self.requests.clone(),
            duration: self.durations.get(&labels),
            sent: self.sent.get(&labels),
            received: self.received.get(&labels),
            tls: if peer.is_some() { "mutual" } else { "none" },
            outcomes: RefCell::new(HashMap::new()),
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

    /// The counter of an endpoint's picks.
    pub fn picks(&self, service: &str, endpoint: &str) -> Counter {
        self.picks.get(&PickLabels { service: service.to_owned(), endpoint: endpoint.to_owned() })
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

/// Handles of one edge. Belongs to one thread.
pub struct Edge {
    labels: EdgeLabels,
    tls: &'static str,
    requests: Arc<Capped<RequestLabels, Counter>>,
    duration: Histogram,
    /// Bytes to the peer.
    pub sent: Counter,
    /// Bytes from the peer.
    pub received: Counter,
    // Bounded by the status codes times the few reasons and gRPC codes.
    outcomes: RefCell<HashMap<Outcome, Counter>>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

impl Edge {
    /// Counts a request.
    pub fn request(&self, outcome: Outcome, seconds: f64) {
        self.duration.observe(seconds);
        let mut outcomes = self.outcomes.borrow_mut();
        outcomes
            .entry(outcome)
            .or_insert_with(|| {
                let EdgeLabels { direction, service, peer } = self.labels.clone();
                let Outcome { protocol, code, grpc_status, reason } = outcome;
                let tls = self.tls;
                self.requests.get(&RequestLabels {
                    direction,
                    service,
                    peer,
                    protocol,
                    tls,
                    code,
                    grpc_status,
                    reason,
                })
            })
            .inc();
    }
}

/// Lowers a gauge when it goes.
pub struct OpenGuard(Gauge);

impl OpenGuard {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.dec();
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
mod tests {
    use super::*;

    #[test]
    fn a_full_family_says_other() {
        let metrics = Metrics::default();
        for port in 0..u16::try_from(MAX_SERIES).unwrap() + 10 {
            metrics.unmeshed("192.0.2.1".parse().unwrap(), port, "plaintext");
        }
        assert!(metrics.encode().matches("outrigger_unmeshed_inbound_total{").count() <= MAX_SERIES + 1);
        assert!(metrics.encode().contains(r#"source="other",port="0",outcome="plaintext"} 10"#));
    }

    #[test]
    fn a_limit_of_connections_is_kept_and_given_back() {
        let metrics = Metrics::default();
        let first = metrics.admit(1);
        assert!(first.is_some());
        assert!(metrics.admit(1).is_none());
        drop(first);
        assert!(metrics.admit(1).is_some());
    }

    #[test]
    fn names_have_the_prefix() {
        let metrics = Metrics::default();
        let edge = metrics.edge(Direction::Outbound, "orders.default", Some("spiffe://a/ns/b/sa/c"));
        edge.request(Outcome { protocol: "http1", code: 200, grpc_status: "", reason: "" }, 0.002);
        let text = metrics.encode();
        assert!(text.contains("outrigger_requests_total{direction=\"outbound\",service=\"orders.default\""));
        assert!(text.contains("outrigger_request_duration_seconds_bucket"));
    }
}
