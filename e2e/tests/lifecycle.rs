//! Lifecycle: starts in any order, restarts under load, two of what there may be one of.

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::capture::Capture;
use outrigger_e2e::client::Raw;
use outrigger_e2e::figures::{Figure, record};
use outrigger_e2e::load::{Load, Outcome, Plan};
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;

const HTTP: u16 = 8080;
const ORDERS: &str = "orders.service.consul";
const LIMIT: Duration = Duration::from_secs(20);
/// Requests a second during a rolling restart.
const RATE: u32 = 500;
/// What an application that drains properly serves on after SIGTERM.
const LINGER: &str = "5000";

fn main() -> ExitCode {
    suite(
        "lifecycle",
        || async { Ok(()) },
        vec![
            case("rolling restart, applications that serve 5 s after SIGTERM", |_| {
                rolling_restart(LINGER, Retries::Off)
            }),
            case("rolling restart, applications that exit at once", |_| rolling_restart("0", Retries::Off)),
            case("rolling restart, applications that exit at once, retries", |_| {
                rolling_restart("0", Retries::On)
            }),
            case("a sidecar that starts before the controller", before_the_controller),
            case("a second proxy on the same ports says so and exits", second_proxy),
            case("bad configuration: every fault, exit code 64", bad_configuration),
        ],
    )
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Retries {
    /// No policy.
    Off,
    /// [`RETRIES`].
    On,
}

/// What an operator writes whose applications do not drain.
const RETRIES: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  retry: {attempts: 3, on: [gateway-error, reset, connect-failure]}
";

struct World {
    mesh: Mesh,
    web: Workload,
    replicas: Vec<Workload>,
}

impl World {
    async fn build(linger: &str) -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup::default()).await?;
        let mut replicas = Vec::new();
        for name in ["orders-1", "orders-2", "orders-3"] {
            let app = ["--http", "8080", "--linger-ms", linger];
            replicas
                .push(mesh.workload(name).account("orders").serves("orders", HTTP).app(app).start().await?);
        }
        let web = mesh.workload("web").start().await?;
        web.wait_for_service(ORDERS, HTTP, LIMIT).await?;
        let world = Self { mesh, web, replicas };
        world.wait_meshed(3).await?;
        Ok(world)
    }

    /// Waits until the client's sidecar holds so many healthy, meshed endpoints.
    async fn wait_meshed(&self, count: usize) -> anyhow::Result<()> {
        wait_until(LIMIT, &format!("{count} meshed endpoints"), || async {
            let endpoints = self.web.endpoints("orders.default").await?;
            let meshed = endpoints.iter().filter(|endpoint| {
                endpoint["identity"].as_str().is_some_and(|id| !id.is_empty())
                    && endpoint["health"] == "Healthy"
            });
            ensure!(meshed.count() == count, "{endpoints:?}");
            Ok(())
        })
        .await
    }
}

