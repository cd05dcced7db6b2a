//! The last good of each object, and how far to trust the whole.
//!
//! Watches and own writes meet here, and either may know more: an object's version orders them. (Versions of one resource are numbers
//! that grow, which Kubernetes has promised since 1.35 and etcd always had.) No I/O; [`super::follow`] brings what the API server says.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::SystemTime;

use kube::api::DynamicObject;
use outrigger_policy::catalog::Grant;
use outrigger_policy::{Key, Policies, Stored};
use serde_json::Value;

use super::decode::{self, Decoded};
use super::resource::Resource;
use crate::policies::{MAX_POLICIES, Picture};
use crate::sources::{Fault, MAX_FAULTS, Sync};

/// Objects that are named where several are meant.
const NAMED: usize = 5;

/// Namespace and name.
type Name = (String, String);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Held {
    resources: BTreeMap<Resource, OfResource>,
}

/// What is held of one resource.
#[derive(Debug, Default)]
struct OfResource {
    state: State,
    /// The CRD that the objects were read under.
    crd: Option<String>,
    records: BTreeMap<Name, Record>,
    /// The uids of objects that this process has deleted and of which a watch may still tell.
    deleted: BTreeSet<String>,
}

/// How far what is held of a resource can be trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum State {
    /// It was not read yet.
    #[default]
    Never,
    /// As Never; why.
    Unread(String),
    /// The API server does not have it.
    Absent,
    /// It is watched.
    Current,
    /// It was read, and cannot be now.
    Failing(String),
}

/// One object.
#[derive(Debug, Clone)]
pub(super) struct Record {
    uid: String,
    /// Its version, as the API server wrote it.
    pub(super) version: String,
    /// What people wrote: its generation, and a digest of its labels and annotations.
    written: (i64, u64),
    /// The object's status, as it was read.
    pub(super) status: Value,
    /// The Services that a route which cannot be used names as its parents.
    pub(super) parents: Vec<Value>,
    meaning: Meaning,
    /// Why the newest cannot be used.
    pub(super) fault: Option<String>,
    /// Own, and not seen by a watch yet.
    own: bool,
    /// It went with its CRD.
    lost: bool,
}

#[derive(Debug, Clone)]
enum Meaning {
    /// The last good. `None`: there is none.
    Policy(Option<Arc<Stored>>),
    Grants(BTreeSet<Grant>),
    Foreign,
}

impl Record {
    pub(super) fn generation(&self) -> i64 {
        self.written.0
    }

    /// What is in force of it.
    pub(super) fn stored(&self) -> Option<&Arc<Stored>> {
        match &self.meaning {
            Meaning::Policy(stored) => stored.as_ref(),
            Meaning::Grants(_) | Meaning::Foreign => None,
        }
    }
}

impl Held {
    /// Everything that was listed. What is missing is gone, but for what went with its CRD and for own writes that the list is older than.
    pub(super) fn relist(&mut self, resource: Resource, crd: &str, objects: Vec<DynamicObject>) {
        let names: BTreeSet<Name> = objects.iter().map(name).collect();
        let uids: BTreeSet<String> =
            objects.iter().filter_map(|object| object.metadata.uid.clone()).collect();
        for object in objects {
            self.put(resource, object, false);
        }
        let of = self.resources.entry(resource).or_default();
        let reborn = of.crd.as_ref().is_some_and(|known| known != crd);
        of.records.retain(|name, record| {
            let listed = names.contains(name);
            record.lost |= reborn && !listed && !record.own;
            listed || record.own || record.lost
        });
        of.deleted.retain(|uid| uids.contains(uid));
        of.crd = Some(crd.to_owned());
        of.state = State::Current;
    }

