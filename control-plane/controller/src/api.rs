//! The API for people and the CLI, and the port for monitoring.
//!
//! The API is plain HTTP on loopback only, and every request proves who asks (`access`): other users of the host can
//! connect to loopback too. Only the API's own description needs no token.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use axum::{Json, Router};
use outrigger_policy::Fault;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use self::access::Access;
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::policies::writer::Writer;
use crate::push::Proxies;
use crate::replicas::Replicas;
use crate::sources::{ServiceKey, Sync};
use crate::store::Store;
use crate::tokens::{NewToken, NewTokenError, Tokens};

pub(crate) mod access;
mod openapi;
mod policies;

/// After this long the controller is ready without a source that cannot be read: workloads need their certificates
/// renewed, and are told of the other sources, while Consul is down. What its own cluster says is waited for without end: a
/// replica that never read it can do nothing for anybody, and by being ready would take a good one's place.
const SOURCE_PATIENCE: Duration = Duration::from_secs(15);
/// Bytes of a request's body.
const MAX_BODY: usize = 64 * 1024;
/// Subscriptions of each type that are listed for a proxy.
const LISTED_SUBSCRIPTIONS: usize = 1000;

/// What the API shows and changes.
#[derive(Debug)]
pub(crate) struct Api {
    /// The mesh.
    pub(crate) mesh: Arc<Mesh>,
    /// Its proxies.
    pub(crate) proxies: Arc<Proxies>,
    /// What all proxies of the mesh have.
    pub(crate) replicas: Arc<Replicas>,
    /// Join tokens.
    pub(crate) tokens: Arc<Tokens>,
    /// Policies.
    pub(crate) writer: Arc<Writer>,
    /// What is kept.
    pub(crate) store: Arc<Store>,
    /// Whose requests are answered.
    pub(crate) access: Access,
    /// Where the expiry of our certificates is counted.
    pub(crate) metrics: Arc<Metrics>,
    /// The mesh's trust domain.
    pub(crate) trust_domain: String,
}

/// The API's routes.
pub(crate) fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/api/v1/tokens", get(list_tokens).post(create_token))
        .route("/api/v1/tokens/{id}", delete(revoke_token))
        .route("/api/v1/services", get(services))
        .route("/api/v1/proxies", get(proxies))
        .route("/api/v1/sources", get(sources))
        .route("/api/v1/controller", get(controller))
        .route("/api/v1/endpoints", get(endpoints))
        .route("/api/v1/catalog", get(policies::catalog))
        .route("/api/v1/schemas", get(|| std::future::ready(Json(openapi::schemas()))))
        .route("/api/v1/policies", get(policies::list))
        .route(
            "/api/v1/policies/apply",
            post(policies::apply).layer(DefaultBodyLimit::max(policies::MAX_APPLY)),
        )
        .route("/api/v1/policies/{kind}/{namespace}/{name}", get(policies::one).delete(policies::delete))
        .route("/api/v1/policies/{kind}/{namespace}/{name}/history", get(policies::history))
        .route("/api/v1/policies/{kind}/{namespace}/{name}/rollback", post(policies::rollback))
        .layer(middleware::from_fn_with_state(Arc::clone(&api), access::authorize))
        .route("/api/v1/openapi.json", get(|| std::future::ready(Json(openapi::document()))))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(api)
}

/// The routes of the monitoring port.
pub(crate) fn monitoring(mesh: Arc<Mesh>, store: Arc<Store>, registry: Registry) -> Router {
    let start = Instant::now();
    let ready = move || {
        let answer = if mesh.started() && store.failing().is_some() {
            (StatusCode::OK, "ready, but the store's disk takes no changes; see /api/v1/sources\n")
        } else if mesh.started() {
            (StatusCode::OK, "ready\n")
        } else if start.elapsed() > SOURCE_PATIENCE && mesh.knows_its_cluster() {
            (StatusCode::OK, "ready, but a source was never read; see /api/v1/sources\n")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "a source was not read yet; see /api/v1/sources\n")
        };
        std::future::ready(answer)
    };
    Router::new()
        .route("/metrics", exposition(registry))
        .route("/live", get(|| std::future::ready("live\n")))
        .route("/ready", get(ready))
}

