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

pub(super) mod raw;

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
#[expect(clippy::struct_field_names, reason = "the names are the API's")]
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
