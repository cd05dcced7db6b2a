//! What is measured: our sidecars, the proxies that they are compared with, and nothing in between.
//!
//! A stack is a client's proxy and a server's, with mutual TLS between them. All stacks stand at the same time and take
//! turns, so that what the machine does to one it does to the others.

mod foreign;
mod ours;

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    backend::Backend,
    certificates::Certificates,
    load::{
        Entries,
        idle::{Held, Kind},
    },
    machine,
    ports::Ports,
    process::{self, Memory, Process},
};

/// From nothing to the first request, on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// One kind of path from the load to the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Peer {
    /// No proxy.
    Direct,
    /// Our sidecars.
    Ours,
    /// Our sidecars, with ten policies in force.
    Policies,
    /// Our sidecars, from the folder that `--base` names: an earlier build.
    Base,
    /// HAProxy.
    Haproxy,
    /// Envoy.
    Envoy,
    /// nginx.
    Nginx,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ours => "ours",
            Self::Policies => "policies",
            Self::Base => "base",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::Nginx => "nginx",
        }
    }

    /// Neither ours nor nothing: what goals compare with.
    pub(crate) fn is_foreign(self) -> bool {
        matches!(self, Self::Haproxy | Self::Envoy | Self::Nginx)
    }
}

/// Where the programs are.
pub(crate) struct Programs {
    /// The folder of our binaries.
    pub(crate) ours: PathBuf,
    /// The folder of an earlier build.
    pub(crate) base: Option<PathBuf>,
    /// The folder of `e2e/tools`.
    pub(crate) tools: PathBuf,
}

impl Programs {
    /// The sidecar's, or the proxy's, executable; an error says how to get it.
    pub(crate) fn of(&self, peer: Peer) -> Result<PathBuf> {
        let (path, how) = match peer {
            Peer::Direct => return Ok(PathBuf::new()),
            Peer::Ours | Peer::Policies => (self.ours.join("outrigger-proxy"), "make release"),
            Peer::Base => {
                let folder = self.base.as_ref().context("name the earlier build's folder: --base FOLDER")?;
                (folder.join("outrigger-proxy"), "build it")
            }
            Peer::Haproxy => (PathBuf::from("/usr/sbin/haproxy"), "apt-get install haproxy"),
            Peer::Nginx => (PathBuf::from("/usr/sbin/nginx"), "apt-get install nginx libnginx-mod-stream"),
            Peer::Envoy => (self.tools.join("envoy"), "e2e/tools/envoy.sh"),
        };
        let module = Path::new(foreign::NGINX_MODULES).join("ngx_stream_module.so");
        anyhow::ensure!(path.exists(), "{} is missing: {how}", path.display());
        anyhow::ensure!(peer != Peer::Nginx || module.exists(), "{} is missing: {how}", module.display());
        Ok(path)
    }
}

/// What stacks are built from.
pub(crate) struct Site<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) certificates: &'a Certificates,
    pub(crate) backend: &'a Backend,
    /// For configurations and logs.
    pub(crate) folder: &'a Path,
}

/// A client's and a server's proxy.
pub(crate) struct Stack {
    pub(crate) peer: Peer,
    pub(crate) entries: Entries,
    /// Leads to `relay` over mutual TLS, so that the handshake can be read: see [`crate::tap`].
    pub(crate) tap: Option<Tap>,
    proxies: Option<Proxies>,
    /// From the start of the client's proxy to the first answer through both.
    pub(crate) ready: Option<Duration>,
    /// What the proxies need beside them.
    helpers: Vec<Process>,
}

/// An extra path through the client's proxy.
pub(crate) struct Tap {
    pub(crate) entry: SocketAddr,
    /// Where the client's proxy dials on that path.
    pub(crate) relay: TcpListener,
    /// Where it would dial otherwise.
    pub(crate) server: SocketAddr,
}

struct Proxies {
    client: Process,
    server: Process,
}

/// The client's side and the server's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sides<T> {
    pub(crate) client: T,
    pub(crate) server: T,
}

