//! `ExternalService`: a service outside the mesh.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bounds::{
    MAX_ENDPOINTS, MAX_HOSTS, MAX_IDENTITY, MAX_LABEL, MAX_NETWORK, MAX_SUBDOMAIN, MAX_ZONE,
};
use crate::schema::rules::{IDENTITY, LABEL, cel};

/// A service outside the mesh; it is `<name>.<namespace>` like any other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExternalService {
    /// The names that workloads dial.
    #[schemars(
        length(min = 1, max = MAX_HOSTS),
        inner(length(max = MAX_SUBDOMAIN)),
        extend("x-kubernetes-list-type" = "set", "x-kubernetes-validations" = cel(&[
            ("self.all(host, !host.startsWith('*.'))", "a host with `*.` stands for many: write each"),
            ("self.all(host, !isIP(host))", "an address is no host: it belongs into `endpoints`"),
            (
                "self.all(host, !host.endsWith('.mesh') && !host.endsWith('.consul') && !host.endsWith('.cluster.local'))",
                "a name of .mesh, .consul or .cluster.local is inside of the mesh",
            ),
            (
                "self.all(host, host.startsWith('*.') || host.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$'))",
                "a host is a DNS name in lower case",
            ),
        ]))
    )]
    pub hosts: Vec<String>,
    /// The ports that workloads dial.
    #[schemars(length(min = 1, max = MAX_HOSTS), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["port"], "x-kubernetes-validations" = cel(&[
        (
            "self.all(one, !has(one.name) || self.exists_one(other, has(other.name) && other.name == one.name))",
            "a name is there twice: one must go",
        ),
    ])))]
    pub ports: Vec<ExternalPort>,
    /// Where it is; left out: the hosts are resolved by DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ENDPOINTS), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["address"]))]
    pub endpoints: Option<Vec<ExternalEndpoint>>,
    /// The SPIFFE id of its endpoints. Left out: they are called in plaintext, and the application's own TLS passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_IDENTITY), regex(pattern = IDENTITY))]
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
    #[schemars(length(max = MAX_LABEL), regex(pattern = LABEL))]
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
    #[schemars(length(max = MAX_NETWORK), extend("x-kubernetes-validations" = cel(&[
        (
            "isIP(self) && (ip(self).isGlobalUnicast() || ip(self).isLinkLocalUnicast())",
            "is no address of another host",
        ),
    ])))]
    pub address: IpAddr,
    /// Where that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_ZONE))]
    pub zone: Option<String>,
    /// Its share; 0: none. 1 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
}
