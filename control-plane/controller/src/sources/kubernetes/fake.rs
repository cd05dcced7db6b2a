//! An API server in this process that speaks the real protocol over HTTP/1.1: lists in pages, watches that stream, bookmarks,
//! 410, token reviews. It keeps a log of changes, as etcd does, and can be made to misbehave. Shared with
//! `tests/whole`.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub(crate) const SERVICES: &str = "services";
pub(crate) const SLICES: &str = "endpointslices";
pub(crate) const PODS: &str = "pods";
pub(crate) const NODES: &str = "nodes";
pub(crate) const RANGES: &str = "servicecidrs";

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    world: Arc<Mutex<World>>,
    /// Counts changes; watches wait for it.
    changes: watch::Sender<u64>,
}

/// By kind and `<namespace>/<name>`.
type Objects = BTreeMap<(String, String), Value>;

#[derive(Default)]
pub(crate) struct World {
    version: u64,
    objects: BTreeMap<(String, String), Value>,
    log: Vec<Change>,
    /// Watches from before this get 410.
    pub(crate) compacted: u64,
    /// The 410 is an event of the stream, as most servers say it, and not a status.
    pub(crate) expires_in_stream: bool,
    /// Streams that are older than this end with a broken connection.
    cut: u64,
    /// Everything is answered with 503.
    pub(crate) down: bool,
    /// Kinds that it does not know (404) or that the client may not read (403).
    pub(crate) unknown: Vec<&'static str>,
    pub(crate) forbidden: Vec<&'static str>,
    /// Second pages that get 410 before one is answered.
    pub(crate) late_pages: u32,
    /// What lists say instead of the present: an older server.
    old: Option<(u64, Objects)>,
    /// Answers to token reviews, by token.
    pub(crate) reviews: HashMap<String, Value>,
    /// Requests: the kinds of lists that began, pages, watches.
    pub(crate) lists: Vec<String>,
    pub(crate) pages: u32,
    pub(crate) watches: u32,
}

#[derive(Clone)]
struct Change {
    version: u64,
    kind: String,
    event: &'static str,
    object: Value,
}

impl World {
    /// Lists show this instead of the present.
    pub(crate) fn show_instead(&mut self, version: u64, objects: BTreeMap<(String, String), Value>) {
        self.old = Some((version, objects));
    }
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let world = World { version: 100, ..World::default() };
        let fake = Self { address, world: Arc::new(Mutex::new(world)), changes: watch::Sender::new(0) };
        let router = Router::new()
            .route("/api/v1/{kind}", get(collection))
            .route("/apis/{group}/v1/{kind}", get(collection_of_group))
            .route("/api/v1/namespaces/{namespace}/pods/{name}", get(pod))
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
            .with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Writes an object; its namespace and name are in its metadata.
    pub(crate) fn put(&self, kind: &str, mut object: Value) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let known = world.objects.insert((kind.to_owned(), id(&object)), object.clone());
        let event = if known.is_some() { "MODIFIED" } else { "ADDED" };
        world.log.push(Change { version, kind: kind.to_owned(), event, object });
        drop(world);
        self.changed();
    }

    pub(crate) fn delete(&self, kind: &str, id: &str) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        let mut object = world.objects.remove(&(kind.to_owned(), id.to_owned())).unwrap();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        world.log.push(Change { version, kind: kind.to_owned(), event: "DELETED", object });
        drop(world);
        self.changed();
    }

    /// Writes an object whose event bears no version, so that only bookmarks say how far a watch has come.
    pub(crate) fn put_unversioned(&self, kind: &str, object: Value) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        world.log.push(Change { version, kind: kind.to_owned(), event: "ADDED", object });
        drop(world);
        self.changed();
    }

    /// Every watch is told of the present version, which is returned.
    pub(crate) fn bookmark(&self) -> u64 {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        let object =
            json!({"kind": "X", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}});
        world.log.push(Change { version, kind: String::new(), event: "BOOKMARK", object });
        drop(world);
        self.changed();
        version
    }

    /// Breaks every open watch.
    pub(crate) fn cut(&self) {
        self.world().cut += 1;
        self.changed();
    }

    /// The history up to now is gone; open watches break.
    pub(crate) fn compact(&self) {
        let mut world = self.world();
        world.version += 1;
        world.compacted = world.version;
        world.log.clear();
        drop(world);
        self.cut();
    }

    pub(crate) fn version(&self) -> u64 {
        self.world().version
    }

    /// Lists show the present again.
    pub(crate) fn catch_up(&self) {
        self.world().old = None;
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

fn id(object: &Value) -> String {
    let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    format!("{}/{}", part("namespace"), part("name"))
}

fn failure(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code});
    (StatusCode::from_u16(code).unwrap(), axum::Json(status)).into_response()
}

