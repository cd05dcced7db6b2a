//! Names and addresses that a workload can dial (DESIGN, "Names" and "Resolving").

use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::client;
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;

const HTTP: u16 = 8080;
const LIMIT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    suite(
        "names",
        World::build,
        vec![
            case("a Consul name answered by the proxy is balanced", consul_name_is_balanced),
            case("a name of the mesh", mesh_name),
            case("a Consul name answered by Consul's DNS", consul_dns),
            case("an instance's own address means that instance", instance_address),
            case("an address of the mesh that nobody has is refused", unknown_address),
            case("a name that nobody has", unknown_name),
            case("a workload that left Consul is gone, one that came is there", comes_and_goes),
        ],
    )
}

struct World {
    mesh: Mesh,
    web: Workload,
    dns_web: Workload,
    replicas: Vec<Workload>,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup::default()).await?;
        let mut replicas = Vec::new();
        for name in ["orders-1", "orders-2"] {
            let plan = mesh.workload(name).account("orders").serves("orders", HTTP).app(["--http", "8080"]);
            replicas.push(plan.start().await?);
        }
        let web = mesh.workload("web").start().await?;
        let dns_web = mesh.workload("dns-web").account("web").asks_consul_dns().start().await?;
        web.wait_for_service("orders.service.consul", HTTP, LIMIT).await?;
        dns_web.wait_for_service("orders.service.consul", HTTP, LIMIT).await?;
        Ok(Self { mesh, web, dns_web, replicas })
    }
}

/// Whether an address is one that the mesh hands out.
fn is_virtual(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[0] == 253,
        IpAddr::V6(address) => address.segments()[..2] == [0xfd00, 0x0240],
    }
}

/// Who answers, over so many connections.
async fn answers(web: &Workload, name: &str, times: usize) -> anyhow::Result<Vec<String>> {
    let mut seen = Vec::new();
    for _ in 0..times {
        seen.push(web.get(name, HTTP, "/whoami").await?.expect(200)?.text());
    }
    seen.sort_unstable();
    seen.dedup();
    Ok(seen)
}

async fn consul_name_is_balanced(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.web.look_up("orders.service.consul", HTTP).await?;
    ensure!(is_virtual(address.ip()), "{address} is not a virtual address");
    let seen = answers(&world.web, "orders.service.consul", 40).await?;
    ensure!(seen == ["orders-1", "orders-2"], "{seen:?} answered");
    Ok(())
}

async fn mesh_name(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.web.look_up("orders.default.mesh", HTTP).await?;
    ensure!(is_virtual(address.ip()), "{address} is not a virtual address");
    let seen = answers(&world.web, "orders.default.mesh", 40).await?;
    ensure!(seen == ["orders-1", "orders-2"], "{seen:?} answered");
    Ok(())
}

async fn consul_dns(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.dns_web.look_up("orders.service.consul", HTTP).await?.ip();
    let own = world.replicas.iter().any(|replica| address == replica.host.v4());
    ensure!(own, "{address} is no replica's");
    let seen = answers(&world.dns_web, "orders.service.consul", 10).await?;
    ensure!(!seen.is_empty());
    Ok(())
}

async fn instance_address(world: Arc<World>) -> anyhow::Result<()> {
    for replica in &world.replicas {
        let address = replica.host.at(HTTP);
        for _ in 0..10 {
            let asked = world.web.host.run(move || client::get(address, "orders", "/whoami")).await?;
            let answer = asked.expect(200)?.text();
            ensure!(answer == replica.host.name(), "{answer} answered for {}", replica.host.name());
        }
    }
    Ok(())
}

async fn unknown_address(world: Arc<World>) -> anyhow::Result<()> {
    let nobody = ([10, 77, 0, 250], HTTP).into();
    let reply = world.web.host.run(move || client::get(nobody, "nobody", "/")).await?.expect(503)?;
    let reason = reply.reason().context("no outrigger-reason")?;
    ensure!(reason.contains("no_such_destination"), "the reason is {reason:?}");
    Ok(())
}

async fn unknown_name(world: Arc<World>) -> anyhow::Result<()> {
    for name in ["nobody.service.consul", "nobody.default.mesh"] {
        let found = world.web.look_up(name, HTTP).await;
        ensure!(found.is_err(), "{name} is {found:?}");
    }
    Ok(())
}

async fn comes_and_goes(world: Arc<World>) -> anyhow::Result<()> {
    let plan =
        world.mesh.workload("orders-3").account("orders").serves("orders", HTTP).app(["--http", "8080"]);
    let third = plan.start().await?;
    wait_until(Duration::from_secs(2), "the new instance to answer", || async {
        let seen = answers(&world.web, "orders.service.consul", 10).await?;
        ensure!(seen.contains(&"orders-3".to_owned()), "{seen:?} answered");
        Ok(())
    })
    .await?;
    world.mesh.consul.lock().await.deregister("orders-orders-3").await?;
    wait_until(Duration::from_secs(2), "the old instance to go", || async {
        let left = world.web.endpoints("orders.default").await?.len();
        ensure!(left == 2, "{left} endpoints");
        Ok(())
    })
    .await?;
    let seen = answers(&world.web, "orders.service.consul", 40).await?;
    ensure!(seen == ["orders-1", "orders-2"], "{seen:?} answered");
    drop(third);
    Ok(())
}
