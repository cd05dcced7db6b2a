//! Three controllers of one mesh on a real Kubernetes API: one root, one leader, and what the leader keeps in the cluster.
//!
//! They have no more rights than [`RIGHTS`], which is what the chart must grant for this part. Nobody else runs: pods are
//! objects, and the injector is a webhook configuration.

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use http::Method;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use outrigger_e2e::client;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::kubernetes::{Cluster, Setup, apply, delete, gone, wait_for};
use outrigger_e2e::network::{Host, Network};
use outrigger_e2e::process::Process;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::json;
use tokio::sync::Mutex;

const NAMESPACE: &str = "outrigger-system";
const ACCOUNT: &str = "outrigger-controller";
const BUNDLE: &str = "outrigger-trust-bundle";
/// Whatever is waited for and has no figure of its own.
const LIMIT: Duration = Duration::from_secs(40);
/// Seconds from a label to the ConfigMap.
const LABELLED: f64 = 1.0;
/// Seconds until what somebody changed is put right.
const REPAIRED: f64 = 3.0;
/// By then every replica has looked at the Lease, and is at some moment between two looks.
const SETTLED: Duration = Duration::from_secs(3);
/// Seconds from the stop of a leader to its successor's start.
const HANDED_OVER: f64 = 3.0;
/// Seconds from the kill of a leader to its successor's start: the Lease's 15 and one look at it.
const TAKEN_OVER: f64 = 18.0;
/// Seconds for which a new workload waits for its certificate because a controller was killed (L21).
const CERTIFICATE_GAP: f64 = 5.0;

fn main() -> ExitCode {
    suite(
        "kubernetes_leader",
        World::build,
        vec![
            case("three controllers that start at once have one root and one leader", one_root),
            case("the trust bundle follows labels and injected pods, and is put right", bundles),
            case(
                "caBundle holds what the webhook's certificate ends in, whatever is written there",
                ca_bundle,
            ),
            case("a CA's Secret that goes comes back, and one of another CA changes nothing", ca_secret),
            case("a leader that stops hands over", hand_over),
            case("a leader that is killed is missed by nobody", kill),
            case("nothing was asked for that is not granted", rights),
            // Last: while it starts, the API server does not know yet what it has granted.
            case("the API server goes and comes back", api_server),
        ],
    )
}

const RIGHTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: outrigger-system }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: outrigger-controller, namespace: outrigger-system }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: { name: outrigger-controller, namespace: outrigger-system }
rules:
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [outrigger-controller]
  verbs: [get, update]
- apiGroups: ['']
  resources: [secrets]
  verbs: [create]
- apiGroups: ['']
  resources: [secrets]
  resourceNames: [outrigger-ca, outrigger-injector-tls]
  verbs: [get, list, watch]
- apiGroups: ['']
  resources: [secrets]
  resourceNames: [outrigger-injector-tls]
  verbs: [update]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: outrigger-controller, namespace: outrigger-system }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: outrigger-controller }
subjects:
- { kind: ServiceAccount, name: outrigger-controller, namespace: outrigger-system }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: { name: outrigger-controller }
rules:
- apiGroups: ['']
  resources: [namespaces, pods]
  verbs: [list, watch]