type Params = Query<HashMap<String, String>>;

async fn collection_of_group(
    state: State<Fake>,
    Path((_, kind)): Path<(String, String)>,
    params: Params,
) -> Response {
    collection(state, Path(kind), params).await
}

async fn collection(State(fake): State<Fake>, Path(kind): Path<String>, Query(params): Params) -> Response {
    let mut world = fake.world();
    if world.down {
        return failure(503, "ServiceUnavailable", "the server is going away");
    }
    if world.unknown.contains(&kind.as_str()) {
        return failure(404, "NotFound", "the server could not find the requested resource");
    }
    if world.forbidden.contains(&kind.as_str()) {
        return failure(403, "Forbidden", &format!("{kind} is forbidden"));
    }
    let from = params.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0);
    if params.get("watch").is_some_and(|value| value != "false" && value != "0") {
        world.watches += 1;
        if from < world.compacted {
            let gone = failure(410, "Expired", "too old resource version");
            if !world.expires_in_stream {
                return gone;
            }
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "too old resource version", "reason": "Expired", "code": 410});
            return Body::from(format!("{}\n", json!({"type": "ERROR", "object": status}))).into_response();
        }
        let cut = world.cut;
        drop(world);
        return events(fake, kind, from, cut);
    }
    let offset: usize = params.get("continue").and_then(|token| token.parse().ok()).unwrap_or(0);
    if offset == 0 {
        world.lists.push(kind.clone());
    } else if world.late_pages > 0 {
        world.late_pages -= 1;
        return failure(410, "Expired", "the provided continue parameter is too old");
    }
    world.pages += 1;
    let limit: usize = params.get("limit").and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
    let (version, objects) = match &world.old {
        Some((version, objects)) => (*version, objects),
        None => (world.version, &world.objects),
    };
    let all: Vec<&Value> =
        objects.iter().filter(|((of, _), _)| *of == kind).map(|(_, object)| object).collect();
    let items: Vec<&Value> = all.iter().copied().skip(offset).take(limit).collect();
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if offset + items.len() < all.len() {
        metadata["continue"] = (offset + items.len()).to_string().into();
    }
    axum::Json(json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}))
        .into_response()
}

/// A stream of what happens to a kind after a version, one line an event, until it is cut.
fn events(fake: Fake, kind: String, from: u64, cut: u64) -> Response {
    let changes = fake.changes.subscribe();
    let lines = stream::unfold((fake, changes, from), move |(fake, mut changes, from)| {
        let kind = kind.clone();
        async move {
            loop {
                changes.borrow_and_update();
                let (text, at) = {
                    let world = fake.world();
                    if world.cut != cut {
                        return Some((Err(std::io::Error::other("cut")), (fake.clone(), changes, from)));
                    }
                    let new = world.log.iter().filter(|change| change.version > from);
                    let new = new.filter(|change| change.kind == kind || change.kind.is_empty());
                    let mut text = String::new();
                    for change in new {
                        text += &json!({"type": change.event, "object": change.object}).to_string();
                        text.push('\n');
                    }
                    (text, world.version)
                };
                if !text.is_empty() {
                    return Some((Ok(text), (fake.clone(), changes, at)));
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        }
    });
    Body::from_stream(lines).into_response()
}

async fn pod(State(fake): State<Fake>, Path((namespace, name)): Path<(String, String)>) -> Response {
    let world = fake.world();
    if world.down {
        return failure(503, "ServiceUnavailable", "the server is going away");
    }
    match world.objects.get(&(PODS.to_owned(), format!("{namespace}/{name}"))) {
        Some(pod) => axum::Json(pod.clone()).into_response(),
        None => failure(404, "NotFound", "no such pod"),
    }
}

async fn review(State(fake): State<Fake>, axum::Json(review): axum::Json<Value>) -> Response {
    let world = fake.world();
    if world.down {
        return failure(503, "ServiceUnavailable", "the server is going away");
    }
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    let unknown = json!({"authenticated": false, "error": "invalid bearer token"});
    let status = world.reviews.get(token).cloned().unwrap_or(unknown);
    let answer = json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
        "spec": review["spec"], "status": status});
    (StatusCode::CREATED, axum::Json(answer)).into_response()
}
