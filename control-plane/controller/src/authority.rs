//! Which CA signs: files that were brought, the cluster's Secret, or the controller's own in its data directory.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use aws_lc_rs::digest;
use kube::Client;
use outrigger_certs::{CertificateAuthority, TrustDomain};
use tokio::sync::watch;

use crate::config::Config;
use crate::kubernetes::authority::Authority;
use crate::store::{Change, Store, Table};
use crate::tokens::hex;

/// The record of the store that names the root of the CA in the data directory.
const OWN_ROOT: &str = "own-root";

/// Who signs, now: in Kubernetes the issuing certificate can be renewed while we run. The roots stay.
pub(crate) type Issuer = watch::Receiver<Arc<CertificateAuthority>>;

/// The CA by the configuration: from files that were brought; else, in Kubernetes, from the cluster, with what keeps it
/// there; else from the data directory.
pub(crate) async fn open(
    config: &Config,
    store: &Store,
    kubernetes: Option<&Client>,
) -> anyhow::Result<(Issuer, Option<Authority>)> {
    let trust_domain = config.trust_domain()?;
    let read = |path: &Path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read the CA's file {}", path.display()))
    };
    let ca = match (&config.ca.certificate_file, &config.ca.key_file, &config.ca.roots_file, kubernetes) {
        (Some(certificate), Some(key), Some(roots), _) => {
            let key = zeroize::Zeroizing::new(read(key)?);
            CertificateAuthority::from_pem(&read(certificate)?, &key, &read(roots)?, &trust_domain)?
        }
        (_, _, _, Some(client)) => {
            let is_brought = config.kubernetes.external_ca;
            let opened =
                Authority::open(client.clone(), &config.mesh_namespace, &trust_domain, is_brought).await?;
            return Ok((opened.issuer(), Some(opened)));
        }
        _ => own_ca(&config.data_dir, &trust_domain, store).await?,
    };
    // Nobody sends another: the receivers keep this one.
    Ok((watch::channel(Arc::new(ca)).1, None))
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

/// SHA-256 of the roots; a CA of our own has one.
pub(crate) fn fingerprint(ca: &CertificateAuthority) -> String {
    let roots: Vec<u8> = ca.bundle().roots().iter().flat_map(|root| root.iter().copied()).collect();
    hex(digest::digest(&digest::SHA256, &roots).as_ref())
}