# For the source of services and for attestation, which are none of this suite's business.
- apiGroups: ['']
  resources: [services, nodes, pods, namespaces]
  verbs: [get, list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
- apiGroups: [networking.k8s.io]
  resources: [servicecidrs]
  verbs: [get, list, watch]
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- apiGroups: ['']
  resources: [configmaps]
  resourceNames: [outrigger-trust-bundle]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [admissionregistration.k8s.io]
  resources: [mutatingwebhookconfigurations]
  resourceNames: [outrigger-injector]
  verbs: [get, list, watch, patch]
- apiGroups: [admissionregistration.k8s.io]
  resources: [validatingwebhookconfigurations]
  resourceNames: [outrigger-policies]
  verbs: [get, list, watch, patch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: { name: outrigger-controller }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: outrigger-controller }
subjects:
- { kind: ServiceAccount, name: outrigger-controller, namespace: outrigger-system }
";

struct World {
    network: Network,
    cluster: Mutex<Cluster>,
    replicas: Mutex<Vec<Replica>>,
}

/// A controller on a host of its own.
struct Replica {
    host: Host,
    config: std::path::PathBuf,
    data: std::path::PathBuf,
    process: Process,
}

impl Replica {
    async fn start(network: &Network, cluster: &Cluster, name: &str) -> anyhow::Result<Self> {
        let host = network.host(name).await?;
        let work = &sandbox::get().work;
        let (config, data) = (work.join(format!("{name}.yaml")), work.join(name));
        let settings = json!({
            "data_dir": data,
            "leaf_life": "1m",
            "kubernetes": { "enabled": true, "kubeconfig": cluster.kubeconfig_of(NAMESPACE, ACCOUNT).await? },
        });
        std::fs::write(&config, settings.to_string()).context("writing a controller's configuration")?;
        let process = run(&host, &config).await?;
        Ok(Self { host, config, data, process })
    }

    async fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.kill();
        self.process = run(&self.host, &self.config).await?;
        self.wait_ready().await
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        wait_until(LIMIT, "a controller to be ready", || {
            let alive = self.process.expect_running();
            let host = self.host.clone();
            async move {
                alive?;
                get(&host, "/ready").await.map(drop)
            }
        })
        .await
    }

    /// The value of a metric without labels.
    async fn metric(&self, name: &str) -> anyhow::Result<i64> {
        let text = get(&self.host, "/metrics").await?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("there is no metric {name}"))?.parse()?)
    }

    async fn leads(&self) -> anyhow::Result<bool> {
        Ok(self.metric("outrigger_leader").await? == 1)
    }

    fn root(&self) -> anyhow::Result<String> {
        std::fs::read_to_string(self.data.join("root.pem")).context("reading a controller's root")
    }
}

async fn run(host: &Host, config: &std::path::Path) -> anyhow::Result<Process> {
    let mut command = Command::new(sandbox::get().binary("outrigger-controller")?);
    command.arg("--config").arg(config).env("RUST_BACKTRACE", "1");
    host.spawn("controller", command).await
}

/// `/metrics` or `/ready` of whoever runs on a host.
async fn get(host: &Host, path: &'static str) -> anyhow::Result<String> {
    let address = host.at(15490);
    Ok(host.run(move || client::get(address, "localhost", path)).await?.expect(200)?.text())
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let network = Network::new().await?;
        let cluster = Cluster::start(&network, Setup::default()).await?;
        apply(&cluster.client(), RIGHTS).await?;
        // At once: each finds no CA and makes one.
        let (a, b, c) = tokio::try_join!(
            Replica::start(&network, &cluster, "controller-a"),
            Replica::start(&network, &cluster, "controller-b"),
            Replica::start(&network, &cluster, "controller-c"),
        )?;
        let mut replicas = vec![a, b, c];
        for replica in &mut replicas {
            replica.wait_ready().await?;
        }
        Ok(Self { network, cluster: Mutex::new(cluster), replicas: Mutex::new(replicas) })
    }
}

/// The index of the only leader, once there is one.
async fn leader(replicas: &[Replica]) -> anyhow::Result<usize> {
    leader_but(replicas, None).await
}

/// The same, once it is another one than `old`.
async fn leader_but(replicas: &[Replica], old: Option<usize>) -> anyhow::Result<usize> {
    wait_until(LIMIT, "one leader", || async {
        let mut leaders = Vec::new();
        for (index, replica) in replicas.iter().enumerate() {
            // One that was killed leads nobody.
            if replica.leads().await.unwrap_or(false) {
                leaders.push(index);
            }
        }
        ensure!(leaders.len() == 1 && Some(leaders[0]) != old, "these lead: {leaders:?}");
        Ok(leaders[0])
    })
    .await
}

