//! A node of the harness itself: what every suite that runs pods takes for granted.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use outrigger_e2e::client;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::kubernetes::images::Image;
use outrigger_e2e::kubernetes::node::Node;
use outrigger_e2e::kubernetes::{apply, delete, gone, pod_ready, wait_for};
use outrigger_e2e::network::Network;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;

/// Seconds from nothing to a node on which pods run and resolve names; 10 are usual.
const READY: f64 = 60.0;
const LIMIT: Duration = Duration::from_mins(1);
const APP: &str = "e2e.outrigger.dev/app:1";
const TOOLS: &str = "e2e.outrigger.dev/tools:1";

fn main() -> ExitCode {
    suite(
        "kubernetes_node",
        World::build,
        vec![
            case("pods run and are reached, over IPv4 and IPv6, by their own addresses", pods_run),
            case("a ClusterIP answers through kube-proxy, and cluster DNS knows its name", services),
            case("a native sidecar starts before the application and ends after it", native_sidecar),
            case("an init container with NET_ADMIN may change the pod's network", net_admin),
            case("Pod Security lets restricted pods run and refuses others", pod_security),
            case("a projected token has its audience", projected_token),
            case("memory and CPU limits are in the container's control group", limits),
            case("pods outlive a restart of the kubelet", kubelet_restart),
        ],
    )
}

struct World {
    node: tokio::sync::Mutex<Node>,
    network: Network,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let start = Instant::now();
        let node = Node::start(&network).await?;
        let took = start.elapsed().as_secs_f64();
        hold(&[Figure::at_most("a node, from nothing to cluster DNS at work", "s", READY, took)])?;
        let app = Image::new(APP)?.program(&sandbox::get().binary("e2e-app")?, "/bin/e2e-app")?;
        node.add(&app.entrypoint(["/bin/e2e-app"])).await?;
        let mut tools = Image::new(TOOLS)?;
        for program in [
            "/usr/bin/dash",
            "/usr/bin/curl",
            "/usr/bin/sleep",
            "/usr/bin/cat",
            "/usr/bin/id",
            "/usr/sbin/ip",
        ] {
            let name = Path::new(program).file_name().and_then(|name| name.to_str()).context("a name")?;
            tools = tools
                .program(Path::new(program), &format!("/bin/{}", if name == "dash" { "sh" } else { name }))?;
        }
        node.add(&tools.entrypoint(["/bin/sh", "-c"])).await?;
        apply(&node.client(), BASICS).await?;
        let deployments = Api::<Deployment>::namespaced(node.client(), "basics");
        wait_for(&deployments, "web", LIMIT, "two ready pods", |web| {
            let ready = web.status.as_ref().and_then(|status| status.ready_replicas);
            ensure!(ready == Some(2), "{ready:?} are");
            Ok(())
        })
        .await?;
        wait_for(&Api::<Pod>::namespaced(node.client(), "basics"), "shell", LIMIT, "ready", pod_ready)
            .await?;
        Ok(Self { node: tokio::sync::Mutex::new(node), network })
    }
}

const BASICS: &str = r#"
apiVersion: v1
kind: Namespace
metadata:
  name: basics
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: web, namespace: basics }
spec:
  replicas: 2
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      containers:
      - name: web
        image: e2e.outrigger.dev/app:1
        args: [--http, "8080", --name, $(POD)]
        env:
        - { name: POD, valueFrom: { fieldRef: { fieldPath: metadata.name } } }
        ports:
        - { name: http, containerPort: 8080 }
        readinessProbe: { httpGet: { path: /whoami, port: http }, periodSeconds: 1 }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: basics }
spec:
  ipFamilyPolicy: RequireDualStack
  selector: { app: web }
  ports:
  - { name: http, port: 80, targetPort: http }
---
apiVersion: v1
kind: Pod
metadata: { name: shell, namespace: basics }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - { name: shell, image: "e2e.outrigger.dev/tools:1", args: [sleep 3600] }
"#;

/// Asks a URL from the pod `shell`.
async fn curl(node: &Node, url: &str) -> anyhow::Result<String> {
    let command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", url];
    node.exec("basics", "shell", "shell", &command).await
}

async fn pods_run(world: Arc<World>) -> anyhow::Result<()> {
    let node = world.node.lock().await;
    let outside = world.network.host("outside").await?;
    node.reachable_from(&outside).await?;
    let pods = Api::<Pod>::namespaced(node.client(), "basics");
    let mut seen = 0;
    for pod in pods.list(&ListParams::default().labels("app=web")).await? {
        let name = pod.name_any();
        let addresses = pod.status.and_then(|status| status.pod_ips).context("a pod has addresses")?;
        ensure!(addresses.len() == 2, "{name} has {addresses:?}");
        for address in addresses {
            let address: std::net::IpAddr = address.ip.parse()?;
            let at = (address, 8080).into();
            let reply = outside.run(move || client::get(at, "web", "/whoami")).await?.expect(200)?;
            ensure!(reply.text().contains(&name), "{address} says {}, not {name}", reply.text());
            seen += 1;
        }
    }
    ensure!(seen == 4, "{seen} addresses were asked");
    Ok(())
}

