//! Consul as a source.
//!
//! # What is read, and why all of it
//! A proxy asks for addresses as well as names: an instance's own (`10.1.0.7:8080`) or a virtual one that Consul gave.
//! Nothing in Consul leads from an address to its service, and "no such address" may be told only by somebody who
//! knows them all. So this source reads the instances of *every* service of the configured datacenters and
//! namespaces, and the catalog on top of it is what answers on demand.
//!
//! - `catalog/services` of each place is watched, at most once a second: it is woken by any change in the cluster.
//! - The first [`MAX_BLOCKING`] services get a blocking query each, which brings a change within milliseconds. An
//!   agent admits 200 connections per client address, and a blocking query takes one.
//! - Services beyond are read every [`POLL_EVERY`]: slower to change, equally safe. (One notifier for the rest,
//!   `health/state/any`, would be woken by every check in the cluster and answer with all of them.) Up to
//!   [`MAX_SERVICES`], 170 small reads a second at worst; what is beyond that is not read, and the source says so
//!   and calls itself degraded.
//!
//! # When something leaves
//! An instance leaves by a complete answer about its service (`outrigger_consul::Watch` says what that is). A service
//! leaves when its name is gone from a complete list of names *and* its own watch says, after the hold-down, that no
//! instance is left. Whatever else happens, all stays as it is.
//!
//! Several datacenters and, differing in case only, several names can describe the same service: their instances are
//! united, and the datacenter is each instance's region.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use outrigger_consul::{
    AgentAddress, Client, ClientConfig, HealthQuery, Instance, InstanceId, Reason, Resolve, Scope, Secret,
    State, Status, Tls, Token, Watch,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{Fault, MAX_FAULTS, ServiceKey, Snapshot, Source, SourceService, Sync};

mod merge;

/// Services with a blocking query. With the watches of names and single calls below the client's 180 connections.
const MAX_BLOCKING: usize = 150;
/// How often each service beyond is read.
const POLL_EVERY: Duration = Duration::from_secs(30);
/// Services beyond are not read.
const MAX_SERVICES: usize = 5000;
/// Names are asked for at most this often.
const NAMES_EVERY: Duration = Duration::from_secs(1);
/// What comes in within this makes one snapshot.
const COALESCE: Duration = Duration::from_millis(50);

/// How to read Consul. The token needs `service_prefix "" { policy = "read" }` and `node_prefix "" { policy = "read" }`
/// in each datacenter: where it sees less, nothing is ever known to be absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Agents of one cluster, `http://host:port` or `https://host:port`, in order of preference. Empty: no Consul
    /// source.
    pub addresses: Vec<String>,
    /// File with nothing but the ACL token. Read again for each request.
    pub token_file: Option<PathBuf>,
    /// Datacenters to read. Empty: the agent's own.
    pub datacenters: Vec<String>,
    /// Namespaces to read (Consul Enterprise). Empty: the token's own, which is `default_namespace` in the mesh.
    pub namespaces: Vec<String>,
    /// The namespace in the mesh of services that have none in Consul. Another one than Kubernetes uses keeps services of
    /// one name apart.
    pub default_namespace: String,
    /// Admin partition (Consul Enterprise).
    pub partition: Option<String>,
    /// PEM file of the authorities that sign the agents' certificates; for `https`.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the client certificate, where the agents ask for one.
    pub cert_file: Option<PathBuf>,
    /// PEM file of its key.
    pub key_file: Option<PathBuf>,
    /// The name in the agents' certificates, if it is not the host in `addresses`.
    pub server_name: Option<String>,
    /// The domain of Consul's DNS names.
    pub domain: String,
    /// Accept instances on loopback and link-local addresses. Not read from a file: the controller's
    /// `allow_loopback_endpoints` decides.
    #[serde(skip)]
    pub allow_local_addresses: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            token_file: None,
            datacenters: Vec::new(),
            namespaces: Vec::new(),
            default_namespace: ServiceKey::DEFAULT_NAMESPACE.into(),
            partition: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            server_name: None,
            domain: "consul".into(),
            allow_local_addresses: false,
        }
    }
}