async fn one_root(world: Arc<World>) -> anyhow::Result<()> {
    let (cluster, replicas) = (world.cluster.lock().await, world.replicas.lock().await);
    let root = replicas[0].root()?;
    for replica in replicas.iter() {
        ensure!(replica.root()? == root, "{} has another root", replica.host.name());
    }
    let secret = Api::<Secret>::namespaced(cluster.client(), NAMESPACE).get("outrigger-ca").await?;
    ensure!(secret.type_.as_deref() == Some("kubernetes.io/tls"));
    ensure!(text(secret.data.as_ref(), "ca.crt")? == root, "the Secret holds another root");
    let map = Api::<ConfigMap>::namespaced(cluster.client(), NAMESPACE).get(BUNDLE).await?;
    ensure!(map.data.context("the ConfigMap is empty")?["trust-bundle.pem"] == root);
    let leads = leader(&replicas).await?;
    let lease = Api::<Lease>::namespaced(cluster.client(), NAMESPACE).get(ACCOUNT).await?;
    let holder = lease.spec.and_then(|spec| spec.holder_identity).context("nobody holds the Lease")?;
    println!("{} leads, as {holder}", replicas[leads].host.name());
    Ok(())
}

fn text(data: Option<&std::collections::BTreeMap<String, ByteString>>, key: &str) -> anyhow::Result<String> {
    let bytes = data.and_then(|data| data.get(key)).with_context(|| format!("there is no {key}"))?;
    Ok(String::from_utf8(bytes.0.clone())?)
}

const SHOP: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { outrigger.dev/inject: enabled } }
";
const SHOP_WITHOUT: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { outrigger.dev/inject: disabled } }
";
const PLAIN: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: plain}}";
const POD: &str = r"
apiVersion: v1
kind: Pod
metadata: { name: web, namespace: plain, labels: { outrigger.dev/injected: 'true' } }
spec: { serviceAccountName: default, containers: [{ name: web, image: web }] }
";

async fn bundles(world: Arc<World>) -> anyhow::Result<()> {
    let (cluster, replicas) = (world.cluster.lock().await, world.replicas.lock().await);
    leader(&replicas).await?;
    let (client, root) = (cluster.client(), replicas[0].root()?);
    let maps = |namespace: &str| Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let current = |namespace: &'static str| {
        let (maps, root) = (maps(namespace), root.clone());
        async move {
            let start = Instant::now();
            wait_for(&maps, BUNDLE, LIMIT, "the roots", |map| {
                ensure!(map.data.as_ref().is_some_and(|data| data.get("trust-bundle.pem") == Some(&root)));
                Ok(())
            })
            .await?;
            anyhow::Ok(start.elapsed().as_secs_f64())
        }
    };
    apply(&client, PLAIN).await?;
    apply(&client, SHOP).await?;
    let labelled = current("shop").await?;
    // Nobody makes the service account here.
    apply(&client, "{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: plain}}")
        .await?;
    apply(&client, POD).await?;
    let injected = current("plain").await?;
    let changed = json!({ "data": { "trust-bundle.pem": "other roots" } });
    maps("shop").patch(BUNDLE, &PatchParams::default(), &Patch::Merge(&changed)).await?;
    let repaired = current("shop").await?;
    maps("shop").delete(BUNDLE, &DeleteParams::default()).await?;
    let restored = current("shop").await?;
    hold(&[
        Figure::at_most("trust bundle, from a namespace's label", "s", LABELLED, labelled),
        Figure::at_most("trust bundle, from the first injected pod", "s", LABELLED, injected),
        Figure::at_most("trust bundle, repaired", "s", REPAIRED, repaired.max(restored)),
    ])?;
    apply(&client, SHOP_WITHOUT).await?;
    gone(&maps("shop"), BUNDLE, LIMIT).await?;
    let pods = Api::<k8s_openapi::api::core::v1::Pod>::namespaced(client.clone(), "plain");
    pods.delete("web", &DeleteParams::default().grace_period(0)).await?;
    gone(&maps("plain"), BUNDLE, LIMIT).await?;
    current(NAMESPACE).await.map(drop)
}

const INJECTOR: &str = r"
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: { name: outrigger-injector }
webhooks:
- name: namespaces.outrigger.dev
  admissionReviewVersions: [v1]
  sideEffects: None
  clientConfig: { service: { name: outrigger-injector, namespace: outrigger-system, path: /inject } }
  objectSelector: { matchLabels: { nobody: has-this } }
  rules: [{ apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [pods] }]
