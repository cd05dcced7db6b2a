//! The application and the load: both as light as hyper allows, so that they disturb the sidecars little.

use std::{cell::RefCell, convert::Infallible, net::SocketAddr, rc::Rc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinSet, spawn_local},
    time::Instant,
};

/// Bytes of an answer: what small API answers have.
const ANSWER: usize = 1024;

/// An HTTP/1.1 application.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
}

impl Backend {
    pub(crate) async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening on 127.0.0.1")?;
        let address = listener.local_addr().context("reading the application's address")?;
        let answer = Bytes::from(vec![b'x'; ANSWER]);
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Without this the answer waits for an acknowledgement now and then.
                let _ = stream.set_nodelay(true);
                let answer = answer.clone();
                let service = service_fn(move |_| {
                    let answer = answer.clone();
                    async move { Ok::<_, Infallible>(Response::new(Full::new(answer))) }
                });
                spawn_local(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Ok(Self { address })
    }
}

/// What one round showed.
pub(crate) struct Round {
    pub(crate) requests: usize,
    elapsed: Duration,
    /// Microseconds, ascending.
    latencies: Vec<f64>,
}

impl Round {
    pub(crate) fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 requests")]
        let requests = self.requests as f64;
        requests / self.elapsed.as_secs_f64()
    }

    /// Microseconds.
    pub(crate) fn quantile(&self, q: f64) -> f64 {
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let at = (self.latencies.len().saturating_sub(1) as f64 * q) as usize;
        self.latencies.get(at).copied().unwrap_or_default()
    }
}

/// Sends requests over `connections` connections for `length`, each as soon as the last one on its connection came back.
pub(crate) async fn round(target: SocketAddr, connections: usize, length: Duration) -> Result<Round> {
    let latencies = Rc::new(RefCell::new(Vec::new()));
    let begun = Instant::now();
    let end = begun + length;
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        clients.spawn_local(client(target, end, latencies.clone()));
    }
    while let Some(client) = clients.join_next().await {
        client.context("a client panicked")??;
    }
    let mut latencies = latencies.take();
    latencies.sort_by(f64::total_cmp);
    Ok(Round { requests: latencies.len(), elapsed: begun.elapsed(), latencies })
}

async fn client(target: SocketAddr, end: Instant, latencies: Rc<RefCell<Vec<f64>>>) -> Result<()> {
    let stream = TcpStream::connect(target).await.with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    spawn_local(connection);
    while Instant::now() < end {
        let begun = Instant::now();
        sender.ready().await?;
        let request = Request::get("/").header(http::header::HOST, "bench").body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await.context("waiting for an answer")?;
        ensure!(response.status().is_success(), "the answer is {}", response.status());
        let body = response.into_body().collect().await.context("reading an answer")?.to_bytes();
        ensure!(body.len() == ANSWER, "the answer has {} bytes", body.len());
        latencies.borrow_mut().push(begun.elapsed().as_secs_f64() * 1e6);
    }
    Ok(())
}
