//! From objects to services and workloads. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_api::v1::{Health, Protocol};
use outrigger_core::path::{self, EscapedSlashes};
use outrigger_policy::kinds;

use super::objects::{Endpoint, Node, ObjectKey, Pod, Probe, Service, Slice};
use crate::sources::{Instance, InvalidServiceKey, ServiceKey, ServicePort, SourceService, Workload};

/// What the gRPC health service is asked (gRPC health checking protocol v1).
const GRPC_HEALTH_PATH: &str = "/grpc.health.v1.Health/Check";

/// Who is at an endpoint's address.
pub(super) enum Found<'a> {
    /// This pod.
    Pod(&'a Pod),
    /// It is said to be a pod, and that pod is not known to have the address (yet): nobody can say who it is.
    Unknown,
    /// Nobody of the cluster.
    Stranger,
}

/// The workload that a pod is. `None`: it has no addresses of its own.
pub(super) fn workload(
    pod: &Pod,
    node: &Node,
    trust_domain: &str,
) -> Option<Result<Workload, InvalidServiceKey>> {
    if pod.host_network || pod.is_finished || pod.addresses.is_empty() {
        return None;
    }
    let key = match ServiceKey::of_workload(&pod.name, &pod.namespace) {
        Ok(key) => key,
        Err(error) => return Some(Err(error)),
    };
    Some(Ok(Workload {
        key,
        addresses: pod.addresses.clone(),
        identity: identity(pod, trust_domain),
        region: node.region.clone(),
        zone: node.zone.clone(),
        node: pod.node.clone(),
        labels: pod.labels.clone(),
        probes: probes(pod, node),
        terminating: pod.terminating,
    }))
}

/// The identity that a pod's sidecar proves.
pub(super) fn identity(pod: &Pod, trust_domain: &str) -> Option<String> {
    pod.is_meshed.then(|| format!("spiffe://{trust_domain}/ns/{}/sa/{}", pod.namespace, pod.service_account))
}

/// A service of the mesh. `None`: nothing of it can be dialled through us, an `ExternalName` or without a port of TCP.
///
/// Of a service with two families the endpoints of the first are used, whichever of its addresses was dialled: a pod counts
/// once. At its other address it is found as the workload that it is.
pub(super) fn service<'a>(
    (namespace, name): &ObjectKey,
    service: &Service,
    slices: &[&Slice],
    cluster_domain: &str,
    trust_domain: &str,
    at: impl Fn(&Endpoint) -> (Found<'a>, &'a Node),
) -> Option<Result<SourceService, InvalidServiceKey>> {
    if service.is_external_name || service.has_no_tcp {
        return None;
    }
    let key = match ServiceKey::new(name, namespace) {
        Ok(key) => key,
        Err(error) => return Some(Err(error)),
    };
    // The newest first: while an endpoint moves from one slice to another both may have it, and one is out of date.
    let mut slices: Vec<&Slice> = slices.iter().copied().filter(|slice| !slice.has_names).collect();
    slices.sort_by_key(|slice| std::cmp::Reverse(slice.version));
    let of_family = |v6: bool| instances(service, &slices, v6, trust_domain, &at);
    let mut found = of_family(service.prefers_v6);
    if found.is_empty() {
        found = of_family(!service.prefers_v6);
    }
    let full = format!("{name}.{namespace}.svc");
    Some(Ok(SourceService {
        ports: service
            .ports
            .iter()
            .map(|port| ServicePort {
                port: port.port,
                name: port.name.clone(),
                protocol: protocol(port.app_protocol.as_deref(), &port.name),
            })
            .collect(),
        protocol: Protocol::Unspecified,
        virtual_addresses: service.cluster_ips.clone(),
        names: vec![format!("{name}.{namespace}"), format!("{full}.{cluster_domain}"), full],
        reach: service.reach,
        instances: found,
        key,
    }))
}

fn instances<'a>(
    service: &Service,
    slices: &[&Slice],
    v6: bool,
    trust_domain: &str,
    at: &impl Fn(&Endpoint) -> (Found<'a>, &'a Node),
) -> Vec<Instance> {
    let mut instances: BTreeMap<IpAddr, Instance> = BTreeMap::new();
    for slice in slices {
        let by_name: BTreeMap<&str, u16> =
            slice.ports.iter().map(|(name, port)| (name.as_str(), *port)).collect();
        let ports: BTreeMap<u16, u16> = service
            .ports
            .iter()
            .filter_map(|port| Some((port.port, *by_name.get(port.name.as_str())?)))
            .collect();
        // No port of it leads here. A service without ports (headless) leads to any.
        if ports.is_empty() && !service.ports.is_empty() {
            continue;
        }
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() == v6) {
            if let Some(known) = instances.get_mut(&endpoint.address) {
                for (port, target) in &ports {
                    known.ports.entry(*port).or_insert(*target);
                }
                continue;
            }
            let (found, node) = at(endpoint);
            instances.insert(endpoint.address, instance(endpoint, ports.clone(), &found, node, trust_domain));
        }
    }
    let mut instances: Vec<Instance> = instances.into_values().collect();
    // One pod at two addresses of a family would be one id twice.
    let mut ids = BTreeSet::new();
    for instance in &mut instances {
        if !ids.insert(instance.id.clone()) {
            instance.id = instance.address.to_string();
        }
    }
    instances.sort_by(|a, b| a.id.cmp(&b.id));
    instances
}

