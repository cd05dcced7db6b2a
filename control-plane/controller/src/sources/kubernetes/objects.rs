//! What is kept of the cluster's objects.
//!
//! A list of all pods is hundreds of megabytes, of which the mesh uses a few. Objects are decoded into the `raw` types, which
//! skip every other field while they are parsed, and become the types below before anything holds on to them. So a
//! change of a field that nobody uses (a heartbeat, a condition) is no change at all.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_api::v1;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::sources::Reach;

/// The container whose presence makes a pod one of the mesh.
pub(crate) const PROXY_CONTAINER: &str = "outrigger-proxy";
/// Names of the EndpointSlice's service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const ZONE: &str = "topology.kubernetes.io/zone";
const REGION: &str = "topology.kubernetes.io/region";
/// Labels of a workload that are kept, as of every source.
const MAX_LABELS: usize = 64;
/// Probes of a pod that are kept: a proxy takes 1,024, of which policies want some.
const MAX_PROBES: usize = 256;

/// Namespace (empty for what has none) and name.
pub(super) type ObjectKey = (Arc<str>, Arc<str>);

/// A kind of object that is read.
pub(super) trait Kind: Sized + Send + 'static {
    /// The object as the API writes it.
    type Raw: DeserializeOwned + Clone + Send;
    /// The collection of all of them.
    const PATH: &str;
    /// For people.
    const NAME: &str;
    /// A server that does not know the kind is no fault.
    const OPTIONAL: bool = false;

    /// What is kept.
    fn prune(raw: Self::Raw) -> (Meta, Self);
}

/// What every object has.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Meta {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) resource_version: String,
    uid: String,
    deletion_timestamp: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: Annotations,
}

/// The annotations that are looked at: others can be large.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Annotations {
    #[serde(rename = "service.kubernetes.io/topology-mode")]
    topology_mode: Option<String>,
}

impl Meta {
    pub(super) fn key(&self) -> ObjectKey {
        (self.namespace.as_str().into(), self.name.as_str().into())
    }
}

/// A resource version as a number. They are opaque by contract, but every API server counts with them (etcd's revision),
/// and KEP-5504 makes it the contract; where one is no number it is older than nothing.
pub(super) fn version(text: &str) -> u64 {
    text.parse().unwrap_or_default()
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    /// Its cluster IPs, of the primary family first. Empty: it is headless.
    pub(super) cluster_ips: Vec<IpAddr>,
    /// The first of its `ipFamilies` is IPv6.
    pub(super) prefers_v6: bool,
    /// `ExternalName`: a name in DNS and nothing else.
    pub(super) is_external_name: bool,
    /// TCP only.
    pub(super) ports: Vec<Port>,
    /// It has ports, but none of TCP.
    pub(super) has_no_tcp: bool,
    pub(super) reach: Reach,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) port: u16,
    pub(super) name: String,
    pub(super) app_protocol: Option<String>,
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) service: Arc<str>,
    /// Which of two slices with the same endpoint is newer.
    pub(super) version: u64,
    /// Its addresses are DNS names, which no Service of a cluster uses and nothing resolves.
    pub(super) has_names: bool,
    /// TCP only: the name of the service's port, and the number at the endpoint.
    pub(super) ports: Vec<(String, u16)>,
    pub(super) endpoints: Vec<Endpoint>,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) address: IpAddr,
    /// The pod that it is said to be.
    pub(super) pod: Option<Arc<str>>,
    pub(super) node: Option<Arc<str>>,
    pub(super) zone: Option<Arc<str>>,
    pub(super) health: v1::Health,
}

/// A Pod.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) service_account: String,
    pub(crate) node: Arc<str>,
    pub(crate) node_addresses: Vec<IpAddr>,
    pub(crate) labels: Arc<BTreeMap<String, String>>,
    /// It has a sidecar of ours.
    pub(crate) is_meshed: bool,
    /// It shares its node's addresses.
    pub(crate) host_network: bool,
    /// Its containers have ended for good: its addresses may be another's already.
    pub(crate) is_finished: bool,
    pub(crate) terminating: bool,
    pub(crate) probes: Vec<Probe>,
}

/// What the node asks of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Probe {
    /// A GET.
    Http { port: u16, path: String },
    /// `grpc.health.v1.Health/Check`.
    Grpc { port: u16 },
    /// A connection, or TLS that nobody looks into.
    Connection { port: u16 },
}

/// A Node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) zone: String,
    pub(super) region: String,
    pub(super) pod_ranges: Vec<IpNet>,
}

/// A ServiceCIDR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServiceRange(pub(super) Vec<IpNet>);

impl Kind for Service {
    type Raw = raw::Service;
    const PATH: &str = "/api/v1/services";
    const NAME: &str = "services";

    fn prune(raw: raw::Service) -> (Meta, Self) {
        let raw::Service { metadata, spec } = raw;
        let all = spec.ports.unwrap_or_default();
        let ports: Vec<Port> = all
            .iter()
            .filter(|port| is_tcp(port.protocol.as_deref()) && port.port != 0)
            .map(|port| Port {
                port: port.port,
                name: port.name.clone().unwrap_or_default(),
                app_protocol: port.app_protocol.clone(),
            })
            .collect();
        let listed = spec.cluster_ips.unwrap_or_default();
        let listed = if listed.is_empty() { spec.cluster_ip.into_iter().collect() } else { listed };
        let topology = metadata.annotations.topology_mode.as_deref();
        let reach = if spec.internal_traffic_policy.as_deref() == Some("Local") {
            Reach::OwnNode
        } else if spec.traffic_distribution.is_some() || matches!(topology, Some("Auto" | "auto")) {
            // Every distribution that there is prefers what is near; of one's own node the wire says no more than its zone.
            Reach::OwnZone
        } else {
            Reach::All
        };
        let service = Self {
            reach,
            // `None` says that it is headless.
            cluster_ips: addresses(&listed),
            prefers_v6: spec.ip_families.unwrap_or_default().first().is_some_and(|family| family == "IPv6"),
            is_external_name: spec.r#type.as_deref() == Some("ExternalName"),
            has_no_tcp: ports.is_empty() && !all.is_empty(),
            ports,
        };
        (metadata, service)
    }
}

