//! A forger that holds the mesh's issuing key, and handshakes between rustls connections in memory.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_certs::{
    CertificateAuthority, ClientAuth, Credentials, Leaf, Refusal, SpiffeId, TrustDomain, provider, refusal,
    server_name,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub const MINUTE: Duration = Duration::from_mins(1);
pub const DAY: Duration = Duration::from_hours(24);
pub const ALPN: &[u8] = b"outrigger-h2";
pub const PAYLOAD: &[u8] = b"the application's bytes";

pub type Issuer = CertifiedIssuer<'static, KeyPair>;

pub fn domain() -> TrustDomain {
    "outrigger.local".parse().unwrap()
}

pub fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub fn web() -> SpiffeId {
    id("spiffe://outrigger.local/ns/shop/sa/web")
}

pub fn orders() -> SpiffeId {
    id("spiffe://outrigger.local/ns/shop/sa/orders")
}

pub fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = (SystemTime::now() + 30 * DAY).into();
    params
}

/// What a leaf must look like; each forgery changes one thing.
pub fn leaf_params(uri: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (SystemTime::now() - 10 * MINUTE).into();
    params.not_after = (SystemTime::now() + DAY).into();
    params
}

/// A mesh whose CA was brought, so that the tests hold its key and can sign what the CA never would.
pub struct Mesh {
    pub root: Issuer,
    pub issuer: Issuer,
    pub ca: CertificateAuthority,
}

impl Mesh {
    pub fn new() -> Self {
        let root = Issuer::self_signed(ca_params("root"), KeyPair::generate().unwrap()).unwrap();
        let issuer = Issuer::signed_by(ca_params("issuer"), KeyPair::generate().unwrap(), &root).unwrap();
        let ca = brought(&issuer, &[], &root).unwrap();
        Self { root, issuer, ca }
    }

    /// Credentials as an honest workload gets them.
    pub fn workload(&self, id: &SpiffeId) -> Credentials {
        let key = outrigger_certs::KeyPair::generate().unwrap();
        let signed = self.ca.sign(&key.csr().unwrap(), id, DAY).unwrap();
        let leaf = Leaf::accept(key, signed.chain, Some(id), self.ca.bundle(), SystemTime::now()).unwrap();
        let credentials = Credentials::new(self.ca.bundle().clone());
        credentials.set_leaf(leaf).unwrap();
        credentials
    }

    /// A leaf of these parameters, signed by the mesh's own issuing key.
    pub fn forge(&self, params: &CertificateParams) -> Forged {
        Forged::new(params, &self.issuer, &[self.issuer.der()])
    }
}

pub fn brought(
    issuer: &Issuer,
    intermediates: &[&Issuer],
    root: &Issuer,
) -> Result<CertificateAuthority, outrigger_certs::CaError> {
    let mut certificates = issuer.pem();
    for intermediate in intermediates {
        certificates += &intermediate.pem();
    }
    CertificateAuthority::from_pem(&certificates, &issuer.key().serialize_pem(), &root.pem(), &domain())
}

pub struct Forged {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
}

impl Forged {
    pub fn new(params: &CertificateParams, issuer: &Issuer, above: &[&CertificateDer<'static>]) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut chain = vec![params.signed_by(&key, issuer).unwrap().der().clone()];
        chain.extend(above.iter().map(|der| (*der).clone()));
        Self { chain, key }
    }

    pub fn certified(&self) -> Arc<CertifiedKey> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        Arc::new(CertifiedKey::new(
            self.chain.clone(),
            provider().key_provider.load_private_key(key).unwrap(),
        ))
    }
}

/// A server that presents `certified` and asks nobody for anything.
pub fn forged_server(certified: Arc<CertifiedKey>) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// A client that presents `certified`; `honest` is where it takes everything else from.
pub fn forged_client(
    honest: &Credentials,
    expected: &SpiffeId,
    certified: Arc<CertifiedKey>,
) -> Arc<ClientConfig> {
    let mut config = (*honest.bootstrap_config(expected, &[ALPN])).clone();
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified));
    Arc::new(config)
}

/// How a handshake ended.
pub struct Outcome {
    pub client: ClientConnection,
    pub server: ServerConnection,
    pub client_error: Option<rustls::Error>,
    pub server_error: Option<rustls::Error>,
    /// What the server's application read.
    pub received: Vec<u8>,
}

impl Outcome {
    pub fn client_refusal(&self) -> Option<Refusal> {
        refusal(self.client_error.as_ref()?)
    }

    pub fn server_refusal(&self) -> Option<Refusal> {
        refusal(self.server_error.as_ref()?)
    }

    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!((&self.client_error, &self.server_error), (&None, &None));
        assert!(!self.client.is_handshaking() && !self.server.is_handshaking());
        assert_eq!(self.received, PAYLOAD);
        self
    }
}

/// Runs a handshake to its end; the client sends the payload as soon as it may.
pub fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
    handshake_in_pieces(client, server, usize::MAX)
}

pub fn handshake_in_pieces(client: Arc<ClientConfig>, server: Arc<ServerConfig>, piece: usize) -> Outcome {
    let mut outcome = Outcome {
        client: ClientConnection::new(client, server_name()).unwrap(),
        server: ServerConnection::new(server).unwrap(),
        client_error: None,
        server_error: None,
        received: Vec::new(),
    };
    outcome.client.writer().write_all(PAYLOAD).unwrap();
    // Two flights each way are enough; the bound only keeps a broken test from running for ever.
    for _ in 0..10 {
        let mut flight = Vec::new();
        while outcome.client.wants_write() {
            outcome.client.write_tls(&mut flight).unwrap();
        }
        for mut part in flight.chunks(piece.min(flight.len().max(1))) {
            while outcome.server_error.is_none() && !part.is_empty() {
                outcome.server.read_tls(&mut part).unwrap();
                outcome.server_error = outcome.server.process_new_packets().err();
                let _ = outcome.server.reader().read_to_end(&mut outcome.received);
            }
        }
        let mut flight = Vec::new();
        while outcome.server.wants_write() {
            outcome.server.write_tls(&mut flight).unwrap();
        }
        for mut part in flight.chunks(piece.min(flight.len().max(1))) {
            while outcome.client_error.is_none() && !part.is_empty() {
                outcome.client.read_tls(&mut part).unwrap();
                outcome.client_error = outcome.client.process_new_packets().err();
            }
        }
        if !outcome.client.wants_write() && flight.is_empty() {
            break;
        }
    }
    outcome
}

pub fn server_config(credentials: &Credentials) -> Arc<ServerConfig> {
    credentials.server_config(&[ALPN], ClientAuth::Required).unwrap()
}

pub fn client_config(credentials: &Credentials, expected: &SpiffeId) -> Arc<ClientConfig> {
    credentials.client_config(expected, &[ALPN]).unwrap()
}
