//! Where addresses and names lead, as all threads see it.
//!
//! Workers read a snapshot; what it does not hold is asked of the control thread over a bounded queue. The snapshot's
//! map is replaced when a destination is learned or forgotten, which is rare; a service's endpoints change often, so
//! each service has a cell of its own that everybody holding the service sees change.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use outrigger_core::{
    external::ExternalHosts,
    model::Service,
    resolve::{Knowledge, Ranges},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use crate::config::Config;

/// Questions that wait for the control thread. One is answered in microseconds or parked there; more than this are a
/// scan, not a workload.
const MAX_ASKS: usize = 1024;

/// Where a connection goes.
#[derive(Debug, Clone)]
pub struct Target {
    /// The service, with its endpoints of the moment.
    pub service: ServiceHandle,
    /// The service port that was dialled.
    pub port: u16,
    /// Set: exactly this endpoint, never another.
    pub endpoint: Option<Arc<str>>,
}

/// A service that is in use while any handle lives. Cheap to clone; handles of one service compare equal.
#[derive(Debug, Clone)]
pub struct ServiceHandle(Arc<Cell>);

#[derive(Debug)]
struct Cell {
    name: Arc<str>,
    current: ArcSwap<Service>,
}

impl ServiceHandle {
    /// A handle to a service.
    pub fn new(service: Arc<Service>) -> Self {
        Self(Arc::new(Cell { name: service.name.clone(), current: ArcSwap::new(service) }))
    }

    /// `<name>.<namespace>`.
    pub fn name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// The service as last pushed; without endpoints when its source has removed it.
    pub fn load(&self) -> Arc<Service> {
        self.0.current.load_full()
    }

    /// The same for a short look, which leaves the count that all threads share alone.
    pub fn peek(&self) -> Guard<Arc<Service>> {
        self.0.current.load()
    }

    /// Replaces what all handles see.
    pub fn store(&self, service: Arc<Service>) {
        self.0.current.store(service);
    }

    /// Handles that live, this one included.
    pub(super) fn count(&self) -> usize {
        Arc::strong_count(&self.0)
    }
}

impl PartialEq for ServiceHandle {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for ServiceHandle {}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A dialled address.
    Address(SocketAddr),
    /// A name that DNS or a forward-proxy request asked for; lower case, no final dot.
    Name(Arc<str>),
    /// A service by its own name, for explicit upstreams.
    Service(Arc<str>),
}

impl Key {
    fn address(address: SocketAddr) -> Self {
        Self::Address(SocketAddr::new(address.ip().to_canonical(), address.port()))
    }

    fn name(host: &str) -> Self {
        Self::Name(host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase().into())
    }
}

/// A question of a worker.
#[derive(Debug)]
pub struct Ask {
    pub(super) key: Key,
    pub(super) reply: oneshot::Sender<Arc<Entry>>,
}

/// What is known of a key.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) answer: Answer,
    /// Set by every reader, cleared by the control thread's sweep.
    used: AtomicBool,
}

#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// It leads to a service.
    Found(Found),
    /// A synced source does not know it; asked again after this.
    NotFound(Instant),
}

#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) target: Target,
    pub(super) addresses: Arc<[IpAddr]>,
}

impl Entry {
    pub(super) fn new(answer: Answer) -> Arc<Self> {
        Arc::new(Self { answer, used: AtomicBool::new(true) })
    }

    /// Whether somebody looked since the last call.
    pub(super) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    fn read(&self) -> Option<Knowledge<&Found>> {
        match &self.answer {
            Answer::Found(found) => {
                // A plain store would bounce the line between threads on every connection.
                if !self.used.load(Ordering::Relaxed) {
                    self.used.store(true, Ordering::Relaxed);
                }
                Some(Knowledge::Found(found))
            }
            Answer::NotFound(until) => (Instant::now() < *until).then_some(Knowledge::NotFound),
        }
    }
}

pub(super) type Known = HashMap<Key, Arc<Entry>>;

/// Where addresses and names lead.
#[derive(Debug)]
pub struct Directory {
    known: ArcSwap<Known>,
    ranges: ArcSwap<Ranges>,
    external_hosts: ArcSwap<ExternalHosts>,
    asks: mpsc::Sender<Ask>,
    patience: Duration,
}

