//! `AccessPolicy`: who may call a workload.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GrpcMethodMatch, PathMatchType};
use crate::bounds::{
    MAX_BURST, MAX_CONDITIONS, MAX_ENTRIES, MAX_HEADER_NAME, MAX_HEADER_VALUE, MAX_IDENTITY, MAX_LABEL,
    MAX_LIMITS, MAX_METHOD, MAX_NETWORK, MAX_OPERATIONS, MAX_PATH, MAX_RULE_NAME, MAX_RULES, MAX_SERVICE,
    MAX_SUBDOMAIN,
};
use crate::schema::rules::{
    IDENTITY_PATTERN, LABEL, RULE_NAME, SERVICE, SERVICE_ACCOUNT, TOKEN, cel, labels, networks,
};
use crate::value::Rate;

/// Who may call the target. All rules of all policies count together: any deny wins, then any allow, then
/// `MeshDefaults.inbound`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.rules) && size(self.rules) > 0 || has(self.limits) && size(self.limits) > 0",
        "has neither `rules` nor `limits`: it would say nothing",
    ),
])))]
pub struct AccessPolicy {
    /// Which workloads it is about.
    pub target_ref: AccessTarget,
    /// Whether it decides.
    #[serde(default, skip_serializing_if = "AccessMode::is_enforce")]
    pub mode: AccessMode,
    /// Who may, and who may not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_RULES), extend("x-kubernetes-validations" = cel(&[UNIQUE_NAMES])))]
    pub rules: Vec<AccessRule>,
    /// How much at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_LIMITS), extend("x-kubernetes-validations" = cel(&[UNIQUE_NAMES])))]
    pub limits: Vec<Limit>,
}

const UNIQUE_NAMES: (&str, &str) = (
    "self.all(one, !has(one.name) || self.exists_one(other, has(other.name) && other.name == one.name))",
    "a name is there twice: one must go",
);

/// Which workloads an AccessPolicy is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.name) == (self.kind == 'Service')",
        "`name` is for kind Service, which needs it: write the Service's name there, and nowhere else",
    ),
    (
        "(has(self.labels) && size(self.labels) > 0) == (self.kind == 'Workload')",
        "`labels` are for kind Workload, which needs them: write the workloads' labels, or `kind: Namespace` for all of them",
    ),
])))]
pub struct AccessTarget {
    /// How they are named.
    pub kind: AccessTargetKind,
    /// Of a Service of the policy's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_SERVICE), regex(pattern = SERVICE))]
    pub name: Option<String>,
    /// Of Workloads of the policy's namespace: all of these.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(transform = labels)]
    pub labels: BTreeMap<String, String>,
    /// A Service's port, or the workloads' own; left out: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
}

/// How an AccessPolicy names workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum AccessTargetKind {
    /// All; from the mesh's own namespace only.
    Mesh,
    /// All of the policy's namespace.
    Namespace,
    /// Those behind a service.
    Service,
    /// Those with labels.
    Workload,
}

/// Whether a policy decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AccessMode {
    /// It does.
    #[default]
    Enforce,
    /// What it would decide is counted and logged.
    Audit,
}

impl AccessMode {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_enforce(&self) -> bool {
        matches!(self, Self::Enforce)
    }
}

/// Who may, or may not, do what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct AccessRule {
    /// For logs and metrics; `rule <number>` from 0 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_RULE_NAME), regex(pattern = RULE_NAME))]
    pub name: Option<String>,
    /// Allow or Deny.
    pub action: Action,
    /// Any of these callers; left out: everybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES))]
    pub from: Option<Vec<Source>>,
    /// Any of these requests; left out: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_OPERATIONS))]
    pub to: Option<Vec<Operation>>,
}

/// What a rule says of what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Action {
    /// It may.
    Allow,
    /// It may not.
    Deny,
}

/// Callers: all of what is set must hold; of a list, any.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.identities) || has(self.namespaces) || has(self.serviceAccounts) || has(self.cidrs) || has(self.unauthenticated) && self.unauthenticated",
        "is an empty selector: it selects nothing; leave it out to select everything",
    ),
    (
        "!has(self.unauthenticated) || !self.unauthenticated || !has(self.identities) && !has(self.namespaces) && !has(self.serviceAccounts)",
        "asks for callers without an identity that have a certain one: there are none",
    ),
])))]
pub struct Source {
    /// SPIFFE ids; `*` at the end stands for any rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES), inner(length(max = MAX_IDENTITY), regex(pattern = IDENTITY_PATTERN)))]
    pub identities: Option<Vec<String>>,
    /// Namespaces of the caller's identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES), inner(length(max = MAX_LABEL), regex(pattern = LABEL)))]
    pub namespaces: Option<Vec<String>>,
    /// `<namespace>/<service account>` of the caller's identity, in the mesh's own trust domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES), inner(length(max = MAX_LABEL + 1 + MAX_SUBDOMAIN), regex(pattern = SERVICE_ACCOUNT)))]
    pub service_accounts: Option<Vec<String>>,
    /// Networks that the caller's address is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES), inner(length(max = MAX_NETWORK)), transform = networks)]
    pub cidrs: Option<Vec<String>>,
    /// `true`: callers without an identity, and only these.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unauthenticated: bool,
}

