//! Whom to trust: the roots of a trust domain. Several at once, so that a root can be replaced without a moment in
//! which some peer's chain ends nowhere: add the new, trust both, issue from the new, drop the old.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, TrustAnchor};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::TrustDomain;
use crate::pem_text::{self, MAX_PEM_BYTES};

/// A rotation needs two roots, a merge of meshes a few more; each costs time in every failing path search.
const MAX_ROOTS: usize = 16;
/// A root with an RSA-8192 key and a long name is below 4 KiB.
const MAX_ROOT_BYTES: usize = 8 * 1024;

/// Why a set of roots is not a trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// No root at all: such a bundle would refuse everybody.
    #[error("the trust bundle holds no certificate")]
    Empty,
    /// Too many or too large.
    #[error("the trust bundle is too large: {0}")]
    TooLarge(&'static str),
    /// The text is not PEM.
    #[error("the trust bundle is not PEM: {0}")]
    Pem(String),
    /// One of the roots is unusable. `index` counts from 0.
    #[error("root {index} of the trust bundle is unusable: {reason}")]
    Root {
        /// Which root.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// The roots that a peer's chain may end in, for one trust domain. Cheap to clone.
#[derive(Clone)]
pub struct TrustBundle(Arc<Inner>);

struct Inner {
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    epoch: u64,
}

impl TrustBundle {
    /// A bundle of DER roots. `epoch` grows with every change of the roots; a bundle read from a file, before the
    /// controller was heard, has epoch 0. Duplicates are dropped.
    pub fn new(
        trust_domain: TrustDomain,
        roots: impl IntoIterator<Item = CertificateDer<'static>>,
        epoch: u64,
    ) -> Result<Self, BundleError> {
        let mut kept: Vec<CertificateDer<'static>> = Vec::new();
        let mut anchors = Vec::new();
        for (index, root) in roots.into_iter().enumerate() {
            if index >= MAX_ROOTS {
                return Err(BundleError::TooLarge("more than 16 roots"));
            }
            if root.len() > MAX_ROOT_BYTES {
                return Err(BundleError::TooLarge("a root of more than 8 KiB"));
            }
            if kept.contains(&root) {
                continue;
            }
            anchors.push(anchor(&root).map_err(|reason| BundleError::Root { index, reason })?);
            kept.push(root);
        }
        if kept.is_empty() {
            return Err(BundleError::Empty);
        }
        Ok(Self(Arc::new(Inner { trust_domain, roots: kept, anchors, epoch })))
    }

    /// A bundle of the certificates in a PEM file's contents (at most 256 KiB).
    pub fn from_pem(trust_domain: TrustDomain, text: &[u8], epoch: u64) -> Result<Self, BundleError> {
        if text.len() > MAX_PEM_BYTES {
            return Err(BundleError::TooLarge("more than 256 KiB of PEM"));
        }
        let roots = pem_text::certificates(text).map_err(|error| BundleError::Pem(error.to_string()))?;
        Self::new(trust_domain, roots, epoch)
    }

    /// All roots as PEM.
    pub fn to_pem(&self) -> String {
        pem_text::encode(&self.0.roots)
    }

    /// Whose roots these are.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// The roots, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.0.roots
    }

    /// Grows with every change of the roots.
    pub fn epoch(&self) -> u64 {
        self.0.epoch
    }

    /// Whether both trust the same roots, in whatever order.
    pub fn same_roots(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.0.roots, &other.0.roots);
        ours.len() == theirs.len() && ours.iter().all(|root| theirs.contains(root))
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.0.anchors
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle")
            .field("trust_domain", &self.0.trust_domain.as_str())
            .field("roots", &self.0.roots.len())
            .field("epoch", &self.0.epoch)
            .finish()
    }
}

// A trust anchor is trusted for its name and key alone (RFC 5280, section 6.1.1), so nothing later would notice a
// leaf that was put here by mistake and then vouches for whatever its key signs.
fn anchor(root: &CertificateDer<'static>) -> Result<TrustAnchor<'static>, &'static str> {
    let (rest, certificate) = X509Certificate::from_der(root).map_err(|_| "not an X.509 certificate")?;
    if !rest.is_empty() {
        return Err("bytes after the certificate");
    }
    if !certificate.is_ca() {
        return Err("not a CA certificate (basicConstraints CA:true is missing)");
    }
    webpki::anchor_from_trusted_cert(root)
        .map(|anchor| anchor.to_owned())
        .map_err(|_| "not an X.509 v3 certificate that can serve as a root")
}
