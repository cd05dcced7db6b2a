//! A node with the mesh installed by its chart.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::kubernetes::images::Image;
use outrigger_e2e::kubernetes::node::Node;
use outrigger_e2e::kubernetes::{apply, pod_ready, wait_for};
use outrigger_e2e::network::{Host, Network};
use outrigger_e2e::sandbox;
use outrigger_e2e::wait::wait_until;

/// The namespace of the mesh.
pub(crate) const MESH: &str = "outrigger-system";
/// The namespace of the sample applications.
pub(crate) const SHOP: &str = "shop";
/// The suites' own application, in the node's store.
pub(crate) const APP: &str = "e2e.outrigger.dev/app:1";
/// For whatever has to happen on a node that does everything on two cores.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);
/// Seconds from `helm install` until the control plane is ready.
const INSTALLED: f64 = 60.0;

/// See the module.
pub(crate) struct World {
    /// The node, and the cluster that it is all of.
    pub(crate) node: Node,
    _network: Network,
    /// Where Helm keeps its own.
    home: PathBuf,
}

impl World {
    /// Starts the node, gives it the images, and installs the chart.
    pub(crate) async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let node = Node::start(&network).await?;
        for (name, user) in
            [("outrigger", "65532"), ("outrigger-controller", "65532"), ("outrigger-proxy", "15400")]
        {
            add_image(&node, name, user).await?;
        }
        let app = Image::new(APP)?.program(&sandbox::get().binary("e2e-app")?, "/bin/e2e-app")?;
        node.add(&app.entrypoint(["/bin/e2e-app"])).await?;
        let home = sandbox::get().work.join("helm");
        std::fs::create_dir_all(&home).context("making a home for Helm")?;
        let world = Self { node, _network: network, home };
        let start = Instant::now();
        world
            .helm(&[
                "install",
                "outrigger",
                &chart("outrigger"),
                "--namespace",
                MESH,
                "--create-namespace",
                "--wait",
            ])
            .await?;
        let took = start.elapsed().as_secs_f64();
        hold(&[Figure::at_most("helm install, until the control plane is ready", "s", INSTALLED, took)])?;
        apply(&world.client(), &shop()).await?;
        for name in ["orders", "web"] {
            world.rolled_out(SHOP, name).await?;
        }
        Ok(world)
    }

    /// A client that may everything.
    pub(crate) fn client(&self) -> Client {
        self.node.client()
    }

    /// Runs Helm as the administrator; what it printed.
    pub(crate) async fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(sandbox::get().tool("helm")?);
        command.args(arguments).arg("--kubeconfig").arg(self.node.cluster().kubeconfig());
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, &self.home);
        }
        self.node.host().output(command).await
    }

    /// Runs `kubectl`; what it printed.
    pub(crate) async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.node.kubectl(arguments.iter().copied()).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Waits until every replica of a Deployment is of its newest template and ready.
    pub(crate) async fn rolled_out(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
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
        .map(drop)
    }

    /// The pods of a label, those that are leaving left out.
    pub(crate) async fn pods(&self, namespace: &str, labels: &str) -> anyhow::Result<Vec<Pod>> {
        let pods = Api::<Pod>::namespaced(self.client(), namespace);
        let found = pods.list(&ListParams::default().labels(labels)).await?;
        Ok(found.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect())
    }

    /// The network namespace of a running pod, to act there as its application does.
    pub(crate) async fn inside(&self, pod: &Pod) -> anyhow::Result<Host> {
        let name = pod.name_any();
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let address = address.with_context(|| format!("{name} has no address"))?.parse()?;
        Host::with_address(&name, Path::new("/run/netns"), address).await
    }

    /// The first pod of `web` in the shop, as a host.
    pub(crate) async fn web(&self) -> anyhow::Result<Host> {
        let pods = self.pods(SHOP, "app=web").await?;
        let pod = pods.first().context("there is no pod of web")?;
        pod_ready(pod)?;
        self.inside(pod).await
    }

    /// Where a Service is dialled.
    pub(crate) async fn address(&self, namespace: &str, name: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let service = Api::<Service>::namespaced(self.client(), namespace).get(name).await?;
        let address = service.spec.and_then(|spec| spec.cluster_ip).context("a Service has an address")?;
        Ok(SocketAddr::new(address.parse()?, port))
    }
}

/// An image of this checkout: the one that `make image` made where it is there, else one of the binaries that the suites run.
async fn add_image(node: &Node, name: &str, user: &str) -> anyhow::Result<()> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/images/{name}.tar"));
    if std::env::var_os("OUTRIGGER_IMAGES").is_some() {
        ensure!(built.exists(), "{} is missing: run `make image`", built.display());
        return node.import(&built).await;
    }
    let path = format!("/{name}");
    let image = Image::new(&format!("localhost/{name}:{}", env!("CARGO_PKG_VERSION")))?
        .program(&sandbox::get().binary(name)?, &path)?
        .entrypoint([path.as_str()])
        .user(user);
    node.add(&image).await
}

/// A chart of this checkout.
pub(crate) fn chart(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts").join(name).display().to_string()
}