impl Kind for Slice {
    type Raw = raw::Slice;
    const PATH: &str = "/apis/discovery.k8s.io/v1/endpointslices";
    const NAME: &str = "endpointslices";

    fn prune(raw: raw::Slice) -> (Meta, Self) {
        let raw::Slice { metadata, address_type, endpoints, ports } = raw;
        let ports = ports.unwrap_or_default().into_iter();
        let ports = ports.filter(|port| is_tcp(port.protocol.as_deref())).filter_map(|port| {
            Some((port.name.unwrap_or_default(), port.port.filter(|number| *number != 0)?))
        });
        let endpoints = endpoints.unwrap_or_default().into_iter().filter_map(|endpoint| {
            // Consumers use the first address only: more was never allowed to mean anything (API reference).
            let address = endpoint.addresses.first()?.parse().ok()?;
            let pod = endpoint.target_ref.filter(|target| target.kind == "Pod");
            Some(Endpoint {
                address,
                pod: pod.map(|pod| pod.name.into()),
                node: endpoint.node_name.map(Arc::from),
                zone: endpoint.zone.map(Arc::from),
                health: endpoint.conditions.unwrap_or_default().health(),
            })
        });
        let slice = Self {
            service: metadata.labels.get(SERVICE_NAME).map_or("", String::as_str).into(),
            version: version(&metadata.resource_version),
            has_names: address_type == "FQDN",
            ports: ports.collect(),
            endpoints: endpoints.collect(),
        };
        (metadata, slice)
    }
}

impl Kind for Pod {
    type Raw = raw::Pod;
    const PATH: &str = "/api/v1/pods";
    const NAME: &str = "pods";

    fn prune(raw: raw::Pod) -> (Meta, Self) {
        let raw::Pod { mut metadata, spec, status } = raw;
        let containers = || {
            spec.init_containers
                .iter()
                .flatten()
                .chain(&spec.containers)
                .map(|container| (container, container.name == PROXY_CONTAINER))
        };
        let is_meshed = !spec.host_network && containers().any(|(_, is_proxy)| is_proxy);
        let mut labels = std::mem::take(&mut metadata.labels);
        while labels.len() > MAX_LABELS {
            labels.pop_last();
        }
        let mut probes: Vec<Probe> = Vec::new();
        if is_meshed {
            // The sidecar's own port is not redirected.
            probes.extend(
                containers().filter(|(_, is_proxy)| !is_proxy).flat_map(|(container, _)| container.probes()),
            );
            probes.sort();
            probes.dedup();
            probes.truncate(MAX_PROBES);
        }
        let of = |list: Option<Vec<raw::Ip>>, one: Option<String>| {
            let listed: Vec<String> = list.into_iter().flatten().map(|item| item.ip).collect();
            addresses(&if listed.is_empty() { one.into_iter().collect() } else { listed })
        };
        let pod = Self {
            name: metadata.name.clone(),
            namespace: metadata.namespace.clone(),
            uid: std::mem::take(&mut metadata.uid),
            addresses: of(status.pod_ips, status.pod_ip),
            service_account: spec.service_account_name.unwrap_or_else(|| "default".to_owned()),
            node: spec.node_name.unwrap_or_default().into(),
            node_addresses: of(status.host_ips, status.host_ip),
            labels: Arc::new(labels),
            is_meshed,
            host_network: spec.host_network,
            is_finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            terminating: metadata.deletion_timestamp.is_some(),
            probes,
        };
        (metadata, pod)
    }
}

impl Kind for Node {
    type Raw = raw::Node;
    const PATH: &str = "/api/v1/nodes";
    const NAME: &str = "nodes";

    fn prune(raw: raw::Node) -> (Meta, Self) {
        let raw::Node { mut metadata, spec } = raw;
        let mut label = |name| metadata.labels.remove(name).unwrap_or_default();
        let (zone, region) = (label(ZONE), label(REGION));
        let listed = spec.pod_cidrs.unwrap_or_default();
        let listed = if listed.is_empty() { spec.pod_cidr.into_iter().collect() } else { listed };
        (metadata, Self { zone, region, pod_ranges: ranges(&listed) })
    }
}

impl Kind for ServiceRange {
    type Raw = raw::ServiceRange;
    const PATH: &str = "/apis/networking.k8s.io/v1/servicecidrs";
    const NAME: &str = "servicecidrs";
    // Before Kubernetes 1.33 the range is a flag of the API server.
    const OPTIONAL: bool = true;

    fn prune(raw: raw::ServiceRange) -> (Meta, Self) {
        (raw.metadata, Self(ranges(&raw.spec.cidrs)))
    }
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}

fn addresses(texts: &[String]) -> Vec<IpAddr> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

fn ranges(texts: &[String]) -> Vec<IpNet> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

/// Objects as they are parsed. Fields that the API may write as `null` are options.
pub(super) mod raw {
    use serde::Deserialize;

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
        pub(super) port: Option<u16>,
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
            let hooks =
                self.lifecycle.iter().flat_map(|lifecycle| [&lifecycle.post_start, &lifecycle.pre_stop]);
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
                let path =
                    get.path.as_deref().unwrap_or_default().split(['?', '#']).next().unwrap_or_default();
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
}
