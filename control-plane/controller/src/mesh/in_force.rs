//! The policies in force, as proxies are told them.
//!
//! A new [`Resolution`] is compared with the one before off the lock, and only those are told for whom something differs:
//! the services of which something else is said, and the connections whose workload's own side has changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use outrigger_api::v1;
use outrigger_policy::Key as PolicyKey;
use outrigger_policy::catalog::{
    Catalog, CatalogEndpoint, CatalogHealth, CatalogPort, CatalogProtocol, CatalogService,
};

use ipnet::IpNet;

use super::own::Own;
use super::{Mesh, Settings, State, Viewer};
use crate::addresses::VIRTUAL_RANGES;
use crate::catalog::{Key, Service};
use crate::compile::{Compiled, Kind};
use crate::metrics::Metrics;
use crate::policies::resolver::{Resolution, defaults_of};
use crate::sources::{ServiceKey, policy};

/// Namespaces whose `Mesh` is kept: one takes 300 KiB at most.
const MAX_MESHES: usize = 64;

/// What policies came to last, and who was told.
#[derive(Debug, Default)]
pub(super) struct InForce {
    /// `None`: the policies were not read yet.
    resolution: Option<Arc<Resolution>>,
    /// The connections with a discovery stream.
    viewers: HashMap<u64, Watching>,
    /// The mesh's own resource by namespace, of this resolution: it is long where there are many external hosts, and all
    /// proxies ask for it at once.
    mesh: HashMap<String, Arc<Compiled>>,
}

#[derive(Debug)]
struct Watching {
    viewer: Viewer,
    /// Open streams of the connection.
    streams: usize,
    /// Its own side by this resolution and its present claims; `None`: not asked for yet.
    inbound: Option<v1::Inbound>,
}

/// What a connection is told of itself, and what of the workload that follows from.
struct OwnSide {
    own: Own,
    inbound: v1::Inbound,
}

/// Accepted claims.
pub(super) type Claimed = Vec<(ServiceKey, SocketAddr)>;

impl InForce {
    /// What is in force.
    pub(super) fn resolution(&self) -> Option<&Arc<Resolution>> {
        self.resolution.as_ref()
    }

    /// The mesh's own resource for proxies of a namespace.
    pub(super) fn mesh(
        &mut self,
        namespace: &str,
        trust_domain: &str,
        settings: &Settings,
        ranges: &BTreeSet<IpNet>,
    ) -> Option<Arc<Compiled>> {
        if let Some(compiled) = self.mesh.get(namespace) {
            return Some(Arc::clone(compiled));
        }
        let resolution = self.resolution.as_ref()?;
        let mesh = v1::Mesh {
            trust_domain: trust_domain.to_owned(),
            cidrs: settings.cidrs.iter().chain(ranges).map(IpNet::to_string).collect(),
            virtual_cidrs: VIRTUAL_RANGES.map(str::to_owned).to_vec(),
            outbound: resolution.outbound(namespace).into(),
            external_hosts: resolution.external_hosts.clone(),
        };
        let origins = defaults_of(&resolution.policies, &settings.mesh_namespace, namespace);
        let compiled = Arc::new(Compiled::new(Kind::Mesh, &mesh).by(origins));
        if self.mesh.len() >= MAX_MESHES {
            self.mesh.clear();
        }
        self.mesh.insert(namespace.to_owned(), Arc::clone(&compiled));
        Some(compiled)
    }

    /// What it says of the ranges is out of date.
    pub(super) fn forget_mesh(&mut self) {
        self.mesh.clear();
    }

    /// Those who watch.
    pub(super) fn viewers(&self) -> impl Iterator<Item = &Viewer> {
        self.viewers.values().map(|watching| &watching.viewer)
    }

    fn adopt(&mut self, resolution: &Arc<Resolution>) {
        self.resolution = Some(Arc::clone(resolution));
        self.mesh.clear();
    }

    /// Whether what can be said of a service is whole. `present`: the catalog has it.
    pub(super) fn knows_or_absent(&self, service: &ServiceKey, present: bool) -> bool {
        self.resolution.as_ref().is_some_and(|resolution| !present || resolution.knows(service))
    }