async fn services(world: Arc<World>) -> anyhow::Result<()> {
    let node = world.node.lock().await;
    // kube-proxy and CoreDNS hear of a Service a moment after it has endpoints.
    for url in ["http://web/whoami", "http://web.basics.svc.cluster.local/whoami"] {
        wait_until(LIMIT, url, || curl(&node, url)).await?;
    }
    let services = Api::<k8s_openapi::api::core::v1::Service>::namespaced(node.client(), "basics");
    let addresses = services.get("web").await?.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
    ensure!(addresses.len() == 2, "the Service has {addresses:?}");
    for address in addresses {
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        let answered = RefCell::new(BTreeSet::new());
        let url = format!("http://{host}/whoami");
        wait_until(LIMIT, "both pods to answer", || {
            let answer = curl(&node, &url);
            async {
                let answer = answer.await?;
                let mut answered = answered.borrow_mut();
                answered.insert(answer);
                ensure!(answered.len() == 2, "{answered:?} answered");
                Ok(())
            }
        })
        .await
        .with_context(|| url.clone())?;
    }
    Ok(())
}

const SIDECAR: &str = r#"
apiVersion: v1
kind: Pod
metadata: { name: job, namespace: basics }
spec:
  restartPolicy: Never
  initContainers:
  - name: sidecar
    image: e2e.outrigger.dev/app:1
    restartPolicy: Always
    args: [--http, "8080", --name, sidecar]
    startupProbe: { httpGet: { path: /whoami, port: 8080 }, periodSeconds: 1 }
  - name: init
    image: e2e.outrigger.dev/tools:1
    args: ["curl --silent --fail http://127.0.0.1:8080/whoami"]
  containers:
  - name: application
    image: e2e.outrigger.dev/tools:1
    args: ["curl --silent --fail http://127.0.0.1:8080/whoami"]
"#;

async fn native_sidecar(world: Arc<World>) -> anyhow::Result<()> {
    let node = world.node.lock().await;
    let pods = Api::<Pod>::namespaced(node.client(), "basics");
    run_to_end(&node.client(), SIDECAR, "job").await?;
    let pod = pods.get("job").await?;
    let status = pod.status.context("the pod has a status")?;
    let of = |name: &str| {
        let inits = status.init_container_statuses.iter().flatten();
        let mut all = inits.chain(status.container_statuses.iter().flatten());
        let state = all.find(|one| one.name == name).and_then(|one| one.state.clone());
        state.and_then(|state| state.terminated).with_context(|| format!("{name} has not ended"))
    };
    let (sidecar, application) = (of("sidecar")?, of("application")?);
    ensure!(sidecar.started_at <= application.started_at, "{sidecar:?} after {application:?}");
    ensure!(sidecar.finished_at >= application.finished_at, "{sidecar:?} before {application:?}");
    for container in ["init", "application"] {
        let said = node.kubectl(&["logs", "-n", "basics", "job", "-c", container]).await?;
        ensure!(said.contains("sidecar"), "{container} was answered {said:?}");
    }
    delete(&node.client(), SIDECAR).await
}

const NET_ADMIN: &str = r#"
apiVersion: v1
kind: Pod
metadata: { name: network, namespace: basics }
spec:
  restartPolicy: Never
  initContainers:
  - name: change
    image: e2e.outrigger.dev/tools:1
    args: ["ip address add 192.0.2.7/32 dev lo"]
    securityContext: { runAsUser: 0, capabilities: { drop: [ALL], add: [NET_ADMIN] } }
  containers:
  - name: look
    image: e2e.outrigger.dev/tools:1
    args: ["id -u && ip address show dev lo && ! ip address add 192.0.2.8/32 dev lo"]
"#;

async fn net_admin(world: Arc<World>) -> anyhow::Result<()> {
    let node = world.node.lock().await;
    run_to_end(&node.client(), NET_ADMIN, "network").await?;
    let said = node.kubectl(&["logs", "-n", "basics", "network", "-c", "look"]).await?;
    ensure!(said.starts_with("65532\n"), "the application is not nobody: {said}");
    ensure!(said.contains("192.0.2.7/32"), "the address is missing: {said}");
    delete(&node.client(), NET_ADMIN).await
}

const RESTRICTED: &str = r#"
apiVersion: v1
kind: Namespace
metadata:
  name: restricted
  labels: { pod-security.kubernetes.io/enforce: restricted }
