//! `MeshDefaults`: what holds where nothing else is said.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bounds::{MAX_METHOD, MAX_NETWORK, MAX_PATH, MAX_PROBES};
use crate::schema::rules::{PATH, TOKEN, cel, networks};

/// What holds where nothing else is said. Its name is `default`: one in the mesh's own namespace for the whole mesh, one
/// in each other namespace for the workloads there, field by field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MeshDefaults {
    /// Whether workloads take plaintext.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<Mtls>,
    /// What becomes of requests that no rule of an AccessPolicy is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound: Option<DefaultAction>,
    /// What becomes of connections to addresses outside the mesh that no ExternalService is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound: Option<DefaultAction>,
    /// What becomes of `%2f` and `%5c` in paths that rules look at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub escaped_slashes: Option<EscapedSlashes>,
    /// Probes that pass whatever the policies say. Those of the mesh and of the namespace add up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_PROBES))]
    pub probes: Vec<Probe>,
}

/// Whether a workload takes connections without an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mtls {
    /// Mutual TLS only.
    Strict,
    /// Plaintext too.
    Permissive,
}

/// What becomes of what nothing else decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DefaultAction {
    /// It passes.
    Allow,
    /// It passes, and is counted and logged.
    Audit,
    /// It is refused.
    Deny,
}

/// What becomes of `%2f` and `%5c` in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EscapedSlashes {
    /// The request is refused.
    Reject,
    /// They are no slashes.
    Keep,
    /// They are slashes.
    Decode,
}

/// A probe of a workload's health: by method and path, or by the nodes that a TCP probe comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = cel(&[
    (
        "has(self.path) != (has(self.nodes) && size(self.nodes) > 0)",
        "write either `path` (an HTTP probe) or `nodes` (a TCP probe)",
    ),
    ("!has(self.method) || has(self.path)", "`method` is for a probe with a `path`"),
])))]
pub struct Probe {
    /// The workload's port.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// The method of an HTTP probe. `GET` where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_METHOD), regex(pattern = TOKEN))]
    pub method: Option<String>,
    /// The path of an HTTP probe, without a query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_PATH), regex(pattern = PATH))]
    pub path: Option<String>,
    /// CIDRs that a TCP probe comes from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_PROBES), inner(length(max = MAX_NETWORK)), transform = networks)]
    pub nodes: Vec<String>,
}
