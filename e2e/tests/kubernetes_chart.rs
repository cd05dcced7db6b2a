//! The chart on a real Kubernetes API, installed by real Helm: what the server accepts, what an upgrade leaves alone, what an
//! uninstall leaves behind, and what the accounts may do.
//!
//! No pod runs here. One cluster for all cases; each case installs what it needs and takes it away.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use outrigger_e2e::chart::{self, NAMESPACE, PROFILES};
use outrigger_e2e::kubernetes::{Cluster, Setup, apply, gone, wait_for};
use outrigger_e2e::network::Network;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use tokio::sync::{Mutex, MutexGuard};

const LIMIT: Duration = Duration::from_secs(30);
const INJECTOR: &str = "outrigger-injector";
const CONTROLLER: &str = "outrigger-controller";
const TRUST_BUNDLE: &str = "outrigger-trust-bundle";
const CRD: &str = "accesspolicies.outrigger.dev";

fn main() -> ExitCode {
    suite(
        "kubernetes_chart",
        World::build,
        vec![
            case("every profile is accepted, and so are its pods where restricted is enforced", profiles),
            case("an upgrade leaves caBundle alone", ca_bundle),
            case("the accounts may do what they must, and no more", rights),
            case("policies survive an uninstall, and a new install takes the CRDs over", reinstall),
            case("CRDs are upgraded with the chart", crds_upgrade),
            case("CRDs that kubectl made are taken over if one says so", take_ownership),
        ],
    )
}

struct World {
    /// Held by the case that is at work: there is one place for the chart.
    turn: Mutex<()>,
    cluster: Cluster,
    home: PathBuf,
    _network: Network,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let cluster = Cluster::start(&network, Setup { controllers: false }).await?;
        apply(&cluster.client(), MESH_NAMESPACE).await?;
        let home = sandbox::get().work.join("helm");
        std::fs::create_dir_all(&home).context("making a folder for Helm")?;
        Ok(Self { turn: Mutex::new(()), cluster, home, _network: network })
    }

    fn client(&self) -> Client {
        self.cluster.client()
    }

    /// Helm, as a user types it, in the mesh's namespace.
    async fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = chart::helm(&sandbox::get().tool("helm")?, &self.home);
        command.args(arguments).args(["--namespace", NAMESPACE]).env("KUBECONFIG", self.cluster.kubeconfig());
        self.cluster.host().output(command).await
    }

    /// Installs or upgrades the chart of a folder.
    async fn put(&self, folder: &Path, more: &[&str]) -> anyhow::Result<()> {
        let folder = folder.to_str().context("a folder's name is text")?;
        // An upgrade without values would keep those of the last one.
        let mut arguments = vec!["upgrade", "--install", "--reset-values", "outrigger", folder];
        arguments.extend(more);
        self.helm(&arguments).await.map(drop)
    }

    async fn uninstall(&self) -> anyhow::Result<()> {
        self.helm(&["uninstall", "outrigger"]).await.map(drop)
    }

    /// The turn of a case, which begins without a release.
    async fn turn(&self) -> anyhow::Result<MutexGuard<'_, ()>> {
        let turn = self.turn.lock().await;
        if self.helm(&["status", "outrigger"]).await.is_ok() {
            self.uninstall().await?;
        }
        Ok(turn)
    }
}

/// The level that the chart promises to meet.
const MESH_NAMESPACE: &str = r"
apiVersion: v1
kind: Namespace
metadata:
  name: outrigger-system
  labels: { pod-security.kubernetes.io/enforce: restricted }
---
apiVersion: v1
kind: Namespace
metadata: { name: shop }
";

const POLICY: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: { name: orders, namespace: shop }
spec:
  targetRef: { kind: Service, name: orders }
  rules:
  - { name: web, action: Allow, from: [{ serviceAccounts: [shop/web] }] }
";

fn chart_folder() -> PathBuf {
    chart::folder("outrigger")
}

