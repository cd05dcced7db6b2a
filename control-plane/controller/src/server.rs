//! The port for sidecars: TLS, then gRPC.
//!
//! A client certificate is optional, because a workload's first visit is for one; what a caller without may do is ask
//! for a certificate, within [`STRANGER_LIFE`]. A connection never outlives the leaf that opened it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use outrigger_api::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use outrigger_api::v1::certificates_server::CertificatesServer;
use outrigger_api::v1::replicas_server::ReplicasServer;
use outrigger_api::v1::workloads_server::WorkloadsServer;
use outrigger_certs::{ClientAuth, Credentials, Peer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::announce::Announce;
use crate::mesh::Viewer;
use crate::metrics::{Metrics, ReasonLabel};
use crate::push::Ads;
use crate::replicas::Answering;
use crate::sign::Sign;

/// Time for the TCP and TLS handshake together.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once: a few tens of KiB each, and enough that idle ones do not keep workloads out.
const HANDSHAKES: usize = 1024;
/// A caller without a certificate is sent away after this long.
const STRANGER_LIFE: Duration = Duration::from_mins(1);
/// Of all connections those without a certificate get this share, so that strangers cannot keep workloads out.
const STRANGERS_SHARE: usize = 4;
/// After its leaf has expired a connection has this long to hear so from its streams.
const EXPIRED_GRACE: Duration = Duration::from_secs(5);
/// Finds dead peers within 30 s.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// A proxy has one discovery stream, one announcing stream and now and then a call.
const STREAMS_PER_CONNECTION: u32 = 16;
/// Bytes of a request: 65,536 names of 60 bytes fit into a few subscriptions of this size.
const MAX_REQUEST: usize = 4 * 1024 * 1024;
/// Bytes of an announcement or a CSR with its token.
const MAX_SMALL_REQUEST: usize = 64 * 1024;
/// Bytes of a request's headers.
const MAX_HEADERS: u32 = 16 * 1024;
/// After the process ran out of file descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// Where the connection comes from.
    pub(crate) address: SocketAddr,
    connection: u64,
    peer: Option<Peer>,
}

impl Caller {
    /// The caller of a request.
    pub(crate) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the connection is not known"))
    }

    /// The workload that it has proved to be, and when that proof ends.
    pub(crate) fn workload(&self, purpose: &str) -> Result<(Viewer, Instant), Status> {
        let peer = self.peer.as_ref().ok_or_else(|| {
            Status::unauthenticated(format!(
                "{purpose} needs a workload's certificate; ask for one with a token first"
            ))
        })?;
        let left = peer.not_after.duration_since(SystemTime::now()).map_err(|_| {
            Status::unauthenticated("the leaf of this connection has expired; ask for one with a token")
        })?;
        let viewer = Viewer {
            identity: peer.id.clone(),
            address: self.address.ip().to_canonical(),
            connection: self.connection,
        };
        Ok((viewer, Instant::now() + left))
    }
}

/// The services of the port.
#[derive(Debug)]
pub(crate) struct Services {
    /// Discovery.
    pub(crate) ads: Ads,
    /// Certificates.
    pub(crate) sign: Sign,
    /// Announcements.
    pub(crate) announce: Announce,
    /// What other replicas ask.
    pub(crate) replicas: Answering,
}

/// Serves until `stop`, then closes what is open.
pub(crate) async fn serve(
    listener: TcpListener,
    credentials: Credentials,
    services: Services,
    max_connections: usize,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (sender, connections) = mpsc::channel(1);
    let acceptor = Acceptor {
        credentials,
        connections: Arc::new(Semaphore::new(max_connections)),
        strangers: Arc::new(Semaphore::new((max_connections / STRANGERS_SHARE).max(1))),
        handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
        metrics,
        ready: sender,
    };
    tokio::spawn(acceptor.run(listener, stop.clone()));
    let small = MAX_SMALL_REQUEST;
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(MAX_HEADERS)
        .add_service(
            AggregatedDiscoveryServiceServer::new(services.ads).max_decoding_message_size(MAX_REQUEST),
        )
        .add_service(CertificatesServer::new(services.sign).max_decoding_message_size(small))
        .add_service(WorkloadsServer::new(services.announce).max_decoding_message_size(small))
        .add_service(ReplicasServer::new(services.replicas).max_decoding_message_size(small))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.cancelled_owned())
        .await
}

