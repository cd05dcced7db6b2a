//! Policies change under load: no request fails, every proxy follows within half a second, and what is under way is judged anew.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::client::{self, Raw};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::mesh::Workload;
use outrigger_e2e::suite::{Case, case, length};
use outrigger_e2e::wait::within;
use tokio::time::{Instant, sleep};

use crate::world::{HTTP, LIMIT, ORDERS, STORE, World, ports};

const RATE: u32 = 1_000;
/// From one change to the next.
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("policies change under 1,000 requests a second", under_load),
        case("a connection and a stream that a policy no longer allows end", live_traffic),
    ]
}

/// Who may call, what a caller's sidecar does, and what the answer says: a change of each kind at once.
fn policies(number: u32) -> String {
    let action = if number.is_multiple_of(2) { "Allow" } else { "Deny" };
    let (attempts, timeout) = (number % 3, 5 + number % 4);
    format!(
        "
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: orders, namespace: default}}
spec:
  targetRef: {{kind: Service, name: orders}}
  rules:
  - {{name: web, action: Allow, from: [{{serviceAccounts: [default/web]}}]}}
  - {{name: batch, action: {action}, from: [{{serviceAccounts: [other/batch]}}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: orders, namespace: default}}
spec:
  targetRef: {{kind: Service, name: orders}}
  timeouts: {{request: {timeout}s}}
  retry: {{attempts: {attempts}, on: [reset, connect-failure]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: orders, namespace: default}}
spec:
  parentRefs: [{{group: '', kind: Service, name: orders}}]
  rules:
  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: {{set: [{{name: x-change, value: '{number}'}}]}}
    backendRefs: [{{name: orders, port: {HTTP}}}]
"
    )
}

async fn under_load(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    world.mesh.apply(&policies(0)).await?;
    let target = world.web.look_up(ORDERS, HTTP).await?;
    let load = Load::start(&world.web.host, Plan::new(RATE, target, format!("{ORDERS}:{HTTP}"), "/whoami"));
    let (begun, mut number, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while begun.elapsed() < length(20, 120) {
        sleep(PAUSE).await;
        number += 1;
        world.mesh.apply_only(&policies(number)).await?;
        let applied = Instant::now();
        // A proxy of each kind: every replica's, asked for itself, and the caller's.
        let mut proxies = Vec::new();
        for replica in &world.orders {
            proxies.push(follows(&world.batch, replica.host.at(HTTP), applied, move |reply| {
                (reply.status == 403) != number.is_multiple_of(2)
            }));
        }
        let followed = futures_util::future::try_join_all(proxies);
        let wanted = number.to_string();
        let caller = follows(&world.web, target, applied, move |reply| {
            reply.headers.get("x-change").is_some_and(|value| value.as_bytes() == wanted.as_bytes())
        });
        let (replicas, caller) = tokio::try_join!(followed, caller)?;
        slowest = replicas.into_iter().chain([caller]).fold(slowest, Duration::max);
    }
    let outcome = load.stop().await?;
    println!("{number} changes: {outcome}; the slowest proxy followed after {slowest:?}");
    ensure!(number > 5, "only {number} changes");
    hold(&[
        Figure::at_most("policy change at 1,000/s: failed", "%", 0.0, outcome.failed_share() * 100.0),
        Figure::at_most(
            "policy change: in force on every proxy after",
            "ms",
            500.0,
            slowest.as_secs_f64() * 1000.0,
        ),
        Figure::info("policy change at 1,000/s: p99", "ms", outcome.quantile_ms(0.99)),
    ])
}

/// How long after `applied` an answer from `address` is as wanted.
async fn follows(
    from: &Workload,
    address: std::net::SocketAddr,
    applied: Instant,
    wanted: impl Fn(&client::Reply) -> bool,
) -> anyhow::Result<Duration> {
    loop {
        let asked = applied.elapsed();
        let reply = from.host.run(move || client::get(address, ORDERS, "/whoami")).await?;
        if wanted(&reply) {
            return Ok(asked);
        }
        ensure!(asked < LIMIT, "{address} does not follow: {} {:?}", reply.status, reply.reason());
        sleep(Duration::from_millis(10)).await;
    }
}

async fn live_traffic(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    let (stream, bytes) = (ports::DETECTED, ports::OPAQUE_ECHO);
    let open = async |port: u16, hello: String, until: &'static [u8]| {
        let address = world.web.look_up(STORE, port).await?;
        world
            .web
            .host
            .run(move || async move {
                let mut raw = Raw::connect(address).await?;
                raw.send(hello).await?;
                raw.read_until(until).await?;
                Ok(raw)
            })
            .await
    };
    // A minute of lines, of which some have come; bytes, of which some have come back.
    let hello = format!("GET /drip/600/100 HTTP/1.1\r\nHost: {STORE}\r\n\r\n");
    let mut dripping = open(stream, hello, b"line 1\n").await?;
    let mut echoed = open(bytes, "ping\n".to_owned(), b"ping\n").await?;
    world
        .mesh
        .apply_only(
            "
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: store, namespace: default}
spec:
  targetRef: {kind: Service, name: store}
  rules:
  - {name: web, action: Deny, from: [{serviceAccounts: [default/web]}]}
",
        )
        .await?;
    let applied = Instant::now();
    let (dripping, echoed) = world
        .web
        .host
        .run(move || async move {
            let start = Instant::now();
            let first = async {
                // The end, or an error, but not the last line.
                let rest = within(LIMIT, "the stream to end", dripping.read_to_end()).await;
                (start.elapsed(), rest)
            };
            let second = async {
                let rest = within(LIMIT, "the connection to end", echoed.read_to_end()).await;
                (start.elapsed(), rest)
            };
            Ok(tokio::join!(first, second))
        })
        .await?;
    for (what, (took, rest)) in [("stream", &dripping), ("connection", &echoed)] {
        println!("the {what} ended after {took:?}: {:?}", rest.as_ref().map(Vec::len));
        let whole = rest.as_ref().is_ok_and(|bytes| bytes.windows(5).any(|bytes| bytes == b"0\r\n\r\n"));
        ensure!(!whole, "the {what} ended as if it were complete");
    }
    let slowest = dripping.0.max(echoed.0);
    ensure!(applied.elapsed() < LIMIT, "they did not end");
    // The connection that carried the stream carries others' still.
    world.batch.get(STORE, stream, "/whoami").await?.expect(200).context("another caller")?;
    hold(&[Figure::at_most(
        "policy change: what is no longer allowed ends after",
        "ms",
        500.0,
        slowest.as_secs_f64() * 1000.0,
    )])
}
