//! What an object of the API says.
//!
//! The API server has checked it against the CRD, of which version ever that is; the judge is the parser that every policy passes. An
//! object that it refuses never stops a watch: it is a fault, and its last good stays. Where there is no last good, because the
//! controller has just started, what guards somebody must not fall away: see [`stand_in`].

use std::collections::BTreeSet;

use kube::api::DynamicObject;
use outrigger_policy::catalog::Grant;
use outrigger_policy::kinds::{
    AccessMode, AccessPolicy, AccessRule, AccessTarget, AccessTargetKind, Action, DefaultAction,
    MeshDefaults, Mtls,
};
use outrigger_policy::{Key, Kind, Object, Spec, Stored, parse, take_newer_fields};
use serde_json::{Value, json};

use super::MANAGER;

/// What an object comes to.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Decoded {
    /// It is in force.
    Policy(Box<Stored>),
    /// A route without a Service among its parents: some gateway's.
    Foreign,
    /// It cannot be used.
    Fault(String),
}

/// An annotation in which `kubectl apply` keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Reads a policy. `newer`: the fields that were put aside because only a newer Gateway API has them.
pub(super) fn policy(kind: Kind, object: &DynamicObject, newer: &mut Vec<String>) -> Decoded {
    if kind.is_gateway_api() && !has_a_service(object) {
        return Decoded::Foreign;
    }
    let key = key(kind, object);
    let mut document = document(kind, object);
    *newer = take_newer_fields(kind, &mut document);
    // JSON is YAML: what people write into files and what they write into a cluster is judged by the same rules.
    match parse(&key.to_string(), &document.to_string(), &key.namespace) {
        Ok(mut parsed) => match (parsed.pop(), parsed.is_empty()) {
            (Some(one), true) => Decoded::Policy(Box::new(stored(one.object, object))),
            _ => Decoded::Fault("it is not one object".to_owned()),
        },
        Err(faults) => {
            let texts = faults.iter().map(|fault| format!("{}: {}", fault.path, fault.message));
            Decoded::Fault(texts.collect::<Vec<_>>().join("; "))
        }
    }
}

/// What holds instead of an object that was never read: of an `AccessPolicy` that would refuse somebody, that nobody comes in to its
/// target; of a `MeshDefaults`, the strictest. Of the others nothing.
pub(super) fn stand_in(kind: Kind, object: &DynamicObject) -> Option<Box<Stored>> {
    let spec = object.data.get("spec").cloned().unwrap_or_default();
    let spec = match kind {
        // One that only allows allows less when it is not there.
        Kind::AccessPolicy if spec.get("mode") == Some(&json!("Audit")) || !denies(&spec) => return None,
        Kind::AccessPolicy => {
            let anybody = AccessTarget {
                kind: AccessTargetKind::Namespace,
                name: None,
                labels: std::collections::BTreeMap::new(),
                port: None,
            };
            let target = spec.get("targetRef").cloned().unwrap_or_default();
            let deny = AccessRule {
                name: Some("unreadable".to_owned()),
                action: Action::Deny,
                from: None,
                to: None,
            };
            Spec::AccessPolicy(AccessPolicy {
                target_ref: serde_json::from_value(target).unwrap_or(anybody),
                mode: AccessMode::Enforce,
                rules: vec![deny],
                limits: Vec::new(),
            })
        }
        Kind::MeshDefaults => Spec::MeshDefaults(MeshDefaults {
            mtls: Some(Mtls::Strict),
            inbound: Some(DefaultAction::Deny),
            ..MeshDefaults::default()
        }),
        _ => return None,
    };
    let metadata = serde_json::from_value(document(kind, object)["metadata"].take()).ok()?;
    Some(Box::new(stored(Object { metadata, spec }, object)))
}

/// Whether a rule of an `AccessPolicy` may be one that denies.
fn denies(spec: &Value) -> bool {
    match spec.get("rules") {
        None => false,
        Some(rules) => rules
            .as_array()
            .is_none_or(|rules| rules.iter().any(|rule| rule.get("action") != Some(&json!("Allow")))),
    }
}

