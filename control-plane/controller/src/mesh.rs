//! What the controller knows right now: catalog, claims, virtual addresses and the mesh's own settings, behind one lock.
//!
//! Everything that a stream asks and everything that changes goes through here. Critical sections are short (hash
//! look-ups, one compilation of a service after it changed), nothing in them waits, and whoever depends on a change is
//! told through [`Fanout`] after the lock is released.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use ipnet::IpNet;
use outrigger_api::{MESH_NAME, TRUST_BUNDLE_NAME, v1};
use outrigger_certs::{SpiffeId, TrustBundle};
use outrigger_policy::catalog::Defaults;
use tokio::sync::Notify;

use crate::addresses::Addresses;
use crate::catalog::{Catalog, Changed, Key, MESH_SUFFIX, Service, SourceView};
use crate::claims::{Claim, Claims, MAX_CLAIMS, StreamId};
use crate::compile::{self, Compiled, Kind, origins};
use crate::metrics::Metrics;
use crate::push::Fanout;
use crate::sources::{Instance, Reach, ServiceKey, Snapshot, kubernetes};
use crate::store::{Change, Store, StoreError, Table};
use crate::tokens::{NotGranted, Tokens};

mod in_force;
mod own;

use in_force::InForce;
#[cfg(test)]
pub(crate) use own::as_policies_see;

/// The mesh's own settings.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Addresses that belong to the mesh.
    pub(crate) cidrs: Vec<ipnet::IpNet>,
    /// The mesh's own namespace.
    pub(crate) mesh_namespace: String,
    /// What holds until a policy says otherwise.
    pub(crate) defaults: Defaults,
    /// Whether endpoints may be on loopback.
    pub(crate) allow_loopback: bool,
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Viewer {
    /// Proved by its leaf.
    pub(crate) identity: SpiffeId,
    /// Where its connection comes from.
    pub(crate) address: IpAddr,
    /// Its connection, unique in the life of the controller.
    pub(crate) connection: u64,
}

/// The answer to one resource name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// This.
    Found(Arc<Compiled>),
    /// Every source is synced, and there is no such thing.
    Absent,
    /// Not known yet. Nothing is said.
    Silent,
}

/// What became of one claim.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// For the sidecar.
    pub(crate) status: v1::ClaimStatus,
    /// What was accepted, or why it was refused, as a metric's label.
    pub(crate) verdict: Result<(ServiceKey, SocketAddr), &'static str>,
}

/// Said to an accepted claim that is ahead of its registration.
const NOT_THERE_YET: &str = "accepted; no source has this endpoint yet";

/// See the module.
#[derive(Debug)]
pub(crate) struct Mesh {
    settings: Settings,
    store: Arc<Store>,
    tokens: Arc<Tokens>,
    metrics: Arc<Metrics>,
    fanout: Fanout,
    /// Something that policies are about has changed.
    catalog_changed: Notify,
    trust_domain: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    catalog: Catalog,
    claims: Claims,
    addresses: Addresses,
    bundle: Arc<Compiled>,
    in_force: InForce,
    /// Compiled services, until they change. Only of services that somebody asked for.
    compiled: HashMap<ServiceKey, Arc<Compiled>>,
    /// What was last said to the announcing stream of a connection.
    announced: HashMap<u64, Vec<Outcome>>,
}

impl Mesh {
    /// Loads claims and addresses; the catalog starts empty and unsynced.
    pub(crate) fn load(
        settings: Settings,
        sources: impl IntoIterator<Item = Arc<str>>,
        bundle: &TrustBundle,
        store: Arc<Store>,
        tokens: Arc<Tokens>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let state = State {
            catalog: Catalog::new(sources, settings.allow_loopback),
            claims: Claims::load(store.load(Table::Claims)?, &store.load(Table::Meshed)?),
            addresses: Addresses::load(store.load(Table::Addresses)?),
            bundle: Arc::new(Compiled::new(Kind::TrustBundle, &bundle_message(bundle))),
            in_force: InForce::default(),
            compiled: HashMap::new(),
            announced: HashMap::new(),
        };
        Ok(Self {
            settings,
            store,
            tokens,
            metrics,
            fanout: Fanout::default(),
            catalog_changed: Notify::new(),
            trust_domain: bundle.trust_domain().to_string(),
            state: Mutex::new(state),
        })
    }

