//! Conformance: what others wrote to judge HTTP implementations, and what others wrote to speak HTTP, against and
//! through two sidecars.
//!
//! h2spec judges the sidecar's HTTP/2 on each of its sides. The matrix lets independent clients talk to independent
//! servers, each pair through two sidecars: what one of them does that no other does must pass as well. Clients and
//! servers of Debian's packages take part where the suite is built with the feature `debian` (`make test-root`).

mod grpc;
mod h2spec;
mod hyper_client;
mod matrix;

use std::net::SocketAddr;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::client;
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::network::Host;
use outrigger_e2e::process::Process;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

/// A server of the suite: all of them run on one host, beside one sidecar.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    /// Its name in Consul.
    pub(crate) name: &'static str,
    /// Its port.
    pub(crate) port: u16,
}

pub(crate) const HYPER: Service = Service { name: "hyper", port: 8080 };
pub(crate) const GO: Service = Service { name: "go", port: 8081 };
pub(crate) const NGHTTPD: Service = Service { name: "nghttpd", port: 8082 };
pub(crate) const GRPC_PYTHON: Service = Service { name: "grpc-python", port: 10_000 };
pub(crate) const GRPC_GO: Service = Service { name: "grpc-go", port: 10_001 };
/// hyper again, with HTTP/2 alone.
pub(crate) const HTTP2: Service = Service { name: "http2", port: 8083 };
const SERVICES: [Service; 6] = [HYPER, GO, NGHTTPD, GRPC_PYTHON, GRPC_GO, HTTP2];

impl Service {
    /// What clients dial.
    pub(crate) fn authority(self) -> String {
        format!("{}.service.consul:{}", self.name, self.port)
    }
}

/// Clients on one host, servers on another, a sidecar beside each.
pub(crate) struct World {
    pub(crate) mesh: Mesh,
    pub(crate) web: Workload,
    pub(crate) servers: Workload,
    /// A host without a sidecar.
    pub(crate) stranger: Host,
    _servers: Vec<Process>,
}

fn main() -> ExitCode {
    let mut cases = h2spec::cases();
    cases.extend(matrix::cases());
    cases.extend(grpc::cases());
    cases.push(case("all of it went through two sidecars", went_through_two_sidecars));
    suite("conformance", World::build, cases)
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        // Permissive, so that a stranger can speak to the inbound side in clear; sidecars use mutual TLS all the same.
        let mesh = Mesh::start(Setup { mtls: "Permissive", ..Setup::default() }).await?;
        let mut plan = mesh.workload("servers").app(["--http", "8080", "--http2", "8083"]);
        for service in SERVICES {
            plan = plan.serves(service.name, service.port);
        }
        let servers = plan.start().await?;
        let mut running = vec![
            start(&servers.host, GO, tool("http-peer", &["serve", "8081"])?).await?,
            start(&servers.host, GRPC_PYTHON, tool("grpc-python", &["serve", "10000"])?).await?,
            start(&servers.host, GRPC_GO, tool("grpc-interop-server", &["--use_tls=false", "--port=10001"])?)
                .await?,
        ];
        if sandbox::wants_real_root() {
            // nghttpd is one of Debian's packages.
            running.push(start(&servers.host, NGHTTPD, matrix::nghttpd()?).await?);
        }
        let web = mesh.workload("web").start().await?;
        web.wait_for_service("hyper.service.consul", HYPER.port, LIMIT).await?;
        let stranger = mesh.network.host("stranger").await?;
        Ok(Self { mesh, web, servers, stranger, _servers: running })
    }
}

/// A tool with its arguments.
pub(crate) fn tool(name: &str, arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(sandbox::get().tool(name)?);
    command.args(arguments);
    Ok(command)
}

/// Starts a server and waits until it listens.
async fn start(host: &Host, service: Service, command: Command) -> anyhow::Result<Process> {
    let server = host.spawn(service.name, command).await?;
    let address = SocketAddr::from(([127, 0, 0, 1], service.port));
    wait_until(LIMIT, &format!("{} to listen", service.name), || async {
        host.run(move || client::connect(address)).await.map(drop)
    })
    .await?;
    Ok(server)
}

/// A pair that met on another way than the mesh would prove nothing.
async fn went_through_two_sidecars(world: Arc<World>) -> anyhow::Result<()> {
    world.web.wait_for_service("go.service.consul", GO.port, LIMIT).await.context("calling once more")?;
    let metrics = world.servers.admin("/metrics").await?.expect(200)?.text();
    let meshed = metrics.lines().any(|line| {
        line.starts_with("outrigger_connections_total{direction=\"inbound\",kind=\"mesh_h2\"}")
            && !line.ends_with(" 0")
    });
    ensure!(meshed, "no connection for HTTP arrived over mutual TLS");
    Ok(())
}
