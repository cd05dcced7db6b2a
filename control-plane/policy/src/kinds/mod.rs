//! The kinds' specs, as people write them. What no type can say (ranges, names, what excludes what) is in
//! [`crate::check`].
//!
//! Two rules keep the schemas of them within what Kubernetes takes as structural: alternatives are optional fields of
//! one struct, of which one must be set, and nothing is flattened.

mod access;
mod external;
mod gateway;
mod mesh_defaults;
mod policy_test;
mod traffic;

pub use access::{
    AccessMode, AccessPolicy, AccessRule, AccessTarget, AccessTargetKind, Action, HeaderCondition,
    HeaderConditionType, Limit, LimitPer, Operation, PathCondition, Source,
};
pub use external::{ExternalEndpoint, ExternalPort, ExternalProtocol, ExternalService};
pub use gateway::{
    BackendObjectReference, BackendRef, Fraction, GrpcFilter, GrpcFilterType, GrpcMatch, GrpcMethodMatch,
    GrpcRoute, GrpcRule, HeaderMatch, HeaderModifier, HttpFilter, HttpFilterType, HttpHeader, HttpMatch,
    HttpMethod, HttpRetry, HttpRoute, HttpRule, HttpTimeouts, MatchType, ParentReference, PathMatch,
    PathMatchType, PathModifier, PathModifierType, QueryParamMatch, RequestMirror, RequestRedirect,
    Unsupported, UrlRewrite,
};
pub use mesh_defaults::{DefaultAction, EscapedSlashes, MeshDefaults, Mtls, Probe};
pub use policy_test::{Case, Decision, Expect, PolicyTest, TestFrom, TestRequest, TestTo};
pub use traffic::{
    Abort, Algorithm, Backoff, Budget, Bulkhead, CircuitBreaker, Concurrency, Delay, Ejection, Fault,
    HashKey, HealthCheck, Hedge, LoadBalancer, Retry, SuccessRate, Timeouts, TrafficPolicy, TrafficTarget,
    TrafficTargetKind, Zone,
};
