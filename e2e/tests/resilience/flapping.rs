//! L12: fifty endpoints flap ten times a second each, beside one that stays.
//!
//! Those that flap are never down: it is the news of them that must cost nothing, neither a request nor a processor. The
//! news is Consul's, a health check of each endpoint that changes every 50 ms.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Method;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::suite::{Case, case, length};
use serde_json::{Value, json};
use tokio::time::{Instant, interval, sleep};

use crate::world::{HTTP, LIMIT, World};

/// The last bytes of the addresses that flap: more than the network has hosts.
const FLAPPING: std::ops::Range<u8> = 180..230;
/// From healthy to not, or back.
const HALF: Duration = Duration::from_millis(50);
const NAME: &str = "flappy.service.consul";
const SERVICE: &str = "flappy.default";
/// A node of its own: no agent puts its checks right.
const NODE: &str = "flappers";
const CALLS: u32 = 300;

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case("L12: fifty endpoints flap ten times a second", flapping)]
}

fn addresses() -> impl Iterator<Item = Ipv4Addr> {
    FLAPPING.map(|last| Ipv4Addr::new(10, 77, 0, last))
}

async fn flapping(world: Arc<World>) -> anyhow::Result<()> {
    let _replicas = world.ready("").await?;
    let services = addresses().map(|address| {
        json!({ "Service": { "Verb": "set", "Node": NODE, "Service": {
            "ID": format!("flappy-{address}"), "Service": "flappy", "Address": address, "Port": HTTP,
        } } })
    });
    let node = json!({ "Node": { "Verb": "set", "Node": { "Node": NODE, "Address": "10.77.0.180" } } });
    transact(&world, std::iter::once(node).chain(services).collect()).await?;
    set(&world, |_| true).await?;

    let token =
        world.mesh.token("flappy", &["flappy"], &["--uses", "reusable", "--cidr", "10.77.0.0/24"]).await?;
    let claims: Vec<Value> =
        addresses().map(|address| json!({ "service": "flappy", "port": HTTP, "address": address })).collect();
    let plan = world.mesh.workload("flappy").token(&token).app(["--http", "8080"]);
    let flappy = plan.set("services", json!(claims)).start_unready().await?;
    flappy.host.also_at(addresses().collect()).await?;
    flappy.wait_ready().await?;
    flappy.wait_claims().await?;
    let steady = world
        .mesh
        .workload("steady")
        .account("flappy")
        .serves("flappy", HTTP)
        .app(["--http", "8080"])
        .start()
        .await?;
    world.web.wait_for_service(NAME, HTTP, LIMIT).await?;
    let target = world.web.look_up(NAME, HTTP).await?;
    let sidecar = world.web.sidecar.as_ref().context("a sidecar")?;

    // Without traffic and without questions: what the news alone costs.
    let (cpu, start) = (sidecar.cpu_time()?, Instant::now());
    let changes = flap(&world, length(8, 60)).await?;
    let busy = sidecar.cpu_time()?.saturating_sub(cpu).as_secs_f64() / start.elapsed().as_secs_f64();

    let watching = async {
        let (start, mut versions) = (Instant::now(), BTreeSet::new());
        while start.elapsed() < Duration::from_secs(5) {
            let knowledge = world.web.knowledge().await?;
            let services = knowledge["discovery"]["services"].as_array().cloned().unwrap_or_default();
            let entry = services.into_iter().find(|entry| entry["name"] == SERVICE).context("the service")?;
            versions.insert(entry["version"].to_string());
        }
        anyhow::Ok((u32::try_from(versions.len())?, start.elapsed()))
    };
    let (seen, flapped) = tokio::join!(watching, flap(&world, Duration::from_secs(5)));
    flapped?;
    let (versions, watched) = seen?;
    let pushes = f64::from(versions) / watched.as_secs_f64();

    let load = Load::start(&world.web.host, Plan::new(CALLS, target, format!("{NAME}:{HTTP}"), "/whoami"));
    flap(&world, length(10, 300)).await?;
    let outcome = load.stop().await?;
    println!(
        "{changes} changes\n  {outcome}\n  {pushes:.1} pushes a second, {:.1} % of a core",
        busy * 100.0
    );
    drop((flappy, steady));
    ensure!(outcome.total() > 1000, "only {} requests were sent", outcome.total());
    ensure!(versions > 5, "the client's sidecar heard of {versions} versions: nothing flapped");
    hold(&[
        Figure::at_most("L12: failed", "%", 0.0, outcome.failed_share() * 100.0),
        Figure::at_most("L12: pushes to one proxy", "1/s", 10.0, pushes),
        Figure::at_most("L12: one proxy's processor", "% of a core", 5.0, busy * 100.0),
    ])
}

/// Flaps for `length`; how often everything changed.
async fn flap(world: &World, length: Duration) -> anyhow::Result<u32> {
    let (start, mut half, mut changes) = (Instant::now(), interval(HALF), 0);
    // By chance: whoever looks at every second state must not see the same one each time.
    let mut rng = fastrand::Rng::with_seed(12);
    while start.elapsed() < length {
        half.tick().await;
        set(world, |_| rng.bool()).await?;
        changes += 1;
    }
    set(world, |_| true).await?;
    // What was said last has arrived.
    sleep(Duration::from_millis(500)).await;
    Ok(changes)
}

/// Says of each of them that it is healthy, or not.
async fn set(world: &World, mut healthy: impl FnMut(Ipv4Addr) -> bool) -> anyhow::Result<()> {
    let checks = addresses().map(|address| {
        let status = if healthy(address) { "passing" } else { "critical" };
        json!({ "Check": { "Verb": "set", "Check": {
            "Node": NODE, "CheckID": format!("check-{address}"), "Name": "flaps", "ServiceID": format!("flappy-{address}"),
            "Status": status,
        } } })
    });
    transact(world, checks.collect()).await
}

async fn transact(world: &World, operations: Vec<Value>) -> anyhow::Result<()> {
    let consul = world.mesh.consul.lock().await;
    consul.call(Method::PUT, "/v1/txn", Some(&json!(operations))).await?.expect(200).map(drop)
}
