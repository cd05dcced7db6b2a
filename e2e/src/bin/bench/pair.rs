//! A controller and two sidecars on loopback, with explicit listeners: no root, no namespaces.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// From nothing to the first request, on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// The mesh under test.
pub(crate) struct Pair {
    /// Where the client dials the service.
    pub(crate) entry: SocketAddr,
    controller: Running,
    client: Running,
    server: Running,
    _folder: TempDir,
}

/// Bytes that a process holds.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    pub(crate) anonymous: u64,
}

/// A child that ends with its handle.
struct Running {
    name: &'static str,
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Pair {
    /// Starts everything and waits until a request could go through.
    pub(crate) async fn start(binaries: &Path, backend: SocketAddr) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder")?;
        let [discovery, api, metrics, entry, inbound, client_admin, server_admin] = free_addresses()?;
        let data = folder.path().join("controller");
        let service = json!({
            "kind": "Service", "name": "backend", "ports": [{"port": 80, "protocol": "http1"}],
            "endpoints": [{
                "address": inbound.ip(), "port": inbound.port(),
                "identity": "spiffe://outrigger.local/ns/default/sa/backend",
            }],
        });
        write(folder.path(), "services/backend.yaml", &service)?;
        let controller = json!({
            "data_dir": data, "listen": discovery, "api_listen": api, "metrics_listen": metrics,
            "allow_loopback_endpoints": true, "file": {"directory": folder.path().join("services")},
        });
        let config = write(folder.path(), "controller.yaml", &controller)?;
        let controller = start(binaries, "outrigger-controller", "controller", &config)?;
        answers(api).await?;
        answers(discovery).await?;
        let token = |account: &str| -> Result<PathBuf> {
            let output = Command::new(binaries.join("outrigger"))
                .args(["token", "create", "--identity"])
                .arg(format!("spiffe://outrigger.local/ns/default/sa/{account}"))
                .arg("--server")
                .arg(api.to_string())
                .arg("--token-file")
                .arg(data.join("admin-token"))
                .output()
                .context("running outrigger")?;
            ensure!(output.status.success(), "outrigger: {}", String::from_utf8_lossy(&output.stderr));
            let path = folder.path().join(format!("{account}.token"));
            fs::write(&path, output.stdout).with_context(|| format!("writing {}", path.display()))?;
            Ok(path)
        };
        let sidecar = |account: &str, admin: SocketAddr, more: Value| -> Result<PathBuf> {
            let mut config = json!({
                "controller": [discovery], "token_file": token(account)?, "trust_bundle": data.join("root.pem"),
                "ports": {"outbound": 0, "inbound": 0, "dns": 0, "admin": admin.port()},
                "bind": {"admin": ["127.0.0.1"]}, "threads": 1,
            });
            merge(&mut config, more);
            write(folder.path(), &format!("{account}.yaml"), &config)
        };
        let config =
            sidecar("backend", server_admin, json!({"inbounds": [{"listen": inbound, "forward": backend}]}))?;
        let server = start(binaries, "outrigger-proxy", "server", &config)?;
        let upstream = json!({"upstreams": [{"service": "backend.default:80", "listen": entry}]});
        let config = sidecar("client", client_admin, upstream)?;
        let client = start(binaries, "outrigger-proxy", "client", &config)?;
        answers(entry).await?;
        answers(inbound).await?;
        let mut pair = Self { entry, controller, client, server, _folder: folder };
        pair.ready(&[client_admin, server_admin]).await?;
        Ok(pair)
    }

    /// Waits until both sidecars say that they are ready.
    async fn ready(&mut self, admins: &[SocketAddr]) -> Result<()> {
        for admin in admins {
            wait_until(READY_LIMIT, &format!("the sidecar at {admin} to be ready"), || {
                let alive = self.check();
                async move {
                    alive?;
                    outrigger_e2e::client::get(*admin, "localhost", "/ready").await?.expect(200)
                }
            })
            .await?;
        }
        Ok(())
    }

    /// Fails if a process has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        for running in [&mut self.controller, &mut self.client, &mut self.server] {
            if let Some(status) = running.child.try_wait().context("asking after a child")? {
                bail!("the {} ended by itself: {status}", running.name);
            }
        }
        Ok(())
    }

    /// CPU time that both sidecars have used, nanoseconds.
    pub(crate) fn cpu_nanoseconds(&self) -> Result<u64> {
        Ok(cpu_nanoseconds(self.client.child.id())? + cpu_nanoseconds(self.server.child.id())?)
    }

    /// What the server's sidecar holds.
    pub(crate) fn server_memory(&self) -> Result<Memory> {
        let path = format!("/proc/{}/status", self.server.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            Ok(kib.with_context(|| format!("{path} has no {name}"))? * 1024)
        };
        Ok(Memory { resident: field("VmRSS:")?, anonymous: field("RssAnon:")? })
    }
}

fn cpu_nanoseconds(process: u32) -> Result<u64> {
    let tasks = format!("/proc/{process}/task");
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
        let path = task.context("reading a task")?.path().join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let first = text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok());
        sum += first.with_context(|| format!("{} holds no number", path.display()))?;
    }
    Ok(sum)
}

fn start(binaries: &Path, binary: &str, name: &'static str, config: &Path) -> Result<Running> {
    let child = Command::new(binaries.join(binary))
        .arg("--config")
        .arg(config)
        .env("OUTRIGGER_LOG_LEVEL", "error")
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {binary}"))?;
    Ok(Running { name, child })
}

async fn answers(address: SocketAddr) -> Result<()> {
    wait_until(READY_LIMIT, &format!("a listener on {address}"), || async move {
        TcpStream::connect(address).await.map(drop).context("connecting")
    })
    .await
}

fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    // Held together while they are chosen, so that none comes twice.
    let held: Vec<TcpListener> = (0..N)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()
        .context("finding free ports")?;
    let mut addresses = [SocketAddr::from(([127, 0, 0, 1], 0)); N];
    for (address, listener) in addresses.iter_mut().zip(&held) {
        *address = listener.local_addr().context("reading a port")?;
    }
    Ok(addresses)
}

fn write(folder: &Path, name: &str, value: &Value) -> Result<PathBuf> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::write(&path, format!("{value:#}\n")).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

fn merge(base: &mut Value, more: Value) {
    if let (Value::Object(base), Value::Object(more)) = (base, more) {
        base.extend(more);
    }
}
