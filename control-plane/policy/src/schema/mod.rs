//! The kinds' schemas, from the types: JSON Schema for editors and the API, CRDs for Kubernetes.
//!
//! Both are brought into one plain form, which is what Kubernetes calls structural: no references, no `null`, alternatives of names
//! as `enum`. Defaults are left out: an API server would write them into objects, and an object should stay what was written.

mod crd;
pub(crate) mod rules;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::kind::Kind;
use crate::kinds::{
    AccessPolicy, ExternalService, GrpcRoute, HttpRoute, MeshDefaults, PolicyTest, TrafficPolicy,
};

pub use crd::crd;

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
            "spec": for_editors(spec(kind)),
            "status": {"description": "The server's; ignored on input.", "type": "object"},
        },
    })
}

/// The JSON schema of a `PolicyTest`.
pub fn policy_test() -> Value {
    let mut schema = for_editors(of::<PolicyTest>());
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

pub(crate) fn spec(kind: Kind) -> Value {
    match kind {
        Kind::MeshDefaults => of::<MeshDefaults>(),
        Kind::TrafficPolicy => of::<TrafficPolicy>(),
        Kind::AccessPolicy => of::<AccessPolicy>(),
        Kind::ExternalService => of::<ExternalService>(),
        Kind::HttpRoute => of::<HttpRoute>(),
        Kind::GrpcRoute => of::<GrpcRoute>(),
    }
}

/// Without Kubernetes' own words, which nobody else knows.
fn for_editors(mut schema: Value) -> Value {
    match &mut schema {
        Value::Object(object) => {
            object.retain(|word, _| !word.starts_with("x-kubernetes-"));
            object.values_mut().for_each(|value| *value = for_editors(value.take()));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| *value = for_editors(value.take())),
        _ => {}
    }
    schema
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
        let is_known = |value: &Value| value == "cidr";
        if object.get(word).is_some_and(|value| !value.is_object() && !is_known(value)) {
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

#[cfg(test)]
mod tests;
