//! A workload's key. It lives inside the cryptographic library alone: rustls and rcgen sign through the traits below
//! instead of being handed the key's encoding, so there are no bytes to zero, print or leak.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rcgen::PublicKeyData;
use rustls::{SignatureAlgorithm, SignatureScheme};

/// The key could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The system's random generator failed.
    #[error("cannot generate a P-256 key: the random generator failed")]
    Generate,
    /// The signing request could not be made.
    #[error("cannot make a certificate signing request: {0}")]
    Csr(rcgen::Error),
}

/// A P-256 key pair, in memory only.
#[derive(Clone)]
pub struct KeyPair(Arc<EcdsaKeyPair>);

impl KeyPair {
    /// Makes a new key. Every certificate gets its own: a key that leaked then ends with its certificate.
    pub fn generate() -> Result<Self, KeyError> {
        EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)
            .map(|key| Self(Arc::new(key)))
            .map_err(|_| KeyError::Generate)
    }

    /// A certificate signing request (PKCS#10, DER) for this key. It names nobody: the CA takes the identity from
    /// what attests the workload.
    pub fn csr(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serialize_request(self).map(|csr| csr.der().to_vec()).map_err(KeyError::Csr)
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyPair(P-256, private)")
    }
}

impl PublicKeyData for KeyPair {
    fn der_bytes(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for KeyPair {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature =
            self.0.sign(&SystemRandom::new(), message).map_err(|_| rcgen::Error::RingUnspecified)?;
        Ok(signature.as_ref().to_vec())
    }
}

impl rustls::sign::SigningKey for KeyPair {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn rustls::sign::Signer>> {
        offered
            .contains(&SignatureScheme::ECDSA_NISTP256_SHA256)
            .then(|| Box::new(self.clone()) as Box<dyn rustls::sign::Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl rustls::sign::Signer for KeyPair {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        rcgen::SigningKey::sign(self, message)
            .map_err(|_| rustls::Error::General("signing with the workload's key failed".into()))
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_key_bytes() {
        let key = KeyPair::generate().unwrap();
        assert_eq!(format!("{key:?} {key:#?}"), "KeyPair(P-256, private) KeyPair(P-256, private)");
    }
}
