//! Proxies of others: configuration from a template, one process for each side.

use std::{fs, net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Addresses, Peer, Site, Started, start_proxy, wait_for_listener};
use crate::{
    certificates::{CLIENT_ID, SERVER_ID, SERVER_NAME},
    process::Process,
};

/// Where Debian puts nginx's modules.
pub(super) const NGINX_MODULES: &str = "/usr/lib/nginx/modules";

pub(super) fn start(site: &Site<'_>, peer: Peer, addresses: &Addresses) -> Result<Started> {
    let (client, server, extension) = match peer {
        Peer::Haproxy => (include_str!("haproxy.client.cfg"), include_str!("haproxy.server.cfg"), "cfg"),
        Peer::Envoy => (include_str!("envoy.client.yaml"), include_str!("envoy.server.yaml"), "yaml"),
        Peer::Nginx => (include_str!("nginx.client.conf"), include_str!("nginx.server.conf"), "conf"),
        Peer::Direct | Peer::Ours | Peer::Policies | Peer::Base => bail!("{} has no template", peer.name()),
    };
    let run = |side: &str, template: &str, admin: SocketAddr| -> Result<Process> {
        let name = format!("{}.{side}", peer.name());
        let config = site.folder.join(format!("{name}.{extension}"));
        fs::write(&config, fill(site, addresses, admin, template)?)
            .with_context(|| format!("writing {}", config.display()))?;
        launch(site, peer, &name, config)
    };
    let mut server = run("server", server, addresses.server_admin)?;
    wait_for_listener(addresses.mesh_http1, &mut server)?;
    let client = run("client", client, addresses.client_admin)?;
    Ok(Started { client, server, helpers: Vec::new() })
}

fn launch(site: &Site<'_>, peer: Peer, name: &str, config: PathBuf) -> Result<Process> {
    let program = site.programs.of(peer)?;
    start_proxy(site.folder, name, &program, |command| {
        match peer {
            Peer::Haproxy => command.args(["-db", "-f"]).arg(config),
            // Two Envoys on one host would share memory for hot restarts.
            Peer::Envoy => command
                .args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "error", "-c"])
                .arg(config),
            _ => command.arg("-p").arg(site.folder).arg("-c").arg(config),
        };
    })
}

/// Replaces `{{name}}` throughout.
fn fill(site: &Site<'_>, addresses: &Addresses, admin: SocketAddr, template: &str) -> Result<String> {
    let mut text = template
        .replace("{{certificates}}", &site.certificates.folder.display().to_string())
        .replace("{{folder}}", &site.folder.display().to_string())
        .replace("{{modules}}", NGINX_MODULES)
        .replace("{{name}}", SERVER_NAME)
        .replace("{{client-id}}", CLIENT_ID)
        .replace("{{server-id}}", SERVER_ID)
        .replace("{{admin}}", &admin.port().to_string());
    for (name, address) in [
        ("http1", addresses.http1),
        ("http2", addresses.http2),
        ("bytes", addresses.bytes),
        ("tap", addresses.tap),
        ("mesh-http1", addresses.mesh_http1),
        ("mesh-http2", addresses.mesh_http2),
        ("mesh-bytes", addresses.mesh_bytes),
        ("mesh-tap", addresses.mesh_tap),
        ("app-http1", site.backend.http1),
        ("app-http2", site.backend.http2),
        ("app-bytes", site.backend.bytes),
    ] {
        text = text
            .replace(&format!("{{{{{name}}}}}"), &address.to_string())
            .replace(&format!("{{{{{name}-port}}}}"), &address.port().to_string());
    }
    ensure!(!text.contains("{{"), "a name in a template has no value: {text}");
    Ok(text)
}
