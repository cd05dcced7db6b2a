//! The state of one delta ADS stream, without I/O.
//!
//! A name that a client subscribed to is *pending* until it was looked at. At most one response of a type is in
//! flight; what changes meanwhile becomes pending again, once, so that a slow client costs memory for its
//! subscriptions and nothing for its slowness. What was sent is remembered by version, whether the client took it or
//! refused it (NACK): a refused version is not sent again until it changes, so that the two never loop.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use outrigger_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use outrigger_policy::Key as PolicyKey;
use prost::Message;

use super::Dirty;
use crate::catalog::Key;
use crate::compile::Kind;
use crate::mesh::Answer;
use crate::sources::ServiceKey;

/// Resources in one response, and the bytes after which no more are added: a big subscription is answered in steps, so
/// that no message is much larger than its largest resource.
const RESPONSE_RESOURCES: usize = 512;
const RESPONSE_BYTES: usize = 1024 * 1024;
/// Characters of a resource name (the longest is a DNS name or a SPIFFE id) and of a NACK's message that are kept.
const MAX_NAME: usize = 600;
const MAX_MESSAGE: usize = 500;
/// Names that are kept of a refused response.
const MAX_NACKED_NAMES: usize = 10;

/// The state of one stream.
#[derive(Debug)]
pub(crate) struct Session {
    connection: u64,
    limit: usize,
    subscriptions: usize,
    nonce: u64,
    types: BTreeMap<Kind, Type>,
    /// What the names depend on.
    names: HashMap<Key, BTreeSet<(Kind, Arc<str>)>>,
}

#[derive(Debug, Default)]
struct Type {
    names: HashMap<Arc<str>, Sent>,
    pending: BTreeSet<Arc<str>>,
    in_flight: Option<InFlight>,
    nack: Option<Nack>,
    first_seen: bool,
}

/// What the client was told of a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Sent {
    /// The last thing sent, or echoed by the client after a reconnect.
    said: Said,
    /// Whether the client took it or refused it; `None` until it has said so.
    taken: Option<bool>,
    /// The policies that said something in it.
    origins: Arc<[PolicyKey]>,
    /// Why the client refused it.
    refusal: Option<Arc<str>>,
}

/// What became of a policy at one proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It was sent, and the proxy has not answered.
    Sent,
    /// It is in force there.
    Accepted,
    /// The proxy refused a resource that it is in, for this reason, and keeps what it had.
    Refused(Arc<str>),
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Said {
    #[default]
    Nothing,
    Removed,
    Version(Arc<str>),
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<Arc<str>>,
}

/// The last refusal of a type.
#[derive(Debug, Clone)]
pub(crate) struct Nack {
    /// What the client said.
    pub(crate) message: String,
    /// Some of the names that it refused.
    pub(crate) names: Vec<Arc<str>>,
    /// When.
    pub(crate) at: SystemTime,
}

/// What a request did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// To be watched from now on.
    pub(crate) added: Vec<Key>,
    /// Not to be watched any more.
    pub(crate) removed: Vec<Key>,
    /// Names that were not taken: over the bound, or no name.
    pub(crate) refused: usize,
    /// The response in flight was taken (`Some(true)`) or refused (`Some(false)`).
    pub(crate) acked: Option<bool>,
}

/// One subscription, for people.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Subscription {
    name: String,
    version: Option<String>,
    state: &'static str,
}

/// One type of a session, for people.
#[derive(Debug, serde::Serialize)]
pub(crate) struct TypeView {
    subscriptions: Vec<Subscription>,
    in_flight: bool,
    nack: Option<NackView>,
}

#[derive(Debug, serde::Serialize)]
struct NackView {
    message: String,
    names: Vec<String>,
    at: u64,
}

impl Session {
    /// A stream on this connection that may hold `limit` subscriptions.
    pub(crate) fn new(connection: u64, limit: usize) -> Self {
        Self { connection, limit, subscriptions: 0, nonce: 0, types: BTreeMap::new(), names: HashMap::new() }
    }

