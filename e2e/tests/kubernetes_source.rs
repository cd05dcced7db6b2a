//! Kubernetes as a source, and the attestation of its pods, against a real API server.
//!
//! No kubelet runs: a pod is a host with a sidecar, and its Pod object says that it has the host's address. What the API decides
//! (tokens and what they are bound to, watches, versions) is real.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use outrigger_e2e::figures::{Figure, hold, record};
use outrigger_e2e::kubernetes::{Cluster, Setup as ClusterSetup, apply, gone};
use outrigger_e2e::mesh::{Mesh, Setup, Workload, identity};
use outrigger_e2e::network::{Host, Network};
use outrigger_e2e::suite::{case, is_soak, length, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};
use tokio::sync::Mutex;

const HTTP: u16 = 8080;
const METRICS: u16 = 9100;
const LIMIT: Duration = Duration::from_secs(20);
/// The audience of tokens that are meant for the mesh.
const AUDIENCE: &str = "outrigger";
/// The least that an API server grants.
const TOKEN_SECONDS: i64 = 600;

fn main() -> ExitCode {
    suite(
        "kubernetes_source",
        World::build,
        vec![
            case("a ClusterIP leads to a pod with its identity", cluster_ip),
            case("a pod's own address at any port leads to that pod", any_port),
            case("Kubernetes calls Consul and Consul Kubernetes, with identity", both_ways),
            case("D7: a token proves its own pod, from its own address, and nothing else", tokens),
            case("a pod that ends hears of it, and its endpoint drains", terminating),
            case("an API server that is away takes no endpoint with it", api_away),
            case("5,000 services and 50,000 endpoints", scale),
        ],
    )
}

struct World {
    cluster: Mutex<Cluster>,
    mesh: Mesh,
    web: Workload,
    orders: Workload,
    on_host: Workload,
}

const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: outrigger-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: orders, namespace: shop}
---
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {clusterIP: 10.96.7.7, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}]}
";

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let cluster = Cluster::start(&network, ClusterSetup::default()).await?;
        apply(&cluster.client(), OBJECTS).await?;
        let more = json!({
            "kubernetes": { "enabled": true, "kubeconfig": cluster.kubeconfig() },
            "consul": { "default_namespace": "consul" },
        });
        let mesh = Mesh::start_on(network, Setup { mtls: "Permissive", ..Setup::default() }, more).await?;
        let orders_host = mesh.network.host("orders").await?;
        let orders_token = pod_with_token(&cluster, &orders_host, "orders-0", "orders").await?;
        let orders = mesh.workload("orders").on(&orders_host).token(&orders_token);
        let orders = orders.app(["--http", "8080", "--http", "9100"]).start().await?;
        apply(&cluster.client(), &slice(&orders_host, true)).await?;
        let web_host = mesh.network.host("web").await?;
        let web_token = pod_with_token(&cluster, &web_host, "web-0", "web").await?;
        let web = mesh.workload("web").on(&web_host).token(&web_token).start().await?;
        let on_host = mesh.workload("billing").account("consul/billing").serves("billing.consul", HTTP);
        let on_host = on_host.app(["--http", "8080"]).start().await?;
        Ok(Self { cluster: Mutex::new(cluster), mesh, web, orders, on_host })
    }
}

fn slice(host: &Host, ready: bool) -> String {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": "orders-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "orders" } },
        "ports": [{ "name": "http", "port": HTTP, "protocol": "TCP" }],
        "endpoints": [{ "addresses": [host.v4().to_string()], "conditions": { "ready": ready, "serving": true, "terminating": !ready },
            "targetRef": { "kind": "Pod", "name": "orders-0", "namespace": "shop" } }],
    })
    .to_string()
}

