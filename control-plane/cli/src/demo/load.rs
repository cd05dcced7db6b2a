//! The demo's load: an open loop (a request goes out when it is due, whether or not the last one is back), so that a
//! slow mesh shows as latency and failures, not as fewer requests.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::{JoinHandle, JoinSet},
    time::Instant,
};

use super::app::Next;

/// A request that has no answer by then has failed.
const DEADLINE: Duration = Duration::from_secs(5);
/// Failures of one kind are counted together; more kinds than this are counted as "other".
const MAX_KINDS: usize = 32;
/// Between two lines of a load that runs alone.
const REPORT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where requests go: `host:port`
    #[arg(long)]
    to: String,
    /// Requests a second
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=2000))]
    rate: u32,
    /// End after so many requests, with exit code 1 if one of them failed [default: go on until told to end]
    #[arg(long)]
    requests: Option<u32>,
}

/// Sends requests and says what became of them, until the process is told to end or the requests that were asked for are
/// answered.
///
/// # Errors
/// Says how many requests failed, and of what, if their number was given.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    if let Some(requests) = arguments.requests {
        return counted(&arguments, requests).await;
    }
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let load = Load::start(arguments.to, arguments.rate);
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            () = tokio::time::sleep(REPORT) => println!("{}", load.take()),
        }
    }
}

async fn counted(arguments: &Arguments, requests: u32) -> Result<()> {
    let client = Arc::new(Next::new(arguments.to.as_str()));
    let mut every = tokio::time::interval(Duration::from_secs(1) / arguments.rate);
    let mut under_way = JoinSet::new();
    for _ in 0..requests {
        every.tick().await;
        let client = client.clone();
        under_way.spawn(async move { send(&client).await });
    }
    let mut tally = Tally::default();
    for outcome in under_way.join_all().await {
        tally.count(outcome);
    }
    println!("{tally}");
    anyhow::ensure!(tally.failed == 0, "{} of {requests} requests to {} failed", tally.failed, arguments.to);
    Ok(())
}

/// Requests since the last [`Load::take`].
#[derive(Debug, Default, Clone)]
pub(super) struct Tally {
    pub(super) sent: u64,
    pub(super) failed: u64,
    /// What went wrong, and how often.
    pub(super) kinds: BTreeMap<String, u64>,
    /// The last good answer.
    answer: String,
}

impl Tally {
    fn count(&mut self, outcome: Result<String, String>) {
        self.sent += 1;
        match outcome {
            Ok(answer) => self.answer = answer,
            Err(kind) => {
                self.failed += 1;
                let known = self.kinds.len() < MAX_KINDS || self.kinds.contains_key(&kind);
                *self.kinds.entry(if known { kind } else { "other".to_owned() }).or_default() += 1;
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests, {} failed", self.sent, self.failed)?;
        for (kind, times) in &self.kinds {
            write!(f, "; {times} x {kind}")?;
        }
        if !self.answer.is_empty() {
            write!(f, "; {}", self.answer)?;
        }
        Ok(())
    }
}

/// A running load generator; it stops when dropped.
pub(super) struct Load {
    tally: Arc<Mutex<Tally>>,
    task: JoinHandle<()>,
}

impl Load {
    /// Sends `rate` requests a second to `target`.
    pub(super) fn start(target: impl Into<String>, rate: u32) -> Self {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let counted = tally.clone();
        let client = Arc::new(Next::new(target));
        let task = tokio::spawn(async move {
            let gap = Duration::from_secs(1) / rate;
            let mut due = Instant::now();
            loop {
                tokio::time::sleep_until(due).await;
                due += gap;
                let (client, tally) = (client.clone(), counted.clone());
                tokio::spawn(async move {
                    let outcome = send(&client).await;
                    tally.lock().expect("no holder of this lock can panic").count(outcome);
                });
            }
        });
        Self { tally, task }
    }

    /// What happened since the last call.
    pub(super) fn take(&self) -> Tally {
        std::mem::take(&mut *self.tally.lock().expect("no holder of this lock can panic"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The answer's text, or what went wrong.
async fn send(client: &Next) -> Result<String, String> {
    match tokio::time::timeout(DEADLINE, client.get("/")).await {
        Ok(Ok((status, (_, body)))) if status.is_success() => {
            Ok(String::from_utf8_lossy(&body).trim().to_owned())
        }
        Ok(Ok((status, (reason, body)))) => Err(match reason {
            Some(reason) => format!("{status}, {}", String::from_utf8_lossy(reason.as_bytes())),
            None => format!("{status}, {}", String::from_utf8_lossy(&body).trim()),
        }),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_failed_and_what_was_heard() {
        let mut tally = Tally { sent: 100, ..Tally::default() };
        assert_eq!(tally.to_string(), "100 requests, 0 failed");
        tally.answer = "web-1 <- orders-2 <- payments-1".to_owned();
        assert_eq!(tally.to_string(), "100 requests, 0 failed; web-1 <- orders-2 <- payments-1");
        tally.failed = 7;
        tally.kinds.insert("403 Forbidden, access_denied".to_owned(), 7);
        assert_eq!(
            tally.to_string(),
            "100 requests, 7 failed; 7 x 403 Forbidden, access_denied; web-1 <- orders-2 <- payments-1"
        );
    }
}
