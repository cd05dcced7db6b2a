//! What suites do on a node that has the mesh: its images, its chart, and its pods as hosts of the network.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};

use super::Node;
use crate::chart;
use crate::kubernetes::images::Image;
use crate::kubernetes::objects::wait_for;
use crate::network::{Host, Network};
use crate::sandbox;

/// The suites' own application, in the node's store.
pub const APP: &str = "e2e.outrigger.dev/app:1";
/// For whatever has to happen on a node that does everything on two cores.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The binaries that run in pods, and as whom.
const IMAGES: [(&str, &str); 3] =
    [("outrigger", "65532"), ("outrigger-controller", "65532"), ("outrigger-proxy", "15400")];

impl Node {
    /// A node in a network of its own, with what [`Self::add_mesh`] adds. The network must outlive it.
    pub async fn with_mesh() -> anyhow::Result<(Self, Network)> {
        let network = Network::new().await?;
        let node = Self::start(&network).await?;
        node.add_mesh().await?;
        Ok((node, network))
    }

    /// Puts the mesh's images and the suites' application into the node's store. With `OUTRIGGER_IMAGES` set the images are those
    /// of `make image`, else they hold the binaries that all suites run.
    pub async fn add_mesh(&self) -> anyhow::Result<()> {
        for (name, user) in IMAGES {
            if std::env::var_os("OUTRIGGER_IMAGES").is_some() {
                let built =
                    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/images/{name}.tar"));
                ensure!(built.exists(), "{} is missing: run `make image`", built.display());
                self.import(&built).await?;
                continue;
            }
            self.add(&image(name, user, env!("CARGO_PKG_VERSION"))?).await?;
        }
        let app = Image::new(APP)?.program(&sandbox::get().binary("e2e-app")?, "/bin/e2e-app")?;
        self.add(&app.entrypoint(["/bin/e2e-app"])).await
    }

    /// Puts other images of the mesh beside those of [`Self::add_mesh`], of the same programs, as a newer build is.
    pub async fn add_rebuilt_mesh(&self, tag: &str) -> anyhow::Result<()> {
        for (name, user) in IMAGES {
            self.add(&image(name, user, tag)?.file("/build", tag)?).await?;
        }
        Ok(())
    }

    /// Adds the Gateway API's kinds to the cluster.
    pub async fn add_gateway_api(&self) -> anyhow::Result<()> {
        let crds = sandbox::get().tool("gateway-api-crds")?.display().to_string();
        // Some of them are larger than what a client-side apply can note.
        self.kubectl(&["apply", "--server-side", "--filename", &crds]).await.map(drop)
    }

    /// Installs the mesh by its chart, and waits until it is ready.
    pub async fn install(&self) -> anyhow::Result<()> {
        self.release("install", &["--create-namespace"]).await
    }

    /// Upgrades the mesh to other values of its chart, and waits until it is ready.
    pub async fn upgrade(&self, values: &[&str]) -> anyhow::Result<()> {
        self.release("upgrade", values).await
    }

    async fn release(&self, how: &str, more: &[&str]) -> anyhow::Result<()> {
        let folder = chart::folder("outrigger").display().to_string();
        self.helm(&[&[how, "outrigger", &folder, "--wait"], more].concat()).await.map(drop)
    }

    /// Runs Helm in the mesh's namespace, as the administrator; what it printed.
    pub async fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = chart::helm(&sandbox::get().tool("helm")?, &self.home);
        command.args(arguments).args(["--namespace", chart::NAMESPACE]);
        command.arg("--kubeconfig").arg(self.cluster.kubeconfig());
        self.host().output(command).await
    }

    /// Waits until every replica of a Deployment is of its newest template and ready.
    pub async fn rolled_out(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let deployments = Api::<Deployment>::namespaced(self.client(), namespace);
        wait_for(&deployments, name, LIMIT, "rolled out", |found| {
            let wanted = found.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
            let status = found.status.clone().unwrap_or_default();
            let of = |count: Option<i32>| count.unwrap_or_default();
            ensure!(status.observed_generation == found.metadata.generation, "not looked at yet");
            ensure!(
                of(status.updated_replicas) == wanted
                    && of(status.ready_replicas) == wanted
                    && of(status.replicas) == wanted,
                "{status:?}"
            );
            Ok(())
        })
        .await
    }

    /// The pods of a label, those that are leaving left out.
    pub async fn pods(&self, namespace: &str, labels: &str) -> anyhow::Result<Vec<Pod>> {
        let pods = Api::<Pod>::namespaced(self.client(), namespace);
        let found = pods.list(&ListParams::default().labels(labels)).await?;
        Ok(found.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect())
    }

    /// The network namespace of a running pod, to act there as its application does.
    pub async fn inside(&self, pod: &Pod) -> anyhow::Result<Host> {
        let name = pod.name_any();
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let address = address.with_context(|| format!("{name} has no address"))?.parse()?;
        Host::with_address(&name, Path::new("/run/netns"), address).await
    }

    /// Where a Service is dialled.
    pub async fn service(&self, namespace: &str, name: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let service = Api::<Service>::namespaced(self.client(), namespace).get(name).await?;
        let address = service.spec.and_then(|spec| spec.cluster_ip).context("a Service has an address")?;
        Ok(SocketAddr::new(address.parse()?, port))
    }
}

/// An image that holds a binary that all suites run.
fn image(name: &str, user: &str, tag: &str) -> anyhow::Result<Image> {
    let path = format!("/{name}");
    let image =
        Image::new(&format!("localhost/{name}:{tag}"))?.program(&sandbox::get().binary(name)?, &path)?;
    Ok(image.entrypoint([path.as_str()]).user(user))
}