- name: pods.outrigger.dev
  admissionReviewVersions: [v1]
  sideEffects: None
  clientConfig: { service: { name: outrigger-injector, namespace: outrigger-system, path: /inject } }
  objectSelector: { matchLabels: { nobody: has-this } }
  rules: [{ apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [pods] }]
";

/// Seconds until every webhook trusts what the Secret says.
async fn trusted(cluster: &Cluster) -> anyhow::Result<f64> {
    let configurations = Api::<MutatingWebhookConfiguration>::all(cluster.client());
    let secrets = Api::<Secret>::namespaced(cluster.client(), NAMESPACE);
    let start = Instant::now();
    wait_until(LIMIT, "the webhooks to trust the injector's certificate", || async {
        let secret = secrets.get_opt("outrigger-injector-tls").await?.context("there is no Secret")?;
        let roots = text(secret.data.as_ref(), "ca.crt")?;
        let webhooks = configurations.get("outrigger-injector").await?.webhooks.unwrap_or_default();
        ensure!(webhooks.len() == 2, "{webhooks:?}");
        for webhook in webhooks {
            let bundle = webhook.client_config.ca_bundle.context("there is no caBundle")?;
            ensure!(bundle.0 == roots.as_bytes(), "{} trusts something else", webhook.name);
        }
        Ok(())
    })
    .await?;
    Ok(start.elapsed().as_secs_f64())
}

async fn damage(cluster: &Cluster) -> anyhow::Result<()> {
    let configurations = Api::<MutatingWebhookConfiguration>::all(cluster.client());
    let bundle = ByteString(text_of_another_root().into_bytes());
    let client_config = json!({ "caBundle": bundle });
    let patch = json!({ "webhooks": [{ "name": "pods.outrigger.dev", "clientConfig": client_config }] });
    configurations.patch("outrigger-injector", &PatchParams::default(), &Patch::Strategic(&patch)).await?;
    Ok(())
}

/// The API server takes nothing but certificates as a caBundle.
fn text_of_another_root() -> String {
    let key = rcgen::KeyPair::generate().expect("the random generator works");
    let params = rcgen::CertificateParams::new(vec!["other".to_owned()]).expect("it is a name");
    params.self_signed(&key).expect("the key signs").pem()
}

async fn ca_bundle(world: Arc<World>) -> anyhow::Result<()> {
    let (cluster, replicas) = (world.cluster.lock().await, world.replicas.lock().await);
    leader(&replicas).await?;
    apply(&cluster.client(), INJECTOR).await?;
    let first = trusted(&cluster).await?;
    damage(&cluster).await?;
    let repaired = trusted(&cluster).await?;
    // As Helm does with an upgrade: the chart says nothing of caBundle.
    apply(&cluster.client(), INJECTOR).await?;
    let kept = trusted(&cluster).await?;
    delete(&cluster.client(), INJECTOR).await?;
    apply(&cluster.client(), INJECTOR).await?;
    let again = trusted(&cluster).await?;
    hold(&[Figure::at_most("caBundle, repaired", "s", REPAIRED, first.max(repaired).max(kept).max(again))])
}

async fn ca_secret(world: Arc<World>) -> anyhow::Result<()> {
    let (cluster, mut replicas) = (world.cluster.lock().await, world.replicas.lock().await);
    let secrets = Api::<Secret>::namespaced(cluster.client(), NAMESPACE);
    let before = secrets.get("outrigger-ca").await?;
    secrets.delete("outrigger-ca", &DeleteParams::default()).await?;
    let is_back = |secret: &Secret| {
        ensure!(secret.data == before.data, "it is another one");
        Ok(())
    };
    wait_for(&secrets, "outrigger-ca", LIMIT, "it is back", is_back).await?;

    // Something else in its place: who runs goes on, and who starts does not.
    let other = json!({ "data": { "tls.crt": ByteString(b"nonsense".to_vec()) } });
    secrets.patch("outrigger-ca", &PatchParams::default(), &Patch::Merge(&other)).await?;
    wait_until(LIMIT, "the controllers to say so", || async {
        for replica in replicas.iter() {
            ensure!(replica.metric("outrigger_ca_secret_current").await? == 0);
        }
        Ok(())
    })
    .await?;
    let follower = (leader(&replicas).await? + 1) % replicas.len();
    let replica = &mut replicas[follower];
    replica.process.kill();
    replica.process = run(&replica.host, &replica.config).await?;
    let status = replica.process.wait_exit(LIMIT).await?;
    ensure!(!status.success());
    let log = replica.process.log();
    ensure!(log.contains("outrigger-ca cannot be used"), "{log}");

    let restored = json!({ "data": before.data });
    secrets.patch("outrigger-ca", &PatchParams::default(), &Patch::Merge(&restored)).await?;
    replica.start_again().await?;
    ensure!(replicas[follower].root()? == replicas[(follower + 1) % 3].root()?);
    wait_until(LIMIT, "all to be content", || async {
        for replica in replicas.iter() {
            ensure!(replica.metric("outrigger_ca_secret_current").await? == 1);
        }
        Ok(())
    })
    .await
}

