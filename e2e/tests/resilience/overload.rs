//! L19: three times as many requests as a workload can serve.
//!
//! The workload serves [`WORKERS`] at once, each for 10 ms, and queues whatever else it is given, as servers do: left to
//! itself it then answers nobody in time.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::app::{CONTROL_PORT, Faults};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::suite::{Case, case, length};
use tokio::time::sleep;

use crate::world::{HTTP, LIMIT, World};

const WORKERS: usize = 4;
/// Requests a second that the workload can serve, but for what timers and scheduling take.
const CAPACITY: u32 = 400;
/// What a caller waits.
const PATIENCE: Duration = Duration::from_secs(1);

/// The bound is found by the sidecar; this is what it may not exceed.
const ADAPTIVE: &str = "{maxRequests: 200, adaptive: true}";
/// The bound is known: twice what is served at once.
const FIXED: &str = "{maxRequests: 8, adaptive: false}";

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("L19: three times the capacity, adaptive bound", |world| overload(world, "adaptive", ADAPTIVE)),
        case("L19: three times the capacity, fixed bound", |world| overload(world, "fixed", FIXED)),
    ]
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
async fn overload(world: Arc<World>, bound: &str, concurrency: &str) -> anyhow::Result<()> {
    let service = format!("slots-{bound}");
    let name = format!("{service}.service.consul");
    let policy = format!(
        "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: slots, namespace: default}}
spec:
  targetRef: {{kind: Service, name: {service}}}
  concurrency: {concurrency}
"
    );
    let _replicas = world.ready("").await?;
    let (port, control) = (HTTP.to_string(), CONTROL_PORT.to_string());
    let plan = world.mesh.workload(&service).serves(&service, HTTP);
    let slots = plan.app(["--http", &port, "--control", &control]).start().await?;
    world.web.wait_for_service(&name, HTTP, LIMIT).await?;
    world.mesh.apply(&policy).await?;
    slots.suffer(Faults { concurrency: WORKERS, service_ms: 10, ..Faults::default() }).await?;
    let target = world.web.look_up(&name, HTTP).await?;
    let send = |rate| {
        let plan = Plan::new(rate, target, format!("{name}:{HTTP}"), "/work").patience(PATIENCE);
        Load::start(&world.web.host, plan)
    };

    // The peak: what it serves of just as much as it can, and the same a little above and below.
    let mut peak: f64 = 0.0;
    for percent in [90, 100, 110] {
        let load = send(CAPACITY * percent / 100);
        sleep(Duration::from_secs(4)).await;
        let outcome = load.stop().await?;
        let outcome = outcome.between(Duration::from_secs(1), Duration::from_secs(4));
        println!("at {percent} %: {outcome}");
        peak = peak.max(outcome.succeeded as f64 / 3.0);
    }

    let load = send(3 * CAPACITY);
    sleep(length(20, 60)).await;
    let length = load.now();
    let normal = send(CAPACITY / 2);
    let outcome = load.stop().await?;
    sleep(Duration::from_secs(4)).await;
    let normal = normal.stop().await?;
    let goodput = outcome.succeeded as f64 / length.as_secs_f64();
    println!("overloaded: {outcome}\n  goodput {goodput:.0}/s of {peak:.0}/s\n  back to normal: {normal}");

    let refused = |sample: &outrigger_e2e::load::Sample| !sample.ok && sample.what.starts_with("status 503");
    let others = outcome.samples.iter().filter(|sample| !sample.ok && !refused(sample)).count();
    // The last request that failed, or took more than ten times what it should.
    let bad = normal.samples.iter().rfind(|sample| !sample.ok || sample.took > Duration::from_millis(100));
    let recovered = bad.map_or(0.0, |sample| sample.at.as_secs_f64());
    ensure!(outcome.samples.iter().any(refused), "nothing was refused");
    let figure = |what: &str| format!("L19: {bound} bound: {what}");
    hold(&[
        Figure::at_least(&figure("goodput, of peak"), "%", 80.0, goodput / peak * 100.0),
        Figure::at_most(&figure("p99 of a refusal"), "ms", 50.0, outcome.quantile_of(0.99, refused)),
        Figure::at_most(
            &figure("neither served nor refused"),
            "%",
            0.1,
            others as f64 / outcome.total() as f64 * 100.0,
        ),
        Figure::at_most(&figure("recovered after"), "s", 2.0, recovered),
    ])
}
