//! Our own: a real controller, real join tokens, and two sidecars with explicit listeners, so that no root is needed.
//!
//! All is as in a default installation, with one thread each (what a sidecar without a CPU limit takes): no port has a
//! protocol hint, so that every connection goes through detection.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Addresses, Peer, READY_LIMIT, Site, Started, start_proxy, wait_for_listener};
use crate::{
    certificates::{CLIENT_ID, SERVER_ID},
    load::idle,
    machine,
    ports::Ports,
    process::{self, Process},
};

/// What is in force with [`Peer::Policies`].
const POLICIES: &str = include_str!("policies.yaml");

pub(super) fn start(
    site: &Site<'_>,
    ports: &mut Ports,
    peer: Peer,
    addresses: &Addresses,
) -> Result<Started> {
    let program = site.programs.of(peer)?;
    let binaries = program.parent().context("a program lies in a folder")?;
    let folder = site.folder.join(peer.name());
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let [discovery, api, metrics] = ports.several()?;
    let data = folder.join("controller");
    if data.exists() {
        // An earlier stack of this run.
        fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
    }
    let ports = [
        addresses.mesh_http1,
        addresses.mesh_http2,
        addresses.mesh_bytes,
        addresses.mesh_tap,
        addresses.mesh_http2,
    ];
    let service = json!({
        "kind": "Service", "name": "backend",
        "ports": (1..=ports.len()).map(|port| json!({"port": port})).collect::<Vec<_>>(),
        "endpoints": [{
            "address": addresses.mesh_http1.ip(), "identity": SERVER_ID,
            "ports": (1..).zip(&ports).map(|(port, address)| (port.to_string(), json!(address.port())))
                .collect::<serde_json::Map<_, _>>(),
        }],
    });
    write(&folder, "services/backend.yaml", &service)?;
    let config = json!({
        "data_dir": data, "listen": discovery, "api_listen": api, "metrics_listen": metrics,
        "allow_loopback_endpoints": true, "file": {"directory": folder.join("services")},
    });
    let config = write(&folder, "controller.yaml", &config)?;
    let controller = binaries.join("outrigger-controller");
    let mut controller = Process::start(&folder, "controller", machine::LOAD_CPU, &controller, |command| {
        arguments(command, &config);
    })?;
    wait_for_listener(api, &mut controller)?;
    wait_for_listener(discovery, &mut controller)?;

    let sidecar = |name: &str, identity: &str, admin: SocketAddr, more: Value| -> Result<Process> {
        let token = folder.join(format!("{name}.token"));
        fs::write(&token, create_token(binaries, api, &data, identity)?)
            .with_context(|| format!("writing {}", token.display()))?;
        let mut config = json!({
            "controller": [discovery], "token_file": token, "trust_bundle": data.join("root.pem"),
            "ports": {"outbound": 0, "inbound": 0, "dns": 0, "admin": admin.port()},
            "bind": {"admin": ["127.0.0.1"]}, "threads": 1,
        });
        if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
            config.extend(more);
        }
        let config = write(&folder, &format!("{name}.yaml"), &config)?;
        start_proxy(&folder, name, &program, |command| arguments(command, &config))
    };
    let inbound = |listen: SocketAddr, forward: SocketAddr| json!({"listen": listen, "forward": forward});
    let backend = site.backend;
    let inbounds = json!({"inbounds": [
        inbound(addresses.mesh_http1, backend.http1),
        inbound(addresses.mesh_http2, backend.http2),
        inbound(addresses.mesh_bytes, backend.bytes),
    ]});
    let mut server = sidecar("server", SERVER_ID, addresses.server_admin, inbounds)?;
    wait_for_listener(addresses.mesh_http1, &mut server)?;
    wait_ready(addresses.server_admin, &mut server)?;
    let entries = [addresses.http1, addresses.http2, addresses.bytes, addresses.tap, addresses.grpc];
    let upstreams: Vec<_> = (1..)
        .zip(entries)
        .map(|(port, listen)| json!({"service": format!("backend.default:{port}"), "listen": listen}))
        .collect();
    if peer == Peer::Policies {
        let file = folder.join("policies.yaml");
        fs::write(&file, POLICIES).with_context(|| format!("writing {}", file.display()))?;
        outrigger(binaries, api, &data, |command| {
            command.args(["policy", "apply", "-f"]).arg(&file);
        })?;
    }
    let client = sidecar("client", CLIENT_ID, addresses.client_admin, json!({"upstreams": upstreams}))?;
    Ok(Started { client, server, helpers: vec![controller] })
}

fn arguments(command: &mut Command, config: &Path) {
    command.arg("--config").arg(config).env("OUTRIGGER_LOG_LEVEL", "error");
}

fn create_token(binaries: &Path, api: SocketAddr, data: &Path, identity: &str) -> Result<Vec<u8>> {
    outrigger(binaries, api, data, |command| {
        command.args(["token", "create", "--identity", identity]);
    })
}

/// Runs the CLI; its standard output.
fn outrigger(
    binaries: &Path,
    api: SocketAddr,
    data: &Path,
    arguments: impl FnOnce(&mut Command),
) -> Result<Vec<u8>> {
    let mut command = Command::new(binaries.join("outrigger"));
    arguments(&mut command);
    command.env("OUTRIGGER_SERVER", api.to_string()).env("OUTRIGGER_TOKEN_FILE", data.join("admin-token"));
    let output = command.output().context("running outrigger")?;
    ensure!(output.status.success(), "outrigger: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Waits until a sidecar says that it is ready.
fn wait_ready(admin: SocketAddr, process: &mut Process) -> Result<()> {
    use std::io::{Read as _, Write as _};
    process::wait_until(READY_LIMIT, "the sidecar to be ready", &mut [process], || {
        let mut stream = idle::connect(admin)?;
        stream.write_all(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "it says {:?}", answer.lines().next());
        Ok(())
    })
}

fn write(folder: &Path, name: &str, value: &Value) -> Result<PathBuf> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::write(&path, format!("{value:#}\n")).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}
