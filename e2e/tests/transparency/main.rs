//! Transparency: one list of cases, each run twice, without a mesh and through two sidecars. What client and
//! application see must be the same; where it may differ, the case says so and why.
//!
//! Every case also asserts what the direct run must show, so that two equal failures do not pass.

mod grpc;
mod http;
mod raw;
mod tcp;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::net::SocketAddr;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use ::http::{HeaderMap, HeaderName};
use anyhow::{Context as _, ensure};
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::network::Host;
use outrigger_e2e::process::Process;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{Case, case, suite};
use outrigger_e2e::wait::{wait_until, within};

pub(crate) const HTTP: u16 = 8080;
pub(crate) const RAW: u16 = 8081;
pub(crate) const ECHO: u16 = 9000;
pub(crate) const BANNER: u16 = 9001;
pub(crate) const CLOSE_FIRST: u16 = 9002;
pub(crate) const RESET: u16 = 9003;
pub(crate) const GRPC: u16 = 10_000;
/// The authority that requests carry: the same on both ways.
pub(crate) const AUTHORITY: &str = "orders.service.consul:8080";

/// Port and the Consul service that has it.
const SERVICES: [(u16, &str); 7] = [
    (HTTP, "orders"),
    (RAW, "orders-raw"),
    (ECHO, "orders-echo"),
    (BANNER, "orders-banner"),
    (CLOSE_FIRST, "orders-close"),
    (RESET, "orders-reset"),
    (GRPC, "orders-grpc"),
];
const APP: [&str; 14] = [
    "--name",
    "orders",
    "--http",
    "8080",
    "--raw",
    "8081",
    "--echo",
    "9000",
    "--banner",
    "9001",
    "--close-first",
    "9002",
    "--reset",
    "9003",
];
/// One run of a case, direct or meshed.
const RUN_LIMIT: Duration = Duration::from_mins(1);

fn main() -> ExitCode {
    let mut cases = vec![
        both("http1: methods and fields", http::methods),
        both("http1: request targets", http::targets),
        both("http1: empty bodies", http::empty_bodies),
        both("http1: 100 MB up", http::large_upload),
        both("http1: 100 MB down", http::large_download),
        both("http1: 100 MB there and back", http::large_echo),
        both("http1: chunked bodies", http::chunked),
        both("http1: trailers", http::trailers),
        both("http1: statuses, HEAD, 204 and 304", http::statuses),
        both("http1: 60 KiB of headers", http::large_headers),
        both("http1: cookies", http::cookies),
        both("http1: streamed answer", http::streaming),
        both("http1: slow answer", http::slow_answer),
        both("http1: slow reader", http::slow_reader),
        both("http1: answer before the request's end", http::early_answer),
        both("http1: body that breaks off", http::broken_body),
        both("http1: keep-alive", http::keep_alive),
        both("http1: many connections", http::many_connections),
        both("http1: first lines and fields as they came", raw::header_order),
        both("http1: odd targets", raw::odd_targets),
        both("http1: pipelining", raw::pipelining),
        both("http1: slow writer", raw::slow_writer),
        both("http1: Expect: 100-continue", raw::expect_continue),
        both("http1: interim responses", raw::interim),
        both("http1: 304 with a length", raw::not_modified),
        case("http1: a request that is framed twice", |world: Arc<World>| async move {
            let target = world.meshed.clone();
            world.meshed.client.run(move || raw::framed_twice(target)).await
        }),
        both("http1: body until close", raw::until_close),
        both("http1: HTTP/1.0", raw::http10),
        both("http1: upgrades", raw::upgrade),
        both("http1: refused upgrade", raw::upgrade_refused),
        both("http1: CONNECT", raw::connect),
        both("http2: prior knowledge", http::http2),
        both("http2: many streams", http::http2_streams),
        both("http2: cancelled streams", http::http2_cancel),
        both("http2: conversation", http::http2_conversation),
        both("tcp: echo", tcp::echo),
        both("tcp: client closes first", tcp::client_closes_first),
        both("tcp: server closes first", tcp::server_closes_first),
        both("tcp: server speaks first", tcp::server_speaks_first),
        both("tcp: reset", tcp::reset),
        both("tcp: bulk both ways", tcp::bulk),
        both_over_ipv6("ipv6: methods and fields", http::methods),
        both_over_ipv6("ipv6: echo", tcp::echo),
        both_over_ipv6("ipv6: client closes first", tcp::client_closes_first),
        case("curl, unchanged", curl),
    ];
    for name in grpc::CASES {
        cases.push(case(format!("grpc: {name}"), move |world: Arc<World>| async move {
            within(RUN_LIMIT, "direct", grpc::run(&world.direct, name)).await.context("without a mesh")?;
            within(RUN_LIMIT, "meshed", grpc::run(&world.meshed, name)).await.context("through the mesh")
        }));
    }
    suite("transparency", World::build, cases)
}

/// Both ways to the same applications.
struct World {
    direct: Target,
    meshed: Target,
    direct6: Target,
    meshed6: Target,
    web: Workload,
    _others: (Workload, Workload, Workload, Workload, Process, Process, Mesh),
}

/// Where a case's client runs and where its server is.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) client: Host,
    ports: BTreeMap<u16, SocketAddr>,
}

