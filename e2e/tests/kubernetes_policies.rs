//! Policies as objects of a real Kubernetes API: what the CRDs take and refuse, and the controller's store on them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::{Method, Request};
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use outrigger_e2e::controller::Controller;
use outrigger_e2e::kubernetes::{Cluster, Setup, apply, delete, wait_for};
use outrigger_e2e::network::Network;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};
use tokio::sync::Mutex;

const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    suite(
        "kubernetes_policies",
        World::build,
        vec![
            case("the CRDs refuse what the parser refuses, in words", refused),
            case("every policy of the documentation is taken", examples),
            case("a policy's status says what became of it, and is written once", statuses),
            case("a route's status is the Gateway API's, and a grant is asked for", routes),
            case("the API server may go, and a CRD too: policies stay", last_good),
        ],
    )
}

struct World {
    cluster: Mutex<Cluster>,
    controller: Mutex<Controller>,
    _network: Network,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let cluster = Cluster::start(&network, Setup::default()).await?;
        for folder in [own_crds(), sandbox::get().tool("gateway-api-crds")?] {
            apply(&cluster.client(), &documents(&folder)?).await?;
        }
        apply(&cluster.client(), OBJECTS).await?;
        let host = network.host("controller").await?;
        let data = sandbox::get().work.join("controller-data");
        let config = json!({
            "kubernetes": {"enabled": true, "kubeconfig": cluster.kubeconfig()},
            "policies": {"store": "kubernetes"},
        });
        let mut controller = Controller::start(&host, data, config).await?;
        controller.wait_ready().await?;
        Ok(Self { cluster: Mutex::new(cluster), controller: Mutex::new(controller), _network: network })
    }
}

const OBJECTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: outrigger-system }
---
apiVersion: v1
kind: Namespace
metadata: { name: shop }
---
apiVersion: v1
kind: Namespace
metadata: { name: other }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: shop }
spec: { ports: [{ name: http, port: 80 }] }
---
apiVersion: v1
kind: Service
metadata: { name: orders, namespace: other }
spec: { ports: [{ name: http, port: 80 }] }
";

fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn own_crds() -> PathBuf {
    repository().join("charts/outrigger/files/crds")
}

/// The YAML files of a folder as one text.
fn documents(folder: &Path) -> anyhow::Result<String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .map(|file| Ok(file?.path()))
        .collect::<anyhow::Result<_>>()?;
    files.sort();
    let texts = files.iter().map(std::fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(texts.join("\n---\n"))
}

/// The kinds of policies, and where the API has them.
const KINDS: [(&str, &str); 6] = [
    ("MeshDefaults", "meshdefaults"),
    ("TrafficPolicy", "trafficpolicies"),
    ("AccessPolicy", "accesspolicies"),
    ("ExternalService", "externalservices"),
    ("HTTPRoute", "httproutes"),
    ("GRPCRoute", "grpcroutes"),
];

/// Asks the API server whether it would take an object, as `kubectl create --dry-run=server` does. `Err`: its words.
async fn would_take(client: &Client, object: &Value) -> anyhow::Result<Result<(), String>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (_, plural) = KINDS.into_iter().find(|(kind, _)| *kind == object["kind"]).context("no policy")?;
    let path = format!(
        "/apis/{}/namespaces/{}/{plural}?dryRun=All&fieldValidation=Strict",
        text(&object["apiVersion"]),
        text(&object["metadata"]["namespace"])
    );
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("content-type", "application/json")
        .body(serde_json::to_vec(object)?)?;
    match client.request::<Value>(request).await {
        Ok(_) => Ok(Ok(())),
        Err(kube::Error::Api(status)) => Ok(Err(status.message)),
        Err(error) => Err(error.into()),
    }
}

async fn refused(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.lock().await.client();
    let text = std::fs::read_to_string(repository().join("control-plane/policy/testdata/refused.yaml"))?;
    let cases: Vec<Value> = serde_saphyr::from_str(&text).map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut wrong = Vec::new();
    for case in &cases {
        let default = if case["kind"] == "MeshDefaults" { "default" } else { "case" };
        let object = json!({
            "apiVersion": "outrigger.dev/v1alpha1", "kind": case["kind"],
            "metadata": {"name": case["name"].as_str().unwrap_or(default), "namespace": "shop"},
            "spec": case["spec"],
        });
        match (would_take(&client, &object).await?, case["says"].as_str()) {
            (Err(said), Some(says)) if said.contains(says) => {}
            // What nobody but the parser sees: once the API server does, the documentation is wrong.
            (Ok(()), None) => {}
            (answer, says) => wrong.push(format!("{object}\n  expected {says:?}, got {answer:?}")),
        }
    }
    ensure!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    Ok(())
}

