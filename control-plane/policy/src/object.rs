//! What every object has, whatever its kind.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::{self, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::kind::{Key, Kind};
use crate::kinds::{
    AccessPolicy, ExternalService, GrpcRoute, HttpRoute, MeshDefaults, ParentReference, TrafficPolicy,
};

/// Who and where an object is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Raw", rename_all = "camelCase")]
pub struct Metadata {
    /// Unique among its kind in its namespace: an RFC 1123 subdomain.
    pub name: String,
    /// Its namespace: an RFC 1123 label. Empty as it is read from a file that names none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// For people and tools to find it by.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// For people and tools to say more about it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The server's: grows with each change of the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// The server's: changes with each write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource_version: Option<String>,
    /// The server's: unique for all time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The server's: RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
}

/// [`Metadata`] as it is read: what else Kubernetes keeps there is no fault, and is forgotten.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Raw {
    name: String,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    generation: Option<i64>,
    #[serde(default)]
    resource_version: Option<String>,
    #[serde(default)]
    uid: Option<String>,
    #[serde(default)]
    creation_timestamp: Option<String>,
    #[serde(default, rename = "deletionTimestamp")]
    _deletion_timestamp: IgnoredAny,
    #[serde(default, rename = "deletionGracePeriodSeconds")]
    _deletion_grace_period_seconds: IgnoredAny,
    #[serde(default, rename = "finalizers")]
    _finalizers: IgnoredAny,
    #[serde(default, rename = "generateName")]
    _generate_name: IgnoredAny,
    #[serde(default, rename = "managedFields")]
    _managed_fields: IgnoredAny,
    #[serde(default, rename = "ownerReferences")]
    _owner_references: IgnoredAny,
    #[serde(default, rename = "selfLink")]
    _self_link: IgnoredAny,
}

impl From<Raw> for Metadata {
    fn from(raw: Raw) -> Self {
        Self {
            name: raw.name,
            namespace: raw.namespace.unwrap_or_default(),
            labels: raw.labels.unwrap_or_default(),
            annotations: raw.annotations.unwrap_or_default(),
            generation: raw.generation,
            resource_version: raw.resource_version,
            uid: raw.uid,
            creation_timestamp: raw.creation_timestamp,
        }
    }
}

/// What an object says, by its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Spec {
    /// See [`MeshDefaults`].
    MeshDefaults(MeshDefaults),
    /// See [`TrafficPolicy`].
    TrafficPolicy(Box<TrafficPolicy>),
    /// See [`AccessPolicy`].
    AccessPolicy(AccessPolicy),
    /// See [`ExternalService`].
    ExternalService(ExternalService),
    /// See [`HttpRoute`].
    HttpRoute(HttpRoute),
    /// See [`GrpcRoute`].
    GrpcRoute(GrpcRoute),
}

impl Spec {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::MeshDefaults(_) => Kind::MeshDefaults,
            Self::TrafficPolicy(_) => Kind::TrafficPolicy,
            Self::AccessPolicy(_) => Kind::AccessPolicy,
            Self::ExternalService(_) => Kind::ExternalService,
            Self::HttpRoute(_) => Kind::HttpRoute,
            Self::GrpcRoute(_) => Kind::GrpcRoute,
        }
    }

    /// What a route belongs to.
    pub(crate) fn parents(&self) -> Option<&[ParentReference]> {
        match self {
            Self::HttpRoute(HttpRoute { parent_refs, .. })
            | Self::GrpcRoute(GrpcRoute { parent_refs, .. }) => Some(parent_refs),
            _ => None,
        }
    }
}

/// One object as people write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Who and where it is.
    pub metadata: Metadata,
    /// What it says; its kind and API version follow from it.
    pub spec: Spec,
}

impl Object {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        self.spec.kind()
    }

    /// Its key.
    pub fn key(&self) -> Key {
        Key::new(self.kind(), &self.metadata.namespace, &self.metadata.name)
    }

    /// One document, as people write it.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).expect("an object holds nothing that YAML cannot say")
    }
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Document<'a> {
            api_version: &'a str,
            kind: Kind,
            metadata: &'a Metadata,
            spec: &'a Spec,
        }
        let kind = self.kind();
        let api_version = kind.api_version();
        Document { api_version, kind, metadata: &self.metadata, spec: &self.spec }.serialize(serializer)
    }
}

/// An object of a known kind as it is read. `status` is the server's, and is forgotten.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Document<S> {
    api_version: String,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    metadata: Metadata,
    spec: S,
    #[serde(default, rename = "status")]
    _status: IgnoredAny,
}

/// Reads an object whose kind is known already.
pub(crate) fn deserialize_as<'de, D: Deserializer<'de>>(
    kind: Kind,
    deserializer: D,
) -> Result<Object, D::Error> {
    fn read<'de, S: Deserialize<'de>, D: Deserializer<'de>>(
        kind: Kind,
        deserializer: D,
        spec: impl FnOnce(S) -> Spec,
    ) -> Result<Object, D::Error> {
        let document = Document::<S>::deserialize(deserializer)?;
        if document.api_version != kind.api_version() {
            let shown: String = document.api_version.chars().take(64).collect();
            return Err(de::Error::custom(format!(
                "apiVersion `{}` is not known for {kind}: write `{}`",
                shown.escape_debug(),
                kind.api_version()
            )));
        }
        Ok(Object { metadata: document.metadata, spec: spec(document.spec) })
    }
    match kind {
        Kind::MeshDefaults => read(kind, deserializer, Spec::MeshDefaults),
        Kind::TrafficPolicy => read(kind, deserializer, |spec| Spec::TrafficPolicy(Box::new(spec))),
        Kind::AccessPolicy => read(kind, deserializer, Spec::AccessPolicy),
        Kind::ExternalService => read(kind, deserializer, Spec::ExternalService),
        Kind::HttpRoute => read(kind, deserializer, Spec::HttpRoute),
        Kind::GrpcRoute => read(kind, deserializer, Spec::GrpcRoute),
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let name = value
            .get("kind")
            .and_then(serde_json::Value::as_str)
            .ok_or_else(|| de::Error::missing_field("kind"))?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        let kind =
            kind.ok_or_else(|| de::Error::custom(crate::kind::UnknownKind(name.chars().take(64).collect())))?;
        deserialize_as(kind, value).map_err(de::Error::custom)
    }
}

/// An object as stores keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// What was written.
    pub object: Object,
    /// The store's revision of the write.
    pub revision: u64,
    /// When it was first written, in Unix seconds: of two that conflict the older one stays.
    pub created: i64,
    /// When it was last written, in Unix seconds.
    pub updated: i64,
    /// Who wrote it last.
    pub author: String,
}

/// All that is in force.
pub type Policies = BTreeMap<Key, Arc<Stored>>;
