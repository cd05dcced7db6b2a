//! The merged picture of all sources, and its indexes.
//!
//! Each source's newest snapshot is compared with the one before, pointer by pointer, so that the cost of a change is
//! one walk over keys and the work on the services that differ. Two sources that know a service of one name know two
//! services: the first configured has the name, and the other's is a fault of its source. United they would let
//! whoever may register in one of them into a service of the other. What a source says is checked here once more, whatever the source: an address that leads back into
//! the caller's own host (loopback, link-local with its metadata services) would make every client attack itself.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::addresses;
use crate::sources::{
    Fault, Instance, MAX_FAULTS, ServiceKey, ServicePort, Snapshot, SourceService, Sync, Workload,
    kubernetes, policy,
};

/// The suffix of the mesh's own names.
pub(crate) const MESH_SUFFIX: &str = ".mesh";

/// A thing that a resource depends on; a change of it makes the resources of its watchers stale.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Key {
    /// A service's endpoints and ports.
    Service(ServiceKey),
    /// Where the ports of an address lead.
    Ip(IpAddr),
    /// Where a DNS name leads.
    Name(Arc<str>),
    /// The claims of one connection.
    Connection(u64),
    /// The mesh's ranges and defaults.
    Mesh,
    /// The roots.
    TrustBundle,
}

/// A service of the catalog.
#[derive(Debug)]
pub(crate) struct Service {
    /// The name of its source.
    pub(crate) source: Arc<str>,
    /// Checked.
    pub(crate) spec: Arc<SourceService>,
}

/// What one step changed.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    /// Services that came, went or differ.
    pub(crate) services: BTreeSet<ServiceKey>,
    /// All that depends on them.
    pub(crate) keys: HashSet<Key>,
    /// Workloads that a source knows by itself differ.
    pub(crate) workloads: bool,
    /// The mesh's ranges may differ.
    pub(crate) ranges: bool,
    /// Every source is synced now, and was not before: what was kept silent can be answered.
    pub(crate) became_synced: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Catalog {
    allow_loopback: bool,
    sources: Vec<SourceState>,
    services: BTreeMap<ServiceKey, Service>,
    by_endpoint: HashMap<SocketAddr, BTreeSet<ServiceKey>>,
    by_virtual: HashMap<IpAddr, BTreeSet<ServiceKey>>,
    by_name: HashMap<Arc<str>, BTreeSet<ServiceKey>>,
    /// The services with an instance at an address, whatever its port.
    services_with: HashMap<IpAddr, BTreeSet<ServiceKey>>,
    workloads_at: HashMap<IpAddr, BTreeSet<ServiceKey>>,
}

#[derive(Debug)]
struct SourceState {
    name: Arc<str>,
    snapshot: Arc<Snapshot>,
    /// Instances that were refused, by service.
    refused: BTreeMap<ServiceKey, Vec<Fault>>,
}

/// A source, as people see it.
#[derive(Debug)]
pub(crate) struct SourceView {
    /// Its name.
    pub(crate) name: Arc<str>,
    /// Its newest snapshot.
    pub(crate) snapshot: Arc<Snapshot>,
    /// What the catalog refused of it; at most [`MAX_FAULTS`].
    pub(crate) refused: Vec<Fault>,
}

impl Catalog {
    /// An empty catalog of these sources. Without any source it is synced, and holds nothing.
    pub(crate) fn new(sources: impl IntoIterator<Item = Arc<str>>, allow_loopback: bool) -> Self {
        let sources = sources
            .into_iter()
            .map(|name| SourceState { name, snapshot: Arc::default(), refused: BTreeMap::new() })
            .collect();
        Self {
            allow_loopback,
            sources,
            services: BTreeMap::new(),
            by_endpoint: HashMap::new(),
            by_virtual: HashMap::new(),
            by_name: HashMap::new(),
            services_with: HashMap::new(),
            workloads_at: HashMap::new(),
        }
    }

