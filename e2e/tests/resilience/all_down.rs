//! L11: every endpoint is down. The caller hears so at once, and hears of the return at once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::suite::{Case, case, length};
use tokio::time::{Instant, sleep};

use crate::world::{HTTP, LIMIT, ORDERS, World, revive};

/// Slow enough that a second of them fits any queue.
const CALLS: u32 = 200;
/// From then on it is known.
const KNOWN: Duration = Duration::from_secs(2);

/// The longest that a request waits under [`PATIENCE`], and what it takes to be told so.
const WAIT: Duration = Duration::from_secs(1);
/// A caller who waits for less than a second.
const PATIENCE: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: 900ms}
";

#[derive(Clone, Copy, Debug)]
enum Down {
    Killed,
    Silent,
}

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("L11: every endpoint killed", |world| all_down(world, Down::Killed)),
        case("L11: every endpoint in a black hole", |world| all_down(world, Down::Silent)),
    ]
}

async fn all_down(world: Arc<World>, down: Down) -> anyhow::Result<()> {
    let mut replicas = world.ready(PATIENCE).await?;
    let load = world.load(CALLS).await?;
    sleep(Duration::from_secs(2)).await;
    let begun = load.now();
    for replica in &mut *replicas {
        match down {
            Down::Killed => replica.kill(),
            Down::Silent => replica.host.fall_silent().await?,
        }
    }
    sleep(length(10, 60)).await;
    let ended = load.now();
    for replica in &mut *replicas {
        if matches!(down, Down::Silent) {
            replica.host.speak_again().await?;
        }
    }
    revive(&mut replicas[0]).await?;
    let returned = Instant::now();
    loop {
        if world.web.get(ORDERS, HTTP, "/work").await.is_ok_and(|reply| reply.status == 200) {
            break;
        }
        ensure!(returned.elapsed() < LIMIT, "no answer after the return");
        sleep(Duration::from_millis(20)).await;
    }
    let back = returned.elapsed();
    for replica in &mut *replicas {
        revive(replica).await?;
    }
    let outcome = load.stop().await?;
    // A request that was under way when its connection broke may end without a reason.
    let during = outcome.between(begun, ended);
    // What tries an endpoint just before it is back waits as long as it may, and is answered.
    let known = outcome.between(begun + KNOWN, ended.saturating_sub(WAIT));
    println!("{down:?}: {during}\n  known: {known}\n  back after {back:?}");
    let all = |outcome: &outrigger_e2e::load::Outcome| outcome.quantile_of(1.0, |sample| !sample.ok);
    let explained = |what: &str| what.starts_with("status ") && !what.ends_with("from the application");
    let unexplained = known.samples.iter().filter(|sample| !sample.ok && !explained(&sample.what)).count();
    ensure!(known.succeeded == 0, "{} requests were answered by nobody", known.succeeded);
    ensure!(known.failed() > 100, "only {} requests were sent", known.failed());
    let name = |what: &str| format!("L11: {down:?}: {what}");
    hold(&[
        // One of a hundred finds out whether it is still so, and waits for that.
        Figure::at_most(
            &name("p95 of a refusal, once it is known"),
            "ms",
            100.0,
            known.quantile_of(0.95, |_| true),
        ),
        Figure::at_most(&name("the longest wait for a refusal"), "ms", 1000.0, all(&during)),
        Figure::at_most(
            &name("refusals without a reason"),
            "requests",
            0.0,
            f64::from(u32::try_from(unexplained)?),
        ),
        Figure::at_most(&name("first answer after the return"), "s", 1.0, back.as_secs_f64()),
    ])
}
