//! The part of a Kubernetes API that the injector uses, over real HTTP: lists, watches from a resource version on, and
//! events. What it says is what the test says; what the test keeps from the watch is what a slow watch keeps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::watch;

#[derive(Clone)]
pub(crate) struct FakeApi(Arc<Inner>);

struct Inner {
    objects: Mutex<BTreeMap<(&'static str, String), Value>>,
    /// What watches see, each with its resource version, which is its place.
    log: watch::Sender<Vec<(&'static str, Value)>>,
    events: watch::Sender<Vec<Value>>,
}

impl FakeApi {
    /// Serves on loopback; returns the address.
    pub(crate) async fn start() -> (Self, String) {
        let api = Self(Arc::new(Inner {
            objects: Mutex::default(),
            log: watch::Sender::default(),
            events: watch::Sender::default(),
        }));
        let router = Router::new()
            .route("/api/v1/namespaces", get(list_namespaces))
            .route("/api/v1/namespaces/{name}", get(get_namespace))
            .route("/api/v1/namespaces/outrigger-system/secrets", get(list_secrets))
            .route("/apis/events.k8s.io/v1/namespaces/{name}/events", post(create_event))
            .with_state(api.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (api, url)
    }

    /// Makes or changes an object, and tells watches.
    pub(crate) fn put(&self, collection: &'static str, object: &Value) {
        let mut objects = self.0.objects.lock().unwrap();
        self.0.log.send_modify(|log| {
            let mut object = object.clone();
            object["metadata"]["resourceVersion"] = (log.len() + 1).to_string().into();
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            let known = objects.insert((collection, name), object.clone()).is_some();
            let kind = if known { "MODIFIED" } else { "ADDED" };
            log.push((collection, json!({ "type": kind, "object": object })));
        });
    }

    /// Makes or changes an object, and no watch hears of it.
    pub(crate) fn put_unseen(&self, collection: &'static str, object: &Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.0.objects.lock().unwrap().insert((collection, name), object.clone());
    }

    /// The events that were written.
    pub(crate) fn events(&self) -> watch::Receiver<Vec<Value>> {
        self.0.events.subscribe()
    }

    fn answer(&self, collection: &'static str, kind: &str, query: &BTreeMap<String, String>) -> Response {
        let version =
            |text: Option<&String>| text.and_then(|text| text.parse::<usize>().ok()).unwrap_or_default();
        if query.get("watch").is_some_and(|value| value == "true") {
            let from = version(query.get("resourceVersion"));
            let log = self.0.log.subscribe();
            let lines = stream::unfold((log, from), move |(mut log, at)| async move {
                let length = log.wait_for(|log| log.len() > at).await.ok()?.len();
                let lines: String = log.borrow()[at..length]
                    .iter()
                    .filter(|(of, _)| *of == collection)
                    .flat_map(|(_, event)| [event.to_string(), "\n".to_owned()])
                    .collect();
                Some((Ok::<_, std::io::Error>(Bytes::from(lines)), (log, length)))
            });
            return Body::from_stream(lines).into_response();
        }
        let objects = self.0.objects.lock().unwrap();
        let items: Vec<&Value> =
            objects.iter().filter(|((of, _), _)| *of == collection).map(|(_, object)| object).collect();
        let version = self.0.log.borrow().len().to_string();
        Json(json!({ "apiVersion": "v1", "kind": kind, "metadata": { "resourceVersion": version }, "items": items }))
            .into_response()
    }
}

async fn list_namespaces(
    State(api): State<FakeApi>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    api.answer("namespaces", "PartialObjectMetadataList", &query)
}

async fn list_secrets(State(api): State<FakeApi>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    // Nothing but the one Secret may be read.
    if query.get("fieldSelector").map(String::as_str) != Some("metadata.name=outrigger-injector-tls") {
        return StatusCode::FORBIDDEN.into_response();
    }
    api.answer("secrets", "SecretList", &query)
}

async fn get_namespace(State(api): State<FakeApi>, Path(name): Path<String>) -> Response {
    let objects = api.0.objects.lock().unwrap();
    if let Some(namespace) = objects.get(&("namespaces", name)) {
        Json(namespace.clone()).into_response()
    } else {
        let status = json!({ "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound",
            "message": "no such namespace", "code": 404 });
        (StatusCode::NOT_FOUND, Json(status)).into_response()
    }
}

async fn create_event(State(api): State<FakeApi>, Json(event): Json<Value>) -> Response {
    api.0.events.send_modify(|events| events.push(event.clone()));
    (StatusCode::CREATED, Json(event)).into_response()
}
