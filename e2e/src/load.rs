//! An open-loop load generator: a request leaves when it is due, whether or not earlier ones came back, so that a
//! stall shows as many slow or failed requests and not as a gap (coordinated omission).
//!
//! Connections are reused as a client library reuses them: with HTTP/1.1 an idle one is taken, else one is opened; with HTTP/2
//! one carries all. A request on a reused connection that dies before a byte of the response is *not* tried again: what
//! the mesh does to connections must show.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use std::{cell::RefCell, fmt};

use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::client;
use crate::network::Host;

/// Requests under way at most; beyond this they fail as `generator is full`, which no suite may reach.
const IN_FLIGHT: usize = 4_000;
/// Kinds of answers and of failures that are told apart.
const REASONS: usize = 50;
/// What is said of the others.
const OTHERS: &str = "others";

/// What became of one request.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it was due, since the load's start.
    pub at: Duration,
    /// Until its answer had ended, or it had failed.
    pub took: Duration,
    /// Answered with success.
    pub ok: bool,
    /// The answer's body, or why it failed.
    pub what: Arc<str>,
}

/// What became of the requests of one run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Answered with success.
    pub succeeded: u64,
    /// All others, by reason.
    pub failures: BTreeMap<String, u64>,
    /// Answers by body: which replica answered how often.
    pub answered_by: BTreeMap<String, u64>,
    /// Each of them, by when it was due.
    pub samples: Vec<Sample>,
}

impl Outcome {
    fn of(mut samples: Vec<Sample>) -> Self {
        samples.sort_by_key(|sample| sample.at);
        let mut outcome = Self::default();
        for sample in &samples {
            let counts = if sample.ok {
                outcome.succeeded += 1;
                &mut outcome.answered_by
            } else {
                &mut outcome.failures
            };
            *counts.entry(sample.what.to_string()).or_default() += 1;
        }
        Self { samples, ..outcome }
    }

    /// Number of failures.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Number of requests.
    pub fn total(&self) -> u64 {
        self.succeeded + self.failed()
    }

    /// A latency quantile of the successes, in milliseconds.
    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        self.quantile_of(quantile, |sample| sample.ok)
    }

    /// A quantile of how long those took that `of` chooses, in milliseconds; 0 of none.
    pub fn quantile_of(&self, quantile: f64, of: impl Fn(&Sample) -> bool) -> f64 {
        let mut times: Vec<_> =
            self.samples.iter().filter(|sample| of(sample)).map(|sample| sample.took).collect();
        times.sort_unstable();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let at = (times.len().saturating_sub(1) as f64 * quantile) as usize;
        times.get(at).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
    }

    /// What was due from `from` until `until`, since the load's start.
    #[must_use]
    pub fn between(&self, from: Duration, until: Duration) -> Self {
        let due = |sample: &&Sample| (from..until).contains(&sample.at);
        Self::of(self.samples.iter().filter(due).cloned().collect())
    }

    /// The share of the successes that `replica` answered, from 0 to 1.
    pub fn share_of(&self, replica: &str) -> f64 {
        let count = self.answered_by.get(replica).copied().unwrap_or_default();
        ratio(count, self.succeeded)
    }

    /// The share of all requests that failed, from 0 to 1.
    pub fn failed_share(&self) -> f64 {
        ratio(self.failed(), self.total())
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests, {} failed {:?}, p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms, answered by {:?}",
            self.total(),
            self.failed(),
            self.failures,
            self.quantile_ms(0.5),
            self.quantile_ms(0.99),
            self.quantile_ms(0.999),
            self.answered_by
        )
    }
}

/// What a request is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Call {
    /// GET, HTTP/1.1.
    Http1,
    /// GET, HTTP/2.
    Http2,
    /// POST without a body, HTTP/1.1: not safe to repeat.
    Post,
    /// A unary gRPC call; success is its status 0.
    Grpc,
}

/// What to send, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Requests a second.
    pub rate: u32,
    /// Where connections go.
    pub target: SocketAddr,
    /// The Host field, or the authority.
    pub host: String,
    /// The path.
    pub path: String,
    /// What a request is.
    pub call: Call,
    /// A request without an answer by then has failed.
    pub patience: Duration,
}

impl Plan {
    /// GET of `http://<host><path>` at `target`, `rate` times a second, over HTTP/1.1, with five seconds of patience.
    pub fn new(rate: u32, target: SocketAddr, host: impl Into<String>, path: &str) -> Self {
        let (host, path) = (host.into(), path.to_owned());
        Self { rate, target, host, path, call: Call::Http1, patience: Duration::from_secs(5) }
    }

    /// The same with other calls.
    #[must_use]
    pub fn call(mut self, call: Call) -> Self {
        self.call = call;
        self
    }

    /// The same with another patience.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

/// A running load.
pub struct Load {
    start: Instant,
    stop: watch::Sender<bool>,
    result: tokio::task::JoinHandle<anyhow::Result<Outcome>>,
}

impl Load {
    /// Starts sending from `host`.
    pub fn start(host: &Host, plan: Plan) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (host, start) = (host.clone(), Instant::now());
        let result = tokio::spawn(async move { host.run(move || run(plan, start, stopped)).await });
        Self { start, stop, result }
    }

    /// Time since its start, as [`Sample::at`] counts it.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Stops sending, waits for what is under way, and tells what happened.
    pub async fn stop(self) -> anyhow::Result<Outcome> {
        self.stop.send_replace(true);
        self.result.await?
    }

    /// Sends for `length`, then stops.
    pub async fn for_duration(host: &Host, plan: Plan, length: Duration) -> anyhow::Result<Outcome> {
        let load = Self::start(host, plan);
        tokio::time::sleep(length).await;
        load.stop().await
    }
}

