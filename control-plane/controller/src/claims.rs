//! Which workload serves which instance.
//!
//! A Consul registration proves nothing: anyone who may write to the catalog can register an address. An instance is
//! meshed only when the sidecar beside it has said so on its own authenticated stream, and its token allows both the
//! service and the address. An accepted claim stays while the instance is in its source, over the loss of the stream
//! and restarts of the controller: a client must never fall back to plaintext because a stream broke. For the same reason
//! a service that ever had a claimed instance counts as meshed for as long as it is in a source: when its last claimed
//! instance leaves, what remains there is not to be believed more than before.
//!
//! Only the table is here; who may claim what is decided in [`crate::mesh`], which sees tokens and catalog too.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use outrigger_certs::SpiffeId;
use serde::{Deserialize, Serialize};

use crate::sources::ServiceKey;
use crate::store::{Change, Table};

/// Claims of one announcement: a workload serves a handful of services.
pub(crate) const MAX_CLAIMS: usize = 64;

/// A stream that announces. Unique in the life of a controller.
pub(crate) type StreamId = u64;

/// An accepted claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Who proved to be there.
    pub(crate) identity: SpiffeId,
    /// Since when this identity holds it, Unix seconds: of two services that claim one address the older is meant.
    pub(crate) since: u64,
    /// The workload is leaving.
    pub(crate) draining: bool,
    /// The stream that made it, while it is open.
    holder: Option<StreamId>,
}

/// What the store keeps of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    identity: String,
    since: u64,
    #[serde(default)]
    draining: bool,
}

/// Another workload holds the claim on an open stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    /// Who.
    pub(crate) by: SpiffeId,
}

/// Every claim. Pure: the owner stores the changes.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_service: HashMap<ServiceKey, BTreeMap<SocketAddr, Claim>>,
    by_stream: HashMap<StreamId, BTreeSet<(ServiceKey, SocketAddr)>>,
    meshed: HashSet<ServiceKey>,
}

impl Claims {
    /// Takes what the store holds.
    pub(crate) fn load(records: Vec<(String, Record)>, meshed: &[(String, u64)]) -> Self {
        let meshed = meshed.iter().filter_map(|(service, _)| ServiceKey::parse(service).ok()).collect();
        let mut claims = Self { meshed, ..Self::default() };
        for (key, record) in records {
            let parsed = key
                .split_once(' ')
                .and_then(|(service, at)| Some((ServiceKey::parse(service).ok()?, at.parse().ok()?)));
            let (Some((service, at)), Ok(identity)) = (parsed, record.identity.parse()) else { continue };
            let claim = Claim { identity, since: record.since, draining: record.draining, holder: None };
            claims.by_service.entry(service).or_default().insert(at, claim);
        }
        claims
    }

    /// Whether an instance of the service was ever claimed.
    pub(crate) fn is_meshed(&self, service: &ServiceKey) -> bool {
        self.meshed.contains(service)
    }

    /// The claim on `at` as an instance of `service`.
    pub(crate) fn get(&self, service: &ServiceKey, at: SocketAddr) -> Option<&Claim> {
        self.by_service.get(service)?.get(&at)
    }

