//! Waiting for conditions: the suites never sleep and hope.

use std::time::Duration;

use anyhow::anyhow;
use tokio::time::Instant;

/// Pause between two probes: short beside every limit in use, long beside what a probe costs.
const PAUSE: Duration = Duration::from_millis(20);

/// Probes until `probe` answers, and returns its answer; fails after `limit` with the last reason it gave.
pub async fn wait_until<T, F, Fut>(limit: Duration, what: &str, mut probe: F) -> anyhow::Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = anyhow::Result<T>>,
{
    let start = Instant::now();
    let mut last = anyhow!("no probe ended");
    while start.elapsed() < limit {
        match tokio::time::timeout(limit.saturating_sub(start.elapsed()), probe()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(anyhow!("waited {limit:?} for {what}: {last:#}"))
}

/// Runs `work`, at most for `limit`.
pub async fn within<T>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(anyhow!("{what} did not end within {limit:?}")),
    }
}