    /// Takes a source's newest snapshot. `index` counts the sources in the order given to [`Catalog::new`].
    pub(crate) fn apply(&mut self, index: usize, snapshot: Arc<Snapshot>) -> Changed {
        let was_synced = self.synced();
        let before = std::mem::replace(&mut self.sources[index].snapshot, snapshot);
        let after = Arc::clone(&self.sources[index].snapshot);
        let mut changed = Changed { became_synced: !was_synced && self.synced(), ..Changed::default() };
        let keys: BTreeSet<&ServiceKey> = before.services.keys().chain(after.services.keys()).collect();
        for key in keys {
            let same = match (before.services.get(key), after.services.get(key)) {
                (Some(old), Some(new)) => Arc::ptr_eq(old, new) || old == new,
                _ => false,
            };
            if !same {
                self.rebuild(key, &mut changed);
            }
        }
        if !Arc::ptr_eq(&before.workloads, &after.workloads) {
            self.apply_workloads(&before, &after, &mut changed);
        }
        changed.ranges =
            before.ranges != after.ranges || (before.sync == Sync::Never) != (after.sync == Sync::Never);
        changed
    }

    fn apply_workloads(&mut self, before: &Snapshot, after: &Snapshot, changed: &mut Changed) {
        // Two sorted walks side by side: there may be tens of thousands, of which one differs.
        let (mut olds, mut news) =
            (before.workloads.values().peekable(), after.workloads.values().peekable());
        loop {
            let order = match (olds.peek(), news.peek()) {
                (Some(old), Some(new)) => old.key.cmp(&new.key),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return,
            };
            let old = if order.is_le() { olds.next() } else { None };
            let new = if order.is_ge() { news.next() } else { None };
            if old == new {
                continue;
            }
            for (workload, present) in
                old.map(|old| (old, false)).into_iter().chain(new.map(|new| (new, true)))
            {
                changed.keys.insert(Key::Service(workload.key.clone()));
                changed.workloads = true;
                for address in &workload.addresses {
                    changed.keys.insert(Key::Ip(*address));
                    set(&mut self.workloads_at, *address, &workload.key, present);
                }
            }
        }
    }

    /// The workload of this name.
    pub(crate) fn workload(&self, key: &ServiceKey) -> Option<&Arc<Workload>> {
        self.sources.iter().find_map(|source| source.snapshot.workloads.get(key))
    }

