//! The whole: opens what is kept, binds the ports, starts the sources, and serves until it is told to stop.

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use kube::Client;
use outrigger_certs::{CertificateAuthority, Credentials, SpiffeId, renew_at, retry_delay};
use outrigger_inject::Mode;
use outrigger_policy::catalog::Defaults;
use outrigger_policy::kinds;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::announce::Announce;
use crate::api::access::{Access, AdminToken, Cluster};
use crate::api::{self, Api};
use crate::attest::{Attestor, JoinTokens, ServiceAccounts};
use crate::authority::{self, Issuer};
use crate::config::{Config, Inbound, Mtls, Outbound, PolicyStore as StoreKind};
use crate::kubernetes::{bundles, held, leader, webhook};
use crate::mesh::{Mesh, Settings};
use crate::metrics::Metrics;
use crate::policies::consul::ConsulStore;
use crate::policies::embedded::Embedded;
use crate::policies::kubernetes::{KubernetesStore, status};
use crate::policies::writer::Writer;
use crate::policies::{PolicyStore, resolver};
use crate::push::{Ads, Proxies};
use crate::replicas::{Answering, Replicas};
use crate::server::{self, Services};
use crate::sign::{Sign, SignLimits};
use crate::sources::{self, Source};
use crate::store::Store;
use crate::tokens::Tokens;

/// How long open streams have to end after the stop.
const STOP_GRACE: Duration = Duration::from_millis(1500);
/// The longest sleep of the task that renews our own leaf: a clock that jumps is noticed within a minute.
const RENEWAL_CHECK: Duration = Duration::from_mins(1);

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    /// Where sidecars connect to.
    pub listen: SocketAddr,
    /// Where the API is.
    pub api_listen: SocketAddr,
    /// Where `/metrics` is.
    pub metrics_listen: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
    store: Arc<Store>,
}

impl Controller {
    /// Starts; the ports are bound when it returns. The sources are read from then on.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        // What was started before a failure ends with the guard.
        let guard = stop.clone().drop_guard();
        let data_dir = &config.data_dir;
        make_data_dir(data_dir)
            .with_context(|| format!("cannot make the data directory {}", data_dir.display()))?;
        let store = Arc::new(Store::open(&data_dir.join("controller.redb"))?);
        let kubernetes =
            if config.kubernetes.enabled { Some(config.kubernetes.client().await?) } else { None };
        let (issuer, in_cluster) = authority::open(config, &store, kubernetes.as_ref()).await?;
        let ca = Arc::clone(&issuer.borrow());
        let identity = config.identity()?;
        write_root(&data_dir.join("root.pem"), &ca)?;
        let access = api_access(config, kubernetes.as_ref())?;

        let listener = bind(config.listen, "listen").await?;
        let api_listener = bind(config.api_listen, "api_listen").await?;
        let metrics_listener = bind(config.metrics_listen, "metrics_listen").await?;
        let addresses = (listener.local_addr()?, api_listener.local_addr()?, metrics_listener.local_addr()?);

        let metrics = Arc::new(Metrics { store_writable: store.writable(), ..Metrics::default() });
        metrics.issuer_expiry.set(unix(ca.not_after()));
        let credentials = Credentials::new(ca.bundle().clone());
        renew_own(&ca, &identity, config.leaf_life.0, &credentials, &metrics)
            .context("cannot issue the controller's own certificate")?;

        let tokens = Arc::new(Tokens::load(Arc::clone(&store), identity.clone(), config.leaf_life.0)?);
        let (policies, cluster_policies) = open_policies(config, &store, kubernetes.clone())?;
        let (resolutions, resolved) = watch::channel(None);
        let mut sources = start_sources(config, kubernetes.as_ref(), &stop)?;
        if sources.is_empty() {
            tracing::warn!("no source is configured: the catalog stays empty");
        }
        sources.push(sources::policy::spawn(
            resolved.clone(),
            sources::policy::system_lookup(),
            stop.clone(),
        ));
        let mesh = Arc::new(Mesh::load(
            settings(config),
            sources.iter().map(|source| Arc::clone(&source.name)),
            ca.bundle(),
            Arc::clone(&store),
            Arc::clone(&tokens),
            Arc::clone(&metrics),
        )?);
        let proxies = Arc::new(Proxies::default());
        let replicas = Arc::new(Replicas::new(Arc::clone(&proxies), resolved.clone(), identity.clone()));