async fn profiles(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.turn().await?;
    // Of cert-manager and the Prometheus operator only the kinds.
    apply(&world.client(), &foreign_kind("cert-manager.io", "v1", "Certificate", "certificates")).await?;
    apply(&world.client(), &foreign_kind("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors")).await?;
    world.put(&chart_folder(), &[]).await?;
    restricted(&world).await.context("the default")?;
    for profile in PROFILES {
        let values = chart::profile(profile);
        let options = ["--values", values.to_str().context("text")?];
        world.put(&chart_folder(), &options).await.with_context(|| format!("profile {profile}"))?;
        restricted(&world).await.with_context(|| format!("profile {profile}"))?;
    }
    let everything = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chart/everything.yaml");
    world.put(&chart_folder(), &["--values", everything.to_str().context("text")?]).await?;
    restricted(&world).await.context("every option")?;
    // A check that cannot fail proves nothing.
    let pods: Api<Pod> = Api::namespaced(world.client(), NAMESPACE);
    let privileged = serde_json::from_value(serde_json::json!({
        "metadata": {"name": "privileged"},
        "spec": {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": true}}], "serviceAccountName": CONTROLLER},
    }))?;
    let refused = pods.create(&dry_run(), &privileged).await;
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("violates PodSecurity")),
        "it was admitted"
    );
    world.uninstall().await
}

fn dry_run() -> PostParams {
    PostParams { dry_run: true, ..PostParams::default() }
}

/// Each Deployment's pod, as its ReplicaSet would make it.
async fn restricted(world: &World) -> anyhow::Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(world.client(), NAMESPACE);
    let pods: Api<Pod> = Api::namespaced(world.client(), NAMESPACE);
    for name in [CONTROLLER, INJECTOR] {
        let template = deployments.get(name).await?.spec.context("it has a spec")?.template;
        let mut pod =
            Pod { spec: template.spec, metadata: template.metadata.unwrap_or_default(), ..Pod::default() };
        pod.metadata.name = Some(format!("{name}-0"));
        pods.create(&dry_run(), &pod).await.with_context(|| format!("a pod of {name}"))?;
    }
    Ok(())
}

fn foreign_kind(group: &str, version: &str, kind: &str, plural: &str) -> String {
    format!(
        "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {{ name: {plural}.{group} }}
spec:
  group: {group}
  scope: Namespaced
  names: {{ kind: {kind}, plural: {plural} }}
  versions:
  - name: {version}
    served: true
    storage: true
    schema: {{ openAPIV3Schema: {{ type: object, x-kubernetes-preserve-unknown-fields: true }} }}
"
    )
}

/// The controller writes `caBundle`; Helm compares what it rendered then and now with what is there.
async fn ca_bundle(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.turn().await?;
    world.put(&chart_folder(), &[]).await?;
    let configurations: Api<MutatingWebhookConfiguration> = Api::all(world.client());
    let bundles = |configuration: &MutatingWebhookConfiguration| -> Vec<Option<Vec<u8>>> {
        let webhooks = configuration.webhooks.iter().flatten();
        webhooks
            .map(|webhook| webhook.client_config.ca_bundle.as_ref().map(|bytes| bytes.0.clone()))
            .collect()
    };
    let mut configuration = configurations.get(INJECTOR).await?;
    ensure!(bundles(&configuration) == [None, None], "the chart brings one itself");
    let root = rcgen::generate_simple_self_signed(["webhook".to_owned()])?.cert.pem().into_bytes();
    for webhook in configuration.webhooks.iter_mut().flatten() {
        webhook.client_config.ca_bundle = Some(ByteString(root.clone()));
    }
    configurations.replace(INJECTOR, &PostParams::default(), &configuration).await?;
    let ha = chart::profile("ha");
    let ha = ["--values", ha.to_str().context("text")?, "--set", "injector.timeoutSeconds=7"];
    for (options, seconds) in [(&[][..], 10), (&ha[..], 7), (&[][..], 10)] {
        world.put(&chart_folder(), options).await?;
        let configuration = configurations.get(INJECTOR).await?;
        ensure!(
            bundles(&configuration) == [Some(root.clone()), Some(root.clone())],
            "{options:?} took it away"
        );
        let waits: Vec<_> = configuration.webhooks.iter().flatten().map(|one| one.timeout_seconds).collect();
        ensure!(waits == [Some(seconds), Some(seconds)], "{options:?} did not arrive: {waits:?}");
    }
    world.uninstall().await?;
    gone(&configurations, INJECTOR, LIMIT).await
}

/// `Ok` if the server let it through, whatever came of it.
fn allowed<T>(what: &str, answer: kube::Result<T>) -> anyhow::Result<()> {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 => bail!("{what} is refused: {}", status.message),
        Err(error @ (kube::Error::HyperError(_) | kube::Error::Service(_))) => Err(error.into()),
        _ => Ok(()),
    }
}

