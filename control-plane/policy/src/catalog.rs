//! What is there for policies to be about: services, their endpoints, and the workloads behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::kind::{Key, Kind};
use crate::kinds::{DefaultAction, Mtls, ParentReference, Probe};

/// What is there, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Catalog {
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// The mesh's own namespace: objects of it may be about the whole mesh.
    pub mesh_namespace: String,
    /// What holds where no `MeshDefaults` says otherwise.
    pub defaults: Defaults,
    /// Every service.
    #[serde(default)]
    pub services: Vec<CatalogService>,
    /// Workloads that serve nothing, beside those behind services.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<Workload>,
    /// Who may name Services of other namespaces as backends. `None`: everybody, for outside of Kubernetes nobody grants it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grants: Option<BTreeSet<Grant>>,
}

/// What a `ReferenceGrant` of the Gateway API permits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Grant {
    /// The kind of route that may refer.
    pub from_kind: Kind,
    /// The namespace of the route.
    pub from_namespace: String,
    /// The namespace of the Services.
    pub to_namespace: String,
    /// The one Service; `None`: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_name: Option<String>,
}

impl Default for Catalog {
    fn default() -> Self {
        Self {
            trust_domain: "outrigger.local".to_owned(),
            mesh_namespace: "outrigger-system".to_owned(),
            defaults: Defaults::default(),
            services: Vec::new(),
            workloads: Vec::new(),
            grants: None,
        }
    }
}

/// Whether a route with these parents may name a Service as a backend: one of its parents, where its requests go without it,
/// too, one of its own namespace, or one that a grant names. No `grants`: nobody asks for one.
pub(crate) fn permits(
    grants: Option<&BTreeSet<Grant>>,
    route: &Key,
    parents: &[ParentReference],
    to_namespace: &str,
    name: &str,
) -> bool {
    let Some(grants) = grants else { return true };
    let covers = |grant: &Grant| {
        grant.from_kind == route.kind
            && grant.from_namespace == route.namespace
            && grant.to_namespace == to_namespace
            && grant.to_name.as_ref().is_none_or(|only| only == name)
    };
    let is_parent = |parent: &ParentReference| parent.is(&route.namespace, to_namespace, name);
    route.namespace == to_namespace || parents.iter().any(is_parent) || grants.iter().any(covers)
}

/// What holds where no `MeshDefaults` says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Whether workloads take plaintext.
    pub mtls: Mtls,
    /// What becomes of requests that no rule is about.
    pub inbound: DefaultAction,
    /// What becomes of connections out of the mesh.
    pub outbound: DefaultAction,
}

impl Default for Defaults {
    /// Those of hosts.
    fn default() -> Self {
        Self { mtls: Mtls::Strict, inbound: DefaultAction::Allow, outbound: DefaultAction::Allow }
    }
}

/// A service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CatalogService {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The ports that clients dial.
    #[serde(default)]
    pub ports: Vec<CatalogPort>,
    /// Who serves it.
    #[serde(default)]
    pub endpoints: Vec<CatalogEndpoint>,
}

impl CatalogService {
    /// `<name>.<namespace>`.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }

    /// The ports at which its clients ask: those that it lists or, where any port leads to it, as to a Consul service, those on which
    /// its endpoints listen.
    pub fn client_ports(&self) -> BTreeSet<u16> {
        let listed: BTreeSet<u16> =
            self.ports.iter().map(|port| port.port).filter(|port| *port != 0).collect();
        if !listed.is_empty() {
            return listed;
        }
        self.endpoints.iter().flat_map(|endpoint| endpoint.ports.values()).copied().collect()
    }

    /// Whether any port leads to it.
    pub fn takes_any_port(&self) -> bool {
        self.ports.iter().all(|port| port.port == 0)
    }

    /// One of its ports.
    pub fn port(&self, port: u16) -> Option<&CatalogPort> {
        self.ports.iter().find(|known| known.port == port)
    }

    /// One of its ports, by name.
    pub fn port_named(&self, name: &str) -> Option<&CatalogPort> {
        self.ports.iter().find(|known| known.name == name)
    }
}

/// A service's port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CatalogPort {
    /// What clients dial.
    pub port: u16,
    /// Its name; may be empty.
    #[serde(default)]
    pub name: String,
    /// What is spoken there.
    #[serde(default)]
    pub protocol: CatalogProtocol,
}

