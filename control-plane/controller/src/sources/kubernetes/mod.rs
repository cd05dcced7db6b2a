//! Kubernetes as a source.
//!
//! Services, EndpointSlices, Pods, Nodes and ServiceCIDRs of the whole cluster are read, because a proxy asks for any address
//! and "there is nobody" may be told only by somebody who knows them all. One task a kind ([`reader`]) lists and watches;
//! one task, the collector below, holds what they read, pruned ([`objects`]), and works out anew what a change concerns
//! ([`convert`]): the service of a slice, the services of whose endpoints a pod is one.
//!
//! Decisions:
//! - A service is `<name>.<namespace>`; its cluster IPs are its virtual addresses. An `ExternalName` is none: its name is an
//!   alias in DNS, and what it leads to is outside, where the mesh's `outbound` default holds.
//! - Every pod with an address of its own is a [`Workload`], so that a scrape of a port which no service has, a bare
//!   pod and a StatefulSet's pod lead to exactly that pod, and by mutual TLS where it has a sidecar.
//! - Who is at an address is what the *pod* with that address says, never the slice: whoever may write slices of a namespace can put
//!   any address into them. An endpoint that is said to be a pod which is not known with that address gets no
//!   traffic until it is: in plaintext it might go to a pod of the mesh.
//! - Unready endpoints stay, as [`Health::Unready`]: nobody chooses them, but policies on the service hold for them.
//! - A source is synced once every kind was listed completely, and degraded while any of them cannot be read.
//!
//! [`Health::Unready`]: outrigger_api::v1::Health::Unready

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use kube::Client;
use kube::core::{Request, params::GetParams};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Fault, MAX_FAULTS, ServiceKey, Snapshot, Source, SourceService, Sync, Workload};
use convert::Found;
use objects::{Endpoint, Kind, Node, ObjectKey, Service, ServiceRange, Slice, raw};
use reader::{Event, Reader};

mod convert;
#[cfg(test)]
mod fake;
mod objects;
mod reader;

pub(crate) use objects::Pod;

/// The source's name.
pub(crate) const NAME: &str = "kubernetes";
/// Events on their way to the collector: a reader waits rather than pile them up, and its server's buffer is bounded, too.
const EVENTS: usize = 256;
/// What comes in within this makes one snapshot: a rollout changes many objects at once, and each snapshot costs a walk
/// over all services and pods.
const COALESCE: Duration = Duration::from_millis(20);

/// What to know of the cluster.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The domain of its DNS names.
    pub(crate) cluster_domain: String,
    /// That of the identities of its pods.
    pub(crate) trust_domain: String,
}

/// Starts the source. Must be called in a tokio runtime; ends with `stop`.
pub(crate) fn spawn(client: &Client, settings: Settings, stop: &CancellationToken) -> Source {
    let (sender, snapshots) = watch::channel(Arc::default());
    let (events, receiver) = mpsc::channel(EVENTS);
    read::<Service>(client, Update::Service, &events, stop);
    read::<Slice>(client, Update::Slice, &events, stop);
    read::<Pod>(client, |event| Update::Pod(Box::new(event)), &events, stop);
    read::<Node>(client, Update::Node, &events, stop);
    read::<ServiceRange>(client, Update::Range, &events, stop);
    let collector = Collector::new(settings, sender);
    let stop = stop.clone();
    tokio::spawn(async move { stop.run_until_cancelled(collector.run(receiver)).await });
    Source { name: NAME.into(), snapshots }
}

