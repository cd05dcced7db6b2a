//! The certificate authority: one issuing certificate below one or more roots, either made here at the first start or
//! brought by the operator.
//!
//! What it signs is decided here and by its caller alone. The caller names the identity, which it took from what
//! attests the workload; the request contributes its public key. A leaf holds one identity and may be used on both
//! sides of TLS and for nothing else.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use x509_parser::x509::RelativeDistinguishedName;
use zeroize::Zeroizing;

use crate::bundle::{BundleError, TrustBundle};
use crate::csr::{self, CsrError};
use crate::identity::{IdentityError, SpiffeId, TrustDomain};
use crate::key::{KeyError, KeyPair};
use crate::leaf::{self, Leaf, LeafError};
use crate::pem_text::{self, MAX_PEM_BYTES};
use crate::store::{self, StoreError};

/// Leaves start this long before they are signed, for peers whose clock is slow: the 5 minutes that the mesh promises
/// to bear, twice.
const LEAF_BACKDATE: Duration = Duration::from_mins(10);
/// The same for a root and issuing certificate of our own, which bound the leaves' start.
const CA_BACKDATE: Duration = Duration::from_hours(1);
/// Life of our own root and issuing certificate: the same for both, so that nothing ends before a rotation was asked
/// for. 10 years.
const CA_LIFE: Duration = Duration::from_hours(10 * 365 * 24);
/// RFC 5280, section 4.1.2.2 allows up to 20 octets; 16 random ones never repeat.
const SERIAL_BYTES: usize = 16;
/// A workload's bundle from a file has epoch 0: the CA's own always replaces it.
const FIRST_EPOCH: u64 = 1;

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The store could not be read or written.
    #[error("{0}")]
    Store(String),
    /// The store was read, but does not make a CA for this trust domain now; it is left as it is.
    #[error(
        "the CA's store in {dir} cannot be used: {reason}; it was left as it is: correct the configuration or the \
         clock, or restore it from a backup (without it a new root is made, which no running workload trusts)"
    )]
    Broken {
        /// The directory that holds it.
        dir: String,
        /// What is wrong.
        reason: String,
    },
    /// The material that was brought does not make a CA.
    #[error("the CA's {what} cannot be used: {reason}")]
    Unusable {
        /// Which part: certificate, key, roots.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A key or certificate could not be made.
    #[error("cannot make a new CA: {0}")]
    Generate(rcgen::Error),
}

impl From<StoreError> for CaError {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is at fault.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The identity is of another trust domain.
    #[error("the identity is not of the CA's trust domain")]
    OtherTrustDomain,
    /// The issuing certificate has ended, or not begun.
    #[error("the issuing certificate is not valid now: replace it, or correct the clock")]
    IssuerNotValid,
    /// Signing itself failed.
    #[error("signing failed: {0}")]
    Signing(#[from] rcgen::Error),
    /// The controller's own key could not be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The CA refused what it had signed for itself.
    #[error(transparent)]
    Leaf(#[from] LeafError),
}

/// What a workload gets for its request.
#[derive(Clone, Debug)]
pub struct SignedLeaf {
    /// The leaf, then the intermediates up to but without the root; DER.
    pub chain: Vec<CertificateDer<'static>>,
    /// When the leaf ends: the life that was asked for, or the issuer's end if that is sooner.
    pub not_after: SystemTime,
}

/// The material of a CA, PEM: what [`CertificateAuthority::from_pem`] takes.
#[derive(Clone)]
pub struct Material {
    /// The issuing certificate, then further intermediates.
    pub certificates: String,
    /// The issuing certificate's key.
    pub key: Zeroizing<String>,
    /// Every root that is to be trusted.
    pub roots: String,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Material").field("roots", &self.roots).finish_non_exhaustive()
    }
}

/// Signs identities of one trust domain.
pub struct CertificateAuthority {
    key: Zeroizing<rcgen::KeyPair>,
    issuer: CertificateDer<'static>,
    // When the issuing certificate is valid, and all that stands above it.
    not_before: SystemTime,
    not_after: SystemTime,
    // The issuing certificate and what stands between it and a root; empty where the issuer is itself a root.
    intermediates: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
}

impl CertificateAuthority {
    /// The CA whose store is in the directory `dir`; at the first start it is made, with a root and an issuing
    /// certificate of 10 years, in one file of mode 0600. A store that exists and cannot be used is an error; it is
    /// never overwritten.
    pub fn open_or_create(dir: &Path, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        let text = store::read_or_create(dir, || Self::generate_pem(trust_domain))?;
        Self::opened(dir, &text, trust_domain)
    }