/// What the requests of one run share.
struct Shared {
    plan: Plan,
    idle: RefCell<Vec<http1::SendRequest<Full<Bytes>>>>,
    /// Locked while it is opened, so that one carries all.
    http2: tokio::sync::Mutex<Option<http2::SendRequest<Full<Bytes>>>>,
    samples: RefCell<Vec<Sample>>,
    known: RefCell<BTreeSet<Arc<str>>>,
}

async fn run(plan: Plan, start: Instant, mut stopped: watch::Receiver<bool>) -> anyhow::Result<Outcome> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / plan.rate.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let shared = Rc::new(Shared {
        plan,
        idle: RefCell::default(),
        http2: tokio::sync::Mutex::default(),
        samples: RefCell::default(),
        known: RefCell::default(),
    });
    let mut running = JoinSet::new();
    loop {
        let due = tokio::select! {
            due = ticks.tick() => due,
            _ = stopped.wait_for(|stop| *stop) => break,
        };
        while running.try_join_next().is_some() {}
        if running.len() >= IN_FLIGHT {
            shared.note(start, due, Err("generator is full".to_owned()));
            continue;
        }
        let shared = Rc::clone(&shared);
        running.spawn_local(async move {
            let patience = shared.plan.patience;
            let result = tokio::time::timeout(patience, shared.send()).await;
            shared.note(start, due, result.unwrap_or_else(|_| Err(format!("no answer in {patience:?}"))));
        });
    }
    while running.join_next().await.is_some() {}
    Ok(Outcome::of(shared.samples.take()))
}

impl Shared {
    fn note(&self, start: Instant, due: Instant, result: Result<String, String>) {
        let (ok, what) = match result {
            Ok(answer) => (true, answer),
            Err(reason) => (false, reason),
        };
        let mut known = self.known.borrow_mut();
        let what = known.get(what.as_str()).cloned().unwrap_or_else(|| {
            let what = if known.len() < REASONS { what.into() } else { OTHERS.into() };
            known.insert(Arc::clone(&what));
            what
        });
        let (at, took) = (due.saturating_duration_since(start), due.elapsed());
        self.samples.borrow_mut().push(Sample { at, took, ok, what });
    }

    async fn send(&self) -> Result<String, String> {
        match self.plan.call {
            Call::Http1 | Call::Post => self.send_http1().await,
            Call::Http2 | Call::Grpc => self.send_http2().await,
        }
    }

    async fn send_http1(&self) -> Result<String, String> {
        let kept = loop {
            let candidate = self.idle.borrow_mut().pop();
            match candidate {
                // `ready` lags behind a close by a turn of the run queue; `is_closed` does not.
                Some(sender) if sender.is_closed() || !sender.is_ready() => {}
                other => break other,
            }
        };
        let (mut sender, state) = if let Some(sender) = kept {
            (sender, "reused")
        } else {
            let opened = client::http1(self.plan.target).await;
            (opened.map_err(|error| format!("connect: {error:#}"))?, "new")
        };
        let method = if self.plan.call == Call::Post { Method::POST } else { Method::GET };
        let request = Request::builder().method(method).uri(&self.plan.path);
        let request = request.header(header::HOST, &self.plan.host).body(Full::default());
        let response = sender.send_request(request.map_err(|error| error.to_string())?).await;
        let response = response.map_err(|error| format!("{state} connection: {}", chain(&error)))?;
        let answer = judge(response, false).await;
        if sender.ready().await.is_ok() {
            self.idle.borrow_mut().push(sender);
        }
        answer
    }

    async fn send_http2(&self) -> Result<String, String> {
        let mut sender = {
            let mut kept = self.http2.lock().await;
            match &*kept {
                Some(sender) if !sender.is_closed() => sender.clone(),
                _ => {
                    let opened = client::http2(self.plan.target).await;
                    kept.insert(opened.map_err(|error| format!("connect: {error:#}"))?).clone()
                }
            }
        };
        let is_grpc = self.plan.call == Call::Grpc;
        let uri = format!("http://{}{}", self.plan.host, self.plan.path);
        let request = if is_grpc {
            Request::post(uri)
                .header(header::CONTENT_TYPE, "application/grpc")
                .header(header::TE, "trailers")
                // A message without content.
                .body(Full::new(Bytes::from_static(&[0; 5])))
        } else {
            Request::get(uri).body(Full::default())
        };
        let request = request.map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await;
        judge(response.map_err(|error| format!("stream: {}", chain(&error)))?, is_grpc).await
    }
}

/// The body of a success, or what went wrong.
async fn judge(response: Response<Incoming>, is_grpc: bool) -> Result<String, String> {
    let (status, headers) = (response.status(), response.headers().clone());
    let collected = response.into_body().collect().await;
    let collected = collected.map_err(|error| format!("body: {}", chain(&error)))?;
    let trailer = collected.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
    let body = collected.to_bytes();
    let text = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let code = if is_grpc {
        let code = trailer.as_ref().or_else(|| headers.get("grpc-status"));
        Some(code.map_or_else(|| "none".to_owned(), text))
    } else {
        None
    };
    if status == 200 && code.as_deref().is_none_or(|code| code == "0") {
        // A message's length goes before it.
        let answer = if is_grpc { body.get(5..).unwrap_or_default() } else { &body };
        return Ok(String::from_utf8_lossy(answer).into_owned());
    }
    let code = code.map(|code| format!(", grpc-status {code}")).unwrap_or_default();
    Err(match headers.get("outrigger-reason") {
        Some(reason) => format!("status {}{code}, {}", status.as_u16(), text(reason)),
        None => format!("status {}{code} from the application", status.as_u16()),
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
