//! `TrafficPolicy`: how services are called.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bounds::{
    MAX_ATTEMPTS, MAX_BODY, MAX_COUNT, MAX_HASH_KEYS, MAX_HEADER_NAME, MAX_LABEL, MAX_PATH, MAX_RETRY_ON,
    MAX_ROW, MAX_SUBDOMAIN,
};
use crate::schema::rules::{LABEL, PATH_AND_QUERY, SERVICE, SUBDOMAIN, TOKEN, cel, lasting_span};
use crate::value::{GrpcCode, Percent, RetryOn, Span};

/// How the target is called. Each field (of `timeouts`, each member) comes from the most specific target that sets it:
/// mesh, namespace, service, service port, route, route rule. One policy per target: the oldest counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.timeouts) || has(self.retry) || has(self.hedge) || has(self.fault) || has(self.loadBalancer) || has(self.circuitBreaker) || has(self.bulkhead) || has(self.healthCheck) || has(self.concurrency)",
        "sets nothing beside `targetRef`",
    ),
    (
        "!has(self.concurrency) || !(self.targetRef.kind in ['HTTPRoute', 'GRPCRoute'])",
        "`concurrency` is kept at the workloads' own sidecars, which know no route: target a Service",
    ),
])))]
pub struct TrafficPolicy {
    /// What it is about.
    pub target_ref: TrafficTarget,
    /// How long things may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<Timeouts>,
    /// What is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// One other try beside one that is slow; the first answer is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hedge: Option<Hedge>,
    /// Faults that are made on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// Which endpoint is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// When an endpoint is put aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// What one client may use of the service at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulkhead: Option<Bulkhead>,
    /// How endpoints are asked whether they are well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// How much at once the workloads of the target are asked; kept at their own sidecars. For a mesh, namespace or service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
}

/// What a TrafficPolicy is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.name) == (self.kind in ['Service', 'HTTPRoute', 'GRPCRoute'])",
        "`name` is for a Service or a route, which need it: say which one; there is one Mesh and one Namespace",
    ),
    (
        "!has(self.group) || (self.kind == 'Mesh' ? self.group == 'outrigger.dev' : self.kind in ['HTTPRoute', 'GRPCRoute'] ? self.group == 'gateway.networking.k8s.io' : self.group in ['', 'core'])",
        "`group` is not the group of this kind: leave it out",
    ),
    (
        "!has(self.__namespace__) || self.kind != 'Mesh'",
        "`namespace` is for a Service or a route: there is one Mesh",
    ),
    (
        "!has(self.sectionName) || self.kind in ['HTTPRoute', 'GRPCRoute']",
        "`sectionName` is for a route's rule; of a Service use `port`",
    ),
    (
        "!has(self.port) || self.kind == 'Service'",
        "`port` is for a Service",
    ),
])))]
pub struct TrafficTarget {
    /// The kind's group: empty for a Service, `gateway.networking.k8s.io` for a route. It follows from the kind where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_SUBDOMAIN))]
    pub group: Option<String>,
    /// The kind.
    pub kind: TrafficTargetKind,
    /// Of a Service or a route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_SUBDOMAIN), regex(pattern = SERVICE))]
    pub name: Option<String>,
    /// The policy's own, where it is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_LABEL), regex(pattern = LABEL))]
    pub namespace: Option<String>,
    /// A route's rule by its name, or by its number from 0, as in `rule-0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_SUBDOMAIN), regex(pattern = SUBDOMAIN))]
    pub section_name: Option<String>,
    /// A service's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
}

/// A kind that a TrafficPolicy can be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TrafficTargetKind {
    /// All services; from the mesh's own namespace only.
    Mesh,
    /// All services of the policy's namespace.
    Namespace,
    /// One service.
    Service,
    /// One route.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// One route.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
}

