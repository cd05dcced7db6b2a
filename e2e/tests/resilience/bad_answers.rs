//! L9: one of three endpoints answers, with nothing but failures.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::app::Faults;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::load::{Call, Load, Outcome};
use outrigger_e2e::suite::{Case, case, length};
use tokio::time::{Instant, sleep};

use crate::world::{BASELINE, RATE, REPLICAS, RETRIES, World};

/// How long after the breaker has opened an answer may come to what was sent before.
const UNDER_WAY: Duration = Duration::from_millis(100);

/// The longest ejection under [`BREAKER`]; after it an endpoint is tried with a request.
const MAX_EJECTION: Duration = Duration::from_secs(4);

/// The default breaker's failures in a row.
const CONSECUTIVE: usize = 5;

/// The default breaker, but for the longest ejection, so that a short run sees the end of several.
const BREAKER: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  circuitBreaker: {consecutiveFailures: 5, ejection: {base: 1s, max: 4s, maxPercent: 50}}
";

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("L9: one of three answers 503, no retries", |world| breaker(world, Call::Http1)),
        case("L9: one of three answers gRPC status 14, no retries", |world| breaker(world, Call::Grpc)),
        case("L9: one of three answers 503, retries", |world| retries(world, Call::Http1)),
        case("L9: one of three answers gRPC status 14, retries", |world| retries(world, Call::Grpc)),
        case("what must not be repeated is not: POST", posts),
    ]
}

fn protocol(call: Call) -> &'static str {
    if call == Call::Grpc { "gRPC" } else { "HTTP" }
}

async fn start(world: &World, call: Call) -> anyhow::Result<Load> {
    Ok(Load::start(&world.web.host, world.plan(RATE).await?.call(call)))
}

async fn breaker(world: Arc<World>, call: Call) -> anyhow::Result<()> {
    let replicas = world.ready(BREAKER).await?;
    let bad = &replicas[0];
    let load = start(&world, call).await?;
    sleep(BASELINE).await;
    let first = world.picks(bad).await?;
    let (begun, fault) = (load.now(), Instant::now());
    bad.suffer(Faults::every(503)).await?;
    let (aside, _) = world.put_aside(bad, fault, first).await?;
    let tripped = begun + aside;
    sleep((begun + length(20, 300)).saturating_sub(load.now())).await;
    let healed = load.now();
    bad.suffer(Faults::default()).await?;
    // Each of two probes in turn may have to wait for the whole of the longest ejection.
    let start = Instant::now();
    while world.ejected().await? > 0 {
        ensure!(start.elapsed() < 3 * MAX_EJECTION, "the endpoint was not taken back");
        sleep(Duration::from_millis(20)).await;
    }
    let back = start.elapsed();
    // What it gets is the balancer's to say, which remembers failures for a while.
    let returned = load.now();
    sleep(Duration::from_secs(5)).await;
    let outcome = load.stop().await?;
    let failures = counted_failures(&outcome.between(begun, tripped + UNDER_WAY));
    // What was under way when the breaker opened ends as it ends.
    let afterwards = outcome.between(tripped + UNDER_WAY, healed);
    println!("tripped after {aside:?} and {failures} failures\n  afterwards: {afterwards}");
    let share = outcome.between(returned, Duration::MAX).share_of(REPLICAS[0]);
    let name = |what: &str| format!("L9: {}: {what}", protocol(call));
    hold(&[
        Figure::info(&name("share in the 5 s after it was taken back"), "%", share * 100.0),
        Figure::at_most(
            &name("failures until it is put aside, but those under way then"),
            "requests",
            7.0,
            f64::from(u32::try_from(failures)?),
        ),
        Figure::at_most(&name("put aside after"), "s", 1.0, aside.as_secs_f64()),
        Figure::at_most(&name("failed afterwards"), "%", 0.1, afterwards.failed_share() * 100.0),
        Figure::at_most(
            &name("taken back after it healed"),
            "s",
            (2 * MAX_EJECTION).as_secs_f64(),
            back.as_secs_f64(),
        ),
    ])
}

/// Failures until a breaker that counts them could open, and those of requests that were sent afterwards. What was sent before, and
/// fails later, nobody could know; a machine that stalls for some milliseconds lets many of them go at once.
fn counted_failures(outcome: &Outcome) -> usize {
    let failed = || outcome.samples.iter().filter(|sample| !sample.ok);
    let mut ends: Vec<_> = failed().map(|sample| sample.at + sample.took).collect();
    ends.sort_unstable();
    let Some(last) = ends.get(CONSECUTIVE - 1) else { return ends.len() };
    CONSECUTIVE + failed().filter(|sample| sample.at > *last).count()
}

async fn retries(world: Arc<World>, call: Call) -> anyhow::Result<()> {
    // gRPC calls are POSTs; that they may be repeated is what the policy says.
    let policy = if call == Call::Grpc {
        RETRIES.replace("[5xx,", "[unavailable,").replace("retry: {", "retry: {unsafeMethods: true, ")
    } else {
        RETRIES.to_owned()
    };
    let replicas = world.ready(&policy).await?;
    let load = start(&world, call).await?;
    sleep(BASELINE).await;
    let begun = load.now();
    replicas[0].suffer(Faults::every(503)).await?;
    sleep(length(20, 300)).await;
    let outcome = load.stop().await?;
    let during = outcome.between(begun, Duration::MAX);
    println!("{during}");
    let name = format!("L9: {}: success with retries", protocol(call));
    hold(&[Figure::at_least(&name, "%", 99.99, (1.0 - during.failed_share()) * 100.0)])
}

/// A request that is not safe to repeat arrives once, however it ends.
async fn posts(world: Arc<World>) -> anyhow::Result<()> {
    // Without a breaker: every third must fail to the end.
    let policy = format!("{RETRIES}  circuitBreaker: {{consecutiveFailures: 0}}\n");
    let replicas = world.ready(&policy).await?;
    let calls = async || {
        let mut calls = 0;
        for replica in &*replicas {
            calls += replica.counts().await?.calls;
        }
        anyhow::Ok(calls)
    };
    replicas[0].suffer(Faults::every(503)).await?;
    let before = calls().await?;
    let plan = world.plan(200).await?.call(Call::Post);
    let outcome = Load::for_duration(&world.web.host, plan, Duration::from_secs(3)).await?;
    let arrived = calls().await? - before;
    println!("{outcome}");
    ensure!(arrived <= outcome.total(), "{} requests arrived {arrived} times", outcome.total());
    let failed = outcome.failures.get("status 503 from the application").copied().unwrap_or_default();
    ensure!(failed > 0, "no request met {}", REPLICAS[0]);
    Ok(())
}