    /// The CA whose store is in the directory `dir`, for a mesh that has one already: `None` where there is no store, and
    /// nothing is made.
    pub fn open(dir: &Path, trust_domain: &TrustDomain) -> Result<Option<Self>, CaError> {
        let text = store::read_existing(dir)?;
        text.map(|text| Self::opened(dir, &text, trust_domain)).transpose()
    }

    fn opened(dir: &Path, text: &str, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        Self::from_store(text, trust_domain).map_err(|error| match error {
            CaError::Unusable { what, reason } => {
                CaError::Broken { dir: dir.display().to_string(), reason: format!("{what}: {reason}") }
            }
            other => other,
        })
    }

    /// The text of a new store: issuing certificate, its key, root certificate, its key.
    /// [`from_store`](Self::from_store) reads it back.
    pub fn generate_pem(trust_domain: &TrustDomain) -> Result<Zeroizing<String>, CaError> {
        let (made, root_key) = generate(trust_domain).map_err(CaError::Generate)?;
        let parts = [made.certificates.as_str(), &made.key, &made.roots, &root_key].concat();
        Ok(Zeroizing::new(parts))
    }

    /// The material of a new CA for a place that others can read too, such as a Kubernetes Secret. The root's key is
    /// forgotten at once: what is not kept cannot leak, and a rotation brings a new root anyway.
    /// [`from_pem`](Self::from_pem) reads it back.
    pub fn generate(trust_domain: &TrustDomain) -> Result<Material, CaError> {
        generate(trust_domain).map(|(made, _root_key)| made).map_err(CaError::Generate)
    }

    /// A CA from the text that [`generate_pem`](Self::generate_pem) made.
    pub fn from_store(text: &str, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        let certificates = parse_certificates("store", text)?;
        let [issuer, root] = certificates.as_slice() else {
            return Err(unusable("store", "it must hold exactly two certificates"));
        };
        let keys: Vec<_> = PrivateKeyDer::pem_slice_iter(text.as_bytes())
            .map(|key| key.map(Zeroizing::new))
            .collect::<Result<_, _>>()
            .map_err(|error| unusable("store", error.to_string()))?;
        let [key, root_key] = keys.as_slice() else {
            return Err(unusable("store", "it must hold exactly two private keys"));
        };
        let root_key = parse_key(root_key)?;
        check_ca("root", root, &root_key, trust_domain)?;
        let bundle = TrustBundle::new(trust_domain.clone(), [root.clone()], FIRST_EPOCH)
            .map_err(|error| unusable("root", error.to_string()))?;
        Self::new(vec![issuer.clone()], parse_key(key)?, bundle)
    }

