//! What became of each object, written into its status.
//!
//! One controller writes, the leader; the others watch. A round compares what every status should say with what it says and writes those
//! that differ, one after the other, at a bounded rate: a thousand routes whose Service has gone cost the API server seconds, not the
//! leader its memory. A status moves no `generation`, so that own writes wake no resolver, and a round finds nothing to do after them.
//!
//! The writes are merge patches that name the version which they were worked out from. Server-side apply would be the usual way, but the
//! Gateway API's `parents` is one atomic list of all controllers: whoever applies it owns it whole. With the version the entries of others
//! are kept as they were read, and who wrote meanwhile wins; the next round sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::api::{Patch, PatchParams};
use outrigger_policy::resolve::{Condition, ConditionReason, ConditionStatus, ConditionType};
use outrigger_policy::{Key, Kind};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio::time::Instant;

use super::held::Record;
use super::resource::Resource;
use super::{KubernetesStore, Shared, within};
use crate::policies::counts::Counts;
use crate::policies::resolver::Resolution;
use crate::replicas::Replicas;

/// Our name in the Gateway API's statuses.
pub(crate) const CONTROLLER: &str = "outrigger.dev/controller";
/// Who writes, to the API server.
const MANAGER: &str = "outrigger-status";
/// Between two rounds: what changes within this is written together.
const BATCH: Duration = Duration::from_secs(1);
/// How often proxies are counted, and how often one object is written because of nothing but that.
const COUNTS: Duration = Duration::from_secs(15);
/// Between two writes: 50 a second at most.
const PACE: Duration = Duration::from_millis(20);
/// Proxies that a status lists as having refused the object, and bytes of their reasons: the CRDs' bounds.
const LISTED_REFUSALS: usize = 10;
const MAX_REASON: usize = 1024;
/// Characters of a condition's message: enough for the first of many faults, and far below what the API server takes.
const MAX_MESSAGE: usize = 2048;

/// Writes statuses whenever `leading` says so, until it is dropped.
pub(crate) async fn run(
    store: Arc<KubernetesStore>,
    mut resolutions: watch::Receiver<Option<Arc<Resolution>>>,
    replicas: Arc<Replicas>,
    mut leading: watch::Receiver<bool>,
) {
    let shared = Arc::clone(&store.shared);
    // Ours by now, so that no store is kept alive by what describes it.
    drop(store);
    let mut pictures = shared.pictures.subscribe();
    let mut writer = StatusWriter { shared, written: BTreeMap::new() };
    loop {
        if leading.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        pictures.borrow_and_update();
        let resolution = resolutions.borrow_and_update().clone();
        if let Some(resolution) = resolution {
            writer.round(&resolution, &replicas.counts(), &leading).await;
        }
        tokio::time::sleep(BATCH).await;
        tokio::select! {
            changed = resolutions.changed() => if changed.is_err() { return },
            // A fault makes no resolution.
            changed = pictures.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(COUNTS) => {}
        }
    }
}

struct StatusWriter {
    shared: Arc<Shared>,
    /// Of each object the status that was written last, when, and the version that it made.
    written: BTreeMap<Key, Written>,
}

struct Written {
    status: Value,
    version: String,
    at: Instant,
}

impl StatusWriter {
    async fn round(
        &mut self,
        resolution: &Resolution,
        counts: &BTreeMap<Key, Counts>,
        leading: &watch::Receiver<bool>,
    ) {
        for (key, version, status) in self.differing(resolution, counts) {
            if !*leading.borrow() {
                return;
            }
            if let Err(reason) = self.write(&key, version, status).await {
                tracing::warn!(policy = %key, reason, "statuses cannot be written; they are tried again");
                return;
            }
            tokio::time::sleep(PACE).await;
        }
    }

