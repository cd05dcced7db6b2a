//! The kinds' schemas, from the types: JSON Schema for editors and the API, CRDs for Kubernetes.
//!
//! Both are brought into one plain form, which is what Kubernetes calls structural: no references, no `null`, alternatives of names
//! as `enum`. Defaults are left out: an API server would write them into objects, and an object should stay what was written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::kind::Kind;
use crate::kinds::{
    AccessPolicy, ExternalService, GrpcRoute, HttpRoute, MeshDefaults, PolicyTest, TrafficPolicy,
};

/// The JSON schema of an object of the kind.
pub fn json(kind: Kind) -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.name(),
        "type": "object",
        "additionalProperties": false,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": kind.api_version()},
            "kind": {"const": kind.name()},
            "metadata": metadata(),
            "spec": spec(kind),
            "status": {"description": "The server's; ignored on input.", "type": "object"},
        },
    })
}

/// The JSON schema of a `PolicyTest`.
pub fn policy_test() -> Value {
    let mut schema = of::<PolicyTest>();
    let cases = schema["properties"]["cases"].take();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "PolicyTest",
        "type": "object",
        "additionalProperties": false,
        "required": ["kind", "cases"],
        "properties": {
            "apiVersion": {"const": crate::kind::API_VERSION},
            "kind": {"const": "PolicyTest"},
            "metadata": {"type": "object"},
            "cases": cases,
        },
    })
}

/// The `CustomResourceDefinition` of the kind. `None`: the kind is the Gateway API's, which brings its own.
pub fn crd(kind: Kind) -> Option<String> {
    if kind.is_gateway_api() {
        return None;
    }
    let (group, version) = kind.api_version().split_once('/').unwrap_or_default();
    let mut spec = spec(kind);
    without_closed_objects(&mut spec);
    let mut schema = json!({
        "description": description(kind),
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
    if kind == Kind::MeshDefaults {
        schema["x-kubernetes-validations"] = json!([{
            "rule": "self.metadata.name == 'default'",
            "message": "there is one MeshDefaults in a namespace, of the name `default`",
        }]);
    }
    let mut columns = vec![
        json!({"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}),
        json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}),
    ];
    if matches!(kind, Kind::TrafficPolicy | Kind::AccessPolicy) {
        columns.insert(0, json!({"name": "Target", "type": "string", "jsonPath": ".spec.targetRef.kind"}));
        columns.insert(1, json!({"name": "Name", "type": "string", "jsonPath": ".spec.targetRef.name"}));
    }
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
                "additionalPrinterColumns": columns,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": schema},
            }],
        },
    });
    // JSON's kinds of values are all kinds of YAML.
    serde_saphyr::to_string(&Sorted(&definition)).ok()
}

/// Every field of the kind, as in `spec.rules[].matches[].path.type`.
pub(crate) fn paths(kind: Kind) -> Vec<String> {
    let mut paths = Vec::new();
    collect("spec", &spec(kind), &mut paths);
    paths
}

fn collect(at: &str, schema: &Value, paths: &mut Vec<String>) {
    if let Some(items) = schema.get("items") {
        return collect(&format!("{at}[]"), items, paths);
    }
    for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let path = format!("{at}.{name}");
        paths.push(path.clone());
        collect(&path, field, paths);
    }
}

fn spec(kind: Kind) -> Value {
    match kind {
        Kind::MeshDefaults => of::<MeshDefaults>(),
        Kind::TrafficPolicy => of::<TrafficPolicy>(),
        Kind::AccessPolicy => of::<AccessPolicy>(),
        Kind::ExternalService => of::<ExternalService>(),
        Kind::HttpRoute => of::<HttpRoute>(),
        Kind::GrpcRoute => of::<GrpcRoute>(),
    }
}

fn description(kind: Kind) -> String {
    spec(kind)["description"].as_str().unwrap_or_default().to_owned()
}

fn of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    plain(&mut schema);
    schema
}

fn metadata() -> Value {
    json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"description": "Unique among its kind in its namespace: an RFC 1123 subdomain.", "type": "string", "maxLength": 253},
            "namespace": {"description": "An RFC 1123 label.", "type": "string", "maxLength": 63},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    })
}

fn status() -> Value {
    let text = json!({"type": "string"});
    json!({
        "description": "What became of it.",
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status"],
                    "properties": {
                        "type": text,
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "reason": text,
                        "message": text,
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                    },
                },
            },
        },
    })
}

/// Brings what schemars makes into the plain form.
fn plain(schema: &mut Value) {
    let Value::Object(object) = schema else {
        if let Value::Array(list) = schema {
            list.iter_mut().for_each(plain);
        }
        // `true`: anything.
        if *schema == Value::Bool(true) {
            *schema = json!({});
        }
        return;
    };
    for word in ["default", "title", "format"] {
        // Fields of these names are inside of `properties`, whose values are objects.
        if object.get(word).is_some_and(|value| !value.is_object()) {
            object.remove(word);
        }
    }
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|name| name != "null");
        if let [one] = &types[..] {
            let one = one.clone();
            object.insert("type".to_owned(), one);
        }
    }
    if let Some(Value::Array(alternatives)) = object.get_mut("anyOf") {
        alternatives.retain(|alternative| alternative.get("type") != Some(&json!("null")));
        if alternatives.len() == 1 {
            let only = alternatives.remove(0);
            object.remove("anyOf");
            adopt(object, only);
        }
    }
    if let Some(Value::Array(names)) = object.get("oneOf") {
        let names = names.clone();
        object.remove("oneOf");
        enumerate(object, &names);
    }
    // Kubernetes' own words have values, not schemas.
    object.iter_mut().filter(|(word, _)| !word.starts_with("x-")).for_each(|(_, value)| plain(value));
}

/// Takes over what another schema says, but for its description where there is one.
fn adopt(object: &mut Map<String, Value>, other: Value) {
    let Value::Object(other) = other else { return };
    for (word, value) in other {
        object.entry(word).or_insert(value);
    }
}

/// A choice of names, each with a description, as `enum`; the descriptions go into the schema's own.
fn enumerate(object: &mut Map<String, Value>, names: &[Value]) {
    let mut values = Vec::new();
    let mut said = String::new();
    for name in names {
        let text = name.get("description").and_then(Value::as_str);
        let several = name.get("enum").and_then(Value::as_array).into_iter().flatten();
        for value in name.get("const").into_iter().chain(several) {
            if let (Some(text), Some(value)) = (text, value.as_str()) {
                said = format!("{said} {value}: {text}");
            }
            values.push(value.clone());
        }
    }
    let own = object.get("description").and_then(Value::as_str).unwrap_or_default();
    let description = format!("{own}{said}").trim().to_owned();
    object.insert("type".to_owned(), json!("string"));
    object.insert("enum".to_owned(), Value::Array(values));
    object.insert("description".to_owned(), Value::String(description));
}

/// Kubernetes closes objects itself, and refuses schemas that say so.
fn without_closed_objects(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.get("additionalProperties") == Some(&Value::Bool(false)) {
                object.remove("additionalProperties");
            }
            object.values_mut().for_each(without_closed_objects);
        }
        Value::Array(list) => list.iter_mut().for_each(without_closed_objects),
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

#[cfg(test)]
mod tests;