/// Requests: all of what is set must hold; of a list, any, but of `headers` all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.ports) || has(self.methods) || has(self.paths) || has(self.headers) || has(self.grpc)",
        "is an empty selector: it selects nothing; leave it out to select everything",
    ),
])))]
pub struct Operation {
    /// The workload's ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES), inner(range(min = 1)))]
    pub ports: Option<Vec<u16>>,
    /// Methods, as `GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES), inner(length(max = MAX_METHOD), regex(pattern = TOKEN)))]
    pub methods: Option<Vec<String>>,
    /// Paths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_OPERATIONS))]
    pub paths: Option<Vec<PathCondition>>,
    /// Headers, all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_CONDITIONS))]
    pub headers: Option<Vec<HeaderCondition>>,
    /// gRPC methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_CONDITIONS))]
    pub grpc: Option<Vec<GrpcMethodMatch>>,
}

/// A path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    ("self.type == 'RegularExpression' || self.value.startsWith('/')", "`value` does not begin with `/`"),
])))]
pub struct PathCondition {
    /// How `value` is meant.
    #[serde(rename = "type")]
    pub kind: PathMatchType,
    /// A path, the beginning of one by whole elements, or a regular expression of the whole.
    #[schemars(length(min = 1, max = MAX_PATH))]
    pub value: String,
}

/// A header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.value) != (has(self.type) && self.type == 'Present')",
        "write a `value`, or `type: Present`, which has none",
    ),
])))]
pub struct HeaderCondition {
    /// Its name, without regard to case.
    #[schemars(length(max = MAX_HEADER_NAME), regex(pattern = TOKEN))]
    pub name: String,
    /// How `value` is meant. Exact where it is left out.
    #[serde(rename = "type", default, skip_serializing_if = "HeaderConditionType::is_exact")]
    pub kind: HeaderConditionType,
    /// Its value, or a regular expression of the whole; not for Present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_HEADER_VALUE))]
    pub value: Option<String>,
}

/// How a header's value is meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HeaderConditionType {
    /// It is equal.
    #[default]
    Exact,
    /// It matches as a whole.
    RegularExpression,
    /// It is there, whatever it says.
    Present,
}

impl HeaderConditionType {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_exact(&self) -> bool {
        matches!(self, Self::Exact)
    }
}

/// A bound on what each workload takes, kept at its own sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.header) == (self.per == 'Header')",
        "`header` is for `per: Header`, which needs it: write the header whose values are told apart",
    ),
    (
        "has(self.requestsPerSecond) || has(self.maxConnections)",
        "has neither `requestsPerSecond` nor `maxConnections`: it would bound nothing",
    ),
    ("!has(self.burst) || has(self.requestsPerSecond)", "`burst` is for a limit with `requestsPerSecond`"),
    (
        "!has(self.tellRemaining) || has(self.requestsPerSecond)",
        "`tellRemaining` is for a limit with `requestsPerSecond`",
    ),
    (
        "!has(self.maxConnections) || self.per == 'Caller'",
        "`maxConnections` is for `per: Caller`: connections are counted by caller",
    ),
    (
        "!has(self.to) || !has(self.maxConnections) || has(self.requestsPerSecond)",
        "`to` is about requests, and this limit counts connections",
    ),
])))]
pub struct Limit {
    /// For logs and metrics; `limit <number>` from 0 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_RULE_NAME), regex(pattern = RULE_NAME))]
    pub name: Option<String>,
    /// What has a bound of its own.
    pub per: LimitPer,
    /// The header whose values each have a bound of their own, for Header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_HEADER_NAME), regex(pattern = TOKEN))]
    pub header: Option<String>,
    /// Requests a second, with up to three decimals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<Rate>,
    /// Requests at once above the rate, at least 1; the rate of one second where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_BURST))]
    pub burst: Option<u32>,
    /// Whether answers to requests that pass say what is left, too, as refusals do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tell_remaining: Option<bool>,
    /// Open connections of one caller, for Caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_BURST))]
    pub max_connections: Option<u32>,
    /// Whose requests count; left out: everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENTRIES))]
    pub from: Option<Vec<Source>>,
    /// Which requests count; left out: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_OPERATIONS))]
    pub to: Option<Vec<Operation>>,
}

/// What has a bound of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LimitPer {
    /// All requests together.
    Total,
    /// Each caller: its identity, or its address where it has none.
    Caller,
    /// Each value of a header.
    Header,
}
