//! A policy that a proxy refuses is seen: in the policy's status and in `outrigger proxies`. What the proxy took before stays in force
//! with it until there is a policy that it can take.
//!
//! No proxy of this release refuses what the controller compiles, so another release is played here: once the proxy's, by a client with a
//! workload's leaf that speaks discovery and refuses every service that brings a policy; once the controller's, by something between
//! it and a real sidecar (`between`).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures_util::stream;
use outrigger_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use outrigger_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status};
use outrigger_api::{type_url, v1};
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::mesh::{DISCOVERY_PORT, identity};
use outrigger_e2e::suite::{Case, case, length};
use outrigger_e2e::tls::{self, Handshake};
use outrigger_e2e::wait::wait_until;
use prost::Message as _;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::transport::Endpoint;

use crate::between;
use crate::world::{HTTP, LIMIT, ORDERS, World};

const VISIBLE: Duration = Duration::from_secs(5);
/// Requests a second of the proxy that refuses.
const RATE: u32 = 100;
/// What the stubborn proxy says.
const WHY: &str = "this proxy knows no such policy";

const POLICY: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: 7s}
";

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("a policy that a proxy refuses is seen", refused),
        case("a proxy that refuses a policy keeps the last good one in force", last_good),
    ]
}

/// The name that the refusing sidecar's workload has.
const OLD: &str = "old";

/// Answers of `orders` say `mark`; to `old` nobody comes who is `denied`.
fn policies(mark: &str, denied: &str) -> String {
    format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: orders, namespace: default}}
spec:
  parentRefs: [{{group: '', kind: Service, name: orders}}]
  rules:
  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: {{set: [{{name: x-mark, value: {mark}}}]}}
    backendRefs: [{{name: orders, port: {HTTP}}}]
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: {OLD}, namespace: default}}
spec:
  targetRef: {{kind: Service, name: {OLD}}}
  rules:
  - {{name: {mark}, action: Deny, from: [{{serviceAccounts: [{denied}]}}]}}
"
    )
}

async fn last_good(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    let controller = between::start(&world.mesh, OLD).await?;
    // Its claim comes by way of another host, and so has to name its address.
    let old = world.mesh.workload(OLD).serves(OLD, HTTP).at_ipv6().app(["--http", "8080"]);
    let old = old.set("controller", json!([controller.address.to_string()])).start().await?;
    old.wait_for_service(ORDERS, HTTP, LIMIT).await?;
    let name = format!("{OLD}.service.consul");
    for client in [&world.web, &world.batch] {
        client.wait_for_service(&name, HTTP, LIMIT).await?;
    }
    // What is in force on the old one, as client and as server, and on another client.
    let holds = async |mark: &'static str, web: u16, batch: u16, others: &'static str| {
        for (client, wanted) in [(&old, mark), (&world.web, others)] {
            let reply = client.get(ORDERS, HTTP, "/whoami").await?.expect(200)?;
            let said = reply.headers.get("x-mark").and_then(|said| said.to_str().ok()).unwrap_or_default();
            ensure!(said == wanted, "{} is told {said:?}, not {wanted:?}", client.host.name());
        }
        for (client, wanted) in [(&world.web, web), (&world.batch, batch)] {
            let reply = client.get(&name, HTTP, "/whoami").await?;
            let who = client.host.name();
            ensure!(
                reply.status == wanted,
                "{who} gets {}, not {wanted}: {:?}",
                reply.status,
                reply.reason()
            );
        }
        anyhow::Ok(())
    };
    world.mesh.apply(&policies("good", "other/batch")).await?;
    // "Taken" is said of the proxies that were told; a moment may pass until each is.
    wait_until(VISIBLE, "the good ones", || holds("good", 200, 403, "good")).await?;

    let target = old.look_up(ORDERS, HTTP).await?;
    let load = Load::start(&old.host, Plan::new(RATE, target, format!("{ORDERS}:{HTTP}"), "/whoami"));
    world.mesh.apply_only(&policies(between::MARK, "default/web")).await?;
    for (kind, policy) in [("HTTPRoute", "orders"), ("AccessPolicy", OLD)] {
        wait_until(VISIBLE, &format!("the refusal of {kind} {policy} to show"), || async {
            let policy = world.mesh.policy(kind, "default", policy).await?;
            let proxies = &policy["status"]["proxies"];
            let refused = proxies["refused"].as_array().map_or(&[][..], Vec::as_slice);
            ensure!(refused.len() == 1 && refused[0]["proxy"].to_string().contains("/sa/old"), "{proxies}");
            // All others have taken it.
            ensure!(
                proxies["on"].as_u64() == proxies["accepted"].as_u64().map(|taken| taken + 1),
                "{proxies}"
            );
            Ok(())
        })
        .await?;
    }
    // And so it stays, whoever asks.
    let begun = Instant::now();
    while begun.elapsed() < length(3, 60) {
        holds("good", 200, 403, between::MARK).await?;
    }
    let outcome = load.stop().await?;
    println!("on the last good: {outcome}");
    ensure!(outcome.failed() == 0 && outcome.total() >= 100, "{outcome}");

    world.mesh.apply(&policies("better", "default/web")).await?;
    wait_until(VISIBLE, "the better ones", || holds("better", 403, 200, "better")).await?;
    drop(old);
    world.mesh.consul.lock().await.deregister(&format!("{OLD}-{OLD}")).await
}

