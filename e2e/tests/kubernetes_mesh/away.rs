//! Parts of the control plane are away.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use outrigger_e2e::client;
use outrigger_e2e::kubernetes::node::{APP, LIMIT};
use outrigger_e2e::kubernetes::{apply, delete, pod_ready, wait_for};
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::suite::{Case, case, length};
use outrigger_e2e::wait::wait_until;

use crate::world::{MESH, SHOP, World, is_injected};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case(
            "without the injector labelled namespaces refuse pods, and say why; others notice nothing",
            injector,
        ),
        case("without the controller traffic flows, and new pods wait", controller),
        case("a policy's status counts the proxies of every controller", several),
    ]
}

fn pod(name: &str, namespace: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: {namespace}, labels: {{ case: away }} }}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: {APP}
    args: [--http, "8080"]
    readinessProbe: {{ httpGet: {{ path: /whoami, port: 8080 }}, periodSeconds: 1 }}
"#
    )
}

async fn scale(world: &World, name: &str, replicas: u32) -> anyhow::Result<()> {
    world
        .node
        .kubectl(&["scale", &format!("deployment/{name}"), "-n", MESH, &format!("--replicas={replicas}")])
        .await?;
    world.node.rolled_out(MESH, name).await?;
    let component = format!("app.kubernetes.io/component={}", &name["outrigger-".len()..]);
    // A pod that was told to end still serves whoever is on the way.
    wait_until(LIMIT, "the pods to be gone", || async {
        let left = world.node.kubectl(&["get", "pods", "-n", MESH, "-l", &component, "-o", "name"]).await?;
        ensure!(left.lines().count() == replicas as usize, "{left}");
        Ok(())
    })
    .await
}

async fn injector(world: Arc<World>) -> anyhow::Result<()> {
    scale(&world, "outrigger-injector", 0).await?;
    let refused =
        apply(&world.node.client(), &pod("labelled", SHOP)).await.err().context("a pod was let in")?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("outrigger"), "the refusal does not say whose it is: {refused}");
    println!("refused: {refused}");
    apply(&world.node.client(), &pod("other", "default")).await?;
    let pods = Api::<Pod>::namespaced(world.node.client(), "default");
    wait_for(&pods, "other", LIMIT, "ready", pod_ready).await?;
    delete(&world.node.client(), &pod("other", "default")).await?;
    scale(&world, "outrigger-injector", 1).await?;
    apply(&world.node.client(), &pod("labelled", SHOP)).await?;
    let pods = Api::<Pod>::namespaced(world.node.client(), SHOP);
    wait_for(&pods, "labelled", LIMIT, "ready", pod_ready).await?;
    ensure!(is_injected(&pods.get("labelled").await?));
    delete(&world.node.client(), &pod("labelled", SHOP)).await
}

async fn controller(world: Arc<World>) -> anyhow::Result<()> {
    let web = world.web().await?;
    let target = world.node.service(SHOP, "orders", 80).await?;
    let load = Load::start(&web, Plan::new(200, target, "orders", "/whoami"));
    scale(&world, "outrigger-controller", 0).await?;
    apply(&world.node.client(), &pod("waits", SHOP)).await?;
    let pods = Api::<Pod>::namespaced(world.node.client(), SHOP);
    let running = wait_for(&pods, "waits", LIMIT, "its sidecar to run", |pod| {
        let status =
            pod.status.as_ref().and_then(|status| status.init_container_statuses.clone()).unwrap_or_default();
        let proxy = status.iter().find(|one| one.name == "outrigger-proxy").context("no sidecar")?;
        ensure!(proxy.state.as_ref().is_some_and(|state| state.running.is_some()), "{proxy:?}");
        Ok(())
    })
    .await;
    running?;
    tokio::time::sleep(length(5, 60)).await;
    ensure!(pod_ready(&pods.get("waits").await?).is_err(), "a pod without an identity is ready");
    scale(&world, "outrigger-controller", 1).await?;
    wait_for(&pods, "waits", LIMIT, "ready", pod_ready).await?;
    let outcome = load.stop().await?;
    println!("without the controller: {outcome}");
    ensure!(outcome.failed() == 0, "failed requests: {:?}", outcome.failures);
    delete(&world.node.client(), &pod("waits", SHOP)).await?;
    Ok(())
}

const EVERYWHERE: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: { name: everywhere, namespace: shop }
spec:
  targetRef: { kind: Namespace }
  rules: [{ action: Deny, to: [{ paths: [{ type: Exact, value: /never }] }] }]
";

/// The discovery streams of each controller.
async fn streams(world: &World) -> anyhow::Result<Vec<u32>> {
    let mut counts = Vec::new();
    for pod in world.node.pods(MESH, "app.kubernetes.io/component=controller").await? {
        let address = pod.status.and_then(|status| status.pod_ip).context("a controller has no address")?;
        let address = format!("{address}:15490").parse()?;
        let reply = world.node.host().run(move || client::get(address, "localhost", "/metrics")).await?;
        let metrics = reply.expect(200)?.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("outrigger_ads_streams "));
        counts.push(line.context("there is no such metric")?.parse()?);
    }
    Ok(counts)
}

async fn several(world: Arc<World>) -> anyhow::Result<()> {
    scale(&world, "outrigger-controller", 3).await?;
    // Proxies stay with the controller that they have: only new ones are spread, and by chance.
    for _ in 0..5 {
        if streams(&world).await?.iter().filter(|streams| **streams > 0).count() > 1 {
            break;
        }
        world.node.kubectl(&["rollout", "restart", "deployment/orders", "-n", SHOP]).await?;
        world.node.rolled_out(SHOP, "orders").await?;
    }
    apply(&world.node.client(), EVERYWHERE).await?;
    let spread = wait_until(LIMIT, "the status to count every proxy", || async {
        let pods = world.node.pods(SHOP, "outrigger.dev/injected=true").await?;
        let text = world.node.kubectl(&["get", "accesspolicy/everywhere", "-n", SHOP, "-o", "json"]).await?;
        let object: serde_json::Value = serde_json::from_str(&text)?;
        let counts = &object["status"]["proxies"];
        let all = pods.len();
        ensure!(counts["on"] == all && counts["accepted"] == all, "{counts}, of {all}");
        streams(&world).await
    })
    .await?;
    println!("streams of the controllers: {spread:?}");
    ensure!(spread.iter().filter(|streams| **streams > 0).count() > 1, "one has all: {spread:?}");
    delete(&world.node.client(), EVERYWHERE).await?;
    scale(&world, "outrigger-controller", 1).await
}