/// Each replica in turn: SIGTERM to the application and its sidecar at once, as a supervisor does, then both anew.
async fn rolling_restart(linger: &'static str, retries: Retries) -> anyhow::Result<()> {
    let mut world = World::build(linger).await?;
    if retries == Retries::On {
        world.mesh.apply(RETRIES).await?;
    }
    let target = world.web.look_up(ORDERS, HTTP).await?;
    let plan = Plan::new(RATE, target, format!("{ORDERS}:{HTTP}"), "/whoami");
    let load = Load::start(&world.web.host, plan);
    for at in 0..world.replicas.len() {
        let replica = &mut world.replicas[at];
        let (mut app, mut sidecar) =
            (replica.app.take().context("an app")?, replica.sidecar.take().context("a sidecar")?);
        app.terminate()?;
        sidecar.terminate()?;
        let status = sidecar.wait_exit(LIMIT).await?;
        ensure!(status.success(), "the sidecar ended with {status}");
        app.wait_exit(LIMIT).await?;
        let arguments = ["--http", "8080", "--linger-ms", linger].map(str::to_owned);
        replica.start_app(&arguments).await?;
        replica.start_sidecar().await?;
        replica.wait_ready().await?;
        replica.wait_claims().await?;
        world.wait_meshed(3).await?;
    }
    let outcome = load.stop().await?;
    println!("rolling restart, linger {linger} ms, retries {retries:?}: {outcome}");
    report(linger, retries, &outcome)?;
    ensure!(outcome.total() > 1000, "only {} requests were sent", outcome.total());
    if linger != "0" || retries == Retries::On {
        ensure!(outcome.failed() == 0, "failed requests: {:?}", outcome.failures);
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
fn report(linger: &str, retries: Retries, outcome: &Outcome) -> anyhow::Result<()> {
    let failed = outcome.failed() as f64;
    let requests = Figure::info("rolling restart: requests", "requests", outcome.total() as f64);
    match (linger, retries) {
        // What retries have to save.
        ("0", Retries::Off) => {
            record(&[Figure::info("L7: failed, applications exit at once, no retries", "requests", failed)])
        }
        ("0", Retries::On) => record(&[Figure::at_most(
            "L7: failed, applications exit at once, retries",
            "requests",
            0.0,
            failed,
        )]),
        _ => record(&[Figure::at_most("L7: failed, applications drain", "requests", 0.0, failed), requests]),
    }
}

async fn before_the_controller(_: Arc<()>) -> anyhow::Result<()> {
    const MARKER: &str = "marker-51ac-before-discovery";
    let mesh = Mesh::start(Setup::default()).await?;
    let orders = mesh.workload("orders").serves("orders", HTTP).app(["--http", "8080"]).start().await?;
    // Token and root are handed out, then the controller goes.
    let token = mesh.token("web", &[], &["--uses", "reusable"]).await?;
    mesh.kill_controller().await;
    let web = mesh.workload("web").token(&token).start_unready().await?;
    wait_until(LIMIT, "the sidecar to live", || async { web.admin("/live").await?.expect(200) }).await?;
    ensure!(
        web.admin("/ready").await?.status == 503,
        "a sidecar without a certificate says that it is ready"
    );

    let capture = Capture::start(&mesh.network).await?;
    let (address, name) = (orders.host.at(HTTP), web.get(ORDERS, HTTP, "/whoami").await);
    ensure!(
        name.is_err() || name.is_ok_and(|reply| reply.status != 200),
        "a name was served without discovery"
    );
    let refused = web
        .host
        .run(move || async move {
            let mut raw = Raw::connect(address).await?;
            raw.send(format!("GET /{MARKER} HTTP/1.1\r\nHost: orders\r\n\r\n")).await?;
            raw.read_response().await
        })
        .await;
    let (answer, _) = refused.context("an HTTP client is told why")?;
    ensure!(answer.starts_with("HTTP/1.1 503"), "the answer was {answer:?}");
    ensure!(answer.contains("discovery_unavailable"), "no reason in {answer:?}");
    let captured = capture.stop().await?;
    ensure!(!captured.contains(MARKER.as_bytes()), "a mesh address was called in the clear");

    let start = tokio::time::Instant::now();
    mesh.start_controller().await?;
    let returned = tokio::time::Instant::now();
    web.wait_ready().await?;
    let ready = returned.elapsed();
    web.wait_for_service(ORDERS, HTTP, LIMIT).await?;
    println!("controller up after {:?}, sidecar ready {ready:?} later", returned - start);
    record(&[Figure::at_most("L2: ready after the controller returned", "s", 5.0, ready.as_secs_f64())])?;
    ensure!(ready <= Duration::from_secs(5), "the sidecar needed {ready:?}");
    Ok(())
}

async fn second_proxy(_: Arc<()>) -> anyhow::Result<()> {
    let mesh = Mesh::start(Setup::default()).await?;
    let mut web = mesh.workload("web").start().await?;
    let first = web.sidecar.take().context("a sidecar")?;
    web.start_sidecar().await?;
    let mut second = web.sidecar.take().context("a second sidecar")?;
    let status = second.wait_exit(LIMIT).await?;
    ensure!(!status.success(), "the second proxy ended as if all were well");
    let log = second.log();
    ensure!(log.contains("another outrigger-proxy"), "the second proxy did not say why: {log}");
    web.admin("/ready").await?.expect(200).context("the first proxy goes on")?;
    drop(first);
    Ok(())
}

async fn bad_configuration(_: Arc<()>) -> anyhow::Result<()> {
    let folder = &sandbox::get().work;
    let network = outrigger_e2e::network::Network::new().await?;
    let host = network.host("bad").await?;
    for (binary, text) in [
        ("outrigger-proxy", r#"{"threads": "many", "nonsense": 1, "timeouts": {"connect": "soon"}}"#),
        ("outrigger-controller", r#"{"listen": "nowhere", "nonsense": 1, "leaf_life": "1s"}"#),
    ] {
        let file = folder.join("bad.yaml");
        std::fs::write(&file, text)?;
        let mut command = Command::new(sandbox::get().binary(binary)?);
        command.arg("--config").arg(&file).arg("--check-config");
        let mut process = host.spawn(&format!("bad-{binary}"), command).await?;
        let status = process.wait_exit(LIMIT).await?;
        ensure!(status.code() == Some(64), "{binary} ended with {status}");
        let log = process.log();
        let faults = ["nonsense", if binary == "outrigger-proxy" { "connect" } else { "leaf_life" }];
        for fault in faults {
            ensure!(log.contains(fault), "{binary} does not name {fault}: {log}");
        }
    }
    Ok(())
}
