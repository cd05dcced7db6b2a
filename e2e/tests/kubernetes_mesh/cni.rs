//! Redirection by the node's CNI plugin: no pod needs a capability, none is left open, and the node is as before afterwards.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outrigger_e2e::figures::{Figure, record};
use outrigger_e2e::kubernetes::node::{APP, CNI_CONFIG, LIMIT};
use outrigger_e2e::kubernetes::{apply, delete, gone, pod_ready, wait_for};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;
use outrigger_e2e::{chart, client};
use serde_json::Value;

use crate::world::{MESH, SHOP, World, is_injected, restricted};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case(
        "with the CNI plugin restricted pods are in the mesh, missed ones are replaced, and its removal restores the node",
        plugin,
    )]
}

/// The pods of a ReplicaSet bear this label.
const MISSED: &str = "app=missed";

fn missed() -> String {
    format!(
        r"
apiVersion: apps/v1
kind: ReplicaSet
metadata: {{ name: missed, namespace: {SHOP} }}
spec:
  replicas: 1
  selector: {{ matchLabels: {{ app: missed }} }}
  template:
    metadata: {{ labels: {{ app: missed }} }}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {{ name: app, image: {APP}, args: [--http, '8080'] }}
"
    )
}

/// Every file of the node's CNI configuration; how it is laid out says nothing.
fn configuration() -> anyhow::Result<Vec<(String, Value)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(CNI_CONFIG).with_context(|| format!("reading {CNI_CONFIG}"))? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let content = serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        files.push((path.display().to_string(), content));
    }
    files.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(files)
}

/// The processes of the node's agent.
fn agents() -> anyhow::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let id = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        // One that has ended meanwhile is none.
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        if let Some(id) = id
            && line.starts_with(b"/outrigger-proxy\0cni\0agent\0--bin-dir")
        {
            found.push(Pid::from_raw(id));
        }
    }
    Ok(found)
}

/// A node that comes back starts pods before its agent: here the agent is stopped while the node's configuration is what it was
/// before.
async fn missed_pod(world: &World, before: &[(String, Value)]) -> anyhow::Result<()> {
    let agents = agents()?;
    ensure!(agents.len() == 1, "agents: {agents:?}");
    let signal = |signal| agents.iter().try_for_each(|agent| kill(*agent, signal));
    signal(Signal::SIGSTOP)?;
    for (path, content) in before {
        std::fs::write(path, serde_json::to_string_pretty(content)?)?;
    }
    apply(&world.node.client(), &missed()).await?;
    let first = wait_until(LIMIT, "a pod to be held", || async {
        let pods = world.node.pods(SHOP, MISSED).await?;
        let pod = pods.into_iter().next().context("no pod yet")?;
        let checks = pod.status.iter().flat_map(|status| status.init_container_statuses.iter().flatten());
        let failed = checks.filter(|status| status.name == "outrigger-check" && status.restart_count > 0);
        ensure!(failed.count() == 1, "it is not held: {:?}", pod.status);
        Ok(pod.metadata.uid)
    })
    .await?;
    wait_until(LIMIT, "the agent not to be ready", || async {
        let pods = world.node.pods(MESH, "app.kubernetes.io/component=cni").await?;
        ensure!(pods.len() == 1 && pods.iter().all(|pod| pod_ready(pod).is_err()), "it is ready");
        Ok(())
    })
    .await?;
    signal(Signal::SIGCONT)?;
    let since = Instant::now();
    wait_until(LIMIT, "another pod to take its place", || async {
        let pods = world.node.pods(SHOP, MISSED).await?;
        let other =
            pods.iter().find(|pod| pod.metadata.uid != first).context("the first pod is still there")?;
        pod_ready(other)
    })
    .await?;
    record(&[Figure::info(
        "a pod that the plugin missed: until another is ready",
        "s",
        since.elapsed().as_secs_f64(),
    )])?;
    delete(&world.node.client(), &missed()).await
}

async fn plugin(world: Arc<World>) -> anyhow::Result<()> {
    let before = configuration()?;
    let profile = chart::profile("cni").display().to_string();
    // The programs that the suites run are three times as large as released ones, and the folder of plugins lies in memory here.
    let room = "cni.resources.limits.memory=256Mi";
    world.node.upgrade(&["--reset-values", "--values", &profile, "--set", room]).await?;
    wait_until(LIMIT, "the plugin to be installed", || async {
        let with = configuration()?;
        ensure!(
            with.iter().any(|(_, text)| text.to_string().contains("outrigger-cni")),
            "it is not in {with:?}"
        );
        Ok(())
    })
    .await?;

    // An injector of the old mode still answers for a moment, on the connections that it has.
    wait_until(LIMIT, "a pod to be let in", || async {
        apply(&world.node.client(), &restricted("modest")).await
    })
    .await?;
    let pods = Api::<Pod>::namespaced(world.node.client(), "modest");
    wait_for(&pods, "app", LIMIT, "ready", pod_ready).await?;
    let pod = pods.get("app").await?;
    ensure!(is_injected(&pod), "it was not injected");
    let text = serde_json::to_string(&pod.spec)?;
    ensure!(!text.contains("NET_ADMIN"), "it has a capability: {text}");
    let inside = world.node.inside(&pod).await?;
    let at = world.node.service(SHOP, "orders", 8081).await?;
    let seen = wait_until(LIMIT, "a call through the mesh", || async {
        inside.run(move || client::get(at, "orders:8081", "/")).await?.expect(200)
    })
    .await?
    .text();
    ensure!(seen.contains("spiffe://outrigger.local/ns/modest/sa/default"), "no identity: {seen}");
    world.node.kubectl(&["delete", "namespace", "modest"]).await?;
    gone(&pods, "app", LIMIT).await?;
    missed_pod(&world, &before).await?;

    world.node.upgrade(&["--reset-values"]).await?;
    wait_until(LIMIT, "the node's configuration to be restored", || async {
        let now = configuration()?;
        ensure!(now == before, "it is {now:?}, and was {before:?}");
        Ok(())
    })
    .await
}
