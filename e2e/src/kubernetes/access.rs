//! Who may come in, and how: the static tokens that the API server is started with, kubeconfigs, and clients.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use http::{Request, Response};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;
use tower::service_fn;

use crate::network::Host;

/// Users of the API server that exist before it does: name, groups. Kubernetes' own roles are bound to these names; their tokens
/// are their names, since nobody else reaches the API server's network.
const USERS: [(&str, &str); 5] = [
    (ADMIN, "system:masters"),
    (CONTROLLER_MANAGER, ""),
    (SCHEDULER, ""),
    (PROXY, "system:node-proxier"),
    (NODE, "system:nodes"),
];

/// May everything.
pub(super) const ADMIN: &str = "admin";
pub(super) const CONTROLLER_MANAGER: &str = "system:kube-controller-manager";
pub(super) const SCHEDULER: &str = "system:kube-scheduler";
pub(super) const PROXY: &str = "system:kube-proxy";
/// The kubelet of the one node; the name after the last colon is the node's.
pub(super) const NODE: &str = "system:node:node";

/// The API server's `--token-auth-file`.
pub(super) fn token_file() -> String {
    let lines: Vec<_> =
        USERS.iter().map(|(name, groups)| format!("{name},{name},{name},\"{groups}\"")).collect();
    lines.join("\n")
}

/// Writes a kubeconfig into `home`, for whoever has this token.
pub(super) fn write_kubeconfig(
    home: &Path,
    name: &str,
    server: &str,
    authority: &Path,
    token: &str,
) -> anyhow::Result<PathBuf> {
    let path = home.join(format!("{}.kubeconfig", name.replace([':', '/'], "-")));
    let text = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "e2e",
        "contexts": [{ "name": "e2e", "context": { "cluster": "e2e", "user": name } }],
        "clusters": [{ "name": "e2e", "cluster": { "server": server, "certificate-authority": authority } }],
        "users": [{ "name": name, "user": { "token": token } }],
    });
    fs::write(&path, text.to_string()).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// A client with what a kubeconfig says, whose connections are made on `host`.
///
/// A connection belongs to the namespace of the thread that opens it, and a client opens connections wherever its calls are
/// awaited. So every call is carried to the host's thread; only its bytes come back.
pub(super) async fn client(host: &Host, kubeconfig: &Path) -> anyhow::Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).context("reading a kubeconfig")?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    let config = config.context("using a kubeconfig")?;
    let inner = host
        .run(move || async move { Client::try_from(config).context("making a Kubernetes client") })
        .await?;
    let host = host.clone();
    let carry = service_fn(move |request: Request<Body>| {
        let (host, inner) = (host.clone(), inner.clone());
        async move {
            let send = move || async move { Ok(inner.send(request).await?) };
            let response: Response<Body> = host.run(send).await?;
            anyhow::Ok(response)
        }
    });
    Ok(Client::new(carry, "default"))
}
