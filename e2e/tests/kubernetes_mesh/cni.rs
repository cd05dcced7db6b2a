//! Redirection by the node's CNI plugin: no pod needs a capability, none is left open, and the node is as before afterwards.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use outrigger_e2e::client;
use outrigger_e2e::kubernetes::node::{APP, CNI_CONFIG, LIMIT, chart};
use outrigger_e2e::kubernetes::{apply, gone, pod_ready, wait_for};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;
use serde_json::Value;

use crate::world::{MESH, SHOP, World, is_injected};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case(
        "with the CNI plugin restricted pods are in the mesh, and its removal restores the node",
        plugin,
    )]
}

/// Meets Pod Security `restricted`, by itself and with what the injector adds.
fn modest() -> String {
    format!(
        r"---
apiVersion: v1
kind: Namespace
metadata:
  name: modest
  labels: {{ outrigger.dev/inject: enabled, pod-security.kubernetes.io/enforce: restricted }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: app, namespace: modest }}
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

async fn upgrade(world: &World, more: &[&str]) -> anyhow::Result<()> {
    let chart = chart("outrigger");
    let arguments = ["upgrade", "outrigger", &chart, "--namespace", MESH, "--reset-values", "--wait"];
    world.node.helm(&[&arguments[..], more].concat()).await.map(drop)
}

async fn plugin(world: Arc<World>) -> anyhow::Result<()> {
    let before = configuration()?;
    let profile = format!("{}/profiles/cni.yaml", chart("outrigger"));
    // The programs that the suites run are three times as large as released ones, and the folder of plugins lies in memory here.
    let room = "cni.resources.limits.memory=256Mi";
    upgrade(&world, &["--values", &profile, "--set", room]).await?;
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
    wait_until(LIMIT, "a pod to be let in", || async { apply(&world.node.client(), &modest()).await })
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

    upgrade(&world, &[]).await?;
    wait_until(LIMIT, "the node's configuration to be restored", || async {
        let now = configuration()?;
        ensure!(now == before, "it is {now:?}, and was {before:?}");
        Ok(())
    })
    .await
}
