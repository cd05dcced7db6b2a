//! Admission reviews (`admission.k8s.io/v1`): from a request of the API server to its answer.
//!
//! What is no review is answered by HTTP's own codes: 413 for what is too large, 408 for what does not come, 400 for what
//! cannot be read. A review is always answered by a review. What it holds is not ours to judge: a kind or an
//! operation that nobody asked us about passes.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use k8s_openapi::ByteString;
use outrigger_inject::{Mesh, Outcome, Reason, Review, Skip, decide, patch};
use outrigger_policy::admission;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::events::Events;
use super::metrics::Metrics;
use super::namespaces::Namespaces;
use crate::metrics::ReasonLabel;

const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Bytes of a review. An object has 3 MiB at most, and a review holds little else.
const MAX_BODY: usize = 8 * 1024 * 1024;
/// KiB of reviews that are at work together; parsed they take several times as much memory. A thousand pods as people write
/// them fit.
pub(super) const AT_WORK: u32 = 32 * 1024;
/// For the body of a review.
const BODY: Duration = Duration::from_secs(5);
/// Characters of a warning that kubectl shows well.
const MAX_WARNING: usize = 256;

/// What reviews need.
pub(super) struct Reviewer {
    mesh: Mesh,
    namespaces: Namespaces,
    events: Events,
    metrics: Arc<Metrics>,
    at_work: Semaphore,
}

impl Reviewer {
    pub(super) fn new(mesh: Mesh, namespaces: Namespaces, events: Events, metrics: Arc<Metrics>) -> Self {
        Self { mesh, namespaces, events, metrics, at_work: Semaphore::new(AT_WORK as usize) }
    }
}

/// The webhook's paths.
pub(super) fn router(reviewer: Reviewer) -> Router {
    Router::new()
        .route("/inject", post(inject))
        .route("/policies", post(policies))
        .with_state(Arc::new(reviewer))
}

/// A review as it comes. Fields that we do not need are not read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Incoming {
    api_version: String,
    kind: String,
    request: Option<Request>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    kind: Kind,
    #[serde(default)]
    namespace: String,
    operation: String,
    #[serde(default)]
    object: Value,
    #[serde(default)]
    old_object: Value,
    #[serde(default)]
    dry_run: Option<bool>,
}

#[derive(Deserialize)]
#[expect(clippy::struct_field_names, reason = "the names are the API's")]
struct Kind {
    #[serde(default)]
    group: String,
    version: String,
    kind: String,
}

/// What reviews from one address may have at work, in KiB.
#[derive(Clone)]
pub(super) struct Share(pub(super) Arc<Semaphore>);

async fn inject(
    State(reviewer): State<Arc<Reviewer>>,
    Extension(share): Extension<Share>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let start = Instant::now();
    let answer = match read(&reviewer, &share, &headers, body).await {
        Ok((request, _shares)) => reviewer.respond(&request).await,
        Err(refusal) => Err(refusal),
    };
    reviewer.metrics.duration.observe(start.elapsed().as_secs_f64());
    reviewer.answer(answer)
}

/// What the CRDs' schemas and rules cannot say of a policy, and what the mesh makes nothing of in a route.
async fn policies(
    State(reviewer): State<Arc<Reviewer>>,
    Extension(share): Extension<Share>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let answer =
        read(&reviewer, &share, &headers, body).await.map(|(request, _shares)| reviewer.judge(&request));
    reviewer.answer(answer)
}

type Refusal = (StatusCode, String);

/// A review's request, and its shares of what its address and all may have at work.
async fn read<'r>(
    reviewer: &'r Reviewer,
    share: &'r Share,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Request, [SemaphorePermit<'r>; 2]), Refusal> {
    let too_large = || (StatusCode::PAYLOAD_TOO_LARGE, format!("the review is larger than {MAX_BODY} bytes"));
    let length =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let length = length.unwrap_or(MAX_BODY);
    if length > MAX_BODY {
        return Err(too_large());
    }
    let kib = u32::try_from(length.div_ceil(1024)).unwrap_or(AT_WORK).max(1);
    let stopping = |_| (StatusCode::SERVICE_UNAVAILABLE, "the injector is stopping".to_owned());
    // The own share first: who waits for that is in nobody's way.
    let own = share.0.acquire_many(kib).await.map_err(stopping)?;
    let shares = [own, reviewer.at_work.acquire_many(kib).await.map_err(stopping)?];
    let bytes = match tokio::time::timeout(BODY, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) if is_too_large(&error) => return Err(too_large()),
        Ok(Err(error)) => {
            return Err((StatusCode::BAD_REQUEST, format!("the review cannot be read: {error}")));
        }
        Err(_) => {
            return Err((StatusCode::REQUEST_TIMEOUT, format!("the review did not come within {BODY:?}")));
        }
    };
    let request = parse(&bytes).map_err(|why| (StatusCode::BAD_REQUEST, why))?;
    Ok((request, shares))
}

fn is_too_large(error: &axum::Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|source| source.to_string().contains("length limit"))
}

