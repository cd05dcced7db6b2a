//! A whole node: pods run.
//!
//! One host of the network is the machine: its veth end is the node's address, its namespace holds the bridge of the pods and
//! kube-proxy's rules, and kubelet, containerd, scheduler and the API run on it. Other hosts reach pods by a route
//! ([`Node::reachable_from`]): nothing is masqueraded, so a pod has the same address everywhere.
//!
//! State lies in the sandbox's memory. What programs write to places that cannot be chosen is caught by empty file systems mounted
//! over them, and what the kubelet would set for the whole machine is hidden from it ([`machine`]).

mod config;
mod machine;
mod mesh;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::Client;
use kube::api::Api;

use super::access::{NODE, PROXY, SCHEDULER};
use super::cluster::{Cluster, Setup};
use super::images::Image;
use super::objects::{apply, wait_for};
use crate::network::{Host, Network};
use crate::process::Process;
use crate::sandbox;
use crate::wait::wait_until;

pub use mesh::{APP, LIMIT};

/// The node's name.
pub const NAME: &str = "node";
/// Where the node's plugins for pod networks lie, and their configuration: the customary places.
pub const CNI_BINARIES: &str = "/opt/cni/bin";
/// Configuration of the pod network.
pub const CNI_CONFIG: &str = "/etc/cni/net.d";
/// A cold start takes 10 s on two idle cores.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// A running node, and the cluster that it is all of.
pub struct Node {
    // In the order in which they end: who would complain about another's end goes first.
    _scheduler: Process,
    _proxy: Process,
    kubelet: Process,
    containerd: Process,
    cluster: Cluster,
    home: PathBuf,
}

