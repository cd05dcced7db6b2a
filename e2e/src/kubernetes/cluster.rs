//! etcd and the API server on a host, and controller-manager where asked for.
//!
//! The API server is reached by every host of the network at `host:6443` with TLS that clients verify: its own `apiserver.crt` is
//! leaf and CA in one file. etcd and what else it needs stay on the host's loopback. State lies in the suite's work folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Request as HttpRequest;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt as _};
use rcgen::KeyPair;

use super::access::{self, ADMIN, CONTROLLER_MANAGER};
use super::audit;
use super::objects;
use crate::network::{Host, Network};
use crate::process::Process;
use crate::sandbox;
use crate::wait::wait_until;

/// The API server's port, as `kubeadm` chooses it.
pub const API_PORT: u16 = 6443;
/// etcd's own default.
const ETCD: &str = "http://127.0.0.1:2379";
/// What service account tokens say about who issued them; also the audience that the API server itself expects.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Addresses of Services, of both families. Kubernetes' own customary range.
pub(super) const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:96::/112";
/// Addresses of pods.
pub(super) const POD_RANGES: &str = "10.244.0.0/16,fd00:244::/48";
/// From nothing to ready takes 2-3 s on two idle cores; everybody else's tests may run on them, too.
const READY_LIMIT: Duration = Duration::from_mins(1);
/// Seconds for which a token is asked: the least that the API server grants.
const TOKEN_SECONDS: i64 = 600;

/// What runs beside etcd and the API server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    /// controller-manager: Deployments make pods, Services get endpoint slices, namespaces get service accounts and can end.
    pub controllers: bool,
}

/// A running Kubernetes API.
pub struct Cluster {
    setup: Setup,
    host: Host,
    home: PathBuf,
    client: Client,
    etcd: Process,
    api: Process,
    controllers: Option<Process>,
}

impl Cluster {
    /// Starts one on a new host and waits until it can be used.
    pub async fn start(network: &Network, setup: Setup) -> anyhow::Result<Self> {
        Self::start_on(network.host("kubernetes").await?, setup).await
    }

    /// Starts one on this host.
    pub(super) async fn start_on(host: Host, setup: Setup) -> anyhow::Result<Self> {
        let home = sandbox::get().work.join(format!("kubernetes-{}", host.v4()));
        if home.exists() {
            // Of an earlier case, whose network had the same addresses.
            fs::remove_dir_all(&home).with_context(|| format!("removing {}", home.display()))?;
        }
        fs::create_dir_all(&home).with_context(|| format!("creating {}", home.display()))?;
        let signer = KeyPair::generate().context("making the service accounts' key")?;
        let files = [
            (SIGNING_KEY, signer.serialize_pem()),
            (VERIFYING_KEY, signer.public_key_pem()),
            (TOKENS, access::token_file()),
            (AUDIT_POLICY, audit::POLICY.to_owned()),
        ];
        for (name, text) in files {
            fs::write(home.join(name), text).with_context(|| format!("writing {name}"))?;
        }
        let etcd = start_etcd(&host, &home).await?;
        let mut api = start_api(&host, &home).await?;
        // The API server makes its certificate when it starts, and a client cannot be made without it.
        wait_until(READY_LIMIT, "the API server's certificate", || {
            let running = api.expect_running();
            async {
                running?;
                ensure!(home.join(AUTHORITY).exists(), "there is none yet");
                Ok(())
            }
        })
        .await?;
        let admin = access::write_kubeconfig(&home, ADMIN, &url(&host), &home.join(AUTHORITY), ADMIN)?;
        let client = access::client(&host, &admin).await?;
        let mut cluster = Self { setup, host, home, client, etcd, api, controllers: None };
        cluster.wait_ready().await?;
        cluster.start_controllers().await?;
        Ok(cluster)
    }

    /// Where the API server runs.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Configuration, keys and state.
    pub(super) fn home(&self) -> &Path {
        &self.home
    }

    /// `https://address:port`, reachable from every host.
    pub fn url(&self) -> String {
        url(&self.host)
    }

    /// What clients trust: the file with the API server's own CA.
    pub fn authority(&self) -> PathBuf {
        self.home.join(AUTHORITY)
    }

    /// A client that may everything. It can be used from wherever the suite runs.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The kubeconfig of the same user.
    pub fn kubeconfig(&self) -> PathBuf {
        self.home.join(format!("{ADMIN}.kubeconfig"))
    }

