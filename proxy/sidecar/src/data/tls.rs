//! Dialling, and mutual TLS on both sides.
//!
//! What arrives on a workload's port may be a peer's sidecar, the application's own TLS, or plaintext. Only the ALPN of
//! the `ClientHello` tells the first from the second, so it is read before anything is answered: bytes that are not
//! for us must reach the application untouched.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use outrigger_certs::{ClientAuth, CredentialsError, SpiffeId};
use outrigger_core::{
    key::{Alpn, ConnectionKey},
    reason::Reason,
};
use outrigger_intercept::sockets;
use rustls::{ClientConfig, CommonState, server::Acceptor};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::{Worker, reasons::Refusal, session, wire::Wire};
use crate::{config::Timeouts, context::Context, metrics::TlsFacts};

/// Client configurations kept for one epoch: one per identity dialled and ALPN.
const MAX_CLIENT_CONFIGS: usize = 1024;

/// How long the own application may take to accept, at least: while its queue is full, the kernel tries again after one
/// second and after three. Nobody else could be asked.
const APPLICATION_PATIENCE: Duration = Duration::from_millis(3_500);

/// TCP keep-alive probes without an answer that end a connection.
const KEEPALIVE_PROBES: u32 = 3;

/// Why a connection to an endpoint was not made. Nothing was sent: another endpoint may be tried.
#[derive(Debug, Clone)]
pub(crate) struct ConnectError {
    pub(crate) reason: Reason,
    pub(crate) text: Rc<str>,
}

impl ConnectError {
    pub(crate) fn new(reason: Reason, text: impl AsRef<str>) -> Self {
        Self { reason, text: text.as_ref().into() }
    }

    pub(crate) fn refusal(&self) -> Refusal {
        Refusal::new(self.reason, &*self.text)
    }
}

/// A mutual TLS connection whose handshake is complete.
pub(crate) struct Secured {
    pub(crate) wire: Wire,
    pub(crate) alpn: Alpn,
    pub(crate) peer: SpiffeId,
    pub(crate) facts: TlsFacts,
    /// When it has to be replaced, for the sake of the leaf that ends first.
    pub(crate) move_at: SystemTime,
    /// The trust bundle's epoch under which it was made.
    pub(crate) epoch: u64,
}

/// Who is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whom {
    /// A peer's sidecar.
    Sidecar,
    /// The workload's own application.
    Application,
    /// Whoever has no sidecar.
    Outside,
}

/// Dials `address`. A sidecar's may turn out to be on this very host.
pub(crate) async fn dial(ctx: &Context, address: SocketAddr, whom: Whom) -> Result<TcpStream, ConnectError> {
    let failed = |error: io::Error| ConnectError::new(Reason::ConnectFailed, format!("{address}: {error}"));
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(failed)?;
    if let Some(mark) = ctx.config.mark {
        sockets::set_mark(&socket, mark).map_err(failed)?;
    }
    if whom == Whom::Sidecar {
        sockets::allow_hairpin(&socket).map_err(failed)?;
    }
    let limit = match whom {
        Whom::Application => ctx.config.timeouts.connect.get().max(APPLICATION_PATIENCE),
        Whom::Sidecar | Whom::Outside => ctx.config.timeouts.connect.get(),
    };
    let stream = timeout(limit, socket.connect(address))
        .await
        .map_err(|_| ConnectError::new(Reason::ConnectTimeout, format!("{address}: no answer in {limit:?}")))?
        .map_err(failed)?;
    configure(&stream, &ctx.config.timeouts);
    Ok(stream)
}

/// Options of every connection, accepted or dialled. A socket that refuses one of them is served all the same.
pub(crate) fn configure(stream: &TcpStream, timeouts: &Timeouts) {
    let _ = sockets::set_nodelay(stream);
    if let Some(limit) = timeouts.tcp_user.enabled() {
        let _ = sockets::set_user_timeout(stream, limit);
        let _ = sockets::set_keepalive(stream, limit, limit / KEEPALIVE_PROBES, KEEPALIVE_PROBES);
    }
}

/// Client configurations of the present epoch.
#[derive(Default)]
pub(crate) struct ClientConfigs {
    epoch: u64,
    configs: HashMap<(Arc<str>, Alpn), Arc<ClientConfig>>,
}

