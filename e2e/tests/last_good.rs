//! Last good wins (invariant 1): whatever the control plane or Consul does, traffic that flowed goes on flowing.
//!
//! `make test` holds each outage for seconds, `OUTRIGGER_SOAK=1` for the full minute.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::consul::{Mode, Registration};
use outrigger_e2e::faults::Fault;
use outrigger_e2e::figures::{Figure, record};
use outrigger_e2e::load::{Load, Outcome, Plan};
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::suite::{case, length, suite};
use outrigger_e2e::wait::wait_until;
use tokio::time::{Instant, sleep};

const HTTP: u16 = 8080;
const ORDERS: &str = "orders.service.consul";
const LIMIT: Duration = Duration::from_secs(20);
/// Requests a second through every outage.
const RATE: u32 = 200;
/// A change made during an outage arrives this soon after its end.
const CATCH_UP: Duration = Duration::from_secs(2);
/// The same after Consul answered 429 for seconds: it asked for less, and each watch backs off up to 4 s by then.
const CATCH_UP_AFTER_OVERLOAD: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    suite(
        "last_good",
        || async { Ok(()) },
        vec![
            case("controller killed", controller_killed),
            case("Consul killed", consul_killed),
            case("Consul misbehaves: E5", consul_misbehaves),
            case("Consul's leader is killed", leader_killed),
            case("Consul denies: a real ACL token is deleted", token_deleted),
            case("Consul over TLS", consul_over_tls),
        ],
    )
}

/// How long an outage lasts.
fn outage(short: u64) -> Duration {
    length(short, 60)
}

struct World {
    mesh: Mesh,
    web: Workload,
    replicas: Vec<Workload>,
}

impl World {
    async fn build(setup: Setup) -> anyhow::Result<Self> {
        let mesh = Mesh::start(setup).await?;
        let mut replicas = Vec::new();
        for name in ["orders-1", "orders-2", "orders-3"] {
            let plan = mesh.workload(name).account("orders").serves("orders", HTTP).app(["--http", "8080"]);
            replicas.push(plan.start().await?);
        }
        let web = mesh.workload("web").start().await?;
        web.wait_for_service(ORDERS, HTTP, LIMIT).await?;
        let world = Self { mesh, web, replicas };
        world.wait_endpoints(3, LIMIT).await?;
        Ok(world)
    }

    async fn wait_endpoints(&self, count: usize, limit: Duration) -> anyhow::Result<()> {
        wait_until(limit, &format!("{count} endpoints at the client's sidecar"), || async {
            self.expect_endpoints(count).await
        })
        .await
    }

    /// The client's sidecar holds this many endpoints, all of them meshed.
    async fn expect_endpoints(&self, count: usize) -> anyhow::Result<()> {
        let endpoints = self.web.endpoints("orders.default").await?;
        let meshed = endpoints.iter().filter(|e| e["identity"].as_str().is_some_and(|id| !id.is_empty()));
        ensure!(endpoints.len() == count && meshed.count() == count, "endpoints: {endpoints:?}");
        Ok(())
    }

    async fn load(&self) -> anyhow::Result<Load> {
        let target = self.web.look_up(ORDERS, HTTP).await?;
        let plan = Plan::new(RATE, target, format!("{ORDERS}:{HTTP}"), "/whoami");
        Ok(Load::start(&self.web.host, plan))
    }

    /// Takes the third replica out of Consul.
    async fn deregister_third(&self) -> anyhow::Result<()> {
        let id = format!("orders-{}", self.replicas[2].host.name());
        self.mesh.consul.lock().await.deregister(&id).await
    }

    /// Brings it back.
    async fn register_third(&self) -> anyhow::Result<()> {
        let host = &self.replicas[2].host;
        let (id, address) = (format!("orders-{}", host.name()), host.v4().to_string());
        let instance = Registration { name: "orders".to_owned(), id, address, port: HTTP };
        self.mesh.consul.lock().await.register(&instance).await
    }