---
apiVersion: v1
kind: Pod
metadata: { name: modest, namespace: restricted }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: e2e.outrigger.dev/app:1
    args: [--http, "8080"]
    readinessProbe: { httpGet: { path: /whoami, port: 8080 }, periodSeconds: 1 }
    securityContext:
      runAsNonRoot: true
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: { drop: [ALL] }
      seccompProfile: { type: RuntimeDefault }
"#;

async fn pod_security(world: Arc<World>) -> anyhow::Result<()> {
    let client = world.node.lock().await.client();
    apply(&client, RESTRICTED).await?;
    let pods = Api::<Pod>::namespaced(client.clone(), "restricted");
    wait_for(&pods, "modest", LIMIT, "ready", pod_ready).await?;
    let greedy = NET_ADMIN.replace("namespace: basics", "namespace: restricted");
    let refused = apply(&client, &greedy).await.err().context("a pod with NET_ADMIN was let in")?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("violates PodSecurity") && refused.contains("restricted"), "{refused}");
    delete(&client, RESTRICTED).await
}

const PROJECTED: &str = r"
apiVersion: v1
kind: Pod
metadata: { name: token, namespace: basics }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: shell
    image: e2e.outrigger.dev/tools:1
    args: [sleep 3600]
    resources: { limits: { memory: 64Mi, cpu: 500m } }
    volumeMounts:
    - { name: token, mountPath: /var/run/secrets/outrigger, readOnly: true }
  volumes:
  - name: token
    projected:
      sources:
      - serviceAccountToken: { audience: outrigger, expirationSeconds: 3600, path: token }
";

async fn projected_token(world: Arc<World>) -> anyhow::Result<()> {
    use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
    let node = world.node.lock().await;
    apply(&node.client(), PROJECTED).await?;
    let pods = Api::<Pod>::namespaced(node.client(), "basics");
    wait_for(&pods, "token", LIMIT, "ready", pod_ready).await?;
    let token = node.exec("basics", "token", "shell", &["cat", "/var/run/secrets/outrigger/token"]).await?;
    let spec = TokenReviewSpec { token: Some(token), audiences: Some(vec!["outrigger".to_owned()]) };
    let review = TokenReview { spec, ..Default::default() };
    let review =
        Api::<TokenReview>::all(node.client()).create(&kube::api::PostParams::default(), &review).await?;
    let user = review.status.context("a review has a status")?.user.context("the token was refused")?;
    let pod = user.extra.and_then(|extra| extra.get("authentication.kubernetes.io/pod-name").cloned());
    ensure!(pod == Some(vec!["token".to_owned()]), "the token is bound to {pod:?}");
    Ok(())
}

async fn limits(world: Arc<World>) -> anyhow::Result<()> {
    let node = world.node.lock().await;
    apply(&node.client(), PROJECTED).await?;
    wait_for(&Api::<Pod>::namespaced(node.client(), "basics"), "token", LIMIT, "ready", pod_ready).await?;
    // As an application reads its own limits: version 2 of control groups, else version 1.
    let read = "cat /sys/fs/cgroup/memory.max 2>&1 || cat /sys/fs/cgroup/memory/memory.limit_in_bytes; \
                cat /sys/fs/cgroup/cpu.max 2>&1 || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us";
    let said = node.exec("basics", "token", "shell", &["sh", "-c", read]).await?;
    ensure!(said.contains("67108864") && said.contains("50000"), "the container sees {said}");
    delete(&node.client(), PROJECTED).await?;
    gone(&Api::<Pod>::namespaced(node.client(), "basics"), "token", LIMIT).await
}

async fn kubelet_restart(world: Arc<World>) -> anyhow::Result<()> {
    let mut node = world.node.lock().await;
    let pods = Api::<Pod>::namespaced(node.client(), "basics");
    let started = |pod: Pod| pod.status.and_then(|status| status.container_statuses);
    let before = started(pods.get("shell").await?).context("the pod has containers")?;
    node.restart_kubelet().await?;
    let answer = wait_until(LIMIT, "exec to work again", || curl(&node, "http://web/whoami")).await?;
    ensure!(answer.contains("web"), "{answer}");
    let after = started(pods.get("shell").await?).context("the pod has containers")?;
    ensure!(before[0].container_id == after[0].container_id, "the container is another one: {after:?}");
    Ok(())
}

/// Applies a pod and waits until it has ended well.
async fn run_to_end(client: &Client, yaml: &str, name: &str) -> anyhow::Result<()> {
    apply(client, yaml).await?;
    let pods = Api::<Pod>::namespaced(client.clone(), "basics");
    wait_for(&pods, name, LIMIT, "to succeed", |pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
        ensure!(phase == "Succeeded", "it is {phase}: {:?}", pod_ready(pod));
        Ok(())
    })
    .await
}
