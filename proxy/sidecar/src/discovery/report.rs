//! What discovery holds, for people: source, version and age of every entry.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::book::{Book, Held, Kind, State};

impl Book {
    /// For `/config`.
    pub(crate) fn report(&self) -> Value {
        let now = Instant::now();
        let seconds = |since: Instant| now.duration_since(since).as_secs();
        let entries = |kind: Kind| -> Value {
            let mut entries: Vec<(&Arc<str>, &Held)> = self.held[&kind].iter().collect();
            entries.sort_by_key(|(name, _)| *name);
            entries.into_iter().map(|(name, held)| report_entry(name, held, seconds(held.since))).collect()
        };
        let claims: Vec<Value> = self
            .claims
            .iter()
            .map(|claim| {
                json!({
                    "service": claim.service, "address": claim.address, "port": claim.port,
                    "accepted": claim.accepted, "message": claim.message,
                })
            })
            .collect();
        let hosts = self.ctx.directory.external_hosts();
        let external_hosts: BTreeMap<&str, &str> =
            hosts.iter().map(|(host, service)| (host, &**service)).collect();
        json!({
            "controller": { "connected": self.connected, "for_seconds": seconds(self.since) },
            "claims": claims,
            "mesh": entries(Kind::Mesh),
            "external_hosts": external_hosts,
            "trust_bundle": entries(Kind::TrustBundle),
            "inbound": entries(Kind::Inbound),
            "destinations": entries(Kind::Destination),
            "services": entries(Kind::Service),
        })
    }
}

fn report_entry(name: &str, held: &Held, age: u64) -> Value {
    let mut entry = json!({ "name": name, "version": held.version, "age_seconds": age });
    let state = match &held.state {
        State::Asked => "asked",
        State::Removed => "not found",
        State::Destination(destination) => {
            entry["service"] = json!(&*destination.service);
            entry["port"] = json!(destination.port);
            entry["endpoint"] = json!(destination.endpoint.as_deref());
            entry["virtual_addresses"] = json!(destination.virtual_addresses);
            "found"
        }
        State::Service(handle) => {
            let service = handle.load();
            entry["source"] = json!(&*service.source);
            entry["endpoints"] = service
                .endpoints
                .iter()
                .map(|endpoint| {
                    json!({
                        "id": &*endpoint.id, "address": endpoint.address, "ports": endpoint.ports,
                        "health": format!("{:?}", endpoint.health), "identity": endpoint.identity.as_deref(),
                        "weight": endpoint.weight, "zone": &*endpoint.zone,
                    })
                })
                .collect();
            "found"
        }
        State::Applied => "applied",
    };
    entry["state"] = json!(state);
    if let Some(fault) = &held.refused {
        entry["refused"] = json!(fault);
    }
    entry
}
