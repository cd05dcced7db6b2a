//! What to say to somebody who writes an object into a cluster, before it is there.
//!
//! The CRDs refuse what a schema and CEL can see. This judges the rest, with the words of the parser that the controller will read the
//! object with: a validating webhook asks it. Our own kinds are refused for what is wrong with them. A route is the Gateway API's, whose
//! rules the API server has checked; what the mesh makes nothing of is a warning, and the route's status says the same.

use serde_json::Value;

use crate::kind::Kind;
use crate::newer::take_newer_fields;
use crate::parse::parse;

/// What is said of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Review {
    /// Why it is refused, each with its field. Empty: it is taken.
    pub refusals: Vec<String>,
    /// What is doubtful about it.
    pub warnings: Vec<String>,
}

/// Judges an object that replaces `old`, if there is one, by itself: what it refers to may come later, and its status says what is missing.
///
/// An object that says what it said is always taken: who changes a finalizer has not written what is wrong with the rest.
pub fn review(object: &Value, old: Option<&Value>) -> Review {
    let name = object.get("kind").and_then(Value::as_str).unwrap_or_default();
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == name) else { return Review::default() };
    let spec = object.get("spec");
    if old.is_some_and(|old| old.get("spec") == spec) {
        return Review::default();
    }
    let mut object = object.clone();
    let newer = take_newer_fields(kind, &mut object);
    let mut review = Review::default();
    review
        .warnings
        .extend(newer.iter().map(|field| format!("{field}: is of a newer Gateway API, and passed over")));
    let parsed = match parse("", &object.to_string(), crate::kind::DEFAULT_NAMESPACE) {
        Ok(parsed) => parsed,
        Err(faults) => {
            let texts = faults.into_iter().map(|fault| said(&fault.path, &fault.message));
            // A gateway's route may say what no mesh does.
            if kind.is_gateway_api() {
                review.warnings.extend(texts);
            } else {
                review.refusals.extend(texts);
            }
            return review;
        }
    };
    let warnings = parsed.iter().flat_map(|parsed| &parsed.warnings);
    review.warnings.extend(warnings.map(|fault| said(&fault.path, &fault.message)));
    review
}

fn said(path: &str, message: &str) -> String {
    if path.is_empty() { message.to_owned() } else { format!("{path}: {message}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn access(expression: &str) -> Value {
        json!({
            "apiVersion": "outrigger.dev/v1alpha1", "kind": "AccessPolicy",
            "metadata": {"name": "a", "namespace": "shop", "managedFields": []},
            "spec": {
                "targetRef": {"kind": "Service", "name": "orders"},
                "rules": [{"action": "Deny", "to": [{"paths": [{"type": "RegularExpression", "value": expression}]}]}],
            },
            "status": {},
        })
    }

    #[test]
    fn what_no_schema_sees_is_refused() {
        let refused = review(&access("a("), None);
        assert_eq!(refused.refusals.len(), 1, "{refused:?}");
        assert!(refused.refusals[0].starts_with("spec.rules[0].to[0].paths[0]: "), "{refused:?}");
        assert_eq!(review(&access("/a.*"), None), Review::default());
        // Whoever removes a finalizer has not written the expression.
        assert_eq!(review(&access("a("), Some(&access("a("))), Review::default());
        assert!(!review(&access("b("), Some(&access("a("))).refusals.is_empty());
    }

    #[test]
    fn a_gateways_route_is_never_refused() {
        let route = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": "a", "namespace": "shop"},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "orders"}],
                "rules": [{"filters": [{"type": "CORS", "cors": {"maxAge": 5}}], "cache": {}}],
            },
        });
        let review = review(&route, None);
        assert_eq!(review.refusals, [""; 0]);
        assert!(review.warnings.iter().any(|text| text.contains("CORS")), "{review:?}");
        assert!(review.warnings.iter().any(|text| text.contains("cache")), "{review:?}");
    }
}