async fn examples(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.lock().await.client();
    let (mut taken, mut wrong) = (0, Vec::new());
    for file in ["README.md", "docs/policies.md", "docs/cli.md"] {
        let text = std::fs::read_to_string(repository().join(file))?;
        let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
        for block in blocks {
            let Ok(documents) = serde_saphyr::from_multiple::<Value>(block) else { continue };
            for mut object in documents {
                let is_policy = KINDS.iter().any(|(kind, _)| *kind == object["kind"]);
                if !is_policy {
                    continue;
                }
                if object["metadata"]["namespace"].is_null() {
                    object["metadata"]["namespace"] = json!("shop");
                }
                if object["metadata"]["namespace"] != "shop" {
                    object["metadata"]["namespace"] = json!("other");
                }
                match would_take(&client, &object).await? {
                    Ok(()) => taken += 1,
                    Err(said) => wrong.push(format!("{file}: {said}\n{block}")),
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(taken > 5, "only {taken} examples were found");
    Ok(())
}

fn objects(client: &Client, group: &str, version: &str, kind: &str) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk(group, version, kind);
    Api::namespaced_with(client.clone(), "shop", &ApiResource::from_gvk(&kind))
}

const DENY: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: { name: deny, namespace: shop }
spec:
  targetRef: { kind: Namespace }
  rules: [{ action: Deny, from: [{ unauthenticated: true }] }]
";

/// The reasons of an object's conditions by type, if they are of its newest generation.
fn reasons(object: &DynamicObject, conditions: &Value) -> anyhow::Result<Vec<String>> {
    let all = conditions.as_array().context("it has no conditions")?;
    let current = all.iter().all(|one| one["observedGeneration"].as_i64() == object.metadata.generation);
    ensure!(current, "they are of an older generation");
    let said = |one: &Value| {
        format!("{} {}", one["type"].as_str().unwrap_or_default(), one["reason"].as_str().unwrap_or_default())
    };
    Ok(all.iter().map(said).collect())
}

async fn statuses(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.lock().await.client();
    apply(&client, DENY).await?;
    let policies = objects(&client, "outrigger.dev", "v1alpha1", "AccessPolicy");
    let accepted = |object: &DynamicObject| {
        let status = &object.data["status"];
        ensure!(reasons(object, &status["conditions"])? == ["Accepted Accepted"], "{status}");
        ensure!(status["proxies"]["on"] == 0 && status["observedGeneration"] == 1, "{status}");
        Ok(object.metadata.resource_version.clone())
    };
    let version = wait_for(&policies, "deny", LIMIT, "accepted", accepted).await?;

    // What neither the schema nor CEL sees.
    let broken = DENY.replace("unauthenticated: true", "cidrs: [10.0.0.1/8]");
    apply(&client, &broken).await?;
    wait_for(&policies, "deny", LIMIT, "refused", |object| {
        let status = &object.data["status"];
        ensure!(reasons(object, &status["conditions"])? == ["Accepted Invalid"], "{status}");
        Ok(())
    })
    .await?;
    ensure!(version.is_some(), "an object has a version");
    let held = world.controller.lock().await.api(Method::GET, "/policies", None).await?;
    ensure!(held.text().contains("unauthenticated"), "what it said before is not in force: {}", held.text());
    delete(&client, DENY).await
}

const ROUTE: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: web, namespace: shop }
spec:
  parentRefs: [{ group: "", kind: Service, name: web, port: 80 }]
  rules: [{ backendRefs: [{ name: orders, namespace: other, port: 80 }] }]
"#;

const GRANT: &str = r#"
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: { name: shop, namespace: other }
spec:
  from: [{ group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop }]
  to: [{ group: "", kind: Service }]
"#;

async fn routes(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.lock().await.client();
    apply(&client, ROUTE).await?;
    let routes = objects(&client, "gateway.networking.k8s.io", "v1", "HTTPRoute");
    let says = |expected: [&'static str; 2]| {
        move |object: &DynamicObject| {
            let parents = object.data["status"]["parents"].as_array().context("it has no status")?;
            ensure!(parents.len() == 1, "{parents:?}");
            ensure!(parents[0]["controllerName"] == "outrigger.dev/controller", "{parents:?}");
            let said = reasons(object, &parents[0]["conditions"])?;
            ensure!(said == expected, "{said:?}");
            Ok(())
        }
    };
    let without = says(["Accepted Accepted", "ResolvedRefs RefNotPermitted"]);
    wait_for(&routes, "web", LIMIT, "not permitted", without).await?;
    apply(&client, GRANT).await?;
    let with = says(["Accepted Accepted", "ResolvedRefs ResolvedRefs"]);
    wait_for(&routes, "web", LIMIT, "permitted", with).await?;
    delete(&client, GRANT).await?;
    let without = says(["Accepted Accepted", "ResolvedRefs RefNotPermitted"]);
    wait_for(&routes, "web", LIMIT, "not permitted any more", without).await?;
    delete(&client, ROUTE).await
}

async fn last_good(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let mut cluster = world.cluster.lock().await;
    let controller = world.controller.lock().await;
    let client = cluster.client();
    apply(&client, DENY).await?;
    let is_held = async || {
        let held = controller.api(Method::GET, "/policies", None).await?;
        ensure!(held.text().contains("\"deny\""), "it is not held: {}", held.text());
        Ok(())
    };
    wait_until(LIMIT, "the policy to be held", &is_held).await?;
    cluster.stop();
    wait_until(LIMIT, "the controller to say so", || async {
        ensure!(controller.log().contains("policies cannot be read from Kubernetes"), "it has not");
        Ok(())
    })
    .await?;
    is_held().await?;
    cluster.start_again().await?;
    wait_until(LIMIT, "the controller to be back", || async {
        ensure!(controller.log().contains("policies are read from Kubernetes again"), "it is not");
        Ok(())
    })
    .await?;
    is_held().await?;

    let crds: Api<DynamicObject> = Api::all_with(
        client.clone(),
        &ApiResource::from_gvk(&GroupVersionKind::gvk(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
        )),
    );
    crds.delete("accesspolicies.outrigger.dev", &DeleteParams::default()).await?;
    wait_until(LIMIT, "the controller to say so", || async {
        ensure!(controller.log().contains("the CRD accesspolicies.outrigger.dev was deleted"), "it has not");
        Ok(())
    })
    .await?;
    is_held().await?;
    apply(&client, &documents(&own_crds())?).await?;
    apply(&client, DENY).await?;
    wait_until(LIMIT, "the controller to trust it again", || async {
        let count = controller.log().matches("policies are read from Kubernetes again").count();
        ensure!(count >= 2, "{count}");
        Ok(())
    })
    .await
}