/// What is spoken at a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CatalogProtocol {
    /// Found out by each connection's first bytes.
    #[default]
    Detect,
    /// HTTP/1.1.
    #[serde(rename = "HTTP1")]
    Http1,
    /// HTTP/2.
    #[serde(rename = "HTTP2")]
    Http2,
    /// gRPC.
    #[serde(rename = "GRPC")]
    Grpc,
    /// Bytes that nobody looks at.
    #[serde(rename = "TCP")]
    Tcp,
}

/// One workload that serves a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CatalogEndpoint {
    /// Unique in the service.
    pub id: String,
    /// Where it is.
    pub address: IpAddr,
    /// Service port -> the workload's own port.
    #[serde(default)]
    pub ports: BTreeMap<u16, u16>,
    /// Its SPIFFE id, if it is in the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Its zone; may be empty.
    #[serde(default)]
    pub zone: String,
    /// How it is.
    #[serde(default)]
    pub health: CatalogHealth,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What its host asks of it, which passes whatever policies say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
}

/// How an endpoint is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CatalogHealth {
    /// Well.
    #[default]
    Healthy,
    /// Takes less.
    Degraded,
    /// Finishes what it has.
    Draining,
    /// Fails its checks.
    Unhealthy,
}

/// One running instance, with all that it serves: endpoints with the same identity and address are the same workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Its SPIFFE id, if it is in the mesh.
    pub identity: Option<String>,
    /// Where it is.
    pub address: IpAddr,
    /// Its namespace: of its identity, else of its first service.
    pub namespace: String,
    /// `<name>.<namespace>` -> service port -> the workload's own port.
    pub services: BTreeMap<String, BTreeMap<u16, u16>>,
    /// Its own ports.
    pub ports: BTreeSet<u16>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What its host asks of it, which passes whatever policies say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
    /// Its zone; may be empty.
    pub zone: String,
}

/// The namespace of a SPIFFE id `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
pub fn identity_namespace(identity: &str) -> Option<&str> {
    identity_parts(identity).map(|(namespace, _)| namespace)
}

/// The namespace and service account of a SPIFFE id.
pub fn identity_parts(identity: &str) -> Option<(&str, &str)> {
    let (_, rest) = identity.strip_prefix("spiffe://")?.split_once("/ns/")?;
    rest.split_once("/sa/")
}

/// `name` and `namespace` of `<name>.<namespace>`. The last dot parts them: a namespace has none.
pub fn split_service(full_name: &str) -> Option<(&str, &str)> {
    full_name.rsplit_once('.').filter(|(name, namespace)| !name.is_empty() && !namespace.is_empty())
}

impl Catalog {
    /// Whether a route with these parents may name a Service as a backend.
    pub fn permits(&self, route: &Key, parents: &[ParentReference], to_namespace: &str, name: &str) -> bool {
        permits(self.grants.as_ref(), route, parents, to_namespace, name)
    }

    /// The service `<name>.<namespace>`.
    pub fn service(&self, full_name: &str) -> Option<&CatalogService> {
        let (name, namespace) = split_service(full_name)?;
        self.service_of(namespace, name)
    }

    /// The service of this name in this namespace.
    pub fn service_of(&self, namespace: &str, name: &str) -> Option<&CatalogService> {
        self.services.iter().find(|service| service.name == name && service.namespace == namespace)
    }

    /// Every workload, in the order of identity and address.
    pub fn workloads(&self) -> Vec<Workload> {
        let mut workloads: BTreeMap<(Option<&str>, IpAddr), Workload> = self
            .workloads
            .iter()
            .map(|known| ((known.identity.as_deref(), known.address), known.clone()))
            .collect();
        for service in &self.services {
            for endpoint in &service.endpoints {
                let identity = endpoint.identity.as_deref();
                let workload = workloads.entry((identity, endpoint.address)).or_insert_with(|| Workload {
                    identity: endpoint.identity.clone(),
                    address: endpoint.address,
                    namespace: identity.and_then(identity_namespace).unwrap_or(&service.namespace).to_owned(),
                    services: BTreeMap::new(),
                    ports: BTreeSet::new(),
                    labels: BTreeMap::new(),
                    probes: endpoint.probes.clone(),
                    zone: endpoint.zone.clone(),
                });
                workload.ports.extend(endpoint.ports.values());
                workload.services.entry(service.full_name()).or_default().extend(&endpoint.ports);
                workload.labels.extend(endpoint.labels.iter().map(|(k, v)| (k.clone(), v.clone())));
            }
        }
        workloads.into_values().collect()
    }

    /// The workloads behind a service.
    pub fn workloads_behind(&self, full_name: &str) -> Vec<Workload> {
        let mut workloads = self.workloads();
        workloads.retain(|workload| workload.services.contains_key(full_name));
        workloads
    }
}

#[cfg(test)]
mod tests;
