//! Objects as they are parsed. Fields that the API may write as `null` are options.

use serde::{Deserialize, Deserializer};

use super::{Meta, Probe};
use outrigger_api::v1;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(in super::super) struct Service {
    pub(super) metadata: Meta,
    pub(super) spec: ServiceSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    pub(super) r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    pub(super) cluster_ips: Option<Vec<String>>,
    pub(super) ip_families: Option<Vec<String>>,
    pub(super) internal_traffic_policy: Option<String>,
    pub(super) traffic_distribution: Option<String>,
    pub(super) ports: Option<Vec<ServicePort>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ServicePort {
    pub(super) name: Option<String>,
    pub(super) protocol: Option<String>,
    pub(super) app_protocol: Option<String>,
    pub(super) port: u16,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(in super::super) struct Slice {
    pub(super) metadata: Meta,
    pub(super) address_type: String,
    pub(super) endpoints: Option<Vec<Endpoint>>,
    pub(super) ports: Option<Vec<SlicePort>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct SlicePort {
    pub(super) name: Option<String>,
    pub(super) protocol: Option<String>,
    #[serde(deserialize_with = "slice_port")]
    pub(super) port: Option<u16>,
}

/// Not every API server checks the number, and one slice that cannot be parsed would stop the reading of all: what is no port is none.
fn slice_port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let number = Option::<i64>::deserialize(deserializer)?;
    Ok(number.and_then(|number| u16::try_from(number).ok()))
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Endpoint {
    pub(super) addresses: Vec<String>,
    pub(super) conditions: Option<Conditions>,
    pub(super) target_ref: Option<Target>,
    pub(super) node_name: Option<String>,
    pub(super) zone: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Target {
    pub(super) kind: String,
    pub(super) name: String,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    /// As kube-proxy reads them: ready ones, else those that serve while they terminate, never another.
    pub(super) fn health(self) -> v1::Health {
        let ready = self.ready.unwrap_or(true);
        match (ready, self.serving.unwrap_or(ready), self.terminating.unwrap_or(false)) {
            (true, _, false) => v1::Health::Healthy,
            (true, _, true) | (false, true, true) => v1::Health::Draining,
            (false, ..) => v1::Health::Unready,
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(in super::super) struct Pod {
    pub(super) metadata: Meta,
    pub(super) spec: PodSpec,
    pub(super) status: PodStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub(super) node_name: Option<String>,
    pub(super) service_account_name: Option<String>,
    pub(super) host_network: bool,
    pub(super) containers: Vec<Container>,
    pub(super) init_containers: Option<Vec<Container>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodStatus {
    pub(super) phase: Option<String>,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pub(super) pod_ips: Option<Vec<Ip>>,
    #[serde(rename = "hostIP")]
    pub(super) host_ip: Option<String>,
    #[serde(rename = "hostIPs")]
    pub(super) host_ips: Option<Vec<Ip>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ip {
    pub(super) ip: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Container {
    pub(super) name: String,
    ports: Option<Vec<ContainerPort>>,
    startup_probe: Option<Handler>,
    readiness_probe: Option<Handler>,
    liveness_probe: Option<Handler>,
    lifecycle: Option<Lifecycle>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Lifecycle {
    post_start: Option<Handler>,
    pre_stop: Option<Handler>,
}

/// `exec` runs in the container and meets no sidecar.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Handler {
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Grpc>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct HttpGet {
    host: Option<String>,
    path: Option<String>,
    port: Option<PortRef>,
    scheme: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct TcpSocket {
    host: Option<String>,
    port: Option<PortRef>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Grpc {
    port: u16,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum PortRef {
    Number(u16),
    Name(String),
}

impl Container {
    pub(super) fn probes(&self) -> impl Iterator<Item = Probe> {
        let hooks = self.lifecycle.iter().flat_map(|lifecycle| [&lifecycle.post_start, &lifecycle.pre_stop]);
        let probes = [&self.startup_probe, &self.readiness_probe, &self.liveness_probe];
        probes.into_iter().chain(hooks).flatten().filter_map(|handler| self.probe(handler))
    }

    fn probe(&self, handler: &Handler) -> Option<Probe> {
        // A probe with a host of its own asks somebody else.
        let here = |host: &Option<String>| host.as_deref().is_none_or(str::is_empty);
        if let Some(get) = handler.http_get.as_ref().filter(|get| here(&get.host)) {
            let port = self.port(get.port.as_ref()?)?;
            if get.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")) {
                return Some(Probe::Connection { port });
            }
            // As the kubelet reads it: a URL whose path may bear a query.
            let path = get.path.as_deref().unwrap_or_default().split(['?', '#']).next().unwrap_or_default();
            let slash = if path.starts_with('/') { "" } else { "/" };
            return Some(Probe::Http { port, path: format!("{slash}{path}") });
        }
        if let Some(tcp) = handler.tcp_socket.as_ref().filter(|tcp| here(&tcp.host)) {
            return Some(Probe::Connection { port: self.port(tcp.port.as_ref()?)? });
        }
        let grpc = handler.grpc.as_ref().filter(|grpc| grpc.port != 0)?;
        Some(Probe::Grpc { port: grpc.port })
    }

    fn port(&self, port: &PortRef) -> Option<u16> {
        match port {
            PortRef::Number(number) => Some(*number).filter(|number| *number != 0),
            PortRef::Name(name) => match name.parse() {
                Ok(number) => Some(number).filter(|number: &u16| *number != 0),
                Err(_) => self
                    .ports
                    .iter()
                    .flatten()
                    .find(|port| port.name.as_deref() == Some(name))
                    .map(|port| port.container_port),
            },
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(in super::super) struct Node {
    pub(super) metadata: Meta,
    pub(super) spec: NodeSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pub(super) pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pub(super) pod_cidrs: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(in super::super) struct ServiceRange {
    pub(super) metadata: Meta,
    pub(super) spec: ServiceRangeSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ServiceRangeSpec {
    pub(super) cidrs: Vec<String>,
}