fn parse(bytes: &Bytes) -> Result<Request, String> {
    let review: Incoming = serde_json::from_slice(bytes)
        .map_err(|error| format!("this is no {KIND} of {API_VERSION}: {error}"))?;
    if review.api_version != API_VERSION || review.kind != KIND {
        return Err(format!(
            "this is no {KIND} of {API_VERSION}, but {:.64?} of {:.64?}",
            review.kind, review.api_version
        ));
    }
    let request = review.request.ok_or("the review has no request")?;
    if request.uid.is_empty() {
        return Err("the review's request has no uid".to_owned());
    }
    Ok(request)
}

impl Reviewer {
    async fn respond(&self, request: &Request) -> Result<Value, Refusal> {
        let Kind { group, version, kind } = &request.kind;
        if (group.as_str(), version.as_str(), kind.as_str()) != ("", "v1", "Pod")
            || request.operation != "CREATE"
        {
            self.count("not_asked");
            return Ok(allowed(&request.uid, &[]));
        }
        let review = match self.decide(request).await {
            Ok(review) => review,
            Err(error) => {
                self.count("refused");
                self.refused("namespace_unknown");
                let message = format!("the pod cannot be judged now: {error:#}; try again");
                return Ok(denied(&request.uid, StatusCode::SERVICE_UNAVAILABLE, &message));
            }
        };
        if let Outcome::Refused(faults) = &review.outcome {
            for fault in faults {
                self.refused(fault.reason.as_str());
            }
            if let Some(fault) =
                faults.iter().find(|fault| fault.reason == Reason::Malformed && faults.len() == 1)
            {
                return Err((StatusCode::BAD_REQUEST, fault.message.clone()));
            }
        }
        self.count(match &review.outcome {
            Outcome::Injected => "injected",
            Outcome::Already => "already_injected",
            Outcome::Skipped(skip) => skip.as_str(),
            Outcome::Refused(_) => "refused",
        });
        if review.outcome == Outcome::Skipped(Skip::HostNetwork) && request.dry_run != Some(true) {
            let why = review.warnings.first().map_or("not injected", String::as_str);
            self.events.skipped(&request.object, &request.namespace, why);
        }
        Ok(response(request, &review))
    }

    fn judge(&self, request: &Request) -> Value {
        let old = Some(&request.old_object).filter(|old| !old.is_null());
        let review = admission::review(&request.object, old);
        if !review.refusals.is_empty() {
            self.count("policy_refused");
            return denied(&request.uid, StatusCode::UNPROCESSABLE_ENTITY, &review.refusals.join("; "));
        }
        self.count("policy_taken");
        allowed(&request.uid, &review.warnings)
    }

    fn answer(&self, answer: Result<Value, Refusal>) -> Response {
        match answer {
            Ok(response) => {
                Json(json!({ "apiVersion": API_VERSION, "kind": KIND, "response": response })).into_response()
            }
            Err((status, why)) => {
                self.count("invalid");
                (status, format!("{why}\n")).into_response()
            }
        }
    }

    /// By what the watch saw, and, where that would keep a sidecar out, by what the API says now.
    async fn decide(&self, request: &Request) -> anyhow::Result<Review> {
        if let Some(seen) = self.namespaces.seen(&request.namespace) {
            let review = decide(&request.object, &seen, &self.mesh);
            if !review.hangs_on_namespace() {
                return Ok(review);
            }
        }
        let fresh = self.namespaces.fresh(&request.namespace).await?;
        Ok(decide(&request.object, &fresh, &self.mesh))
    }

    fn count(&self, outcome: &'static str) {
        self.metrics.reviews.get_or_create(&ReasonLabel::new(outcome)).inc();
    }

    fn refused(&self, reason: &'static str) {
        self.metrics.refusals.get_or_create(&ReasonLabel::new(reason)).inc();
    }
}

fn allowed(uid: &str, warnings: &[String]) -> Value {
    let mut response = json!({ "uid": uid, "allowed": true });
    if !warnings.is_empty() {
        let short = |warning: &String| warning.chars().take(MAX_WARNING).collect::<String>();
        response["warnings"] = warnings.iter().map(short).collect();
    }
    response
}

fn denied(uid: &str, code: StatusCode, message: &str) -> Value {
    json!({ "uid": uid, "allowed": false, "status": { "code": code.as_u16(), "message": message } })
}

fn response(request: &Request, review: &Review) -> Value {
    if let Outcome::Refused(faults) = &review.outcome {
        let faults: Vec<&str> = faults.iter().map(|fault| fault.message.as_str()).collect();
        return denied(&request.uid, StatusCode::FORBIDDEN, &faults.join("; "));
    }
    let mut response = allowed(&request.uid, &review.warnings);
    if let Some(pod) = &review.pod {
        let operations = Value::from(patch::between(&request.object, pod)).to_string();
        response["patchType"] = "JSONPatch".into();
        response["patch"] = json!(ByteString(operations.into_bytes()));
    }
    response
}
