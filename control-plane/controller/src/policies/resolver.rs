//! What all policies and the catalog come to, worked out anew whenever one of them changes.
//!
//! The whole is resolved each time, off every lock and off the threads that serve, and published as one immutable
//! [`Resolution`]: an answer to a proxy never mixes two states of the policies. Changes that come while one is being
//! worked out make one more, however many they are. A resolution that fails leaves the last one in force.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use outrigger_api::v1;
use outrigger_certs::SpiffeId;
use outrigger_policy::catalog::{Catalog, Workload};
use outrigger_policy::resolve::{self, External, Resolved, ServicePolicy};
use outrigger_policy::{Key, Policies};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::Picture;
use crate::mesh::Mesh;
use crate::sources::{ServiceKey, Sync};

/// What changes within this is resolved together.
const COALESCE: Duration = Duration::from_millis(10);

/// What policies and catalog came to at one moment.
#[derive(Debug)]
pub(crate) struct Resolution {
    /// The store's revision that it is of.
    pub(crate) revision: u64,
    /// How far the policies can be trusted.
    pub(crate) sync: Sync,
    /// The policies.
    pub(crate) policies: Arc<Policies>,
    /// The catalog, without external services: they are what policies come to.
    pub(crate) catalog: Catalog,
    /// What they come to.
    pub(crate) resolved: Resolved,
    /// The hosts of the external services in force, in order.
    pub(crate) external_hosts: Vec<v1::ExternalHost>,
    services: HashSet<ServiceKey>,
    workloads: HashMap<String, Vec<Workload>>,
}

impl Resolution {
    /// Works it out.
    pub(crate) fn new(picture: &Picture, catalog: Catalog) -> Self {
        let catalog = Catalog { grants: picture.grants.clone(), ..catalog };
        let resolved = resolve::resolve(&picture.policies, &catalog);
        let of_catalog = catalog.services.iter().filter_map(|s| ServiceKey::new(&s.name, &s.namespace).ok());
        let of_policies = resolved.externals().iter().filter_map(|s| ServiceKey::parse(&s.service).ok());
        let services = of_catalog.chain(of_policies).collect();
        let hosts = resolved.externals().iter().flat_map(|external| {
            let service = || external.service.clone();
            external.hosts.iter().map(move |host| v1::ExternalHost { host: host.clone(), service: service() })
        });
        let mut external_hosts: Vec<_> = hosts.collect();
        external_hosts.sort_by(|a, b| a.host.cmp(&b.host));
        let mut workloads: HashMap<String, Vec<Workload>> = HashMap::new();
        for workload in catalog.workloads() {
            if let Some(identity) = workload.identity.clone() {
                workloads.entry(identity).or_default().push(workload);
            }
        }
        Self {
            revision: picture.revision,
            sync: picture.sync.clone(),
            policies: Arc::clone(&picture.policies),
            catalog,
            resolved,
            external_hosts,
            services,
            workloads,
        }
    }

    /// Whether it knows of the service, so that no word about it means that there is none.
    pub(crate) fn knows(&self, service: &ServiceKey) -> bool {
        self.services.contains(service)
    }