fn instance(
    endpoint: &Endpoint,
    ports: BTreeMap<u16, u16>,
    found: &Found<'_>,
    node: &Node,
    trust_domain: &str,
) -> Instance {
    let (identity, labels, health) = match found {
        Found::Pod(pod) => (identity(pod, trust_domain), pod.labels.clone(), endpoint.health),
        Found::Stranger => (None, Arc::default(), endpoint.health),
        // In plaintext to somebody who may be in the mesh: never. It is a matter of milliseconds.
        Found::Unknown => (None, Arc::default(), Health::Unready),
    };
    Instance {
        id: endpoint.pod.as_deref().map_or_else(|| endpoint.address.to_string(), str::to_owned),
        address: endpoint.address,
        ports,
        weight: 1,
        health,
        identity,
        region: node.region.clone(),
        zone: endpoint.zone.as_deref().unwrap_or(&node.zone).to_owned(),
        node: endpoint.node.clone().unwrap_or_default(),
        labels,
    }
}

/// What a port speaks: `appProtocol` (KEP-1422 and KEP-3726), else the prefix of the port's name up to a `-`, which other meshes
/// made the convention. TLS is bytes to us.
pub(super) fn protocol(app_protocol: Option<&str>, name: &str) -> Protocol {
    let known = |text: &str| {
        Some(match text.to_ascii_lowercase().as_str() {
            "http" | "http1" | "kubernetes.io/ws" | "grpc-web" => Protocol::Http1,
            "http2" | "h2c" | "kubernetes.io/h2c" => Protocol::Http2,
            "grpc" => Protocol::Grpc,
            "tcp" | "tls" | "https" | "kubernetes.io/wss" | "mongo" | "mysql" | "redis" | "postgres"
            | "postgresql" => Protocol::Tcp,
            _ => return None,
        })
    };
    match app_protocol {
        Some(said) => known(said),
        None if name.starts_with("grpc-web") => Some(Protocol::Http1),
        None => known(name.split('-').next().unwrap_or_default()),
    }
    .unwrap_or(Protocol::Unspecified)
}

/// The first address behind that of the network itself.
fn first_host(range: &IpNet) -> Option<IpAddr> {
    let next = match range.network() {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits().checked_add(1)?).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits().checked_add(1)?).into(),
    };
    range.contains(&next).then_some(next)
}

/// The probes as policies write them. A connection says nothing of who asks, so it passes from the node only: its own
/// addresses, and the first of its pod ranges, which is the bridge's.
fn probes(pod: &Pod, node: &Node) -> Vec<kinds::Probe> {
    let gateways = node.pod_ranges.iter().filter_map(first_host);
    let nodes: BTreeSet<IpAddr> = pod.node_addresses.iter().copied().chain(gateways).collect();
    let nodes: Vec<String> = nodes.into_iter().map(|address| IpNet::from(address).to_string()).collect();
    let probe = |probe: &Probe| {
        let request = |port: u16, method: &str, path: &str| {
            // The kubelet escapes a space. A proxy refuses all that it is told with one path that nobody can ask for.
            let path = path.replace(' ', "%20");
            path::normalise(path.as_bytes(), EscapedSlashes::Keep).ok()?;
            Some(kinds::Probe { port, method: Some(method.to_owned()), path: Some(path), nodes: Vec::new() })
        };
        match probe {
            Probe::Http { port, path } => request(*port, "GET", path),
            Probe::Grpc { port } => request(*port, "POST", GRPC_HEALTH_PATH),
            // Without a node it would pass from nowhere, and is none.
            Probe::Connection { .. } if nodes.is_empty() => None,
            Probe::Connection { port } => {
                Some(kinds::Probe { port: *port, method: None, path: None, nodes: nodes.clone() })
            }
        }
    };
    pod.probes.iter().filter_map(probe).collect()
}

#[cfg(test)]
mod tests;