    /// The objects whose status should be another one, with the version that this was worked out from.
    fn differing(
        &mut self,
        resolution: &Resolution,
        counts: &BTreeMap<Key, Counts>,
    ) -> Vec<(Key, String, Value)> {
        let now = OffsetDateTime::from(SystemTime::now()).replace_nanosecond(0).ok();
        let now = now.and_then(|now| now.format(&Rfc3339).ok()).unwrap_or_default();
        let held = self.shared.held();
        let mut keys = BTreeSet::new();
        let mut differing = Vec::new();
        for (key, record) in Kind::ALL.into_iter().flat_map(|kind| held.records(kind)) {
            let none = Counts::default();
            let Some(status) = wanted(&key, record, resolution, counts.get(&key).unwrap_or(&none), &now)
            else {
                keys.insert(key);
                continue;
            };
            let is_known = self.written.get(&key).is_some_and(|written| {
                // A server that keeps less than it is given is not given it again.
                written.status == status && written.version == record.version
                    || only_counts_differ(&status, &record.status) && written.at.elapsed() < COUNTS
            });
            keys.insert(key.clone());
            if status != record.status && !is_known {
                differing.push((key, record.version.clone(), status));
            }
        }
        self.written.retain(|key, _| keys.contains(key));
        differing
    }

    async fn write(&mut self, key: &Key, version: String, status: Value) -> Result<(), String> {
        let resource = Resource::Policy(key.kind);
        let patch = Patch::Merge(json!({"metadata": {"resourceVersion": version}, "status": status}));
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.shared.api(resource, &key.namespace);
        match within(api.patch_status(&key.name, &params, &patch)).await {
            Ok(object) => {
                let version = object.metadata.resource_version.clone().unwrap_or_default();
                self.written.insert(key.clone(), Written { status, version, at: Instant::now() });
                self.shared.change(|held| held.put(resource, object, true));
                Ok(())
            }
            // Somebody else wrote, or it has gone: the watch tells.
            Err(failure) if matches!(failure.code(), Some(404 | 409)) => Ok(()),
            Err(failure) => Err(failure.to_string()),
        }
    }
}

/// What the status of an object should say. `None`: nobody knows yet what became of it.
fn wanted(key: &Key, record: &Record, resolution: &Resolution, counts: &Counts, now: &str) -> Option<Value> {
    let fault = record.fault.as_ref();
    let resolved = resolution.policies.get(key);
    let is_resolved = match (record.stored(), resolved) {
        (Some(stored), Some(resolved)) => Arc::ptr_eq(stored, resolved),
        (stored, resolved) => stored.is_none() && resolved.is_none(),
    };
    if fault.is_none() && !is_resolved {
        return None;
    }
    let conditions: &[Condition] = if fault.is_some() { &[] } else { resolution.resolved.conditions(key) };
    if key.kind.is_gateway_api() {
        return Some(of_route(record, conditions, now));
    }
    let old = record.status.get("conditions");
    let told = match fault {
        Some(fault) => vec![Told::new("Accepted", "False", "Invalid", fault)],
        None => together(conditions.iter()),
    };
    Some(json!({
        "observedGeneration": record.generation(),
        "conditions": told.iter().map(|told| told.dated(old, record.generation(), now)).collect::<Value>(),
        "proxies": {
            "on": counts.on,
            "accepted": counts.accepted,
            "refused": counts.refusing,
            "refusals": counts.refused.iter().take(LISTED_REFUSALS).map(|refusal| json!({
                "proxy": cut(&refusal.proxy, MAX_REASON),
                "reason": cut(&refusal.reason, MAX_REASON),
            })).collect::<Value>(),
        },
    }))
}

fn only_counts_differ(a: &Value, b: &Value) -> bool {
    a.get("proxies").is_some()
        && a.get("conditions") == b.get("conditions")
        && a.get("observedGeneration") == b.get("observedGeneration")
}

