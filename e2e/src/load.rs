//! An open-loop load generator: a request leaves when it is due, whether or not earlier ones came back, so that a
//! stall shows as many slow or failed requests and not as a gap (coordinated omission).
//!
//! Connections are reused as an HTTP/1.1 client library reuses them: an idle one is taken, else one is opened. A
//! request on a reused connection that dies before a byte of the response is *not* tried again: what the mesh does to
//! connections must show.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use std::{cell::RefCell, fmt};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::SendRequest;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::client;
use crate::network::Host;

/// A request without an answer by then has failed.
const DEADLINE: Duration = Duration::from_secs(5);
/// Requests under way at most; beyond this they fail as `generator is full`, which no suite may reach.
const IN_FLIGHT: usize = 4_000;
/// Kinds of failure that are told apart.
const REASONS: usize = 50;

/// What became of the requests of one run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Answered with 200.
    pub succeeded: u64,
    /// All others, by reason.
    pub failures: BTreeMap<String, u64>,
    /// Answers by body: which replica answered how often.
    pub answered_by: BTreeMap<String, u64>,
    /// Latencies of the successes, ascending.
    pub latencies: Vec<Duration>,
}

impl Outcome {
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
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let at = (self.latencies.len().saturating_sub(1) as f64 * quantile) as usize;
        self.latencies.get(at).map_or(0.0, |latency| latency.as_secs_f64() * 1000.0)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests, {} failed {:?}, p50 {:.1} ms, p99 {:.1} ms, answered by {:?}",
            self.total(),
            self.failed(),
            self.failures,
            self.quantile_ms(0.5),
            self.quantile_ms(0.99),
            self.answered_by
        )
    }
}

/// What to send, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Requests a second.
    pub rate: u32,
    /// Where connections go.
    pub target: SocketAddr,
    /// The Host field.
    pub host: String,
    /// The path.
    pub path: String,
}

/// A running load.
pub struct Load {
    stop: watch::Sender<bool>,
    result: tokio::task::JoinHandle<anyhow::Result<Outcome>>,
}

impl Load {
    /// Starts sending from `host`.
    pub fn start(host: &Host, plan: Plan) -> Self {
        let (stop, stopped) = watch::channel(false);
        let host = host.clone();
        let result = tokio::spawn(async move { host.run(move || run(plan, stopped)).await });
        Self { stop, result }
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

type Idle = Rc<RefCell<Vec<SendRequest<Full<Bytes>>>>>;

async fn run(plan: Plan, mut stopped: watch::Receiver<bool>) -> anyhow::Result<Outcome> {
    let (plan, idle, outcome) = (Rc::new(plan), Idle::default(), Rc::new(RefCell::new(Outcome::default())));
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / plan.rate.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopped.wait_for(|stop| *stop) => break,
        }
        while running.try_join_next().is_some() {}
        if running.len() >= IN_FLIGHT {
            fail(&outcome, "generator is full".to_owned());
            continue;
        }
        let (plan, idle, outcome) = (Rc::clone(&plan), Rc::clone(&idle), Rc::clone(&outcome));
        running.spawn_local(async move {
            let start = Instant::now();
            match tokio::time::timeout(DEADLINE, send(&plan, &idle)).await {
                Ok(Ok(answer)) => {
                    let mut outcome = outcome.borrow_mut();
                    outcome.succeeded += 1;
                    outcome.latencies.push(start.elapsed());
                    let known =
                        outcome.answered_by.len() < REASONS || outcome.answered_by.contains_key(&answer);
                    *outcome
                        .answered_by
                        .entry(if known { answer } else { "others".to_owned() })
                        .or_default() += 1;
                }
                Ok(Err(reason)) => fail(&outcome, reason),
                Err(_) => fail(&outcome, format!("no answer in {DEADLINE:?}")),
            }
        });
    }
    while running.join_next().await.is_some() {}
    let mut outcome = outcome.borrow().clone();
    outcome.latencies.sort_unstable();
    Ok(outcome)
}

fn fail(outcome: &RefCell<Outcome>, reason: String) {
    let mut outcome = outcome.borrow_mut();
    let known = outcome.failures.len() < REASONS || outcome.failures.contains_key(&reason);
    *outcome.failures.entry(if known { reason } else { "others".to_owned() }).or_default() += 1;
}

async fn send(plan: &Plan, idle: &Idle) -> Result<String, String> {
    let kept = loop {
        let candidate = idle.borrow_mut().pop();
        match candidate {
            // `ready` lags behind a close by a turn of the run queue; `is_closed` does not.
            Some(sender) if sender.is_closed() || !sender.is_ready() => {}
            other => break other,
        }
    };
    let (mut sender, state) = match kept {
        Some(sender) => (sender, "reused"),
        None => (client::http1(plan.target).await.map_err(|error| format!("connect: {error:#}"))?, "new"),
    };
    let request = Request::get(&plan.path).header(http::header::HOST, &plan.host).body(Full::default());
    let request = request.map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await;
    let response = response.map_err(|error| format!("{state} connection: {}", chain(&error)))?;
    let (status, reason) = (response.status(), response.headers().get("outrigger-reason").cloned());
    let body = response.into_body().collect().await.map_err(|error| format!("body: {}", chain(&error)))?;
    if sender.ready().await.is_ok() {
        idle.borrow_mut().push(sender);
    }
    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    match (status.as_u16(), reason) {
        (200, _) => Ok(body),
        (code, Some(reason)) => Err(format!("status {code}, {}", String::from_utf8_lossy(reason.as_bytes()))),
        (code, None) => Err(format!("status {code} from the application")),
    }
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
