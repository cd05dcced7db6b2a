//! L18: everything fails, and retries must not make it worse: neither at one service nor down a chain of four.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::app::{CONTROL_PORT, Faults};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::load::{Load, Outcome, Plan};
use outrigger_e2e::mesh::Workload;
use outrigger_e2e::suite::{Case, case, is_soak, length};
use tokio::time::{Instant, sleep};

use crate::world::{HTTP, LIMIT, RETRIES, World};

const WINDOW: Duration = Duration::from_secs(10);
/// So many that a budget's floor, one a second by default, is next to nothing.
const ALONE: u32 = 1_000;
/// Calls a second: four hops of debug binaries on two cores.
const CHAINED: u32 = 250;
/// For longer than a minute. Each hop's application makes a connection for each call, which lingers for a minute when it has
/// ended: with more than 14,000 of these, half of the local ports, the kernel looks for a free one for longer than a call takes.
const CHAINED_FOR_LONG: u32 = 160;

/// Retries for every service.
const EVERYWHERE: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: everywhere, namespace: outrigger-system}
spec:
  targetRef: {kind: Mesh}
  retry: {attempts: 3, on: [5xx, reset, connect-failure]}
";
/// What the breaker would hold back is left to the budgets.
const NO_BREAKER: &str = "  circuitBreaker: {consecutiveFailures: 0}\n";

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("L18: every request fails, a budget of 20 % alone", alone),
        case("L18: every request fails, the default budget alone", default_budget),
        case("L18: every request fails, the default breaker", with_breaker),
        case("L18: every request fails at the end of a chain of four", |world| chain(world, true)),
        case("L18: the same, budgets alone", |world| chain(world, false)),
    ]
}

/// Calls that arrived at any of `workloads`, by time.
struct Arrivals {
    seen: Vec<(Duration, u64)>,
}

impl Arrivals {
    /// Watches for `length`.
    async fn watch(load: &Load, workloads: &[Workload], length: Duration) -> anyhow::Result<Self> {
        let (start, mut seen) = (Instant::now(), Vec::new());
        while start.elapsed() < length {
            let mut calls = 0;
            for workload in workloads {
                calls += workload.counts().await?.calls;
            }
            seen.push((load.now(), calls));
            sleep(Duration::from_millis(500)).await;
        }
        Ok(Self { seen })
    }

    /// Arrivals of each request that was sent, in the worst window.
    #[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
    fn worst(&self, outcome: &Outcome) -> f64 {
        let mut worst: f64 = 0.0;
        for (at, (from, before)) in self.seen.iter().enumerate() {
            let end = self.seen[at..].iter().find(|(until, _)| *until >= *from + WINDOW);
            if let Some((until, after)) = end {
                let sent = outcome.between(*from, *until).total();
                worst = worst.max((after - before) as f64 / sent.max(1) as f64);
            }
        }
        worst
    }
}

async fn alone(world: Arc<World>) -> anyhow::Result<()> {
    let policy = RETRIES.replace("retry: {", "retry: {budget: {percent: 20, minPerSecond: 0}, ");
    let worst = storm(&world, &format!("{policy}{NO_BREAKER}")).await?;
    ensure!(worst > 1.05, "nothing was tried again");
    hold(&[Figure::at_most("L18: calls that arrive for each one sent", "times", 1.2, worst)])
}

async fn default_budget(world: Arc<World>) -> anyhow::Result<()> {
    let worst = storm(&world, &format!("{RETRIES}{NO_BREAKER}")).await?;
    hold(&[Figure::at_most("L18: with the default budget", "times", 1.2, worst)])
}

async fn with_breaker(world: Arc<World>) -> anyhow::Result<()> {
    let worst = storm(&world, RETRIES).await?;
    hold(&[Figure::at_most("L18: with the default breaker", "times", 1.2, worst)])
}

async fn storm(world: &World, policy: &str) -> anyhow::Result<f64> {
    let replicas = world.ready(policy).await?;
    for replica in &*replicas {
        replica.suffer(Faults::every(503)).await?;
    }
    let load = world.load(ALONE).await?;
    // From the first request on: a budget that begins full would show.
    let arrivals = Arrivals::watch(&load, &replicas, length(16, 120)).await?;
    let outcome = load.stop().await?;
    ensure!(outcome.succeeded == 0, "{} requests succeeded", outcome.succeeded);
    let worst = arrivals.worst(&outcome);
    println!("{outcome}\n  at worst {worst:.3} arrivals for each request");
    Ok(worst)
}

async fn chain(world: Arc<World>, breaker: bool) -> anyhow::Result<()> {
    let policy = if breaker { EVERYWHERE.to_owned() } else { format!("{EVERYWHERE}{NO_BREAKER}") };
    let replicas = world.ready(&policy).await?;
    // web -> hop1 -> hop2 -> hop3 -> orders
    let mut hops = Vec::new();
    // Once for each run, so that no instance of an earlier one is called.
    let run = if breaker { "a" } else { "b" };
    let name = |hop: u8| if hop == 4 { "orders".to_owned() } else { format!("hop{hop}{run}") };
    for hop in [3, 2, 1] {
        let (next, hop) = (name(hop + 1), name(hop));
        let (port, control) = (HTTP.to_string(), CONTROL_PORT.to_string());
        let next = format!("{next}.service.consul:{HTTP}");
        let arguments = ["--http", &port, "--control", &control, "--next", &next];
        hops.push(world.mesh.workload(&hop).serves(&hop, HTTP).app(arguments).start().await?);
    }
    let edge = format!("{}.service.consul", name(1));
    let edge = edge.as_str();
    world.web.wait_for_service(edge, HTTP, LIMIT).await?;
    let target = world.web.look_up(edge, HTTP).await?;
    let reply = world.web.get(edge, HTTP, "/work").await?.expect(200)?;
    ensure!(reply.text().starts_with("orders-"), "{} answered", reply.text());
    for replica in &*replicas {
        replica.suffer(Faults::every(503)).await?;
    }
    let rate = if is_soak() { CHAINED_FOR_LONG } else { CHAINED };
    let plan = Plan::new(rate, target, format!("{edge}:{HTTP}"), "/work");
    let load = Load::start(&world.web.host, plan);
    let arrivals = Arrivals::watch(&load, &replicas, length(16, 120)).await?;
    let outcome = load.stop().await?;
    let worst = arrivals.worst(&outcome);
    println!("{outcome}\n  at worst {worst:.3} arrivals for each request");
    drop(hops);
    // Hops that are too slow to hand on anything amplify nothing.
    ensure!(worst > 0.9, "only {worst:.2} of each request arrived: the hops are overloaded");
    ensure!(outcome.succeeded == 0, "{} requests succeeded", outcome.succeeded);
    let what = if breaker { "the default breaker" } else { "budgets alone" };
    hold(&[Figure::at_most(&format!("L18: at the end of a chain of four, {what}"), "times", 1.5, worst)])
}
