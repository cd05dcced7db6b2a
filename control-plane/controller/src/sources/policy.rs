//! `ExternalService` objects as a source: services outside the mesh that policies name.
//!
//! Where an object lists no endpoints its hosts are looked up. An answer holds for as long as its TTL says, within
//! bounds: a TTL of 0 must not become a flood, one of a week must not hide a move. What cannot be looked up keeps its last
//! addresses and is tried again soon; what never could is a service without endpoints, which answers 503 and says why,
//! rather than a name that does not exist and passes as the mesh's `outbound` default says. A new service appears when each
//! of its hosts was tried once, so that nobody is told of it half.
//!
//! The controller must ask the real name server: a sidecar's DNS answers these hosts with virtual addresses, which would lead
//! back to the service itself. Such an answer is none.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use outrigger_api::v1::{Health, Protocol};
use outrigger_policy::kinds::ExternalProtocol;
use outrigger_policy::resolve::External;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Fault, Instance, MAX_FAULTS, Reach, ServiceKey, ServicePort, Snapshot, Source, SourceService, Sync,
};
use crate::addresses::is_virtual;
use crate::policies::resolver::Resolution;

/// The source's name.
pub(crate) const NAME: &str = "policy";
/// How long an answer holds, at least and at most.
const MIN_TTL: Duration = Duration::from_secs(5);
const MAX_TTL: Duration = Duration::from_mins(5);
/// After a look-up that failed.
const RETRY: Duration = Duration::from_secs(5);
/// For one look-up, all its servers and tries together.
const LOOKUP_LIMIT: Duration = Duration::from_secs(5);
/// Look-ups at once.
const MAX_LOOKUPS: usize = 16;
/// Addresses of one host that are used.
const MAX_ADDRESSES: usize = 64;

/// What a look-up found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Not empty.
    pub(crate) addresses: Vec<IpAddr>,
    /// How long that holds.
    pub(crate) ttl: Duration,
}

type Pending = Pin<Box<dyn Future<Output = Result<Found, String>> + Send>>;
/// Looks up a host. Injected, so that tests need no DNS.
pub(crate) type Lookup = Arc<dyn Fn(String) -> Pending + Send + std::marker::Sync>;

/// The system's DNS.
pub(crate) fn system_lookup() -> Lookup {
    Arc::new(|host| {
        Box::pin(async move {
            // Made anew for each look-up: `resolv.conf` may have changed.
            let resolver = hickory_resolver::TokioResolver::builder_tokio()
                .and_then(hickory_resolver::ResolverBuilder::build)
                .map_err(|error| error.to_string())?;
            // The final dot: a search list would turn a name that is gone into somebody else's.
            let name = if host.ends_with('.') { host } else { format!("{host}.") };
            let found = resolver.lookup_ip(name).await.map_err(|error| error.to_string())?;
            let ttl = found.valid_until().saturating_duration_since(std::time::Instant::now());
            Ok(Found { addresses: found.iter().collect(), ttl })
        })
    })
}

/// Starts the source. Must be called in a tokio runtime; ends with `stop`.
pub(crate) fn spawn(
    resolutions: watch::Receiver<Option<Arc<Resolution>>>,
    lookup: Lookup,
    stop: CancellationToken,
) -> Source {
    let (sender, snapshots) = watch::channel(Arc::default());
    let externals = Externals { lookup, hosts: BTreeMap::new(), lookups: JoinSet::new(), sender };
    tokio::spawn(async move { stop.run_until_cancelled(externals.run(resolutions)).await });
    Source { name: NAME.into(), snapshots }
}

struct Externals {
    lookup: Lookup,
    hosts: BTreeMap<String, Host>,
    lookups: JoinSet<(String, Result<Found, String>)>,
    sender: watch::Sender<Arc<Snapshot>>,
}

/// What is known of a host.
#[derive(Debug)]
struct Host {
    /// The last good.
    addresses: BTreeSet<IpAddr>,
    tried: bool,
    /// When it is looked up next; `None`: it is being looked up.
    due: Option<Instant>,
    fault: Option<String>,
}

impl Host {
    fn failed(&mut self, name: &str, reason: &str) {
        if self.fault.is_none() {
            tracing::warn!(
                host = name,
                reason,
                "an external service's host cannot be looked up; its last addresses stay"
            );
        }
        self.due = Some(Instant::now() + RETRY);
        self.fault = Some(reason.to_owned());
    }
}