impl Config {
    /// A client by these settings.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        let agents: Vec<AgentAddress> = self
            .addresses
            .iter()
            .enumerate()
            .map(|(at, text)| text.parse().with_context(|| format!("consul.addresses[{at}]")))
            .collect::<anyhow::Result<_>>()?;
        let read = |file: &PathBuf| {
            std::fs::read(file).with_context(|| format!("reading {} for consul", file.display()))
        };
        let key = self.key_file.as_ref().map(read).transpose()?;
        let key = key.map(String::from_utf8).transpose().context("consul.key_file is not PEM")?;
        let tls = match &self.ca_file {
            None => None,
            Some(ca) => Some(Tls {
                ca_pem: read(ca)?,
                client_cert_pem: self.cert_file.as_ref().map(read).transpose()?,
                client_key_pem: key.map(Secret::new),
                server_name: self.server_name.clone(),
            }),
        };
        Client::new(&ClientConfig {
            token: self.token_file.clone().map_or(Token::None, Token::File),
            scope: Scope { partition: self.partition.clone(), ..Scope::default() },
            tls,
            allow_local_addresses: self.allow_local_addresses,
            resolve: Some(resolver()),
            ..ClientConfig::new(agents)
        })
        .context("consul")
    }

    /// Where names are read: each datacenter with each namespace.
    fn places(&self) -> Vec<Scope> {
        let or_own = |list: &[String]| match list {
            [] => vec![None],
            list => list.iter().cloned().map(Some).collect(),
        };
        let namespaces = or_own(&self.namespaces);
        let place = |datacenter: &Option<String>, namespace: &Option<String>| Scope {
            datacenter: datacenter.clone(),
            namespace: namespace.clone(),
            partition: self.partition.clone(),
        };
        let datacenters = or_own(&self.datacenters);
        datacenters.iter().flat_map(|dc| namespaces.iter().map(move |ns| place(dc, ns))).collect()
    }
}

/// Looks up the agents' names. Made anew for each look-up: `resolv.conf` may have changed.
fn resolver() -> Resolve {
    Arc::new(|name| {
        Box::pin(async move {
            let resolver = hickory_resolver::TokioResolver::builder_tokio()
                .and_then(hickory_resolver::ResolverBuilder::build)
                .map_err(std::io::Error::other)?;
            let found = resolver.lookup_ip(name).await.map_err(std::io::Error::other)?;
            Ok(found.iter().collect())
        })
    })
}

/// Starts the source. Must be called in a tokio runtime; ends with `stop`.
pub fn spawn(config: Config, stop: CancellationToken) -> anyhow::Result<Source> {
    let client = config.client()?;
    let (sender, snapshots) = watch::channel(Arc::new(Snapshot::default()));
    let collector = Collector::new(client, config, sender);
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = collector.run() => {}
        }
    });
    Ok(Source { name: "consul".into(), snapshots })
}

/// A service of one place, by its name in Consul.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct UnitId {
    place: usize,
    name: String,
}

struct Unit {
    key: ServiceKey,
    states: watch::Receiver<State<InstanceId, Instance>>,
    /// In the place's last list of names.
    listed: bool,
    blocking: bool,
    _watch: Watch<InstanceId, Instance>,
    _forwarder: AbortOnDropHandle<()>,
}

struct Place {
    scope: Scope,
    names: watch::Receiver<State<String, Vec<String>>>,
    _watch: Watch<String, Vec<String>>,
    _forwarder: AbortOnDropHandle<()>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.scope.datacenter.as_deref().unwrap_or("the agent's datacenter"))?;
        match &self.scope.namespace {
            Some(namespace) => write!(f, ", namespace {namespace}"),
            None => Ok(()),
        }
    }
}

/// Which units changed since they were last looked at; at most as many as there are.
#[derive(Default)]
struct Changes {
    units: Mutex<BTreeSet<UnitId>>,
    notify: Notify,
}

impl Changes {
    fn mark(&self, unit: Option<UnitId>) {
        if let Some(unit) = unit {
            self.units.lock().unwrap_or_else(PoisonError::into_inner).insert(unit);
        }
        self.notify.notify_one();
    }

