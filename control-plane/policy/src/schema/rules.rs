//! What schemas say beyond shapes and bounds: patterns of texts, and rules in CEL for what one field asks of another.
//!
//! They repeat [`crate::check`], which stays the judge: an API server that takes less than it for an object tells its author at
//! once, and one that takes more is found out by the controller, in the object's status. A pattern costs the API server nothing, so
//! texts in long lists have one; a rule has a message for people, so single fields have one. What neither can say (whether an
//! expression is one, whether names are there twice in other fields) is left to the judge.

use schemars::Schema;
use serde_json::{Value, json};

/// A word of RFC 9110, 5.6.2.
pub(crate) const TOKEN: &str = "^[!#$%&'*+.^_`|~0-9A-Za-z-]+$";
/// RFC 1123, a label.
pub(crate) const LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// RFC 1123, a subdomain.
pub(crate) const SUBDOMAIN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
/// A service's name, as catalogs hold it.
pub(crate) const SERVICE: &str = r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*$";
/// The name of a rule or a limit.
pub(crate) const RULE_NAME: &str = "^[A-Za-z0-9_.-]+$";
/// A path without a query.
pub(crate) const PATH: &str = "^/[^?#]*$";
/// A path of a health check.
pub(crate) const PATH_AND_QUERY: &str = "^/";
/// A label's value, as Kubernetes has it.
const LABEL_VALUE: &str = "^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$";
/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
pub(crate) const IDENTITY: &str = r"^spiffe://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/ns/[a-z0-9]([-a-z0-9]*[a-z0-9])?/sa/[a-z0-9]([-a-z0-9.]*[a-z0-9])?$";
/// An identity, or the beginning of one and `*`.
pub(crate) const IDENTITY_PATTERN: &str = r"^(\*|spiffe://[a-z0-9./-]*\*|spiffe://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/ns/[a-z0-9]([-a-z0-9]*[a-z0-9])?/sa/[a-z0-9]([-a-z0-9.]*[a-z0-9])?)$";
/// `<namespace>/<service account>`.
pub(crate) const SERVICE_ACCOUNT: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9.]*[a-z0-9])?$";
/// A length of time (GEP-2257).
pub(crate) const SPAN: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";

/// Where Kubernetes looks for rules.
pub(crate) const VALIDATIONS: &str = "x-kubernetes-validations";

/// Rules, each with what is said where it does not hold.
pub(crate) fn cel(rules: &[(&str, &str)]) -> Value {
    let one = |(rule, message): &(&str, &str)| json!({"rule": rule, "message": message});
    rules.iter().map(one).collect()
}

const IS_SPAN: (&str, &str) = (
    "self.matches('^([0-9]{1,5}(h|m|s|ms)){1,4}$') && duration(self) <= duration('1000h')",
    "is no length of time of at most 1000h: write numbers with h, m, s or ms, as in `1m30s`, `2s` or `250ms`",
);

/// Of every length of time.
pub(crate) fn span() -> Value {
    cel(&[IS_SPAN])
}

/// Of one that must not be nothing.
pub(crate) fn lasting_span() -> Value {
    cel(&[IS_SPAN, ("duration(self) > duration('0s')", "is 0: it must be longer")])
}

/// A list of networks.
pub(crate) fn networks(schema: &mut Schema) {
    if let Some(items) = schema.get_mut("items").and_then(Value::as_object_mut) {
        items.insert("format".to_owned(), json!("cidr"));
    }
}

/// A mapping of labels.
pub(crate) fn labels(schema: &mut Schema) {
    if let Some(values) = schema.get_mut("additionalProperties").and_then(Value::as_object_mut) {
        values.insert("maxLength".to_owned(), json!(crate::bounds::MAX_LABEL));
        values.insert("pattern".to_owned(), json!(LABEL_VALUE));
    }
    schema.insert("maxProperties".to_owned(), json!(crate::bounds::MAX_LABELS));
}