    /// Who must be told of changes.
    pub(crate) fn fanout(&self) -> &Fanout {
        &self.fanout
    }

    /// Takes a source's newest snapshot and tells whom it concerns.
    pub(crate) fn apply(&self, source: usize, snapshot: Arc<Snapshot>, now: SystemTime) {
        let (changed, synced) = {
            let mut state = self.state();
            let mut changed = state.catalog.apply(source, snapshot);
            state.settle(&mut changed, now, &self.store);
            if changed.ranges {
                state.in_force.forget_mesh();
                changed.keys.insert(Key::Mesh);
            }
            let services = state.catalog.services().count();
            self.metrics.services.set(i64::try_from(services).unwrap_or(i64::MAX));
            (changed, state.catalog.synced())
        };
        self.metrics.synced.set(synced.into());
        if !changed.services.is_empty() || changed.workloads {
            self.catalog_changed.notify_one();
        }
        if changed.became_synced {
            tracing::info!("every source is synced");
            self.fanout.touch_all();
        }
        self.fanout.touch(&changed.keys);
    }

    /// The resource of a name, as this viewer may see it. Asking for a service by name gives it its virtual addresses.
    pub(crate) fn answer(&self, kind: Kind, name: &str, viewer: &Viewer, now: SystemTime) -> Answer {
        let mut state = self.state();
        let found = match kind {
            Kind::Mesh if name != MESH_NAME => None,
            Kind::Mesh => {
                // Never with fewer ranges than there are: what is inside would pass as outside.
                let Some(ranges) = state.catalog.ranges() else { return Answer::Silent };
                let namespace = viewer.identity.namespace();
                let mesh = state.in_force.mesh(namespace, &self.trust_domain, &self.settings, &ranges);
                return mesh.map_or(Answer::Silent, Answer::Found);
            }
            Kind::TrustBundle => (name == TRUST_BUNDLE_NAME).then(|| Arc::clone(&state.bundle)),
            Kind::Inbound => {
                if name != viewer.identity.as_str() {
                    return Answer::Absent;
                }
                // Never with less policy than there is: until the policies are known a proxy keeps what it has.
                let Some(mut inbound) = state.inbound(viewer) else { return Answer::Silent };
                inbound.claims = state.announced(viewer.connection);
                state.tell_own(viewer, &mut inbound);
                let mut origins = origins::of_inbound(&inbound);
                origins.extend(
                    state.in_force.defaults_of(viewer.identity.namespace(), &self.settings.mesh_namespace),
                );
                Some(Arc::new(Compiled::new(kind, &inbound).by(origins)))
            }
            Kind::Service => {
                let Ok(key) = ServiceKey::parse(name) else { return state.nothing(kind) };
                if key.is_workload() {
                    if state.in_force.resolution().is_none() {
                        return Answer::Silent;
                    }
                    return state.workload(&key).map_or_else(|| state.nothing(kind), Answer::Found);
                }
                // The same: a service is told with its policies.
                if !state.in_force.knows_or_absent(&key, state.catalog.service(&key).is_some()) {
                    return Answer::Silent;
                }
                state.service(&key, viewer)
            }
            Kind::Destination => match name.parse::<SocketAddr>() {
                Ok(address) => state.dialled(address),
                Err(_) => state.named(name, now, &self.store),
            },
        };
        found.map_or_else(|| state.nothing(kind), Answer::Found)
    }