    /// The `MeshDefaults` that hold for workloads of a namespace.
    pub(super) fn defaults_of(&self, namespace: &str, mesh_namespace: &str) -> BTreeSet<PolicyKey> {
        let policies = self.resolution.as_ref().map(|resolution| &resolution.policies);
        policies.map(|policies| defaults_of(policies, mesh_namespace, namespace)).unwrap_or_default()
    }

    /// The claims of a connection have changed: its own side is worked out anew.
    pub(super) fn forget_inbound(&mut self, connection: u64) {
        if let Some(watching) = self.viewers.get_mut(&connection) {
            watching.inbound = None;
        }
    }
}

impl State {
    /// The viewer's own side without its claims, as the policies in force say.
    pub(super) fn inbound(&mut self, viewer: &Viewer) -> Option<v1::Inbound> {
        let resolution = Arc::clone(self.in_force.resolution.as_ref()?);
        let known =
            self.in_force.viewers.get(&viewer.connection).and_then(|watching| watching.inbound.as_ref());
        if let Some(inbound) = known {
            return Some(inbound.clone());
        }
        let inbound = inbound(&resolution, viewer, &self.own(viewer));
        if let Some(watching) = self.in_force.viewers.get_mut(&viewer.connection) {
            watching.inbound = Some(inbound.clone());
        }
        Some(inbound)
    }

    /// The accepted claims of a connection.
    pub(super) fn claimed(&self, connection: u64) -> Claimed {
        let outcomes = self.announced.get(&connection).into_iter().flatten();
        outcomes.filter_map(|outcome| outcome.verdict.clone().ok()).collect()
    }
}

impl Mesh {
    /// A discovery stream of the viewer has opened.
    pub(crate) fn entered(&self, viewer: &Viewer) {
        let mut state = self.state();
        let new = || Watching { viewer: viewer.clone(), streams: 0, inbound: None };
        state.in_force.viewers.entry(viewer.connection).or_insert_with(new).streams += 1;
    }

    /// A discovery stream of the viewer has ended.
    pub(crate) fn left(&self, viewer: &Viewer) {
        let viewers = &mut self.state().in_force.viewers;
        if let Some(watching) = viewers.get_mut(&viewer.connection) {
            watching.streams -= 1;
            if watching.streams == 0 {
                viewers.remove(&viewer.connection);
            }
        }
    }

    /// Waits until something has changed that policies are about. Safe to cancel.
    pub(crate) async fn catalog_changed(&self) {
        self.catalog_changed.notified().await;
    }

    /// What is counted.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The catalog as policies see it. External services are not in it: they are policies themselves.
    pub(crate) fn policy_catalog(&self) -> Catalog {
        let keys: Vec<ServiceKey> = self.state().catalog.services().map(|(key, _)| key.clone()).collect();
        // The lock is taken for each alone: proxies do not wait until all is copied.
        let view = |key| {
            let state = self.state();
            let service = state.catalog.service(key).filter(|service| *service.source != *policy::NAME)?;
            Some(state.view(service))
        };
        let workloads = self.workloads_without_services();
        Catalog {
            trust_domain: self.trust_domain.clone(),
            mesh_namespace: self.settings.mesh_namespace.clone(),
            defaults: self.settings.defaults.clone(),
            services: keys.iter().filter_map(view).collect(),
            workloads,
            grants: None,
        }
    }

    /// Puts a resolution in force, and tells whom it concerns.
    pub(crate) fn adopt(&self, new: &Arc<Resolution>) {
        let own_sides = self.own_sides(new);
        self.put_in_force(new, own_sides);
    }

    /// The own side of each connection with a discovery stream, as it will be.
    fn own_sides(&self, new: &Resolution) -> HashMap<u64, OwnSide> {
        let viewers: Vec<_> = {
            let state = self.state();
            let viewers = state.in_force.viewers.values();
            viewers.map(|watching| (watching.viewer.clone(), state.own(&watching.viewer))).collect()
        };
        let side = |(viewer, own): (Viewer, Own)| {
            let inbound = inbound(new, &viewer, &own);
            (viewer.connection, OwnSide { own, inbound })
        };
        viewers.into_iter().map(side).collect()
    }