        let tasks = TaskTracker::new();
        for (index, source) in sources.into_iter().enumerate() {
            tasks.spawn(follow(index, source, Arc::clone(&mesh), stop.clone()));
        }
        let resolving = resolver::run(policies.pictures(), Arc::clone(&mesh), resolutions, tasks.clone());
        tasks.spawn(until(stop.clone(), resolving));
        let writer = Writer::new(policies, resolved.clone(), Arc::clone(&metrics));
        let own = keep_renewed(
            issuer.clone(),
            identity.clone(),
            config.leaf_life.0,
            credentials.clone(),
            Arc::clone(&metrics),
        );
        tasks.spawn(until(stop.clone(), own));
        if let Some(authority) = in_cluster {
            metrics.ca_secret_current.set(1);
            tasks.spawn(until(stop.clone(), authority.keep(Arc::clone(&metrics))));
        }
        if let Some(client) = &kubernetes {
            let following = Arc::clone(&replicas).follow(
                client.clone(),
                config.mesh_namespace.clone(),
                listener.local_addr()?.port(),
                credentials.clone(),
            );
            tasks.spawn(until(stop.clone(), following));
            let leads = lead(config, client, &ca, &metrics, &stop, &tasks);
            if let Some(store) = cluster_policies {
                let writing = status::run(store, resolved.clone(), Arc::clone(&replicas), leads);
                tasks.spawn(until(stop.clone(), writing));
            }
        }

        let mut attestors: Vec<Box<dyn Attestor>> = vec![Box::new(JoinTokens::new(Arc::clone(&tokens)))];
        if let Some(client) = kubernetes {
            attestors.push(Box::new(ServiceAccounts::new(client, config.trust_domain()?, Arc::clone(&mesh))));
        }
        let limits = SignLimits {
            per_second: config.sign_per_second,
            per_identity_per_second: config.sign_per_identity_per_second,
        };
        let services = Services {
            ads: Ads::new(
                Arc::clone(&mesh),
                Arc::clone(&proxies),
                Arc::clone(&metrics),
                config.max_subscriptions,
                stop.clone(),
            ),
            sign: Sign::new(
                issuer,
                attestors,
                Arc::clone(&tokens),
                identity,
                config.leaf_life.0,
                limits,
                Arc::clone(&metrics),
            ),
            announce: Announce::new(Arc::clone(&mesh), Arc::clone(&metrics), stop.clone()),
            replicas: Answering(Arc::clone(&replicas)),
        };
        let registry = metrics.register();
        let serving = server::serve(
            listener,
            credentials,
            services,
            config.max_connections,
            Arc::clone(&metrics),
            stop.clone(),
        );
        tasks.spawn(ended("discovery", serving));
        let api = Arc::new(Api {
            mesh: Arc::clone(&mesh),
            proxies,
            replicas,
            tokens,
            writer,
            store: Arc::clone(&store),
            access,
            metrics: Arc::clone(&metrics),
            trust_domain: config.trust_domain.clone(),
        });
        tasks.spawn(until(stop.clone(), ended("API", serve_http(api_listener, api::router(api)))));
        let monitoring = api::monitoring(mesh, Arc::clone(&store), registry);
        tasks.spawn(until(stop.clone(), ended("monitoring", serve_http(metrics_listener, monitoring))));
        tasks.close();

        let (listen, api_listen, metrics_listen) = addresses;
        tracing::info!(%listen, %api_listen, %metrics_listen, trust_domain = config.trust_domain, "the controller serves");
        Ok(Self { listen, api_listen, metrics_listen, stop: guard.disarm(), tasks, store })
    }

    /// Ends every stream, waits for it briefly, and makes durable what was submitted.
    pub async fn stop(self) {
        self.stop.cancel();
        if tokio::time::timeout(STOP_GRACE, self.tasks.wait()).await.is_err() {
            tracing::debug!("some connections did not end in time");
        }
        // Not on a thread that serves: it waits for the disk.
        let store = self.store;
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
    }
}