    /// Judges an announcement, which replaces what the stream announced before.
    pub(crate) fn announce(
        &self,
        stream: StreamId,
        viewer: &Viewer,
        announcement: &v1::Announcement,
        now: SystemTime,
    ) -> Vec<Outcome> {
        let mut keys = std::collections::HashSet::from([Key::Connection(viewer.connection)]);
        let outcomes = {
            let mut state = self.state();
            let mut changes = Vec::new();
            let mut outcomes = Vec::new();
            for (index, claim) in announcement.claims.iter().enumerate() {
                let judged = if index < MAX_CLAIMS {
                    self.judge(&mut state, stream, viewer, claim, announcement.draining, now, &mut changes)
                } else {
                    Err(("too_many", format!("an announcement holds at most {MAX_CLAIMS} claims")))
                };
                outcomes.push(match judged {
                    Ok((service, at, changed)) => {
                        if changed {
                            tracing::info!(target: "audit", identity = %viewer.identity, peer = %viewer.address, %service, %at,
                                draining = announcement.draining, "claim accepted");
                            state.compiled.remove(&service);
                            keys.insert(Key::Service(service.clone()));
                            keys.insert(Key::Ip(at.ip()));
                        }
                        state.accepted(claim, service, at)
                    }
                    Err((reason, message)) => {
                        let status = status(claim, false, message, v1::Protocol::Unspecified);
                        Outcome { status, verdict: Err(reason) }
                    }
                });
            }
            let keep = outcomes.iter().filter_map(|outcome| outcome.verdict.clone().ok()).collect();
            let gone = state.claims.release(stream, &keep);
            state.prune(gone.into_iter().map(|(service, _)| service), &mut changes);
            if !changes.is_empty() {
                self.catalog_changed.notify_one();
            }
            state.announced.insert(viewer.connection, outcomes.clone());
            state.in_force.forget_inbound(viewer.connection);
            submit(&self.store, changes);
            outcomes
        };
        self.fanout.touch(&keys);
        outcomes
    }

    /// The announcing stream ended: its claims stay with their instances, as they are.
    pub(crate) fn announcer_left(&self, stream: StreamId, viewer: &Viewer) {
        {
            let mut state = self.state();
            let gone = state.claims.release(stream, &BTreeSet::new());
            let mut changes = Vec::new();
            state.prune(gone.into_iter().map(|(service, _)| service), &mut changes);
            state.announced.remove(&viewer.connection);
            state.in_force.forget_inbound(viewer.connection);
            if !changes.is_empty() {
                self.catalog_changed.notify_one();
            }
            submit(&self.store, changes);
        }
        self.fanout.touch(&[Key::Connection(viewer.connection)].into());
    }

    /// What a connection has announced.
    pub(crate) fn announced(&self, connection: u64) -> Vec<v1::ClaimStatus> {
        self.state().announced(connection)
    }

    /// Whether every source was read at least once.
    pub(crate) fn started(&self) -> bool {
        self.state().catalog.started()
    }

    /// Whether all that the cluster says was read at least once.
    pub(crate) fn knows_its_cluster(&self) -> bool {
        self.state().catalog.knows_its_cluster()
    }

    /// What is inside of the mesh, as proxies are told it. `None`: a cluster knows more, and was never read.
    pub(crate) fn ranges(&self) -> Option<BTreeSet<IpNet>> {
        let of_sources = self.state().catalog.ranges()?;
        Some(self.settings.cidrs.iter().copied().chain(of_sources).collect())
    }

    /// Every service as it goes to proxies.
    pub(crate) fn services(&self) -> Vec<v1::Service> {
        let keys: Vec<ServiceKey> = self.state().catalog.services().map(|(key, _)| key.clone()).collect();
        // The lock is taken for each alone: proxies do not wait until all is written out.
        let message = |key| {
            let state = self.state();
            state.catalog.service(key).map(|service| state.message(service))
        };
        keys.iter().filter_map(message).collect()
    }

