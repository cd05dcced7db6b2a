//! The peers' certificates: of the same shape as the mesh's own, so that a handshake costs all the same.
//!
//! P-256 throughout; a root, an issuing certificate below it, leaves that are good for both sides and carry a SPIFFE id.
//! The one addition is a DNS name in the server's leaf: nginx cannot check any other.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// Who the client's proxy is.
pub(crate) const CLIENT_ID: &str = "spiffe://outrigger.local/ns/default/sa/client";
/// Who the server's proxy is.
pub(crate) const SERVER_ID: &str = "spiffe://outrigger.local/ns/default/sa/backend";
/// The DNS name in the server's leaf.
pub(crate) const SERVER_NAME: &str = "backend.bench";

/// Files of the peers.
pub(crate) struct Certificates {
    pub(crate) folder: PathBuf,
}

impl Certificates {
    /// Writes `ca.pem` and, for `client` and `server`, `NAME.pem` (leaf and issuer), `NAME.key`, and `NAME.both.pem`.
    pub(crate) fn write(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let (root_params, root_key) = authority("bench root")?;
        let root = root_params.self_signed(&root_key).context("signing a root")?;
        let root_issuer = Issuer::new(root_params, root_key);
        let (params, key) = authority("bench issuing CA")?;
        let intermediate = params.signed_by(&key, &root_issuer).context("signing an issuer")?.pem();
        let issuer = Issuer::new(params, key);
        let put = |name: &str, text: &str| -> Result<()> {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
        };
        put("ca.pem", &root.pem())?;
        for (name, id) in [("client", CLIENT_ID), ("server", SERVER_ID)] {
            let key = KeyPair::generate().context("making a key")?;
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(id.try_into().context("a URI")?)];
            if name == "server" {
                params
                    .subject_alt_names
                    .push(SanType::DnsName(SERVER_NAME.try_into().context("a DNS name")?));
            }
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let leaf = params.signed_by(&key, &issuer).context("signing a leaf")?.pem();
            let (chain, key) = ([leaf, intermediate.clone()].concat(), key.serialize_pem());
            put(&format!("{name}.pem"), &chain)?;
            put(&format!("{name}.key"), &key)?;
            put(&format!("{name}.both.pem"), &[chain, key].concat())?;
        }
        Ok(Self { folder: folder.to_owned() })
    }
}

fn authority(name: &str) -> Result<(CertificateParams, KeyPair)> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok((params, KeyPair::generate().context("making a CA key")?))
}