/// Takes part in the election, and does what only the leader does while this replica is it; says when that is.
fn lead(
    config: &Config,
    client: &Client,
    ca: &CertificateAuthority,
    metrics: &Metrics,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> watch::Receiver<bool> {
    let (leader, namespace) = (metrics.leader.clone(), &config.mesh_namespace);
    let leadership = leader::start(client.clone(), namespace, leader::replica(), leader, stop.clone(), tasks);
    let (roots, of) = (ca.bundle().to_pem(), namespace.clone());
    let keep_bundles = {
        let client = client.clone();
        leadership.clone().run(move || bundles::keep(client.clone(), of.clone(), roots.clone()))
    };
    tasks.spawn(until(stop.clone(), keep_bundles));
    if config.injector.settings.mode == Mode::Cni {
        let (client, of) = (client.clone(), namespace.clone());
        let keep_held = leadership.clone().run(move || held::keep(client.clone(), of.clone()));
        tasks.spawn(until(stop.clone(), keep_held));
    }
    let leads = leadership.leads();
    let (client, of) = (client.clone(), namespace.clone());
    let keep_webhook = leadership.run(move || webhook::keep(client.clone(), of.clone()));
    tasks.spawn(until(stop.clone(), keep_webhook));
    leads
}

/// Who may call the API (`api::access` says why).
fn api_access(config: &Config, kubernetes: Option<&Client>) -> anyhow::Result<Access> {
    let is_in_pod = kubernetes.is_some() && config.kubernetes.kubeconfig.is_none();
    let admin = || AdminToken::open_or_create(&config.data_dir.join("admin-token"));
    Ok(Access::new(if is_in_pod { None } else { Some(admin()?) }, kubernetes.map(Cluster::new)))
}

fn settings(config: &Config) -> Settings {
    Settings {
        cidrs: config.mesh_cidrs.clone(),
        mesh_namespace: config.mesh_namespace.clone(),
        defaults: Defaults {
            mtls: match config.mtls {
                Mtls::Strict => kinds::Mtls::Strict,
                Mtls::Permissive => kinds::Mtls::Permissive,
            },
            inbound: match config.inbound {
                Inbound::Allow => kinds::DefaultAction::Allow,
                Inbound::Audit => kinds::DefaultAction::Audit,
                Inbound::Deny => kinds::DefaultAction::Deny,
            },
            outbound: match config.outbound {
                Outbound::Allow => kinds::DefaultAction::Allow,
                Outbound::Audit => kinds::DefaultAction::Audit,
                Outbound::Deny => kinds::DefaultAction::Deny,
            },
        },
        allow_loopback: config.allow_loopback_endpoints,
    }
}

/// The store of policies; the second is the same one, where it is the cluster's, which wants statuses written.
type Stores = (Arc<dyn PolicyStore>, Option<Arc<KubernetesStore>>);

fn open_policies(config: &Config, store: &Arc<Store>, client: Option<Client>) -> anyhow::Result<Stores> {
    Ok(match (config.policies.store, client) {
        (StoreKind::Embedded, _) => (Arc::new(Embedded::load(Arc::clone(store))?), None),
        (StoreKind::Consul, _) => (Arc::new(ConsulStore::start(config.consul.client()?)?), None),
        (StoreKind::Kubernetes, Some(client)) => {
            let store = Arc::new(KubernetesStore::start(client));
            (Arc::clone(&store) as Arc<dyn PolicyStore>, Some(store))
        }
        (StoreKind::Kubernetes, None) => {
            anyhow::bail!("policies.store: `kubernetes` needs kubernetes.enabled")
        }
    })
}

/// In the order of precedence: of two services of one name the first has it. The cluster's own come first, so that nobody who
/// may register in Consul takes a name from them.
fn start_sources(
    config: &Config,
    client: Option<&kube::Client>,
    stop: &CancellationToken,
) -> anyhow::Result<Vec<Source>> {
    let mut started = Vec::new();
    if let Some(client) = client {
        let settings = sources::kubernetes::Settings {
            cluster_domain: config.kubernetes.cluster_domain.clone(),
            trust_domain: config.trust_domain.clone(),
        };
        started.push(sources::kubernetes::spawn(client, settings, stop));
    }
    if !config.consul.addresses.is_empty() {
        let mut consul = config.consul.clone();
        consul.allow_local_addresses = config.allow_loopback_endpoints;
        started.push(sources::consul::spawn(consul, stop.clone())?);
    }
    started.extend(sources::file::spawn(&config.file, stop.clone()));
    Ok(started)
}

/// The directory for its owner only; above it, what is missing is made as everybody makes directories.
fn make_data_dir(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The roots, for sidecars to start with; replaced as a whole, because a sidecar may read it at any time, and only where
/// they changed: a controller can start again while its disk is full.
fn write_root(path: &Path, ca: &CertificateAuthority) -> anyhow::Result<()> {
    let text = ca.bundle().to_pem();
    if std::fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    let temporary = path.with_extension("pem.new");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write the roots to {}", path.display()))
}

async fn bind(address: SocketAddr, field: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} ({field}); is another controller running?"))
}

/// Hands each snapshot of a source to the mesh.
async fn follow(index: usize, mut source: Source, mesh: Arc<Mesh>, stop: CancellationToken) {
    loop {
        let snapshot = Arc::clone(&source.snapshots.borrow_and_update());
        mesh.apply(index, snapshot, SystemTime::now());
        tokio::select! {
            // First: a source that ends because we stop is no error.
            biased;
            () = stop.cancelled() => return,
            changed = source.snapshots.changed() => if changed.is_err() {
                tracing::error!(source = %source.name, "the source has ended; its last snapshot stands");
                return;
            },
        }
    }
}

fn renew_own(
    ca: &CertificateAuthority,
    identity: &SpiffeId,
    life: Duration,
    credentials: &Credentials,
    metrics: &Metrics,
) -> anyhow::Result<SystemTime> {
    let leaf = ca.issue_own(identity, life)?;
    let next = renew_at(leaf.obtained(), leaf.not_after(), &mut fastrand::Rng::new());
    metrics.own_leaf_expiry.set(unix(leaf.not_after()));
    credentials.set_leaf(leaf)?;
    Ok(next)
}

async fn keep_renewed(
    issuer: Issuer,
    identity: SpiffeId,
    life: Duration,
    credentials: Credentials,
    metrics: Arc<Metrics>,
) {
    let mut random = fastrand::Rng::new();
    let mut failures = 0;
    let mut next = credentials
        .leaf()
        .map_or_else(SystemTime::now, |leaf| renew_at(leaf.obtained(), leaf.not_after(), &mut random));
    loop {
        while let Ok(left) = next.duration_since(SystemTime::now()) {
            tokio::time::sleep(left.min(RENEWAL_CHECK)).await;
        }
        let ca = Arc::clone(&issuer.borrow());
        match renew_own(&ca, &identity, life, &credentials, &metrics) {
            Ok(at) => {
                failures = 0;
                next = at;
            }
            Err(error) => {
                failures += 1;
                let left = credentials
                    .leaf()
                    .and_then(|leaf| leaf.not_after().duration_since(SystemTime::now()).ok());
                next = SystemTime::now() + retry_delay(failures, left.unwrap_or_default(), &mut random);
                tracing::error!(%error, "cannot renew the controller's own certificate");
            }
        }
    }
}

async fn serve_http(listener: TcpListener, router: axum::Router) -> std::io::Result<()> {
    axum::serve(listener, router).await
}

async fn ended<E: std::fmt::Display>(what: &'static str, serving: impl Future<Output = Result<(), E>>) {
    if let Err(error) = serving.await {
        tracing::error!(%error, "the {what} port failed");
    }
}

async fn until(stop: CancellationToken, work: impl Future<Output = ()>) {
    stop.run_until_cancelled(work).await;
}

/// Whole seconds, for metrics.
pub(crate) fn unix(time: SystemTime) -> i64 {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