impl Externals {
    async fn run(mut self, mut resolutions: watch::Receiver<Option<Arc<Resolution>>>) {
        loop {
            let resolution = resolutions.borrow_and_update().clone();
            let (externals, sync) = match &resolution {
                Some(resolution) => (resolution.externals(), &resolution.sync),
                None => (&[][..], &Sync::Never),
            };
            self.want(externals);
            let next = self.start_lookups();
            self.publish(externals, sync);
            tokio::select! {
                changed = resolutions.changed() => if changed.is_err() { return },
                Some(ended) = self.lookups.join_next() => match ended {
                    Ok((host, result)) => self.ended(&host, result),
                    Err(error) => tracing::error!(%error, "a look-up failed in itself"),
                },
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    /// Knows exactly the hosts that are to be looked up.
    fn want(&mut self, externals: &[External]) {
        let resolved = externals.iter().filter(|external| external.endpoints.is_none());
        let wanted: BTreeSet<String> = resolved.flat_map(|external| external.hosts.iter().cloned()).collect();
        self.hosts.retain(|host, _| wanted.contains(host));
        for host in wanted {
            let new =
                || Host { addresses: BTreeSet::new(), tried: false, due: Some(Instant::now()), fault: None };
            self.hosts.entry(host).or_insert_with(new);
        }
    }

    /// Looks up what is due; says when the next one will be, if there is room for it.
    fn start_lookups(&mut self) -> Option<Instant> {
        let now = Instant::now();
        for (name, host) in &mut self.hosts {
            if self.lookups.len() >= MAX_LOOKUPS {
                return None;
            }
            if host.due.is_some_and(|due| due <= now) {
                host.due = None;
                let (name, lookup) = (name.clone(), (self.lookup)(name.clone()));
                self.lookups.spawn(async move {
                    let timed_out = |_| Err(format!("no answer within {} s", LOOKUP_LIMIT.as_secs()));
                    let result = tokio::time::timeout(LOOKUP_LIMIT, lookup).await.unwrap_or_else(timed_out);
                    (name, result)
                });
            }
        }
        self.hosts.values().filter_map(|host| host.due).min()
    }

    fn ended(&mut self, name: &str, result: Result<Found, String>) {
        // Nobody wants it any more.
        let Some(host) = self.hosts.get_mut(name) else { return };
        host.tried = true;
        match result {
            Ok(found) if found.addresses.iter().any(|address| is_virtual(*address)) => {
                host.failed(
                    name,
                    "a sidecar answered it, with a virtual address: exempt the controller from redirection",
                );
            }
            Ok(found) if !found.addresses.is_empty() => {
                host.due = Some(Instant::now() + found.ttl.clamp(MIN_TTL, MAX_TTL));
                host.addresses =
                    found.addresses.into_iter().map(|ip| ip.to_canonical()).take(MAX_ADDRESSES).collect();
                host.fault = None;
            }
            Ok(_) => host.failed(name, "it has no address"),
            Err(reason) => host.failed(name, &reason),
        }
    }

    fn publish(&self, externals: &[External], sync: &Sync) {
        let last = Arc::clone(&self.sender.borrow());
        let mut snapshot = Snapshot { sync: sync.clone(), ..Snapshot::default() };
        let mut all_tried = true;
        for external in externals {
            let Ok(key) = ServiceKey::parse(&external.service) else { continue };
            let tried = external.endpoints.is_some()
                || external.hosts.iter().all(|host| self.hosts.get(host).is_some_and(|host| host.tried));
            all_tried &= tried;
            let service = if tried { Some(self.service(&key, external)) } else { None };
            // What was known before stays while a host that is new to it is tried.
            let held = last.services.get(&key).cloned();
            let service = match (service, held) {
                (Some(service), Some(held)) if *held == service => Some(held),
                (Some(service), _) => Some(Arc::new(service)),
                (None, held) => held,
            };
            if let Some(service) = service {
                snapshot.services.insert(key, service);
            }
        }
        if !all_tried && last.sync == Sync::Never {
            snapshot.sync = Sync::Never;
        }
        let faults = self.hosts.iter().filter_map(|(name, host)| {
            host.fault.as_ref().map(|reason| Fault { subject: name.clone(), reason: reason.clone() })
        });
        snapshot.faults = faults.take(MAX_FAULTS).collect();
        self.sender.send_if_modified(|held| {
            let changed = **held != snapshot;
            if changed {
                *held = Arc::new(snapshot);
            }
            changed
        });
    }

    fn service(&self, key: &ServiceKey, external: &External) -> SourceService {
        let ports: BTreeMap<u16, u16> = external.ports.iter().map(|port| (port.port, port.port)).collect();
        let instance = |id: String, address: IpAddr, weight: u16, zone: &str| Instance {
            id,
            address,
            ports: ports.clone(),
            weight: weight.into(),
            health: Health::Healthy,
            identity: external.identity.clone(),
            region: String::new(),
            zone: zone.to_owned(),
            node: Arc::default(),
            labels: Arc::default(),
        };
        let mut instances: BTreeMap<IpAddr, Instance> = BTreeMap::new();
        match &external.endpoints {
            Some(endpoints) => {
                // A weight of 0 takes nothing.
                for endpoint in endpoints.iter().filter(|endpoint| endpoint.weight != Some(0)) {
                    let zone = endpoint.zone.as_deref().unwrap_or_default();
                    let address = endpoint.address.to_canonical();
                    let id = address.to_string();
                    instances.insert(address, instance(id, address, endpoint.weight.unwrap_or(1), zone));
                }
            }
            None => {
                for address in external
                    .hosts
                    .iter()
                    .filter_map(|host| self.hosts.get(host))
                    .flat_map(|host| &host.addresses)
                {
                    instances.insert(*address, instance(address.to_string(), *address, 1, ""));
                }
            }
        }
        let mut instances: Vec<Instance> = instances.into_values().collect();
        instances.sort_by(|a, b| a.id.cmp(&b.id));
        SourceService {
            key: key.clone(),
            ports: external
                .ports
                .iter()
                .map(|port| ServicePort {
                    port: port.port,
                    name: port.name.clone().unwrap_or_default(),
                    protocol: protocol(port.protocol),
                })
                .collect(),
            protocol: Protocol::Unspecified,
            virtual_addresses: Vec::new(),
            names: external.hosts.iter().map(|host| host.trim_end_matches('.').to_owned()).collect(),
            reach: Reach::default(),
            instances,
        }
    }
}

fn protocol(protocol: ExternalProtocol) -> Protocol {
    match protocol {
        // Which version, the first bytes say.
        ExternalProtocol::Http => Protocol::Unspecified,
        ExternalProtocol::Http2 => Protocol::Http2,
        ExternalProtocol::Grpc => Protocol::Grpc,
        ExternalProtocol::Tcp => Protocol::Tcp,
    }
}

#[cfg(test)]
mod tests;
