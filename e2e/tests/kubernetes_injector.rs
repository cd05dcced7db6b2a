//! The injector behind a real API server: the webhook's selectors, its certificate, its permissions, Pod Security, and every
//! pod of `control-plane/inject/tests/cases` as the server takes it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures_util::future::join_all;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, DynamicObject, ListParams, PostParams};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::kubernetes::{Cluster, Setup, apply};
use outrigger_e2e::network::{Host, Network};
use outrigger_e2e::process::Process;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use outrigger_e2e::{client, sandbox};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio::sync::Mutex;

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 15443;
const METRICS: u16 = 15490;
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../control-plane/inject/tests/cases");
/// Admission reviews at once.
const BURST: usize = 1000;
/// Milliseconds.
const BURST_P99: f64 = 50.0;

fn main() -> ExitCode {
    suite(
        "kubernetes_injector",
        World::build,
        vec![
            case("who opted in gets a sidecar, and nobody else is asked about", selectors),
            case("the API server takes each pod as the cases say", cases),
            case("Pod Security permits what the injector makes, level by level", pod_security),
            case("a pod of the node's network leaves an event", event),
            case("a thousand pods at once", burst),
            case("a new certificate needs no restart", certificate),
            case("without the injector, who opted in is refused and others are untouched", away),
        ],
    )
}

struct World {
    cluster: Cluster,
    /// By mode; each has the namespaces with the label `mode`.
    injectors: BTreeMap<&'static str, Injector>,
    ca: Ca,
    _network: Network,
}

struct Injector {
    host: Host,
    process: Mutex<Process>,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let cluster = Cluster::start(&network, Setup::default()).await?;
        let client = cluster.client();
        apply(&client, OBJECTS).await?;
        for name in ["outrigger-system", "shop", "quiet"] {
            namespace(
                &client,
                name,
                &json!({ "outrigger.dev/inject": if name == "shop" { "enabled" } else { "no" } }),
                "init",
            )
            .await?;
        }
        let kubeconfig = cluster.kubeconfig_of("outrigger-system", "outrigger-injector").await?;
        let ca = Ca::new()?;
        let mut injectors = BTreeMap::new();
        let mut secret = None;
        for mode in ["init", "cni"] {
            let host = network.host(&format!("injector-{mode}")).await?;
            let config = json!({
                "kubernetes": { "kubeconfig": kubeconfig },
                "metrics_listen": format!("[::]:{METRICS}"),
                "injector": { "listen": format!("[::]:{PORT}"), "mode": mode, "image": "outrigger-proxy:1" },
            });
            let file = sandbox::get().work.join(format!("injector-{mode}.yaml"));
            std::fs::write(&file, config.to_string()).context("writing the injector's configuration")?;
            let mut command = Command::new(sandbox::get().binary("outrigger-controller")?);
            command.args(["--role", "injector", "--config"]).arg(&file).env("RUST_BACKTRACE", "1");
            let process = host.spawn(&format!("injector-{mode}"), command).await?;
            injectors.insert(mode, Injector { host, process: Mutex::new(process) });
        }
        let world = Self { cluster, injectors, ca, _network: network };
        secret.replace(world.ca.secret(&world)?);
        apply(&world.cluster.client(), &secret.unwrap_or_default()).await?;
        for (mode, injector) in &world.injectors {
            injector.wait_ready().await?;
            apply(&world.cluster.client(), &World::webhooks(mode, &injector.host, &world.ca)?).await?;
        }
        Ok(world)
    }

    /// The chart's two entries, for the namespaces of a mode, with an address in place of the Service.
    fn webhooks(mode: &str, host: &Host, ca: &Ca) -> anyhow::Result<String> {
        let entry = |name: &str, namespaces: Value, pods: Value| {
            json!({
                "name": name,
                "namespaceSelector": { "matchExpressions": [
                    namespaces,
                    { "key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["outrigger-system", "kube-system"] },
                    { "key": "mode", "operator": "In", "values": [mode] },
                ] },
                "objectSelector": { "matchExpressions": [pods] },
                "rules": [{ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"], "scope": "Namespaced" }],
                "clientConfig": { "url": format!("https://{}/inject", host.at(PORT)), "caBundle": ByteString(ca.root.clone().into_bytes()) },
                "admissionReviewVersions": ["v1"],
                "sideEffects": "NoneOnDryRun",
                "failurePolicy": "Fail",
                "matchPolicy": "Equivalent",
                "reinvocationPolicy": "IfNeeded",
                "timeoutSeconds": 10,
            })
        };
        let label = |operator: &str, value: &str| json!({ "key": "outrigger.dev/inject", "operator": operator, "values": [value] });
        let configuration = json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": { "name": format!("outrigger-injector-{mode}") },
            "webhooks": [
                entry("namespace.injector.outrigger.dev", label("In", "enabled"), label("NotIn", "disabled")),
                entry("pod.injector.outrigger.dev", label("NotIn", "enabled"), label("In", "enabled")),
            ],
        });
        serde_json::to_string(&configuration).context("it is plain data")
    }

    async fn create(&self, namespace: &str, pod: &Value) -> Result<Value, kube::Error> {
        let pods = Api::<DynamicObject>::namespaced_with(
            self.cluster.client(),
            namespace,
            &kube::api::ApiResource::erase::<Pod>(&()),
        );
        let object: DynamicObject = serde_json::from_value(pod.clone()).map_err(kube::Error::SerdeError)?;
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let created = pods.create(&dry, &object).await?;
        serde_json::to_value(created).map_err(kube::Error::SerdeError)
    }
}

