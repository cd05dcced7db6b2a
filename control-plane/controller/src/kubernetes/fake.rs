//! An API server in memory, for tests under paused time: it speaks the real protocol to the real client, without a socket.
//! Versions and their conflicts, lists, watches, merge and apply patches are there; schemas, defaults and permissions are not:
//! those are for the real one (`e2e/tests`).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::{StreamExt, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Method, Request, Response, StatusCode, Uri};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::watch;

/// A cluster's state, shared by its clients.
#[derive(Clone)]
pub(crate) struct Cluster {
    state: Arc<Mutex<State>>,
    version: watch::Sender<u64>,
}

/// What a client's way to the API server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// Requests are refused.
    Down,
    /// Requests are never answered.
    Silent,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Id, Value>,
    /// Every change: its version, what, and the event.
    log: Vec<(u64, Id, Value)>,
    /// Every request that changed something: its method and its last path segments.
    writes: Vec<String>,
    evictions: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Id {
    resource: String,
    namespace: String,
    name: String,
}

type Reply = Response<UnsyncBoxBody<Bytes, Infallible>>;

impl Cluster {
    pub(crate) fn new() -> Self {
        Self { state: Arc::default(), version: watch::Sender::new(1) }
    }

    /// A client, and the switch of its way here.
    pub(crate) fn client(&self) -> (Client, watch::Sender<Way>) {
        let switch = watch::Sender::new(Way::Open);
        let (cluster, way) = (self.clone(), switch.subscribe());
        let service = tower::service_fn(move |request: Request<Body>| {
            let (cluster, mut way) = (cluster.clone(), way.clone());
            async move {
                let now = *way.borrow_and_update();
                match now {
                    Way::Open => Ok(cluster.answer(request).await),
                    Way::Down => Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)),
                    Way::Silent => std::future::pending().await,
                }
            }
        });
        (Client::new(service, "default"), switch)
    }

    /// Writes an object as somebody else would.
    pub(crate) fn put(&self, resource: &str, mut object: Value) {
        let text =
            |object: &Value, field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let id = Id {
            resource: resource.to_owned(),
            namespace: text(&object, "namespace"),
            name: text(&object, "name"),
        };
        object["metadata"]["resourceVersion"] = Value::Null;
        self.store(&mut self.lock(), id, object);
    }

    pub(crate) fn remove(&self, resource: &str, namespace: &str, name: &str) {
        let id = Id { resource: resource.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
        self.delete(&mut self.lock(), &id);
    }

    pub(crate) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        let id = Id { resource: resource.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
        self.lock().objects.get(&id).cloned()
    }

    /// The changes of clients since the last call, as `PUT secrets/name`.
    pub(crate) fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().writes)
    }

    /// What was sent to evict pods.
    pub(crate) fn evictions(&self) -> Vec<Value> {
        std::mem::take(&mut self.lock().evictions)
    }

    /// Waits until the condition holds; paused time makes the deadline cheap.
    pub(crate) async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let mut version = self.version.subscribe();
        let waiting = async {
            while !holds(self) {
                let _ = version.changed().await;
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_mins(10), waiting).await;
        waited.unwrap_or_else(|_| panic!("in vain: {what}"));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn store(&self, state: &mut State, id: Id, mut object: Value) -> Value {
        let version = *self.version.borrow() + 1;
        let known = state.objects.get(&id);
        object["metadata"]["name"] = json!(id.name);
        if !id.namespace.is_empty() {
            object["metadata"]["namespace"] = json!(id.namespace);
        }
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let event = json!({ "type": if known.is_some() { "MODIFIED" } else { "ADDED" }, "object": object });
        state.log.push((version, id.clone(), event));
        state.objects.insert(id, object.clone());
        self.version.send_replace(version);
        object
    }

    fn delete(&self, state: &mut State, id: &Id) {
        let Some(mut object) = state.objects.remove(id) else { return };
        let version = *self.version.borrow() + 1;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        state.log.push((version, id.clone(), json!({ "type": "DELETED", "object": object })));
        self.version.send_replace(version);
    }

    async fn answer(&self, request: Request<Body>) -> Reply {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let (id, selector) = (id(&parts.uri), Selector::of(&parts.uri));
        if parts.method == Method::GET && id.name.is_empty() {
            return if selector.watches { self.watch(id, selector) } else { self.list(&id, &selector) };
        }
        let mut state = self.lock();
        let known = state.objects.get(&id).cloned();
        if parts.uri.path().ends_with("/eviction") {
            self.delete(&mut state, &id);
            state.evictions.push(body);
            return reply(&json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" }));
        }
        if parts.method != Method::GET {
            let name = if id.name.is_empty() { body["metadata"]["name"].as_str() } else { Some(&*id.name) };
            state.writes.push(format!("{} {}/{}", parts.method, id.resource, name.unwrap_or_default()));
        }
        let claimed = body["metadata"]["resourceVersion"]
            .as_str()
            .or(body["preconditions"]["resourceVersion"].as_str());
        if let (Some(known), Some(claimed)) = (&known, claimed)
            && known["metadata"]["resourceVersion"] != claimed
        {
            return failure(StatusCode::CONFLICT, "Conflict");
        }
        match (&parts.method, known) {
            (&Method::POST, _) => {
                let name = body["metadata"]["name"].as_str().unwrap().to_owned();
                let id = Id { name, ..id };
                if state.objects.contains_key(&id) {
                    failure(StatusCode::CONFLICT, "AlreadyExists")
                } else {
                    reply(&self.store(&mut state, id, body))
                }
            }
            (&Method::GET, Some(known)) => reply(&known),
            (&Method::PUT, Some(_)) => reply(&self.store(&mut state, id, body)),
            (&Method::DELETE, Some(known)) => {
                self.delete(&mut state, &id);
                reply(&known)
            }
            (&Method::PATCH, known) => {
                let applies = parts.headers["content-type"].to_str().unwrap().contains("apply");
                let Some(mut object) = known.or_else(|| applies.then(|| json!({ "metadata": {} }))) else {
                    return failure(StatusCode::NOT_FOUND, "NotFound");
                };
                merge(&mut object, &body);
                reply(&self.store(&mut state, id, object))
            }
            _ => failure(StatusCode::NOT_FOUND, "NotFound"),
        }
    }

    fn list(&self, of: &Id, selector: &Selector) -> Reply {
        let state = self.lock();
        let items: Vec<_> = state
            .objects
            .iter()
            .filter(|(id, object)| selector.takes(of, id, object))
            .map(|(_, object)| object)
            .collect();
        reply(
            &json!({ "metadata": { "resourceVersion": self.version.borrow().to_string() }, "items": items }),
        )
    }

    /// The first event after a version, as a watch sends it.
    fn after(&self, since: u64, of: &Id, selector: &Selector) -> Option<(u64, Bytes)> {
        let state = self.lock();
        let takes =
            |(at, id, event): &&(u64, Id, Value)| *at > since && selector.takes(of, id, &event["object"]);
        state.log.iter().find(takes).map(|(at, _, event)| (*at, Bytes::from(format!("{event}\n"))))
    }

    fn watch(&self, of: Id, selector: Selector) -> Reply {
        let (cluster, version) = (self.clone(), self.version.subscribe());
        let events = stream::unfold((selector.since, version), move |(since, mut version)| {
            let (cluster, of, selector) = (cluster.clone(), of.clone(), selector.clone());
            async move {
                loop {
                    if let Some((at, line)) = cluster.after(since, &of, &selector) {
                        return Some((Ok::<_, Infallible>(Frame::data(line)), (at, version)));
                    }
                    version.changed().await.ok()?;
                }
            }
        });
        Response::new(StreamBody::new(events.boxed()).boxed_unsync())
    }
}

/// What of a collection is asked for.
#[derive(Clone, Default)]
struct Selector {
    watches: bool,
    since: u64,
    name: Option<String>,
    labels: Vec<(String, String)>,
}

impl Selector {
    fn of(uri: &Uri) -> Self {
        let mut selector = Self::default();
        for pair in uri.query().unwrap_or_default().split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = value.replace("%3D", "=").replace("%2F", "/").replace("%2C", ",");
            match key {
                "watch" => selector.watches = true,
                "resourceVersion" => selector.since = value.parse().unwrap_or_default(),
                "fieldSelector" => selector.name = value.strip_prefix("metadata.name=").map(str::to_owned),
                "labelSelector" => {
                    let pairs = value.split(',').filter_map(|pair| pair.split_once('='));
                    selector.labels = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
                }
                _ => {}
            }
        }
        selector
    }

    fn takes(&self, of: &Id, id: &Id, object: &Value) -> bool {
        id.resource == of.resource
            && (of.namespace.is_empty() || id.namespace == of.namespace)
            && self.name.as_ref().is_none_or(|name| *name == id.name)
            && self.labels.iter().all(|(key, value)| object["metadata"]["labels"][key] == **value)
    }
}

