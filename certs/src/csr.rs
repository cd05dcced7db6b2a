//! What the CA believes of a certificate signing request: that its sender holds the private key to the public key in
//! it, and that the key is strong enough. Every name, extension and attribute is left unread, so that nothing a
//! workload writes there can end up in a certificate.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey,
    VerificationAlgorithm,
};
use x509_parser::prelude::{FromDer, X509CertificationRequest};
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

/// The largest request that is looked at, bytes. One with an RSA-8192 key and a page of names is below 8 KiB.
pub const MAX_CSR_BYTES: usize = 16 * 1024;

/// Why a signing request was refused. All of them are the sender's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Larger than [`MAX_CSR_BYTES`]; it was not parsed.
    #[error("the signing request is larger than 16 KiB")]
    TooLarge,
    /// Not one PKCS#10 request in DER, or followed by more bytes.
    #[error("the signing request is not a single PKCS#10 request in DER")]
    Malformed,
    /// The key is none of P-256, P-384, Ed25519 and RSA of 2048 bits or more.
    #[error(
        "the key in the signing request is not supported: use P-256, P-384, Ed25519 or RSA of 2048 to 8192 bits"
    )]
    UnsupportedKey,
    /// The signature algorithm is none of ECDSA and RSA PKCS#1 with SHA-2, and Ed25519.
    #[error(
        "the signature algorithm of the signing request is not supported: use ECDSA, RSA PKCS#1 or Ed25519 with SHA-2"
    )]
    UnsupportedSignature,
    /// The request is not signed with the key that it holds.
    #[error("the signature of the signing request does not match its key")]
    BadSignature,
}

const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";
/// NIST SP 800-57 part 1, table 2: below it a key has less than 112 bits of strength.
const MIN_RSA_BITS: usize = 2048;
/// The largest that the library verifies, so that a request cannot buy much of the CA's time.
const MAX_RSA_BITS: usize = 8192;

/// The public key of a request whose signature holds.
pub(crate) fn public_key(der: &[u8]) -> Result<rcgen::SubjectPublicKeyInfo, CsrError> {
    if der.len() > MAX_CSR_BYTES {
        return Err(CsrError::TooLarge);
    }
    let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| CsrError::Malformed)?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed);
    }
    let info = &request.certification_request_info;
    let spki = &info.subject_pki;
    let algorithm = algorithm(spki, &request.signature_algorithm.algorithm.to_id_string())?;
    UnparsedPublicKey::new(algorithm, &spki.subject_public_key.data)
        .verify(info.raw, &request.signature_value.data)
        .map_err(|_| CsrError::BadSignature)?;
    rcgen::SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| CsrError::UnsupportedKey)
}

fn algorithm(
    spki: &SubjectPublicKeyInfo<'_>,
    signature: &str,
) -> Result<&'static dyn VerificationAlgorithm, CsrError> {
    let unsupported = Err(CsrError::UnsupportedSignature);
    match spki.algorithm.algorithm.to_id_string().as_str() {
        // id-ecPublicKey (RFC 5480); the curve is the parameter
        "1.2.840.10045.2.1" => {
            let curve = spki.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
            match (curve.map(|oid| oid.to_id_string()).as_deref(), signature) {
                (Some(P256), "1.2.840.10045.4.3.2") => Ok(&ECDSA_P256_SHA256_ASN1),
                (Some(P256), "1.2.840.10045.4.3.3") => Ok(&ECDSA_P256_SHA384_ASN1),
                (Some(P384), "1.2.840.10045.4.3.2") => Ok(&ECDSA_P384_SHA256_ASN1),
                (Some(P384), "1.2.840.10045.4.3.3") => Ok(&ECDSA_P384_SHA384_ASN1),
                (Some(P256 | P384), _) => unsupported,
                _ => Err(CsrError::UnsupportedKey),
            }
        }
        // rsaEncryption (RFC 8017)
        "1.2.840.113549.1.1.1" => {
            let Ok(PublicKey::RSA(key)) = spki.parsed() else {
                return Err(CsrError::UnsupportedKey);
            };
            if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&key.key_size()) {
                return Err(CsrError::UnsupportedKey);
            }
            match signature {
                "1.2.840.113549.1.1.11" => Ok(&RSA_PKCS1_2048_8192_SHA256),
                "1.2.840.113549.1.1.12" => Ok(&RSA_PKCS1_2048_8192_SHA384),
                "1.2.840.113549.1.1.13" => Ok(&RSA_PKCS1_2048_8192_SHA512),
                _ => unsupported,
            }
        }
        // id-Ed25519 (RFC 8410)
        "1.3.101.112" if signature == "1.3.101.112" => Ok(&ED25519),
        "1.3.101.112" => unsupported,
        _ => Err(CsrError::UnsupportedKey),
    }
}