impl Injector {
    async fn wait_ready(&self) -> anyhow::Result<()> {
        wait_until(LIMIT, "the injector to be ready", || async {
            self.process.lock().await.expect_running()?;
            self.metrics("/ready").await.map(drop)
        })
        .await
    }

    async fn metrics(&self, path: &'static str) -> anyhow::Result<String> {
        let address = self.host.at(METRICS);
        let reply = self.host.run(move || client::get(address, "injector", path)).await?.expect(200)?;
        Ok(String::from_utf8_lossy(&reply.body).into_owned())
    }
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

impl Ca {
    fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), root })
    }

    fn secret(&self, world: &World) -> anyhow::Result<String> {
        let names: Vec<String> =
            world.injectors.values().map(|injector| injector.host.v4().to_string()).collect();
        let key = KeyPair::generate()?;
        let leaf = CertificateParams::new(names)?.signed_by(&key, &self.issuer)?.pem();
        let data = |text: String| ByteString(text.into_bytes());
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": { "name": "outrigger-injector-tls", "namespace": "outrigger-system" },
            "data": { "tls.crt": data(leaf), "tls.key": data(key.serialize_pem()) },
        });
        Ok(secret.to_string())
    }
}

/// What the chart grants the injector.
const OBJECTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: outrigger-system }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: outrigger-injector, namespace: outrigger-system }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: { name: outrigger-injector }
rules:
- { apiGroups: [''], resources: [namespaces], verbs: [get, list, watch] }
- { apiGroups: [events.k8s.io], resources: [events], verbs: [create, patch] }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: { name: outrigger-injector }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: outrigger-injector }
subjects:
- { kind: ServiceAccount, name: outrigger-injector, namespace: outrigger-system }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: { name: outrigger-injector, namespace: outrigger-system }
rules:
- { apiGroups: [''], resources: [secrets], resourceNames: [outrigger-injector-tls], verbs: [get, list, watch] }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: outrigger-injector, namespace: outrigger-system }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: outrigger-injector }
subjects:
- { kind: ServiceAccount, name: outrigger-injector, namespace: outrigger-system }
";

/// Makes a namespace with the service accounts that pods of the cases have; nobody makes them without controllers.
async fn namespace(client: &kube::Client, name: &str, labels: &Value, mode: &str) -> anyhow::Result<()> {
    let mut labels = labels.clone();
    labels["mode"] = mode.into();
    let mut objects = vec![
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } }),
    ];
    objects.extend(["default", "web"].map(|account| {
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": account, "namespace": name } })
    }));
    let yaml: Vec<String> = objects.iter().map(ToString::to_string).collect();
    apply(client, &yaml.join("\n---\n")).await.map(drop)
}

fn pod(name: &str, labels: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "labels": labels },
        "spec": { "containers": [{ "name": "web", "image": "web:1" }] },
    })
}

fn has_sidecar(pod: &Value) -> bool {
    pod["spec"]["initContainers"].as_array().into_iter().flatten().any(|one| one["name"] == "outrigger-proxy")
}

async fn selectors(world: Arc<World>) -> anyhow::Result<()> {
    let inject = |value: &str| json!({ "outrigger.dev/inject": value });
    for (what, namespace, labels, expected) in [
        ("its namespace opted in", "shop", json!({}), true),
        ("so did the pod", "shop", inject("enabled"), true),
        ("the pod opted out", "shop", inject("disabled"), false),
        ("nobody opted in", "quiet", json!({}), false),
        ("the pod alone opted in", "quiet", inject("enabled"), true),
        ("the pod opted out of nothing", "quiet", inject("disabled"), false),
    ] {
        let created = world.create(namespace, &pod("web", &labels)).await?;
        ensure!(has_sidecar(&created) == expected, "{what}: {created:#}");
    }
    let asked = world.injectors["init"].metrics("/metrics").await?;
    ensure!(asked.contains("reviews_total{reason=\"injected\"} 3"), "{asked}");
    ensure!(
        !asked.contains("notOptedIn") && !asked.contains("optedOut"),
        "a pod that did not opt in was asked about: {asked}"
    );
    Ok(())
}

