//! The kinds as `CustomResourceDefinition`s.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::rules::{VALIDATIONS, cel};
use super::spec;
use crate::bounds::MAX_LABEL;
use crate::kind::Kind;

/// The `CustomResourceDefinition` of the kind. `None`: the kind is the Gateway API's, which brings its own.
pub fn crd(kind: Kind) -> Option<String> {
    if kind.is_gateway_api() {
        return None;
    }
    let (group, version) = kind.api_version().split_once('/').unwrap_or_default();
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{}.{group}", kind.plural())},
        "spec": {
            "group": group,
            "names": {
                "kind": kind.name(),
                "listKind": format!("{}List", kind.name()),
                "plural": kind.plural(),
                "singular": kind.name().to_ascii_lowercase(),
                "shortNames": [kind.short_name()],
                "categories": ["outrigger"],
            },
            "scope": "Namespaced",
            "versions": [{
                "name": version,
                "served": true,
                "storage": true,
                "additionalPrinterColumns": columns(kind),
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": schema(kind)},
            }],
        },
    });
    // JSON's kinds of values are all kinds of YAML.
    serde_saphyr::to_string(&Sorted(&definition)).ok()
}

/// The schema of the whole object, as Kubernetes takes it.
pub(super) fn schema(kind: Kind) -> Value {
    let mut spec = spec(kind);
    as_kubernetes_has_it(&mut spec);
    let mut schema = json!({
        "description": spec["description"],
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status(),
        },
    });
    // Of an object's metadata rules see the name alone.
    let rule = match kind {
        Kind::MeshDefaults => Some((
            "self.metadata.name == 'default'",
            "there is one MeshDefaults in a namespace, of the name `default`",
        )),
        Kind::ExternalService => Some((
            "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63",
            "it is dialled as `<name>.<namespace>.mesh`: its name is 1 to 63 lower-case letters, digits and `-`",
        )),
        _ => None,
    };
    if let Some(rule) = rule {
        schema[VALIDATIONS] = cel(&[rule]);
    }
    schema
}

/// What `kubectl get` shows: what it is about, what became of it, and at how many proxies.
fn columns(kind: Kind) -> Vec<Value> {
    let column = |name: &str, kind: &str, path: &str| json!({"name": name, "type": kind, "jsonPath": path});
    let mut columns = match kind {
        Kind::MeshDefaults => vec![
            column("mTLS", "string", ".spec.mtls"),
            column("Inbound", "string", ".spec.inbound"),
            column("Outbound", "string", ".spec.outbound"),
        ],
        Kind::ExternalService => {
            vec![column("Hosts", "string", ".spec.hosts"), column("Ports", "string", ".spec.ports[*].port")]
        }
        _ => vec![
            column("Target", "string", ".spec.targetRef.kind"),
            column("Name", "string", ".spec.targetRef.name"),
        ],
    };
    if kind == Kind::AccessPolicy {
        columns.push(column("Mode", "string", ".spec.mode"));
    }
    columns.push(column("Accepted", "string", ".status.conditions[?(@.type=='Accepted')].status"));
    columns.push(column("Reason", "string", ".status.conditions[?(@.type=='Accepted')].reason"));
    columns.push(column("Proxies", "integer", ".status.proxies.on"));
    columns.push(column("Age", "date", ".metadata.creationTimestamp"));
    columns
}

/// What the leader writes. Its lists are bounded where they are written.
fn status() -> Value {
    let text = |max: usize| json!({"type": "string", "maxLength": max});
    let count = |description: &str| json!({"type": "integer", "minimum": 0, "description": description});
    json!({
        "description": "What became of it.",
        "type": "object",
        "properties": {
            "observedGeneration": {
                "description": "The generation that all of this is about.",
                "type": "integer",
                "format": "int64",
            },
            "conditions": {
                "description": "Accepted: whether it is in force. PartiallyInvalid: some of it is not.",
                "type": "array",
                "maxItems": 8,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                    "properties": {
                        "type": text(316),
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "reason": text(1024),
                        "message": text(32_768),
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                    },
                },
            },
            "proxies": {
                "description": "The proxies that it was sent to.",
                "type": "object",
                "properties": {
                    "on": count("So many."),
                    "accepted": count("So many have it in force."),
                    "refused": count("So many have refused it, and keep what they had."),
                    "refusals": {
                        "description": "Some of those that have refused it.",
                        "type": "array",
                        "maxItems": 10,
                        "x-kubernetes-list-type": "atomic",
                        "items": {
                            "type": "object",
                            "properties": {"proxy": text(1024), "reason": text(1024)},
                        },
                    },
                },
            },
        },
    })
}

/// Kubernetes closes objects itself and refuses schemas that say so; and where a rule says with words for people what a pattern says
/// as well, the pattern would only repeat it.
fn as_kubernetes_has_it(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.get("additionalProperties") == Some(&Value::Bool(false)) {
                object.remove("additionalProperties");
            }
            if object.contains_key(VALIDATIONS) && object.get("type") == Some(&json!("string")) {
                object.remove("pattern");
            }
            // The bound of a text that is one of a few is that of the longest.
            if object.get("type") == Some(&json!("string")) && object.contains_key("enum") {
                object.entry("maxLength").or_insert(json!(MAX_LABEL));
            }
            object.values_mut().for_each(as_kubernetes_has_it);
        }
        Value::Array(list) => list.iter_mut().for_each(as_kubernetes_has_it),
        _ => {}
    }
}

/// Writes keys in the order of the alphabet, whatever `serde_json` keeps.
struct Sorted<'a>(&'a Value);

impl Serialize for Sorted<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Object(object) => {
                let sorted: BTreeMap<&String, Sorted<'_>> =
                    object.iter().map(|(key, value)| (key, Sorted(value))).collect();
                sorted.serialize(serializer)
            }
            Value::Array(list) => serializer.collect_seq(list.iter().map(Sorted)),
            other => other.serialize(serializer),
        }
    }
}