async fn refused(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    let host = world.mesh.network.host("stubborn").await?;
    let leaf = world.mesh.authority()?.workload(&identity("stubborn"))?;
    let controller = world.mesh.controller_host.at(DISCOVERY_PORT);
    let relay = tls::relay(&host, controller, Handshake { leaf: Some(leaf), alpn: "h2" }).await?;
    let (pushed, mut pushes) = mpsc::channel(64);
    let proxy = tokio::spawn(async move {
        host.run(move || async move {
            let channel = Endpoint::from_shared(format!("http://{relay}"))?.connect().await?;
            let mut client = AggregatedDiscoveryServiceClient::new(channel);
            let (requests, outgoing) = mpsc::channel::<DeltaDiscoveryRequest>(16);
            let subscription = DeltaDiscoveryRequest {
                type_url: type_url::SERVICE.to_owned(),
                resource_names_subscribe: vec!["orders.default".to_owned()],
                ..DeltaDiscoveryRequest::default()
            };
            requests.send(subscription).await?;
            let outgoing = stream::unfold(outgoing, |mut outgoing| async move {
                outgoing.recv().await.map(|request| (request, outgoing))
            });
            let mut responses = client.delta_aggregated_resources(outgoing).await?.into_inner();
            while let Some(response) = responses.message().await? {
                let answer = judge(response, &pushed)?;
                requests.send(answer).await?;
            }
            anyhow::Ok(())
        })
        .await
    });
    // Without a policy nothing is refused.
    let first = tokio::time::timeout(VISIBLE, pushes.recv()).await.context("no push")?;
    ensure!(first == Some(false), "the first push was {first:?}");

    world.mesh.apply_only(POLICY).await?;
    wait_until(VISIBLE, "the refusal to show in the policy's status", || async {
        let policy = world.mesh.policy("TrafficPolicy", "default", "orders").await?;
        let refused = policy["status"]["proxies"]["refused"].as_array().cloned().unwrap_or_default();
        ensure!(refused.len() == 1, "{}", policy["status"]);
        let text = refused[0].to_string();
        ensure!(text.contains(WHY) && text.contains("stubborn"), "{text}");
        Ok(())
    })
    .await?;
    let proxies = world.mesh.cli(&["proxies", "-o", "json"]).await?;
    ensure!(proxies.contains(WHY), "`outrigger proxies` does not say why: {proxies}");
    // Others have it, and nobody is asked again and again.
    world.web.get(ORDERS, HTTP, "/whoami").await?.expect(200)?;
    let mut more = 0;
    while pushes.try_recv().is_ok() {
        more += 1;
    }
    ensure!(more <= 3, "the refused push came {more} times");
    proxy.abort();
    // Without the proxy the policy has no fault.
    wait_until(VISIBLE, "the refusal to go with its proxy", || async {
        let policy = world.mesh.policy("TrafficPolicy", "default", "orders").await?;
        let refused = policy["status"]["proxies"]["refused"].as_array().map_or(0, Vec::len);
        ensure!(refused == 0, "{}", policy["status"]);
        Ok(())
    })
    .await
}

/// Acknowledges a push, or refuses it because of a policy in it, and notes which.
fn judge(
    response: DeltaDiscoveryResponse,
    pushed: &mpsc::Sender<bool>,
) -> anyhow::Result<DeltaDiscoveryRequest> {
    let mut has_policy = false;
    for resource in &response.resources {
        let any = resource.resource.as_ref().context("a resource without content")?;
        let service = v1::Service::decode(any.value.as_slice()).context("reading a service")?;
        has_policy |= service.traffic.is_some() || !service.routes.is_empty();
    }
    // Nobody listens any more when the case is over.
    let _ = pushed.try_send(has_policy);
    Ok(DeltaDiscoveryRequest {
        type_url: response.type_url,
        response_nonce: response.nonce,
        error_detail: has_policy.then(|| Status { code: 3, message: WHY.to_owned() }),
        ..DeltaDiscoveryRequest::default()
    })
}
