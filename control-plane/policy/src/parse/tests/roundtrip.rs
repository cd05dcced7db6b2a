//! What is written is read back the same. Objects are drawn from the schemas, so that no field is forgotten.

use proptest::prelude::*;
use proptest::strategy::Union;
use serde_json::{Map, Value, json};

use crate::kind::Kind;
use crate::object::Object;
use crate::{parse, schema};

/// Texts that YAML writers get wrong.
fn text() -> BoxedStrategy<String> {
    const TRAPS: &[&str] = &[
        "",
        " ",
        "~",
        "null",
        "Null",
        "true",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "1",
        "1.0",
        "-1",
        "+1",
        "0x1f",
        "0o17",
        "010",
        "1e3",
        ".5",
        "5.",
        ".inf",
        "-.INF",
        ".nan",
        "1_000",
        "12:30:45",
        "2026-11-25",
        "2026-11-25T10:00:00Z",
        "=",
        "<<",
        "-",
        "--",
        "- a",
        "---",
        "...",
        "? a",
        ": a",
        "a: b",
        "a:",
        "a #b",
        "#a",
        "&a",
        "*a",
        "!a",
        "!!str a",
        "|",
        ">",
        "|-\n a",
        "'",
        "\"",
        "''",
        "it's",
        "%a",
        "@a",
        "`a",
        "[a",
        "]",
        "{a",
        "}",
        "a, b",
        ",",
        "\\",
        "\\n",
        "a\nb",
        "\na",
        "a\n",
        "a\n\n",
        "a\n \nb",
        " a",
        "a ",
        "\ta",
        "a\t",
        "a\rb",
        "\r\n",
        "\u{85}",
        "\u{2028}",
        "\u{feff}",
        "\u{0}",
        "\u{7f}",
        "\u{200b}",
        "é",
        "日本",
        "😀",
        "a\u{1}b",
    ];
    prop_oneof![
        proptest::sample::select(TRAPS).prop_map(str::to_owned),
        any::<String>(),
        "[a-z]{1,12}",
        "[ -~\n]{0,100}",
    ]
    .boxed()
}

/// Something that the schema takes.
fn instance(schema: &Value) -> BoxedStrategy<Value> {
    if let Some(names) = schema.get("enum").and_then(Value::as_array) {
        return proptest::sample::select(names.clone()).boxed();
    }
    if schema.get("x-kubernetes-int-or-string").is_some() {
        let values = [json!(400), json!(503), json!(599), json!("5xx"), json!("reset"), json!("data-loss")];
        return proptest::sample::select(values.to_vec()).boxed();
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => object(schema),
        Some("array") => {
            proptest::collection::vec(instance(&schema["items"]), 0..3).prop_map(Value::Array).boxed()
        }
        Some("boolean") => any::<bool>().prop_map(Value::Bool).boxed(),
        Some("integer") => {
            let bound = |word: &str, or| schema.get(word).and_then(Value::as_u64).unwrap_or(or);
            (bound("minimum", 0)..=bound("maximum", u32::MAX.into())).prop_map(|number| json!(number)).boxed()
        }
        Some("number") => (1..100_000_u32).prop_map(|number| json!(f64::from(number) / 1000.0)).boxed(),
        Some("string") if schema.get("pattern").is_some_and(|pattern| pattern == schema::rules::SPAN) => (0
            ..=crate::value::Span::MAX_MILLIS)
            .prop_map(|millis| json!(crate::value::Span::from_millis(millis)))
            .boxed(),
        Some("string") => text().prop_map(Value::String).boxed(),
        _ => prop_oneof![
            text().prop_map(Value::String),
            any::<bool>().prop_map(Value::Bool),
            Just(json!({"a": [1]}))
        ]
        .boxed(),
    }
}

fn object(schema: &Value) -> BoxedStrategy<Value> {
    if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
        return proptest::collection::btree_map(text(), instance(values), 0..3)
            .prop_map(|map| Value::Object(map.into_iter().collect()))
            .boxed();
    }
    let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    let properties = schema.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    let fields: Vec<BoxedStrategy<(String, Option<Value>)>> = properties
        .iter()
        .map(|(name, schema)| {
            let value = match (&**name, schema.get("type")) {
                // Texts with a spelling of their own.
                ("address", _) => {
                    proptest::sample::select(vec![json!("192.0.2.1"), json!("2001:db8::1")]).boxed()
                }
                ("grpcStatus", _) => {
                    proptest::sample::select(vec![json!(0), json!(16), json!("unavailable")]).boxed()
                }
                _ => instance(schema),
            };
            let name = name.clone();
            if required.iter().any(|required| *required == *name) {
                value.prop_map(move |value| (name.clone(), Some(value))).boxed()
            } else {
                proptest::option::of(value).prop_map(move |value| (name.clone(), value)).boxed()
            }
        })
        .collect();
    fields
        .prop_map(|fields| {
            let set = fields.into_iter().filter_map(|(name, value)| Some((name, value?)));
            Value::Object(set.collect::<Map<String, Value>>())
        })
        .boxed()
}

fn any_object() -> BoxedStrategy<Object> {
    let of = |kind: Kind| {
        let schema = schema::json(kind);
        let metadata = instance(&schema["properties"]["metadata"]);
        let spec = instance(&schema::spec(kind));
        (metadata, spec)
            .prop_map(move |(metadata, spec)| {
                let document =
                    json!({"apiVersion": kind.api_version(), "kind": kind.name(), "metadata": metadata, "spec": spec});
                serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{error}: {document:#}"))
            })
            .boxed()
    };
    Union::new(Kind::ALL.map(of)).boxed()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn yaml_reads_back(mut object in any_object()) {
        if object.metadata.namespace.is_empty() {
            object.metadata.namespace = "default".to_owned();
        }
        let yaml = object.to_yaml();
        // Read as it is by `serde`, without checks: any object, also one that no check takes.
        let read = parse::tests::unchecked(&yaml);
        prop_assert_eq!(read.as_ref(), Ok(&object), "{}", yaml);
    }

    #[test]
    fn json_reads_back(object in any_object()) {
        let json = serde_json::to_string(&object).unwrap();
        prop_assert_eq!(serde_json::from_str::<Object>(&json).unwrap(), object);
    }
}
