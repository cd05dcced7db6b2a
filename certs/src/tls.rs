//! rustls configurations from the credentials of the moment.
//!
//! A configuration is immutable and belongs to one leaf and one bundle. To rotate is to replace the credentials; new
//! connections take a configuration of the new epoch, and those that live keep theirs until their owner ends them.
//!
//! What every configuration holds: TLS 1.3 only; X25519MLKEM768 first, for traffic that is recorded today; no early
//! data (it can be replayed) and neither tickets nor resumption, in both directions: a resumed session would carry an
//! identity past the expiry of its certificate or the end of its root.

use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, CommonState, ServerConfig};
use rustls_pki_types::ServerName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::TrustBundle;
use crate::identity::SpiffeId;
use crate::leaf::{self, Leaf};
use crate::verify::{self, ClientVerifier, ServerVerifier};

/// A sidecar has one inbound configuration, a controller two; more is a caller that makes up ALPN lists.
const MAX_SERVER_CONFIGS: usize = 8;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        // AES-128 first: as strong as P-256 and X25519 are, and a fifth cheaper than AES-256 on the data path.
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
});

/// The one cryptographic provider: aws-lc-rs with TLS 1.3 suites only.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// The server name for every connection inside the mesh. It is never sent nor checked: peers are told apart by their
/// identity (RFC 2606, section 2 keeps `.invalid` free).
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("outrigger.invalid").expect("a valid DNS name")
}

/// Whether a server insists on a client certificate. One that is presented is always verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientAuth {
    /// No certificate, no connection.
    Required,
    /// A client may come without: for the controller, whose first visitors have none yet.
    Optional,
}

/// Why credentials were not replaced, or do not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// There is no certificate yet.
    #[error("this workload has no certificate yet")]
    NoLeaf,
    /// The leaf or the bundle is of another trust domain.
    #[error("the new leaf or bundle is of another trust domain")]
    OtherTrustDomain,
    /// The bundle is older than the newest one seen.
    #[error("the bundle of epoch {offered} is older than the one of epoch {held}")]
    StaleBundle {
        /// The newest epoch seen.
        held: u64,
        /// The epoch of the refused one.
        offered: u64,
    },
}

/// The leaf and the bundle in use: a cheap handle, shared by all that serve and dial. Each change of the leaf or the
/// roots makes a new epoch; a caller compares [`epoch`](Self::epoch) to learn that what it built is of yesterday.
#[derive(Clone)]
pub struct Credentials(Arc<Shared>);

struct Shared {
    state: ArcSwap<State>,
    // Held while a new state is made from the one before.
    writer: Mutex<()>,
}

struct State {
    epoch: u64,
    trust_epoch: u64,
    leaf: Option<Leaf>,
    bundle: TrustBundle,
    servers: Mutex<Vec<ServerEntry>>,
}

struct ServerEntry {
    alpn: Vec<Vec<u8>>,
    client_auth: ClientAuth,
    config: Arc<ServerConfig>,
}

impl Credentials {
    /// Credentials of a workload that has no leaf yet: enough for [`bootstrap_config`](Self::bootstrap_config).
    pub fn new(bundle: TrustBundle) -> Self {
        let state = State { epoch: 0, trust_epoch: 0, leaf: None, bundle, servers: Mutex::default() };
        Self(Arc::new(Shared { state: ArcSwap::from_pointee(state), writer: Mutex::new(()) }))
    }

    /// Grows by one with each change of the leaf or the roots.
    pub fn epoch(&self) -> u64 {
        self.0.state.load().epoch
    }

    /// Grows by one each time that other roots come into use: the part of a connection's key that says under which
    /// roots its peer was accepted. A count of this process; the controller's is [`TrustBundle::epoch`].
    pub fn trust_epoch(&self) -> u64 {
        self.0.state.load().trust_epoch
    }

    /// The leaf in use.
    pub fn leaf(&self) -> Option<Leaf> {
        self.0.state.load().leaf.clone()
    }

    /// The bundle in use.
    pub fn bundle(&self) -> TrustBundle {
        self.0.state.load().bundle.clone()
    }

    /// Puts a leaf in use.
    pub fn set_leaf(&self, leaf: Leaf) -> Result<(), CredentialsError> {
        let _writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let held = self.0.state.load_full();
        if leaf.id().trust_domain() != held.bundle.trust_domain().as_str() {
            return Err(CredentialsError::OtherTrustDomain);
        }
        self.replace(State {
            epoch: held.epoch + 1,
            trust_epoch: held.trust_epoch,
            leaf: Some(leaf),
            bundle: held.bundle.clone(),
            servers: Mutex::default(),
        });
        Ok(())
    }