    /// Takes a request of a known type.
    pub(crate) fn request(&mut self, kind: Kind, request: DeltaDiscoveryRequest, now: SystemTime) -> Effect {
        let mut effect = Effect::default();
        let state = self.types.entry(kind).or_default();
        let in_flight = state.in_flight.take_if(|in_flight| in_flight.nonce == request.response_nonce);
        if let Some(in_flight) = in_flight {
            effect.acked = Some(request.error_detail.is_none());
            let message = request.error_detail.as_ref().map(|status| status.message.as_str());
            for name in &in_flight.names {
                if let Some(sent) = state.names.get_mut(name) {
                    sent.refusal = message.and_then(|message| blame(message, name, &in_flight.names));
                    sent.taken = Some(sent.refusal.is_none());
                }
            }
            if let Some(status) = request.error_detail {
                let message = status.message.chars().take(MAX_MESSAGE).collect();
                let names = in_flight.names.into_iter().take(MAX_NACKED_NAMES).collect();
                state.nack = Some(Nack { message, names, at: now });
            }
        }
        // What the client still holds counts in the first request for a type, and there alone (xDS, "Resuming").
        let mut held = if std::mem::replace(&mut state.first_seen, true) {
            HashMap::new()
        } else {
            request.initial_resource_versions
        };
        for name in request.resource_names_subscribe {
            if name.is_empty() || name.len() > MAX_NAME {
                effect.refused += 1;
                continue;
            }
            let known = held.remove(&name).map(|version| Said::Version(version.into()));
            let name: Arc<str> = name.into();
            let is_new = !state.names.contains_key(&name);
            if is_new && self.subscriptions >= self.limit {
                effect.refused += 1;
                continue;
            }
            if is_new {
                self.subscriptions += 1;
                let key = key_of(kind, &name, self.connection);
                let dependents = self.names.entry(key.clone()).or_default();
                if dependents.is_empty() {
                    effect.added.push(key);
                }
                dependents.insert((kind, Arc::clone(&name)));
            }
            // Subscribing to a name again asks for it again (xDS, "Subscribing to Resources").
            let taken = known.is_some().then_some(true);
            let said = known.unwrap_or_default();
            state.names.insert(Arc::clone(&name), Sent { said, taken, ..Sent::default() });
            state.pending.insert(name);
        }
        for name in request.resource_names_unsubscribe {
            if let Some((name, _)) = state.names.remove_entry(name.as_str()) {
                state.pending.remove(&name);
                self.subscriptions -= 1;
                let key = key_of(kind, &name, self.connection);
                if let Some(dependents) = self.names.get_mut(&key) {
                    dependents.remove(&(kind, name));
                    if dependents.is_empty() {
                        self.names.remove(&key);
                        effect.removed.push(key);
                    }
                }
            }
        }
        effect
    }

    /// Something changed: what depends on it must be looked at again.
    pub(crate) fn touch(&mut self, dirty: &Dirty) {
        if dirty.all {
            for state in self.types.values_mut() {
                state.pending = state.names.keys().cloned().collect();
            }
            return;
        }
        for (kind, name) in dirty.keys.iter().filter_map(|key| self.names.get(key)).flatten() {
            if let Some(state) = self.types.get_mut(kind) {
                state.pending.insert(Arc::clone(name));
            }
        }
    }

    /// The next response of a type, if one may be sent and there is something to say.
    pub(crate) fn next(
        &mut self,
        kind: Kind,
        mut answer: impl FnMut(&str) -> Answer,
    ) -> Option<DeltaDiscoveryResponse> {
        let state = self.types.get_mut(&kind).filter(|state| state.in_flight.is_none())?;
        let mut response = DeltaDiscoveryResponse::default();
        let mut names = Vec::new();
        let mut bytes = 0;
        while names.len() < RESPONSE_RESOURCES && bytes < RESPONSE_BYTES {
            let Some(name) = state.pending.pop_first() else { break };
            let Some(sent) = state.names.get_mut(&name) else { continue };
            let mut origins = Arc::from([]);
            let said = match answer(&name) {
                // Its look-up comes again with the change that makes it known.
                Answer::Silent => continue,
                Answer::Absent => Said::Removed,
                Answer::Found(compiled) => {
                    origins = Arc::clone(&compiled.origins);
                    let said = Said::Version(Arc::clone(&compiled.version));
                    if said != sent.said {
                        let resource = Resource {
                            version: compiled.version.to_string(),
                            resource: Some(compiled.any.clone()),
                            name: name.to_string(),
                        };
                        bytes += resource.encoded_len();
                        response.resources.push(resource);
                    }
                    said
                }
            };
            if said == sent.said {
                // Others may say the same by now, and what a client echoed after a reconnect has its origins from here.
                sent.origins = origins;
                continue;
            }
            if said == Said::Removed {
                response.removed_resources.push(name.to_string());
            }
            *sent = Sent { said, taken: None, origins, refusal: None };
            names.push(name);
        }
        if names.is_empty() {
            return None;
        }
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        kind.type_url().clone_into(&mut response.type_url);
        nonce.clone_into(&mut response.nonce);
        state.in_flight = Some(InFlight { nonce, names });
        Some(response)
    }