impl Node {
    /// Starts a cluster with one node on a new host, and waits until pods run and resolve names.
    pub async fn start(network: &Network) -> anyhow::Result<Self> {
        ensure!(
            sandbox::get().real_root,
            "a node needs real root: run `make kubernetes` as root (OUTRIGGER_ROOT_SUITES=1)"
        );
        machine::check_programs()?;
        let host = network.host(NAME).await?;
        machine::hide_state()?;
        host.run(|| async { machine::set_network() }).await?;
        let cluster = Cluster::start_on(host.clone(), Setup { controllers: true }).await?;
        let home = cluster.home().join("node");
        for folder in [&home, Path::new(CNI_CONFIG)] {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        for (path, text) in [
            (home.join("containerd.toml"), config::containerd(&home)),
            (home.join("kubelet.yaml"), config::kubelet(&home)),
            (home.join("resolv.conf"), format!("nameserver {}\n", sandbox::NAMESERVER)),
            (Path::new(CNI_CONFIG).join("10-pods.conflist"), config::pod_network(&home)),
        ] {
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }

        let mut command = Command::new("containerd");
        command.arg("--config").arg(home.join("containerd.toml"));
        let containerd = host.spawn("containerd", command).await?;

        let mut command = Command::new(sandbox::get().tool("kube-scheduler")?);
        let kubeconfig = cluster.write_kubeconfig(SCHEDULER, SCHEDULER)?;
        for flag in ["--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig"] {
            command.arg(flag).arg(&kubeconfig);
        }
        command.arg("--leader-elect=false");
        let scheduler = host.spawn("scheduler", command).await?;

        let mut command = Command::new(sandbox::get().tool("kube-proxy")?);
        command.arg("--kubeconfig").arg(cluster.write_kubeconfig(PROXY, PROXY)?);
        command.args(["--proxy-mode", "nftables", "--hostname-override", NAME]);
        // The machine's table of connections is not this namespace's to size.
        command.args(["--conntrack-max-per-core", "0"]);
        let proxy = host.spawn("kube-proxy", command).await?;

        // The kubelet asks containerd what it can do, once.
        machine::wait_for_containerd(&host, &home).await?;
        let kubelet = start_kubelet(&cluster, &home).await?;
        let mut node = Self { _scheduler: scheduler, _proxy: proxy, kubelet, containerd, cluster, home };
        for image in [config::PAUSE, config::COREDNS] {
            let program = image.split(['/', ':']).nth(1).context("an image has a name")?;
            let image =
                Image::new(image)?.program(&sandbox::get().tool(program)?, &format!("/bin/{program}"))?;
            node.add(&image.entrypoint([format!("/bin/{program}").as_str()])).await?;
        }
        apply(&node.client(), config::CLUSTER_DNS).await?;
        node.wait_ready().await?;
        Ok(node)
    }

    /// The API.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The machine.
    pub fn host(&self) -> &Host {
        self.cluster.host()
    }

    /// A client that may everything.
    pub fn client(&self) -> Client {
        self.cluster.client()
    }

    /// Puts an image into the node's store.
    pub async fn add(&self, image: &Image) -> anyhow::Result<()> {
        let archive = image.save(&self.home)?;
        self.import(&archive).await?;
        fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))
    }

    /// Puts the images of an archive into the node's store: a tar as `docker save` or `buildah push` makes it. Pods find them under
    /// the names that the archive says, without a registry.
    pub async fn import(&self, archive: &Path) -> anyhow::Result<()> {
        let mut command = ctr(&self.home);
        command.args(["images", "import"]).arg(archive);
        self.host().output(command).await.map(drop)
    }

    /// Where containerd listens, in the suite's mount namespace.
    pub(super) fn containerd_socket(&self) -> PathBuf {
        config::socket(&self.home)
    }

    /// Runs `kubectl` as the administrator; what it printed.
    pub async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(sandbox::get().tool("kubectl")?);
        command.arg("--kubeconfig").arg(self.cluster.kubeconfig()).args(arguments);
        // Its cache would lie in the home of who runs the suite.
        command.env("KUBECACHEDIR", self.home.join("kubectl"));
        self.host().output(command).await
    }

    /// Runs a command in a container; its standard output.
    pub async fn exec(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> anyhow::Result<String> {
        self.kubectl(&[&["exec", "-n", namespace, pod, "-c", container, "--"], command].concat()).await
    }

    /// From now on this host reaches pods and Services at their own addresses, and pods reach it.
    pub async fn reachable_from(&self, host: &Host) -> anyhow::Result<()> {
        let ranges4 = [(Ipv4Addr::new(10, 244, 0, 0), 16), (Ipv4Addr::new(10, 96, 0, 0), 16)];
        let ranges6 = [
            (Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 0), 48),
            (Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0), 112),
        ];
        let ranges = ranges4.map(|(range, prefix)| (IpAddr::V4(range), prefix));
        let ranges = ranges.into_iter().chain(ranges6.map(|(range, prefix)| (IpAddr::V6(range), prefix)));
        host.route(ranges.collect(), self.host()).await
    }

    /// Fails if a part of the node has ended.
    pub fn expect_running(&mut self) -> anyhow::Result<()> {
        self.containerd.expect_running()?;
        self.kubelet.expect_running()
    }

    /// Kills the kubelet and starts it again; pods run on meanwhile.
    pub async fn restart_kubelet(&mut self) -> anyhow::Result<()> {
        self.kubelet.kill();
        self.kubelet = start_kubelet(&self.cluster, &self.home).await?;
        self.wait_ready().await
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let nodes = Api::<NodeObject>::all(self.client());
        wait_until(READY_LIMIT, "the node to be ready", || {
            let running = self.expect_running();
            let nodes = &nodes;
            async move {
                running?;
                let node = nodes.get_opt(NAME).await?.context("it is not registered")?;
                let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
                let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
                let ready = ready.context("it says nothing of being ready")?;
                ensure!(ready.status == "True", "{}", ready.message.as_deref().unwrap_or_default());
                Ok(())
            }
        })
        .await?;
        let deployments = Api::<Deployment>::namespaced(self.client(), "kube-system");
        wait_for(&deployments, "coredns", READY_LIMIT, "to be ready", |deployment| {
            let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas);
            ensure!(ready == Some(1), "{ready:?} replicas are");
            Ok(())
        })
        .await
    }
}

async fn start_kubelet(cluster: &Cluster, home: &Path) -> anyhow::Result<Process> {
    let host = cluster.host();
    let mut command = Command::new(sandbox::get().tool("kubelet")?);
    command.arg("--kubeconfig").arg(cluster.write_kubeconfig(NODE, NODE)?);
    command.arg("--config").arg(home.join("kubelet.yaml"));
    command.args(["--hostname-override", NAME, "--node-ip", &format!("{},{}", host.v4(), host.v6())]);
    host.spawn("kubelet", command).await
}

/// containerd's own client, for the images that the kubelet sees.
fn ctr(home: &Path) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(config::socket(home)).args(["--namespace", "k8s.io"]);
    command
}
