//! The API's part for policies: reading, writing, and what became of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use outrigger_policy::resolve::Condition;
use outrigger_policy::{Catalog, Fault, Key, Kind, Object, Parsed, Stored, parse};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::access::{Caller, Permission};
use super::{Api, Code, failed, failed_with};
use crate::policies::counts::Counts;
use crate::policies::writer::{Applied, Apply, Refused};

/// Bytes of a request that applies: as many as a file of policies may have.
pub(super) const MAX_APPLY: usize = 4 * 1024 * 1024;
/// Objects of one request.
const MAX_OBJECTS: usize = 1000;
/// Where objects are that name no namespace.
const DEFAULT_NAMESPACE: &str = outrigger_policy::kind::DEFAULT_NAMESPACE;
/// Who writes, as a caller with the admin token says: all of them bear the same one, so that it is a note and no proof.
/// Users of a cluster are called what the cluster calls them.
const AUTHOR: &str = "outrigger-author";
/// Characters of an author.
const MAX_AUTHOR: usize = 100;

/// An object with what became of it.
#[derive(Serialize)]
struct Item<'a> {
    #[serde(flatten)]
    stored: &'a Stored,
    status: Status<'a>,
}

#[derive(Serialize)]
struct Status<'a> {
    conditions: &'a [Condition],
    proxies: Counts,
}

/// Which policies are asked for.
pub(super) struct Selection {
    pub(super) kind: Option<Kind>,
    pub(super) namespace: Option<String>,
}

impl Selection {
    /// What the query of a path says.
    pub(super) fn read(uri: &Uri) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            kind: Option<String>,
            namespace: Option<String>,
        }
        let Query(fields) = Query::<Fields>::try_from_uri(uri).map_err(|error| error.body_text())?;
        // An empty value is a field of a form that was left empty.
        let kind = fields.kind.filter(|kind| !kind.is_empty()).map(|kind| kind.parse::<Kind>()).transpose();
        let namespace = fields.namespace.filter(|namespace| !namespace.is_empty());
        Ok(Self { kind: kind.map_err(|error| error.to_string())?, namespace })
    }
}

pub(super) async fn list(State(api): State<Arc<Api>>, uri: Uri) -> Response {
    let Selection { kind, namespace } = match Selection::read(&uri) {
        Ok(selection) => selection,
        Err(error) => return failed(Code::BadRequest, &error),
    };
    let picture = api.writer.picture();
    let counts = api.replicas.counts();
    let resolution = api.writer.resolution();
    let chosen = picture.policies.iter().filter(|(key, _)| {
        kind.is_none_or(|kind| kind == key.kind)
            && namespace.as_ref().is_none_or(|wanted| *wanted == key.namespace)
    });
    let items: Vec<Item<'_>> = chosen
        .map(|(key, stored)| Item {
            stored,
            status: Status {
                conditions: resolution.as_ref().map_or(&[], |resolution| resolution.resolved.conditions(key)),
                proxies: counts.get(key).cloned().unwrap_or_default(),
            },
        })
        .collect();
    Json(json!({ "revision": picture.revision, "items": items })).into_response()
}