    /// Every service that it knows.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.iter()
    }

    /// What is said of a service.
    pub(crate) fn service(&self, service: &ServiceKey) -> ServicePolicy {
        self.resolved.service(service.as_str())
    }

    /// The external services in force.
    pub(crate) fn externals(&self) -> &[External] {
        self.resolved.externals()
    }

    /// What the proxies of a namespace do with connections that leave the mesh.
    pub(crate) fn outbound(&self, namespace: &str) -> v1::mesh::OutboundDefault {
        self.resolved.outbound(namespace).default
    }

    /// Whether the workloads of a namespace take mutual TLS only.
    pub(crate) fn is_strict(&self, namespace: &str) -> bool {
        let anybody = format!("spiffe://{}/ns/{namespace}/sa/anybody", self.catalog.trust_domain);
        self.resolved.inbound(&anybody, &[]).mtls == v1::inbound::Mode::Strict
    }

    /// The own side of the workload of an identity that is seen at `address` and has claimed `claims`, without what became
    /// of its claims.
    ///
    /// `pod` is the workload itself, where its source knows it: then it is meant alone.
    ///
    /// Where none of the identity's workloads is at one of these addresses (it may connect from another one than it
    /// serves at) all of them are meant: with too many policies rather than too few.
    pub(crate) fn inbound(
        &self,
        identity: &SpiffeId,
        address: IpAddr,
        claims: &[(ServiceKey, SocketAddr)],
        pod: Option<Workload>,
    ) -> v1::Inbound {
        let known = self.workloads.get(identity.as_str()).map_or(&[][..], Vec::as_slice);
        let here = |workload: &&Workload| {
            workload.address == address || claims.iter().any(|(_, at)| at.ip() == workload.address)
        };
        let mut own: Vec<Workload> = known.iter().filter(here).cloned().collect();
        if let Some(pod) = pod {
            own.push(pod);
        } else if own.is_empty() {
            own = known.to_vec();
        }
        for (service, at) in claims {
            // A claim can be ahead of its registration, and of this resolution.
            let covers = |workload: &Workload| {
                workload.address == at.ip() && workload.services.contains_key(service.as_str())
            };
            if !own.iter().any(covers) {
                own.push(Workload {
                    identity: Some(identity.as_str().to_owned()),
                    address: at.ip(),
                    namespace: identity.namespace().to_owned(),
                    services: [(service.as_str().to_owned(), [(0, at.port())].into())].into(),
                    ports: [at.port()].into(),
                    labels: BTreeMap::new(),
                    probes: Vec::new(),
                    zone: String::new(),
                });
            }
        }
        let policy = self.resolved.inbound(identity.as_str(), &own);
        v1::Inbound {
            mode: policy.mtls.into(),
            access: policy.access,
            concurrency: policy.concurrency,
            ..v1::Inbound::default()
        }
    }
}

/// Resolves until the store ends; hands each resolution to the mesh, then publishes it. What works on one when the controller
/// stops is one of `tasks`: it holds the mesh, and with it the store, that another controller may open next.
pub(crate) async fn run(
    mut pictures: watch::Receiver<Arc<Picture>>,
    mesh: Arc<Mesh>,
    resolutions: watch::Sender<Option<Arc<Resolution>>>,
    tasks: TaskTracker,
) {
    loop {
        let picture = Arc::clone(&pictures.borrow_and_update());
        let started = Instant::now();
        mesh.metrics().policy_store_synced.set((picture.sync == Sync::Synced).into());
        if picture.sync != Sync::Never {
            let of = Arc::clone(&mesh);
            let worked = tasks.spawn_blocking(move || {
                let resolution = Arc::new(Resolution::new(&picture, of.policy_catalog()));
                of.adopt(&resolution);
                resolution
            });
            match worked.await {
                Ok(resolution) => {
                    let metrics = mesh.metrics();
                    metrics.policies.set(i64::try_from(resolution.policies.len()).unwrap_or(i64::MAX));
                    metrics.policies_revision.set(i64::try_from(resolution.revision).unwrap_or(i64::MAX));
                    resolutions.send_replace(Some(resolution));
                }
                Err(error) => {
                    tracing::error!(%error, "policies could not be resolved; what they last came to stays in force");
                }
            }
        }
        // As long again as it took: a catalog that flaps costs half of one thread at most.
        tokio::time::sleep(COALESCE.max(started.elapsed())).await;
        tokio::select! {
            changed = pictures.changed() => if changed.is_err() { return },
            () = mesh.catalog_changed() => {}
        }
    }
}

/// The objects that say something to a proxy beyond what its resources name: what holds by default.
pub(crate) fn defaults_of(policies: &Policies, mesh_namespace: &str, namespace: &str) -> BTreeSet<Key> {
    let kind = outrigger_policy::Kind::MeshDefaults;
    let keys = [mesh_namespace, namespace].map(|namespace| Key::new(kind, namespace, "default"));
    keys.into_iter().filter(|key| policies.contains_key(key)).collect()
}
