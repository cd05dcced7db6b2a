//! A policy that a proxy refuses is seen: in the policy's status and in `outrigger proxies`.
//!
//! No proxy of this release refuses what the controller compiles, so one is played here: a client with a workload's leaf that speaks
//! discovery and refuses every service that brings a policy, as a proxy of another release might.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures_util::stream;
use outrigger_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use outrigger_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status};
use outrigger_api::{type_url, v1};
use outrigger_e2e::mesh::{DISCOVERY_PORT, identity};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::tls::{self, Handshake};
use outrigger_e2e::wait::wait_until;
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::transport::Endpoint;

use crate::world::{HTTP, ORDERS, World};

const VISIBLE: Duration = Duration::from_secs(5);
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
    vec![case("a policy that a proxy refuses is seen", refused)]
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
