//! Names and addresses that a workload can dial (DESIGN, "Names" and "Resolving").

use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Method;
use outrigger_e2e::client;
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::name_server::NameServer;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::Value;

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
            case("a name outside of the mesh is where its name server says", external_name),
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

const PARTNER_HOST: &str = "api.partner.example";
const PARTNER: &str = "partner.default.mesh";
/// A host is looked up again after 5 s at the earliest, and a look-up may take 5 s.
const FOLLOWS: Duration = Duration::from_secs(15);

async fn external_name(world: Arc<World>) -> anyhow::Result<()> {
    let (mesh, web) = (&world.mesh, &world.web);
    let mut names = NameServer::start(&mesh.network).await?;
    let mut sites = Vec::new();
    for name in ["site-1", "site-2", "site-3"] {
        sites.push(mesh.workload(name).bare().app(["--http", "8080"]).start().await?);
    }
    let [first, second, third] = [0, 1, 2].map(|at: usize| sites[at].host.v4());
    names.set(PARTNER_HOST, &[first]);
    mesh.apply_only(&format!(
        "
apiVersion: outrigger.dev/v1alpha1
kind: ExternalService
metadata: {{name: partner, namespace: default}}
spec:
  hosts: [{PARTNER_HOST}]
  ports: [{{port: {HTTP}, protocol: HTTP}}]
"
    ))
    .await?;
    let answer = wait_until(LIMIT, "the name to lead somewhere", || answers(web, PARTNER, 1)).await?;
    ensure!(answer == ["site-1"], "{answer:?} answered");
    let address = web.look_up(PARTNER, HTTP).await?.ip();
    ensure!(is_virtual(address), "{address} is not a virtual address");

    // It moves, to two places.
    names.set(PARTNER_HOST, &[second, third]);
    wait_until(FOLLOWS, "the name to lead elsewhere", || async {
        let endpoints = web.endpoints("partner.default").await?;
        ensure!(endpoints.len() == 2, "{endpoints:?}");
        Ok(())
    })
    .await?;
    let both = ["site-2", "site-3"];
    let seen = answers(web, PARTNER, 40).await?;
    ensure!(seen == both, "{seen:?} answered");

    // Nobody knows any more where it is: it is where it was.
    names.stop();
    wait_until(FOLLOWS, "the controller to say that it finds nobody", || async {
        let faults = faults_of_policies(mesh).await?;
        ensure!(faults.contains(PARTNER_HOST), "{faults}");
        Ok(())
    })
    .await?;
    let seen = answers(web, PARTNER, 40).await?;
    ensure!(seen == both, "{seen:?} answered without a name server");

    names.set(PARTNER_HOST, &[first]);
    names.start_again().await?;
    wait_until(FOLLOWS, "the name to lead to where it was at first", || async {
        let seen = answers(web, PARTNER, 4).await?;
        ensure!(seen == ["site-1"], "{seen:?} answered");
        Ok(())
    })
    .await?;
    let faults = faults_of_policies(mesh).await?;
    ensure!(!faults.contains(PARTNER_HOST), "{faults}");
    mesh.clear_policies().await
}

/// What is wrong with the source that external services come from.
async fn faults_of_policies(mesh: &Mesh) -> anyhow::Result<String> {
    let reply = mesh.api(Method::GET, "/sources", None).await?.expect(200)?;
    let reply: Value = serde_json::from_slice(&reply.body).context("reading the sources")?;
    let sources = reply["sources"].as_array().cloned().unwrap_or_default();
    let policy = sources.iter().find(|source| source["name"] == "policy").context("no source of policies")?;
    Ok(policy["faults"].to_string())
}