    /// An object as it is now. `own`: as the answer to a write of this process.
    pub(super) fn put(&mut self, resource: Resource, mut object: DynamicObject, own: bool) {
        let of = self.resources.entry(resource).or_default();
        let uid = object.metadata.uid.clone().unwrap_or_default();
        if of.deleted.contains(&uid) {
            return;
        }
        let version = object.metadata.resource_version.clone().unwrap_or_default();
        let written = written(&object);
        let name = name(&object);
        let status = object.data.get_mut("status").map(Value::take).unwrap_or_default();
        let before = of.records.get(&name);
        if before.is_some_and(|before| order(&version) < order(&before.version)) {
            return;
        }
        let before = before.filter(|before| before.uid == uid);
        // The watch may tell of an own write before its answer is there.
        let own = own && before.is_none_or(|before| before.version != version);
        if let Some(before) = before.filter(|before| before.written == written) {
            let record = Record { version, status, own, ..before.clone() };
            of.records.insert(name, record);
            return;
        }
        // Of an object that was deleted and made anew the last good is another one's, but nobody meant it to fall away in between.
        let last = of.records.get(&name).and_then(Record::stored).cloned();
        let (meaning, fault) = read(resource, &object, last);
        // What is in force says its parents itself.
        let parents = if fault.is_some() { decode::service_parents(&object) } else { Vec::new() };
        let record = Record { uid, version, written, status, parents, meaning, fault, own, lost: false };
        of.records.insert(name, record);
    }

    /// An object whose deletion a watch has told, and which was believed.
    pub(super) fn remove(&mut self, resource: Resource, object: &DynamicObject) {
        let of = self.resources.entry(resource).or_default();
        let uid = object.metadata.uid.clone().unwrap_or_default();
        of.deleted.remove(&uid);
        let name = name(object);
        if of.records.get(&name).is_some_and(|record| record.uid == uid) {
            of.records.remove(&name);
        }
    }

    /// An object that this process has deleted.
    pub(super) fn deleted(&mut self, resource: Resource, key: &Key, uid: Option<String>) {
        let of = self.resources.entry(resource).or_default();
        let name = (key.namespace.clone(), key.name.clone());
        // Where it is gone already the watch has told.
        if of.records.remove(&name).is_some() {
            of.deleted.extend(uid);
        }
    }

    /// The API server does not have the resource, or is about to lose it.
    pub(super) fn absent(&mut self, resource: Resource) {
        let of = self.resources.entry(resource).or_default();
        let crd = resource.crd();
        of.state = match (of.records.len(), &of.state) {
            (0, _) if !resource.is_ours() => State::Absent,
            (0, State::Never | State::Unread(_)) => {
                State::Unread(format!("the CRD {crd} is not installed: apply the chart's CRDs"))
            }
            (0, _) => State::Failing(format!("the CRD {crd} was deleted: apply the chart's CRDs")),
            (held, _) => State::Failing(format!(
                "the CRD {crd} was deleted: the objects that it had, {held}, stay in force; apply the CRD and them again"
            )),
        };
    }

    /// The resource cannot be read.
    pub(super) fn failing(&mut self, resource: Resource, reason: String) {
        let of = self.resources.entry(resource).or_default();
        of.state = match of.state {
            State::Never | State::Unread(_) => State::Unread(reason),
            State::Absent | State::Current | State::Failing(_) => State::Failing(reason),
        };
    }

    /// The objects of a resource that are policies.
    pub(super) fn records(&self, kind: outrigger_policy::Kind) -> impl Iterator<Item = (Key, &Record)> {
        let of = self.resources.get(&Resource::Policy(kind)).into_iter();
        let key = move |(namespace, name): &Name| Key::new(kind, namespace, name);
        of.flat_map(|of| &of.records)
            .filter(|(_, record)| !record.lost)
            .map(move |(name, record)| (key(name), record))
    }

    /// All of it, as resolvers take it.
    pub(super) fn picture(&self, last: &Picture) -> Picture {
        let mut policies = Policies::new();
        let mut grants = BTreeSet::new();
        let mut faults = Vec::new();
        for (resource, of) in &self.resources {
            if let State::Unread(reason) | State::Failing(reason) = &of.state {
                faults.push(Fault { subject: resource.to_string(), reason: reason.clone() });
            }
            for ((namespace, name), record) in &of.records {
                if let Some(reason) = &record.fault {
                    let subject = format!("{resource} {namespace}/{name}");
                    faults.push(Fault { subject, reason: reason.clone() });
                }
                match &record.meaning {
                    Meaning::Policy(Some(stored)) => {
                        policies.insert(stored.object.key(), Arc::clone(stored));
                    }
                    Meaning::Grants(of_object) => grants.extend(of_object.iter().cloned()),
                    Meaning::Policy(None) | Meaning::Foreign => {}
                }
            }
        }
        if policies.len() > MAX_POLICIES {
            faults.insert(0, beyond(&mut policies));
        }
        faults.truncate(MAX_FAULTS);
        let sync = self.sync(&last.sync);
        let grants = Some(grants);
        let is_new = *last.policies != policies || last.grants != grants;
        let policies = if is_new { Arc::new(policies) } else { Arc::clone(&last.policies) };
        Picture { revision: last.revision + u64::from(is_new), policies, grants, sync, faults }
    }

