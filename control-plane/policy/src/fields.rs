//! Which of the Gateway API's fields are supported, and what to use instead of the others.
//!
//! The fields come from the types themselves, the reasons from one list, which is also what refuses them.

use serde::Serialize;

use crate::kind::Kind;
use crate::schema;

/// A field of a Gateway API kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Field {
    /// `HTTPRoute` or `GRPCRoute`.
    pub kind: Kind,
    /// As in `spec.rules[].matches[].path.type`.
    pub field: String,
    /// What becomes of it.
    pub support: Support,
}

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Support {
    /// It does what the Gateway API says.
    Supported,
    /// It does a part of what the Gateway API says.
    Limited {
        /// Which.
        reason: &'static str,
    },
    /// An object with it is refused.
    Refused {
        /// Why, and what to use instead.
        reason: &'static str,
    },
}

/// The last part of a field's path, and why it is refused, with all below it.
const REFUSED: [(&str, &str); 5] = [
    ("useDefaultGateways", "it attaches a route to gateways; name the Service in `parentRefs`"),
    (
        "sessionPersistence",
        "the mesh keeps no sessions; use a TrafficPolicy with `loadBalancer.algorithm: RingHash` and a `hash` by cookie or header",
    ),
    ("cors", "CORS is between a browser and an edge; let the application or the gateway answer it"),
    ("externalAuth", "the mesh asks nobody else; use an AccessPolicy, or authorize in the application"),
    ("extensionRef", "there are no extensions; timeouts, retries and faults are a TrafficPolicy's"),
];

/// The last parts of a field's path, and what of it is supported.
const LIMITED: [(&str, &str); 11] = [
    ("parentRefs[].group", "`\"\"` for a Service; others are left to the controller that they are for"),
    ("parentRefs[].kind", "`Service`; others are left to the controller that they are for"),
    (
        "parentRefs[].namespace",
        "another namespace than the route's makes it a consumer route: it holds for clients of the route's namespace",
    ),
    ("parentRefs[].sectionName", "the name of the Service's port"),
    ("spec.hostnames", "says nothing for a Service (GEP-1294); match the header `host`"),
    ("backendRefs[].group", "`\"\"`; the share of another one gets 500"),
    ("backendRefs[].kind", "`Service`; the share of another one gets 500"),
    ("backendRef.group", "`\"\"`; nothing is sent to another one"),
    ("backendRef.kind", "`Service`; nothing is sent to another one"),
    (
        "backendRefs[].namespace",
        "another namespace than the route's: in Kubernetes only with a ReferenceGrant there, elsewhere any of the mesh",
    ),
    ("matches[].path.type", "RegularExpression: the syntax of the `regex` crate, of the whole path"),
];

/// Why a field is refused.
pub(crate) fn refusal(field: &str) -> &'static str {
    REFUSED.iter().find(|(name, _)| *name == field).map_or("the mesh does not do this", |(_, reason)| reason)
}

/// Every field of `HTTPRoute` and `GRPCRoute`, but for those below one that is refused.
pub fn fields() -> Vec<Field> {
    [Kind::HttpRoute, Kind::GrpcRoute].into_iter().flat_map(of_kind).collect()
}

fn of_kind(kind: Kind) -> Vec<Field> {
    let mut fields = Vec::new();
    for field in schema::paths(kind) {
        let last = field.rsplit('.').next().unwrap_or(&field).trim_end_matches("[]");
        // Only backends that are redirected to somebody else are none.
        let in_backend = field.contains("backendRefs[].filters[].requestRedirect");
        let support = if let Some((_, reason)) = REFUSED.iter().find(|(name, _)| *name == last) {
            Support::Refused { reason }
        } else if in_backend {
            Support::Refused { reason: "a redirect goes to no backend; put it into the rule's `filters`" }
        } else {
            let limit = LIMITED.iter().find(|(end, _)| field.trim_end_matches("[]").ends_with(end));
            limit.map_or(Support::Supported, |(_, reason)| Support::Limited { reason })
        };
        fields.push(Field { kind, field, support });
    }
    fields
}

#[cfg(test)]
mod tests;
