//! The mesh's CA in the cluster: Secret `outrigger-ca`.
//!
//! The first controller makes it; "already exists" means that another was first, and its CA is read. So however many
//! start at once, there is one root. What the root is the mesh also remembers apart from the Secret, in the ConfigMap
//! `outrigger-trust-bundle` of its own namespace: a controller that finds the ConfigMap and no Secret, or a CA that those who
//! trust the ConfigMap would refuse, does not start. A new root where the old one was only lost would cut off every
//! workload at once; that is for a person to decide.
//!
//! While controllers run, the Secret is watched:
//! - an issuing certificate that was renewed under the same roots (as cert-manager does) is taken at once;
//! - a CA under other roots is not: the one in use stays, which is said, and `outrigger_ca_secret_current` is 0;
//! - a Secret that cannot be used, or has gone, changes nothing for who runs. One that a controller made is put back as it
//!   was: it is still known here, and the next controller to start would have nothing to go by.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use outrigger_certs::{CertificateAuthority, Material, TrustBundle, TrustDomain, retry_delay};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use super::{CONTROLLER, MANAGED_BY, Trouble, bundles, watch_one};
use crate::authority::{Issuer, fingerprint};
use crate::controller::unix;
use crate::metrics::Metrics;

/// The Secret.
const SECRET: &str = "outrigger-ca";
/// Its keys.
const CERTIFICATES: &str = "tls.crt";
const KEY: &str = "tls.key";
const ROOTS: &str = "ca.crt";
/// The longest that one attempt takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest pause between two.
const SLOWEST: Duration = Duration::from_secs(15);

/// The CA in the Secret, and what is needed to keep it there.
pub(crate) struct Authority {
    client: Client,
    namespace: String,
    trust_domain: TrustDomain,
    current: watch::Sender<Arc<CertificateAuthority>>,
    material: Material,
    /// A controller made the Secret; nobody brought it.
    is_ours: bool,
}

/// Why there is no CA now.
enum Missing {
    /// Not yet: what is in the way may pass.
    Yet(String),
    /// A person must decide.
    Broken(String),
    /// Look again: another controller was first, or we were.
    Again,
}

impl From<kube::Error> for Missing {
    /// Whatever the API says, even that we may not: the chart's roles may be a moment behind us.
    fn from(error: kube::Error) -> Self {
        Self::Yet(format!("the Kubernetes API: {error}"))
    }
}

impl Authority {
    /// The CA of the mesh whose namespace this is; made if there never was one, unless it `is_brought`. Waits for the API
    /// server, and for a Secret that is to be brought.
    pub(crate) async fn open(
        client: Client,
        namespace: &str,
        trust_domain: &TrustDomain,
        is_brought: bool,
    ) -> anyhow::Result<Self> {
        let mut trouble = Trouble::new("open the mesh's CA in Kubernetes");
        let mut failures = 0;
        loop {
            let attempt = find_or_make(&client, namespace, trust_domain, is_brought);
            let late = || Err(Missing::Yet("the API server did not answer in time".to_owned()));
            match timeout(PATIENCE, attempt).await.unwrap_or_else(|_| late()) {
                Ok((ca, material, is_ours)) => {
                    trouble.over();
                    return Ok(Self {
                        client,
                        namespace: namespace.to_owned(),
                        trust_domain: trust_domain.clone(),
                        current: watch::Sender::new(Arc::new(ca)),
                        material,
                        is_ours,
                    });
                }
                Err(Missing::Again) => {}
                Err(Missing::Yet(reason)) => {
                    trouble.is(&reason);
                    failures += 1;
                    sleep(retry_delay(failures, SLOWEST * 4, &mut fastrand::Rng::new())).await;
                }
                Err(Missing::Broken(reason)) => anyhow::bail!(reason),
            }
        }
    }

    /// Who signs, now and later.
    pub(crate) fn issuer(&self) -> Issuer {
        self.current.subscribe()
    }

    /// Follows the Secret, for as long as it is polled.
    pub(crate) async fn keep(mut self, metrics: Arc<Metrics>) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut seen = pin!(watch_one(secrets, SECRET, "watch the CA's Secret"));
        let mut trouble = Trouble::new("use what is in the CA's Secret");
        while let Some(secret) = seen.next().await {
            let has_gone = secret.is_none();
            let looked = match secret {
                Some(secret) => self.take(secret, &metrics),
                None => Err("it has gone".to_owned()),
            };
            metrics.ca_secret_current.set(i64::from(looked.is_ok()));
            match looked {
                Ok(()) => trouble.over(),
                Err(reason) => trouble.is(&format!("{reason}; the CA in use stays")),
            }
            if has_gone {
                self.put_back().await;
            }
        }
    }

    /// Goes over to the issuing certificate in the Secret, if it is another one under the same roots.
    fn take(&mut self, secret: Secret, metrics: &Metrics) -> Result<(), String> {
        let is_ours = is_ours(&secret);
        let material = material(secret)?;
        let unchanged = material.certificates == self.material.certificates
            && material.key == self.material.key
            && material.roots == self.material.roots;
        if unchanged {
            return Ok(());
        }
        let ca = open(&material, &self.trust_domain)?;
        let old = Arc::clone(&self.current.borrow());
        if !ca.bundle().same_roots(old.bundle()) {
            return Err(format!(
                "it holds a CA with other roots (SHA-256 {}, in use {}); a mesh does not change its roots by a change of \
                 the Secret: put the old one back",
                fingerprint(&ca),
                fingerprint(&old)
            ));
        }
        metrics.issuer_expiry.set(unix(ca.not_after()));
        tracing::info!(
            "the CA's Secret has a new issuing certificate under the same roots; it signs from now on"
        );
        self.current.send_replace(Arc::new(ca));
        (self.material, self.is_ours) = (material, is_ours);
        Ok(())
    }

    /// Makes the Secret again with what was in it. Somebody who brought it does so himself.
    async fn put_back(&self) {
        if !self.is_ours {
            return;
        }
        let mut trouble = Trouble::new("put the CA's Secret back");
        let mut failures = 0;
        loop {
            let put = timeout(PATIENCE, create(&self.client, &self.namespace, &self.material)).await;
            match put {
                Ok(Ok(made)) => {
                    trouble.over();
                    if made {
                        tracing::warn!("the CA's Secret {SECRET} had gone; it is back as it was");
                    }
                    return;
                }
                Ok(Err(error)) => trouble.is(&error),
                Err(_) => trouble.is(&"the API server did not answer in time"),
            }
            failures += 1;
            sleep(retry_delay(failures, SLOWEST * 4, &mut fastrand::Rng::new())).await;
        }
    }
}