    /// Every source, and the addresses that two services share.
    pub(crate) fn sources(&self) -> (Vec<SourceView>, Vec<(SocketAddr, Vec<ServiceKey>)>) {
        let state = self.state();
        (state.catalog.sources().collect(), state.catalog.shared_addresses())
    }

    #[expect(clippy::too_many_arguments, reason = "one caller; a struct would only rename them")]
    fn judge(
        &self,
        state: &mut State,
        stream: StreamId,
        viewer: &Viewer,
        claim: &v1::Claim,
        draining: bool,
        now: SystemTime,
        changes: &mut Vec<Change>,
    ) -> Result<(ServiceKey, SocketAddr, bool), (&'static str, String)> {
        let service = ServiceKey::parse(&claim.service).map_err(|error| ("malformed", error.to_string()))?;
        let port = u16::try_from(claim.port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| ("malformed", "the port must be 1 to 65535".to_owned()))?;
        let address: IpAddr = if claim.address.is_empty() {
            viewer.address
        } else {
            claim.address.parse().map_err(|_| ("malformed", "the address is not an IP address".to_owned()))?
        };
        let at = SocketAddr::new(address.to_canonical(), port);
        let vouched = state
            .catalog
            .service(&service)
            .and_then(|found| found.instance_at(at))
            .and_then(|(instance, _)| instance.identity.clone());
        match vouched {
            // The source itself says that this workload is the endpoint: no token is needed.
            Some(identity) if identity == viewer.identity.as_str() => {}
            Some(_) => {
                let text = "the source of this service names another identity for this endpoint";
                return Err(("other_identity", text.to_owned()));
            }
            None => self.tokens.grants(&viewer.identity, &service, at.ip(), viewer.address).map_err(|reason| {
                match reason {
                    NotGranted::NoToken => (
                        "no_token",
                        "no join token that this identity has used is alive; join with a token that names the service"
                            .to_owned(),
                    ),
                    NotGranted::Service => (
                        "service",
                        format!("the join token does not name `{service}`; make one with `--service {service}`"),
                    ),
                    NotGranted::Address => (
                        "address",
                        format!(
                            "the join token does not cover {}; make one with a `--cidr` that holds it",
                            at.ip()
                        ),
                    ),
                }
            })?,
        }
        match state.claims.accept(stream, &viewer.identity, (&service, at), draining, now, changes) {
            Ok(changed) => Ok((service, at, changed)),
            Err(held) => Err((
                "held",
                format!(
                    "{} claims this endpoint on an open stream; it is judged again when that ends",
                    held.by
                ),
            )),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic in here would leave indexes that disagree at worst; serving the last good picture is better than none.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// After the catalog changed: forgets compiled services, and, where absence is certain, claims and addresses of
    /// what is gone.
    fn settle(&mut self, changed: &mut Changed, now: SystemTime, store: &Store) {
        if !changed.services.is_empty() {
            changed.keys.extend(self.announcers(&changed.services));
        }
        let viewers = self.viewers_at(&changed.keys);
        changed.keys.extend(viewers);
        for service in &changed.services {
            self.compiled.remove(service);
            changed.keys.extend(self.addresses.of(service).into_iter().flatten().map(Key::Ip));
        }
        if !self.catalog.synced() {
            return;
        }
        let mut services = changed.services.clone();
        if changed.became_synced {
            services.extend(self.claims.services().cloned());
            services.extend(self.addresses.services().cloned());
        }
        let mut changes = Vec::new();
        for service in &services {
            let present = self.catalog.service(service).is_some();
            self.addresses.present(service, present, now, &mut changes);
        }
        self.prune(services, &mut changes);
        submit(store, changes);
    }

    fn prune(&mut self, services: impl IntoIterator<Item = ServiceKey>, changes: &mut Vec<Change>) {
        if !self.catalog.synced() {
            return;
        }
        for service in services {
            let found = self.catalog.service(&service);
            let present = |at| found.is_some_and(|found| found.instance_at(at).is_some());
            self.claims.prune(&service, found.is_some().then_some(&present), changes);
        }
    }

    /// The answer where nothing was found.
    fn nothing(&self, kind: Kind) -> Answer {
        if self.catalog.synced() || !matches!(kind, Kind::Service | Kind::Destination) {
            Answer::Absent
        } else {
            Answer::Silent
        }
    }

    fn service(&mut self, key: &ServiceKey, viewer: &Viewer) -> Option<Arc<Compiled>> {
        if let Some(compiled) = self.compiled.get(key) {
            return Some(Arc::clone(compiled));
        }
        let service = self.catalog.service(key)?;
        let mut message = self.message(service);
        let resolution = self.in_force.resolution()?;
        let policy = resolution.service(key);
        (message.routes, message.traffic) = (policy.routes, policy.traffic);
        if resolution.is_strict(key.namespace()) {
            compile::drop_strangers(&mut message, self.claims.is_meshed(key));
        }
        match service.spec.reach {
            Reach::All => {}
            Reach::OwnZone => compile::prefer_own_zone(&mut message),
            Reach::OwnNode => {
                // To each viewer something else, so not kept. Who is on no node of the cluster is led to all.
                let node = self.catalog.workload_at(viewer.address).map(|pod| &*pod.node);
                compile::keep_to_node(&mut message, &service.spec.instances, node.unwrap_or_default());
                return Some(Arc::new(compile::service(message)));
            }
        }
        let compiled = Arc::new(compile::service(message));
        self.compiled.insert(key.clone(), Arc::clone(&compiled));
        Some(compiled)
    }

    /// A workload that is dialled at its own address.
    fn workload(&self, key: &ServiceKey) -> Option<Arc<Compiled>> {
        let mut message = compile::workload(self.catalog.workload(key)?, kubernetes::NAME);
        message.traffic = self.in_force.resolution()?.service(key).traffic;
        Some(Arc::new(compile::service(message)))
    }

    fn message(&self, service: &Service) -> v1::Service {
        compile::message(service, |instance| self.claim(&service.spec.key, instance))
    }

    fn claim(&self, service: &ServiceKey, instance: &Instance) -> Option<&Claim> {
        let at = |port: &u16| SocketAddr::new(instance.address, *port);
        instance.ports.values().find_map(|port| self.claims.get(service, at(port)))
    }

    fn dialled(&self, address: SocketAddr) -> Option<Arc<Compiled>> {
        let virtual_service =
            self.addresses.service(address.ip()).or_else(|| self.catalog.at_virtual(address.ip()));
        if let Some(service) = virtual_service.and_then(|key| self.catalog.service(key)) {
            let port = service.port(address.port())?;
            let key = &service.spec.key;
            return Some(Arc::new(compile::destination(
                key.as_str(),
                port.port,
                "",
                &self.addresses_of(service),
            )));
        }
        // Of several services one whose source vouches for who is there, then the one that claimed first, then the first by
        // name (as the index has them).
        let rank = |key: &ServiceKey| {
            let instance = self.catalog.service(key).and_then(|service| service.instance_at(address));
            let vouched = instance.is_some_and(|(instance, _)| instance.identity.is_some());
            (!vouched, self.claims.get(key, address).map_or(u64::MAX, |claim| claim.since))
        };
        let found = self.catalog.at_endpoint(address).min_by_key(|key| rank(key));
        let workload = self.catalog.workload_at(address.ip());
        let Some(key) = found.filter(|key| !rank(key).0 || workload.is_none_or(|pod| pod.identity.is_none()))
        else {
            // No service has the port, or only one that takes a pod of the mesh for somebody else.
            let key = workload?.key.as_str();
            return Some(Arc::new(compile::destination(key, address.port(), &address.ip().to_string(), &[])));
        };
        let service = self.catalog.service(key)?;
        let (instance, port) = service.instance_at(address)?;
        Some(Arc::new(compile::destination(
            key.as_str(),
            port.port,
            &instance.id,
            &self.addresses_of(service),
        )))
    }

    fn named(&mut self, name: &str, now: SystemTime, store: &Store) -> Option<Arc<Compiled>> {
        let service = self.catalog.service(self.catalog.named(name)?)?;
        let key = &service.spec.key;
        let mut changes = Vec::new();
        let allocated = self.addresses.allocate(key, now, &mut changes);
        // Not awaited: the allocation starts from a hash of the name, and would come out the same after a crash.
        submit(store, changes);
        if allocated.is_none() {
            tracing::error!(service = %key, "no virtual address left");
        }
        // The mesh's own name leads to the mesh's own address, Consul's names to the address that Consul gave.
        let own = name.strip_suffix(MESH_SUFFIX) == Some(key.as_str());
        let mut addresses = if own { Vec::new() } else { service.spec.virtual_addresses.clone() };
        if addresses.is_empty() {
            addresses.extend(allocated.into_iter().flatten());
        }
        Some(Arc::new(compile::destination(key.as_str(), 0, "", &addresses)))
    }

    fn addresses_of(&self, service: &Service) -> Vec<IpAddr> {
        let given = service.spec.virtual_addresses.iter().copied();
        given.chain(self.addresses.of(&service.spec.key).into_iter().flatten()).collect()
    }

    fn accepted(&self, claim: &v1::Claim, service: ServiceKey, at: SocketAddr) -> Outcome {
        let found = self.catalog.service(&service).and_then(|found| found.instance_at(at));
        let status = match found {
            Some((_, port)) => status(claim, true, String::new(), port.protocol),
            None => status(claim, true, NOT_THERE_YET.to_owned(), v1::Protocol::Unspecified),
        };
        Outcome { status, verdict: Ok((service, at)) }
    }

    /// What was said to the claims of a connection; the protocol hints of the accepted ones are those of now.
    fn announced(&self, connection: u64) -> Vec<v1::ClaimStatus> {
        let now = |outcome: &Outcome| match &outcome.verdict {
            Ok((service, at)) => {
                let v1::ClaimStatus { service: name, address, port, .. } = outcome.status.clone();
                self.accepted(&v1::Claim { service: name, address, port }, service.clone(), *at).status
            }
            Err(_) => outcome.status.clone(),
        };
        self.announced.get(&connection).into_iter().flatten().map(now).collect()
    }

    /// The connections whose accepted claims concern these services.
    fn announcers(&self, services: &BTreeSet<ServiceKey>) -> impl Iterator<Item = Key> {
        let concerns =
            |outcome: &Outcome| outcome.verdict.as_ref().is_ok_and(|(service, _)| services.contains(service));
        self.announced
            .iter()
            .filter(move |(_, outcomes)| outcomes.iter().any(concerns))
            .map(|(connection, _)| Key::Connection(*connection))
    }
}

fn status(claim: &v1::Claim, accepted: bool, message: String, protocol: v1::Protocol) -> v1::ClaimStatus {
    v1::ClaimStatus {
        service: claim.service.clone(),
        address: claim.address.clone(),
        port: claim.port,
        accepted,
        message,
        protocol: protocol.into(),
    }
}

fn submit(store: &Store, changes: Vec<Change>) {
    if !changes.is_empty() {
        store.submit(changes).forget();
    }
}

/// The bundle on the wire.
pub(crate) fn bundle_message(bundle: &TrustBundle) -> v1::TrustBundle {
    v1::TrustBundle {
        trust_domain: bundle.trust_domain().to_string(),
        roots: bundle.roots().iter().map(|root| root.to_vec()).collect(),
        epoch: bundle.epoch(),
    }
}
