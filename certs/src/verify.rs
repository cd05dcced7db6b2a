//! Whether a peer is who it must be.
//!
//! The order is the point. First the path: the chain ends in one of our roots, nothing in it has expired, no leaf
//! issued another, the leaf may be used on this side of TLS. Only then is a name read, and only one kind: the leaf must
//! hold exactly one subject alternative name, a URI that is a valid identity of our trust domain (X509-SVID, sections
//! 2 and 5). A verifier that reads the name first, or takes "not valid for this host name" from the path check for a
//! pass, can be talked into trusting a stranger's chain.
//!
//! There are no host names: towards a server the expected identity comes from the control plane, never from DNS.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::bundle::TrustBundle;
use crate::identity::SpiffeId;

/// Certificates in a peer's chain, leaf included. A CA with four levels below its root is already unusual; webpki
/// bounds the path search by itself.
const MAX_CHAIN: usize = 8;

/// Why a certificate was refused. [`as_str`](Self::as_str) is fit for a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The peer presented no certificate where one is required.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// The leaf is not a well-formed X.509 v3 certificate.
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// The chain does not end in one of the roots, or one of its issuers must not issue.
    #[error("the peer's chain does not end in a trusted root")]
    UntrustedChain,
    /// A certificate of the chain has expired.
    #[error("the peer's chain holds an expired certificate")]
    Expired,
    /// A certificate of the chain is not valid yet: mostly a clock that is wrong.
    #[error("the peer's chain holds a certificate that is not valid yet")]
    NotYetValid,
    /// The leaf must not be used on its side of TLS, or is a CA.
    #[error("the peer's certificate must not be used for this side of TLS")]
    WrongUsage,
    /// The leaf does not hold exactly one name, a SPIFFE identity.
    #[error("the peer's certificate does not hold exactly one SPIFFE identity")]
    BadSan,
    /// The identity is of another trust domain.
    #[error("the peer's identity is of another trust domain")]
    WrongTrustDomain,
    /// The identity is valid, but not the one that was dialled.
    #[error("the peer's identity is not the expected one")]
    WrongIdentity,
}

impl Refusal {
    /// A stable name in `snake_case`, one of nine.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed => "malformed_certificate",
            Self::UntrustedChain => "untrusted_chain",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::WrongUsage => "wrong_usage",
            Self::BadSan => "bad_san",
            Self::WrongTrustDomain => "wrong_trust_domain",
            Self::WrongIdentity => "wrong_identity",
        }
    }

    // The nearest error that has a TLS alert of its own, so that the peer's log names the right fault too.
    fn into_rustls(self) -> rustls::Error {
        rustls::Error::InvalidCertificate(match self {
            Self::NoCertificate => return rustls::Error::NoCertificatesPresented,
            Self::Malformed => CertificateError::BadEncoding,
            Self::UntrustedChain => CertificateError::UnknownIssuer,
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::WrongUsage => CertificateError::InvalidPurpose,
            Self::BadSan | Self::WrongTrustDomain | Self::WrongIdentity => {
                CertificateError::Other(OtherError(Arc::new(self)))
            }
        })
    }
}

/// Why our side refused the peer's certificate, if that is what `error` says: a handshake's error, as rustls or as
/// `std::io` (tokio-rustls) returns it. `None` for everything else, among it the peer's refusal of ours.
pub fn refusal(error: &(dyn StdError + 'static)) -> Option<Refusal> {
    if let Some(error) = error.downcast_ref::<std::io::Error>() {
        return refusal(error.get_ref()?);
    }
    match error.downcast_ref::<rustls::Error>()? {
        rustls::Error::NoCertificatesPresented => Some(Refusal::NoCertificate),
        rustls::Error::InvalidCertificate(error) => match error {
            CertificateError::BadEncoding => Some(Refusal::Malformed),
            CertificateError::UnknownIssuer => Some(Refusal::UntrustedChain),
            CertificateError::Expired => Some(Refusal::Expired),
            CertificateError::NotValidYet => Some(Refusal::NotYetValid),
            CertificateError::InvalidPurpose => Some(Refusal::WrongUsage),
            CertificateError::Other(OtherError(error)) => error.downcast_ref().copied(),
            _ => None,
        },
        _ => None,
    }
}

/// Which side of TLS presented the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// The identity of `leaf`, after its path up to one of the bundle's roots was verified.
pub(crate) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    algorithms: &WebPkiSupportedAlgorithms,
    side: Side,
    now: UnixTime,
) -> Result<SpiffeId, Refusal> {
    if intermediates.len() >= MAX_CHAIN {
        return Err(Refusal::UntrustedChain);
    }
    let certificate = EndEntityCert::try_from(leaf).map_err(|_| Refusal::Malformed)?;
    let usage = match side {
        Side::Client => KeyUsage::client_auth(),
        Side::Server => KeyUsage::server_auth(),
    };
    certificate
        .verify_for_usage(algorithms.all, bundle.anchors(), intermediates, now, usage, None, None)
        .map_err(|error| path_refusal(&error))?;
    let id = identity(leaf)?;
    if id.trust_domain() != bundle.trust_domain().as_str() {
        return Err(Refusal::WrongTrustDomain);
    }
    Ok(id)
}

