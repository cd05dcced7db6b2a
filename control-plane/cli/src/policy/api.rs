//! The API of policies, as `docs/cli.md` and `/api/v1/openapi.json` describe it.

use std::{collections::BTreeMap, fmt, sync::Arc};

use anyhow::Result;
use http::StatusCode;
use outrigger_policy::{Catalog, Key, Kind, Object, Policies, Stored};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::{Map, Value};

use crate::client::{Refusal, Server, segment};

/// An object as the controller keeps it, and what became of it.
#[derive(Deserialize)]
pub(crate) struct Item {
    pub(crate) object: Object,
    pub(crate) revision: u64,
    /// Unix seconds, as `updated`.
    pub(crate) created: i64,
    pub(crate) updated: i64,
    pub(crate) author: String,
    #[serde(default)]
    pub(crate) status: Status,
}

impl Item {
    fn into_stored(self) -> Stored {
        Stored {
            object: self.object,
            revision: self.revision,
            created: self.created,
            updated: self.updated,
            author: self.author,
        }
    }
}

/// What became of an object.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Status {
    #[serde(default)]
    pub(crate) conditions: Vec<Condition>,
    #[serde(default)]
    pub(crate) proxies: Reach,
}

/// One condition, in the Gateway API's words.
#[derive(Serialize, Deserialize)]
pub(crate) struct Condition {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) status: String,
    pub(crate) reason: String,
    pub(crate) message: String,
    /// Of a route: the parent that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<Map<String, Value>>,
}

impl Condition {
    /// Whether somebody should look at it.
    pub(crate) fn is_bad(&self) -> bool {
        // One condition is about something wrong: it is well when it does not hold.
        (self.status == "True") == (self.kind == "PartiallyInvalid")
    }
}

/// How far an object has come.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Reach {
    /// Proxies that were sent it.
    #[serde(default)]
    pub(crate) on: u64,
    /// Those that took it.
    #[serde(default)]
    pub(crate) accepted: u64,
    /// Those that did not.
    #[serde(default)]
    pub(crate) refused: Vec<RefusedBy>,
}

/// A proxy that did not take an object.
#[derive(Serialize, Deserialize)]
pub(crate) struct RefusedBy {
    pub(crate) proxy: String,
    pub(crate) reason: String,
}

#[derive(Deserialize)]
struct Items<T> {
    items: Vec<T>,
}

/// What to write.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Apply<'a> {
    pub(crate) objects: Vec<&'a Object>,
    /// What goes in the same write, by key.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) deletions: Vec<String>,
    pub(crate) dry_run: bool,
    /// The revisions that must hold for it to happen, by key.
    pub(crate) expect: BTreeMap<String, u64>,
}

/// What was written.
#[derive(Deserialize)]
pub(crate) struct Applied {
    pub(crate) results: Vec<Written>,
}

/// What was written of one object.
#[derive(Deserialize)]
pub(crate) struct Written {
    #[serde(deserialize_with = "key")]
    pub(crate) key: Key,
    pub(crate) action: String,
    pub(crate) revision: u64,
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
}

/// One revision of an object.
#[derive(Serialize, Deserialize)]
pub(crate) struct Past {
    pub(crate) revision: u64,
    /// Unix seconds.
    pub(crate) time: i64,
    pub(crate) author: String,
    pub(crate) action: String,
    /// What it then was; none where it was deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<Object>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rollback {
    revision: u64,
    dry_run: bool,
}

fn key<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
}

fn path(key: &Key) -> String {
    format!("/api/v1/policies/{}/{}/{}", key.kind, segment(&key.namespace), segment(&key.name))
}

/// All objects, or those of a kind, a namespace or both.
pub(crate) async fn list(server: &Server, kind: Option<Kind>, namespace: Option<&str>) -> Result<Vec<Item>> {
    let kind = kind.map(|kind| format!("kind={kind}"));
    let namespace = namespace.map(|namespace| format!("namespace={}", segment(namespace)));
    let query: Vec<String> = kind.into_iter().chain(namespace).collect();
    let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    Ok(server.get::<Items<Item>>(&format!("/api/v1/policies{query}")).await?.items)
}

/// One object.
pub(crate) async fn get(server: &Server, key: &Key) -> Result<Item> {
    server.get(&path(key)).await.map_err(missing)
}

/// All that is in force, and what it is about.
pub(crate) async fn everything(server: &Server) -> Result<(Policies, Catalog)> {
    let stored = list(server, None, None).await?.into_iter().map(Item::into_stored);
    let policies = stored.map(|stored| (stored.object.key(), Arc::new(stored))).collect();
    Ok((policies, server.get("/api/v1/catalog").await?))
}

pub(crate) async fn apply(server: &Server, apply: &Apply<'_>) -> Result<Applied> {
    server.post("/api/v1/policies/apply", apply).await
}

/// Deletes an object; with `revision` only if that is what holds. Returns what is doubtful about that.
pub(crate) async fn delete(
    server: &Server,
    key: &Key,
    revision: Option<u64>,
    dry_run: bool,
) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Deleted {
        #[serde(default)]
        warnings: Vec<String>,
    }
    let revision = revision.map(|revision| format!("&revision={revision}")).unwrap_or_default();
    let path = format!("{}?dryRun={dry_run}{revision}", path(key));
    let deleted: Deleted = server.delete(&path).await.map_err(missing)?;
    Ok(deleted.warnings)
}

/// The last revisions of an object, the newest first.
pub(crate) async fn history(server: &Server, key: &Key) -> Result<Vec<Past>> {
    let answer = server.get::<Items<Past>>(&format!("{}/history", path(key))).await;
    let mut items = answer.map_err(missing)?.items;
    items.sort_by_key(|past| std::cmp::Reverse(past.revision));
    Ok(items)
}

pub(crate) async fn rollback(server: &Server, key: &Key, revision: u64, dry_run: bool) -> Result<Applied> {
    let answer = server.post(&format!("{}/rollback", path(key)), &Rollback { revision, dry_run }).await;
    answer.map_err(missing)
}

/// Whether the controller said that there is no such object.
pub(crate) fn is_missing(error: &anyhow::Error) -> bool {
    error.is::<Missing>()
}

/// There is no such object: told in the controller's words alone, for a name that was mistyped is the common case.
#[derive(Debug)]
struct Missing(String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

fn missing(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<Refusal>() {
        Some(refusal) if refusal.status == StatusCode::NOT_FOUND && !refusal.message.is_empty() => {
            Missing(refusal.message.clone()).into()
        }
        _ => error,
    }
}