    /// Puts a bundle in use. `Ok(false)`: its roots are those in use. A bundle older than the newest one seen is
    /// refused, so that a controller with old data cannot bring back a root that had left. One of the same epoch with
    /// other roots is taken: a controller whose roots were replaced in a file may begin to count anew, and to refuse
    /// its word would end all trust with the old root.
    pub fn set_bundle(&self, bundle: TrustBundle) -> Result<bool, CredentialsError> {
        let _writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let held = self.0.state.load_full();
        if bundle.trust_domain() != held.bundle.trust_domain() {
            return Err(CredentialsError::OtherTrustDomain);
        }
        if bundle.epoch() < held.bundle.epoch() {
            return Err(CredentialsError::StaleBundle { held: held.bundle.epoch(), offered: bundle.epoch() });
        }
        let changed = !bundle.same_roots(&held.bundle);
        if changed || bundle.epoch() > held.bundle.epoch() {
            self.replace(State {
                epoch: held.epoch + u64::from(changed),
                trust_epoch: held.trust_epoch + u64::from(changed),
                leaf: held.leaf.clone(),
                bundle,
                servers: Mutex::default(),
            });
        }
        Ok(changed)
    }

    fn replace(&self, state: State) {
        self.0.state.store(Arc::new(state));
    }

    /// The configuration to accept connections with, of this epoch; made once for each epoch and kind. `alpn` is in
    /// order of preference; a client that offers none of it is refused, one that offers no ALPN at all is not: look at
    /// what was agreed.
    pub fn server_config(
        &self,
        alpn: &[&[u8]],
        client_auth: ClientAuth,
    ) -> Result<Arc<ServerConfig>, CredentialsError> {
        let state = self.0.state.load();
        let leaf = state.leaf.as_ref().ok_or(CredentialsError::NoLeaf)?;
        let mut servers = state.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |entry: &&ServerEntry| entry.client_auth == client_auth && entry.alpn == alpn;
        if let Some(entry) = servers.iter().find(same) {
            return Ok(entry.config.clone());
        }
        let config = Arc::new(build_server(leaf, &state.bundle, alpn, client_auth));
        if servers.len() < MAX_SERVER_CONFIGS {
            let alpn = config.alpn_protocols.clone();
            servers.push(ServerEntry { alpn, client_auth, config: config.clone() });
        }
        Ok(config)
    }

    /// A configuration to dial exactly `expected` with our leaf. Made anew each time: keep it by
    /// ([`epoch`](Self::epoch), `expected`).
    pub fn client_config(
        &self,
        expected: &SpiffeId,
        alpn: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, CredentialsError> {
        let state = self.0.state.load();
        let leaf = state.leaf.as_ref().ok_or(CredentialsError::NoLeaf)?;
        Ok(Arc::new(build_client(Some(leaf), &state.bundle, expected, alpn)))
    }

    /// A configuration to dial exactly `expected` without a certificate of our own: for the controller, to ask it for
    /// the first one or when the old one has expired.
    pub fn bootstrap_config(&self, expected: &SpiffeId, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        Arc::new(build_client(None, &self.0.state.load().bundle, expected, alpn))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.load();
        f.debug_struct("Credentials")
            .field("epoch", &state.epoch)
            .field("trust_epoch", &state.trust_epoch)
            .field("leaf", &state.leaf)
            .field("bundle", &state.bundle)
            .finish()
    }
}

fn build_server(leaf: &Leaf, bundle: &TrustBundle, alpn: &[&[u8]], client_auth: ClientAuth) -> ServerConfig {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let required = client_auth == ClientAuth::Required;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_client_cert_verifier(Arc::new(ClientVerifier::new(bundle.clone(), algorithms, required)))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(leaf.certified())));
    config.alpn_protocols = owned(alpn);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config
}

fn build_client(
    leaf: Option<&Leaf>,
    bundle: &TrustBundle,
    expected: &SpiffeId,
    alpn: &[&[u8]],
) -> ClientConfig {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(
            bundle.clone(),
            algorithms,
            expected.clone(),
        )));
    let mut config = match leaf {
        Some(leaf) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(leaf.certified()))),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = owned(alpn);
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    config
}

fn owned(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|name| name.to_vec()).collect()
}

/// The other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub id: SpiffeId,
    /// When its leaf ends: the connection must not outlive it.
    pub not_after: SystemTime,
}

/// The verified peer of a connection whose handshake is complete and that was made with a configuration of
/// [`Credentials`]. `None`: the peer showed no certificate, or the handshake is still under way.
pub fn peer(connection: &CommonState) -> Option<Peer> {
    if connection.is_handshaking() {
        return None;
    }
    let (_, certificate) = X509Certificate::from_der(connection.peer_certificates()?.first()?).ok()?;
    let (_, not_after) = leaf::validity(certificate.validity());
    Some(Peer { id: verify::only_name(&certificate)?, not_after })
}

/// The identity of [`peer`].
pub fn peer_identity(connection: &CommonState) -> Option<SpiffeId> {
    peer(connection).map(|peer| peer.id)
}