/// Addresses of a stack.
struct Addresses {
    http1: SocketAddr,
    http2: SocketAddr,
    /// Leads where `http2` does; only we tell them apart.
    grpc: SocketAddr,
    bytes: SocketAddr,
    tap: SocketAddr,
    mesh_http1: SocketAddr,
    mesh_http2: SocketAddr,
    mesh_bytes: SocketAddr,
    /// Where the client's proxy dials on the path of the tap.
    mesh_tap: SocketAddr,
    client_admin: SocketAddr,
    server_admin: SocketAddr,
}

impl Stack {
    /// Starts a stack and waits until a request has gone through.
    pub(crate) fn start(site: &Site<'_>, ports: &mut Ports, peer: Peer) -> Result<Self> {
        let backend = site.backend;
        if peer == Peer::Direct {
            let http2 = Some(backend.http2);
            let entries = Entries { http1: backend.http1, http2, grpc: http2, bytes: backend.bytes };
            return Ok(Self { peer, entries, tap: None, proxies: None, ready: None, helpers: Vec::new() });
        }
        let [http1, http2, grpc, bytes, tap, mesh_http1, mesh_http2, mesh_bytes, client_admin, server_admin] =
            ports.several()?;
        let relay = TcpListener::bind(ports.take()?).context("listening for the tap")?;
        let mesh_tap = relay.local_addr().context("reading the tap's address")?;
        let addresses = Addresses {
            http1,
            http2,
            grpc,
            bytes,
            tap,
            mesh_http1,
            mesh_http2,
            mesh_bytes,
            mesh_tap,
            client_admin,
            server_admin,
        };
        let started = if peer.is_foreign() {
            foreign::start(site, peer, &addresses)
        } else {
            ours::start(site, ports, peer, &addresses)
        };
        let Started { mut client, server, helpers } =
            started.with_context(|| format!("starting {}", peer.name()))?;
        process::wait_until(READY_LIMIT, "an answer", &mut [&mut client], || {
            Held::open(http1, Kind::Http1, 1).map(drop)
        })
        .with_context(|| format!("starting {}", peer.name()))?;
        let ready = Some(client.begun.elapsed());
        let grpc = if peer.is_foreign() { http2 } else { grpc };
        let entries = Entries { http1, http2: Some(http2), grpc: Some(grpc), bytes };
        let tap = Some(Tap { entry: tap, relay, server: mesh_bytes });
        let proxies = Some(Proxies { client, server });
        Ok(Self { peer, entries, tap, proxies, ready, helpers })
    }

    /// CPU time that both proxies have used.
    pub(crate) fn cpu(&self) -> Result<Sides<Duration>> {
        let Some(proxies) = &self.proxies else {
            return Ok(Sides { client: Duration::ZERO, server: Duration::ZERO });
        };
        Ok(Sides { client: proxies.client.cpu()?, server: proxies.server.cpu()? })
    }

    /// What both proxies hold; `None` without any.
    pub(crate) fn memory(&self) -> Result<Option<Sides<Memory>>> {
        let read = |proxies: &Proxies| {
            Ok(Sides { client: proxies.client.memory()?, server: proxies.server.memory()? })
        };
        self.proxies.as_ref().map(read).transpose()
    }

    /// Fails if a process has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(proxies) = &mut self.proxies {
            proxies.client.check()?;
            proxies.server.check()?;
        }
        self.helpers.iter_mut().try_for_each(Process::check)
    }
}

struct Started {
    client: Process,
    server: Process,
    helpers: Vec<Process>,
}

/// Waits until somebody listens.
fn wait_for_listener(address: SocketAddr, process: &mut Process) -> Result<()> {
    process::wait_until(READY_LIMIT, &format!("a listener on {address}"), &mut [process], || {
        std::net::TcpStream::connect(address).map(drop).with_context(|| format!("connecting to {address}"))
    })
}

/// Starts a proxy on its processor.
fn start_proxy(
    folder: &Path,
    name: &str,
    program: &Path,
    configure: impl FnOnce(&mut std::process::Command),
) -> Result<Process> {
    Process::start(folder, name, machine::PROXY_CPU, program, configure)
}
