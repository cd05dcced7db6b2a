//! A connection to the controller: any of its addresses, but only the one identity.
//!
//! The TCP and TLS steps are ours and the gRPC channel gets the finished stream: so that a failure says which address
//! failed at which step, that the socket carries our mark, and that a channel never reconnects by itself behind the
//! back of the code that must say again what it holds.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use hickory_resolver::{
    Resolver,
    net::runtime::{RuntimeProvider, TokioHandle, TokioTime, iocompat::AsyncIoTokioAsStd},
};
use outrigger_certs::{CredentialsError, SpiffeId};
use rustls::ClientConfig;
use tokio::{
    net::{TcpSocket, TcpStream, UdpSocket},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::{config::load::host_and_port, context::Context};

const ALPN: &[u8] = b"h2";
/// Addresses tried in one attempt, over all configured names.
const MAX_ADDRESSES: usize = 16;

/// How we prove who we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Auth {
    /// With the leaf.
    Leaf,
    /// Not at all on this layer: a token will do it.
    None,
}

/// Why the controller could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("cannot reach the controller: {0}")]
    Addresses(Attempts),
    #[error("cannot make a TLS configuration for the controller: {0}")]
    Credentials(#[from] CredentialsError),
    #[error("cannot open a gRPC channel on a connection to the controller: {0}")]
    Channel(#[from] tonic::transport::Error),
}

/// One line for each address that was tried.
#[derive(Debug)]
pub(crate) struct Attempts {
    lines: Vec<String>,
    /// Some address took a TCP connection.
    reached: bool,
}

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join("; "))
    }
}

/// How long to wait at most before the next attempt, with jitter over all of it.
///
/// Nobody there: knocking costs a packet, and a controller that returns must be found within 2 s. Somebody there who
/// could not help: each attempt costs a handshake, and a fleet must not keep down what is struggling to get up.
pub(crate) fn slowest_retry(error: &anyhow::Error) -> Duration {
    match error.downcast_ref() {
        Some(ConnectError::Addresses(Attempts { reached: false, .. })) => Duration::from_secs(1),
        _ => Duration::from_secs(15),
    }
}

/// The identity that the controller must prove.
pub(crate) fn identity(ctx: &Context) -> SpiffeId {
    let domain = ctx.config.trust_domain.parse().expect("a loaded configuration has a valid trust domain");
    SpiffeId::controller(&domain, &ctx.config.mesh_namespace)
        .expect("a loaded configuration has a valid namespace")
}

/// Connects to any of the controller's addresses, in random order.
pub(crate) async fn connect(ctx: &Context, auth: Auth) -> Result<Channel, ConnectError> {
    let expected = identity(ctx);
    let tls = match auth {
        Auth::Leaf => ctx.credentials.client_config(&expected, &[ALPN])?,
        Auth::None => ctx.credentials.bootstrap_config(&expected, &[ALPN]),
    };
    let mut failures = Vec::new();
    let mut addresses = Vec::new();
    for text in &ctx.config.controller {
        match addresses_of(ctx, text).await {
            Ok(found) => addresses.extend(found),
            Err(error) => failures.push(format!("{text}: {error}")),
        }
    }
    let mut reached = false;
    fastrand::shuffle(&mut addresses);
    addresses.truncate(MAX_ADDRESSES);
    for address in addresses {
        let stream = match dial(ctx, address).await {
            Ok(stream) => stream,
            Err(error) => {
                failures.push(format!("{address}: {error}"));
                continue;
            }
        };
        reached = true;
        match handshake(ctx, stream, tls.clone()).await {
            Ok(stream) => {
                ctx.control.connect("ok");
                return Ok(channel(ctx, stream).await?);
            }
            Err(error) => failures.push(format!("{address}: {error}")),
        }
    }
    ctx.control.connect("failed");
    Err(ConnectError::Addresses(Attempts { lines: failures, reached }))
}

type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

async fn dial(ctx: &Context, address: SocketAddr) -> io::Result<TcpStream> {
    let timeouts = &ctx.config.timeouts;
    let stream = timeout(timeouts.connect.get(), tcp(ctx.config.mark, address, None))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time"))??;
    stream.set_nodelay(true)?;
    if let Some(period) = timeouts.tcp_user.enabled() {
        outrigger_intercept::sockets::set_user_timeout(&stream, period)?;
    }
    Ok(stream)
}

async fn handshake(ctx: &Context, stream: TcpStream, tls: Arc<ClientConfig>) -> io::Result<TlsStream> {
    let handshake = TlsConnector::from(tls).connect(outrigger_certs::server_name(), stream);
    timeout(ctx.config.timeouts.handshake.get(), handshake)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))?
}

async fn channel(ctx: &Context, stream: TlsStream) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_static("http://outrigger.invalid")
        .http2_keep_alive_interval(ctx.config.timeouts.ping_interval.get())
        .keep_alive_timeout(ctx.config.timeouts.ping_timeout.get())
        .keep_alive_while_idle(true);
    outrigger_api::channel(endpoint, stream).await
}

async fn addresses_of(ctx: &Context, text: &str) -> Result<Vec<SocketAddr>, String> {
    let (host, port) = host_and_port(text).ok_or("not of the form host:port")?;
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    // Made anew each time: resolv.conf may have changed, and answers must not outlive an attempt.
    let resolver = Resolver::builder(MarkedRuntime { mark: ctx.config.mark, handle: TokioHandle::default() })
        .and_then(hickory_resolver::ResolverBuilder::build)
        .map_err(|error| format!("cannot read the resolver's configuration: {error}"))?;
    let found =
        resolver.lookup_ip(host).await.map_err(|error| format!("cannot look the name up: {error}"))?;
    Ok(found.iter().map(|ip| SocketAddr::new(ip, port)).collect())
}

/// Connects a TCP socket that the redirection rules exempt.
pub(crate) async fn tcp(
    mark: Option<u32>,
    address: SocketAddr,
    local: Option<SocketAddr>,
) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(mark) = mark {
        outrigger_intercept::sockets::set_mark(&socket, mark)?;
    }
    if let Some(local) = local {
        socket.bind(local)?;
    }
    socket.connect(address).await
}

/// Binds a UDP socket that the redirection rules exempt.
pub(crate) async fn udp(mark: Option<u32>, local: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(local).await?;
    if let Some(mark) = mark {
        outrigger_intercept::sockets::set_mark(&socket, mark)?;
    }
    Ok(socket)
}

/// hickory's runtime, with our mark on its sockets: else our own questions would be redirected to ourselves.
#[derive(Clone)]
struct MarkedRuntime {
    mark: Option<u32>,
    handle: TokioHandle,
}

type Boxed<T> = std::pin::Pin<Box<dyn Send + Future<Output = io::Result<T>>>>;

impl RuntimeProvider for MarkedRuntime {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.handle.clone()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        local: Option<SocketAddr>,
        patience: Option<Duration>,
    ) -> Boxed<Self::Tcp> {
        let mark = self.mark;
        Box::pin(async move {
            let stream = timeout(patience.unwrap_or(Duration::from_secs(5)), tcp(mark, server, local))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            Ok(AsyncIoTokioAsStd(stream))
        })
    }

    fn bind_udp(&self, local: SocketAddr, _server: SocketAddr) -> Boxed<UdpSocket> {
        let mark = self.mark;
        Box::pin(udp(mark, local))
    }
}
