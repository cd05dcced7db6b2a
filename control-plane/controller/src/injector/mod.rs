//! `--role injector`: the webhook that puts sidecars into pods.
//!
//! What becomes of a pod is decided by `outrigger-inject`, without I/O; here is what it needs to be asked: a TLS port whose
//! certificate comes from a Secret (`certificate`), the labels of namespaces (`namespaces`), admission reviews (`review`), and
//! events for what is not seen otherwise (`events`). The path of a pod: `serve` -> `review` -> `outrigger_inject::decide`.
//!
//! It is a process of its own, because pods must be admitted while the controller is away; so it shares nothing with
//! it but the configuration file.

mod certificate;
mod events;
mod metrics;
mod namespaces;
mod review;
mod serve;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use outrigger_inject::{Mesh, Settings};
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::certificate::Certificate;
use self::events::Events;
use self::metrics::Metrics;
use self::namespaces::Namespaces;
use self::review::Reviewer;
use crate::config;

/// How long reviews are still taken after the signal to stop: the API server learns with a delay that this replica leaves, and
/// a review that nobody answers is a pod that is refused.
const LEAVE: Duration = Duration::from_secs(5);
/// For what is under way after that.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// The section `injector` of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Config {
    /// The webhook, for the API server.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// What sidecars are made of.
    #[serde(flatten)]
    pub settings: Settings,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([0, 0, 0, 0], 15443)), settings: Settings::default() }
    }
}

/// A running injector.
#[derive(Debug)]
pub struct Injector {
    /// Where the webhook is.
    pub listen: SocketAddr,
    /// Where `/metrics` is.
    pub metrics_listen: SocketAddr,
    leaving: CancellationToken,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Injector {
    /// Starts; the ports are bound when it returns, and `/ready` says when the webhook can be used.
    pub async fn start(config: &config::Config) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        // What was started before a failure ends with the guard.
        let guard = stop.clone().drop_guard();
        let client = config.kubernetes.client().await?;
        let listener = bind(config.injector.listen, "injector.listen").await?;
        let metrics_listener = bind(config.metrics_listen, "metrics_listen").await?;
        let (listen, metrics_listen) = (listener.local_addr()?, metrics_listener.local_addr()?);

        let tasks = TaskTracker::new();
        let spawn = |work: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let stop = stop.clone();
            tasks.spawn(async move { stop.run_until_cancelled(work).await });
        };
        let metrics = Arc::new(Metrics::default());
        let certificate = Certificate::new(Arc::clone(&metrics));
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &config.mesh_namespace);
        spawn(Box::pin(certificate.clone().follow(secrets)));
        let (namespaces, following) = Namespaces::new(Api::all(client.clone()));
        spawn(Box::pin(following));
        let (events, publishing) = Events::new(client, Arc::clone(&metrics));
        spawn(Box::pin(publishing));

        let reviewer = Reviewer::new(mesh(config), namespaces, events, Arc::clone(&metrics));
        let leaving = CancellationToken::new();
        let monitoring = monitoring(certificate.clone(), leaving.clone(), metrics.register());
        spawn(Box::pin(async move {
            if let Err(error) = axum::serve(metrics_listener, monitoring).await {
                tracing::error!(%error, "the monitoring port failed");
            }
        }));
        tasks.spawn(serve::serve(listener, certificate, review::router(reviewer), stop.clone()));
        tasks.close();
        tracing::info!(%listen, %metrics_listen, mode = ?config.injector.settings.mode, "the injector serves");
        Ok(Self { listen, metrics_listen, leaving, stop: guard.disarm(), tasks })
    }

    /// Is not ready any more, answers for a while still, and ends.
    pub async fn stop(self) {
        self.leaving.cancel();
        tokio::time::sleep(LEAVE).await;
        self.stop.cancel();
        if tokio::time::timeout(STOP_GRACE, self.tasks.wait()).await.is_err() {
            tracing::debug!("some connections did not end in time");
        }
    }
}

fn mesh(config: &config::Config) -> Mesh {
    Mesh {
        trust_domain: config.trust_domain.clone(),
        namespace: config.mesh_namespace.clone(),
        cluster_domain: config.kubernetes.cluster_domain.clone(),
        settings: config.injector.settings.clone(),
    }
}

async fn bind(address: SocketAddr, field: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} ({field}); is another injector running?"))
}

fn monitoring(certificate: Certificate, leaving: CancellationToken, registry: Registry) -> Router {
    let ready = move || {
        let answer = if leaving.is_cancelled() {
            (StatusCode::SERVICE_UNAVAILABLE, "leaving\n")
        } else if certificate.current().is_none() {
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "there is no usable certificate in the Secret outrigger-injector-tls yet: the controller makes it\n",
            )
        } else {
            (StatusCode::OK, "ready\n")
        };
        std::future::ready(answer)
    };
    Router::new()
        .route("/metrics", crate::api::exposition(registry))
        .route("/live", get(|| std::future::ready("live\n")))
        .route("/ready", get(ready))
}
