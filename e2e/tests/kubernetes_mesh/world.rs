//! A node with the mesh installed by its chart.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use outrigger_e2e::chart;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::kubernetes::node::{APP, LIMIT, Node};
use outrigger_e2e::kubernetes::{apply, pod_ready};
use outrigger_e2e::network::{Host, Network};
use outrigger_e2e::wait::wait_until;

/// The namespace of the mesh.
pub(crate) const MESH: &str = chart::NAMESPACE;
/// The namespace of the sample applications.
pub(crate) const SHOP: &str = "shop";
/// Seconds from `helm install` until the control plane is ready.
const INSTALLED: f64 = 60.0;

/// See the module.
pub(crate) struct World {
    /// The node, and the cluster that it is all of.
    pub(crate) node: Node,
    _network: Network,
}

impl World {
    /// Starts the node, gives it the images, and installs the chart.
    pub(crate) async fn build() -> anyhow::Result<Self> {
        let (node, network) = Node::with_mesh().await?;
        let world = Self { node, _network: network };
        world.node.add_gateway_api().await?;
        let start = Instant::now();
        world.node.install().await?;
        let took = start.elapsed().as_secs_f64();
        hold(&[Figure::at_most("helm install, until the control plane is ready", "s", INSTALLED, took)])?;
        apply(&world.node.client(), &shop()).await?;
        for name in ["orders", "web"] {
            world.node.rolled_out(SHOP, name).await?;
        }
        Ok(world)
    }

    /// The first pod of `web` in the shop, as a host.
    pub(crate) async fn web(&self) -> anyhow::Result<Host> {
        let pods = self.node.pods(SHOP, "app=web").await?;
        let pod = pods.first().context("there is no pod of web")?;
        pod_ready(pod)?;
        self.node.inside(pod).await
    }
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
        world.node.rolled_out(MESH, name).await?;
        for pod in world
            .node
            .pods(MESH, &format!("app.kubernetes.io/component={}", &name["outrigger-".len()..]))
            .await?
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
    let listed = world.node.helm(&["status", "outrigger"]).await?;
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
    apply(&world.node.client(), KEPT).await?;
    world.node.helm(&["uninstall", "outrigger", "--wait"]).await?;
    let hooks = world.node.kubectl(&["get", "mutatingwebhookconfigurations", "-o", "name"]).await?;
    ensure!(!hooks.contains("outrigger"), "{hooks}");
    let policies = world.node.kubectl(&["get", "accesspolicies", "-n", SHOP, "-o", "name"]).await?;
    ensure!(policies.contains("accesspolicy.outrigger.dev/kept"), "{policies:?}");
    // A labelled namespace is a namespace like any other now.
    world.node.kubectl(&["rollout", "restart", "deployment/web", "-n", SHOP]).await?;
    world.node.rolled_out(SHOP, "web").await?;
    let pods = world.node.pods(SHOP, "app=web").await?;
    ensure!(pods.iter().all(|pod| !is_injected(pod)), "a pod was injected by nobody");
    // And back: what was kept is taken over.
    world.node.install().await?;
    let policies = world.node.kubectl(&["get", "accesspolicies", "-n", SHOP, "-o", "name"]).await?;
    ensure!(policies.contains("accesspolicy.outrigger.dev/kept"), "{policies:?}");
    world.node.kubectl(&["rollout", "restart", "deployment/web", "-n", SHOP]).await?;
    world.node.rolled_out(SHOP, "web").await?;
    wait_until(LIMIT, "a pod with a sidecar again", || async {
        let pods = world.node.pods(SHOP, "app=web").await?;
        ensure!(!pods.is_empty() && pods.iter().all(is_injected), "not injected");
        Ok(())
    })
    .await
}

/// A namespace that is let in and permits `restricted` pods alone, with one that is so modest by itself.
pub(crate) fn restricted(namespace: &str) -> String {
    format!(
        r"---
apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels: {{ outrigger.dev/inject: enabled, pod-security.kubernetes.io/enforce: restricted }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: app, namespace: {namespace} }}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: {APP}
    args: [--http, '8080']
    securityContext:
      runAsNonRoot: true
      runAsUser: 1000
      allowPrivilegeEscalation: false
      capabilities: {{ drop: [ALL] }}
      seccompProfile: {{ type: RuntimeDefault }}
"
    )
}

/// Whether a pod has our sidecar.
pub(crate) fn is_injected(pod: &Pod) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    containers.into_iter().any(|container| container.name == "outrigger-proxy")
}