    /// The workload at this address: while it passes from one to another, the one that is not ending.
    pub(crate) fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        if unfit(address, self.allow_loopback).is_some() {
            return None;
        }
        let here = self.workloads_at.get(&address)?.iter();
        here.filter_map(|key| self.workload(key)).min_by_key(|workload| workload.terminating)
    }

    /// Every workload that a source knows by itself.
    pub(crate) fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.sources.iter().flat_map(|source| source.snapshot.workloads.values())
    }

    /// The services that lead to the workload: their ports with the workload's own.
    pub(crate) fn leading_to(&self, workload: &Workload) -> impl Iterator<Item = (&Service, &Instance)> {
        let of = |address: &IpAddr| self.services_with.get(address).into_iter().flatten();
        let keys: BTreeSet<&ServiceKey> = workload.addresses.iter().flat_map(of).collect();
        let services = keys.into_iter().filter_map(|key| self.services.get(key));
        services.flat_map(|service| {
            let own = |instance: &&Instance| {
                workload.addresses.contains(&instance.address) && instance.identity == workload.identity
            };
            service.spec.instances.iter().filter(own).map(move |instance| (service, instance))
        })
    }

    /// The ranges that sources say belong to the mesh. `None`: a source that has some was never read.
    pub(crate) fn ranges(&self) -> Option<BTreeSet<IpNet>> {
        let unread =
            |source: &SourceState| *source.name == *kubernetes::NAME && source.snapshot.sync == Sync::Never;
        if self.sources.iter().any(unread) {
            return None;
        }
        Some(self.sources.iter().flat_map(|source| source.snapshot.ranges.iter().copied()).collect())
    }

    /// Whether "there is no such thing" can be said.
    pub(crate) fn synced(&self) -> bool {
        self.sources.iter().all(|source| source.snapshot.sync == Sync::Synced)
    }

    /// Whether every source was read at least once.
    pub(crate) fn started(&self) -> bool {
        self.sources.iter().all(|source| source.snapshot.sync != Sync::Never)
    }

    /// Whether all that the cluster says was read at least once; without a cluster there is nothing to read.
    pub(crate) fn knows_its_cluster(&self) -> bool {
        let is_in_cluster = self.sources.iter().any(|source| &*source.name == kubernetes::NAME);
        let is_of_cluster = |source: &&SourceState| [kubernetes::NAME, policy::NAME].contains(&&*source.name);
        let never = |source: &SourceState| source.snapshot.sync == Sync::Never;
        !is_in_cluster || !self.sources.iter().filter(is_of_cluster).any(never)
    }

    /// A service.
    pub(crate) fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// All services.
    pub(crate) fn services(&self) -> impl Iterator<Item = (&ServiceKey, &Service)> {
        self.services.iter()
    }

    /// All sources.
    pub(crate) fn sources(&self) -> impl Iterator<Item = SourceView> {
        self.sources.iter().map(|source| SourceView {
            name: Arc::clone(&source.name),
            snapshot: Arc::clone(&source.snapshot),
            refused: source.refused.values().flatten().take(MAX_FAULTS).cloned().collect(),
        })
    }

    /// The services of which `address` is an endpoint, in the order of their names.
    pub(crate) fn at_endpoint(&self, address: SocketAddr) -> impl Iterator<Item = &ServiceKey> {
        self.by_endpoint.get(&address).into_iter().flatten()
    }

    /// The service to which a source gave this virtual address: of several the first by name.
    pub(crate) fn at_virtual(&self, address: IpAddr) -> Option<&ServiceKey> {
        self.by_virtual.get(&address)?.first()
    }

    /// The service that a DNS name (lower case, no final dot) means: of several the first by name.
    pub(crate) fn named(&self, name: &str) -> Option<&ServiceKey> {
        self.by_name.get(name)?.first()
    }

    /// Addresses that belong to more than one service, which is likely a mistake in a source; at most [`MAX_FAULTS`]. In
    /// Kubernetes it is none: two services may select the same pods.
    pub(crate) fn shared_addresses(&self) -> Vec<(SocketAddr, Vec<ServiceKey>)> {
        let of_others = |key: &ServiceKey| {
            self.services.get(key).is_some_and(|service| *service.source != *kubernetes::NAME)
        };
        let shared = self.by_endpoint.iter();
        let shared = shared
            .filter(|(_, services)| services.len() > 1 && services.iter().any(of_others))
            .take(MAX_FAULTS);
        shared.map(|(address, services)| (*address, services.iter().cloned().collect())).collect()
    }

    fn rebuild(&mut self, key: &ServiceKey, changed: &mut Changed) {
        if let Some(old) = self.services.remove(key) {
            self.index(&old.spec, false, changed);
        }
        let mut found: Option<Service> = None;
        for source in &mut self.sources {
            source.refused.remove(key);
            let Some(service) = source.snapshot.services.get(key) else { continue };
            let mut refused = Vec::new();
            if let Some(reason) = name_taken(key, found.as_ref()) {
                refused.push(Fault { subject: key.to_string(), reason });
            } else {
                let spec = checked(service, self.allow_loopback, &mut refused);
                found = Some(Service { source: Arc::clone(&source.name), spec });
            }
            if !refused.is_empty() {
                tracing::warn!(source = %source.name, service = %key, first = refused[0].reason, refused = refused.len(),
                    "refused of a source");
                source.refused.insert(key.clone(), refused);
            }
        }
        if let Some(service) = found {
            self.index(&service.spec, true, changed);
            self.services.insert(key.clone(), service);
        }
        changed.services.insert(key.clone());
        changed.keys.insert(Key::Service(key.clone()));
    }

    fn index(&mut self, service: &SourceService, present: bool, changed: &mut Changed) {
        for instance in &service.instances {
            changed.keys.insert(Key::Ip(instance.address));
            set(&mut self.services_with, instance.address, &service.key, present);
            for port in instance.ports.values() {
                set(&mut self.by_endpoint, SocketAddr::new(instance.address, *port), &service.key, present);
            }
        }
        for address in &service.virtual_addresses {
            changed.keys.insert(Key::Ip(*address));
            set(&mut self.by_virtual, *address, &service.key, present);
        }
        let own = format!("{}{MESH_SUFFIX}", service.key);
        for name in service.names.iter().chain([&own]) {
            let name: Arc<str> = name.as_str().into();
            changed.keys.insert(Key::Name(Arc::clone(&name)));
            set(&mut self.by_name, name, &service.key, present);
        }
    }
}