impl ClientConfigs {
    fn get(
        &mut self,
        ctx: &Context,
        identity: &Arc<str>,
        alpn: Alpn,
    ) -> Result<Arc<ClientConfig>, ConnectError> {
        let epoch = ctx.credentials.epoch();
        if self.epoch != epoch || self.configs.len() >= MAX_CLIENT_CONFIGS {
            self.configs.clear();
            self.epoch = epoch;
        }
        let key = (identity.clone(), alpn);
        if let Some(config) = self.configs.get(&key) {
            return Ok(config.clone());
        }
        let expected: SpiffeId = identity.parse().map_err(|error| {
            ConnectError::new(Reason::IdentityMismatch, format!("the catalog's identity is invalid: {error}"))
        })?;
        let config = ctx.credentials.client_config(&expected, &[alpn.wire()]).map_err(no_certificate)?;
        self.configs.insert(key, config.clone());
        Ok(config)
    }
}

fn no_certificate(error: CredentialsError) -> ConnectError {
    ConnectError::new(Reason::NoCertificate, error.to_string())
}

/// Dials an endpoint and proves both identities.
pub(crate) async fn connect(worker: &Worker, key: &ConnectionKey) -> Result<Secured, ConnectError> {
    let ctx = &worker.ctx;
    let address = key.address;
    let config = worker.pool.configs.borrow_mut().get(ctx, &key.expected_identity, key.alpn)?;
    let tcp = dial(ctx, address, Whom::Sidecar).await?;
    let limit = ctx.config.timeouts.connect.get();
    let handshake = session::connect(&tcp, config, outrigger_certs::server_name(), &worker.gate);
    let established = match timeout(limit, handshake).await {
        Err(_) => {
            let text = format!("{address}: no TLS handshake in {limit:?}");
            return Err(ConnectError::new(Reason::ConnectTimeout, text));
        }
        Ok(Err(error)) => return Err(handshake_error(address, &error)),
        Ok(Ok(established)) => established,
    };
    let connection = established.session.state();
    if connection.alpn_protocol() != Some(key.alpn.wire()) {
        let text = format!("{address}: the peer is no sidecar: it did not agree on the protocol");
        return Err(ConnectError::new(Reason::IdentityMismatch, text));
    }
    facts(ctx, connection, key.alpn)
        .map(|secured| secured.over(Wire::tls(tcp, established)))
        .ok_or_else(|| ConnectError::new(Reason::NoCertificate, "the own certificate is gone"))
}

fn handshake_error(address: SocketAddr, error: &io::Error) -> ConnectError {
    let text = format!("{address}: {error}");
    if let Some(refusal) = outrigger_certs::refusal(error) {
        return ConnectError::new(Reason::IdentityMismatch, format!("{address}: {refusal}"));
    }
    let reason = match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        // Something answered, and not as a sidecar would.
        Some(rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. }) => {
            Reason::IdentityMismatch
        }
        _ => Reason::ConnectFailed,
    };
    ConnectError::new(reason, text)
}

/// Accepts a peer's sidecar; `first` was read already. `Err` holds a word for the metrics.
pub(crate) async fn accept(worker: &Worker, tcp: TcpStream, first: Vec<u8>) -> Result<Secured, &'static str> {
    let ctx = &worker.ctx;
    let alpn = [Alpn::H2.wire(), Alpn::Tcp.wire()];
    let config =
        ctx.credentials.server_config(&alpn, ClientAuth::Required).map_err(|_| "no_own_certificate")?;
    let handshake = session::accept(&tcp, config, first, &worker.gate);
    let established = match timeout(ctx.config.timeouts.handshake.get(), handshake).await {
        Err(_) => return Err("timeout"),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a peer's handshake failed");
            return Err(
                outrigger_certs::refusal(&error).map_or("tls_error", outrigger_certs::Refusal::as_str)
            );
        }
        Ok(Ok(established)) => established,
    };
    let connection = established.session.state();
    let alpn = connection.alpn_protocol().and_then(Alpn::from_wire).ok_or("no_alpn")?;
    let secured = facts(ctx, connection, alpn).ok_or("no_certificate")?;
    Ok(secured.over(Wire::tls(tcp, established)))
}

/// [`Secured`] without its connection.
struct Facts(SpiffeId, Alpn, TlsFacts, SystemTime, u64);

impl Facts {
    fn over(self, wire: Wire) -> Secured {
        let Self(peer, alpn, facts, move_at, epoch) = self;
        Secured { wire, alpn, peer, facts, move_at, epoch }
    }
}

