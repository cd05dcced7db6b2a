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
    use std::fmt::Debug;
    use std::time::{Duration, SystemTime};

    use rustls_pki_types::PrivateKeyDer;
    use rustls_pki_types::pem::PemObject;

    use super::*;
    use crate::{CertificateAuthority, ClientAuth, Credentials, Leaf, SpiffeId};

    /// The private scalar of a P-256 key in PKCS#8: the only octet string of 32 bytes in it (RFC 5915, section 3).
    fn secret(pkcs8: &[u8]) -> Vec<u8> {
        let start = pkcs8.windows(2).position(|header| header == [4, 32]).unwrap() + 2;
        pkcs8[start..start + 32].to_vec()
    }

    /// Four bytes of the key in any spelling that a `Debug` could use.
    fn shows(text: &str, secret: &[u8]) -> bool {
        let text = text.to_lowercase().replace([' ', '\n', ',', ':'], "");
        secret.windows(4).any(|part| {
            let spelled = |spell: fn(&u8) -> String| part.iter().map(spell).collect::<Vec<_>>().concat();
            let (hex, prefixed) =
                (spelled(|byte| format!("{byte:02x}")), spelled(|byte| format!("0x{byte:02x}")));
            let decimal = spelled(u8::to_string);
            // Short runs of decimal digits occur by chance in times and addresses.
            text.contains(&hex)
                || text.contains(&prefixed)
                || (decimal.len() >= 10 && text.contains(&decimal))
        })
    }

    #[test]
    fn no_debug_shows_key_bytes() {
        let domain = "outrigger.local".parse().unwrap();
        let id = SpiffeId::new(&domain, "shop", "web").unwrap();
        let store = CertificateAuthority::generate_pem(&domain).unwrap();
        let ca = CertificateAuthority::from_store(&store, &domain).unwrap();
        let mut secrets: Vec<Vec<u8>> = PrivateKeyDer::pem_slice_iter(store.as_bytes())
            .map(|key| secret(key.unwrap().secret_der()))
            .collect();
        let key = KeyPair::generate().unwrap();
        secrets.push(secret(key.0.to_pkcs8v1().unwrap().as_ref()));
        assert_eq!(secrets.len(), 3);

        let signed = ca.sign(&key.csr().unwrap(), &id, Duration::from_hours(1)).unwrap();
        let now = SystemTime::now();
        let leaf = Leaf::accept(key.clone(), signed.chain.clone(), Some(&id), ca.bundle(), now).unwrap();
        let credentials = Credentials::new(ca.bundle().clone());
        credentials.set_leaf(leaf.clone()).unwrap();
        let server = credentials.server_config(&[b"h2"], ClientAuth::Required).unwrap();
        let client = credentials.client_config(&id, &[b"h2"]).unwrap();
        let wrong = CertificateAuthority::from_store(&store[..store.len() - 60], &domain).unwrap_err();

        let all: [&dyn Debug; 9] =
            [&ca, &key, &signed, &leaf, &credentials, &server, &client, &wrong, &leaf.certified()];
        for (index, value) in all.iter().enumerate() {
            for text in [format!("{value:?}"), format!("{value:#?}")] {
                assert!(!secrets.iter().any(|secret| shows(&text, secret)), "value {index}");
            }
        }
        // The search itself can find something.
        assert!(shows(&format!("{:?}", secrets[0]), &secrets[0]));
        assert!(shows(&format!("{:02X?}", secrets[1]), &secrets[1]));
    }
}