fn refused<T>(what: &str, answer: kube::Result<T>) -> anyhow::Result<()> {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
        Err(error) => Err(error).context(what.to_owned()),
        Ok(_) => bail!("{what} is allowed"),
    }
}

async fn rights(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.turn().await?;
    world.put(&chart_folder(), &[]).await?;
    let all = ListParams::default();
    let named = |name: &str| ListParams::default().fields(&format!("metadata.name={name}"));

    let client = world.cluster.client_of(NAMESPACE, CONTROLLER).await?;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let everywhere: Api<Secret> = Api::all(client.clone());
    let maps: Api<ConfigMap> = Api::all(client.clone());
    let own: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let reviews: Api<TokenReview> = Api::all(client.clone());
    let policies = access_policies(client.clone(), None);
    allowed("listing pods", Api::<Pod>::all(client.clone()).list(&all).await)?;
    allowed("listing Services", Api::<Service>::all(client.clone()).list(&all).await)?;
    allowed("reading the CA", secrets.get("outrigger-ca").await)?;
    allowed("watching the CA", secrets.list(&named("outrigger-ca")).await)?;
    allowed("finding the trust bundles", maps.list(&named(TRUST_BUNDLE)).await)?;
    let review = TokenReview { spec: TokenReviewSpec::default(), ..TokenReview::default() };
    allowed("reviewing a token", reviews.create(&PostParams::default(), &review).await)?;
    let bundle: ConfigMap = serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": TRUST_BUNDLE},
    }))?;
    let ours = PatchParams::apply(CONTROLLER).force();
    // Not only past the authorisation: RBAC is asked again when the object turns out to be new.
    own.patch(TRUST_BUNDLE, &ours, &Patch::Apply(&bundle)).await.context("making a trust bundle")?;
    let mut other = bundle.clone();
    other.metadata.name = Some("other".to_owned());
    refused("making another ConfigMap", own.create(&dry_run(), &other).await)?;
    refused("applying another ConfigMap", own.patch("other", &ours, &Patch::Apply(&other)).await)?;
    let nothing = Patch::Merge(serde_json::json!({"metadata": {"annotations": {"a": "b"}}}));
    allowed("writing caBundle", webhooks.patch(INJECTOR, &PatchParams::default(), &nothing).await)?;
    allowed("reading policies", policies.list(&all).await)?;
    refused("listing the namespace's Secrets", secrets.list(&all).await)?;
    refused("listing all Secrets", everywhere.list(&all).await)?;
    refused("reading another Secret", secrets.get("other").await)?;
    refused("listing all ConfigMaps", maps.list(&all).await)?;
    refused(
        "writing another ConfigMap",
        own.patch("kube-root-ca.crt", &PatchParams::default(), &nothing).await,
    )?;
    refused("writing another webhook", webhooks.patch("other", &PatchParams::default(), &nothing).await)?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    refused("deleting a pod", pods.delete("a", &kube::api::DeleteParams::default()).await)?;

    let client = world.cluster.client_of(NAMESPACE, INJECTOR).await?;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    allowed("listing namespaces", Api::<Namespace>::all(client.clone()).list(&all).await)?;
    allowed("watching its certificate", secrets.list(&named("outrigger-injector-tls")).await)?;
    refused("reading the CA", secrets.get("outrigger-ca").await)?;
    refused("listing pods", Api::<Pod>::all(client).list(&all).await)?;

    let reader = world.cluster.client_of(NAMESPACE, "outrigger-cli-reader").await?;
    let object: DynamicObject = serde_json::from_value(serde_json::to_value(one_policy()?)?)?;
    allowed("reading policies", access_policies(reader.clone(), None).list(&all).await)?;
    let shop = access_policies(reader, Some("shop"));
    refused("writing a policy", shop.create(&dry_run(), &object).await)?;
    let writer =
        access_policies(world.cluster.client_of(NAMESPACE, "outrigger-cli-writer").await?, Some("shop"));
    allowed("writing a policy", writer.create(&dry_run(), &object).await)?;
    world.uninstall().await
}

fn one_policy() -> anyhow::Result<serde_json::Value> {
    serde_saphyr::from_str(POLICY).map_err(|error| anyhow::anyhow!("{error}"))
}

