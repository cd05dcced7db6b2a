//! Certificates for what is not ours: Consul's TLS mode, and peers that the mesh must refuse.

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use crate::network::Host;

/// A certificate authority of a test.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A leaf and its key, PEM.
#[derive(Debug)]
pub struct Leaf {
    /// The certificate.
    pub chain: String,
    /// Its key.
    pub key: String,
}

impl Authority {
    /// Makes a self-signed root.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate().context("making a CA key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).context("signing a root")?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// The root, PEM.
    pub fn pem(&self) -> String {
        self.pem.clone()
    }

    /// A certificate for a server on `host`, with its addresses and one name.
    pub fn server(&self, host: &Host, name: &str) -> anyhow::Result<Leaf> {
        let names = vec![
            SanType::DnsName(name.try_into().context("a DNS name")?),
            SanType::DnsName("localhost".try_into().context("a DNS name")?),
            SanType::IpAddress(host.v4().into()),
            SanType::IpAddress(host.v6().into()),
        ];
        self.sign(names)
    }

    /// A certificate for a workload: one URI, as the mesh's own leaves have.
    pub fn workload(&self, uri: &str) -> anyhow::Result<Leaf> {
        self.sign(vec![SanType::URI(uri.try_into().context("a URI")?)])
    }

    fn sign(&self, names: Vec<SanType>) -> anyhow::Result<Leaf> {
        let key = KeyPair::generate().context("making a key")?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        let leaf = params.signed_by(&key, &self.issuer).context("signing a leaf")?;
        Ok(Leaf { chain: leaf.pem(), key: key.serialize_pem() })
    }
}
