//! The webhook's port: TLS connections, each a task, all of them bounded.
//!
//! Any pod can reach the port, and nobody proves who he is: API servers have no certificate that we could know. So each address has
//! a share of what may be at work, and whoever uses his up keeps nobody else's reviews waiting. Connections have no such share: an API
//! server makes one for each review of a burst, and one that is refused is a pod that is refused.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
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
    let mut shares = Shares::default();
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
                let router = router.clone().layer(Extension(shares.of(peer.ip().to_canonical())));
                let (certificate, stop) = (certificate.clone(), stop.clone());
                tasks.spawn(async move {
                    if let Err(error) = connection(tcp, &certificate, router, stop).await {
                        tracing::debug!(%peer, %error, "a connection of the webhook ended");
                    }
                    drop(permit);
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

/// What each address may have at work, for as long as it has a connection.
#[derive(Default)]
struct Shares(HashMap<IpAddr, Weak<Semaphore>>);

impl Shares {
    fn of(&mut self, address: IpAddr) -> Share {
        if let Some(known) = self.0.get(&address).and_then(Weak::upgrade) {
            return Share(known);
        }
        self.0.retain(|_, share| share.strong_count() > 0);
        // Half of all: two API servers are not in each other's way, and one pod is in nobody's.
        let new = Arc::new(Semaphore::new(AT_WORK as usize / 2));
        self.0.insert(address, Arc::downgrade(&new));
        Share(new)
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