impl Target {
    /// The address to dial for one of the application's ports.
    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        self.ports[&port]
    }
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup::default()).await?;
        let grpc_server = |host: Host| async move {
            let mut server = Command::new(sandbox::get().tool("grpc-interop-server")?);
            server.args(["--use_tls=false", "--port=10000"]);
            host.spawn("grpc", server).await
        };
        let plain = mesh.workload("plain").bare().app(APP).start().await?;
        let plain_grpc = grpc_server(plain.host.clone()).await?;
        let plain_client = mesh.workload("plain-client").bare().start().await?;
        let mut orders = mesh.workload("orders").app(APP);
        for (port, service) in SERVICES {
            orders = orders.serves(service, port);
        }
        let orders = orders.start().await?;
        let orders6 = mesh.workload("orders6").at_ipv6().app(APP);
        let orders6 = orders6.serves("orders6", HTTP).serves("orders6-echo", ECHO).start().await?;
        let orders_grpc = grpc_server(orders.host.clone()).await?;
        let web = mesh.workload("web").start().await?;
        web.wait_for_service("orders.service.consul", HTTP, Duration::from_secs(20)).await?;

        let mut meshed = BTreeMap::new();
        for (port, service) in SERVICES {
            let name = format!("{service}.service.consul");
            let address = wait_until(Duration::from_secs(10), &name, || web.look_up(&name, port)).await?;
            meshed.insert(port, address);
        }
        let target = |client: &Host, at: &dyn Fn(u16) -> SocketAddr| Target {
            client: client.clone(),
            ports: SERVICES.iter().map(|(port, _)| (*port, at(*port))).collect(),
        };
        Ok(Self {
            direct: target(&plain_client.host, &|port| plain.host.at(port)),
            meshed: target(&web.host, &|port| meshed[&port]),
            direct6: target(&plain_client.host, &|port| plain.host.at6(port)),
            meshed6: target(&web.host, &|port| orders6.host.at6(port)),
            web,
            _others: (plain, plain_client, orders, orders6, plain_grpc, orders_grpc, mesh),
        })
    }
}

/// A case that runs on both ways.
fn both<F, Fut>(name: &str, run: F) -> Case<World>
where
    F: Fn(Target) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = anyhow::Result<Observed>> + 'static,
{
    case(name, move |world: Arc<World>| async move { compare(&world.direct, &world.meshed, run).await })
}

/// A case that runs on both ways over IPv6.
fn both_over_ipv6<F, Fut>(name: &str, run: F) -> Case<World>
where
    F: Fn(Target) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = anyhow::Result<Observed>> + 'static,
{
    case(name, move |world: Arc<World>| async move { compare(&world.direct6, &world.meshed6, run).await })
}

async fn compare<F, Fut>(direct: &Target, meshed: &Target, run: F) -> anyhow::Result<()>
where
    F: Fn(Target) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = anyhow::Result<Observed>> + 'static,
{
    let observe = |target: &Target| {
        let (host, target) = (target.client.clone(), target.clone());
        async move { within(RUN_LIMIT, "the run", host.run(move || run(target))).await }
    };
    let expected = observe(direct).await.context("without a mesh")?;
    let seen = observe(meshed).await.context("through the mesh")?;
    let differences: Vec<_> = diff(&expected.0, &seen.0);
    ensure!(differences.is_empty(), "the mesh is visible (- direct, + meshed):\n{}", differences.join("\n"));
    Ok(())
}

fn diff(expected: &[String], seen: &[String]) -> Vec<String> {
    let missing = expected.iter().filter(|line| !seen.contains(line)).map(|line| format!("- {line}"));
    let extra = seen.iter().filter(|line| !expected.contains(line)).map(|line| format!("+ {line}"));
    let mut all: Vec<_> = missing.chain(extra).collect();
    if all.is_empty() && expected != seen {
        all.push(format!("the order differs: {expected:#?} and {seen:#?}"));
    }
    all
}

/// What a run saw, line by line.
#[derive(Debug, Default)]
pub(crate) struct Observed(Vec<String>);

impl Observed {
    pub(crate) fn note(&mut self, line: String) {
        self.0.push(line);
    }

    /// All fields, sorted by name, values of one name in order; the order of fields has a case of its own. `date` is
    /// the clock's, and the length of a description says only that it names the caller.
    pub(crate) fn headers(&mut self, what: &str, fields: &HeaderMap) {
        let describes = fields.get("content-type").is_some_and(|kind| kind == "application/json");
        let different = |name: &HeaderName| name == "date" || (describes && name == "content-length");
        let mut names: Vec<_> = fields.keys().filter(|name| !different(name)).collect();
        names.sort_by_key(|name| name.as_str());
        for name in names {
            let values: Vec<_> = fields
                .get_all(name)
                .iter()
                .map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned())
                .collect();
            self.note(format!("{what}: {name}: {values:?}"));
        }
    }

    /// A body: as text where it is short, else by length and hash. The application's description of a request
    /// loses what only a meshed request carries.
    pub(crate) fn body(&mut self, what: &str, body: &[u8]) {
        if let Ok(mut description) = serde_json::from_slice::<serde_json::Value>(body)
            && let Some(fields) = description["headers"].as_array_mut()
        {
            // Who called: what the mesh is for.
            fields.retain(|field| field[0] != "outrigger-client-id");
            fields.sort_by_key(|field| field[0].as_str().map(str::to_owned));
            return self.note(format!("{what}: {description}"));
        }
        if body.len() <= 200 {
            return self.note(format!("{what}: {:?}", String::from_utf8_lossy(body)));
        }
        let mut hash = DefaultHasher::new();
        hash.write(body);
        self.note(format!("{what}: {} bytes, {:016x}", body.len(), hash.finish()));
    }
}

async fn curl(world: Arc<World>) -> anyhow::Result<()> {
    let url = "http://orders.service.consul:8080";
    let answer = world.web.curl(&[&format!("{url}/whoami")]).await?;
    ensure!(answer == "orders", "curl got {answer:?}");
    let answer = world.web.curl(&["--http2-prior-knowledge", "-d", "hello", &format!("{url}/echo")]).await?;
    ensure!(answer == "hello", "curl over HTTP/2 got {answer:?}");
    Ok(())
}
