//! Deployments that roll under load, and the mesh's own upgrade under load.

use std::sync::Arc;

use anyhow::ensure;
use outrigger_e2e::figures::{Figure, record};
use outrigger_e2e::kubernetes::{apply, delete};
use outrigger_e2e::load::{Call, Load, Outcome, Plan};
use outrigger_e2e::suite::{Case, case, is_soak};

use crate::world::{MESH, SHOP, World, deployment};

/// The tag of other images.
const REBUILT: &str = "rebuilt";
/// Requests a second.
const RATE: u32 = 500;

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case(
            "a Deployment rolls under load, HTTP/1.1, an application that serves 5 s after SIGTERM",
            |world| roll(world, Call::Http1),
        ),
        case("a Deployment rolls under load, gRPC, an application that serves 5 s after SIGTERM", |world| {
            roll(world, Call::Grpc)
        }),
        case("a Deployment rolls under load, an application that exits at once, retries", exits_at_once),
        case("helm upgrade to other values and to a rebuilt image, under load", upgrade),
    ]
}

/// Ten times at full length; each takes some 15 s.
fn times() -> usize {
    if is_soak() { 10 } else { 2 }
}

async fn roll(world: Arc<World>, call: Call) -> anyhow::Result<()> {
    let outcome = rolled(&world, "orders", call, times()).await?;
    report(&format!("rolling Deployment, {call:?}"), &outcome)?;
    ensure!(outcome.failed() == 0, "failed requests: {:?}", outcome.failures);
    Ok(())
}

async fn rolled(world: &World, name: &str, call: Call, times: usize) -> anyhow::Result<Outcome> {
    let web = world.web().await?;
    let target = world.node.service(SHOP, name, 80).await?;
    let path = if call == Call::Grpc { "/e2e.Test/Echo" } else { "/whoami" };
    let load = Load::start(&web, Plan::new(RATE, target, name, path).call(call));
    for _ in 0..times {
        world.node.kubectl(&["rollout", "restart", &format!("deployment/{name}"), "-n", SHOP]).await?;
        world.node.rolled_out(SHOP, name).await?;
    }
    let outcome = load.stop().await?;
    println!("{name} rolled {times} times, {call:?}: {outcome}");
    ensure!(outcome.total() > 1000, "only {} requests were sent", outcome.total());
    Ok(outcome)
}

const RETRIES: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: { name: hasty, namespace: shop }
spec:
  targetRef: { kind: Service, name: hasty }
  retry: { attempts: 3, on: [gateway-error, reset, connect-failure] }
";

async fn exits_at_once(world: Arc<World>) -> anyhow::Result<()> {
    let hasty = deployment("hasty", 3, &["--http", "8080"]);
    apply(&world.node.client(), &hasty).await?;
    world.node.rolled_out(SHOP, "hasty").await?;
    let without = rolled(&world, "hasty", Call::Http1, 1).await?;
    report("rolling Deployment, exits at once, no retries", &without)?;
    apply(&world.node.client(), RETRIES).await?;
    let with = rolled(&world, "hasty", Call::Http1, times()).await?;
    report("rolling Deployment, exits at once, retries", &with)?;
    delete(&world.node.client(), RETRIES).await?;
    world.node.kubectl(&["delete", "deployment,service,serviceaccount", "hasty", "-n", SHOP]).await?;
    ensure!(with.failed() == 0, "failed requests: {:?}", with.failures);
    Ok(())
}

async fn upgrade(world: Arc<World>) -> anyhow::Result<()> {
    world.node.add_rebuilt_mesh(REBUILT).await?;
    let web = world.web().await?;
    let target = world.node.service(SHOP, "orders", 80).await?;
    let load = Load::start(&web, Plan::new(RATE, target, "orders", "/whoami"));
    for values in ["log.level=debug,controller.replicas=2", &format!("image.tag={REBUILT}")] {
        world.node.upgrade(&["--reset-then-reuse-values", "--set", values]).await?;
        for name in ["outrigger-controller", "outrigger-injector"] {
            world.node.rolled_out(MESH, name).await?;
        }
    }
    let outcome = load.stop().await?;
    report("helm upgrade", &outcome)?;
    ensure!(outcome.failed() == 0, "failed requests: {:?}", outcome.failures);
    // The webhook's certificate is known to the API server still: a new pod is injected, and its sidecar is of the new image.
    world.node.kubectl(&["rollout", "restart", "deployment/web", "-n", SHOP]).await?;
    world.node.rolled_out(SHOP, "web").await?;
    for pod in world.node.pods(SHOP, "app=web").await? {
        let text = serde_json::to_string(&pod.spec)?;
        ensure!(text.contains(&format!("outrigger-proxy:{REBUILT}")), "its sidecar is another one: {text}");
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
fn report(what: &str, outcome: &Outcome) -> anyhow::Result<()> {
    println!("{what}: {outcome}");
    record(&[
        Figure::info(&format!("{what}: requests"), "requests", outcome.total() as f64),
        Figure::info(&format!("{what}: failed"), "requests", outcome.failed() as f64),
    ])
}
