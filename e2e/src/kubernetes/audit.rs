//! The API server's audit log: who asked for what, and what the answer was.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::Deserialize;

/// Every request once, when it is answered or, if it is a watch, when it starts and when it ends; without bodies.
pub(super) const POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{ level: Metadata }]
";

/// A request that the API server has answered.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct Request {
    /// Who asked: `system:serviceaccount:<namespace>:<name>` for a service account; empty where nobody was recognized.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`; a lower-case method where no resource is meant.
    pub verb: String,
    /// API group; empty for the core's.
    pub group: String,
    /// Resource, `pods`; with its subresource, `pods/status`. Empty where a plain path was asked for.
    pub resource: String,
    /// Namespace, empty for resources of the cluster.
    pub namespace: String,
    /// Name, empty for lists and watches.
    pub name: String,
    /// Path and query, as asked.
    pub uri: String,
    /// Status code of the answer.
    pub code: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    user: User,
    object_ref: Option<Reference>,
    response_status: Option<Status>,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Reference {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
    api_group: String,
}

#[derive(Deserialize)]
struct Status {
    code: Option<u16>,
}

/// Reads the log. Its last line may still be under way, and is left out then.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Request>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line| -> anyhow::Result<Request> {
        let event: Event = serde_json::from_str(line).with_context(|| format!("reading {line}"))?;
        let object = event.object_ref.unwrap_or_default();
        let slash = if object.subresource.is_empty() { "" } else { "/" };
        Ok(Request {
            user: event.user.username,
            verb: event.verb,
            group: object.api_group,
            resource: format!("{}{slash}{}", object.resource, object.subresource),
            namespace: object.namespace,
            name: object.name,
            uri: event.request_uri,
            code: event.response_status.and_then(|status| status.code).unwrap_or(0),
        })
    };
    whole.lines().map(parse).collect()
}