async fn hand_over(world: Arc<World>) -> anyhow::Result<()> {
    let mut replicas = world.replicas.lock().await;
    let old = leader(&replicas).await?;
    // A replica that has just started looks at the Lease at once, which is not what is measured.
    tokio::time::sleep(SETTLED).await;
    let start = Instant::now();
    replicas[old].process.terminate()?;
    let new = leader_but(&replicas, Some(old)).await?;
    let took = start.elapsed().as_secs_f64();
    ensure!(replicas[old].process.wait_exit(LIMIT).await?.success());
    replicas[old].start_again().await?;
    ensure!(leader(&replicas).await? == new, "the leadership wandered");
    hold(&[Figure::at_most("L21: leadership handed over", "s", HANDED_OVER, took)])
}

async fn kill(world: Arc<World>) -> anyhow::Result<()> {
    let (cluster, mut replicas) = (world.cluster.lock().await, world.replicas.lock().await);
    let root = replicas[0].root()?;
    // Join tokens lie with one controller: the others get its store, as they would a volume.
    let token = share_token(&mut replicas).await?;
    let old = leader(&replicas).await?;
    trusted(&cluster).await?;

    let start = Instant::now();
    replicas[old].process.kill();
    damage(&cluster).await?;
    // Workloads that start now meet a dead address in three.
    let mut gap: f64 = 0.0;
    for index in 0..4 {
        let since = Instant::now();
        let sidecar = Sidecar::start(&world.network, index, &replicas, &root, &token).await?;
        sidecar.wait_certificate().await?;
        gap = gap.max(since.elapsed().as_secs_f64());
    }
    let new = leader_but(&replicas, Some(old)).await?;
    let took = start.elapsed().as_secs_f64();
    trusted(&cluster).await?;
    let upkeep = start.elapsed().as_secs_f64();
    ensure!(replicas[new].root()? == root);
    replicas[old].start_again().await?;
    ensure!(replicas[old].root()? == root, "there is a second root");
    hold(&[
        Figure::at_most("L21: certificate gap when the leader is killed", "s", CERTIFICATE_GAP, gap),
        Figure::at_most("L21: leadership taken over", "s", TAKEN_OVER, took),
        Figure::info("L21: upkeep of caBundle after the kill", "s", upkeep),
    ])
}

/// A join token that every replica knows.
async fn share_token(replicas: &mut [Replica]) -> anyhow::Result<String> {
    let request = json!({
        "identity": "spiffe://outrigger.local/ns/shop/sa/web", "uses": "reusable", "cidrs": ["0.0.0.0/0"],
    });
    let token = create_token(&replicas[0], request).await?;
    for replica in replicas.iter_mut() {
        replica.process.terminate()?;
        replica.process.wait_exit(LIMIT).await?;
    }
    let store = replicas[0].data.join("controller.redb");
    for replica in replicas.iter_mut().skip(1) {
        std::fs::copy(&store, replica.data.join("controller.redb")).context("copying a store")?;
    }
    for replica in replicas {
        replica.start_again().await?;
    }
    Ok(token)
}