async fn find_or_make(
    client: &Client,
    namespace: &str,
    trust_domain: &TrustDomain,
    is_brought: bool,
) -> Result<(CertificateAuthority, Material, bool), Missing> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    // The ConfigMap first: read after the Secret, it might tell of a CA that another controller made in between.
    let remembered = maps.get_opt(bundles::NAME).await?;
    let Some(secret) = secrets.get_opt(SECRET).await? else {
        if is_brought {
            return Err(Missing::Yet(format!(
                "the Secret {namespace}/{SECRET}, which is to be brought, is not there"
            )));
        }
        if remembered.is_some() {
            return Err(Missing::Broken(format!(
                "the Secret {namespace}/{SECRET} with this mesh's CA has gone, while the ConfigMap {namespace}/{map} tells \
                 of its root: restore the Secret from a backup (a controller that still runs puts it back by itself). To \
                 start a new mesh instead, which no running workload trusts, delete that ConfigMap and restart all injected \
                 pods afterwards",
                map = bundles::NAME,
            )));
        }
        let made = CertificateAuthority::generate(trust_domain)
            .map_err(|error| Missing::Broken(error.to_string()))?;
        if create(client, namespace, &made).await? {
            tracing::info!("the mesh's CA is made, in the Secret {namespace}/{SECRET}");
        }
        // What counts is the Secret.
        return Err(Missing::Again);
    };
    let is_ours = is_ours(&secret);
    let unusable = |reason: String| {
        Missing::Broken(format!(
            "the CA in the Secret {namespace}/{SECRET} cannot be used: {reason}; it was left as it is: restore it from a \
             backup"
        ))
    };
    let material = material(secret).map_err(unusable)?;
    let ca = open(&material, trust_domain).map_err(unusable)?;
    let roots = ca.bundle().to_pem();
    let known = remembered.as_ref().and_then(|map| map.data.as_ref()?.get(bundles::KEY));
    if let Some(known) = known
        && let Ok(bundle) = TrustBundle::from_pem(trust_domain.clone(), known.as_bytes(), 0)
        && !ca.is_trusted_by(&bundle)
    {
        return Err(Missing::Broken(format!(
            "the CA in the Secret {namespace}/{SECRET} (root SHA-256 {}) is none that this mesh's workloads trust: they \
             know the roots in the ConfigMap {namespace}/{map}. Restore the Secret from a backup. To start a new mesh \
             instead, delete that ConfigMap and restart all injected pods afterwards",
            fingerprint(&ca),
            map = bundles::NAME,
        )));
    }
    if known != Some(&roots) {
        bundles::apply(client, namespace, &roots).await?;
    }
    Ok((ca, material, is_ours))
}

/// Makes the Secret; `false` where there is one.
async fn create(client: &Client, namespace: &str, material: &Material) -> kube::Result<bool> {
    let data = [(CERTIFICATES, &material.certificates), (KEY, &*material.key), (ROOTS, &material.roots)];
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.to_owned()),
            labels: Some([(MANAGED_BY.to_owned(), CONTROLLER.to_owned())].into()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data.map(|(key, text)| (key.to_owned(), ByteString(text.clone().into_bytes()))).into()),
        ..Secret::default()
    };
    let write = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    match secrets.create(&write, &secret).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_ours(secret: &Secret) -> bool {
    secret.labels().get(MANAGED_BY).is_some_and(|value| value == CONTROLLER)
}

fn material(secret: Secret) -> Result<Material, String> {
    let mut data = secret.data.unwrap_or_default();
    // Moved, not copied: what was the key's buffer is wiped in the end.
    let mut text = |key: &str| {
        let bytes = data.remove(key).ok_or_else(|| format!("it has no key {key}"))?;
        String::from_utf8(bytes.0).map_err(|_| format!("{key} is not text"))
    };
    Ok(Material { certificates: text(CERTIFICATES)?, key: Zeroizing::new(text(KEY)?), roots: text(ROOTS)? })
}

fn open(material: &Material, trust_domain: &TrustDomain) -> Result<CertificateAuthority, String> {
    CertificateAuthority::from_pem(&material.certificates, &material.key, &material.roots, trust_domain)
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