fn access_policies(client: Client, namespace: Option<&str>) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("outrigger.dev", "v1alpha1", "AccessPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "accesspolicies");
    match namespace {
        Some(namespace) => Api::namespaced_with(client, namespace, &resource),
        None => Api::all_with(client, &resource),
    }
}

async fn reinstall(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.turn().await?;
    world.put(&chart_folder(), &[]).await?;
    apply(&world.client(), POLICY).await?;
    let policies = access_policies(world.client(), Some("shop"));
    let before = policies.get("orders").await?.uid();
    world.uninstall().await?;
    let deployments: Api<Deployment> = Api::namespaced(world.client(), NAMESPACE);
    gone(&deployments, CONTROLLER, LIMIT).await?;
    gone(&Api::<MutatingWebhookConfiguration>::all(world.client()), INJECTOR, LIMIT).await?;
    ensure!(policies.get("orders").await?.uid() == before, "the policy is another one");
    world.put(&chart_folder(), &[]).await?;
    ensure!(policies.get("orders").await?.uid() == before, "the policy is another one");
    world.uninstall().await?;
    // Under another name it is another release, and Helm wants to hear that it may.
    let folder = chart_folder();
    let install = ["install", "mesh", folder.to_str().context("text")?];
    let answer = world.helm(&install).await;
    ensure!(
        answer.is_err_and(|error| format!("{error:#}").contains("invalid ownership metadata")),
        "it was taken"
    );
    world.helm(&[&install[..], &["--take-ownership"]].concat()).await?;
    ensure!(policies.get("orders").await?.uid() == before, "the policy is another one");
    world.helm(&["uninstall", "mesh"]).await?;
    ensure!(policies.get("orders").await?.uid() == before, "the policy is another one");
    delete_crds(&world).await
}

/// The next case begins on a cluster that never saw us.
async fn delete_crds(world: &World) -> anyhow::Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(world.client());
    for crd in crds.list(&ListParams::default()).await? {
        if crd.spec.group == "outrigger.dev" {
            crds.delete(&crd.name_any(), &kube::api::DeleteParams::default()).await?;
            gone(&crds, &crd.name_any(), LIMIT).await?;
        }
    }
    Ok(())
}

async fn crds_upgrade(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.turn().await?;
    // A version of the chart from before a column was there.
    let older = world.home.join("older");
    copy(&chart_folder(), &older)?;
    let file = older.join("files/crds/outrigger.dev_accesspolicies.yaml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let column = "    - jsonPath: .metadata.creationTimestamp\n      name: Age\n      type: date\n";
    ensure!(text.contains(column), "the CRD has no column of that form any more");
    std::fs::write(&file, text.replace(column, "")).with_context(|| format!("writing {}", file.display()))?;
    let crds: Api<CustomResourceDefinition> = Api::all(world.client());
    let has_age = |crd: &CustomResourceDefinition| {
        let columns =
            crd.spec.versions.iter().flat_map(|version| version.additional_printer_columns.iter().flatten());
        columns.into_iter().any(|column| column.name == "Age")
    };
    world.put(&older, &[]).await?;
    ensure!(!has_age(&crds.get(CRD).await?), "the older chart has the column");
    world.put(&chart_folder(), &[]).await?;
    wait_for(&crds, CRD, LIMIT, "the new column", |crd| {
        ensure!(has_age(crd), "it has none");
        Ok(())
    })
    .await?;
    world.uninstall().await?;
    delete_crds(&world).await
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    for entry in std::fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target).with_context(|| format!("writing {}", target.display()))?;
        }
    }
    Ok(())
}

async fn take_ownership(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.turn().await?;
    let text = std::fs::read_to_string(chart_folder().join("files/crds/outrigger.dev_accesspolicies.yaml"))?;
    apply(&world.client(), &text).await?;
    apply(&world.client(), POLICY).await?;
    let folder = chart_folder();
    let install = ["install", "outrigger", folder.to_str().context("text")?];
    let answer = world.helm(&install).await;
    ensure!(
        answer.is_err_and(|error| format!("{error:#}").contains("invalid ownership metadata")),
        "it was taken"
    );
    world.helm(&[&install[..], &["--take-ownership"]].concat()).await?;
    access_policies(world.client(), Some("shop")).get("orders").await.context("the policy is gone")?;
    world.uninstall().await?;
    delete_crds(&world).await
}