fn path_refusal(error: &webpki::Error) -> Refusal {
    use webpki::Error as E;
    match error {
        E::CertExpired { .. } => Refusal::Expired,
        E::CertNotValidYet { .. } => Refusal::NotYetValid,
        E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension | E::CaUsedAsEndEntity => Refusal::WrongUsage,
        E::BadDer
        | E::BadDerTime
        | E::ExtensionValueInvalid
        | E::InvalidCertValidity
        | E::InvalidSerialNumber
        | E::MalformedExtensions
        | E::TrailingData(_)
        | E::UnsupportedCertVersion => Refusal::Malformed,
        _ => Refusal::UntrustedChain,
    }
}

// webpki has checked what the extended key usage says, but takes a missing one for any usage, as it must for
// intermediates; and it ignores key usage. A leaf of ours always has both (X509-SVID, sections 4.3 and 4.4).
fn identity(leaf: &CertificateDer<'_>) -> Result<SpiffeId, Refusal> {
    let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|_| Refusal::Malformed)?;
    if !rest.is_empty() {
        return Err(Refusal::Malformed);
    }
    let Ok(Some(_)) = certificate.extended_key_usage() else {
        return Err(Refusal::WrongUsage);
    };
    let Ok(Some(usage)) = certificate.key_usage() else {
        return Err(Refusal::WrongUsage);
    };
    let usage = usage.value;
    if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
        return Err(Refusal::WrongUsage);
    }
    only_name(&certificate).ok_or(Refusal::BadSan)
}

/// The identity in a certificate that holds exactly one name. Meaningless before the path was verified.
pub(crate) fn only_name(certificate: &X509Certificate<'_>) -> Option<SpiffeId> {
    let names = certificate.subject_alternative_name().ok()??;
    match names.value.general_names.as_slice() {
        [GeneralName::URI(uri)] => uri.parse().ok(),
        _ => None,
    }
}

/// What both directions of TLS share.
struct Common {
    bundle: TrustBundle,
    algorithms: WebPkiSupportedAlgorithms,
}

/// A server's view of its clients: any identity of the trust domain; who may do what is decided later, by policy.
pub(crate) struct ClientVerifier {
    common: Common,
    required: bool,
}

impl ClientVerifier {
    pub(crate) fn new(bundle: TrustBundle, algorithms: WebPkiSupportedAlgorithms, required: bool) -> Self {
        Self { common: Common { bundle, algorithms }, required }
    }
}

/// A client's view of the server: exactly the identity that was dialled.
pub(crate) struct ServerVerifier {
    common: Common,
    expected: SpiffeId,
}

impl ServerVerifier {
    pub(crate) fn new(
        bundle: TrustBundle,
        algorithms: WebPkiSupportedAlgorithms,
        expected: SpiffeId,
    ) -> Self {
        Self { common: Common { bundle, algorithms }, expected }
    }
}

impl Common {
    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("TLS 1.2 is not spoken in the mesh".into()))
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    // No hints: a client of the mesh has one certificate, and the roots' names are nobody else's business.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let Common { bundle, algorithms } = &self.common;
        verify(leaf, intermediates, bundle, algorithms, Side::Client, now)
            .map(|_| ClientCertVerified::assertion())
            .map_err(Refusal::into_rustls)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.common.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.common.algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Common { bundle, algorithms } = &self.common;
        let id = verify(leaf, intermediates, bundle, algorithms, Side::Server, now)
            .map_err(Refusal::into_rustls)?;
        if id != self.expected {
            return Err(Refusal::WrongIdentity.into_rustls());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.common.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.common.algorithms.supported_schemes()
    }
}

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientVerifier({:?}, required: {})", self.common.bundle, self.required)
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerVerifier({:?}, expected: {})", self.common.bundle, self.expected)
    }
}