/// How long things may take; `0s`: without end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.request) || has(self.perTry) || has(self.idle)",
        "sets none of `request`, `perTry` and `idle`",
    ),
    (
        "!has(self.perTry) || !has(self.request) || duration(self.request) == duration('0s') || duration(self.perTry) <= duration(self.request)",
        "`perTry` is longer than `request`",
    ),
])))]
pub struct Timeouts {
    /// The whole, all tries together, until the response has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// One try, until the response's head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_try: Option<Span>,
    /// Without a byte in either direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Span>,
}

/// What is tried again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Retry {
    /// Tries beside the first one, 0 to 10; 0: none.
    #[schemars(range(max = MAX_ATTEMPTS))]
    pub attempts: u32,
    /// `5xx`, `gateway-error`, `reset`, `connect-failure`, `per-try-timeout`, statuses, names of gRPC statuses.
    /// Left out: `gateway-error`, `reset` and `connect-failure`. To name a gRPC status is to say that calls which end with it may be
    /// repeated, although their method is POST.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_RETRY_ON), extend("x-kubernetes-list-type" = "set"))]
    pub on: Option<Vec<RetryOn>>,
    /// Also requests that are not idempotent (RFC 9110, 9.2.2) and bear no Idempotency-Key.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsafe_methods: bool,
    /// The pause before a try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Backoff>,
    /// How many of all requests may be retries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// Bytes of a request's body that are kept; a request with more is not tried again. At most 16 MiB; 65,536 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = MAX_BODY))]
    pub max_body_bytes: Option<u32>,
}

/// The pause before a try: doubled each time, drawn between half and the whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "!has(self.base) || !has(self.max) || duration(self.max) == duration('0s') || duration(self.base) <= duration(self.max)",
        "`base` is longer than `max`",
    ),
])))]
pub struct Backoff {
    /// The first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub base: Option<Span>,
    /// The longest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub max: Option<Span>,
}

/// How many of all requests to a service may be retries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Budget {
    /// This share of requests; 10 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub percent: Option<u32>,
    /// And so many a second beside; 1 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = MAX_COUNT))]
    pub min_per_second: Option<u32>,
}

/// One other try beside one that is slow; the first answer is taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hedge {
    /// How long the first one has alone.
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub after: Span,
}

/// Faults that are made on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.delay) || has(self.abort)",
        "has neither `delay` nor `abort`",
    ),
])))]
pub struct Fault {
    /// Requests wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<Delay>,
    /// Requests are answered with an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
}

/// Requests wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Delay {
    /// How long.
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub duration: Span,
    /// How many of them.
    pub percent: Percent,
}

/// Requests are answered with an error: one of `status` and `grpcStatus`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.status) != has(self.grpcStatus)",
        "write one of `status` and `grpcStatus`",
    ),
    (
        "!has(self.grpcStatus) || self.grpcStatus != 0 && self.grpcStatus != 'ok'",
        "`grpcStatus`: `ok` is no error",
    ),
])))]
pub struct Abort {
    /// A status, 200 to 599.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 200, max = 599))]
    pub status: Option<u16>,
    /// A gRPC status, by number or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<GrpcCode>,
    /// How many of them.
    pub percent: Percent,
}

/// Which endpoint is taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.algorithm) || has(self.hash) || has(self.slowStart) || has(self.zone)",
        "sets nothing",
    ),
    (
        "(has(self.hash) && size(self.hash) > 0) == (has(self.algorithm) && self.algorithm in ['RingHash', 'Maglev'])",
        "`hash` is for the algorithms RingHash and Maglev, which need it: say what of a request is hashed",
    ),
])))]
pub struct LoadBalancer {
    /// How it is chosen. PeakEwma where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Algorithm>,
    /// What RingHash and Maglev hash: the first of these that the request has. A route or rule may have keys of its own; the algorithm is
    /// its service's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_HASH_KEYS))]
    pub hash: Vec<HashKey>,
    /// A new endpoint's share grows over this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<Span>,
    /// The client's own zone comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Zone>,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Algorithm {
    /// Of two at random, the one with the lower response time times requests under way.
    PeakEwma,
    /// Of two at random, the one with fewer requests under way.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// By `hash`, on a ring.
    RingHash,
    /// By `hash`, from a table.
    Maglev,
}