async fn cases(world: Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.client();
    let (mut taken, mut refused) = (0, 0);
    let mut files: Vec<_> = std::fs::read_dir(CASES)?.collect::<Result<_, _>>()?;
    files.sort_by_key(std::fs::DirEntry::path);
    for file in files {
        let path = file.path();
        if path.extension().is_none_or(|end| end != "yaml") {
            continue;
        }
        let name = path.file_stem().and_then(|stem| stem.to_str()).context("a case has a name")?;
        let (facts, pod, expected) = read_case(&path)?;
        let outcome = expected["outcome"].as_str().context("a case has an outcome")?;
        // The webhook is not asked about the first, and ephemeral containers come later than their pod.
        if facts.get("namespace").is_some() || name == "ephemeral" {
            continue;
        }
        let mut labels = json!({});
        for (fact, label) in
            [("inject", "outrigger.dev/inject"), ("pod_security", "pod-security.kubernetes.io/enforce")]
        {
            if let Some(value) = facts[fact].as_str() {
                labels[label] = value.into();
            }
        }
        let of = format!("case-{name}");
        namespace(&client, &of, &labels, facts["mode"].as_str().unwrap_or("init")).await?;
        let created = world.create(&of, &pod).await;
        if let Some(why) = outcome.strip_prefix("refused: ") {
            let Err(kube::Error::Api(status)) = created else { anyhow::bail!("{name}: it was not refused") };
            let why = why.replace("the namespace shop", &format!("the namespace {of}"));
            ensure!(status.message.contains(&why), "{name}: {}", status.message);
            refused += 1;
            continue;
        }
        let created = created.with_context(|| format!("{name}: the API server refuses it"))?;
        let injected = outcome == "injected" || outcome.starts_with("has a sidecar");
        ensure!(has_sidecar(&created) == injected, "{name}: {created:#}");
        if injected {
            let first: Vec<_> = created["spec"]["initContainers"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| &one["name"])
                .take(2)
                .collect();
            ensure!(
                first.get(1).is_some_and(|name| **name == "outrigger-proxy"),
                "{name}: ours are not first: {first:?}"
            );
            let ours = created["spec"]["initContainers"].as_array().into_iter().flatten().take(2);
            let api_token = "/var/run/secrets/kubernetes.io/serviceaccount";
            let mut mounts = ours.flat_map(|one| one["volumeMounts"].as_array().into_iter().flatten());
            ensure!(
                !mounts.any(|mount| mount["mountPath"] == api_token),
                "{name}: ours have the API's token: {created:#}"
            );
        }
        for (index, container) in pod["spec"]["containers"].as_array().into_iter().flatten().enumerate() {
            let there = &created["spec"]["containers"][index];
            ensure!(contains(there, container), "{name}: a container of the application changed: {there:#}");
        }
        taken += 1;
    }
    ensure!(taken > 25 && refused > 10, "{taken} taken, {refused} refused");
    Ok(())
}

/// Whether all of `part` is in `whole`, which may have defaults beside it.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(name, value)| whole.get(name).is_some_and(|found| contains(found, value)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            part.len() <= whole.len() && part.iter().zip(whole).all(|(part, whole)| contains(whole, part))
        }
        // A quantity has more than one form.
        (Value::String(whole), Value::String(part)) => whole == part || (whole == "1" && part == "1000m"),
        _ => whole == part,
    }
}

fn read_case(path: &Path) -> anyhow::Result<(Value, Value, Value)> {
    let text = std::fs::read_to_string(path)?;
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    let [facts, pod] =
        documents.try_into().map_err(|_| anyhow::anyhow!("{}: two documents", path.display()))?;
    let expected = serde_json::from_str(&std::fs::read_to_string(path.with_extension("json"))?)?;
    Ok((facts, pod, expected))
}

