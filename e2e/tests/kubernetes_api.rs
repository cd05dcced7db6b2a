//! The Kubernetes API of the harness itself: if this fails, no suite that stands on it says anything.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt as _;
use kube::api::{Api, DynamicObject, ListParams, PostParams};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::kubernetes::{Cluster, Setup, apply, delete, gone, wait_for};
use outrigger_e2e::network::Network;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use tokio::sync::Mutex;

const LIMIT: Duration = Duration::from_secs(30);
/// Seconds from nothing to an API that answers; 2-3 are usual.
const READY: f64 = 15.0;
const AUDIENCE: &str = "outrigger";

fn main() -> ExitCode {
    suite(
        "kubernetes_api",
        World::build,
        vec![
            case("RBAC refuses what was not granted, and the audit log has it", rbac),
            case("a token is reviewed with its audience", token_review),
            case("a custom resource's rules are enforced", custom_resources),
            case("controllers make pods and endpoint slices, and end namespaces", controllers),
            case("what was applied outlives etcd and the API server", restart),
        ],
    )
}

struct World {
    cluster: Mutex<Cluster>,
    _network: Network,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let start = Instant::now();
        let cluster = Cluster::start(&network, Setup { controllers: true }).await?;
        let took = start.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        hold(&[
            Figure::at_most("Kubernetes API with controllers, from nothing to ready", "s", READY, took),
            Figure::info("memory of the API server", "MiB", mib(cluster.api_server().resident_bytes()?)),
            Figure::info("memory of etcd", "MiB", mib(cluster.etcd().resident_bytes()?)),
        ])?;
        apply(&cluster.client(), ACCOUNTS).await?;
        Ok(Self { cluster: Mutex::new(cluster), _network: network })
    }
}

const ACCOUNTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: people }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: reader, namespace: people }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: { name: reader, namespace: people }
rules:
- apiGroups: ['']
  resources: [configmaps]
  verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: reader, namespace: people }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader }
subjects:
- { kind: ServiceAccount, name: reader, namespace: people }
---
apiVersion: v1
kind: ConfigMap
metadata: { name: note, namespace: people }
data: { text: hello }
";

async fn rbac(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let cluster = world.cluster.lock().await;
    let maps = Api::<ConfigMap>::namespaced(cluster.client_of("people", "reader").await?, "people");
    let note = maps.get("note").await.context("reading what may be read")?;
    ensure!(note.data.context("it holds data")?["text"] == "hello");
    let refused = maps.list(&ListParams::default()).await;
    let Err(kube::Error::Api(status)) = refused else { anyhow::bail!("listing was not refused") };
    ensure!(status.code == 403, "{status:?}");

    // A request is logged when its answer is on the way.
    let user = "system:serviceaccount:people:reader";
    wait_until(LIMIT, "the audit log to have both", || async {
        let mut seen = cluster.audit()?;
        seen.retain(|request| request.user == user);
        let verbs: Vec<_> = seen.iter().map(|request| (request.verb.as_str(), request.code)).collect();
        ensure!(verbs == [("get", 200), ("list", 403)], "it has {seen:?}");
        ensure!(seen[0].resource == "configmaps" && seen[0].namespace == "people" && seen[0].name == "note");
        Ok(())
    })
    .await
}

async fn token_review(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let cluster = world.cluster.lock().await;
    let reviews = Api::<TokenReview>::all(cluster.client());
    let review = |token: &str, audience: &str| {
        let spec =
            TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![audience.to_owned()]) };
        let review = TokenReview { spec, ..Default::default() };
        let reviews = reviews.clone();
        async move {
            let reviewed = reviews.create(&PostParams::default(), &review).await?;
            reviewed.status.context("a review has a status")
        }
    };
    let token = cluster.token("people", "reader", Some(AUDIENCE)).await?;
    let status = review(&token, AUDIENCE).await?;
    ensure!(status.authenticated == Some(true), "{status:?}");
    ensure!(status.audiences.as_deref() == Some(&[AUDIENCE.to_owned()]), "{status:?}");
    let user = status.user.context("an authenticated token has a user")?;
    ensure!(user.username.as_deref() == Some("system:serviceaccount:people:reader"), "{user:?}");

    let elsewhere = review(&token, "somebody-else").await?;
    ensure!(elsewhere.authenticated != Some(true), "{elsewhere:?}");
    let (head, _) = token.rsplit_once('.').context("a token has three parts")?;
    let forged = review(&format!("{head}.AAAA"), AUDIENCE).await?;
    ensure!(forged.authenticated != Some(true), "{forged:?}");
    Ok(())
}

