//! What one pod's call to another is: authenticated at both ends, encrypted between them, and refused with a reason.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kube::ResourceExt as _;
use outrigger_e2e::capture::Capture;
use outrigger_e2e::client;
use outrigger_e2e::kubernetes::node::LIMIT;
use outrigger_e2e::kubernetes::{apply, delete};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;

use crate::world::{MESH, SHOP, World, deployment, is_injected};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("pods of a labelled namespace have sidecars, and say who they are", identities),
        case("a name of the cluster is dialled as without a mesh", names),
        case("no byte of a call is in clear between pods", wire),
        case("a pod without a sidecar is called and calls, in clear", outside_the_mesh),
        case("a pod's own address leads to that pod", own_address),
        case("kubectl is told what no schema sees of a policy", bad_policy),
        case("an AccessPolicy by kubectl denies one edge and says why", access_policy),
        case("probes pass under deny by default", probes),
    ]
}

/// What the application of `orders` saw of a call from `web`.
async fn reflected(world: &World) -> anyhow::Result<String> {
    let web = world.web().await?;
    let at = world.node.service(SHOP, "orders", 8081).await?;
    let reply = web.run(move || client::get(at, "orders:8081", "/")).await?.expect(200)?;
    Ok(reply.text())
}

async fn identities(world: Arc<World>) -> anyhow::Result<()> {
    for pod in world.node.pods(SHOP, "").await? {
        ensure!(is_injected(&pod), "{} was not injected", pod.name_any());
    }
    let seen = wait_until(LIMIT, "a call", || reflected(&world)).await?;
    let caller = r#"["outrigger-client-id","spiffe://outrigger.local/ns/shop/sa/web"]"#;
    ensure!(seen.contains(caller), "the application saw no {caller}:\n{seen}");
    Ok(())
}

async fn names(world: Arc<World>) -> anyhow::Result<()> {
    let web = world.web().await?;
    for name in ["orders.shop.svc.cluster.local", "orders.shop.mesh"] {
        let addresses = web.run(move || client::look_up(name, 80)).await?;
        let at = *addresses.first().with_context(|| format!("{name} has no address"))?;
        web.run(move || client::get(at, name, "/whoami")).await?.expect(200)?;
    }
    Ok(())
}

async fn wire(world: Arc<World>) -> anyhow::Result<()> {
    const SECRET: &str = "no-eye-shall-see-this-4711";
    let web = world.web().await?;
    let at = world.node.service(SHOP, "orders", 8081).await?;
    let capture = Capture::on(world.node.host()).await?;
    let path = format!("/{SECRET}");
    let reply =
        web.run(move || async move { client::get(at, "orders:8081", &path).await }).await?.expect(200)?;
    ensure!(reply.text().contains(SECRET), "the application has not seen the path");
    let captured = capture.stop().await?;
    ensure!(!captured.contains(SECRET.as_bytes()), "the path went over the wire in clear");
    // The control: without sidecars it would have been seen.
    let pods = world.node.pods(MESH, "app.kubernetes.io/component=controller").await?;
    let controller: IpAddr = address_of(pods.first().context("a controller")?)?;
    let capture = Capture::on(world.node.host()).await?;
    let path = format!("/{SECRET}");
    let outside = world.node.host().clone();
    let at = (controller, 15490).into();
    outside.run(move || async move { client::get(at, "controller", &path).await }).await?;
    ensure!(capture.stop().await?.contains(SECRET.as_bytes()), "the capture sees nothing");
    Ok(())
}

fn address_of(pod: &k8s_openapi::api::core::v1::Pod) -> anyhow::Result<IpAddr> {
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref());
    Ok(address.with_context(|| format!("{} has no address", pod.name_any()))?.parse()?)
}