    fn sync(&self, last: &Sync) -> Sync {
        let mut reasons = Vec::new();
        for resource in Resource::ALL {
            let Some(of) = self.resources.get(&resource) else { return Sync::Never };
            match &of.state {
                State::Never | State::Unread(_) => return Sync::Never,
                State::Absent | State::Current => {}
                State::Failing(reason) => reasons.push(reason.clone()),
            }
            reasons.extend(lost(resource, of));
        }
        // One away server is the reason of all.
        reasons.dedup();
        match (reasons.is_empty(), last) {
            (true, _) => Sync::Synced,
            (_, Sync::Degraded { since, .. }) => Sync::Degraded { since: *since, reason: reasons.join("; ") },
            _ => Sync::Degraded { since: SystemTime::now(), reason: reasons.join("; ") },
        }
    }
}

/// Says of objects that went with their CRD that they are still in force.
fn lost(resource: Resource, of: &OfResource) -> Option<String> {
    let lost = of.records.iter().filter(|(_, record)| record.lost);
    let names: Vec<String> = lost.map(|((namespace, name), _)| format!("{namespace}/{name}")).collect();
    (!names.is_empty() && of.state == State::Current).then(|| {
        format!(
            "the CRD {} was deleted and made again: {} of the objects that it had ({}) stay in force; apply them again, or restart \
             the controllers to go on without them",
            resource.crd(),
            names.len(),
            names[..names.len().min(NAMED)].join(", ")
        )
    })
}

/// Takes out the youngest objects beyond the bound.
fn beyond(policies: &mut Policies) -> Fault {
    let mut by_age: Vec<(i64, Key)> =
        policies.iter().map(|(key, stored)| (stored.created, key.clone())).collect();
    by_age.sort_unstable();
    let gone = by_age.split_off(MAX_POLICIES);
    for (_, key) in &gone {
        policies.remove(key);
    }
    Fault {
        subject: "policies".to_owned(),
        reason: format!(
            "a mesh holds at most {MAX_POLICIES} objects: the youngest {} have no effect",
            gone.len()
        ),
    }
}

fn read(resource: Resource, object: &DynamicObject, last: Option<Arc<Stored>>) -> (Meaning, Option<String>) {
    let Resource::Policy(kind) = resource else { return (Meaning::Grants(decode::grants(object)), None) };
    let mut newer = Vec::new();
    let decoded = decode::policy(kind, object, &mut newer);
    if !newer.is_empty() {
        tracing::warn!(
            object = %decode::key(kind, object),
            fields = newer.join(", "),
            "a route has fields of a newer Gateway API, which are passed over"
        );
    }
    match decoded {
        Decoded::Policy(stored) => (Meaning::Policy(Some(Arc::new(*stored))), None),
        Decoded::Foreign => (Meaning::Foreign, None),
        Decoded::Fault(reason) => match last {
            Some(last) => {
                (Meaning::Policy(Some(last)), Some(format!("{reason}; what it said before stays in force")))
            }
            None => match decode::stand_in(kind, object) {
                Some(strict) => {
                    let reason = format!(
                        "{reason}; it was never read: until it is, nobody comes in to what it guards"
                    );
                    (Meaning::Policy(Some(Arc::new(*strict))), Some(reason))
                }
                None => (Meaning::Policy(None), Some(reason)),
            },
        },
    }
}

fn name(object: &DynamicObject) -> Name {
    let metadata = &object.metadata;
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

/// What changes when people write, and not when a status is written.
fn written(object: &DynamicObject) -> (i64, u64) {
    let mut hasher = DefaultHasher::new();
    (&object.metadata.labels, &object.metadata.annotations).hash(&mut hasher);
    (object.metadata.generation.unwrap_or_default(), hasher.finish())
}

/// 0: the version is no number, and orders nothing.
fn order(version: &str) -> u64 {
    version.parse().unwrap_or_default()
}