/// A Pod object with the host's address; returns it as the API server has it.
async fn pod(cluster: &Cluster, host: &Host, name: &str, account: &str) -> anyhow::Result<Pod> {
    let pods = Api::<Pod>::namespaced(cluster.client(), "shop");
    let pod: Pod = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "labels": { "app": account } },
        "spec": { "serviceAccountName": account, "automountServiceAccountToken": false,
            "initContainers": [{ "name": "outrigger-proxy", "image": "proxy", "restartPolicy": "Always" }],
            "containers": [{ "name": "app", "image": "app",
                "readinessProbe": { "httpGet": { "path": "/ready", "port": HTTP } } }] },
    }))?;
    pods.create(&PostParams::default(), &pod).await.with_context(|| format!("creating pod {name}"))?;
    let address = host.v4().to_string();
    let status = json!({ "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
        "hostIP": "10.77.0.1", "hostIPs": [{ "ip": "10.77.0.1" }] } });
    let patched = pods.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await;
    patched.with_context(|| format!("writing the status of pod {name}"))
}

/// A token of a service account that is bound to a pod.
async fn bound_token(cluster: &Cluster, account: &str, audience: &str, pod: &Pod) -> anyhow::Result<String> {
    let accounts = Api::<ServiceAccount>::namespaced(cluster.client(), "shop");
    let reference = BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(pod.name_any()),
        uid: pod.uid(),
    };
    let spec = TokenRequestSpec {
        audiences: vec![audience.to_owned()],
        expiration_seconds: Some(TOKEN_SECONDS),
        bound_object_ref: Some(reference),
    };
    let request = TokenRequest { spec, ..TokenRequest::default() };
    let granted = accounts.create_token_request(account, &PostParams::default(), &request).await;
    let status = granted.with_context(|| format!("asking for a token of {account}"))?.status;
    Ok(status.context("the API server granted no token")?.token)
}

async fn pod_with_token(cluster: &Cluster, host: &Host, name: &str, account: &str) -> anyhow::Result<String> {
    let pod = pod(cluster, host, name, account).await?;
    bound_token(cluster, account, AUDIENCE, &pod).await
}

/// What `e2e-app` saw of the caller, on a path that no probe is about.
async fn caller_of(from: &Workload, address: &str, port: u16) -> anyhow::Result<String> {
    let reply = wait_until(LIMIT, &format!("{address}:{port} to answer"), || async {
        from.get(address, port, "/describe").await?.expect(200)
    })
    .await?;
    let seen: Value = serde_json::from_slice(&reply.body).context("reading what the application saw")?;
    let fields = seen["headers"].to_string();
    Ok(fields)
}

async fn cluster_ip(world: Arc<World>) -> anyhow::Result<()> {
    let seen = caller_of(&world.web, "10.96.7.7", 80).await?;
    ensure!(seen.contains(&identity("shop/web")), "the caller was {seen}");
    let endpoints = world.web.endpoints("orders.shop").await?;
    ensure!(endpoints.len() == 1 && endpoints[0]["identity"] == identity("shop/orders"), "{endpoints:?}");
    Ok(())
}

async fn any_port(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.orders.host.v4().to_string();
    let seen = caller_of(&world.web, &address, METRICS).await?;
    ensure!(seen.contains(&identity("shop/web")), "no service has this port, and still: {seen}");
    ensure!(!world.web.endpoints("orders-0._pod.shop").await?.is_empty(), "by the pod itself");
    Ok(())
}

async fn both_ways(world: Arc<World>) -> anyhow::Result<()> {
    let seen = caller_of(&world.web, "billing.consul.mesh", HTTP).await?;
    ensure!(seen.contains(&identity("shop/web")), "Consul's service saw {seen}");
    let seen = caller_of(&world.on_host, "10.96.7.7", 80).await?;
    ensure!(seen.contains(&identity("consul/billing")), "the cluster's service saw {seen}");
    let services = world.mesh.cli(&["services"]).await?;
    let has =
        |name: &str, source: &str| services.lines().any(|line| line.contains(name) && line.contains(source));
    ensure!(has("orders", "kubernetes") && has("billing", "consul"), "{services}");
    Ok(())
}