async fn outside_the_mesh(world: Arc<World>) -> anyhow::Result<()> {
    let plain = deployment("plain", 1, &["--http", "8080"])
        .replace(SHOP, "plain")
        .replace("outrigger.dev/inject: enabled", "");
    apply(&world.node.client(), &plain).await?;
    world.node.rolled_out("plain", "plain").await?;
    let pods = world.node.pods("plain", "app=plain").await?;
    let pod = pods.first().context("a pod without a sidecar")?;
    ensure!(!is_injected(pod), "a pod that nobody asked for was injected");
    let (web, outsider) = (world.web().await?, world.node.inside(pod).await?);
    let (theirs, ours) =
        (world.node.service("plain", "plain", 80).await?, world.node.service(SHOP, "orders", 8081).await?);
    wait_until(LIMIT, "an answer from outside the mesh", || async {
        web.run(move || client::get(theirs, "plain", "/whoami")).await?.expect(200)
    })
    .await?;
    // Permissive is the default in a cluster: workloads move in one by one.
    let seen = outsider.run(move || client::get(ours, "orders:8081", "/")).await?.expect(200)?.text();
    ensure!(!seen.contains("outrigger-client-id"), "a caller without an identity has one:\n{seen}");
    delete(&world.node.client(), &plain).await
}

async fn own_address(world: Arc<World>) -> anyhow::Result<()> {
    let web = world.web().await?;
    for pod in world.node.pods(SHOP, "app=orders").await? {
        let address = address_of(&pod)?;
        // The port of the Service's target, and one that no Service has.
        let reply =
            web.run(move || client::get((address, 8080).into(), "orders", "/whoami")).await?.expect(200)?;
        ensure!(reply.text().contains(&pod.name_any()), "{} answered at {address}", reply.text());
    }
    Ok(())
}

async fn bad_policy(world: Arc<World>) -> anyhow::Result<()> {
    let bad = DENY.replace("type: PathPrefix, value: /secret", "type: RegularExpression, value: 'a('");
    let refused = apply(&world.node.client(), &bad).await.err().context("a bad expression was taken")?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("spec.rules[0].to[0].paths[0]"), "{refused}");
    Ok(())
}

const DENY: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: { name: no-reflection, namespace: shop }
spec:
  targetRef: { kind: Service, name: orders }
  rules:
  - name: web-may-not
    action: Deny
    from: [{ serviceAccounts: [shop/web] }]
    to: [{ paths: [{ type: PathPrefix, value: /secret }] }]
";

async fn access_policy(world: Arc<World>) -> anyhow::Result<()> {
    let web = world.web().await?;
    let at = world.node.service(SHOP, "orders", 8081).await?;
    let ask = |path: &'static str| web.run(move || client::get(at, "orders:8081", path));
    ask("/secret").await?.expect(200)?;
    apply(&world.node.client(), DENY).await?;
    let refused = wait_until(Duration::from_secs(10), "the policy to hold", || async {
        ask("/secret").await?.expect(403)
    })
    .await?;
    let reason = refused.reason().context("a refusal has a reason")?;
    ensure!(reason.contains("shop/no-reflection") && reason.contains("web-may-not"), "{reason}");
    ask("/open").await?.expect(200)?;
    let shown = wait_until(LIMIT, "a status", || async {
        let shown =
            world.node.kubectl(&["get", "accesspolicy", "no-reflection", "-n", SHOP, "-o", "yaml"]).await?;
        ensure!(shown.contains("type: Accepted") && shown.contains("observedGeneration"), "{shown}");
        Ok(shown)
    })
    .await?;
    ensure!(shown.contains("status: \"True\""), "{shown}");
    delete(&world.node.client(), DENY).await?;
    wait_until(Duration::from_secs(10), "the policy to be gone", || async {
        ask("/secret").await?.expect(200)
    })
    .await?;
    Ok(())
}

const DENY_ALL: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: { name: default, namespace: shop }
spec: { inbound: Deny, mtls: Strict }
";

/// The kubelet's probes have no identity: a pod that is started under deny by default must become ready, and nobody else
/// may come in.
async fn probes(world: Arc<World>) -> anyhow::Result<()> {
    apply(&world.node.client(), DENY_ALL).await?;
    let web = world.web().await?;
    let at = world.node.service(SHOP, "orders", 80).await?;
    wait_until(Duration::from_secs(10), "callers to be denied", || async {
        web.run(move || client::get(at, "orders", "/")).await?.expect(403)
    })
    .await?;
    world.node.kubectl(&["rollout", "restart", "deployment/orders", "-n", SHOP]).await?;
    world.node.rolled_out(SHOP, "orders").await?;
    delete(&world.node.client(), DENY_ALL).await?;
    wait_until(Duration::from_secs(10), "callers to be let in", || async {
        web.run(move || client::get(at, "orders", "/whoami")).await?.expect(200)
    })
    .await
    .map(drop)
}