/// Something of a request that is hashed: one of these.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "[has(self.header), has(self.cookie), has(self.query), has(self.source)].exists_one(is_set, is_set)",
        "must have one of `header`, `cookie`, `query` and `source`",
    ),
    (
        "!has(self.source) || self.source",
        "`source` is `true`, or left out",
    ),
])))]
pub struct HashKey {
    /// A header's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_HEADER_NAME), regex(pattern = TOKEN))]
    pub header: Option<String>,
    /// A cookie's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_HEADER_NAME), regex(pattern = TOKEN))]
    pub cookie: Option<String>,
    /// A query parameter's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub query: Option<String>,
    /// `true`: the caller's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<bool>,
}

/// The client's own zone comes first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Zone {
    /// Endpoints of the own zone take all as long as at least this percentage of its weight is healthy. 0: zones do not count.
    #[schemars(range(max = 100))]
    pub min_healthy_percent: u32,
}

/// When an endpoint is put aside, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.consecutiveFailures) || has(self.successRate) || has(self.slow) || has(self.ejection)",
        "sets nothing",
    ),
])))]
pub struct CircuitBreaker {
    /// Failures in a row; 0: they do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = MAX_COUNT))]
    pub consecutive_failures: Option<u32>,
    /// The share of successes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRate>,
    /// Answers that take longer count as failures of `successRate`; `0s`: they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow: Option<Span>,
    /// How long and how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejection: Option<Ejection>,
}

/// The share of successes that keeps an endpoint in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SuccessRate {
    /// Below this it is put aside; 0: never.
    #[schemars(range(max = 100))]
    pub percent: u32,
    /// The last of the time that counts; 10 s where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub window: Option<Span>,
    /// Fewer requests in the window say nothing; 20 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub min_requests: Option<u32>,
}

/// How long an endpoint is put aside, and how many at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "!has(self.base) || !has(self.max) || duration(self.max) == duration('0s') || duration(self.base) <= duration(self.max)",
        "`base` is longer than `max`",
    ),
])))]
pub struct Ejection {
    /// At first; doubled each time in a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub base: Option<Span>,
    /// At most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub max: Option<Span>,
    /// At most this percentage of the endpoints at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub max_percent: Option<u32>,
}

/// Bounds of one client towards one service. Left out: the proxy's own bounds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.maxConnections) || has(self.maxPending) || has(self.maxRequests) || has(self.maxStreams)",
        "sets no bound",
    ),
])))]
pub struct Bulkhead {
    /// Connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub max_pending: Option<u32>,
    /// Requests under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub max_requests: Option<u32>,
    /// Requests under way on one connection of HTTP/2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub max_streams: Option<u32>,
}

/// How endpoints are asked whether they are well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "!has(self.timeout) || !has(self.interval) || duration(self.interval) == duration('0s') || duration(self.timeout) <= duration(self.interval)",
        "`timeout` is longer than `interval`",
    ),
])))]
pub struct HealthCheck {
    /// What is asked for; left out: a TCP connection is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_PATH), regex(pattern = PATH_AND_QUERY))]
    pub path: Option<String>,
    /// How often; 10 s where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub interval: Option<Span>,
    /// How long an answer may take; 1 s where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = lasting_span()))]
    pub timeout: Option<Span>,
    /// Good answers in a row that bring it back; 1 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_ROW))]
    pub healthy: Option<u32>,
    /// Bad answers in a row that put it aside; 3 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_ROW))]
    pub unhealthy: Option<u32>,
}

/// How much at once a workload is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.maxRequests) || has(self.adaptive) && self.adaptive",
        "has neither `maxRequests` nor `adaptive: true`: it would bound nothing",
    ),
])))]
pub struct Concurrency {
    /// Requests under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub max_requests: Option<u32>,
    /// The bound follows what the workload's response times say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adaptive: bool,
}
