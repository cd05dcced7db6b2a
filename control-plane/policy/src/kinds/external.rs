//! `ExternalService`: a service outside the mesh.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A service outside the mesh; it is `<name>.<namespace>` like any other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExternalService {
    /// The names that workloads dial.
    #[schemars(length(min = 1))]
    pub hosts: Vec<String>,
    /// The ports that workloads dial.
    #[schemars(length(min = 1))]
    pub ports: Vec<ExternalPort>,
    /// Where it is; left out: the hosts are resolved by DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<ExternalEndpoint>>,
    /// The SPIFFE id of its endpoints. Left out: they are called in plaintext, and the application's own TLS passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
}

/// A port of an external service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExternalPort {
    /// The port.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What is spoken there.
    pub protocol: ExternalProtocol,
}

/// What is spoken at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum ExternalProtocol {
    /// HTTP/1.1, or HTTP/2 where the client speaks it.
    Http,
    /// HTTP/2 without TLS, by prior knowledge.
    Http2,
    /// gRPC, over HTTP/2.
    Grpc,
    /// Bytes, among them TLS.
    Tcp,
}

/// Where an external service is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExternalEndpoint {
    /// An IP address.
    pub address: IpAddr,
    /// Where that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Its share; 0: none. 1 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
}
