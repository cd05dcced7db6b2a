//! How much an object may hold. [`crate::check`] refuses what is more, and the schemas say the same; the API server needs a bound on
//! every list and text before it takes rules about them (it estimates what each rule can cost at most).

/// Rules of one `AccessPolicy`.
pub(crate) const MAX_RULES: usize = 256;
/// Limits of one `AccessPolicy`.
pub(crate) const MAX_LIMITS: usize = 32;
/// Entries of `from`, and of the lists that are told apart by nothing but their own text.
pub(crate) const MAX_ENTRIES: usize = 256;
/// Entries of `to`, and of its paths: each has a rule of its own in CEL.
pub(crate) const MAX_OPERATIONS: usize = 64;
/// Headers of one operation, as many as the Gateway API takes in a match, and gRPC methods.
pub(crate) const MAX_CONDITIONS: usize = 16;
/// Labels that a target is chosen by.
pub(crate) const MAX_LABELS: usize = 64;
/// Requests or connections at once.
pub(crate) const MAX_BURST: u32 = 10_000_000;
/// Bytes of a name that people give to rules and limits.
pub(crate) const MAX_RULE_NAME: usize = 63;

/// Probes of one `MeshDefaults`, and networks of one probe.
pub(crate) const MAX_PROBES: usize = 64;

/// Hosts, and ports, of one `ExternalService`.
pub(crate) const MAX_HOSTS: usize = 64;
/// Endpoints of one `ExternalService`.
pub(crate) const MAX_ENDPOINTS: usize = 1000;
/// Bytes of a zone's name, as of a label's value.
pub(crate) const MAX_ZONE: usize = 63;

/// Tries beside the first one: with more, a failing service is called more than it can bear.
pub(crate) const MAX_ATTEMPTS: u32 = 10;
/// What is tried again: more than all words and statuses that anybody lists.
pub(crate) const MAX_RETRY_ON: usize = 64;
/// Bytes of a request's body that are kept: per request, at every client.
pub(crate) const MAX_BODY: u32 = 16 << 20;
/// Of counts that have no narrower bound.
pub(crate) const MAX_COUNT: u32 = 1_000_000;
/// Keys that are tried one after the other.
pub(crate) const MAX_HASH_KEYS: usize = 16;
/// Answers in a row.
pub(crate) const MAX_ROW: u32 = 100;

/// Bytes of a service's name.
pub(crate) const MAX_SERVICE: usize = 200;
/// Bytes of a DNS label, and of a subdomain.
pub(crate) const MAX_LABEL: usize = 63;
pub(crate) const MAX_SUBDOMAIN: usize = 253;
/// Bytes of a method.
pub(crate) const MAX_METHOD: usize = 32;
/// Bytes of a path or an expression.
pub(crate) const MAX_PATH: usize = 1024;
/// Bytes of a header's name.
pub(crate) const MAX_HEADER_NAME: usize = 256;
/// Bytes of a header's value.
pub(crate) const MAX_HEADER_VALUE: usize = 4096;
/// Bytes of a SPIFFE id (SPIFFE-ID, 2.3, allows more).
pub(crate) const MAX_IDENTITY: usize = 1024;
/// Bytes of a network: eight groups of IPv6 and a prefix, or IPv4 within IPv6.
pub(crate) const MAX_NETWORK: usize = 49;
/// Bytes of a length of time: four numbers of five digits with their units.
pub(crate) const MAX_SPAN: usize = 28;