    /// How long the client's sidecar takes to hold `count` endpoints.
    async fn catches_up(&self, count: usize) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.wait_endpoints(count, LIMIT).await?;
        Ok(start.elapsed())
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
fn judge(name: &str, outcome: &Outcome, caught_up: Option<Duration>) -> anyhow::Result<()> {
    println!("{name}: {outcome}");
    let mut figures =
        vec![Figure::at_most(&format!("{name}: failed"), "requests", 0.0, outcome.failed() as f64)];
    if let Some(caught_up) = caught_up {
        let goal = CATCH_UP.as_secs_f64();
        figures.push(Figure::at_most(
            &format!("{name}: change arrives after return"),
            "s",
            goal,
            caught_up.as_secs_f64(),
        ));
    }
    record(&figures)?;
    ensure!(outcome.failed() == 0, "failed requests: {:?}", outcome.failures);
    ensure!(outcome.total() >= 200, "only {} requests were sent", outcome.total());
    ensure!(caught_up.is_none_or(|time| time <= CATCH_UP), "the change arrived only after {caught_up:?}");
    Ok(())
}

async fn controller_killed(_: Arc<()>) -> anyhow::Result<()> {
    let world = World::build(Setup::default()).await?;
    let load = world.load().await?;
    world.mesh.kill_controller().await;
    sleep(outage(6)).await;
    world.expect_endpoints(3).await.context("while the controller was down")?;
    // A change that nobody is there to see.
    world.deregister_third().await?;
    world.mesh.start_controller().await?;
    let caught_up = world.catches_up(2).await?;
    let outcome = load.stop().await?;
    judge("L1: controller killed", &outcome, Some(caught_up))
}

async fn consul_killed(_: Arc<()>) -> anyhow::Result<()> {
    let world = World::build(Setup { consul: Mode::Persistent, ..Setup::default() }).await?;
    let load = world.load().await?;
    world.mesh.consul.lock().await.kill();
    sleep(outage(6)).await;
    world.expect_endpoints(3).await.context("while Consul was down")?;
    world.mesh.consul.lock().await.restart().await?;
    world.expect_endpoints(3).await.context("after Consul returned")?;
    // The controller restarts its watch by itself: a change arrives.
    world.deregister_third().await?;
    let caught_up = world.catches_up(2).await?;
    let outcome = load.stop().await?;
    judge("L4: Consul killed", &outcome, Some(caught_up))
}

async fn consul_misbehaves(_: Arc<()>) -> anyhow::Result<()> {
    let world = World::build(Setup { front: true, ..Setup::default() }).await?;
    let load = world.load().await?;
    let front = world.mesh.front.as_ref().context("a front")?;
    let mut slowest = Duration::ZERO;
    let faults = [
        Fault::Denied,
        Fault::NoLeader,
        Fault::RateLimited,
        Fault::TruncatedJson,
        Fault::TruncatedResponse,
        Fault::NoIndex,
        Fault::IndexReset,
        Fault::Stall,
    ];
    let length = outage(16) / 8;
    for fault in faults {
        front.set(fault);
        sleep(length).await;
        world.expect_endpoints(3).await.with_context(|| format!("during {fault:?}"))?;
        // A change made meanwhile.
        world.deregister_third().await?;
        front.set(Fault::None);
        let caught_up = world.catches_up(2).await.with_context(|| format!("after {fault:?}"))?;
        println!("{fault:?}: caught up in {caught_up:?}");
        if fault == Fault::RateLimited {
            ensure!(caught_up <= CATCH_UP_AFTER_OVERLOAD, "after {fault:?} it took {caught_up:?}");
        } else {
            ensure!(caught_up <= CATCH_UP, "after {fault:?} it took {caught_up:?}");
            slowest = slowest.max(caught_up);
        }
        world.register_third().await?;
        world.wait_endpoints(3, LIMIT).await?;
    }
    let outcome = load.stop().await?;
    judge("E5: Consul misbehaves", &outcome, Some(slowest))
}

async fn leader_killed(_: Arc<()>) -> anyhow::Result<()> {
    let world = World::build(Setup { consul: Mode::ThreeServers, ..Setup::default() }).await?;
    let load = world.load().await?;
    let leader = world.mesh.consul.lock().await.kill_leader().await?;
    println!("the new leader is {leader}");
    sleep(outage(2)).await;
    world.expect_endpoints(3).await?;
    let outcome = load.stop().await?;
    judge("L4: Consul's leader killed", &outcome, None)
}

async fn token_deleted(_: Arc<()>) -> anyhow::Result<()> {
    let world = World::build(Setup { consul: Mode::AclDeny, ..Setup::default() }).await?;
    let load = world.load().await?;
    let secret = world.mesh.consul_token().context("a Consul token")?.to_owned();
    world.mesh.consul.lock().await.revoke(&secret).await?;
    // Blocking queries that are under way end with the next change.
    world.deregister_third().await?;
    sleep(outage(4)).await;
    let endpoints = world.web.endpoints("orders.default").await?;
    ensure!(endpoints.len() >= 2, "endpoints were removed: {endpoints:?}");
    let outcome = load.stop().await?;
    judge("L4: Consul's ACL token deleted", &outcome, None)
}

async fn consul_over_tls(_: Arc<()>) -> anyhow::Result<()> {
    let world = World::build(Setup { consul: Mode::Tls, ..Setup::default() }).await?;
    let load = world.load().await?;
    world.deregister_third().await?;
    let caught_up = world.catches_up(2).await?;
    // Two seconds of traffic over what is left.
    sleep(Duration::from_secs(2)).await;
    let outcome = load.stop().await?;
    judge("Consul over TLS", &outcome, Some(caught_up))
}