/// The parents of a route: those of others as they are, then ours.
fn of_route(record: &Record, conditions: &[Condition], now: &str) -> Value {
    let entries = record.status.get("parents").and_then(Value::as_array).into_iter().flatten();
    let (own, others): (Vec<&Value>, Vec<&Value>) =
        entries.partition(|entry| entry.get("controllerName").is_some_and(|name| name == CONTROLLER));
    let mut parents: Vec<Value> = others.into_iter().cloned().collect();
    let mut references: Vec<Value> = record.parents.clone();
    for parent in conditions.iter().filter_map(|condition| condition.parent.as_ref()) {
        let reference = json!(parent);
        if !references.contains(&reference) {
            references.push(reference);
        }
    }
    for reference in references {
        let old = own.iter().find(|entry| entry.get("parentRef") == Some(&reference));
        let old = old.and_then(|entry| entry.get("conditions"));
        let told = if let Some(fault) = &record.fault {
            vec![Told::new("Accepted", "False", "UnsupportedValue", fault)]
        } else {
            let of_it = |condition: &&Condition| {
                condition.parent.as_ref().is_some_and(|parent| json!(parent) == reference)
            };
            together(conditions.iter().filter(of_it))
        };
        let conditions: Value = told.iter().map(|told| told.dated(old, record.generation(), now)).collect();
        parents.push(json!({"parentRef": reference, "controllerName": CONTROLLER, "conditions": conditions}));
    }
    // A route that is nobody's yet has no status at all.
    if parents.is_empty() && record.status.get("parents").is_none() {
        return record.status.clone();
    }
    json!({ "parents": parents })
}

/// A condition without its time.
struct Told {
    kind: &'static str,
    status: &'static str,
    reason: String,
    message: String,
}

impl Told {
    fn new(kind: &'static str, status: &'static str, reason: &str, message: &str) -> Self {
        Self { kind, status, reason: reason.to_owned(), message: cut(message, MAX_MESSAGE) }
    }

    /// With the time since which it is so, which is that of the old one where it said the same.
    fn dated(&self, old: Option<&Value>, generation: i64, now: &str) -> Value {
        let old = old.and_then(Value::as_array).into_iter().flatten();
        let mut same = old.filter(|old| {
            old.get("type").is_some_and(|kind| kind == self.kind)
                && old.get("status").is_some_and(|status| status == self.status)
        });
        let since = same.next().and_then(|old| old.get("lastTransitionTime")?.as_str()).unwrap_or(now);
        json!({
            "type": self.kind,
            "status": self.status,
            "reason": self.reason,
            "message": self.message,
            "observedGeneration": generation,
            "lastTransitionTime": since,
        })
    }
}

/// One condition of each type: of several the first bad one, with what all of the bad ones say.
fn together<'a>(conditions: impl Iterator<Item = &'a Condition>) -> Vec<Told> {
    let mut by_type: BTreeMap<ConditionType, Vec<&Condition>> = BTreeMap::new();
    for condition in conditions {
        by_type.entry(condition.kind).or_default().push(condition);
    }
    let told = |(kind, all): (ConditionType, Vec<&Condition>)| {
        let bad: Vec<&Condition> = all.iter().copied().filter(|condition| condition.is_bad()).collect();
        let said = if bad.is_empty() { all } else { bad };
        let first = said.first()?;
        let mut messages: Vec<&str> = said.iter().map(|condition| &*condition.message).collect();
        messages.dedup();
        let status = match first.status {
            ConditionStatus::True => "True",
            ConditionStatus::False => "False",
        };
        let name = match kind {
            ConditionType::Accepted => "Accepted",
            ConditionType::ResolvedRefs => "ResolvedRefs",
            ConditionType::PartiallyInvalid => "PartiallyInvalid",
        };
        Some(Told::new(name, status, &reason(first), &messages.join("; ")))
    };
    by_type.into_iter().filter_map(told).collect()
}

/// As it is written. Of a route what cannot mean anything is, in the Gateway API's words, an unsupported value.
fn reason(condition: &Condition) -> String {
    match (condition.reason, &condition.parent) {
        (ConditionReason::Invalid, Some(_)) => "UnsupportedValue".to_owned(),
        (reason, _) => format!("{reason:?}"),
    }
}

fn cut(text: &str, max: usize) -> String {
    text.chars().take(max).collect()
}