    /// What became of each policy that is in something that was sent.
    pub(crate) fn policies(&self) -> BTreeMap<PolicyKey, Taken> {
        let mut found = BTreeMap::new();
        for sent in self.types.values().flat_map(|state| state.names.values()) {
            let taken = match (&sent.refusal, sent.taken) {
                (Some(reason), _) => Taken::Refused(Arc::clone(reason)),
                (None, Some(_)) => Taken::Accepted,
                (None, None) => Taken::Sent,
            };
            for origin in sent.origins.iter() {
                // A refusal is news, and what was not answered yet may become one.
                let worst = |old: &Taken| match (old, &taken) {
                    (Taken::Refused(_), _) | (Taken::Sent, Taken::Accepted) => old.clone(),
                    _ => taken.clone(),
                };
                let taken = found.get(origin).map_or_else(|| taken.clone(), worst);
                found.insert(origin.clone(), taken);
            }
        }
        found
    }

    /// How many names are subscribed to.
    pub(crate) fn subscriptions(&self) -> usize {
        self.subscriptions
    }

    /// For people: at most `limit` subscriptions of each type, by name.
    pub(crate) fn view(&self, limit: usize) -> BTreeMap<&'static str, TypeView> {
        let view = |state: &Type| {
            let mut names: Vec<_> = state.names.iter().collect();
            names.sort_unstable_by_key(|(name, _)| Arc::clone(name));
            let subscriptions = names.into_iter().take(limit).map(|(name, sent)| {
                let version = match &sent.said {
                    Said::Version(version) => Some(version.to_string()),
                    _ => None,
                };
                let state = match (&sent.said, sent.taken) {
                    (Said::Nothing, _) => "unanswered",
                    (_, None) => "sent",
                    (_, Some(false)) => "refused",
                    (Said::Removed, Some(true)) => "absent",
                    (Said::Version(_), Some(true)) => "acked",
                };
                Subscription { name: name.to_string(), version, state }
            });
            TypeView {
                subscriptions: subscriptions.collect(),
                in_flight: state.in_flight.is_some(),
                nack: state.nack.as_ref().map(|nack| NackView {
                    message: nack.message.clone(),
                    names: nack.names.iter().map(ToString::to_string).collect(),
                    at: nack.at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
                }),
            }
        };
        self.types.iter().map(|(kind, state)| (kind.name(), view(state))).collect()
    }
}

/// Why `name` was refused by a message about a response that held `names`; `None`: it was taken.
///
/// Outrigger's proxies judge each resource alone, and say `<name>: <reason>` of those that they refuse, joined by `; `. A
/// message that names none is about all of them.
fn blame(message: &str, name: &str, names: &[Arc<str>]) -> Option<Arc<str>> {
    let about = |name: &str, part: &str| part.strip_prefix(name).is_some_and(|rest| rest.starts_with(": "));
    let part = message.split("; ").find(|part| about(name, part));
    let names_some = || message.split("; ").any(|part| names.iter().any(|name| about(name, part)));
    let reason = match part {
        Some(part) => part,
        None if names_some() => return None,
        None => message,
    };
    Some(reason.chars().take(MAX_MESSAGE).collect::<String>().into())
}

/// What a resource depends on.
fn key_of(kind: Kind, name: &Arc<str>, connection: u64) -> Key {
    match kind {
        Kind::Mesh => Key::Mesh,
        Kind::TrustBundle => Key::TrustBundle,
        // Only the own one is ever found, and what changes in it are the claims of the connection.
        Kind::Inbound => Key::Connection(connection),
        Kind::Service => match ServiceKey::parse(name) {
            Ok(key) => Key::Service(key),
            Err(_) => Key::Name(Arc::clone(name)),
        },
        Kind::Destination => match name.parse::<SocketAddr>() {
            Ok(address) => Key::Ip(address.ip()),
            Err(_) => Key::Name(Arc::clone(name)),
        },
    }
}

#[cfg(test)]
mod tests;