async fn tokens(world: Arc<World>) -> anyhow::Result<()> {
    let cluster = world.cluster.lock().await;
    let host = world.mesh.network.host("joining").await?;
    let here = pod(&cluster, &host, "joining-0", "web").await?;
    let elsewhere = Api::<Pod>::namespaced(cluster.client(), "shop").get("orders-0").await?;
    let gone_host = world.mesh.network.host("gone").await?;
    let of_gone = {
        let pod = pod(&cluster, &gone_host, "gone-0", "web").await?;
        let token = bound_token(&cluster, "web", AUDIENCE, &pod).await?;
        let pods = Api::<Pod>::namespaced(cluster.client(), "shop");
        pods.delete("gone-0", &DeleteParams::default().grace_period(0)).await?;
        gone(&pods, "gone-0", LIMIT).await?;
        token
    };
    let good = bound_token(&cluster, "web", AUDIENCE, &here).await?;
    let mut forged = good.clone();
    let cut = forged.rfind('.').context("a JWT has dots")?;
    forged.replace_range(cut + 1.., "AAAA");
    let refused = [
        ("forged", forged),
        (
            "for another audience",
            bound_token(&cluster, "web", "https://kubernetes.default.svc.cluster.local", &here).await?,
        ),
        ("bound to no pod", cluster.token("shop", "web", Some(AUDIENCE)).await?),
        ("of a pod that is gone", of_gone),
        ("of a pod elsewhere", bound_token(&cluster, "orders", AUDIENCE, &elsewhere).await?),
    ];
    for (what, token) in refused {
        let joining = world.mesh.workload("joining").account("shop/web").on(&host).token(&token);
        let mut joining = joining.start_unready().await?;
        let sidecar = joining.sidecar.as_mut().context("it has a sidecar")?;
        wait_until(LIMIT, &format!("a token {what} to be refused"), || {
            let log = sidecar.log();
            async move {
                ensure!(log.contains("the controller refuses to sign"), "{log}");
                Ok(())
            }
        })
        .await?;
        let ready = wait_until(LIMIT, "the admin port to answer", || joining.admin("/ready")).await?;
        ensure!(ready.expect(200).is_err(), "a token {what} made it ready");
        joining.remove_redirection().await?;
    }
    let joined = world.mesh.workload("joining").account("shop/web").on(&host).token(&good).start().await;
    joined.context("the right token from the right place").map(drop)
}

async fn terminating(world: Arc<World>) -> anyhow::Result<()> {
    let cluster = world.cluster.lock().await;
    let host = world.mesh.network.host("leaving").await?;
    let token = pod_with_token(&cluster, &host, "leaving-0", "web").await?;
    let leaving = world.mesh.workload("leaving").account("shop/web").on(&host).token(&token).start().await?;
    let pods = Api::<Pod>::namespaced(cluster.client(), "shop");
    // A pod on a node stays, with a time of deletion, until its kubelet says that it has ended.
    pods.patch(
        "leaving-0",
        &PatchParams::default(),
        &Patch::Merge(json!({ "metadata": { "finalizers": ["e2e.test/stay"] } })),
    )
    .await?;
    let told = Instant::now();
    pods.delete("leaving-0", &DeleteParams::default()).await?;
    wait_until(LIMIT, "the sidecar to hear that its pod ends", || async {
        let knowledge = leaving.knowledge().await?;
        ensure!(knowledge.to_string().contains("\"terminating\":true"), "{}", knowledge["inbound"]);
        Ok(())
    })
    .await?;
    record(&[Figure::info(
        "a pod's deletion reaches its sidecar",
        "ms",
        told.elapsed().as_secs_f64() * 1000.0,
    )])?;
    pods.patch(
        "leaving-0",
        &PatchParams::default(),
        &Patch::Merge(json!({ "metadata": { "finalizers": null } })),
    )
    .await?;

    apply(&cluster.client(), &slice(&world.orders.host, false)).await?;
    wait_until(LIMIT, "the endpoint to drain", || async {
        let endpoints = world.web.endpoints("orders.shop").await?;
        ensure!(endpoints[0]["health"].to_string().to_lowercase().contains("draining"), "{endpoints:?}");
        Ok(())
    })
    .await?;
    apply(&cluster.client(), &slice(&world.orders.host, true)).await.map(drop)
}

