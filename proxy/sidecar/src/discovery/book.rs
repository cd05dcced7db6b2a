//! What is subscribed, what is held, what to say next: the delta ADS client without its stream.
//!
//! The rules that make it a last-good client:
//! - A resource that does not check out is refused with its fault (NACK), and what was held of it stays; the good ones
//!   of the same push are taken.
//! - Losing the stream changes nothing that is held. On reconnect the client says the versions that it holds.
//! - "Removed" is an answer of a synced source: the destination is not found, the service has no endpoints. Without
//!   an answer a question stays open.
//! - Nothing leaves while the stream is down; else what is unused for long does.

mod leads_to;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use outrigger_api::{
    MESH_NAME, TRUST_BUNDLE_NAME,
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status},
    type_url, v1,
};
use outrigger_certs::SpiffeId;
use outrigger_core::model::{Destination, Service};
use tokio::{sync::oneshot, time::Instant};

use super::check::{self, checked_service, decode};
use super::directory::{Answer, Ask, Entry, Found, Key, Known, ServiceHandle, Target};
use crate::{
    certificates,
    context::{Context, InboundPolicy},
    ready::Blocker,
};

/// A destination that nobody dialled for this long leaves.
const IDLE: Duration = Duration::from_mins(10);
/// The same for one that is not found: there may be one for every address of the Internet.
const IDLE_NOT_FOUND: Duration = Duration::from_mins(1);
/// How long "not found" may be believed without looking here again.
const NOT_FOUND: Duration = Duration::from_secs(5);
/// With the stream down for this long a question is answered with silence at once.
const GRACE: Duration = Duration::from_secs(1);
/// Connections that wait for an answer, over all destinations.
const MAX_WAITERS: usize = 8 * 1024;
/// gRPC's code for a NACK (`google.rpc.Code.INVALID_ARGUMENT`).
const INVALID_ARGUMENT: i32 = 3;
/// Faults spelled out in one NACK.
const MAX_FAULTS: usize = 8;

/// A resource type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Mesh,
    TrustBundle,
    Inbound,
    Destination,
    Service,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Mesh, Self::TrustBundle, Self::Inbound, Self::Destination, Self::Service];

    fn type_url(self) -> &'static str {
        match self {
            Self::Mesh => type_url::MESH,
            Self::TrustBundle => type_url::TRUST_BUNDLE,
            Self::Inbound => type_url::INBOUND,
            Self::Destination => type_url::DESTINATION,
            Self::Service => type_url::SERVICE,
        }
    }

    fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

/// One subscribed resource.
pub(super) struct Held {
    pub(super) state: State,
    /// As the controller last said it for what we hold.
    pub(super) version: Option<String>,
    /// When the state last changed.
    pub(super) since: Instant,
    last_used: Instant,
    /// The fault of the last push, while it is refused.
    pub(super) refused: Option<String>,
    /// A service whose routes lead to services that are not known yet: what is in `state` holds until they are.
    pending: Option<Arc<Service>>,
}

pub(super) enum State {
    Asked,
    Removed,
    Destination(Destination),
    Service(ServiceHandle),
    /// A resource whose content lives elsewhere in the context.
    Applied,
}

/// What discovery holds. Locked for the length of a call, by tasks of the control thread only.
pub(crate) struct Book {
    pub(super) ctx: Arc<Context>,
    pub(super) held: BTreeMap<Kind, HashMap<Arc<str>, Held>>,
    waiters: HashMap<Key, Vec<oneshot::Sender<Arc<Entry>>>>,
    waiting: usize,
    /// Not yet said on the stream. (subscribe, unsubscribe)
    unsaid: BTreeMap<Kind, (Vec<String>, Vec<String>)>,
    pub(super) connected: bool,
    /// When the stream went up or down.
    pub(super) since: Instant,
    pub(super) claims: Vec<v1::ClaimStatus>,
}

