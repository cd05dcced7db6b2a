//! Objects as a cluster's API server holds them.
//!
//! Our own kinds are read as everywhere: a field that nobody knows is refused. The Gateway API is another project's, and a cluster may
//! have a newer version of it than this one knows: what is new there is taken out and named, for a route that is refused whole
//! because of a field that its author did not write would help nobody.

use std::sync::LazyLock;

use serde_json::Value;

use crate::kind::Kind;
use crate::{schema, tree};

/// Takes what this version does not know out of the `spec` of a Gateway API object, and returns where it was. Of our own kinds nothing.
pub fn take_newer_fields(kind: Kind, object: &mut Value) -> Vec<String> {
    static HTTP: LazyLock<Value> = LazyLock::new(|| schema::spec(Kind::HttpRoute));
    static GRPC: LazyLock<Value> = LazyLock::new(|| schema::spec(Kind::GrpcRoute));
    let known = match kind {
        Kind::HttpRoute => &*HTTP,
        Kind::GrpcRoute => &*GRPC,
        _ => return Vec::new(),
    };
    let mut taken = Vec::new();
    if let Some(spec) = object.get_mut("spec") {
        take("spec", spec, known, &mut taken);
    }
    taken
}

fn take(at: &str, value: &mut Value, known: &Value, taken: &mut Vec<String>) {
    match (value, known.get("properties"), known.get("items")) {
        (Value::Object(fields), Some(properties), _) => fields.retain(|name, field| {
            let at = format!("{at}{}", tree::field_text(name));
            match properties.get(name) {
                Some(known) => take(&at, field, known, taken),
                None => taken.push(at),
            }
            properties.get(name).is_some()
        }),
        (Value::Array(list), _, Some(items)) => {
            for (number, item) in list.iter_mut().enumerate() {
                take(&format!("{at}[{number}]"), item, items, taken);
            }
        }
        // What a field holds that is not supported at all is nobody's business.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_newer_gateway_api_has_is_taken_out_and_named() {
        let mut route = json!({"spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "a", "zone": "b"}],
            "rules": [{"name": "x", "cache": {"ttl": "1s"}, "filters": [{"type": "CORS", "cors": {"anything": 1}}]}],
            "mood": "good",
        }});
        let mut taken = take_newer_fields(Kind::HttpRoute, &mut route);
        taken.sort();
        assert_eq!(taken, ["spec.mood", "spec.parentRefs[0].zone", "spec.rules[0].cache"]);
        assert_eq!(
            route,
            json!({"spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "a"}],
                "rules": [{"name": "x", "filters": [{"type": "CORS", "cors": {"anything": 1}}]}],
            }})
        );
        let mut own = json!({"spec": {"mood": "good"}});
        assert!(take_newer_fields(Kind::AccessPolicy, &mut own).is_empty());
        assert_eq!(own, json!({"spec": {"mood": "good"}}));
    }
}