const DEFINITION: &str = r"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: { name: boats.e2e.outrigger.dev }
spec:
  group: e2e.outrigger.dev
  scope: Namespaced
  names: { kind: Boat, plural: boats, singular: boat }
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            x-kubernetes-validations:
            - rule: self.floats >= self.hulls
              message: every hull wants a float
            properties:
              hulls: { type: integer }
              floats: { type: integer }
";

async fn custom_resources(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.lock().await.client();
    let boat = |name: &str, floats: u8| {
        format!(
            "apiVersion: e2e.outrigger.dev/v1\nkind: Boat\nmetadata: {{ name: {name} }}\nspec: {{ hulls: 1, floats: {floats} }}\n"
        )
    };
    let applied: Vec<DynamicObject> =
        apply(&client, &format!("{DEFINITION}---\n{}", boat("proa", 1))).await?;
    ensure!(applied.last().map(DynamicObject::name_any).as_deref() == Some("proa"));
    let refused = apply(&client, &boat("log", 0)).await.err().context("the rule was not enforced")?;
    ensure!(format!("{refused:#}").contains("every hull wants a float"), "{refused:#}");
    delete(&client, DEFINITION).await
}

const DEPLOYMENT: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: fleet }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: web, namespace: fleet }
spec:
  replicas: 2
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      containers:
      - { name: web, image: none }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: fleet }
spec:
  ipFamilyPolicy: RequireDualStack
  selector: { app: web }
  ports:
  - port: 80
";

async fn controllers(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.lock().await.client();
    apply(&client, DEPLOYMENT).await?;
    let deployments = Api::<Deployment>::namespaced(client.clone(), "fleet");
    wait_for(&deployments, "web", LIMIT, "two pods", |deployment| {
        let replicas = deployment.status.as_ref().and_then(|status| status.replicas);
        ensure!(replicas == Some(2), "it has {replicas:?}");
        Ok(())
    })
    .await?;
    let pods = Api::<Pod>::namespaced(client.clone(), "fleet");
    let pods = pods.list(&ListParams::default().labels("app=web")).await?;
    ensure!(pods.items.len() == 2);
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), "fleet");
    wait_until(LIMIT, "a slice of each family", || async {
        let found = slices.list(&ListParams::default()).await?.items;
        let mut families: Vec<_> = found.iter().map(|slice| slice.address_type.as_str()).collect();
        families.sort_unstable();
        ensure!(families == ["IPv4", "IPv6"], "there are {families:?}");
        Ok(())
    })
    .await?;
    delete(&client, DEPLOYMENT).await?;
    gone(&Api::<Namespace>::all(client), "fleet", LIMIT).await
}

async fn restart(world: std::sync::Arc<World>) -> anyhow::Result<()> {
    let mut cluster = world.cluster.lock().await;
    let maps = Api::<ConfigMap>::namespaced(cluster.client(), "people");
    let before = maps.get("note").await?;
    cluster.stop();
    ensure!(maps.get("note").await.is_err(), "a stopped API server answered");
    cluster.start_again().await?;
    let after = maps.get("note").await.context("reading with the same client after a restart")?;
    ensure!(before.uid() == after.uid() && before.resource_version() == after.resource_version());
    // Keys are kept, too: a token that was granted before still holds, and is granted again.
    cluster.client_of("people", "reader").await?.apiserver_version().await.context("with a new token")?;
    Ok(())
}