    /// A token of a service account, as `TokenRequest` grants it. No audience: the API server's own.
    pub async fn token(
        &self,
        namespace: &str,
        account: &str,
        audience: Option<&str>,
    ) -> anyhow::Result<String> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client(), namespace);
        let audiences = vec![audience.unwrap_or(ISSUER).to_owned()];
        let spec =
            TokenRequestSpec { audiences, expiration_seconds: Some(TOKEN_SECONDS), ..Default::default() };
        let request = TokenRequest { spec, ..Default::default() };
        let granted = accounts.create_token_request(account, &PostParams::default(), &request).await;
        let granted = granted
            .with_context(|| format!("asking for a token of service account {namespace}/{account}"))?;
        Ok(granted.status.context("the API server granted no token")?.token)
    }

    /// A kubeconfig for a service account; its token holds for ten minutes.
    pub async fn kubeconfig_of(&self, namespace: &str, account: &str) -> anyhow::Result<PathBuf> {
        let token = self.token(namespace, account, None).await?;
        self.write_kubeconfig(&format!("{namespace}/{account}"), &token)
    }

    /// A client with the rights of a service account.
    pub async fn client_of(&self, namespace: &str, account: &str) -> anyhow::Result<Client> {
        access::client(&self.host, &self.kubeconfig_of(namespace, account).await?).await
    }

    /// Everything that the API server was asked and has answered.
    pub fn audit(&self) -> anyhow::Result<Vec<audit::Request>> {
        audit::read(&self.home.join(AUDIT_LOG))
    }

    /// The API server's process, to be measured or frozen.
    pub fn api_server(&self) -> &Process {
        &self.api
    }

    /// etcd's process.
    pub fn etcd(&self) -> &Process {
        &self.etcd
    }

    /// Kills all that was started, as a machine that loses power would.
    pub fn stop(&mut self) {
        self.controllers = None;
        self.api.kill();
        self.etcd.kill();
    }

    /// Starts what was stopped, on the same data and ports, and waits until it can be used.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.stop();
        self.etcd = start_etcd(&self.host, &self.home).await?;
        self.api = start_api(&self.host, &self.home).await?;
        self.wait_ready().await?;
        self.start_controllers().await
    }

    /// Writes a kubeconfig for whoever has this token.
    pub(super) fn write_kubeconfig(&self, name: &str, token: &str) -> anyhow::Result<PathBuf> {
        access::write_kubeconfig(&self.home, name, &self.url(), &self.authority(), token)
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let Self { client, api, etcd, .. } = self;
        wait_until(READY_LIMIT, "the Kubernetes API to be ready", || {
            let running = etcd.expect_running().and_then(|()| api.expect_running());
            async {
                running?;
                let request = HttpRequest::get("/readyz").body(Vec::new())?;
                let answer = client.request_text(request).await?;
                ensure!(answer == "ok", "it says {answer}");
                Ok(())
            }
        })
        .await
    }

    async fn start_controllers(&mut self) -> anyhow::Result<()> {
        if !self.setup.controllers {
            return Ok(());
        }
        let kubeconfig = self.write_kubeconfig(CONTROLLER_MANAGER, CONTROLLER_MANAGER)?;
        let mut command = Command::new(sandbox::get().tool("kube-controller-manager")?);
        for flag in ["--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig"] {
            command.arg(flag).arg(&kubeconfig);
        }
        command.arg("--service-account-private-key-file").arg(self.home.join(SIGNING_KEY));
        command.arg("--root-ca-file").arg(self.authority());
        command.args(["--use-service-account-credentials", "--leader-elect=false", "--secure-port=0"]);
        command.args(["--service-cluster-ip-range", SERVICE_RANGES]);
        command.args([
            "--allocate-node-cidrs",
            "--cluster-cidr",
            POD_RANGES,
            "--node-cidr-mask-size-ipv6=64",
        ]);
        self.controllers = Some(self.host.spawn("controller-manager", command).await?);
        let accounts = Api::<ServiceAccount>::namespaced(self.client(), "default");
        let limit = READY_LIMIT;
        objects::wait_for(&accounts, "default", limit, "the default service account", |account| {
            ensure!(!account.name_any().is_empty(), "it has no name");
            Ok(())
        })
        .await
        .context("controller-manager is not at work")
    }
}

const SIGNING_KEY: &str = "service-accounts.key";
const VERIFYING_KEY: &str = "service-accounts.pub";
const TOKENS: &str = "tokens.csv";
const AUDIT_POLICY: &str = "audit-policy.yaml";
const AUDIT_LOG: &str = "audit.log";
const CERTIFICATES: &str = "certificates";
const AUTHORITY: &str = "certificates/apiserver.crt";

fn url(host: &Host) -> String {
    format!("https://{}:{API_PORT}", host.v4())
}

async fn start_etcd(host: &Host, home: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(sandbox::get().tool("etcd")?);
    command.arg("--data-dir").arg(home.join("etcd"));
    command.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
    // What is written survives the process, which is all that a suite kills: waiting for the disk would only take time.
    command.args(["--unsafe-no-fsync", "--log-level", "error"]);
    host.spawn("etcd", command).await
}

async fn start_api(host: &Host, home: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(sandbox::get().tool("kube-apiserver")?);
    let address = host.v4().to_string();
    command.args(["--etcd-servers", ETCD, "--advertise-address", &address]);
    command.args(["--secure-port", &API_PORT.to_string(), "--service-cluster-ip-range", SERVICE_RANGES]);
    command.args(["--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction"]);
    command.args(["--service-account-issuer", ISSUER, "--allow-privileged"]);
    // exec, logs and port-forward reach the kubelet at an address: nobody resolves the node's name.
    command.args(["--kubelet-preferred-address-types", "InternalIP"]);
    let files = [
        ("--cert-dir", CERTIFICATES),
        ("--token-auth-file", TOKENS),
        ("--service-account-key-file", VERIFYING_KEY),
        ("--service-account-signing-key-file", SIGNING_KEY),
        ("--audit-policy-file", AUDIT_POLICY),
        ("--audit-log-path", AUDIT_LOG),
    ];
    for (flag, file) in files {
        command.arg(flag).arg(home.join(file));
    }
    host.spawn("kube-apiserver", command).await
}
