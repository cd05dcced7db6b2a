//! The webhook's certificate: Secret `outrigger-injector-tls`, which the controller's leader makes and renews. It is
//! watched by the API and not mounted: a mounted Secret follows with a delay of a minute or more, and a pod that mounts one that
//! is not there yet does not start.
//!
//! Last good wins: a Secret that is gone or cannot be used leaves the certificate that there is.

use std::sync::Arc;

use anyhow::Context;
use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::watch;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, version};

use super::metrics::Metrics;

/// The Secret.
const NAME: &str = "outrigger-injector-tls";

/// The newest certificate that could be used. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Certificate {
    current: Arc<watch::Sender<Option<Arc<ServerConfig>>>>,
    metrics: Arc<Metrics>,
}

impl Certificate {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { current: Arc::new(watch::Sender::new(None)), metrics }
    }

    /// For the next handshake.
    pub(super) fn current(&self) -> Option<Arc<ServerConfig>> {
        self.current.borrow().clone()
    }

    /// Takes up each version of the Secret.
    pub(super) async fn follow(self, secrets: Api<Secret>) {
        let versions = watcher::watch_object(secrets, NAME).default_backoff();
        pin_mut!(versions);
        while let Some(version) = versions.next().await {
            match version {
                Ok(Some(secret)) => match usable(&secret) {
                    Ok((config, not_after)) => {
                        self.metrics.certificate_expiry.set(not_after);
                        self.current.send_replace(Some(Arc::new(config)));
                        tracing::info!(secret = NAME, not_after, "the webhook has a certificate");
                    }
                    Err(error) => {
                        tracing::error!(
                            secret = NAME,
                            error = format!("{error:#}"),
                            "the webhook's certificate cannot be used; the last good one stays"
                        );
                    }
                },
                Ok(None) => tracing::warn!(
                    secret = NAME,
                    "waiting for the webhook's certificate: the controller makes it"
                ),
                Err(error) => {
                    tracing::warn!(secret = NAME, %error, "cannot read the webhook's certificate; trying again");
                }
            }
        }
    }
}

/// A TLS configuration of a Secret, and when its certificate ends.
fn usable(secret: &Secret) -> anyhow::Result<(ServerConfig, i64)> {
    let field = |name: &str| {
        let found = secret.data.as_ref().and_then(|data| data.get(name));
        found.with_context(|| format!("it has no {name}"))
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&field("tls.crt")?.0)
        .collect::<Result<_, _>>()
        .context("tls.crt is no PEM")?;
    let leaf = chain.first().context("tls.crt holds no certificate")?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(leaf).context("tls.crt holds no X.509 certificate")?;
    let not_after = parsed.validity().not_after.timestamp();
    let key = PrivateKeyDer::from_pem_slice(&field("tls.key")?.0).context("tls.key is no PEM of a key")?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .context("tls.crt and tls.key do not belong together")?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((config, not_after))
}