impl Service {
    /// The listed port that clients dial, or `None` where the service has none such. A service without listed ports
    /// has every port.
    pub(crate) fn port(&self, port: u16) -> Option<ServicePort> {
        if self.spec.ports.is_empty() {
            return Some(ServicePort { port, name: String::new(), protocol: self.spec.protocol });
        }
        self.spec.ports.iter().find(|listed| listed.port == port).cloned()
    }

    /// The instance that listens on `address`, and the service port that leads there.
    pub(crate) fn instance_at(&self, address: SocketAddr) -> Option<(&Instance, ServicePort)> {
        self.spec.instances.iter().filter(|instance| instance.address == address.ip()).find_map(|instance| {
            let listed =
                self.spec.ports.iter().find(|port| instance.target(port.port) == Some(address.port()));
            let port = match listed {
                Some(port) => port.clone(),
                None if instance.ports.values().any(|target| *target == address.port()) => {
                    ServicePort { port: address.port(), name: String::new(), protocol: self.spec.protocol }
                }
                None => return None,
            };
            Some((instance, port))
        })
    }
}

impl Instance {
    /// The port at this instance for a service port.
    pub(crate) fn target(&self, port: u16) -> Option<u16> {
        if self.ports.is_empty() {
            return Some(port);
        }
        self.ports.get(&port).or_else(|| self.ports.get(&0)).copied()
    }
}

fn set<K: Hash + Eq>(
    index: &mut HashMap<K, BTreeSet<ServiceKey>>,
    at: K,
    service: &ServiceKey,
    present: bool,
) {
    if present {
        index.entry(at).or_default().insert(service.clone());
    } else if let Some(services) = index.get_mut(&at) {
        services.remove(service);
        if services.is_empty() {
            index.remove(&at);
        }
    }
}

/// The service without what must not be dialled.
fn checked(
    service: &Arc<SourceService>,
    allow_loopback: bool,
    refused: &mut Vec<Fault>,
) -> Arc<SourceService> {
    let fault = |instance: &Instance| {
        let reason = if let Some(reason) = unfit(instance.address, allow_loopback) {
            reason
        } else if instance.ports.values().any(|port| *port == 0) {
            "it has no port"
        } else {
            return None;
        };
        Some(Fault {
            subject: format!(
                "{} endpoint {} ({})",
                service.key,
                instance.id.escape_debug(),
                instance.address
            ),
            reason: reason.to_owned(),
        })
    };
    let virtual_fits = |address: &IpAddr| unfit(*address, false).is_none();
    let faults: Vec<Fault> = service.instances.iter().filter_map(fault).take(MAX_FAULTS).collect();
    if faults.is_empty() && service.virtual_addresses.iter().all(virtual_fits) {
        return Arc::clone(service);
    }
    *refused = faults;
    let mut fit = SourceService::clone(service);
    fit.instances.retain(|instance| fault(instance).is_none());
    fit.virtual_addresses.retain(virtual_fits);
    Arc::new(fit)
}

/// Why no endpoint may have this address.
fn unfit(address: IpAddr, allow_loopback: bool) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() || address.is_multicast() {
        Some("not an address of one host")
    } else if link_local {
        Some("link-local addresses (among them metadata services) cannot be endpoints")
    } else if address.to_canonical().is_loopback() && !allow_loopback {
        Some("loopback addresses cannot be endpoints (allow_loopback_endpoints: true, for tests on one host)")
    } else if address.to_canonical() != address {
        Some("an IPv4 address written as IPv6")
    } else if addresses::is_virtual(address) {
        Some("inside the mesh's own virtual range")
    } else {
        None
    }
}

/// Why a source cannot have a service of this name.
fn name_taken(key: &ServiceKey, first: Option<&Service>) -> Option<String> {
    if key.is_workload() {
        return Some("such a name is that of a pod at its own address; rename the service".to_owned());
    }
    let first = first?;
    Some(format!(
        "source `{}` has a service of this name and comes first; rename one of them, or give the services of Consul another \
         namespace (consul.default_namespace)",
        first.source
    ))
}

#[cfg(test)]
mod tests;
