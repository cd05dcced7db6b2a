use std::path::{Path, PathBuf};

use super::*;

fn crd_files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/outrigger/files/crds")
}

/// `OUTRIGGER_REGENERATE=1` writes them.
#[test]
fn the_charts_crds_are_fresh() {
    let regenerate = std::env::var_os("OUTRIGGER_REGENERATE").is_some();
    for kind in Kind::ALL {
        let Some(text) = crd(kind) else { continue };
        let text = format!(
            "# Made from the types of `control-plane/policy`: OUTRIGGER_REGENERATE=1 cargo test -p outrigger-policy\n{text}"
        );
        let file = crd_files().join(format!("outrigger.dev_{}.yaml", kind.plural()));
        if regenerate {
            std::fs::create_dir_all(crd_files()).unwrap();
            std::fs::write(&file, &text).unwrap();
        }
        let held = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(held == text, "{} is old: run with OUTRIGGER_REGENERATE=1", file.display());
    }
    assert!(crd(Kind::HttpRoute).is_none());
}

/// What Kubernetes calls structural, as far as these types go.
fn structural(at: &str, schema: &Value) {
    let Value::Object(object) = schema else { panic!("{at}: {schema}") };
    for word in ["$ref", "$defs", "oneOf", "allOf", "const", "default", "title"] {
        assert!(!object.contains_key(word), "{at} has {word}");
    }
    if object.contains_key("anyOf") {
        assert_eq!(object.get("x-kubernetes-int-or-string"), Some(&Value::Bool(true)), "{at}");
        return;
    }
    assert!(object.get("type").is_some_and(Value::is_string), "{at} has no type: {schema}");
    assert_ne!(object.get("additionalProperties"), Some(&Value::Bool(false)), "{at}");
    if let Some(items) = object.get("items") {
        structural(&format!("{at}[]"), items);
    }
    for (name, field) in object.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let at = format!("{at}.{name}");
        assert!(field.get("description").is_some(), "{at} has no description");
        structural(&at, field);
    }
}

#[test]
fn crds_are_structural() {
    for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_gateway_api()) {
        let schema = crd::schema(kind);
        structural(kind.name(), &schema["properties"]["spec"]);
    }
}

#[test]
fn json_schemas_are_closed() {
    fn closed(at: &str, schema: &Value) {
        if schema.get("properties").is_some() {
            assert_eq!(schema.get("additionalProperties"), Some(&Value::Bool(false)), "{at}");
        }
        for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            closed(&format!("{at}.{name}"), field.get("items").unwrap_or(field));
        }
    }
    for kind in Kind::ALL {
        closed(kind.name(), &spec(kind));
    }
    assert_eq!(policy_test()["properties"]["cases"]["type"], "array");
}

#[test]
fn a_choice_of_names_is_an_enum() {
    insta::assert_json_snapshot!(spec(Kind::MeshDefaults)["properties"]["mtls"]);
    insta::assert_json_snapshot!(
        for_editors(spec(Kind::TrafficPolicy))["properties"]["timeouts"]["properties"]["request"]
    );
}

/// The suite `kubernetes_policies` of e2e asks an API server about the same objects.
#[test]
fn what_the_crds_are_asked_about_is_refused_by_the_parser() {
    let text = include_str!("../../testdata/refused.yaml");
    let cases: Vec<Value> = serde_saphyr::from_str(text).unwrap();
    assert!(cases.len() > 100, "{}", cases.len());
    for case in cases {
        let name = match (case["name"].as_str(), case["kind"].as_str()) {
            (Some(name), _) => name,
            (None, Some("MeshDefaults")) => "default",
            _ => "case",
        };
        let object = json!({
            "apiVersion": crate::kind::API_VERSION, "kind": case["kind"],
            "metadata": {"name": name, "namespace": "shop"}, "spec": case["spec"],
        });
        assert!(crate::parse("case", &object.to_string(), "shop").is_err(), "taken: {object}");
    }
}
