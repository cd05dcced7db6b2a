//! An API server in this process, as far as the store needs one: custom resources with their CRDs, lists, watches with history, writes
//! with preconditions, statuses. It speaks HTTP, so that the client is the real one. What it must do is taken from the real server,
//! against which the suite `kubernetes_policies` in `e2e` runs the same store.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::WatchStream;
use tokio_util::task::AbortOnDropHandle;

use crate::policies::kubernetes::resource::Resource;

/// Ends when it is dropped.
pub(super) struct FakeApi {
    pub(super) client: kube::Client,
    server: Arc<Server>,
    _serving: AbortOnDropHandle<()>,
}

struct Server {
    state: Mutex<Data>,
    /// The newest version; watches look for what is new when it moves.
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct Data {
    version: u64,
    /// By `<plural>.<group>`: uid, and whether it is being deleted.
    crds: BTreeMap<String, (String, bool)>,
    /// By plural, namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    /// Version, plural, event.
    history: Vec<(u64, String, Value)>,
    /// Watches from before this version get 410.
    oldest: u64,
    /// Every request gets 500, and watches end.
    down: bool,
    /// Writes by method.
    pub(super) writes: HashMap<String, usize>,
}

impl FakeApi {
    pub(super) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Arc::new(Server { state: Mutex::default(), version: watch::Sender::new(0) });
        let router = axum::Router::new().fallback(answer).with_state(Arc::clone(&server));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let config = kube::Config::new(format!("http://{address}").parse().unwrap());
        let client = kube::Client::try_from(config).unwrap();
        Self { client, server, _serving: AbortOnDropHandle::new(serving) }
    }

    /// With all CRDs.
    pub(super) async fn with_crds() -> Self {
        let api = Self::start().await;
        for resource in Resource::ALL {
            api.install(resource);
        }
        api
    }

    fn data<T>(&self, change: impl FnOnce(&mut Data) -> T) -> T {
        let mut data = self.server.state.lock().unwrap();
        let answer = change(&mut data);
        self.server.version.send_replace(data.version);
        answer
    }

    pub(super) fn install(&self, resource: Resource) {
        self.data(|data| {
            data.version += 1;
            let uid = format!("crd-{}", data.version);
            data.crds.insert(resource.crd(), (uid, false));
        });
    }

    /// As the real one: marked, then its objects go one by one, then it goes.
    pub(super) fn uninstall(&self, resource: Resource) {
        self.data(|data| {
            data.crds.get_mut(&resource.crd()).unwrap().1 = true;
            let plural = resource.api().plural;
            let keys: Vec<_> = data.objects.keys().filter(|key| key.0 == plural).cloned().collect();
            for key in keys {
                data.remove(&key);
            }
            data.crds.remove(&resource.crd());
        });
    }

    /// Writes an object as `kubectl apply` would.
    pub(super) fn apply(&self, object: Value) -> Value {
        self.data(|data| {
            let key = key_of(&object);
            data.put(&key, object)
        })
    }

    pub(super) fn delete(&self, plural: &str, namespace: &str, name: &str) {
        self.data(|data| data.remove(&(plural.to_owned(), namespace.to_owned(), name.to_owned())));
    }

    pub(super) fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.data(|data| {
            data.objects.get(&(plural.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
        })
    }

    pub(super) fn writes(&self, method: &str) -> usize {
        self.data(|data| data.writes.get(method).copied().unwrap_or_default())
    }

    pub(super) fn set_down(&self, down: bool) {
        self.data(|data| {
            data.down = down;
            data.version += 1;
        });
    }

    /// Forgets its history, and ends every watch: whoever watched gets 410.
    pub(super) fn compact(&self) {
        self.data(|data| {
            data.version += 1;
            data.oldest = data.version;
            data.history.clear();
        });
    }
}

/// From an object's kind to its place in a path.
fn key_of(object: &Value) -> (String, String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let kind = text(&object["kind"]);
    let of = |resource: &Resource| resource.api().kind == kind;
    let plural = Resource::ALL.into_iter().find(of).unwrap().api().plural;
    (plural, text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

impl Data {
    fn put(&mut self, key: &(String, String, String), mut object: Value) -> Value {
        self.version += 1;
        let old = self.objects.get(key).cloned();
        let generation = match &old {
            Some(old) if old["spec"] == object["spec"] => old["metadata"]["generation"].as_i64().unwrap(),
            Some(old) => old["metadata"]["generation"].as_i64().unwrap() + 1,
            None => 1,
        };
        let uid = old
            .as_ref()
            .map_or_else(|| json!(format!("uid-{}", self.version)), |old| old["metadata"]["uid"].clone());
        object["metadata"]["uid"] = uid;
        object["metadata"]["generation"] = json!(generation);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        object["metadata"]["creationTimestamp"] = json!("2026-11-29T10:00:00Z");
        let word = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.history.push((self.version, key.0.clone(), json!({"type": word, "object": object})));
        self.objects.insert(key.clone(), object.clone());
        object
    }

    fn remove(&mut self, key: &(String, String, String)) {
        let Some(mut object) = self.objects.remove(key) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.history.push((self.version, key.0.clone(), json!({"type": "DELETED", "object": object})));
    }
}

fn status(code: StatusCode, reason: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code.as_u16()});
    (code, axum::Json(body)).into_response()
}

async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let path: Vec<String> = head.uri.path().split('/').skip(1).map(str::to_owned).collect();
    let query: HashMap<String, String> = head
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    if server.state.lock().unwrap().down {
        return status(StatusCode::INTERNAL_SERVER_ERROR, "etcdserver: no leader");
    }
    match path[..] {
        ["apis", "apiextensions.k8s.io", "v1", "customresourcedefinitions", name] => crd(&server, name),
        ["apis", group, _, plural] => {
            if !server.state.lock().unwrap().crds.contains_key(&format!("{plural}.{group}")) {
                return status(StatusCode::NOT_FOUND, "404 page not found");
            }
            if query.contains_key("watch") {
                watching(&server, plural, &query)
            } else {
                list(&server, plural)
            }
        }
        ["apis", _, _, "namespaces", namespace, plural, ref rest @ ..] => {
            object(&server, &head.method, &query, plural, namespace, rest, &body)
        }
        _ => status(StatusCode::NOT_FOUND, "404 page not found"),
    }
}

