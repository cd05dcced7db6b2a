//! The names of the kinds, and of objects.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The API version of our own kinds.
pub const API_VERSION: &str = "outrigger.dev/v1alpha1";
/// The API version of the Gateway API's routes.
pub const GATEWAY_API_VERSION: &str = "gateway.networking.k8s.io/v1";
/// The namespace of an object that names none, where the caller has no other.
pub const DEFAULT_NAMESPACE: &str = "default";

/// A kind of object that is kept in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Kind {
    /// What holds where nothing else is said.
    MeshDefaults,
    /// How services are called.
    TrafficPolicy,
    /// Who may call a workload.
    AccessPolicy,
    /// A service outside the mesh.
    ExternalService,
    /// The Gateway API's routes of HTTP requests.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// The Gateway API's routes of gRPC calls.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::MeshDefaults,
        Self::TrafficPolicy,
        Self::AccessPolicy,
        Self::ExternalService,
        Self::HttpRoute,
        Self::GrpcRoute,
    ];

    /// As it stands in `kind:`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MeshDefaults => "MeshDefaults",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::AccessPolicy => "AccessPolicy",
            Self::ExternalService => "ExternalService",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
        }
    }

    /// As it stands in the paths of the Kubernetes API.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::MeshDefaults => "meshdefaults",
            Self::TrafficPolicy => "trafficpolicies",
            Self::AccessPolicy => "accesspolicies",
            Self::ExternalService => "externalservices",
            Self::HttpRoute => "httproutes",
            Self::GrpcRoute => "grpcroutes",
        }
    }

    /// For hands that type it often.
    pub const fn short_name(self) -> &'static str {
        match self {
            Self::MeshDefaults => "md",
            Self::TrafficPolicy => "tp",
            Self::AccessPolicy => "ap",
            Self::ExternalService => "es",
            Self::HttpRoute => "hr",
            Self::GrpcRoute => "gr",
        }
    }

    /// As it stands in `apiVersion:`.
    pub const fn api_version(self) -> &'static str {
        if self.is_gateway_api() { GATEWAY_API_VERSION } else { API_VERSION }
    }

    /// Whether the kind is the Gateway API's, not ours.
    pub const fn is_gateway_api(self) -> bool {
        matches!(self, Self::HttpRoute | Self::GrpcRoute)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{}` is no kind; there are MeshDefaults, TrafficPolicy, AccessPolicy, ExternalService, HTTPRoute and GRPCRoute",
    .0.escape_debug()
)]
pub struct UnknownKind(pub String);

impl FromStr for Kind {
    type Err = UnknownKind;

    /// Takes the kind, its plural and its short name, without regard to case.
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| {
                [kind.name(), kind.plural(), kind.short_name()]
                    .iter()
                    .any(|name| name.eq_ignore_ascii_case(text))
            })
            .ok_or_else(|| UnknownKind(text.chars().take(64).collect()))
    }
}

/// Which object: there is one of each kind, namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    /// The key of these.
    pub fn new(kind: Kind, namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// A text that is not `<kind> <namespace>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not of the form `<kind> <namespace>/<name>`", .0.escape_debug())]
pub struct NoKey(pub String);

impl FromStr for Key {
    type Err = NoKey;

    /// The reverse of `Display`.
    fn from_str(text: &str) -> Result<Self, NoKey> {
        let parts = || {
            let (kind, rest) = text.split_once(' ')?;
            let (namespace, name) = rest.split_once('/')?;
            let whole = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
            whole.then_some(Self::new(kind.parse().ok()?, namespace, name))
        };
        parts().ok_or_else(|| NoKey(text.chars().take(64).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_three_names_in_any_case() {
        for kind in Kind::ALL {
            for name in [kind.name(), kind.plural(), kind.short_name()] {
                assert_eq!(name.parse(), Ok(kind));
                assert_eq!(name.to_uppercase().parse(), Ok(kind));
            }
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        assert!("service".parse::<Kind>().is_err());
        assert!("".parse::<Kind>().is_err());
    }

    #[test]
    fn a_key_reads_back() {
        let key = Key::new(Kind::HttpRoute, "shop", "orders.v2");
        assert_eq!(key.to_string(), "HTTPRoute shop/orders.v2");
        assert_eq!(key.to_string().parse(), Ok(key));
        for text in
            ["", "HTTPRoute", "HTTPRoute shop", "HTTPRoute /a", "HTTPRoute a/", "HTTPRoute a/b/c", "X a/b"]
        {
            assert!(text.parse::<Key>().is_err(), "{text}");
        }
    }
}
