//! Kinds of pods that are easily broken by a sidecar.

use std::sync::Arc;

use anyhow::ensure;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use outrigger_e2e::kubernetes::node::{APP, LIMIT};
use outrigger_e2e::kubernetes::{apply, delete, gone, pod_ready, wait_for};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;

use crate::world::{SHOP, World, is_injected, restricted};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("a Job with a sidecar completes", job),
        case("an init container of the application's own uses the mesh", init_container),
        case("a pod opts in alone, and another one out", opting),
        case("a pod of the node's network is left alone, and an event says why", host_network),
        case("a tcpSocket probe sees whether the application listens", closed_port),
        case("a restricted namespace is told what to do", not_permitted),
    ]
}

/// The command line's image has a client: `demo-load` ends by itself where it is told a number.
async fn job(world: Arc<World>) -> anyhow::Result<()> {
    let yaml = format!(
        r"
apiVersion: batch/v1
kind: Job
metadata: {{ name: once, namespace: {SHOP} }}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      serviceAccountName: web
      containers:
      - name: once
        image: {}
        args: [schema, AccessPolicy]
",
        cli()
    );
    apply(&world.node.client(), &yaml).await?;
    let jobs = Api::<Job>::namespaced(world.node.client(), SHOP);
    wait_for(&jobs, "once", LIMIT, "to complete", |job| {
        let status = job.status.clone().unwrap_or_default();
        ensure!(status.failed.unwrap_or_default() == 0, "it failed: {status:?}");
        ensure!(status.succeeded == Some(1), "{status:?}");
        Ok(())
    })
    .await?;
    let pods = world.node.pods(SHOP, "job-name=once").await?;
    ensure!(pods.iter().all(is_injected), "it had no sidecar");
    delete(&world.node.client(), &yaml).await
}

fn cli() -> String {
    format!("localhost/outrigger:{}", env!("CARGO_PKG_VERSION"))
}

/// The init container ends only once `orders` has answered through the mesh.
async fn init_container(world: Arc<World>) -> anyhow::Result<()> {
    let yaml = format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: early, namespace: {SHOP} }}
spec:
  serviceAccountName: web
  terminationGracePeriodSeconds: 1
  initContainers:
  - name: ask
    image: {}
    args: [demo-load, --to, "orders:80", --rate, "5", --requests, "5"]
  containers:
  - {{ name: app, image: {APP}, args: [--http, "8080"] }}
"#,
        cli()
    );
    apply(&world.node.client(), &yaml).await?;
    let pods = Api::<Pod>::namespaced(world.node.client(), SHOP);
    wait_for(&pods, "early", LIMIT, "ready", pod_ready).await?;
    delete(&world.node.client(), &yaml).await
}

async fn opting(world: Arc<World>) -> anyhow::Result<()> {
    let pod = |name: &str, namespace: &str, label: &str| {
        format!(
            r#"---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: {namespace}, labels: {{ outrigger.dev/inject: {label} }} }}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {{ name: app, image: {APP}, args: [--http, "8080"] }}
"#
        )
    };
    let yaml = pod("in", "default", "enabled") + &pod("out", SHOP, "disabled");
    apply(&world.node.client(), &yaml).await?;
    for (namespace, name, injected) in [("default", "in", true), (SHOP, "out", false)] {
        let pods = Api::<Pod>::namespaced(world.node.client(), namespace);
        let ready = wait_for(&pods, name, LIMIT, "ready", pod_ready).await;
        ready?;
        ensure!(is_injected(&pods.get(name).await?) == injected, "{name} in {namespace}: not {injected}");
    }
    delete(&world.node.client(), &yaml).await
}

async fn host_network(world: Arc<World>) -> anyhow::Result<()> {
    let yaml = format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: of-the-node, namespace: {SHOP} }}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers:
  - {{ name: app, image: {APP}, args: [--http, "18080"] }}
"#
    );
    // An event that happens again is counted in the one that is there.
    for _ in 0..2 {
        apply(&world.node.client(), &yaml).await?;
        let pods = Api::<Pod>::namespaced(world.node.client(), SHOP);
        wait_for(&pods, "of-the-node", LIMIT, "ready", pod_ready).await?;
        let pod = pods.get("of-the-node").await?;
        ensure!(!is_injected(&pod), "it was injected");
        let why = pod.metadata.annotations.unwrap_or_default().remove("outrigger.dev/skipped");
        ensure!(why.as_ref().is_some_and(|why| why.contains("hostNetwork")), "it is annotated {why:?}");
        delete(&world.node.client(), &yaml).await?;
        gone(&pods, "of-the-node", LIMIT).await?;
    }
    wait_until(LIMIT, "an event", || async {
        let events = world.node.kubectl(&["get", "events", "-n", SHOP]).await?;
        ensure!(events.contains("hostNetwork"), "{events}");
        Ok(())
    })
    .await
}

/// Of two pods alike, one is probed at the port of its application and the other at one on which nothing listens.
async fn closed_port(world: Arc<World>) -> anyhow::Result<()> {
    let pod = |name: &str, port: u16| {
        format!(
            r#"---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: {SHOP} }}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: {APP}
    args: [--http, "8080"]
    readinessProbe: {{ tcpSocket: {{ port: {port} }}, periodSeconds: 1 }}
"#
        )
    };
    let yaml = pod("listens", 8080) + &pod("deaf", 8079);
    apply(&world.node.client(), &yaml).await?;
    let pods = Api::<Pod>::namespaced(world.node.client(), SHOP);
    wait_for(&pods, "listens", LIMIT, "ready", pod_ready).await?;
    wait_until(LIMIT, "a refused probe", || async {
        let about = "involvedObject.name=deaf,reason=Unhealthy";
        let events = world.node.kubectl(&["get", "events", "-n", SHOP, "--field-selector", about]).await?;
        ensure!(events.contains("8079: connect: connection refused"), "{events}");
        Ok(())
    })
    .await?;
    let deaf = pods.get("deaf").await?;
    ensure!(is_injected(&deaf) && pod_ready(&deaf).is_err(), "it counts as ready: {:?}", deaf.status);
    delete(&world.node.client(), &yaml).await
}

async fn not_permitted(world: Arc<World>) -> anyhow::Result<()> {
    let refused = apply(&world.node.client(), &restricted("narrow")).await.err();
    let text = format!("{:#}", refused.unwrap_or_else(|| anyhow::anyhow!("it was let in")));
    ensure!(text.contains("cni.enabled"), "{text}");
    world.node.kubectl(&["delete", "namespace", "narrow"]).await?;
    Ok(())
}