fn crd(server: &Server, name: &str) -> Response {
    match server.state.lock().unwrap().crds.get(name) {
        Some((uid, deleting)) => {
            let mut metadata = json!({"name": name, "uid": uid, "resourceVersion": "1"});
            if *deleting {
                metadata["deletionTimestamp"] = json!("2026-11-29T10:00:00Z");
            }
            axum::Json(json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": metadata})).into_response()
        }
        None => status(StatusCode::NOT_FOUND, "NotFound"),
    }
}

fn list(server: &Server, plural: &str) -> Response {
    let data = server.state.lock().unwrap();
    let items: Vec<&Value> =
        data.objects.iter().filter(|(key, _)| key.0 == plural).map(|(_, object)| object).collect();
    axum::Json(json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": data.version.to_string()}, "items": items})).into_response()
}

fn watching(server: &Arc<Server>, plural: &str, query: &HashMap<String, String>) -> Response {
    let mut from: u64 = query["resourceVersion"].parse().unwrap();
    let (plural, of) = (plural.to_owned(), Arc::clone(server));
    let lines = WatchStream::new(server.version.subscribe())
        .map(move |_| {
            let data = of.state.lock().unwrap();
            if data.down {
                return Err(std::io::Error::other("going down"));
            }
            let mut text = String::new();
            if from < data.oldest {
                let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410}});
                text = format!("{gone}\n");
            }
            for (_, _, event) in data.history.iter().filter(|(version, of, _)| *version > from && *of == plural) {
                text = format!("{text}{event}\n");
            }
            from = from.max(data.version);
            Ok(Bytes::from(text))
        })
        .filter(|line| line.as_ref().map_or(true, |line| !line.is_empty()));
    Body::from_stream(lines).into_response()
}

fn object(
    server: &Server,
    method: &Method,
    query: &HashMap<String, String>,
    plural: &str,
    namespace: &str,
    rest: &[&str],
    body: &Bytes,
) -> Response {
    let mut data = server.state.lock().unwrap();
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let name = rest.first().copied().or(body["metadata"]["name"].as_str()).unwrap_or_default();
    let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
    let found = data.objects.get(&key).cloned();
    if *method == Method::GET {
        return found.map_or_else(
            || status(StatusCode::NOT_FOUND, "NotFound"),
            |found| axum::Json(found).into_response(),
        );
    }
    let dry_run = query.contains_key("dryRun");
    let wants =
        body["metadata"]["resourceVersion"].as_str().or(body["preconditions"]["resourceVersion"].as_str());
    let refused = body["metadata"]["name"] == "refused" || name == "refused";
    let answer = match (method, &found) {
        _ if refused => return status(StatusCode::UNPROCESSABLE_ENTITY, "spec: it is refused"),
        (&Method::POST, Some(_)) => return status(StatusCode::CONFLICT, "AlreadyExists"),
        (&Method::POST, None) => body.clone(),
        (_, None) => return status(StatusCode::NOT_FOUND, "NotFound"),
        (_, Some(found)) if wants.is_some_and(|wants| found["metadata"]["resourceVersion"] != wants) => {
            return status(StatusCode::CONFLICT, "Conflict");
        }
        (&Method::PUT, Some(found)) => {
            let mut new = body.clone();
            new["status"] = found["status"].clone();
            new
        }
        (&Method::PATCH, Some(found)) => {
            let mut new = found.clone();
            new["status"] = body["status"].clone();
            new
        }
        (_, Some(found)) => found.clone(),
    };
    if dry_run {
        return axum::Json(answer).into_response();
    }
    *data.writes.entry(method.to_string()).or_default() += 1;
    let answer = if *method == Method::DELETE {
        data.remove(&key);
        answer
    } else {
        data.put(&key, answer)
    };
    server.version.send_replace(data.version);
    axum::Json(answer).into_response()
}