/// A client's namespace and a service with three replicas that serve five seconds after they were told to end.
fn shop() -> String {
    deployment("orders", 3, &["--http", "8080", "--reflect", "8081", "--echo", "9090", "--linger-ms", "5000"])
        + &deployment("web", 1, &["--http", "8080"])
}

/// A Deployment with its service account and Service, in the shop.
pub(crate) fn deployment(name: &str, replicas: u32, arguments: &[&str]) -> String {
    let arguments: Vec<String> = arguments.iter().map(|word| format!("{word:?}")).collect();
    let arguments = arguments.join(", ");
    format!(
        r"---
apiVersion: v1
kind: Namespace
metadata:
  name: {SHOP}
  labels: {{ outrigger.dev/inject: enabled }}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{ name: {name}, namespace: {SHOP} }}
---
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: {SHOP} }}
spec:
  selector: {{ app: {name} }}
  ports:
  - {{ name: http, port: 80, targetPort: 8080 }}
  - {{ name: reflect, port: 8081 }}
  - {{ name: bytes, port: 9090, appProtocol: tcp }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {name}, namespace: {SHOP} }}
spec:
  replicas: {replicas}
  strategy: {{ rollingUpdate: {{ maxUnavailable: 0, maxSurge: 1 }} }}
  selector: {{ matchLabels: {{ app: {name} }} }}
  template:
    metadata: {{ labels: {{ app: {name} }} }}
    spec:
      serviceAccountName: {name}
      automountServiceAccountToken: false
      containers:
      - name: app
        image: {APP}
        args: [--name, $(POD), {arguments}]
        env:
        - {{ name: POD, valueFrom: {{ fieldRef: {{ fieldPath: metadata.name }} }} }}
        ports:
        - {{ name: http, containerPort: 8080 }}
        readinessProbe: {{ httpGet: {{ path: /whoami, port: http }}, periodSeconds: 1 }}
"
    )
}

/// What the world's building has seen already, under a name of its own.
pub(crate) async fn installed(world: Arc<World>) -> anyhow::Result<()> {
    for name in ["outrigger-controller", "outrigger-injector"] {
        world.rolled_out(MESH, name).await?;
        for pod in
            world.pods(MESH, &format!("app.kubernetes.io/component={}", &name["outrigger-".len()..])).await?
        {
            pod_ready(&pod)?;
            let restarts: i32 = pod
                .status
                .iter()
                .flat_map(|status| status.container_statuses.iter().flatten())
                .map(|one| one.restart_count)
                .sum();
            ensure!(restarts == 0, "{} has restarted {restarts} times", pod.name_any());
        }
    }
    let listed = world.helm(&["status", "outrigger", "--namespace", MESH]).await?;
    ensure!(listed.contains("STATUS: deployed"), "{listed}");
    Ok(())
}

const KEPT: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: { name: kept, namespace: shop }
spec:
  targetRef: { kind: Service, name: orders }
  rules:
  - { name: nobody, action: Deny, to: [{ paths: [{ type: PathPrefix, value: /admin }] }] }
";

/// The last case: nothing is there for others.
pub(crate) async fn uninstalled(world: Arc<World>) -> anyhow::Result<()> {
    apply(&world.client(), KEPT).await?;
    world.helm(&["uninstall", "outrigger", "--namespace", MESH, "--wait"]).await?;
    let hooks = world.kubectl(&["get", "mutatingwebhookconfigurations", "-o", "name"]).await?;
    ensure!(!hooks.contains("outrigger"), "{hooks}");
    let policies = world.kubectl(&["get", "accesspolicies", "-n", SHOP, "-o", "name"]).await?;
    ensure!(policies.contains("accesspolicy.outrigger.dev/kept"), "{policies:?}");
    // A labelled namespace is a namespace like any other now.
    world.kubectl(&["rollout", "restart", "deployment/web", "-n", SHOP]).await?;
    world.rolled_out(SHOP, "web").await?;
    let pods = world.pods(SHOP, "app=web").await?;
    ensure!(pods.iter().all(|pod| !is_injected(pod)), "a pod was injected by nobody");
    // And back: what was kept is taken over.
    world.helm(&["install", "outrigger", &chart("outrigger"), "--namespace", MESH, "--wait"]).await?;
    let policies = world.kubectl(&["get", "accesspolicies", "-n", SHOP, "-o", "name"]).await?;
    ensure!(policies.contains("accesspolicy.outrigger.dev/kept"), "{policies:?}");
    world.kubectl(&["rollout", "restart", "deployment/web", "-n", SHOP]).await?;
    world.rolled_out(SHOP, "web").await?;
    wait_until(LIMIT, "a pod with a sidecar again", || async {
        let pods = world.pods(SHOP, "app=web").await?;
        ensure!(!pods.is_empty() && pods.iter().all(is_injected), "not injected");
        Ok(())
    })
    .await
}

/// Whether a pod has our sidecar.
pub(crate) fn is_injected(pod: &Pod) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    containers.into_iter().any(|container| container.name == "outrigger-proxy")
}