async fn create_token(replica: &Replica, request: serde_json::Value) -> anyhow::Result<String> {
    let admin =
        std::fs::read_to_string(replica.data.join("admin-token")).context("reading the API's token")?;
    let request = http::Request::builder()
        .method(Method::POST)
        .uri("/api/v1/tokens")
        .header(http::header::HOST, "localhost")
        .header(http::header::AUTHORIZATION, format!("Bearer {}", admin.trim()))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(http_body_util::Full::new(request.to_string().into()))?;
    let api = std::net::SocketAddr::from(([127, 0, 0, 1], 15480));
    let reply = replica.host.run(move || client::request(api, request)).await?;
    let made: serde_json::Value = serde_json::from_str(&reply.text())?;
    Ok(made["token"].as_str().with_context(|| format!("no token: {made}"))?.to_owned())
}

/// A sidecar without a workload: it only gets its certificate.
struct Sidecar {
    host: Host,
    process: Mutex<Process>,
}

impl Sidecar {
    async fn start(
        network: &Network,
        index: usize,
        controllers: &[Replica],
        root: &str,
        token: &str,
    ) -> anyhow::Result<Self> {
        let host = network.host(&format!("web-{index}")).await?;
        let folder = sandbox::get().work.join(host.name());
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("token"), token)?;
        std::fs::write(folder.join("root.pem"), root)?;
        let addresses: Vec<_> =
            controllers.iter().map(|replica| replica.host.at(15410).to_string()).collect();
        let config = json!({
            "controller": addresses, "token_file": folder.join("token"), "trust_bundle": folder.join("root.pem"),
        });
        std::fs::write(folder.join("proxy.yaml"), config.to_string())?;
        let mut command = Command::new(sandbox::get().binary("outrigger-proxy")?);
        command.arg("--config").arg(folder.join("proxy.yaml"));
        let process = Mutex::new(host.spawn("sidecar", command).await?);
        Ok(Self { host, process })
    }

    async fn wait_certificate(&self) -> anyhow::Result<()> {
        wait_until(LIMIT, "a certificate", || async {
            self.process.lock().await.expect_running()?;
            let metrics = get(&self.host, "/metrics").await?;
            let signed = r#"outrigger_certificate_signs_total{outcome="ok"}"#;
            ensure!(metrics.contains(signed), "it has none yet");
            Ok(())
        })
        .await
    }
}

async fn api_server(world: Arc<World>) -> anyhow::Result<()> {
    let (mut cluster, mut replicas) = (world.cluster.lock().await, world.replicas.lock().await);
    leader(&replicas).await?;
    let root = replicas[0].root()?;
    cluster.stop();
    wait_until(LIMIT, "nobody to lead", || async {
        for replica in replicas.iter() {
            ensure!(!replica.leads().await?, "{} leads", replica.host.name());
        }
        Ok(())
    })
    .await?;
    for replica in replicas.iter_mut() {
        // It serves proxies as before.
        get(&replica.host, "/ready").await?;
        replica.process.expect_running()?;
    }
    cluster.start_again().await?;
    let start = Instant::now();
    leader(&replicas).await?;
    let leads = start.elapsed().as_secs_f64();
    apply(&cluster.client(), SHOP).await?;
    let maps = Api::<ConfigMap>::namespaced(cluster.client(), "shop");
    wait_for(&maps, BUNDLE, LIMIT, "the roots", |map| {
        ensure!(map.data.as_ref().is_some_and(|data| data.get("trust-bundle.pem") == Some(&root)));
        Ok(())
    })
    .await?;
    damage(&cluster).await?;
    trusted(&cluster).await?;
    ensure!(replicas.iter().all(|replica| replica.root().is_ok_and(|of| of == root)));
    hold(&[Figure::at_most("a leader after the API server is back", "s", TAKEN_OVER, leads)])
}

async fn rights(world: Arc<World>) -> anyhow::Result<()> {
    let cluster = world.cluster.lock().await;
    let user = format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}");
    let audit = cluster.audit()?;
    let refused: Vec<_> = audit.iter().filter(|seen| seen.user == user && seen.code == 403).collect();
    if let Some(seen) = refused.first() {
        bail!("{} requests were refused, the first of them: {seen:?}", refused.len());
    }
    ensure!(audit.iter().any(|seen| seen.user == user && seen.verb == "patch"), "nothing was audited");
    Ok(())
}
