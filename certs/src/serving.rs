//! The certificate of a webhook: a server with a DNS name, which Kubernetes' API server checks against roots of its own.
//!
//! It has a small CA to itself and none of the mesh. The mesh's CA vouches for identities of workloads and for nothing
//! else; if it also signed names, its roots would have to be trusted by the API server for everything that they sign. And
//! the mesh's roots change when workloads are ready for it, these when a certificate is renewed.
//!
//! Each certificate has a new CA whose key is forgotten once it has signed: nobody can ever sign with it again. So a
//! renewal is always a change of roots, done in one order: the checker trusts the new root beside the old, then the server
//! serves with the new certificate. The old root stays until the renewal after that.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::ca::{params, parse_key};
use crate::leaf::{self, unix_time};
use crate::pem_text::{self, MAX_PEM_BYTES};
use crate::tls::provider;

/// For an API server whose clock is slow.
const BACKDATE: Duration = Duration::from_mins(10);

/// A certificate cannot serve, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// It could not be made.
    #[error("cannot make a serving certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// It cannot serve.
    #[error("the serving certificate cannot be used: {0}")]
    Unusable(String),
}

/// A serving certificate with its key and the roots to check it by, PEM.
#[derive(Clone)]
pub struct Serving {
    /// The certificate.
    pub certificate: String,
    /// Its key, PKCS#8.
    pub key: Zeroizing<String>,
    /// The root that it ends in, then those that are still to be trusted beside it.
    pub roots: String,
}

impl Serving {
    /// A new certificate for the DNS names, under a new root, valid for `life` from `now`.
    pub fn issue(names: &[String], life: Duration, now: SystemTime) -> Result<Self, ServingError> {
        let (start, end) = (now - BACKDATE, now + life);
        let root_key = Zeroizing::new(rcgen::KeyPair::generate()?);
        let mut root = params(start, end)?;
        root.distinguished_name.push(DnType::OrganizationName, "Outrigger");
        root.distinguished_name.push(DnType::CommonName, "Outrigger webhook CA");
        root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root_pem = root.self_signed(&*root_key)?.pem();

        let key = Zeroizing::new(rcgen::KeyPair::generate()?);
        let mut leaf = params(start, end)?;
        leaf.subject_alt_names = names
            .iter()
            .map(|name| Ok(SanType::DnsName(name.as_str().try_into()?)))
            .collect::<Result<_, rcgen::Error>>()?;
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let certificate = leaf.signed_by(&*key, &rcgen::Issuer::from_params(&root, &*root_key))?.pem();
        Ok(Self { certificate, key: Zeroizing::new(key.serialize_pem()), roots: root_pem })
    }

    /// Trusts the first root of `previous` too; what is no certificate counts as none.
    #[must_use]
    pub fn beside(mut self, previous: &[u8]) -> Self {
        if previous.len() <= MAX_PEM_BYTES
            && let Some(Ok(root)) = CertificateDer::pem_slice_iter(previous).next()
        {
            self.roots.push_str(&pem_text::encode(&[root]));
        }
        self
    }

    /// When to replace it: at two thirds of its life. An error where it cannot serve each of the names at `now`.
    pub fn renew_at(&self, names: &[String], now: SystemTime) -> Result<SystemTime, ServingError> {
        let unusable = |reason: &dyn fmt::Display| ServingError::Unusable(reason.to_string());
        if self.certificate.len().max(self.key.len()).max(self.roots.len()) > MAX_PEM_BYTES {
            return Err(unusable(&"it is larger than 256 KiB"));
        }
        let der =
            CertificateDer::from_pem_slice(self.certificate.as_bytes()).map_err(|error| unusable(&error))?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| unusable(&error))?;
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map(Zeroizing::new)
            .map_err(|error| unusable(&error))?;
        let key = parse_key(&key).map_err(|error| unusable(&error))?;
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&*key) {
            return Err(unusable(&"the key is not this certificate's"));
        }
        let roots = pem_text::certificates(self.roots.as_bytes()).map_err(|error| unusable(&error))?;
        let anchors: Vec<_> =
            roots.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
        let certificate = webpki::EndEntityCert::try_from(&der).map_err(|error| unusable(&error))?;
        let algorithms = provider().signature_verification_algorithms.all;
        let usage = webpki::KeyUsage::server_auth();
        certificate
            .verify_for_usage(algorithms, &anchors, &[], unix_time(now), usage, None, None)
            .map_err(|error| unusable(&error))?;
        for name in names {
            let name = ServerName::try_from(name.as_str()).map_err(|error| unusable(&error))?;
            certificate.verify_is_valid_for_subject_name(&name).map_err(|error| unusable(&error))?;
        }
        let (start, end) = leaf::validity(parsed.validity());
        let start = start + BACKDATE;
        Ok(start + end.duration_since(start).unwrap_or_default() * 2 / 3)
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn names() -> Vec<String> {
        vec!["outrigger-injector.outrigger-system.svc".to_owned()]
    }

    /// A time in whole seconds, as certificates have it.
    fn today() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)
    }

    #[test]
    fn it_serves_its_names_and_is_due_at_two_thirds() {
        let made = Serving::issue(&names(), 90 * DAY, today()).unwrap();
        assert_eq!(made.renew_at(&names(), today()).unwrap(), today() + 60 * DAY);
        // An API server whose clock is five minutes slow takes it.
        made.renew_at(&names(), today() - Duration::from_mins(5)).unwrap();
        let other = ["outrigger-injector.elsewhere.svc".to_owned()];
        for (names, now) in
            [(other.as_slice(), today()), (&names(), today() + 91 * DAY), (&names(), today() - DAY)]
        {
            made.renew_at(names, now).unwrap_err();
        }
    }

    #[test]
    fn parts_that_do_not_belong_together_cannot_serve() {
        let [one, two] = [(); 2].map(|()| Serving::issue(&names(), DAY, today()).unwrap());
        let broken = [
            Serving { key: two.key.clone(), ..one.clone() },
            Serving { roots: two.roots.clone(), ..one.clone() },
            Serving { roots: String::new(), ..one.clone() },
            Serving { certificate: "-----BEGIN CERTIFICATE-----\n".to_owned(), ..one.clone() },
            Serving { key: Zeroizing::new(String::new()), ..one.clone() },
        ];
        for part in broken {
            part.renew_at(&names(), today()).unwrap_err();
        }
    }

    #[test]
    fn a_renewal_keeps_one_root_before_it_and_no_more() {
        let mut current = Serving::issue(&names(), DAY, today()).unwrap();
        for _ in 0..3 {
            let next = Serving::issue(&names(), DAY, today()).unwrap().beside(current.roots.as_bytes());
            // Whoever trusts the new roots accepts the old certificate and the new one.
            for certificate in [&current, &next] {
                Serving { roots: next.roots.clone(), ..certificate.clone() }
                    .renew_at(&names(), today())
                    .unwrap();
            }
            assert_eq!(next.roots.matches("BEGIN CERTIFICATE").count(), 2);
            current = next;
        }
        assert_eq!(current.clone().beside(b"nonsense").roots, current.roots);
    }

    #[test]
    fn debug_shows_no_key() {
        let made = Serving::issue(&names(), DAY, today()).unwrap();
        let shown = format!("{made:?}");
        assert!(!shown.contains("PRIVATE") && !shown.contains(made.key.lines().nth(1).unwrap()));
    }
}
