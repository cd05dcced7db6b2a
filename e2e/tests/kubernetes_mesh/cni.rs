//! Redirection by the node's CNI plugin: no pod needs a capability, none is left open, and the node is as before afterwards.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use outrigger_e2e::kubernetes::node::{CNI_CONFIG, LIMIT};
use outrigger_e2e::kubernetes::{apply, gone, pod_ready, wait_for};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;
use outrigger_e2e::{chart, client};
use serde_json::Value;

use crate::world::{SHOP, World, is_injected, restricted};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case(
        "with the CNI plugin restricted pods are in the mesh, and its removal restores the node",
        plugin,
    )]
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

    world.node.upgrade(&["--reset-values"]).await?;
    wait_until(LIMIT, "the node's configuration to be restored", || async {
        let now = configuration()?;
        ensure!(now == before, "it is {now:?}, and was {before:?}");
        Ok(())
    })
    .await
}