fn facts(ctx: &Context, connection: &CommonState, alpn: Alpn) -> Option<Facts> {
    let peer = outrigger_certs::peer(connection)?;
    let own = ctx.credentials.leaf()?;
    let facts = TlsFacts {
        peer: peer.id.to_string(),
        own: own.id().to_string(),
        // Nothing else is configured; as OpenTelemetry's `tls.protocol.version` has it.
        version: match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => "1.3".to_owned(),
            other => format!("{other:?}"),
        },
        key_exchange: connection
            .negotiated_key_exchange_group()
            .and_then(|group| group.name().as_str())
            .unwrap_or_default()
            .to_owned(),
    };
    let move_at = move_at(peer.not_after.min(own.not_after()), SystemTime::now());
    Some(Facts(peer.id, alpn, facts, move_at, ctx.credentials.trust_epoch()))
}

/// When a connection that stands on a leaf has to be replaced: a minute before the leaf ends, and never earlier than after
/// nine tenths of what was left of it, so that leaves which live for seconds carry connections, too.
fn move_at(end: SystemTime, now: SystemTime) -> SystemTime {
    const MARGIN: Duration = Duration::from_mins(1);
    let left = end.duration_since(now).unwrap_or_default();
    now + left.saturating_sub(MARGIN).max(left.mul_f64(0.9))
}

/// Whose a `ClientHello` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hello {
    /// Not complete yet.
    NeedMore,
    /// A sidecar's.
    Ours,
    /// The application's own TLS, or none.
    Foreign,
}

/// Reads a `ClientHello` without answering it.
pub(crate) struct Sniffer {
    acceptor: Acceptor,
    fed: usize,
}

/// Bytes of a `ClientHello` that are read, at most: TLS itself allows more, nobody needs a quarter.
pub(crate) const MAX_HELLO: usize = 64 * 1024;

impl Sniffer {
    pub(crate) fn new() -> Self {
        Self { acceptor: Acceptor::default(), fed: 0 }
    }

    /// `bytes`: all that was read so far.
    pub(crate) fn look(&mut self, bytes: &[u8]) -> Hello {
        while self.fed < bytes.len() {
            let mut rest = &bytes[self.fed..];
            match self.acceptor.read_tls(&mut rest) {
                Ok(0) | Err(_) => return Hello::Foreign,
                Ok(count) => self.fed += count,
            }
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let ours = accepted
                        .client_hello()
                        .alpn()
                        .is_some_and(|mut names| names.any(|name| Alpn::from_wire(name).is_some()));
                    return if ours { Hello::Ours } else { Hello::Foreign };
                }
                Err(_) => return Hello::Foreign,
            }
        }
        if bytes.len() >= MAX_HELLO { Hello::Foreign } else { Hello::NeedMore }
    }
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConnection, RootCertStore};

    use super::*;

    #[test]
    fn a_leaf_of_seconds_carries_connections() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_hours(1);
        let until = |left: Duration| move_at(now + left, now).duration_since(now).unwrap();
        assert_eq!(until(Duration::from_hours(24)), Duration::from_mins(24 * 60 - 1));
        assert_eq!(until(Duration::from_secs(30)), Duration::from_secs(27));
        assert_eq!(move_at(now - Duration::from_secs(5), now), now);
    }

    fn hello(alpn: &[&[u8]]) -> Vec<u8> {
        let mut config = ClientConfig::builder_with_provider(outrigger_certs::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let mut client = ClientConnection::new(Arc::new(config), "example.org".try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_alpn_tells_a_sidecar_from_an_application() {
        for (alpn, expected) in [
            (&[Alpn::H2.wire()][..], Hello::Ours),
            (&[Alpn::Tcp.wire()], Hello::Ours),
            (&[b"h2", b"http/1.1"], Hello::Foreign),
            (&[], Hello::Foreign),
        ] {
            let bytes = hello(alpn);
            assert_eq!(Sniffer::new().look(&bytes), expected);
            // Byte by byte the answer is the same, and comes with the last byte.
            let mut sniffer = Sniffer::new();
            for end in 1..bytes.len() {
                assert_eq!(sniffer.look(&bytes[..end]), Hello::NeedMore, "{end} of {}", bytes.len());
            }
            assert_eq!(sniffer.look(&bytes), expected);
        }
    }

    #[test]
    fn no_tls_is_foreign() {
        assert_eq!(Sniffer::new().look(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"), Hello::Foreign);
    }
}