/// A pod as the API server has it now.
pub(crate) async fn pod(client: &Client, namespace: &str, name: &str) -> Result<Option<Pod>, kube::Error> {
    let request = Request::new(format!("/api/v1/namespaces/{namespace}/pods"))
        .get(name, &GetParams::default())
        .map_err(kube::Error::BuildRequest)?;
    match client.request::<raw::Pod>(request).await {
        Ok(raw) => Ok(Some(Pod::prune(raw).1)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

fn read<K: Kind>(
    client: &Client,
    wrap: fn(Event<K>) -> Update,
    events: &mpsc::Sender<Update>,
    stop: &CancellationToken,
) {
    let reader = Reader::new(client.clone(), wrap, events.clone());
    let stop = stop.clone();
    tokio::spawn(async move { stop.run_until_cancelled(reader.run()).await });
}

/// What a reader says.
#[derive(Debug)]
enum Update {
    Service(Event<Service>),
    Slice(Event<Slice>),
    Pod(Box<Event<Pod>>),
    Node(Event<Node>),
    Range(Event<ServiceRange>),
}

/// One kind's objects, and how well they are read.
struct Table<K> {
    objects: HashMap<ObjectKey, K>,
    listed: bool,
    failing: Option<(SystemTime, String)>,
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self { objects: HashMap::new(), listed: false, failing: None }
    }
}

impl<K: PartialEq> Table<K> {
    /// Takes an event; returns each object that differs, as it was.
    fn take(&mut self, event: Event<K>) -> Vec<(ObjectKey, Option<K>)> {
        match event {
            Event::Listed(all) => {
                self.listed = true;
                self.failing = None;
                let new: HashMap<ObjectKey, K> = all.into_iter().collect();
                let mut old = std::mem::replace(&mut self.objects, new);
                let mut changed = Vec::new();
                for (key, object) in &self.objects {
                    let before = old.remove(key);
                    if before.as_ref() != Some(object) {
                        changed.push((key.clone(), before));
                    }
                }
                changed.extend(old.into_iter().map(|(key, object)| (key, Some(object))));
                changed
            }
            Event::Set(key, object) => {
                if self.objects.get(&key) == Some(&object) {
                    return Vec::new();
                }
                let before = self.objects.insert(key.clone(), object);
                vec![(key, before)]
            }
            Event::Gone(key) => {
                let before = self.objects.remove(&key);
                before.map(|before| (key, Some(before))).into_iter().collect()
            }
            Event::Failing(reason) => {
                let since = self.failing.as_ref().map_or_else(SystemTime::now, |(since, _)| *since);
                self.failing = Some((since, reason));
                Vec::new()
            }
            Event::Well => {
                self.failing = None;
                Vec::new()
            }
        }
    }

    fn progress(&self) -> (bool, Option<&(SystemTime, String)>) {
        (self.listed, self.failing.as_ref())
    }
}

struct Collector {
    settings: Settings,
    sender: watch::Sender<Arc<Snapshot>>,
    services: Table<Service>,
    slices: Table<Slice>,
    pods: Table<Pod>,
    nodes: Table<Node>,
    ranges: Table<ServiceRange>,
    /// The slices of a service.
    slices_of: HashMap<ObjectKey, BTreeSet<Arc<str>>>,
    /// The services in whose slices an address is.
    services_at: HashMap<IpAddr, BTreeSet<ObjectKey>>,
    /// The pods that have an address of their own.
    pods_at: HashMap<IpAddr, BTreeSet<ObjectKey>>,
    /// To be worked out anew.
    stale_services: BTreeSet<ObjectKey>,
    stale_pods: BTreeSet<ObjectKey>,
    ranges_changed: bool,
    /// What they came to.
    made: BTreeMap<ServiceKey, Arc<SourceService>>,
    workloads: Arc<BTreeMap<ServiceKey, Arc<Workload>>>,
    mesh_ranges: Arc<BTreeSet<IpNet>>,
    faults: BTreeMap<ObjectKey, Fault>,
}

impl Collector {
    fn new(settings: Settings, sender: watch::Sender<Arc<Snapshot>>) -> Self {
        Self {
            settings,
            sender,
            services: Table::default(),
            slices: Table::default(),
            pods: Table::default(),
            nodes: Table::default(),
            ranges: Table::default(),
            slices_of: HashMap::new(),
            services_at: HashMap::new(),
            pods_at: HashMap::new(),
            stale_services: BTreeSet::new(),
            stale_pods: BTreeSet::new(),
            ranges_changed: false,
            made: BTreeMap::new(),
            workloads: Arc::default(),
            mesh_ranges: Arc::default(),
            faults: BTreeMap::new(),
        }
    }

    async fn run(mut self, mut updates: mpsc::Receiver<Update>) {
        // As long again as the last one took: a cluster that churns costs half of one thread at most.
        let mut pause = COALESCE;
        while let Some(first) = updates.recv().await {
            self.take(first);
            let end = Instant::now() + pause;
            while let Ok(Some(next)) = tokio::time::timeout_at(end, updates.recv()).await {
                self.take(next);
            }
            let started = Instant::now();
            self.publish();
            pause = COALESCE.max(started.elapsed());
        }
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Service(event) => {
                let changed = self.services.take(event);
                self.stale_services.extend(changed.into_iter().map(|(key, _)| key));
            }
            Update::Slice(event) => {
                for (key, before) in self.slices.take(event) {
                    if let Some(before) = before {
                        self.index_slice(&key, &before, false);
                    }
                    // Borrowed apart: the index is another field.
                    if let Some(now) = self.slices.objects.remove(&key) {
                        self.index_slice(&key, &now, true);
                        self.slices.objects.insert(key, now);
                    }
                }
            }
            Update::Pod(event) => {
                for (key, before) in self.pods.take(*event) {
                    let now = self.pods.objects.get(&key);
                    if let Some(before) = &before {
                        index_pod(&mut self.pods_at, &key, before, false);
                    }
                    if let Some(now) = now {
                        index_pod(&mut self.pods_at, &key, now, true);
                    }
                    let addresses = before.iter().chain(now).flat_map(|pod| &pod.addresses);
                    let services = addresses.filter_map(|address| self.services_at.get(address)).flatten();
                    self.stale_services.extend(services.cloned());
                    self.stale_pods.insert(key);
                }
            }
            Update::Node(event) => {
                for (node, _) in self.nodes.take(event) {
                    self.ranges_changed = true;
                    // Rare: what is kept of a node is what it was made with.
                    let on_it = self.pods.objects.iter().filter(|(_, pod)| *pod.node == *node.1);
                    self.stale_pods.extend(on_it.map(|(key, _)| key.clone()));
                    let uses = |slice: &Slice| {
                        slice.endpoints.iter().any(|endpoint| endpoint.node.as_ref() == Some(&node.1))
                    };
                    let slices = self.slices.objects.iter().filter(|(_, slice)| uses(slice));
                    let services = slices.map(|(key, slice)| (key.0.clone(), slice.service.clone()));
                    self.stale_services.extend(services);
                }
            }
            Update::Range(event) => self.ranges_changed |= !self.ranges.take(event).is_empty(),
        }
    }

    fn index_slice(&mut self, (namespace, name): &ObjectKey, slice: &Slice, present: bool) {
        let service = (namespace.clone(), slice.service.clone());
        set(&mut self.slices_of, &service, name.clone(), present);
        for endpoint in &slice.endpoints {
            if present {
                set(&mut self.services_at, &endpoint.address, service.clone(), true);
            } else {
                // Another slice of the service may have it, too.
                let others = self.slices_of.get(&service).into_iter().flatten();
                let has = |other: &Slice| other.endpoints.iter().any(|one| one.address == endpoint.address);
                let elsewhere = others
                    .filter_map(|other| self.slices.objects.get(&(namespace.clone(), other.clone())))
                    .any(has);
                if !elsewhere {
                    set(&mut self.services_at, &endpoint.address, service.clone(), false);
                }
            }
        }
        self.stale_services.insert(service);
    }

    /// Works out what is stale and publishes it, once every kind was listed; before that there is nothing complete.
    fn publish(&mut self) {
        let kinds = [
            self.services.progress(),
            self.slices.progress(),
            self.pods.progress(),
            self.nodes.progress(),
            self.ranges.progress(),
        ];
        if !kinds.iter().all(|(listed, _)| *listed) {
            return;
        }
        let failing = kinds.iter().filter_map(|(_, failing)| *failing).min_by_key(|(since, _)| *since);
        let sync = failing
            .map_or(Sync::Synced, |(since, reason)| Sync::Degraded { since: *since, reason: reason.clone() });
        for key in std::mem::take(&mut self.stale_pods) {
            self.make_workload(&key);
        }
        for key in std::mem::take(&mut self.stale_services) {
            self.make_service(&key);
        }
        if std::mem::take(&mut self.ranges_changed) {
            let of_nodes = self.nodes.objects.values().flat_map(|node| &node.pod_ranges);
            let of_services = self.ranges.objects.values().flat_map(|range| &range.0);
            let ranges = of_nodes.chain(of_services).copied().collect();
            if ranges != *self.mesh_ranges {
                self.mesh_ranges = Arc::new(ranges);
            }
        }
        let snapshot = Snapshot {
            services: self.made.clone(),
            workloads: Arc::clone(&self.workloads),
            ranges: Arc::clone(&self.mesh_ranges),
            sync,
            faults: self.faults.values().take(MAX_FAULTS).cloned().collect(),
        };
        self.sender.send_if_modified(|last| {
            let differs = **last != snapshot;
            if differs {
                *last = Arc::new(snapshot);
            }
            differs
        });
    }

    fn make_workload(&mut self, key: &ObjectKey) {
        let made = self
            .pods
            .objects
            .get(key)
            .and_then(|pod| convert::workload(pod, self.node(&pod.node), &self.settings.trust_domain));
        match made {
            Some(Ok(workload)) => {
                if self.workloads.get(&workload.key).is_none_or(|known| **known != workload) {
                    Arc::make_mut(&mut self.workloads).insert(workload.key.clone(), Arc::new(workload));
                }
            }
            // The API server checks names more strictly than we do.
            Some(Err(error)) => tracing::warn!(%error, "a pod cannot be told to proxies"),
            None => {
                if let Ok(name) = ServiceKey::of_workload(&key.1, &key.0)
                    && self.workloads.contains_key(&name)
                {
                    Arc::make_mut(&mut self.workloads).remove(&name);
                }
            }
        }
    }

    fn make_service(&mut self, key: &ObjectKey) {
        self.faults.remove(key);
        let Ok(name) = ServiceKey::new(&key.1, &key.0) else { return };
        let slices: Vec<&Slice> = self
            .slices_of
            .get(key)
            .into_iter()
            .flatten()
            .filter_map(|slice| self.slices.objects.get(&(key.0.clone(), slice.clone())))
            .collect();
        let made = self.services.objects.get(key).and_then(|service| {
            let Settings { cluster_domain, trust_domain } = &self.settings;
            convert::service(key, service, &slices, cluster_domain, trust_domain, |endpoint| {
                self.at(key, endpoint)
            })
        });
        if slices.iter().any(|slice| slice.has_names) {
            let reason =
                "an EndpointSlice of addressType FQDN is not used; make an ExternalService of the name"
                    .to_owned();
            self.faults.insert(key.clone(), Fault { subject: name.to_string(), reason });
        }
        match made {
            Some(Ok(service)) => {
                if self.made.get(&name).is_none_or(|known| **known != service) {
                    self.made.insert(name, Arc::new(service));
                }
            }
            _ => {
                self.made.remove(&name);
            }
        }
    }

    /// Who is at an endpoint of a service in `namespace`, and on which node.
    fn at(&self, (namespace, _): &ObjectKey, endpoint: &Endpoint) -> (Found<'_>, &Node) {
        let named = endpoint.pod.as_ref().map(|pod| self.pods.objects.get(&(namespace.clone(), pod.clone())));
        let found = match named {
            Some(Some(pod)) if pod.addresses.contains(&endpoint.address) && !pod.is_finished => {
                Found::Pod(pod)
            }
            Some(_) => Found::Unknown,
            None => {
                let here = self.pods_at.get(&endpoint.address).into_iter().flatten();
                let pods = here.filter_map(|key| self.pods.objects.get(key));
                // While an address passes on, the one that is not ending has it.
                pods.min_by_key(|pod| pod.terminating).map_or(Found::Stranger, Found::Pod)
            }
        };
        let node = match (&endpoint.node, &found) {
            (Some(node), _) => node,
            (None, Found::Pod(pod)) => &*pod.node,
            (None, _) => "",
        };
        (found, self.node(node))
    }

    fn node(&self, name: &str) -> &Node {
        static UNKNOWN: Node = Node { zone: String::new(), region: String::new(), pod_ranges: Vec::new() };
        self.nodes.objects.get(&("".into(), name.into())).unwrap_or(&UNKNOWN)
    }
}

fn index_pod(pods_at: &mut HashMap<IpAddr, BTreeSet<ObjectKey>>, key: &ObjectKey, pod: &Pod, present: bool) {
    if pod.host_network || pod.is_finished {
        return;
    }
    for address in &pod.addresses {
        set(pods_at, address, key.clone(), present);
    }
}

fn set<K: std::hash::Hash + Eq + Clone, V: Ord>(
    index: &mut HashMap<K, BTreeSet<V>>,
    at: &K,
    value: V,
    present: bool,
) {
    if present {
        index.entry(at.clone()).or_default().insert(value);
    } else if let Some(values) = index.get_mut(at) {
        values.remove(&value);
        if values.is_empty() {
            index.remove(at);
        }
    }
}

#[cfg(test)]
mod tests;