impl Book {
    pub(super) fn new(ctx: Arc<Context>) -> Self {
        let mut book = Self {
            ctx,
            held: Kind::ALL.into_iter().map(|kind| (kind, HashMap::new())).collect(),
            waiters: HashMap::new(),
            waiting: 0,
            unsaid: BTreeMap::new(),
            connected: false,
            since: Instant::now(),
            claims: Vec::new(),
        };
        book.subscribe(Kind::Mesh, MESH_NAME.into());
        book.subscribe(Kind::TrustBundle, TRUST_BUNDLE_NAME.into());
        book
    }

    /// A worker's question. It is answered at once, parked, or dropped, which means silence.
    pub(super) fn ask(&mut self, ask: Ask) {
        let Ask { key, reply } = ask;
        let now = Instant::now();
        let (kind, name) = resource(&key);
        if !self.held[&kind].contains_key(&name) {
            if !self.make_room(kind) {
                return;
            }
            self.subscribe(kind, name.clone());
        }
        if let Some(held) = self.held_mut(kind).get_mut(&name) {
            held.last_used = now;
        }
        if let Some(answer) = self.answer(&key, now) {
            let entry = Entry::new(answer);
            let mut known = Known::clone(&self.ctx.directory.known());
            known.insert(key, entry.clone());
            self.ctx.directory.publish(known);
            // A worker that waits no longer needs no answer.
            let _ = reply.send(entry);
            return;
        }
        let silent = !self.connected && now.duration_since(self.since) > GRACE;
        if silent || self.waiting >= MAX_WAITERS {
            return;
        }
        self.waiting += 1;
        self.waiters.entry(key).or_default().push(reply);
    }

