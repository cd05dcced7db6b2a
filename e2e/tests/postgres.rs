//! A real PostgreSQL behind the mesh (`make test-root`: Debian's server, which refuses to run as root).
//!
//! Its protocol looks like nothing that the sidecar knows, and begins with a question that only bytes can answer
//! (`SSLRequest`): what detection must not get wrong.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::unistd::User;
use outrigger_e2e::client;
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::process::Process;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;

const PORT: u16 = 5432;
const NAME: &str = "ledger.service.consul";
/// Where Debian puts the servers, a folder for each major version.
const DEBIAN: &str = "/usr/lib/postgresql";
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    suite(
        "postgres",
        World::build,
        vec![
            case("a query, the address dialled by name", query),
            case("bulk both ways", bulk),
            case("the connection is mutual TLS between the sidecars", is_meshed),
        ],
    )
}

struct World {
    _mesh: Mesh,
    _server: Process,
    ledger: Workload,
    web: Workload,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup::default()).await?;
        let ledger = mesh.workload("ledger").serves("ledger", PORT).start().await?;
        let server = start_server(&ledger).await?;
        let web = mesh.workload("web").start().await?;
        let world = Self { _mesh: mesh, _server: server, ledger, web };
        wait_until(LIMIT, "the database to answer through the mesh", || world.sql("select 1")).await?;
        Ok(world)
    }

    /// Runs one statement with psql, unchanged, on the client's host.
    async fn sql(&self, statement: &str) -> anyhow::Result<String> {
        let mut command = Command::new("psql");
        command.args(["--host", NAME, "--port", &PORT.to_string(), "--username", "postgres"]);
        command.args(["--no-psqlrc", "--tuples-only", "--no-align", "--command", statement]);
        command.env("PGCONNECT_TIMEOUT", "5");
        Ok(self.web.host.output(command).await?.trim().to_owned())
    }
}

async fn start_server(ledger: &Workload) -> anyhow::Result<Process> {
    let user = User::from_name("postgres")
        .context("looking up the user postgres")?
        .context("there is no user postgres: apt-get install postgresql")?;
    let binaries = newest_binaries()?;
    let data = sandbox::get().work.join("postgres");
    std::fs::create_dir_all(&data).with_context(|| format!("creating {}", data.display()))?;
    std::os::unix::fs::chown(&data, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
        .with_context(|| format!("giving {} to postgres", data.display()))?;
    let as_postgres = |name: &str| {
        let mut command = Command::new(binaries.join(name));
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).current_dir(&data);
        command
    };
    let mut init = as_postgres("initdb");
    init.arg("--pgdata").arg(&data).args(["--auth=trust", "--username=postgres", "--no-sync"]);
    ledger.host.output(init).await.context("making a database")?;
    let rule = "host all postgres all trust\n";
    std::fs::write(data.join("pg_hba.conf"), rule).context("allowing the client in")?;
    let mut serve = as_postgres("postgres");
    serve.arg("-D").arg(&data).args(["-c", "listen_addresses=*", "-c", "fsync=off"]);
    serve.arg("-c").arg(format!("unix_socket_directories={}", data.display()));
    let server = ledger.host.spawn("postgres", serve).await?;
    wait_until(LIMIT, "PostgreSQL to listen", || async {
        let address = SocketAddr::from(([127, 0, 0, 1], PORT));
        ledger.host.run(move || client::connect(address)).await.map(drop)
    })
    .await?;
    Ok(server)
}

fn newest_binaries() -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir(DEBIAN).context("PostgreSQL is missing: apt-get install postgresql")?;
    let mut folders: Vec<PathBuf> = versions
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|folder| Path::new(folder).join("initdb").exists())
        .collect();
    folders.sort();
    folders.pop().with_context(|| format!("no server below {DEBIAN}: apt-get install postgresql"))
}

async fn query(world: Arc<World>) -> anyhow::Result<()> {
    let answer = world.sql("select 6 * 7").await?;
    ensure!(answer == "42", "the answer is {answer:?}");
    Ok(())
}

async fn bulk(world: Arc<World>) -> anyhow::Result<()> {
    let answer =
        world.sql("select length(string_agg(md5(i::text), '')) from generate_series(1, 200000) i").await?;
    ensure!(answer == "6400000", "the server counted {answer}");
    let rows = world.sql("select repeat('x', 1000) from generate_series(1, 5000)").await?;
    ensure!(rows.lines().count() == 5000, "{} of 5000 rows came", rows.lines().count());
    Ok(())
}

async fn is_meshed(world: Arc<World>) -> anyhow::Result<()> {
    let metrics = world.ledger.admin("/metrics").await?.expect(200)?.text();
    let meshed = metrics.lines().any(|line| {
        line.starts_with("outrigger_connections_total{direction=\"inbound\",kind=\"mesh_tcp\"}")
            && !line.ends_with(" 0")
    });
    ensure!(meshed, "no connection for bytes arrived over mutual TLS:\n{metrics}");
    Ok(())
}