    /// Records a claim that was found to be allowed. `Ok(true)`: it changes what others see of the service.
    pub(crate) fn accept(
        &mut self,
        stream: StreamId,
        identity: &SpiffeId,
        (service, at): (&ServiceKey, SocketAddr),
        draining: bool,
        now: SystemTime,
        changes: &mut Vec<Change>,
    ) -> Result<bool, Held> {
        let of_service = self.by_service.entry(service.clone()).or_default();
        let before = of_service.get(&at);
        if let Some(claim) = before
            && claim.identity != *identity
            && claim.holder.is_some_and(|holder| holder != stream)
        {
            return Err(Held { by: claim.identity.clone() });
        }
        let since = match before {
            Some(claim) if claim.identity == *identity => claim.since,
            _ => now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        let changed = before.is_none_or(|claim| claim.identity != *identity || claim.draining != draining);
        let taken_from = before.and_then(|claim| claim.holder).filter(|holder| *holder != stream);
        let claim = Claim { identity: identity.clone(), since, draining, holder: Some(stream) };
        if changed {
            let record = Record { identity: identity.to_string(), since, draining };
            changes.push(Change::put(Table::Claims, store_key(service, at), &record));
        }
        of_service.insert(at, claim);
        if self.meshed.insert(service.clone()) {
            changes.push(Change::put(Table::Meshed, service.to_string(), &since));
        }
        if let Some(other) = taken_from
            && let Some(held) = self.by_stream.get_mut(&other)
        {
            held.remove(&(service.clone(), at));
        }
        self.by_stream.entry(stream).or_default().insert((service.clone(), at));
        Ok(changed)
    }

    /// The stream holds nothing but `keep` any more. Returns what it let go: sticky claims without a holder now.
    pub(crate) fn release(
        &mut self,
        stream: StreamId,
        keep: &BTreeSet<(ServiceKey, SocketAddr)>,
    ) -> Vec<(ServiceKey, SocketAddr)> {
        let Some(held) = self.by_stream.get_mut(&stream) else { return Vec::new() };
        let gone: Vec<_> = held.difference(keep).cloned().collect();
        for (service, at) in &gone {
            held.remove(&(service.clone(), *at));
            if let Some(claim) = self.by_service.get_mut(service).and_then(|claims| claims.get_mut(at)) {
                claim.holder = None;
            }
        }
        if held.is_empty() {
            self.by_stream.remove(&stream);
        }
        gone
    }

    /// Forgets the claims on a service that nobody holds and whose instance is gone, as a synced source says; and, where
    /// the service itself is gone (`present` is `None`) and no claim is left, that it was meshed.
    pub(crate) fn prune(
        &mut self,
        service: &ServiceKey,
        present: Option<&dyn Fn(SocketAddr) -> bool>,
        changes: &mut Vec<Change>,
    ) {
        if let Some(claims) = self.by_service.get_mut(service) {
            claims.retain(|at, claim| {
                let keep = claim.holder.is_some() || present.is_some_and(|present| present(*at));
                if !keep {
                    changes.push(Change::delete(Table::Claims, store_key(service, *at)));
                }
                keep
            });
            if !claims.is_empty() {
                return;
            }
            self.by_service.remove(service);
        }
        if present.is_none() && self.meshed.remove(service) {
            changes.push(Change::delete(Table::Meshed, service.to_string()));
        }
    }

    /// Every service that something is remembered of; some come twice.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.by_service.keys().chain(&self.meshed)
    }
}

fn store_key(service: &ServiceKey, at: SocketAddr) -> String {
    format!("{service} {at}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_outlives_its_stream_but_not_its_instance() {
        let (service, at) = (ServiceKey::parse("orders.shop").unwrap(), "10.0.0.1:80".parse().unwrap());
        let a: SpiffeId = "spiffe://t/ns/shop/sa/a".parse().unwrap();
        let b: SpiffeId = "spiffe://t/ns/shop/sa/b".parse().unwrap();
        let now = SystemTime::now();
        let mut changes = Vec::new();
        let mut claims = Claims::default();
        assert_eq!(claims.accept(1, &a, (&service, at), false, now, &mut changes), Ok(true));
        assert_eq!(claims.accept(1, &a, (&service, at), false, now, &mut changes), Ok(false));
        assert_eq!(
            claims.accept(2, &b, (&service, at), false, now, &mut changes),
            Err(Held { by: a.clone() })
        );
        // The same workload on a new connection, before the old one is known to be dead.
        assert_eq!(claims.accept(3, &a, (&service, at), true, now, &mut changes), Ok(true));
        assert!(claims.release(1, &BTreeSet::new()).is_empty(), "stream 3 took it over");
        claims.prune(&service, None, &mut changes);
        assert!(claims.get(&service, at).is_some(), "a held claim waits for its instance");
        assert_eq!(claims.release(3, &BTreeSet::new()).len(), 1);
        claims.prune(&service, Some(&|_| true), &mut changes);
        assert!(claims.get(&service, at).is_some_and(|claim| claim.draining), "sticky, and still draining");

        let mut stored = std::collections::BTreeMap::new();
        for (key, value) in changes.drain(..).map(Change::into_parts) {
            // The record of the meshed service holds a number only.
            if let Ok(record) = serde_json::from_slice(&value.unwrap()) {
                stored.insert(key, record);
            }
        }
        let mut claims = Claims::load(stored.into_iter().collect(), &[(service.to_string(), 0)]);
        assert!(claims.get(&service, at).is_some_and(|claim| claim.identity == a && claim.draining));
        assert_eq!(
            claims.accept(1, &b, (&service, at), false, now, &mut changes),
            Ok(true),
            "nobody holds it"
        );
        claims.release(1, &BTreeSet::new());
        claims.prune(&service, Some(&|_| false), &mut changes);
        assert!(claims.get(&service, at).is_none());
        assert!(claims.is_meshed(&service), "other instances are there, and nobody has vouched for them");
        claims.prune(&service, None, &mut changes);
        assert!(!claims.is_meshed(&service), "a new service of this name starts anew");
        assert_eq!(claims.services().count(), 0);
    }
}