/// `/metrics` of a registry.
pub(crate) fn exposition(registry: Registry) -> MethodRouter {
    let registry = Arc::new(registry);
    get(move || {
        let mut text = String::new();
        // Writing into a string does not fail.
        let encoded = prometheus_client::encoding::text::encode(&mut text, &registry);
        let status = if encoded.is_ok() { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        std::future::ready((status, [(header::CONTENT_TYPE, kind)], text))
    })
}

async fn list_tokens(State(api): State<Arc<Api>>) -> Response {
    Json(json!({ "tokens": api.tokens.list(SystemTime::now()) })).into_response()
}

async fn create_token(
    State(api): State<Arc<Api>>,
    request: Result<Json<NewToken>, JsonRejection>,
) -> Response {
    let new = match request {
        Ok(Json(new)) => new,
        Err(error) => return failed(Code::BadRequest, &error.body_text()),
    };
    match api.tokens.create(new, SystemTime::now()).await {
        Ok((info, text)) => {
            (StatusCode::CREATED, Json(json!({ "token": text, "info": info }))).into_response()
        }
        Err(error) => {
            let code = match &error {
                NewTokenError::Invalid(_) => Code::BadRequest,
                NewTokenError::Full => Code::Full,
                NewTokenError::Store(_) => Code::StoreUnavailable,
            };
            failed(code, &error.to_string())
        }
    }
}

async fn revoke_token(
    State(api): State<Arc<Api>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Response {
    match api.tokens.revoke(&id).await {
        Ok(true) => StatusCode::NO_CONTENT.into_response(),
        Ok(false) => failed(Code::NotFound, "there is no such token"),
        Err(error) => {
            let text = format!(
                "the token is revoked from now on, but the disk does not know yet, and a restart of the controller before \
                 it does would bring the token back: {error}"
            );
            failed(Code::StoreUnavailable, &text)
        }
    }
}

async fn services(State(api): State<Arc<Api>>) -> Response {
    let services: Vec<Value> = api.mesh.services().iter().map(service_view).collect();
    Json(json!({ "services": services })).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfService {
    service: Option<String>,
}

async fn endpoints(State(api): State<Arc<Api>>, query: Result<Query<OfService>, QueryRejection>) -> Response {
    let Query(OfService { service: wanted }) = match query {
        Ok(query) => query,
        Err(error) => return failed(Code::BadRequest, &error.body_text()),
    };
    let wanted = match wanted.filter(|name| !name.is_empty()).map(|name| ServiceKey::parse(&name)).transpose()
    {
        Ok(wanted) => wanted,
        Err(error) => return failed(Code::BadRequest, &error.to_string()),
    };
    let mut items = Vec::new();
    for service in api.mesh.services() {
        let name = format!("{}.{}", service.name, service.namespace);
        if wanted.as_ref().is_none_or(|wanted| wanted.as_str() == name) {
            let of_service = service
                .endpoints
                .iter()
                .map(|endpoint| OfEndpoints { service: name.clone(), endpoint: endpoint_view(endpoint) });
            items.extend(of_service.filter_map(|item| serde_json::to_value(item).ok()));
        }
    }
    Json(json!({ "items": items })).into_response()
}

/// The controller itself, and the ranges that it tells proxies; times are Unix seconds.
async fn controller(State(api): State<Arc<Api>>) -> Response {
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "trust_domain": api.trust_domain,
        "ranges": api.mesh.ranges(),
        "issuer_expires": api.metrics.issuer_expiry.get(),
        "leaf_expires": api.metrics.own_leaf_expiry.get(),
    }))
    .into_response()
}

async fn proxies(State(api): State<Arc<Api>>) -> Response {
    Json(json!({ "proxies": api.proxies.view(&api.mesh, LISTED_SUBSCRIPTIONS) })).into_response()
}