pub(super) async fn one(State(api): State<Arc<Api>>, Path(path): Path<(String, String, String)>) -> Response {
    let picture = api.writer.picture();
    let found = key(path).and_then(|key| picture.policies.get(&key).map(|stored| (key, stored)));
    let Some((key, stored)) = found else { return no_such_object() };
    let resolution = api.writer.resolution();
    let conditions = resolution.as_ref().map_or(&[][..], |resolution| resolution.resolved.conditions(&key));
    let proxies = api.replicas.counts().remove(&key).unwrap_or_default();
    Json(Item { stored, status: Status { conditions, proxies } }).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ApplyRequest {
    objects: Vec<Value>,
    /// Of objects that go in the same write.
    #[serde(default)]
    deletions: Vec<String>,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    expect: BTreeMap<String, u64>,
}

pub(super) async fn apply(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    request: Result<Json<ApplyRequest>, JsonRejection>,
) -> Response {
    let request = match request {
        Ok(Json(request)) => request,
        Err(error) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            return failed(Code::TooLarge, "more than 4 MiB; apply fewer objects at once");
        }
        Err(error) => return failed(Code::BadRequest, &error.body_text()),
    };
    if request.objects.len() + request.deletions.len() > MAX_OBJECTS {
        return failed(Code::TooLarge, &format!("more than {MAX_OBJECTS} objects; apply fewer at once"));
    }
    let mut apply = Apply { dry_run: request.dry_run, author: author(&caller, &headers), ..Apply::default() };
    let mut faults = Vec::new();
    for (at, object) in request.objects.iter().enumerate() {
        match read(&format!("objects[{at}]"), object) {
            // The writer finds again what is doubtful in it.
            Ok(parsed) => apply.objects.push(parsed.object),
            Err(found) => faults.extend(found),
        }
    }
    let mut named = |list: &str, name: &str| {
        let fault = |message| Fault { file: list.to_owned(), message, ..Fault::default() };
        name.parse::<Key>().map_err(|error| faults.push(fault(error.to_string()))).ok()
    };
    apply.deletions = request.deletions.iter().filter_map(|name| named("deletions", name)).collect();
    let expected = request.expect.iter().filter_map(|(name, at)| Some((named("expect", name)?, *at)));
    apply.expect = expected.collect();
    if !faults.is_empty() {
        return refused(Refused::Invalid(faults));
    }
    let mut needed = Vec::new();
    if caller.name().is_some() {
        let picture = api.writer.picture();
        for key in apply.objects.iter().map(Object::key) {
            needed.push(Permission::write(&picture, &key));
            if !picture.policies.contains_key(&key) {
                // Who may create and not change must not do so because somebody else is faster.
                apply.expect.entry(key).or_insert(0);
            }
        }
        needed.extend(apply.deletions.iter().map(|key| Permission::policy("delete", key)));
    }
    if let Err(refused) = api.access.require(&caller, &needed).await {
        return refused;
    }
    answer(api.writer.apply(apply).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Deletion {
    revision: Option<u64>,
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    Path(path): Path<(String, String, String)>,
    query: Result<Query<Deletion>, QueryRejection>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
) -> Response {
    let Query(Deletion { revision, dry_run }) = match query {
        Ok(query) => query,
        Err(error) => return failed(Code::BadRequest, &error.body_text()),
    };
    let Some(key) = key(path) else { return no_such_object() };
    // Else a caller who expects a revision would hear of a conflict where there is nothing to conflict with.
    if !api.writer.picture().policies.contains_key(&key) {
        return no_such_object();
    }
    let expect = revision.map(|revision| (key.clone(), revision)).into_iter().collect();
    let author = author(&caller, &headers);
    let apply = Apply { deletions: vec![key], dry_run, expect, author, ..Apply::default() };
    match api.writer.apply(apply).await {
        Ok(Applied { revision, results }) => {
            let warnings: Vec<String> = results.into_iter().flat_map(|result| result.warnings).collect();
            Json(json!({ "revision": revision, "warnings": warnings })).into_response()
        }
        Err(error) => refused(error),
    }
}

pub(super) async fn history(
    State(api): State<Arc<Api>>,
    Path(path): Path<(String, String, String)>,
) -> Response {
    let Some(key) = key(path) else { return no_such_object() };
    match api.writer.history(&key).await {
        Ok(items) if items.is_empty() => no_such_object(),
        Ok(items) => Json(json!({ "items": items })).into_response(),
        Err(error) => refused(error),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Rollback {
    revision: u64,
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn rollback(
    State(api): State<Arc<Api>>,
    Path(path): Path<(String, String, String)>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    request: Result<Json<Rollback>, JsonRejection>,
) -> Response {
    let Rollback { revision, dry_run } = match request {
        Ok(Json(request)) => request,
        Err(error) => return failed(Code::BadRequest, &error.body_text()),
    };
    let Some(key) = key(path) else { return no_such_object() };
    answer(api.writer.roll_back(&key, revision, dry_run, author(&caller, &headers)).await)
}

pub(super) async fn catalog(State(api): State<Arc<Api>>) -> Response {
    let grants = api.writer.picture().grants.clone();
    Json(Catalog { grants, ..api.mesh.policy_catalog() }).into_response()
}

/// An object as a file would have it, with all that is wrong with it.
fn read(name: &str, object: &Value) -> Result<Parsed, Vec<Fault>> {
    // JSON is YAML: what the CLI reads from a file and what a caller sends are judged by the same rules.
    let mut parsed = parse(name, &object.to_string(), DEFAULT_NAMESPACE).map_err(|faults| {
        // The caller does not know the lines of a text that it has not written.
        faults.into_iter().map(|fault| Fault { line: 0, column: 0, ..fault }).collect::<Vec<_>>()
    })?;
    match (parsed.pop(), parsed.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => Err(vec![Fault {
            file: name.to_owned(),
            message: "it is not one object".to_owned(),
            ..Fault::default()
        }]),
    }
}

/// The key of a path. `None`: no object can have it.
pub(super) fn key((kind, namespace, name): (String, String, String)) -> Option<Key> {
    let fits = |text: &str, longest: usize| {
        let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        !text.is_empty() && text.len() <= longest && text.bytes().all(known) && !text.contains("..")
    };
    (fits(&namespace, 63) && fits(&name, 253)).then_some(())?;
    Some(Key::new(kind.parse().ok()?, namespace, name))
}

fn author(caller: &Caller, headers: &HeaderMap) -> String {
    if let Some(name) = caller.name() {
        return name.to_owned();
    }
    let said = headers.get(AUTHOR).and_then(|value| value.to_str().ok()).map(str::trim).unwrap_or_default();
    let said: String = said.chars().filter(|c| !c.is_control()).take(MAX_AUTHOR).collect();
    if said.is_empty() { "admin".to_owned() } else { said }
}

fn answer(result: Result<Applied, Refused>) -> Response {
    match result {
        Ok(applied) => Json(applied).into_response(),
        Err(error) => refused(error),
    }
}

fn refused(error: Refused) -> Response {
    match error {
        Refused::Invalid(faults) => {
            let count = faults.len();
            let message = format!(
                "nothing was changed: {count} {} at fault",
                if count == 1 { "field is" } else { "fields are" }
            );
            failed_with(Code::Invalid, &message, &faults)
        }
        Refused::Conflict(message) => failed(Code::Conflict, &message),
        Refused::Missing(message) => failed(Code::NotFound, &message),
        Refused::TooLarge(message) => failed(Code::TooLarge, &message),
        Refused::Unavailable(message) => failed(Code::StoreUnavailable, &message),
    }
}

fn no_such_object() -> Response {
    failed(Code::NotFound, "there is no such object")
}
