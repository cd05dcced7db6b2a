//! The webhook's port: TLS connections, each a task, all of them bounded.
//!
//! Any pod can reach the port, and nobody proves who he is: API servers have no certificate that we could know. So each address has
//! a share of what may be at work, and whoever uses his up keeps nobody else's reviews waiting. Connections have no such share: an API
//! server makes one for each review of a burst, and one that is refused is a pod that is refused.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::certificate::Certificate;
use super::review::{AT_WORK, Share};

/// Open connections. An API server needs a few; beyond this newcomers wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// For a handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// After this a connection is told to end, so that nobody keeps one for good. An API server makes another.
const LIFE: Duration = Duration::from_mins(10);
/// For what is under way on a connection that was told to end.
const GRACE: Duration = Duration::from_secs(5);
/// After the process ran out of file descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

/// Serves until `stop`, then ends what is open.
pub(super) async fn serve(
    listener: TcpListener,
    certificate: Certificate,
    router: Router,
    stop: CancellationToken,
) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let peers = Peers::default();
    let tasks = TaskTracker::new();
    loop {
        let accept = async {
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accept => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((tcp, peer)) => {
                let guest = peers.admit(peer.ip().to_canonical());
                let router = router.clone().layer(Extension(guest.share()));
                let (certificate, stop) = (certificate.clone(), stop.clone());
                tasks.spawn(async move {
                    if let Err(error) = connection(tcp, &certificate, router, stop).await {
                        tracing::debug!(%peer, %error, "a connection of the webhook ended");
                    }
                    drop((permit, guest));
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// Who has connections, by address.
#[derive(Default, Clone)]
struct Peers(Arc<Mutex<HashMap<IpAddr, Peer>>>);

struct Peer {
    connections: usize,
    share: Share,
}

/// A connection that counts until it is dropped.
struct Guest {
    peers: Peers,
    address: IpAddr,
    share: Share,
}

impl Peers {
    fn admit(&self, address: IpAddr) -> Guest {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Half of all: two API servers are not in each other's way, and one pod is in nobody's.
        let new = || Peer { connections: 0, share: Share(Arc::new(Semaphore::new(AT_WORK as usize / 2))) };
        let peer = peers.entry(address).or_insert_with(new);
        peer.connections += 1;
        Guest { peers: self.clone(), address, share: peer.share.clone() }
    }
}

impl Guest {
    fn share(&self) -> Share {
        self.share.clone()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut peers = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get_mut(&self.address) {
            peer.connections -= 1;
            if peer.connections == 0 {
                peers.remove(&self.address);
            }
        }
    }
}

async fn connection(
    tcp: TcpStream,
    certificate: &Certificate,
    router: Router,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // Until there is a certificate, the port says nothing: `/ready` does.
    let Some(config) = certificate.current() else { return Ok(()) };
    tcp.set_nodelay(true)?;
    let tls = tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(config).accept(tcp)).await??;
    let builder = Builder::new(TokioExecutor::new());
    let serving = builder.serve_connection(TokioIo::new(tls), TowerToHyperService::new(router));
    tokio::pin!(serving);
    tokio::select! {
        ended = serving.as_mut() => return ended.map_err(|error| anyhow::anyhow!(error)),
        () = stop.cancelled() => {}
        () = tokio::time::sleep(LIFE) => {}
    }
    serving.as_mut().graceful_shutdown();
    tokio::time::timeout(GRACE, serving).await?.map_err(|error| anyhow::anyhow!(error))
}