/// Of `/api/v1/[namespaces/<namespace>/]<resource>[/<name>]`, or the same under `/apis/<group>/<version>`.
fn id(uri: &Uri) -> Id {
    let segments: Vec<&str> = uri.path().split('/').filter(|segment| !segment.is_empty()).collect();
    let rest = &segments[if segments[0] == "api" { 2 } else { 3 }..];
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        _ => ("", rest),
    };
    let at = |index: usize| rest.get(index).copied().unwrap_or_default().to_owned();
    Id { resource: at(0), namespace: namespace.to_owned(), name: at(1) }
}

/// Merges objects field by field, and lists of named objects by their names.
fn merge(object: &mut Value, patch: &Value) {
    match (object, patch) {
        (Value::Object(object), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(object.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(items), Value::Array(patches))
            if patches.iter().all(|patch| patch["name"].is_string()) =>
        {
            for patch in patches {
                match items.iter_mut().find(|item| item["name"] == patch["name"]) {
                    Some(item) => merge(item, patch),
                    None => items.push(patch.clone()),
                }
            }
        }
        (object, patch) => *object = patch.clone(),
    }
}

fn reply(value: &Value) -> Reply {
    Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync())
}

fn failure(code: StatusCode, reason: &str) -> Reply {
    let status = json!({ "kind": "Status", "status": "Failure", "reason": reason, "message": reason, "code": code.as_u16() });
    let mut reply = reply(&status);
    *reply.status_mut() = code;
    reply
}
