//! What a sidecar is told: a YAML file, and over it one environment variable per field.
//!
//! Every field has a default that is right for most, so that an empty file with a token beside it is a whole
//! configuration. Faults are collected and reported together (`load`), because a configuration that is mended one
//! error at a time is deployed one error at a time.

mod duration;
pub(crate) mod load;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;
use outrigger_core::{model::Protocol, resolve::OutboundDefault};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use duration::ConfigDuration;
pub use load::{Faults, load, schema};

/// Everything that can be configured. Fields left out keep their default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where controllers answer, `host:port` each. They are tried in a random order until one answers.
    pub controller: Vec<String>,
    /// The trust domain of the mesh.
    pub trust_domain: String,
    /// The namespace in the controller's own identity.
    pub mesh_namespace: String,
    /// File that holds the join token. Read again each time it is needed.
    pub token_file: PathBuf,
    /// PEM file of the roots that the controller's certificate must end in. Read until the controller pushes roots.
    pub trust_bundle: PathBuf,
    /// What the workload beside this proxy serves: announced to the controller.
    pub services: Vec<ServiceClaim>,
    /// Services that are reached through a listener of this proxy, without redirection.
    pub upstreams: Vec<Upstream>,
    /// Listeners for mutual TLS in front of the workload's ports, without redirection.
    pub inbounds: Vec<Inbound>,
    /// Whether `outrigger-proxy redirect` sends this workload's traffic here: opens the transparent listeners.
    pub redirection: bool,
    /// Ports of this proxy; 0 closes a listener.
    pub ports: Ports,
    /// Addresses that those ports are opened on.
    pub bind: Bind,
    /// Worker threads. Default: the CPU limit of the control group, rounded up; 1 where there is none.
    pub threads: Option<u16>,
    /// `SO_MARK` on every socket that this proxy opens, so that redirection rules can exempt it. Needs
    /// `CAP_NET_ADMIN`. Without it the rules exempt the proxy's user id.
    pub mark: Option<u32>,
    /// The mesh's ranges until the controller has pushed them. Empty: everything but loopback counts as the mesh.
    #[schemars(with = "Vec<String>")]
    pub mesh_cidrs: Vec<IpNet>,
    /// What happens to destinations outside the mesh, until the controller has said it.
    pub outbound: Outbound,
    /// Whether plaintext may come in, until the controller has said it.
    pub mtls: Mtls,
    /// The zone that this host is in, as the catalog calls it: where a policy says so, its endpoints come first. Empty: unknown.
    pub zone: String,
    /// Ports whose bytes are never looked at, in both directions: protocols in which the server speaks first.
    pub opaque_ports: Vec<u16>,
    /// The DNS server.
    pub dns: Dns,
    /// Time-outs and periods.
    pub timeouts: Timeouts,
    /// Bounds.
    pub limits: Limits,
    /// How a shutdown goes.
    pub drain: DrainTimes,
    /// The log.
    pub log: Log,
}

/// One claim: "the workload beside me serves `service` at `address:port`".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceClaim {
    /// `<name>.<namespace>`, or `<name>` for the namespace `default`.
    pub service: String,
    /// The port that endpoints of the service have in the catalog: the workload's own, or an inbound's `listen` port.
    pub port: u16,
    /// Default: the address that the controller sees this proxy come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

/// A listener that leads to a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// `<name>.<namespace>:<port>`.
    pub service: String,
    /// Where the workload connects to.
    pub listen: SocketAddr,
}

/// A listener for the mesh that leads to the workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Inbound {
    /// The address that the catalog holds for the workload.
    pub listen: SocketAddr,
    /// Where the workload itself listens.
    pub forward: SocketAddr,
}

/// Ports of the proxy; 0 closes a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ports {
    /// Redirected outbound connections.
    pub outbound: u16,
    /// Redirected inbound connections.
    pub inbound: u16,
    /// DNS, UDP and TCP.
    pub dns: u16,
    /// `/metrics`, `/live`, `/ready`; on loopback also `/config` and `/drain`.
    pub admin: u16,
}

/// Addresses of the listeners. `::` takes IPv4 too; where the kernel has no IPv6, it means `0.0.0.0`, and other IPv6
/// addresses are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Bind {
    /// Redirection brings local connections to loopback.
    pub outbound: Vec<IpAddr>,
    /// Redirection brings connections from outside to the address of their interface.
    pub inbound: Vec<IpAddr>,
    /// DNS.
    pub dns: Vec<IpAddr>,
    /// The admin port.
    pub admin: Vec<IpAddr>,
}

/// What happens to destinations outside the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Outbound {
    /// They pass.
    #[default]
    Allow,
    /// They pass and are recorded.
    Audit,
    /// They are refused.
    Deny,
}

/// Whether plaintext may come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Mtls {
    /// Mutual TLS only.
    #[default]
    Strict,
    /// Plaintext is passed, and counted.
    Permissive,
}

/// The DNS server of the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Dns {
    /// Consul's DNS, `address:port`. Without it the proxy answers `<service>.service.consul` itself.
    pub consul: Option<SocketAddr>,
    /// Where all other names are asked. Default: the name servers of /etc/resolv.conf.
    pub upstreams: Vec<SocketAddr>,
    /// Whether names of the mesh have AAAA records. Default: whether this host has an IPv6 address of its own.
    pub ipv6: Option<bool>,
}

