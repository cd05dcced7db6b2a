//! The webhook's port: TLS connections, each a task, all of them bounded.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::certificate::Certificate;

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
                let (certificate, router, stop) = (certificate.clone(), router.clone(), stop.clone());
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
