//! The demo's load: an open loop (a request goes out when it is due, whether or not the last one is back), so that a
//! slow mesh shows as latency and failures, not as fewer requests.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{task::JoinHandle, time::Instant};

use super::app::Next;

/// A request that has no answer by then has failed.
const DEADLINE: Duration = Duration::from_secs(5);
/// Failures of one kind are counted together; more kinds than this are counted as "other".
const MAX_KINDS: usize = 32;

/// Requests since the last [`Load::take`].
#[derive(Debug, Default, Clone)]
pub(super) struct Tally {
    pub(super) sent: u64,
    pub(super) failed: u64,
    /// What went wrong, and how often.
    pub(super) kinds: BTreeMap<String, u64>,
}

/// A running load generator; it stops when dropped.
pub(super) struct Load {
    tally: Arc<Mutex<Tally>>,
    task: JoinHandle<()>,
}

impl Load {
    /// Sends `rate` requests a second to `target`.
    pub(super) fn start(target: SocketAddr, rate: u32) -> Self {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let counted = tally.clone();
        let task = tokio::spawn(async move {
            let client = Arc::new(Next::new(target));
            let gap = Duration::from_secs(1) / rate;
            let mut due = Instant::now();
            loop {
                tokio::time::sleep_until(due).await;
                due += gap;
                let (client, tally) = (client.clone(), counted.clone());
                tokio::spawn(async move {
                    let outcome = send(&client).await;
                    let mut tally = tally.lock().expect("no holder of this lock can panic");
                    tally.sent += 1;
                    if let Err(kind) = outcome {
                        tally.failed += 1;
                        let known = tally.kinds.len() < MAX_KINDS || tally.kinds.contains_key(&kind);
                        *tally.kinds.entry(if known { kind } else { "other".to_owned() }).or_default() += 1;
                    }
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

async fn send(client: &Next) -> Result<(), String> {
    match tokio::time::timeout(DEADLINE, client.get("/")).await {
        Ok(Ok((status, _))) if status.is_success() => Ok(()),
        Ok(Ok((status, (reason, body)))) => Err(match reason {
            Some(reason) => format!("{status}, {}", String::from_utf8_lossy(reason.as_bytes())),
            None => format!("{status}, {}", String::from_utf8_lossy(&body).trim()),
        }),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}