    fn put_in_force(&self, new: &Arc<Resolution>, mut own_sides: HashMap<u64, OwnSide>) {
        let old = self.state().in_force.resolution.clone();
        let Some(old) = old else {
            let mut state = self.state();
            state.in_force.adopt(new);
            drop(state);
            self.fanout.touch_all();
            return;
        };
        let services = changed_services(&old, new);
        let mut keys: HashSet<Key> = services.iter().cloned().map(Key::Service).collect();
        if !Arc::ptr_eq(&old.policies, &new.policies) || old.external_hosts != new.external_hosts {
            // Who already has what it says is not sent it again.
            keys.insert(Key::Mesh);
        }
        {
            let mut state = self.state();
            for service in &services {
                state.compiled.remove(service);
            }
            let viewers: Vec<Viewer> = state.in_force.viewers().cloned().collect();
            for viewer in viewers {
                // Who came meanwhile, or whose own has changed meanwhile, may have been told what was in force until now: it is
                // worked out anew when it is asked for.
                let own = state.own(&viewer);
                let side = own_sides.remove(&viewer.connection).filter(|side| side.own == own);
                let inbound = side.map(|side| side.inbound);
                if let Some(watching) = state.in_force.viewers.get_mut(&viewer.connection) {
                    if inbound.is_none() || watching.inbound != inbound {
                        keys.insert(Key::Connection(viewer.connection));
                    }
                    watching.inbound = inbound;
                }
            }
            state.in_force.adopt(new);
        }
        self.fanout.touch(&keys);
    }
}

impl State {
    fn view(&self, service: &Service) -> CatalogService {
        let spec = &service.spec;
        let mut ports: Vec<CatalogPort> = spec
            .ports
            .iter()
            .map(|port| CatalogPort {
                port: port.port,
                name: port.name.clone(),
                protocol: protocol(port.protocol),
            })
            .collect();
        if ports.is_empty() {
            ports.push(CatalogPort { port: 0, name: String::new(), protocol: protocol(spec.protocol) });
        }
        let endpoints = spec.instances.iter().map(|instance| {
            let claim = self.claim(&spec.key, instance);
            CatalogEndpoint {
                id: instance.id.clone(),
                address: instance.address,
                ports: instance.ports.clone(),
                identity: instance.identity.clone().or_else(|| claim.map(|claim| claim.identity.to_string())),
                zone: instance.zone.clone(),
                health: health(instance.health),
                labels: BTreeMap::clone(&instance.labels),
                probes: (self.catalog.workload_at(instance.address))
                    .filter(|workload| workload.identity == instance.identity)
                    .map_or_else(Vec::new, |workload| workload.probes.clone()),
            }
        });
        CatalogService {
            name: spec.key.name().to_owned(),
            namespace: spec.key.namespace().to_owned(),
            ports,
            endpoints: endpoints.collect(),
        }
    }
}

/// The services of which something else is said.
fn changed_services(old: &Resolution, new: &Resolution) -> HashSet<ServiceKey> {
    let mut strictness: HashMap<String, bool> = HashMap::new();
    let mut strictness_changed = |namespace: &str| {
        if let Some(changed) = strictness.get(namespace) {
            return *changed;
        }
        let changed = old.is_strict(namespace) != new.is_strict(namespace);
        strictness.insert(namespace.to_owned(), changed);
        changed
    };
    let all: HashSet<&ServiceKey> = old.services().chain(new.services()).collect();
    let differs = |key: &&ServiceKey| {
        old.knows(key) != new.knows(key)
            || strictness_changed(key.namespace())
            || old.service(key) != new.service(key)
    };
    all.into_iter().filter(differs).cloned().collect()
}

fn inbound(resolution: &Resolution, viewer: &Viewer, own: &Own) -> v1::Inbound {
    let pod = own.workload.as_deref().map(super::own::as_policies_see);
    resolution.inbound(&viewer.identity, viewer.address, &own.claimed, pod)
}