async fn pod_security(world: Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.client();
    let mut strict = pod("web", &json!({}));
    strict["spec"]["containers"][0]["securityContext"] = json!({
        "allowPrivilegeEscalation": false, "runAsNonRoot": true, "runAsUser": 1000,
        "capabilities": { "drop": ["ALL"] }, "seccompProfile": { "type": "RuntimeDefault" },
    });
    for (mode, level, expected) in [
        ("init", "privileged", true),
        ("init", "baseline", false),
        ("init", "restricted", false),
        ("cni", "privileged", true),
        ("cni", "baseline", true),
        ("cni", "restricted", true),
    ] {
        let of = format!("level-{mode}-{level}");
        let labels =
            json!({ "outrigger.dev/inject": "enabled", "pod-security.kubernetes.io/enforce": level });
        namespace(&client, &of, &labels, mode).await?;
        match world.create(&of, &strict).await {
            Ok(created) => ensure!(expected && has_sidecar(&created), "{of}: {created:#}"),
            Err(kube::Error::Api(status)) => {
                ensure!(!expected && status.message.contains("cni.enabled"), "{of}: {}", status.message);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

async fn event(world: Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.client();
    let mut pod = pod("agent", &json!({}));
    pod["spec"]["hostNetwork"] = true.into();
    let pods = Api::<Pod>::namespaced(client.clone(), "shop");
    let created = pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
    let skipped = created.metadata.annotations.unwrap_or_default().remove("outrigger.dev/skipped");
    ensure!(skipped.as_deref() == Some("hostNetwork"), "{skipped:?}");
    let events = Api::<Event>::namespaced(client, "shop");
    wait_until(LIMIT, "the event", || async {
        let found = events.list(&ListParams::default()).await?.items;
        let of = |event: &Event| {
            event.reason.as_deref() == Some("InjectionSkipped")
                && event.involved_object.name.as_deref() == Some("agent")
        };
        ensure!(found.iter().any(of), "there are {found:?}");
        Ok(())
    })
    .await
}

async fn burst(world: Arc<World>) -> anyhow::Result<()> {
    let injector = &world.injectors["init"];
    let before = buckets(&injector.metrics("/metrics").await?);
    let created = join_all((0..BURST).map(|number| {
        let world = Arc::clone(&world);
        async move { world.create("shop", &pod(&format!("burst-{number}"), &json!({}))).await }
    }))
    .await;
    for created in created {
        ensure!(has_sidecar(&created?), "a pod of the burst has no sidecar");
    }
    let after = buckets(&injector.metrics("/metrics").await?);
    let counted: Vec<(f64, f64)> =
        after.iter().zip(&before).map(|((limit, after), (_, before))| (*limit, after - before)).collect();
    let all = counted.last().context("there are buckets")?.1;
    ensure!(all >= 1000.0, "{all} reviews were measured");
    // The upper end of the bucket that holds it: an honest bound.
    let p99 = counted.iter().find(|(_, count)| *count >= all * 0.99).context("one bucket holds it")?.0;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let memory = injector.process.lock().await.resident_bytes()? as f64 / f64::from(1 << 20);
    hold(&[
        Figure::at_most(
            "E9: admission review, 1,000 pods at once, p99 is below",
            "ms",
            BURST_P99,
            p99 * 1000.0,
        ),
        Figure::info("memory of the injector after them", "MiB", memory),
    ])
}

/// Upper ends and counts of the duration's histogram.
fn buckets(metrics: &str) -> Vec<(f64, f64)> {
    let lines = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("outrigger_injector_review_duration_seconds_bucket{le=\""));
    lines
        .filter_map(|line| {
            let (limit, count) = line.split_once("\"} ")?;
            Some((limit.replace("+Inf", "inf").parse().ok()?, count.parse().ok()?))
        })
        .collect()
}

async fn certificate(world: Arc<World>) -> anyhow::Result<()> {
    let client = world.cluster.client();
    let next = Ca::new()?;
    // Both CAs are trusted before the new certificate is used, as the leader does it.
    let mut both = Ca::new()?;
    both.root = format!("{}{}", world.ca.root, next.root);
    for (mode, injector) in &world.injectors {
        apply(&client, &World::webhooks(mode, &injector.host, &both)?).await?;
    }
    apply(&client, &next.secret(&world)?).await?;
    for (mode, injector) in &world.injectors {
        apply(&client, &World::webhooks(mode, &injector.host, &next)?).await?;
    }
    wait_until(LIMIT, "pods under the new certificate alone", || async {
        let created = world.create("shop", &pod("web", &json!({}))).await?;
        ensure!(has_sidecar(&created), "no sidecar");
        Ok(())
    })
    .await
}

async fn away(world: Arc<World>) -> anyhow::Result<()> {
    world.injectors["init"].process.lock().await.kill();
    let Err(kube::Error::Api(status)) = world.create("shop", &pod("web", &json!({}))).await else {
        anyhow::bail!("a pod that opted in started without a sidecar");
    };
    ensure!(status.message.contains("namespace.injector.outrigger.dev"), "{}", status.message);
    for (namespace, labels) in [("quiet", json!({})), ("shop", json!({ "outrigger.dev/inject": "disabled" }))]
    {
        let created = world.create(namespace, &pod("web", &labels)).await?;
        ensure!(!has_sidecar(&created), "{created:#}");
    }
    Ok(())
}