/// What a `ReferenceGrant` permits: of it, what is about routes and Services.
pub(super) fn grants(object: &DynamicObject) -> BTreeSet<Grant> {
    let text =
        |value: &Value, field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let list = |field: &str| {
        let list = object.data.get("spec").and_then(|spec| spec.get(field)).and_then(Value::as_array);
        list.cloned().unwrap_or_default()
    };
    let to: Vec<Option<String>> = list("to")
        .iter()
        .filter(|to| matches!(&*text(to, "group"), "" | "core") && text(to, "kind") == "Service")
        .map(|to| to.get("name").and_then(Value::as_str).filter(|name| !name.is_empty()).map(str::to_owned))
        .collect();
    let from = list("from");
    let routes = from.iter().filter_map(|from| {
        let kind = text(from, "kind").parse::<Kind>().ok().filter(|kind| kind.is_gateway_api())?;
        (text(from, "group") == "gateway.networking.k8s.io").then(|| (kind, text(from, "namespace")))
    });
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    let grant = |(from_kind, from_namespace): (Kind, String)| {
        let namespace = namespace.clone();
        to.iter().map(move |to_name| Grant {
            from_kind,
            from_namespace: from_namespace.clone(),
            to_namespace: namespace.clone(),
            to_name: to_name.clone(),
        })
    };
    routes.flat_map(grant).collect()
}

/// The key of an object.
pub(super) fn key(kind: Kind, object: &DynamicObject) -> Key {
    let metadata = &object.metadata;
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    Key::new(kind, text(&metadata.namespace), text(&metadata.name))
}

fn has_a_service(object: &DynamicObject) -> bool {
    !service_parents(object).is_empty()
}

/// The parents of a route that are Services.
pub(super) fn service_parents(object: &DynamicObject) -> Vec<Value> {
    let parents = object.data.get("spec").and_then(|spec| spec.get("parentRefs")).and_then(Value::as_array);
    let is_service = |parent: &Value| {
        parent.get("kind").is_some_and(|kind| kind == "Service")
            && parent.get("group").is_some_and(|group| group == "" || group == "core")
    };
    parents.into_iter().flatten().filter(|parent| is_service(parent)).cloned().collect()
}

/// The object as people write it, with what the server says of it. Its version is left out: a status moves it.
fn document(kind: Kind, object: &DynamicObject) -> Value {
    let metadata = &object.metadata;
    let mut annotations = metadata.annotations.clone().unwrap_or_default();
    annotations.remove(LAST_APPLIED);
    json!({
        "apiVersion": kind.api_version(),
        "kind": kind.name(),
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "labels": metadata.labels.clone().unwrap_or_default(),
            "annotations": annotations,
            "generation": metadata.generation,
            "uid": metadata.uid,
            "creationTimestamp": metadata.creation_timestamp,
        },
        "spec": object.data.get("spec"),
    })
}

fn stored(object: Object, from: &DynamicObject) -> Stored {
    let metadata = &from.metadata;
    let created = metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
    let entries = metadata.managed_fields.iter().flatten();
    let writes = entries.filter(|entry| entry.subresource.as_deref().unwrap_or_default().is_empty());
    let last = writes.max_by_key(|entry| entry.time.as_ref().map(|time| time.0));
    let manager = last.and_then(|entry| entry.manager.clone()).unwrap_or_default();
    let author = manager.strip_prefix(MANAGER).and_then(|rest| rest.strip_prefix(':')).unwrap_or(&manager);
    Stored {
        object,
        revision: metadata.generation.and_then(|generation| u64::try_from(generation).ok()).unwrap_or(1),
        created,
        updated: last.and_then(|entry| entry.time.as_ref()).map_or(created, |time| time.0.as_second()),
        author: author.to_owned(),
    }
}