fn protocol(protocol: v1::Protocol) -> CatalogProtocol {
    match protocol {
        v1::Protocol::Unspecified => CatalogProtocol::Detect,
        v1::Protocol::Http1 => CatalogProtocol::Http1,
        v1::Protocol::Http2 => CatalogProtocol::Http2,
        v1::Protocol::Grpc => CatalogProtocol::Grpc,
        v1::Protocol::Tcp => CatalogProtocol::Tcp,
    }
}

fn health(health: v1::Health) -> CatalogHealth {
    match health {
        v1::Health::Unspecified | v1::Health::Healthy => CatalogHealth::Healthy,
        v1::Health::Degraded => CatalogHealth::Degraded,
        v1::Health::Draining => CatalogHealth::Draining,
        v1::Health::Unhealthy | v1::Health::Unready => CatalogHealth::Unhealthy,
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use outrigger_certs::CertificateAuthority;
    use outrigger_policy::{Object, Stored};
    use serde_json::json;

    use super::*;
    use crate::mesh::Answer;
    use crate::policies::Picture;
    use crate::store::Store;
    use crate::tokens::Tokens;

    fn mesh(folder: &std::path::Path) -> Mesh {
        let ca =
            CertificateAuthority::open_or_create(&folder.join("ca"), &"t.local".parse().unwrap()).unwrap();
        let store = Arc::new(Store::open(&folder.join("store")).unwrap());
        let controller = "spiffe://t.local/ns/outrigger-system/sa/outrigger-controller".parse().unwrap();
        let life = std::time::Duration::from_hours(1);
        let tokens = Arc::new(Tokens::load(Arc::clone(&store), controller, life).unwrap());
        let settings = Settings {
            cidrs: Vec::new(),
            mesh_namespace: "outrigger-system".to_owned(),
            defaults: outrigger_policy::catalog::Defaults::default(),
            allow_loopback: false,
        };
        Mesh::load(settings, [], ca.bundle(), store, tokens, Arc::new(Metrics::default())).unwrap()
    }

    /// `inbound`: what the `MeshDefaults` of the namespace say.
    fn resolution(mesh: &Mesh, inbound: &str) -> Arc<Resolution> {
        let object: Object = serde_json::from_value(json!({
            "apiVersion": "outrigger.dev/v1alpha1",
            "kind": "MeshDefaults",
            "metadata": {"name": "default", "namespace": "shop"},
            "spec": {"inbound": inbound},
        }))
        .unwrap();
        let stored = Stored { object, revision: 1, created: 0, updated: 0, author: String::new() };
        let policies = [(stored.object.key(), Arc::new(stored))].into();
        let picture = Picture { policies: Arc::new(policies), ..Picture::default() };
        Arc::new(Resolution::new(&picture, mesh.policy_catalog()))
    }

    fn viewer(connection: u64) -> Viewer {
        let identity = "spiffe://t.local/ns/shop/sa/orders".parse().unwrap();
        Viewer { identity, address: "10.0.0.7".parse().unwrap(), connection }
    }

    #[tokio::test]
    async fn who_connects_while_policies_are_put_in_force_gets_the_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let mesh = mesh(folder.path());
        let told = |viewer: &Viewer| {
            let name = viewer.identity.as_str();
            match mesh.answer(Kind::Inbound, name, viewer, SystemTime::now()) {
                Answer::Found(compiled) => compiled.version.clone(),
                other => panic!("{other:?}"),
            }
        };
        let (early, late) = (viewer(1), viewer(2));
        mesh.entered(&early);
        mesh.adopt(&resolution(&mesh, "Allow"));
        let allowing = told(&early);
        let denying = resolution(&mesh, "Deny");
        let own_sides = mesh.own_sides(&denying);
        // This one comes when the others have been worked out, and is told what is still in force.
        mesh.entered(&late);
        assert_eq!(told(&late), allowing);
        mesh.put_in_force(&denying, own_sides);
        assert_ne!(told(&early), allowing);
        assert_eq!(told(&late), told(&early));
    }
}
