//! Names and addresses that a workload can dial (DESIGN, "Names" and "Resolving").

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Method;
use outrigger_e2e::app::Faults;
use outrigger_e2e::client::{self, Reply};
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::name_server::NameServer;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};

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
            case(
                "a name outside of the mesh is a service where a policy says so, at the place that its name server says",
                external_name,
            ),
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
/// Where the first site is found outside of the mesh's networks, and the client beside it.
const OUTSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 51, 100, 7), Ipv4Addr::new(198, 51, 100, 1)];

async fn external_name(world: Arc<World>) -> anyhow::Result<()> {
    let (mesh, web) = (&world.mesh, &world.web);
    let mut names = NameServer::start(&mesh.network).await?;
    let mut sites = Vec::new();
    for name in ["site-1", "site-2", "site-3"] {
        sites.push(mesh.workload(name).bare().app(["--http", "8080", "--control", "9901"]).start().await?);
    }
    sites[0].host.also_at(vec![OUTSIDE[0]]).await?;
    web.host.also_at(vec![OUTSIDE[1]]).await?;
    let [first, second, third] = [OUTSIDE[0], sites[1].host.v4(), sites[2].host.v4()];
    names.set(PARTNER_HOST, &[first]);
    ensure!(
        web.look_up(PARTNER_HOST, HTTP).await?.ip() == first,
        "a name that nobody speaks of is passed on"
    );
    ensure!(answers(web, PARTNER_HOST, 1).await? == ["site-1"]);

    mesh.apply_only(&format!(
        "
apiVersion: outrigger.dev/v1alpha1
kind: ExternalService
metadata: {{name: partner, namespace: default}}
spec:
  hosts: [{PARTNER_HOST}]
  ports: [{{port: {HTTP}, protocol: HTTP}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: partner, namespace: default}}
spec:
  parentRefs: [{{group: '', kind: Service, name: partner}}]
  rules:
  - filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: x-route, value: partner}}]}}}}]
    backendRefs: [{{name: partner, port: {HTTP}}}]
---
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: partner, namespace: default}}
spec:
  targetRef: {{kind: Service, name: partner}}
  retry: {{attempts: 2, on: [gateway-error]}}