/// Time-outs and periods: `250ms`, `10s`, `5m`, `24h`; `0s` switches off what can be switched off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// TCP and TLS to one endpoint.
    pub connect: ConfigDuration,
    /// From the end of a request to the head of its response. `0s`: none, the application's own time-outs rule.
    pub request: ConfigDuration,
    /// A connection without a byte, or without a request, is closed after this. `0s`: never.
    pub idle: ConfigDuration,
    /// How long the first bytes of a connection are waited for before the server is taken to speak first.
    pub detect: ConfigDuration,
    /// The peer's TLS handshake.
    pub handshake: ConfigDuration,
    /// A whole request head, from its first byte.
    pub headers: ConfigDuration,
    /// How long an unknown destination waits for discovery. At most 1 s.
    pub discovery: ConfigDuration,
    /// Between HTTP/2 pings on a connection between sidecars.
    pub ping_interval: ConfigDuration,
    /// After this without an answer to a ping the connection is dead.
    pub ping_timeout: ConfigDuration,
    /// `TCP_USER_TIMEOUT`: bytes unacknowledged for this long end the connection.
    pub tcp_user: ConfigDuration,
}

/// Bounds. What exceeds them is refused with a reason, never queued without end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections from workloads and peers, over all threads.
    pub connections: u32,
    /// Bytes of one request or response head.
    pub header_bytes: u32,
    /// Endpoints of one service that a proxy keeps connections to.
    pub endpoints_per_service: u16,
    /// Requests at once on one connection between sidecars.
    pub streams_per_connection: u32,
    /// Destinations that discovery is asked for at once.
    pub destinations: u32,
    /// DNS queries at work at once.
    pub dns_queries: u16,
}

/// How a shutdown goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainTimes {
    /// New inbound connections are accepted at least this long: callers must first learn that we leave.
    pub min: ConfigDuration,
    /// After this everything is cut.
    pub max: ConfigDuration,
}

/// The log, on standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,outrigger_proxy::dns=debug`.
    pub level: String,
    /// For people or for machines.
    pub format: LogFormat,
}

/// The log's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            controller: vec!["127.0.0.1:15410".to_owned()],
            trust_domain: "outrigger.local".to_owned(),
            mesh_namespace: "outrigger-system".to_owned(),
            token_file: "/etc/outrigger/token".into(),
            trust_bundle: "/etc/outrigger/trust-bundle.pem".into(),
            services: Vec::new(),
            upstreams: Vec::new(),
            inbounds: Vec::new(),
            redirection: false,
            ports: Ports::default(),
            bind: Bind::default(),
            threads: None,
            mark: None,
            mesh_cidrs: Vec::new(),
            outbound: Outbound::default(),
            mtls: Mtls::default(),
            zone: String::new(),
            opaque_ports: Vec::new(),
            dns: Dns::default(),
            timeouts: Timeouts::default(),
            limits: Limits::default(),
            drain: DrainTimes::default(),
            log: Log::default(),
        }
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self { outbound: 15401, inbound: 15406, dns: 15453, admin: 15490 }
    }
}

impl Default for Bind {
    fn default() -> Self {
        let loopback = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let any = vec![Ipv6Addr::UNSPECIFIED.into()];
        Self { outbound: loopback.clone(), inbound: any.clone(), dns: loopback, admin: any }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: ConfigDuration::from_millis(1_000),
            request: ConfigDuration::from_millis(0),
            // Longer than the keep-alive of most clients, so that it is they who close.
            idle: ConfigDuration::from_millis(3_600_000),
            // Longer than a round trip in one region; a server that speaks first pays it once per destination.
            detect: ConfigDuration::from_millis(200),
            handshake: ConfigDuration::from_millis(10_000),
            headers: ConfigDuration::from_millis(30_000),
            discovery: ConfigDuration::from_millis(1_000),
            ping_interval: ConfigDuration::from_millis(10_000),
            ping_timeout: ConfigDuration::from_millis(5_000),
            tcp_user: ConfigDuration::from_millis(20_000),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            // 60 KiB of headers pass, with room for what the mesh adds.
            header_bytes: 128 * 1024,
            endpoints_per_service: 32,
            streams_per_connection: 250,
            destinations: 4_096,
            dns_queries: 256,
        }
    }
}

impl Default for DrainTimes {
    fn default() -> Self {
        // Kubernetes kills after 30 s.
        Self { min: ConfigDuration::from_millis(5_000), max: ConfigDuration::from_millis(25_000) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

impl From<Outbound> for OutboundDefault {
    fn from(outbound: Outbound) -> Self {
        match outbound {
            Outbound::Allow => Self::Allow,
            Outbound::Audit => Self::Audit,
            Outbound::Deny => Self::Deny,
        }
    }
}

impl Config {
    /// What the configuration itself says of a port: opaque ones are never looked at.
    pub fn protocol(&self, port: u16) -> Option<Protocol> {
        self.opaque_ports.contains(&port).then_some(Protocol::Tcp)
    }
}

impl Upstream {
    /// `<name>.<namespace>` and the port. `None` where the text has another form, which `load` refuses.
    pub fn target(&self) -> Option<(&str, u16)> {
        let (service, port) = self.service.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        is_service_name(service).then_some((service, port))
    }
}

fn is_service_name(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    text.split_once('.').is_some_and(|(name, namespace)| label(name) && label(namespace))
}