    fn take(&self) -> BTreeSet<UnitId> {
        std::mem::take(&mut *self.units.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Marks `unit` (or just wakes the collector) whenever `states` changes.
fn forward<T: Send + std::marker::Sync + 'static>(
    mut states: watch::Receiver<T>,
    unit: Option<UnitId>,
    changes: &Arc<Changes>,
) -> AbortOnDropHandle<()> {
    let changes = Arc::clone(changes);
    AbortOnDropHandle::new(tokio::spawn(async move {
        while states.changed().await.is_ok() {
            changes.mark(unit.clone());
        }
    }))
}

struct Collector {
    client: Client,
    domain: String,
    default_namespace: String,
    places: Vec<Place>,
    units: BTreeMap<UnitId, Unit>,
    /// Which units make a service.
    parts: BTreeMap<ServiceKey, BTreeSet<UnitId>>,
    services: BTreeMap<ServiceKey, Arc<SourceService>>,
    /// Names that cannot be used.
    refused: BTreeMap<UnitId, String>,
    /// Names beyond [`MAX_SERVICES`].
    unread: usize,
    changes: Arc<Changes>,
    sync: Sync,
    /// What was last said of a Consul that has not been read yet.
    said: Option<String>,
    snapshots: watch::Sender<Arc<Snapshot>>,
}

impl Collector {
    fn new(client: Client, config: Config, snapshots: watch::Sender<Arc<Snapshot>>) -> Self {
        let changes = Arc::new(Changes::default());
        let places = config.places().into_iter().map(|scope| {
            let watch = client.watch_services(&scope, NAMES_EVERY);
            let names = watch.states();
            let forwarder = forward(names.clone(), None, &changes);
            Place { scope, names, _watch: watch, _forwarder: forwarder }
        });
        let places = places.collect();
        let mut domain = config.domain;
        domain.make_ascii_lowercase();
        Self {
            places,
            client,
            domain,
            default_namespace: config.default_namespace,
            units: BTreeMap::new(),
            parts: BTreeMap::new(),
            services: BTreeMap::new(),
            refused: BTreeMap::new(),
            unread: 0,
            changes,
            sync: Sync::Never,
            said: None,
            snapshots,
        }
    }

    async fn run(mut self) {
        loop {
            self.changes.notify.notified().await;
            tokio::time::sleep(COALESCE).await;
            self.collect();
        }
    }

    fn collect(&mut self) {
        let mut changed = BTreeSet::new();
        self.unread = 0;
        for place in 0..self.places.len() {
            self.read_names(place, &mut changed);
        }
        for id in self.changes.take() {
            if let Some(unit) = self.units.get(&id) {
                changed.insert(unit.key.clone());
            }
        }
        self.drop_the_gone(&mut changed);
        for key in changed {
            self.rebuild(key);
        }
        self.publish();
    }

    /// Starts to watch new names; notes which are listed no more.
    fn read_names(&mut self, place: usize, changed: &mut BTreeSet<ServiceKey>) {
        let Some(names) = self.places[place].names.borrow_and_update().value.clone() else { return };
        let first = UnitId { place, name: String::new() };
        let mine = |id: &UnitId| id.place == place;
        for (id, unit) in self.units.range_mut(first..).take_while(|(id, _)| mine(id)) {
            unit.listed = names.contains_key(&id.name);
        }
        self.refused.retain(|id, _| !mine(id) || names.contains_key(&id.name));
        for name in names.keys() {
            let id = UnitId { place, name: name.clone() };
            if self.units.contains_key(&id) || self.refused.contains_key(&id) {
                continue;
            }
            if self.units.len() + self.refused.len() >= MAX_SERVICES {
                self.unread += 1;
                continue;
            }
            match self.start(&id) {
                Ok(unit) => {
                    changed.insert(unit.key.clone());
                    self.parts.entry(unit.key.clone()).or_default().insert(id.clone());
                    self.units.insert(id, unit);
                }
                Err(reason) => {
                    self.refused.insert(id, reason);
                }
            }
        }
    }

    fn start(&self, id: &UnitId) -> Result<Unit, String> {
        let scope = &self.places[id.place].scope;
        let namespace = scope.namespace.as_deref().unwrap_or(&self.default_namespace);
        let key = ServiceKey::new(&id.name, namespace).map_err(|error| error.to_string())?;
        let query = HealthQuery { scope: scope.clone(), filter: None };
        let blocking = self.units.values().filter(|unit| unit.blocking).count() < MAX_BLOCKING;
        let watch = if blocking {
            self.client.watch_health(&id.name, &query)
        } else {
            self.client.poll_health(&id.name, &query, POLL_EVERY)
        }
        .map_err(|error| error.to_string())?;
        let states = watch.states();
        let forwarder = forward(states.clone(), Some(id.clone()), &self.changes);
        Ok(Unit { key, states, listed: true, blocking, _watch: watch, _forwarder: forwarder })
    }

    /// Both must say so: the list of names, and the service's own watch.
    fn drop_the_gone(&mut self, changed: &mut BTreeSet<ServiceKey>) {
        let gone = self.units.extract_if(.., |_, unit| !unit.listed && is_known_empty(&unit.states.borrow()));
        for (id, unit) in gone {
            if let Some(parts) = self.parts.get_mut(&unit.key) {
                parts.remove(&id);
            }
            changed.insert(unit.key);
        }
    }

    /// Makes one service anew from its parts; one of which nothing was heard yet is not there yet.
    fn rebuild(&mut self, key: ServiceKey) {
        let Some(parts) = self.parts.get(&key).filter(|parts| !parts.is_empty()) else {
            self.parts.remove(&key);
            self.services.remove(&key);
            return;
        };
        let heard: Vec<_> =
            parts.iter().filter_map(|id| self.units.get(id)?.states.borrow().value.clone()).collect();
        if heard.is_empty() {
            return;
        }
        let service = merge::service(
            &key,
            &self.domain,
            &self.default_namespace,
            heard.iter().flat_map(|part| part.values()),
        );
        if self.services.get(&key).is_none_or(|old| **old != service) {
            self.services.insert(key, Arc::new(service));
        }
    }

    fn publish(&mut self) {
        let (trouble, mut faults) = self.judge();
        if self.sync == Sync::Never
            && let Some(reason) = &trouble.degraded
        {
            if self.said.as_ref() != Some(reason) {
                tracing::warn!(reason, "Consul cannot be read yet: the catalog stays empty until it can");
                self.said = Some(reason.clone());
            }
            faults.insert(0, Fault { subject: "consul".to_owned(), reason: reason.clone() });
            faults.truncate(MAX_FAULTS);
        }
        let sync = next_sync(&self.sync, trouble, SystemTime::now());
        match (&self.sync, &sync) {
            (Sync::Synced, Sync::Degraded { reason, .. }) => {
                tracing::warn!(reason, "Consul source degraded: nothing is removed until it is synced again");
            }
            (Sync::Never | Sync::Degraded { .. }, Sync::Synced) => {
                tracing::info!(services = self.services.len(), "Consul source synced");
            }
            _ => {}
        }
        self.sync = sync.clone();
        let snapshot = Snapshot { services: self.services.clone(), sync, faults, ..Snapshot::default() };
        self.snapshots.send_if_modified(|last| {
            let modified = **last != snapshot;
            if modified {
                *last = Arc::new(snapshot);
            }
            modified
        });
    }

    /// What keeps the whole from being complete, and what is wrong with its parts.
    fn judge(&self) -> (Trouble, Vec<Fault>) {
        let mut trouble = Trouble::default();
        let mut faults = Vec::new();
        let mut fault = |subject: String, reason: String| {
            if faults.len() < MAX_FAULTS {
                faults.push(Fault { subject, reason });
            }
        };
        for place in &self.places {
            if let Some(reason) = trouble.add(&place.names.borrow().status, || format!("names in {place}")) {
                fault(format!("service names in {place}"), reason);
            }
        }
        for (id, unit) in &self.units {
            let state = unit.states.borrow();
            if let Some(reason) = trouble.add(&state.status, || format!("service {}", id.name)) {
                fault(format!("service {} in {}", id.name, self.places[id.place]), reason);
            }
            for skip in state.skipped.iter() {
                fault(format!("instance {} of {}", skip.id, id.name), skip.reason.to_owned());
            }
        }
        for (id, reason) in &self.refused {
            fault(format!("a service in {}", self.places[id.place]), reason.clone());
        }
        if self.unread > 0 {
            let reason = format!("{} services beyond {MAX_SERVICES} are not read", self.unread);
            trouble.degraded.get_or_insert(reason);
        }
        (trouble, faults)
    }
}

/// What stands between the watches and "synced".
#[derive(Debug, Default, PartialEq, Eq)]
struct Trouble {
    /// A watch has not answered yet.
    starting: bool,
    /// A watch answers no more, or not completely: the first one's reason.
    degraded: Option<String>,
}

impl Trouble {
    /// Counts a watch's status. Returns the fault, if it is one.
    fn add(&mut self, status: &Status, subject: impl Fn() -> String) -> Option<String> {
        match status {
            Status::Synced => None,
            Status::Starting => {
                self.starting = true;
                None
            }
            // What is kept is more than there is: that nothing else exists stays true.
            Status::Degraded(reason @ Reason::SuddenlyEmpty) => Some(reason.to_string()),
            Status::Degraded(reason) => {
                self.degraded.get_or_insert_with(|| format!("{}: {reason}", subject()));
                Some(reason.to_string())
            }
        }
    }
}

/// A service that appears later and has not answered yet does not end "synced": it is as if it appeared a moment
/// later. The first time, all must have answered.
fn next_sync(last: &Sync, trouble: Trouble, now: SystemTime) -> Sync {
    match (last, trouble) {
        (Sync::Never, Trouble { starting: false, degraded: None })
        | (Sync::Synced | Sync::Degraded { .. }, Trouble { degraded: None, .. }) => Sync::Synced,
        (Sync::Never, _) => Sync::Never,
        (Sync::Synced, Trouble { degraded: Some(reason), .. }) => Sync::Degraded { since: now, reason },
        (Sync::Degraded { since, .. }, Trouble { degraded: Some(reason), .. }) => {
            Sync::Degraded { since: *since, reason }
        }
    }
}

fn is_known_empty(state: &State<InstanceId, Instance>) -> bool {
    state.status.is_synced() && state.value.as_ref().is_some_and(|instances| instances.is_empty())
}

#[cfg(test)]
mod tests;