async fn api_away(world: Arc<World>) -> anyhow::Result<()> {
    let mut cluster = world.cluster.lock().await;
    caller_of(&world.web, "10.96.7.7", 80).await?;
    cluster.stop();
    let (mut asked, mut failed) = (0, 0);
    let end = Instant::now() + length(10, 60);
    while Instant::now() < end {
        asked += 1;
        if world.web.get("10.96.7.7", 80, "/").await.and_then(|reply| reply.expect(200)).is_err() {
            failed += 1;
        }
        ensure!(world.web.endpoints("orders.shop").await?.len() == 1, "an endpoint is gone");
    }
    cluster.start_again().await?;
    let back = Instant::now();
    let late = "apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: shop}\nspec: {clusterIP: 10.96.7.8, ports: [{port: 80}]}\n";
    apply(&cluster.client(), late).await?;
    wait_until(LIMIT, "a new service to be known", || async {
        let services = world.mesh.cli(&["services"]).await?;
        ensure!(services.contains("late"), "{services}");
        Ok(())
    })
    .await?;
    hold(&[
        Figure::at_most("API server away: calls that failed", "calls", 0.0, f64::from(failed)),
        Figure::at_least("API server away: calls", "calls", 1.0, f64::from(asked)),
        Figure::info("API server back: a new service is known after", "s", back.elapsed().as_secs_f64()),
    ])
}

/// Written as objects of 100 endpoints, as controller-manager would.
async fn scale(world: Arc<World>) -> anyhow::Result<()> {
    let (services, each) = if is_soak() { (5000_u32, 10_u32) } else { (500, 10) };
    let cluster = world.cluster.lock().await;
    let client = cluster.client();
    let before = world.mesh.controller_memory().await?;
    for first in (0..services).step_by(50) {
        let mut objects = String::new();
        for number in first..services.min(first + 50) {
            let endpoints: Vec<Value> = (0..each)
                .map(|n| {
                    let host = number * each + n;
                    json!({ "addresses": [format!("10.{}.{}.{}", 100 + host / 65_536, host / 256 % 256, host % 256)],
                        "conditions": { "ready": true } })
                })
                .collect();
            let name = format!("s{number}");
            let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "shop" },
                "spec": { "clusterIP": "None", "ports": [{ "name": "http", "port": 80 }] } });
            let slice = json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": { "name": format!("{name}-1"), "namespace": "shop", "labels": { "kubernetes.io/service-name": name } },
                "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }], "endpoints": endpoints });
            objects += &[service.to_string(), slice.to_string(), String::new()].join("\n---\n");
        }
        apply(&client, &objects).await?;
    }
    let web_before = world.web.sidecar.as_ref().context("a sidecar")?.resident_bytes()?;
    world.mesh.kill_controller().await;
    let started = Instant::now();
    world.mesh.start_controller().await?;
    wait_until(LIMIT, "every service to be known", || async {
        let listed = world.mesh.cli(&["services"]).await?;
        ensure!(listed.contains(&format!("s{}", services - 1)), "not yet");
        Ok(())
    })
    .await?;
    let synced = started.elapsed();
    for number in 0..10 {
        let address = format!("10.100.{}.{}", number * each / 256, number * each % 256);
        // Nobody is there; that it is asked is enough.
        let _ = world.web.get(&address, HTTP, "/").await;
    }
    let web_after = world.web.sidecar.as_ref().context("a sidecar")?.resident_bytes()?;
    let mib = |bytes: u64| f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) / 1024.0;
    let size = format!("{services} services, {} endpoints", services * each);
    record(&[
        Figure::info(
            &format!("{size}: the controller's memory"),
            "MiB",
            mib(world.mesh.controller_memory().await?),
        ),
        Figure::info(&format!("{size}: the controller's memory before"), "MiB", mib(before)),
        Figure::info(&format!("{size}: from its start until it is synced"), "s", synced.as_secs_f64()),
        Figure::info(
            &format!("{size}: a proxy that uses ten of them, growth"),
            "MiB",
            mib(web_after.saturating_sub(web_before)),
        ),
    ])
}
