//! The whole: opens what is kept, binds the ports, starts the sources, and serves until it is told to stop.

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use aws_lc_rs::digest;
use kube::Client;
use outrigger_certs::{CertificateAuthority, Credentials, SpiffeId, TrustDomain, renew_at, retry_delay};
use outrigger_policy::catalog::Defaults;
use outrigger_policy::kinds;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::announce::Announce;
use crate::api::{self, AdminToken, Api};
use crate::attest::JoinTokens;
use crate::config::{Config, Inbound, Mtls, Outbound, PolicyStore as StoreKind};
use crate::mesh::{Mesh, Settings};
use crate::metrics::Metrics;
use crate::policies::consul::ConsulStore;
use crate::policies::embedded::Embedded;
use crate::policies::kubernetes::{KubernetesStore, status};
use crate::policies::writer::Writer;
use crate::policies::{PolicyStore, resolver};
use crate::push::{Ads, Proxies};
use crate::server::{self, Services};
use crate::sign::{Sign, SignLimits};
use crate::sources::{self, Source};
use crate::store::{Change, Store, Table};
use crate::tokens::{Tokens, hex};

/// How long open streams have to end after the stop.
const STOP_GRACE: Duration = Duration::from_millis(1500);
/// The longest sleep of the task that renews our own leaf: a clock that jumps is noticed within a minute.
const RENEWAL_CHECK: Duration = Duration::from_mins(1);
/// The record of the store that names the root of the CA in the data directory.
const OWN_ROOT: &str = "own-root";

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
        let ca = Arc::new(open_ca(config, &store).await?);
        let identity = config.identity()?;
        write_root(&data_dir.join("root.pem"), &ca)?;
        let admin = AdminToken::open_or_create(&data_dir.join("admin-token"))?;

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
        let client = if config.kubernetes.enabled { Some(config.kubernetes.client().await?) } else { None };
        let (policies, cluster_policies) = open_policies(config, &store, client)?;
        let (resolutions, resolved) = watch::channel(None);
        let mut sources = start_sources(config, &stop)?;
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

        let tasks = TaskTracker::new();
        for (index, source) in sources.into_iter().enumerate() {
            tasks.spawn(follow(index, source, Arc::clone(&mesh), stop.clone()));
        }
        let resolving = resolver::run(policies.pictures(), Arc::clone(&mesh), resolutions, tasks.clone());
        tasks.spawn(until(stop.clone(), resolving));
        if let Some(store) = cluster_policies {
            let leading = watch::Sender::new(true).subscribe();
            let writing = status::run(store, resolved.clone(), Arc::clone(&proxies), leading);
            tasks.spawn(until(stop.clone(), writing));
        }
        let writer = Writer::new(policies, resolved, Arc::clone(&metrics));
        let own = keep_renewed(
            Arc::clone(&ca),
            identity.clone(),
            config.leaf_life.0,
            credentials.clone(),
            Arc::clone(&metrics),
        );
        tasks.spawn(until(stop.clone(), own));

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
                ca,
                vec![Box::new(JoinTokens::new(Arc::clone(&tokens)))],
                Arc::clone(&tokens),
                identity,
                config.leaf_life.0,
                limits,
                Arc::clone(&metrics),
            ),
            announce: Announce::new(Arc::clone(&mesh), Arc::clone(&metrics), stop.clone()),
        };
        let registry = metrics.register();
        let serving =
            server::serve(listener, credentials, services, config.max_connections, metrics, stop.clone());
        tasks.spawn(ended("discovery", serving));
        let api = Arc::new(Api {
            mesh: Arc::clone(&mesh),
            proxies,
            tokens,
            writer,
            store: Arc::clone(&store),
            admin,
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

fn settings(config: &Config) -> Settings {
    Settings {
        cidrs: config.mesh_cidrs.iter().map(ToString::to_string).collect(),
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

fn start_sources(config: &Config, stop: &CancellationToken) -> anyhow::Result<Vec<Source>> {
    let mut started = Vec::new();
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

async fn open_ca(config: &Config, store: &Store) -> anyhow::Result<CertificateAuthority> {
    let trust_domain = config.trust_domain()?;
    let read = |path: &Path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read the CA's file {}", path.display()))
    };
    match (&config.ca.certificate_file, &config.ca.key_file, &config.ca.roots_file) {
        (Some(certificate), Some(key), Some(roots)) => {
            let key = zeroize::Zeroizing::new(read(key)?);
            Ok(CertificateAuthority::from_pem(&read(certificate)?, &key, &read(roots)?, &trust_domain)?)
        }
        _ => own_ca(&config.data_dir, &trust_domain, store).await,
    }
}

/// The CA in the data directory. It is made once in the life of a store, which remembers its root: a new root where the
/// old one is only out of sight, such as behind a mount that failed, would cut off every workload.
async fn own_ca(
    data_dir: &Path,
    trust_domain: &TrustDomain,
    store: &Store,
) -> anyhow::Result<CertificateAuthority> {
    let dir = data_dir.join("ca");
    let known = store.load::<String>(Table::Authority)?.into_iter().find(|(name, _)| name == OWN_ROOT);
    let Some((_, known)) = known else {
        let ca = CertificateAuthority::open_or_create(&dir, trust_domain)?;
        let marked = store.submit(vec![Change::put(Table::Authority, OWN_ROOT, &fingerprint(&ca))]);
        marked.durable().await.context("cannot remember which CA this mesh has")?;
        return Ok(ca);
    };
    let found = CertificateAuthority::open(&dir, trust_domain)?;
    let fault = match &found {
        Some(ca) if fingerprint(ca) == known => None,
        Some(ca) => Some(format!("has another root (SHA-256 {})", fingerprint(ca))),
        None => Some("is missing".to_owned()),
    };
    match (found, fault) {
        (Some(ca), None) => Ok(ca),
        (_, fault) => anyhow::bail!(
            "this mesh's CA, {dir}/ca.pem, {}, while {data} belongs to the root with SHA-256 {known}: restore ca.pem \
             from a backup, or mount what holds it. To start a new mesh instead, which no running workload trusts and \
             all must join anew, move controller.redb away",
            fault.unwrap_or_default(),
            dir = dir.display(),
            data = data_dir.join("controller.redb").display(),
        ),
    }
}

/// SHA-256 of the root; a CA of our own has one.
fn fingerprint(ca: &CertificateAuthority) -> String {
    let roots: Vec<u8> = ca.bundle().roots().iter().flat_map(|root| root.iter().copied()).collect();
    hex(digest::digest(&digest::SHA256, &roots).as_ref())
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
    ca: Arc<CertificateAuthority>,
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

fn unix(time: SystemTime) -> i64 {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