async fn sources(State(api): State<Arc<Api>>) -> Response {
    let (sources, shared) = api.mesh.sources();
    let sources: Vec<Value> = sources
        .iter()
        .map(|source| {
            let (state, since, reason) = sync_view(&source.snapshot.sync);
            let faults = source.snapshot.faults.iter().chain(&source.refused);
            let faults: Vec<Value> =
                faults.map(|fault| json!({ "subject": fault.subject, "reason": fault.reason })).collect();
            json!({
                "name": *source.name,
                "state": state,
                "since": since,
                "reason": reason,
                "services": source.snapshot.services.len(),
                "faults": faults,
            })
        })
        .collect();
    let shared: Vec<Value> = shared
        .iter()
        .map(|(address, services)| {
            let services: Vec<&str> = services.iter().map(ServiceKey::as_str).collect();
            json!({ "address": address.to_string(), "services": services })
        })
        .collect();
    let failing = api.store.failing();
    let picture = api.writer.picture();
    let (state, since, reason) = sync_view(&picture.sync);
    let faults: Vec<Value> = picture
        .faults
        .iter()
        .map(|fault| json!({ "subject": fault.subject, "reason": fault.reason }))
        .collect();
    let policies = json!({
        "state": state,
        "since": since,
        "reason": reason,
        "revision": picture.revision,
        "policies": picture.policies.len(),
        "faults": faults,
    });
    let store = json!({
        "writable": failing.is_none(),
        "since": failing.as_ref().map(|failing| unix(failing.since)),
        "reason": failing.as_ref().map(|failing| &failing.reason),
        "waiting": api.store.waiting(),
    });
    Json(json!({ "sources": sources, "shared_addresses": shared, "store": store, "policies": policies }))
        .into_response()
}

fn sync_view(sync: &Sync) -> (&'static str, Option<u64>, Option<&str>) {
    match sync {
        Sync::Never => ("never-synced", None, None),
        Sync::Synced => ("synced", None, None),
        Sync::Degraded { since, reason } => ("degraded", Some(unix(*since)), Some(reason)),
    }
}

fn service_view(service: &outrigger_api::v1::Service) -> Value {
    let protocol = |protocol: outrigger_api::v1::Protocol| protocol.as_str_name();
    let ports: Vec<Value> = service
        .ports
        .iter()
        .map(|port| json!({ "port": port.port, "name": port.name, "protocol": protocol(port.protocol()) }))
        .collect();
    let endpoints: Vec<EndpointView<'_>> = service.endpoints.iter().map(endpoint_view).collect();
    json!({
        "name": service.name,
        "namespace": service.namespace,
        "source": service.source,
        "ports": ports,
        "endpoints": endpoints,
    })
}

fn endpoint_view(endpoint: &outrigger_api::v1::Endpoint) -> EndpointView<'_> {
    let locality = endpoint.locality.clone().unwrap_or_default();
    EndpointView {
        id: &endpoint.id,
        address: &endpoint.address,
        ports: endpoint.ports.iter().map(|(port, target)| (*port, *target)).collect(),
        weight: endpoint.weight,
        health: endpoint.health().as_str_name(),
        identity: &endpoint.identity,
        meshed: !endpoint.identity.is_empty(),
        region: locality.region,
        zone: locality.zone,
    }
}

#[derive(Serialize)]
struct OfEndpoints<'a> {
    service: String,
    #[serde(flatten)]
    endpoint: EndpointView<'a>,
}

#[derive(Serialize)]
struct EndpointView<'a> {
    id: &'a str,
    address: &'a str,
    ports: std::collections::BTreeMap<u32, u32>,
    weight: u32,
    health: &'static str,
    identity: &'a str,
    meshed: bool,
    region: String,
    zone: String,
}

/// What kind of failure, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    Conflict,
    TooLarge,
    Invalid,
    StoreUnavailable,
    ClusterUnavailable,
    Full,
}

impl Code {
    fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::TooLarge => "too_large",
            Self::Invalid => "invalid",
            Self::StoreUnavailable => "store_unavailable",
            Self::ClusterUnavailable => "cluster_unavailable",
            Self::Full => "full",
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Conflict => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            Self::StoreUnavailable | Self::ClusterUnavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Full => StatusCode::INSUFFICIENT_STORAGE,
        }
    }
}

fn failed(code: Code, text: &str) -> Response {
    failed_with(code, text, &[])
}

fn failed_with(code: Code, text: &str, faults: &[Fault]) -> Response {
    let error = json!({ "code": code.name(), "message": text, "faults": faults });
    (code.status(), Json(json!({ "error": error }))).into_response()
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