impl Directory {
    /// An empty directory; the receiver is for the control thread.
    pub(crate) fn new(config: &Config) -> (Self, mpsc::Receiver<Ask>) {
        let (asks, receiver) = mpsc::channel(MAX_ASKS);
        let mesh = (!config.mesh_cidrs.is_empty()).then(|| config.mesh_cidrs.clone());
        let ranges = Ranges { mesh, outbound: config.outbound.into() };
        let directory = Self {
            known: ArcSwap::default(),
            ranges: ArcSwap::from_pointee(ranges),
            external_hosts: ArcSwap::default(),
            asks,
            patience: config.timeouts.discovery.get(),
        };
        (directory, receiver)
    }

    /// A directory that nobody updates; what it does not hold is silence.
    pub fn fixed(known: impl IntoIterator<Item = (Key, Target)>, ranges: Ranges) -> Self {
        let found = |target| Entry::new(Answer::Found(Found { target, addresses: [].into() }));
        let known: Known = known.into_iter().map(|(key, target)| (key, found(target))).collect();
        Self {
            known: ArcSwap::from_pointee(known),
            ranges: ArcSwap::from_pointee(ranges),
            external_hosts: ArcSwap::default(),
            asks: mpsc::channel(1).0,
            patience: Duration::ZERO,
        }
    }

    /// Every service that is known now.
    pub fn services(&self) -> Vec<ServiceHandle> {
        let known = self.known.load();
        let mut services: Vec<ServiceHandle> = Vec::new();
        for entry in known.values() {
            if let Answer::Found(found) = &entry.answer
                && !services.contains(&found.target.service)
            {
                services.push(found.target.service.clone());
            }
        }
        services
    }

    /// Where a dialled address leads. Takes no await point if it is known.
    pub async fn resolve(&self, address: SocketAddr) -> Knowledge<Target> {
        self.look_up(Key::address(address), |found| found.target.clone()).await
    }

    /// Where a host name leads, dialled at `port`.
    pub async fn resolve_name(&self, host: &str, port: u16) -> Knowledge<Target> {
        self.look_up(Key::name(host), |found| Target { port, ..found.target.clone() }).await
    }

    /// A service (`<name>.<namespace>`) by its own name, dialled at `port`.
    pub async fn resolve_service(&self, service: &str, port: u16) -> Knowledge<Target> {
        self.look_up(Key::Service(service.into()), |found| Target { port, ..found.target.clone() }).await
    }

    /// A service that a route leads to, where it is known.
    pub(crate) fn known_service(&self, service: &Arc<str>) -> Option<ServiceHandle> {
        match self.known.load().get(&Key::Service(service.clone()))?.read()? {
            Knowledge::Found(found) => Some(found.target.service.clone()),
            Knowledge::NotFound | Knowledge::Silent => None,
        }
    }

    /// The virtual addresses of a host name.
    pub async fn addresses(&self, host: &str) -> Knowledge<Arc<[IpAddr]>> {
        self.look_up(Key::name(host), |found| found.addresses.clone()).await
    }

    /// The mesh's ranges and what passes outside them.
    pub fn ranges(&self) -> Arc<Ranges> {
        self.ranges.load_full()
    }

    pub(super) fn set_ranges(&self, ranges: Ranges) {
        self.ranges.store(Arc::new(ranges));
    }

    /// The names outside the mesh that lead to services of it.
    pub(crate) fn external_hosts(&self) -> Guard<Arc<ExternalHosts>> {
        self.external_hosts.load()
    }

    /// Replaces them; discovery does, and tests that have none.
    pub fn set_external_hosts(&self, hosts: ExternalHosts) {
        self.external_hosts.store(Arc::new(hosts));
    }

    pub(super) fn publish(&self, known: Known) {
        self.known.store(Arc::new(known));
    }

    pub(super) fn known(&self) -> Arc<Known> {
        self.known.load_full()
    }

    async fn look_up<T>(&self, key: Key, of: impl Fn(&Found) -> T) -> Knowledge<T> {
        if let Some(known) = self.known.load().get(&key).and_then(|entry| entry.read().map(|k| map(k, &of))) {
            return known;
        }
        let (reply, answer) = oneshot::channel();
        if self.asks.try_send(Ask { key, reply }).is_err() {
            return Knowledge::Silent;
        }
        match timeout(self.patience, answer).await {
            Ok(Ok(entry)) => entry.read().map_or(Knowledge::Silent, |known| map(known, &of)),
            _ => Knowledge::Silent,
        }
    }
}

fn map<T>(knowledge: Knowledge<&Found>, of: &impl Fn(&Found) -> T) -> Knowledge<T> {
    match knowledge {
        Knowledge::Found(found) => Knowledge::Found(of(found)),
        Knowledge::NotFound => Knowledge::NotFound,
        Knowledge::Silent => Knowledge::Silent,
    }
}
