//! What is watched: our kinds, and those of the Gateway API that a mesh has to know.

use kube::core::ApiResource;
use outrigger_policy::Kind;

/// A resource of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Resource {
    /// Objects that are policies.
    Policy(Kind),
    /// What permits routes to refer to Services of other namespaces.
    ReferenceGrant,
}

impl Resource {
    pub(super) const ALL: [Self; 7] = [
        Self::Policy(Kind::MeshDefaults),
        Self::Policy(Kind::TrafficPolicy),
        Self::Policy(Kind::AccessPolicy),
        Self::Policy(Kind::ExternalService),
        Self::Policy(Kind::HttpRoute),
        Self::Policy(Kind::GrpcRoute),
        Self::ReferenceGrant,
    ];

    /// Whether the mesh brings its CRD. The Gateway API's may be missing, which is no fault.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Policy(kind) if !kind.is_gateway_api())
    }

    pub(super) fn api(self) -> ApiResource {
        // Gateway API before 1.5 serves grants as v1beta1 alone, and later ones still do.
        let (api_version, kind, plural) = match self {
            Self::Policy(kind) => (kind.api_version(), kind.name(), kind.plural()),
            Self::ReferenceGrant => {
                ("gateway.networking.k8s.io/v1beta1", "ReferenceGrant", "referencegrants")
            }
        };
        let (group, version) = api_version.split_once('/').unwrap_or_default();
        ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        }
    }

    /// The name of its CRD.
    pub(super) fn crd(self) -> String {
        let api = self.api();
        format!("{}.{}", api.plural, api.group)
    }
}

impl std::fmt::Display for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Policy(kind) => f.write_str(kind.name()),
            Self::ReferenceGrant => f.write_str("ReferenceGrant"),
        }
    }
}