    /// The stream is up: everything that is subscribed, with the versions that are held.
    pub(super) fn connected(&mut self, own: &SpiffeId) -> Vec<DeltaDiscoveryRequest> {
        self.connected = true;
        self.since = Instant::now();
        self.ctx.control.set_connected(true);
        // A leaf of another identity (a new token) asks for its own side.
        let inbound = self.held_mut(Kind::Inbound);
        inbound.retain(|name, _| **name == *own.as_str());
        if inbound.is_empty() {
            self.subscribe(Kind::Inbound, own.as_str().into());
        }
        self.unsaid.clear();
        // "Not found" was the word of the stream before; on this one the question is open until it is said again.
        for held in self.held.values_mut().flat_map(HashMap::values_mut) {
            if matches!(held.state, State::Removed) {
                held.state = State::Asked;
            }
        }
        let mut node = Some(Node {
            id: own.as_str().to_owned(),
            cluster: String::new(),
            user_agent_name: concat!("outrigger-proxy/", env!("CARGO_PKG_VERSION")).to_owned(),
        });
        let mut requests = Vec::new();
        for (kind, held) in &self.held {
            if held.is_empty() {
                continue;
            }
            let versions = held
                .iter()
                .filter_map(|(name, held)| Some((name.to_string(), held.version.clone()?)))
                .collect();
            requests.push(DeltaDiscoveryRequest {
                node: node.take(),
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: held.keys().map(ToString::to_string).collect(),
                initial_resource_versions: versions,
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }

    /// The stream is down. What is held stays.
    pub(super) fn disconnected(&mut self) {
        if self.connected {
            self.connected = false;
            self.since = Instant::now();
        }
        self.ctx.control.set_connected(false);
    }

    /// What has to be said since the last call.
    pub(super) fn unsaid(&mut self) -> Vec<DeltaDiscoveryRequest> {
        std::mem::take(&mut self.unsaid)
            .into_iter()
            .map(|(kind, (subscribe, unsubscribe))| DeltaDiscoveryRequest {
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                ..DeltaDiscoveryRequest::default()
            })
            .collect()
    }

    /// Takes a push; returns its ACK or NACK.
    pub(super) fn response(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let mut faults = Vec::new();
        let now = Instant::now();
        if let Some(kind) = Kind::of(&response.type_url) {
            let mut moved = false;
            for resource in response.resources {
                let name: Arc<str> = resource.name.into();
                // What we unsubscribed a moment ago may still be on its way.
                if !self.held[&kind].contains_key(&name) {
                    continue;
                }
                let value = resource.resource.map(|any| any.value).unwrap_or_default();
                let applied = self.apply(kind, &name, &value);
                let outcome = if applied.is_ok() { "applied" } else { "refused" };
                self.ctx.control.resource(outcome);
                let Some(held) = self.held_mut(kind).get_mut(&name) else { continue };
                match applied {
                    Ok(state) => {
                        held.version = Some(resource.version);
                        held.refused = None;
                        held.since = now;
                        if let Some(state) = state {
                            moved |= replace(&mut held.state, state);
                        }
                    }
                    Err(fault) => {
                        tracing::error!(kind = ?kind, "refused a pushed resource, keeping the last good one: {fault}");
                        held.refused = Some(fault.clone());
                        faults.push(fault);
                    }
                }
            }
            for name in response.removed_resources {
                moved |= self.removed(kind, &name, now);
            }
            moved |= leads_to::take_up(self.held_mut(Kind::Service));
            if moved {
                self.rebuild(now);
            }
        } else {
            faults.push(format!("unknown type {:?}", response.type_url));
        }
        let more = faults.len().saturating_sub(MAX_FAULTS);
        faults.truncate(MAX_FAULTS);
        if more > 0 {
            faults.push(format!("and {more} more"));
        }
        DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail: (!faults.is_empty())
                .then(|| Status { code: INVALID_ARGUMENT, message: faults.join("; ") }),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Once a second: forgets who waits no longer, and what nobody uses.
    pub(super) fn tick(&mut self) {
        self.waiters.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
        self.waiting = self.waiters.values().map(Vec::len).sum();
        if self.connected {
            self.sweep(Instant::now());
        }
    }

    fn held_mut(&mut self, kind: Kind) -> &mut HashMap<Arc<str>, Held> {
        self.held.entry(kind).or_default()
    }

    fn subscribe(&mut self, kind: Kind, name: Arc<str>) {
        let now = Instant::now();
        let (subscribe, unsubscribe) = self.unsaid.entry(kind).or_default();
        // Left and wanted again before either was said.
        if let Some(at) = unsubscribe.iter().position(|other| **other == *name) {
            unsubscribe.swap_remove(at);
        }
        subscribe.push(name.to_string());
        let held = Held {
            state: State::Asked,
            version: None,
            since: now,
            last_used: now,
            refused: None,
            pending: None,
        };
        self.held_mut(kind).insert(name, held);
        self.count();
    }

    fn unsubscribe(&mut self, kind: Kind, name: &str) {
        self.held_mut(kind).remove(name);
        let (subscribe, unsubscribe) = self.unsaid.entry(kind).or_default();
        if let Some(at) = subscribe.iter().position(|other| other == name) {
            subscribe.swap_remove(at);
        } else {
            unsubscribe.push(name.to_owned());
        }
        self.count();
    }

    fn count(&self) {
        self.ctx.control.set_subscribed(self.held[&Kind::Destination].len(), self.held[&Kind::Service].len());
    }

    /// Whether one more destination may be asked for; the one unused longest makes room.
    fn make_room(&mut self, kind: Kind) -> bool {
        let limit = self.ctx.config.limits.destinations as usize;
        if self.held[&kind].len() < limit {
            return true;
        }
        self.ctx.control.full();
        if !self.connected || kind == Kind::Service {
            return false;
        }
        let now = Instant::now();
        self.note_use(now);
        let oldest = self.held[&kind]
            .iter()
            .filter(|(_, held)| now.duration_since(held.last_used) > GRACE)
            .min_by_key(|(_, held)| (matches!(held.state, State::Destination(_)), held.last_used))
            .map(|(name, _)| name.clone());
        let Some(oldest) = oldest else { return false };
        self.unsubscribe(kind, &oldest);
        self.rebuild(now);
        true
    }

    /// Takes a resource that was pushed. `None`: a service, which waits in `pending`.
    fn apply(&mut self, kind: Kind, name: &Arc<str>, value: &[u8]) -> Result<Option<State>, String> {
        let ctx = self.ctx.clone();
        match kind {
            Kind::Mesh => {
                let (ranges, hosts) = check::mesh(decode(name, value)?, &ctx.config.trust_domain)?;
                ctx.directory.set_ranges(ranges);
                ctx.directory.set_external_hosts(hosts);
                ctx.ready.clear(Blocker::Mesh);
                Ok(Some(State::Applied))
            }
            Kind::TrustBundle => {
                certificates::set_bundle(&ctx, decode(name, value)?)
                    .map_err(|error| format!("{name}: {error}"))?;
                Ok(Some(State::Applied))
            }
            Kind::Inbound => {
                let old = ctx.inbound.load();
                let policy = InboundPolicy::from_wire(decode(name, value)?, &ctx.config, &old)
                    .map_err(|fault| format!("{name}: {fault}"))?;
                if let Some(policy) = policy {
                    tracing::info!(mode = ?policy.mode, terminating = policy.terminating, "new inbound policy");
                    ctx.inbound.store(policy);
                }
                ctx.ready.clear(Blocker::Policy);
                Ok(Some(State::Applied))
            }
            Kind::Destination => {
                let destination =
                    Destination::from_wire(name, decode(name, value)?).map_err(|error| error.to_string())?;
                if !self.held[&Kind::Service].contains_key(&destination.service) {
                    self.subscribe(Kind::Service, destination.service.clone());
                }
                Ok(Some(State::Destination(destination)))
            }
            Kind::Service => {
                let own = ctx.credentials.leaf();
                let namespace = own.as_ref().map_or("", |leaf| leaf.id().namespace());
                let service = checked_service(name, value, &ctx.config.trust_domain, namespace)?;
                for backend in &service.leads_to {
                    if !self.held[&Kind::Service].contains_key(backend) {
                        self.subscribe(Kind::Service, backend.clone());
                    }
                }
                if let Some(held) = self.held_mut(Kind::Service).get_mut(name) {
                    held.pending = Some(Arc::new(service));
                }
                Ok(None)
            }
        }
    }

    /// Whether the directory changes.
    fn removed(&mut self, kind: Kind, name: &str, now: Instant) -> bool {
        let Some(held) = self.held_mut(kind).get_mut(name) else { return false };
        held.version = None;
        held.refused = None;
        held.pending = None;
        match &held.state {
            // What every proxy holds is replaced, never removed.
            State::Applied | State::Removed => return false,
            State::Service(handle) => {
                let old = handle.load();
                handle.store(Arc::new(Service { endpoints: Vec::new(), ..Service::clone(&old) }));
            }
            State::Asked | State::Destination(_) => held.state = State::Removed,
        }
        held.since = now;
        self.ctx.control.resource("removed");
        true
    }

    /// What is known of a key.
    fn answer(&self, key: &Key, now: Instant) -> Option<Answer> {
        let (kind, name) = resource(key);
        let held = self.held[&kind].get(&name)?;
        let not_found = |held: &Held| {
            // On a live stream silence means "still so"; without one it ages.
            let from = if self.connected { now } else { held.since };
            Answer::NotFound(from + NOT_FOUND)
        };
        match &held.state {
            State::Asked | State::Applied => None,
            State::Removed => Some(not_found(held)),
            State::Service(handle) => {
                let target = Target { service: handle.clone(), port: 0, endpoint: None };
                Some(Answer::Found(Found { target, addresses: [].into() }))
            }
            State::Destination(destination) => {
                let service = self.held[&Kind::Service].get(&destination.service)?;
                match &service.state {
                    State::Service(handle) => Some(Answer::Found(Found {
                        target: Target {
                            service: handle.clone(),
                            port: destination.port,
                            endpoint: destination.endpoint.clone(),
                        },
                        addresses: destination.virtual_addresses.clone().into(),
                    })),
                    State::Removed => Some(not_found(service)),
                    _ => None,
                }
            }
        }
    }

    /// Publishes what is known, and answers who waits. Entries that did not change stay the same object, so that
    /// their marks of use survive.
    fn rebuild(&mut self, now: Instant) {
        let old = self.ctx.directory.known();
        let mut known = Known::new();
        let keys = [Kind::Destination, Kind::Service]
            .into_iter()
            .flat_map(|kind| self.held[&kind].keys().map(move |name| key(kind, name)));
        for key in keys {
            let Some(answer) = self.answer(&key, now) else { continue };
            let entry = match old.get(&key) {
                Some(entry) if same(&entry.answer, &answer) => entry.clone(),
                _ => Entry::new(answer),
            };
            known.insert(key, entry);
        }
        let answered: Vec<Key> = self.waiters.keys().filter(|key| known.contains_key(key)).cloned().collect();
        self.ctx.directory.publish(known.clone());
        for key in answered {
            for waiter in self.waiters.remove(&key).unwrap_or_default() {
                self.waiting = self.waiting.saturating_sub(1);
                let _ = waiter.send(known[&key].clone());
            }
        }
    }

    fn note_use(&mut self, now: Instant) {
        for (key, entry) in &*self.ctx.directory.known() {
            if entry.take_used() {
                let (kind, name) = resource(key);
                if let Some(held) = self.held.get_mut(&kind).and_then(|held| held.get_mut(&name)) {
                    held.last_used = now;
                }
            }
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.note_use(now);
        let idle = |held: &Held| {
            let limit = if matches!(held.state, State::Destination(_) | State::Service(_)) {
                IDLE
            } else {
                IDLE_NOT_FOUND
            };
            now.duration_since(held.last_used) > limit
        };
        let destinations: Vec<Arc<str>> = self.held[&Kind::Destination]
            .iter()
            .filter(|(_, held)| idle(held))
            .map(|(name, _)| name.clone())
            .collect();
        for name in &destinations {
            self.unsubscribe(Kind::Destination, name);
        }
        if !destinations.is_empty() {
            self.rebuild(now);
        }
        // What routes lead to goes when the routes have gone.
        let led_to = leads_to::all(&self.held[&Kind::Service]);
        let mut needed: HashMap<&str, usize> = HashMap::new();
        for held in self.held[&Kind::Destination].values() {
            if let State::Destination(destination) = &held.state {
                *needed.entry(&destination.service).or_default() += 1;
            }
        }
        let services: Vec<Arc<str>> = self.held[&Kind::Service]
            .iter()
            .filter(|(name, held)| {
                // One handle here and one in the directory; more are a worker's, or a snapshot on its way out.
                let in_use = matches!(&held.state, State::Service(handle) if handle.count() > 2);
                idle(held) && !needed.contains_key(&***name) && !led_to.contains(*name) && !in_use
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in &services {
            self.unsubscribe(Kind::Service, name);
        }
        if !services.is_empty() {
            self.rebuild(now);
        }
    }
}

/// Replaces a state; whether the directory has to be made anew.
fn replace(state: &mut State, new: State) -> bool {
    let moved = match (&*state, &new) {
        (State::Destination(old), State::Destination(new)) => old != new,
        (State::Service(old), State::Service(new)) => old != new,
        (State::Applied, State::Applied) => false,
        _ => true,
    };
    *state = new;
    moved
}

fn same(old: &Answer, new: &Answer) -> bool {
    match (old, new) {
        (Answer::Found(old), Answer::Found(new)) => {
            old.target.service == new.target.service
                && old.target.port == new.target.port
                && old.target.endpoint == new.target.endpoint
                && old.addresses == new.addresses
        }
        _ => false,
    }
}

fn resource(key: &Key) -> (Kind, Arc<str>) {
    match key {
        Key::Address(address) => (Kind::Destination, address.to_string().into()),
        Key::Name(name) => (Kind::Destination, name.clone()),
        Key::Service(name) => (Kind::Service, name.clone()),
    }
}

fn key(kind: Kind, name: &Arc<str>) -> Key {
    match (kind, name.parse()) {
        (Kind::Service, _) => Key::Service(name.clone()),
        (_, Ok(address)) => Key::Address(address),
        _ => Key::Name(name.clone()),
    }
}

#[cfg(test)]
mod tests;