struct Acceptor {
    credentials: Credentials,
    connections: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    ready: mpsc::Sender<io::Result<Connection>>,
}

impl Acceptor {
    async fn run(self, listener: TcpListener, stop: CancellationToken) {
        let mut next_connection = 0;
        loop {
            // At the bound nothing is accepted: newcomers wait in the kernel's queue.
            let accept = async {
                let permit = Arc::clone(&self.connections).acquire_owned().await;
                let handshake = Arc::clone(&self.handshakes).acquire_owned().await;
                (permit, handshake, listener.accept().await)
            };
            let (permit, handshake, accepted) = tokio::select! {
                accepted = accept => accepted,
                () = stop.cancelled() => return,
            };
            let (Ok(permit), Ok(handshake)) = (permit, handshake) else { return };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
            };
            next_connection += 1;
            let connection = next_connection;
            let (credentials, metrics, ready, strangers) = (
                self.credentials.clone(),
                Arc::clone(&self.metrics),
                self.ready.clone(),
                Arc::clone(&self.strangers),
            );
            tokio::spawn(async move {
                let shaken = tokio::time::timeout(HANDSHAKE, shake_hands(tcp, &credentials)).await;
                drop(handshake);
                let refused = match shaken {
                    Ok(Ok(tls)) => match admit(tls, address, connection, permit, &strangers, &metrics) {
                        Some(connection) => {
                            // The server is stopping where nobody receives.
                            let _ = ready.send(Ok(connection)).await;
                            return;
                        }
                        None => "strangers",
                    },
                    Ok(Err(error)) => {
                        tracing::debug!(peer = %address, %error, "handshake failed");
                        outrigger_certs::refusal(&error).map_or("handshake", outrigger_certs::Refusal::as_str)
                    }
                    Err(_) => "timeout",
                };
                metrics.handshakes_refused.get_or_create(&ReasonLabel::new(refused)).inc();
            });
        }
    }
}

async fn shake_hands(tcp: TcpStream, credentials: &Credentials) -> io::Result<TlsStream<TcpStream>> {
    tcp.set_nodelay(true)?;
    let config = credentials.server_config(&[b"h2"], ClientAuth::Optional).map_err(io::Error::other)?;
    TlsAcceptor::from(config).accept(tcp).await
}

/// The connection with its time, unless there are too many without a certificate already.
fn admit(
    tls: TlsStream<TcpStream>,
    address: SocketAddr,
    connection: u64,
    permit: OwnedSemaphorePermit,
    strangers: &Arc<Semaphore>,
    metrics: &Arc<Metrics>,
) -> Option<Connection> {
    let peer = outrigger_certs::peer(tls.get_ref().1);
    let (life, stranger) = match &peer {
        Some(peer) => {
            (peer.not_after.duration_since(SystemTime::now()).unwrap_or_default() + EXPIRED_GRACE, None)
        }
        None => (STRANGER_LIFE, Some(Arc::clone(strangers).try_acquire_owned().ok()?)),
    };
    metrics.connections.inc();
    Some(Connection {
        tls,
        caller: Caller { address, connection, peer },
        deadline: Box::pin(tokio::time::sleep(life)),
        metrics: Arc::clone(metrics),
        _permits: (permit, stranger),
    })
}

/// A connection past its handshake; reading from it ends when its caller's time is over.
struct Connection {
    tls: TlsStream<TcpStream>,
    caller: Caller,
    deadline: Pin<Box<Sleep>>,
    metrics: Arc<Metrics>,
    _permits: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the time of this caller is over",
            )));
        }
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