"
    ))
    .await?;
    let answer = wait_until(LIMIT, "the name to lead somewhere", || answers(web, PARTNER, 1)).await?;
    ensure!(answer == ["site-1"], "{answer:?} answered");
    let address = web.look_up(PARTNER, HTTP).await?.ip();
    ensure!(is_virtual(address), "{address} is not a virtual address");
    // Its real name is the service's, too, for a client that knows nothing of that.
    wait_until(LIMIT, "the host to be the service's", || async {
        let own = web.look_up(PARTNER_HOST, HTTP).await?.ip();
        ensure!(own == address, "{PARTNER_HOST} is {own}, not {address}");
        Ok(())
    })
    .await?;
    is_routed(web).await?;
    // A client that has looked it up before, or elsewhere, says in its request whom it means.
    wait_until(LIMIT, "the real address to be the service's", || async {
        let asked =
            web.host.run(move || client::get((first, HTTP).into(), PARTNER_HOST, "/describe")).await?;
        let asked = asked.expect(200)?;
        ensure!(is_by_route(&asked)?, "it leads around the route: {}", asked.text());
        Ok(())
    })
    .await?;
    let asked = web.host.run(move || client::get((first, HTTP).into(), "other.example", "/describe")).await?;
    ensure!(!is_by_route(&asked.expect(200)?)?, "an endpoint's own address has a route");

    // It moves, to two places.
    names.set(PARTNER_HOST, &[second, third]);
    wait_until(FOLLOWS, "the name to lead elsewhere", || async {
        let endpoints = web.endpoints("partner.default").await?;
        ensure!(endpoints.len() == 2, "{endpoints:?}");
        Ok(())
    })
    .await?;
    let both = ["site-2", "site-3"];
    let seen = answers(web, PARTNER_HOST, 40).await?;
    ensure!(seen == both, "{seen:?} answered");

    // Nobody knows any more where it is: it is where it was.
    names.stop();
    wait_until(FOLLOWS, "the controller to say that it finds nobody", || async {
        let faults = faults_of_policies(mesh).await?;
        ensure!(faults.contains(PARTNER_HOST), "{faults}");
        Ok(())
    })
    .await?;
    for name in [PARTNER, PARTNER_HOST] {
        let seen = answers(web, name, 40).await?;
        ensure!(seen == both, "{seen:?} answered for {name} without a name server");
    }
    // Nor is there anybody to say which names are the mesh's: those that were are.
    mesh.kill_controller().await;
    is_routed(web).await?;
    // One of the places fails: the retry of its policy goes to the other.
    sites[1].suffer(Faults::every(503)).await?;
    // Else the balancer may never have a reason to ask the one that fails.
    sites[2].suffer(Faults { latency_ms: 20, ..Faults::default() }).await?;
    for _ in 0..10 {
        let worked = web.get(PARTNER_HOST, HTTP, "/work").await?.expect(200)?.text();
        ensure!(worked == "site-3", "{worked} worked");
    }
    ensure!(sites[1].counts().await?.failed > 0, "nothing was ever tried again");
    mesh.start_controller().await?;

    names.set(PARTNER_HOST, &[first]);
    names.start_again().await?;
    wait_until(FOLLOWS, "the name to lead to where it was at first", || async {
        let seen = answers(web, PARTNER_HOST, 4).await?;
        ensure!(seen == ["site-1"], "{seen:?} answered");
        Ok(())
    })
    .await?;
    is_routed(web).await?;
    let faults = faults_of_policies(mesh).await?;
    ensure!(!faults.contains(PARTNER_HOST), "{faults}");

    // What is deleted leaves no trace: the name is its owner's again.
    mesh.clear_policies().await?;
    wait_until(LIMIT, "the host to be what its name server says", || async {
        let address = web.look_up(PARTNER_HOST, HTTP).await?.ip();
        ensure!(address == first, "{PARTNER_HOST} is {address}");
        Ok(())
    })
    .await?;
    wait_until(LIMIT, "the real thing to answer as it is", || async {
        let described = web.get(PARTNER_HOST, HTTP, "/describe").await?.expect(200)?;
        ensure!(!is_by_route(&described)?, "{}", described.text());
        Ok(())
    })
    .await
}

/// The partner's host leads an unchanged client (curl) through the service's route, and the partner sees the host that it named.
async fn is_routed(web: &Workload) -> anyhow::Result<()> {
    let text = web.curl(&["--fail", &format!("http://{PARTNER_HOST}:{HTTP}/describe")]).await?;
    let seen: Value = serde_json::from_str(&text).with_context(|| format!("reading {text}"))?;
    ensure!(has(&seen, "x-route", "partner"), "no route took it: {text}");
    ensure!(has(&seen, "host", &format!("{PARTNER_HOST}:{HTTP}")), "the host is another: {text}");
    Ok(())
}

/// Whether what `/describe` answered came by the partner's route.
fn is_by_route(described: &Reply) -> anyhow::Result<bool> {
    let seen: Value = serde_json::from_slice(&described.body).context("reading what was seen")?;
    Ok(has(&seen, "x-route", "partner"))
}

fn has(seen: &Value, name: &str, value: &str) -> bool {
    seen["headers"].as_array().is_some_and(|fields| fields.iter().any(|field| *field == json!([name, value])))
}

/// What is wrong with the source that external services come from.
async fn faults_of_policies(mesh: &Mesh) -> anyhow::Result<String> {
    let reply = mesh.api(Method::GET, "/sources", None).await?.expect(200)?;
    let reply: Value = serde_json::from_slice(&reply.body).context("reading the sources")?;
    let sources = reply["sources"].as_array().cloned().unwrap_or_default();
    let policy = sources.iter().find(|source| source["name"] == "policy").context("no source of policies")?;
    Ok(policy["faults"].to_string())
}