    /// A CA that the operator brings: `certificates` holds the issuing certificate first and then any intermediates,
    /// `key` the issuing certificate's private key (PKCS#8, SEC1 or PKCS#1), `roots` every root that is to be trusted;
    /// all PEM. Checked: the key is the certificate's, the certificate is a CA's, valid now, and what it signs
    /// verifies up to one of the roots.
    pub fn from_pem(
        certificates: &str,
        key: &str,
        roots: &str,
        trust_domain: &TrustDomain,
    ) -> Result<Self, CaError> {
        let chain = parse_certificates("certificate", certificates)?;
        if key.len() > MAX_PEM_BYTES {
            return Err(unusable("key", "it is larger than 256 KiB"));
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map(Zeroizing::new)
            .map_err(|error| unusable("key", error.to_string()))?;
        let bundle = TrustBundle::from_pem(trust_domain.clone(), roots.as_bytes(), FIRST_EPOCH)
            .map_err(|error: BundleError| unusable("roots", error.to_string()))?;
        Self::new(chain, parse_key(&key)?, bundle)
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: Zeroizing<rcgen::KeyPair>,
        bundle: TrustBundle,
    ) -> Result<Self, CaError> {
        let what = "issuing certificate";
        let issuer = chain.first().cloned().ok_or_else(|| unusable(what, "there is none"))?;
        check_ca(what, &issuer, &key, bundle.trust_domain())?;
        let intermediates: Vec<_> = chain.into_iter().filter(|der| !bundle.roots().contains(der)).collect();
        // A leaf is good for as long as everything above it, up to the root, which is trusted without a time.
        let (mut not_before, mut not_after) = validity(what, &issuer)?;
        for above in &intermediates {
            let (from, to) = validity("intermediate certificate", above)?;
            (not_before, not_after) = (not_before.max(from), not_after.min(to));
        }
        let now = SystemTime::now();
        if now < not_before || now >= not_after {
            return Err(unusable(what, "it, or one above it, is not valid now"));
        }
        let ca = Self { key, issuer, not_before, not_after, intermediates, bundle };
        // The last word is a peer's: sign something and check it as a workload would. It also finds what no single
        // check does, such as a subject in an encoding that rcgen does not repeat byte for byte.
        let probe = probe(ca.bundle.trust_domain()).map_err(|error| unusable(what, error.to_string()))?;
        ca.issue_own(&probe, Duration::from_mins(1)).map_err(|error| {
            unusable(what, format!("a certificate that it signed is not accepted under the roots: {error}"))
        })?;
        Ok(ca)
    }

    /// Signs the public key of `csr` (PKCS#10, DER, at most [`MAX_CSR_BYTES`](crate::MAX_CSR_BYTES)) for `id`, valid
    /// for `ttl` from now, but never longer than the issuing certificate. Every name in the request is ignored.
    pub fn sign(&self, csr: &[u8], id: &SpiffeId, ttl: Duration) -> Result<SignedLeaf, SignError> {
        self.sign_key(&csr::public_key(csr)?, id, ttl, SystemTime::now())
    }

    /// A certificate with a fresh key for the controller itself.
    pub fn issue_own(&self, id: &SpiffeId, ttl: Duration) -> Result<Leaf, SignError> {
        self.issue_under(id, ttl, &self.bundle)
    }

    fn issue_under(&self, id: &SpiffeId, ttl: Duration, bundle: &TrustBundle) -> Result<Leaf, SignError> {
        let now = SystemTime::now();
        let key = KeyPair::generate()?;
        let signed = self.sign_key(&key, id, ttl, now)?;
        Ok(Leaf::accept(key, signed.chain, Some(id), bundle, now)?)
    }

    /// The roots to publish. Their epoch is 1: they change only with the CA's material.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Whether workloads that trust `bundle` accept what this CA signs.
    pub fn is_trusted_by(&self, bundle: &TrustBundle) -> bool {
        let Ok(probe) = probe(bundle.trust_domain()) else { return false };
        self.issue_under(&probe, Duration::from_mins(1), bundle).is_ok()
    }

    /// When the issuing certificate, or one above it, ends, and with it everything that it can sign.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    fn sign_key(
        &self,
        public_key: &impl rcgen::PublicKeyData,
        id: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<SignedLeaf, SignError> {
        if id.trust_domain() != self.bundle.trust_domain().as_str() {
            return Err(SignError::OtherTrustDomain);
        }
        if now < self.not_before || now >= self.not_after {
            return Err(SignError::IssuerNotValid);
        }
        let not_after = now.checked_add(ttl).unwrap_or(self.not_after).min(self.not_after);
        let mut params = params(now - LEAF_BACKDATE.min(elapsed(self.not_before, now)), not_after)?;
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer = rcgen::Issuer::from_ca_cert_der(&self.issuer, &*self.key)?;
        let mut chain = vec![params.signed_by(public_key, &issuer)?.into()];
        chain.extend(self.intermediates.iter().cloned());
        Ok(SignedLeaf { chain, not_after })
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("bundle", &self.bundle)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn elapsed(from: SystemTime, to: SystemTime) -> Duration {
    to.duration_since(from).unwrap_or_default()
}

pub(crate) fn params(
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut serial = [0; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| rcgen::Error::RingUnspecified)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serial_number = Some(rcgen::SerialNumber::from_slice(&serial));
    params.not_before = OffsetDateTime::from(not_before);
    params.not_after = OffsetDateTime::from(not_after);
    Ok(params)
}

fn ca_params(
    name: &str,
    trust_domain: &TrustDomain,
    path_length: u8,
    now: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(now - CA_BACKDATE, now + CA_LIFE)?;
    params.distinguished_name.push(DnType::OrganizationName, "Outrigger");
    // RFC 5280, appendix A: a common name has at most 64 characters; the whole trust domain is in the URI.
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// A new root, and an issuing certificate under it; the root's key apart.
fn generate(trust_domain: &TrustDomain) -> Result<(Material, Zeroizing<String>), rcgen::Error> {
    let now = SystemTime::now();
    let root_key = Zeroizing::new(rcgen::KeyPair::generate()?);
    let root_params = ca_params("Outrigger root", trust_domain, 1, now)?;
    let root = root_params.self_signed(&*root_key)?;
    let root_issuer = rcgen::Issuer::from_params(&root_params, &*root_key);
    let key = Zeroizing::new(rcgen::KeyPair::generate()?);
    let issuer = ca_params("Outrigger issuing CA", trust_domain, 0, now)?.signed_by(&*key, &root_issuer)?;
    let made =
        Material { certificates: issuer.pem(), key: Zeroizing::new(key.serialize_pem()), roots: root.pem() };
    Ok((made, Zeroizing::new(root_key.serialize_pem())))
}

/// An identity to try a CA with.
fn probe(trust_domain: &TrustDomain) -> Result<SpiffeId, IdentityError> {
    SpiffeId::new(trust_domain, "outrigger", "probe")
}

fn unusable(what: &'static str, reason: impl Into<String>) -> CaError {
    CaError::Unusable { what, reason: reason.into() }
}

fn parse_certificates(what: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, CaError> {
    if text.len() > MAX_PEM_BYTES {
        return Err(unusable(what, "it is larger than 256 KiB"));
    }
    pem_text::certificates(text.as_bytes()).map_err(|error| unusable(what, error.to_string()))
}

pub(crate) fn parse_key(der: &PrivateKeyDer<'static>) -> Result<Zeroizing<rcgen::KeyPair>, CaError> {
    rcgen::KeyPair::try_from(der).map(Zeroizing::new).map_err(|_| {
        unusable("key", "it is not a P-256, P-384, Ed25519 or RSA private key in PKCS#8, SEC1 or PKCS#1")
    })
}

fn validity(
    what: &'static str,
    certificate: &CertificateDer<'_>,
) -> Result<(SystemTime, SystemTime), CaError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| unusable(what, error.to_string()))?;
    Ok(leaf::validity(parsed.validity()))
}

/// Checks that `certificate` is a CA's, that `key` is its key, and that it does not name another trust domain.
fn check_ca(
    what: &'static str,
    certificate: &CertificateDer<'_>,
    key: &rcgen::KeyPair,
    trust_domain: &TrustDomain,
) -> Result<(), CaError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| unusable(what, error.to_string()))?;
    if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(key) {
        return Err(unusable(what, "the private key is not this certificate's"));
    }
    if !parsed.is_ca() {
        return Err(unusable(what, "it is not a CA certificate (basicConstraints CA:true is missing)"));
    }
    if let Ok(Some(usage)) = parsed.key_usage()
        && !usage.value.key_cert_sign()
    {
        return Err(unusable(what, "its key usage does not allow signing certificates"));
    }
    // rcgen writes the leaves' issuer name anew and keeps one value for each attribute type.
    let mut types = HashSet::new();
    let plain = |rdn: &RelativeDistinguishedName<'_>| {
        rdn.iter().count() == 1
            && rdn.iter().all(|attribute| types.insert(attribute.attr_type().to_id_string()))
    };
    if !parsed.subject().iter_rdn().all(plain) {
        return Err(unusable(
            what,
            "its subject has an attribute type twice (often DC or OU): use a simpler name",
        ));
    }
    if let Ok(Some(names)) = parsed.subject_alternative_name() {
        let ours = format!("spiffe://{trust_domain}");
        for name in &names.value.general_names {
            if let GeneralName::URI(uri) = name
                && uri.starts_with("spiffe://")
                && *uri != ours
            {
                return Err(unusable(what, format!("it is for the trust domain {uri}, not for {ours}")));
            }
        }
    }
    Ok(())
}
