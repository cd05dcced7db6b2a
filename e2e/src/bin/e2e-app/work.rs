//! `/work` and every gRPC call: what a service does for its callers, well or badly, as its control port says.
//!
//! The control port is for the suite, on loopback: `PUT /faults` with a [`Faults`] in JSON holds from the next call on,
//! `GET /counts` tells what arrived.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::http::{Body, full, streamed};

/// Header fields that an application hands on when it calls the next service for a caller, as it does with those of
/// tracing.
const HANDED_ON: &[&str] = &["x-retry-attempt", "request-timeout-ms"];

/// What a service does badly.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Faults {
    /// So many of a thousand calls fail, evenly spread.
    fail_per_mille: u64,
    /// What they fail with; 0: 503.
    status: u16,
    /// What gRPC calls fail with, in trailers; 0: 14, unavailable.
    grpc_status: u32,
    /// They fail by a reset of the connection or stream.
    reset: bool,
    /// Further header fields of a failure.
    headers: Vec<(String, String)>,
    /// Every answer comes so much later.
    latency_ms: u64,
    /// No answer ever.
    hang: bool,
    /// So many calls are worked on at once, each for `service_ms`; others wait, however many. 0: no bound.
    concurrency: usize,
    /// How long a call is worked on.
    service_ms: u64,
}

/// The service's state, the same for all its ports.
#[derive(Debug)]
pub(crate) struct Work {
    name: &'static str,
    /// Where the work is handed to, `host:port`.
    next: Option<String>,
    set: Mutex<Set>,
    calls: AtomicU64,
    failed: AtomicU64,
}

/// Faults, and the workers that they leave.
#[derive(Clone, Debug, Default)]
struct Set {
    faults: Faults,
    workers: Option<Arc<Semaphore>>,
}

impl Work {
    pub(crate) fn new(name: &'static str, next: Option<String>) -> Self {
        Self { name, next, set: Mutex::default(), calls: AtomicU64::default(), failed: AtomicU64::default() }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    fn set(&self) -> Set {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Serves one call. An error resets the connection or stream.
    pub(crate) async fn call(&self, request: Request<Incoming>) -> anyhow::Result<Response<Body>> {
        let Set { faults, workers } = self.set();
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let (head, body) = request.into_parts();
        body.collect().await.context("reading the request")?;
        if faults.hang {
            return std::future::pending().await;
        }
        if faults.latency_ms > 0 {
            tokio::time::sleep(Duration::from_millis(faults.latency_ms)).await;
        }
        let worker = match &workers {
            Some(workers) => Some(workers.acquire().await.context("workers never leave")?),
            None => None,
        };
        if faults.service_ms > 0 {
            tokio::time::sleep(Duration::from_millis(faults.service_ms)).await;
        }
        drop(worker);
        let is_grpc = head
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        // Bresenham's line: of any thousand in a row exactly so many.
        let rate = faults.fail_per_mille.min(1000);
        if (number + 1) * rate / 1000 > number * rate / 1000 {
            self.failed.fetch_add(1, Ordering::Relaxed);
            if faults.reset {
                bail!("reset on request");
            }
            let code = if faults.grpc_status == 0 { 14 } else { faults.grpc_status };
            let mut response =
                if is_grpc { grpc(code, "") } else { Response::new(full("failing on request\n")) };
            if !is_grpc {
                let status = if faults.status == 0 { 503 } else { faults.status };
                *response.status_mut() = StatusCode::from_u16(status)?;
            }
            for (name, value) in &faults.headers {
                let name = http::HeaderName::try_from(name)?;
                response.headers_mut().append(name, HeaderValue::try_from(value)?);
            }
            return Ok(response);
        }
        if let Some(next) = &self.next {
            return hand_on(next, &head.headers).await;
        }
        Ok(if is_grpc { grpc(0, self.name) } else { Response::new(full(self.name)) })
    }

    /// Serves the control port.
    pub(crate) async fn control(self: Arc<Self>, stream: TcpStream) -> anyhow::Result<()> {
        let service = service_fn(move |request| {
            let work = Arc::clone(&self);
            async move {
                let answer = work.command(request).await.unwrap_or_else(|error| {
                    let mut response = Response::new(Full::from(format!("{error:#}\n")));
                    *response.status_mut() = StatusCode::BAD_REQUEST;
                    response
                });
                Ok::<_, Infallible>(answer)
            }
        });
        let served =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        served.await.context("serving the control port")
    }

    async fn command(&self, request: Request<Incoming>) -> anyhow::Result<Response<Full<Bytes>>> {
        match (request.method(), request.uri().path()) {
            (&Method::PUT, "/faults") => {
                let body = request.into_body().collect().await.context("reading the faults")?.to_bytes();
                let faults: Faults = serde_json::from_slice(&body).context("reading the faults")?;
                let workers = (faults.concurrency > 0).then(|| Arc::new(Semaphore::new(faults.concurrency)));
                *self.set.lock().unwrap_or_else(PoisonError::into_inner) = Set { faults, workers };
                Ok(Response::new(Full::default()))
            }
            (&Method::GET, "/counts") => {
                let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
                let counts = json!({ "calls": read(&self.calls), "failed": read(&self.failed) });
                Ok(Response::new(Full::from(counts.to_string())))
            }
            (method, path) => bail!("there is no {method} {path}"),
        }
    }
}

/// A unary gRPC answer; without a message where `code` is an error.
fn grpc(code: u32, message: &str) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(code));
    let mut frames = vec![Ok(Frame::trailers(trailers))];
    if code == 0 {
        // One message that is not compressed, its length in four bytes.
        let mut data = vec![0];
        data.extend(u32::try_from(message.len()).unwrap_or_default().to_be_bytes());
        data.extend(message.as_bytes());
        frames.insert(0, Ok(Frame::data(Bytes::from(data))));
    }
    let mut response = Response::new(streamed(stream::iter(frames)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Asks the next service, on a connection of its own, and answers what it answers.
async fn hand_on(next: &str, headers: &HeaderMap) -> anyhow::Result<Response<Body>> {
    let stream = TcpStream::connect(next).await.with_context(|| format!("connecting to {next}"))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("opening HTTP/1.1")?;
    tokio::spawn(connection);
    let mut request = Request::get("/work").header(header::HOST, next);
    for name in HANDED_ON {
        if let Some(value) = headers.get(*name) {
            request = request.header(*name, value);
        }
    }
    let response =
        sender.send_request(request.body(Full::<Bytes>::default())?).await.context("asking the next")?;
    let (head, body) = response.into_parts();
    let body = body.collect().await.context("reading the next one's answer")?.to_bytes();
    let mut response = Response::new(full(body));
    *response.status_mut() = head.status;
    Ok(response)
}
