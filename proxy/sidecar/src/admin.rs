//! The admin port: `/metrics`, `/live` and `/ready` for everybody who can reach the workload; `/config` and `/drain` for
//! its own host only.
//!
//! "Its own host" means that both ends of the connection are loopback addresses: a redirected or routed connection may
//! have one, never both.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};

use crate::{context::Context, discovery::Discovery, drain::Phase};

/// Connections at once. Scrapers and probes hold one each.
const MAX_CONNECTIONS: usize = 64;
/// A connection that sends no request for this long is closed.
const IDLE: Duration = Duration::from_mins(1);
/// After an error of `accept` that may last, such as a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);
/// A listener that does not take a probe in this time is not ready. Kubernetes' own patience is 1 s.
const PROBE: Duration = Duration::from_millis(500);

const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const JSON: &str = "application/json";

struct Admin {
    ctx: Arc<Context>,
    discovery: Discovery,
    stop: mpsc::Sender<()>,
}

/// Serves the admin port. `stop` hears when somebody asks for a shutdown.
///
/// # Errors
/// If a listener cannot become part of the runtime.
pub fn serve(
    ctx: Arc<Context>,
    discovery: Discovery,
    stop: mpsc::Sender<()>,
    listeners: Vec<std::net::TcpListener>,
) -> std::io::Result<()> {
    let admin = Arc::new(Admin { ctx, discovery, stop });
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for listener in listeners {
        let listener = TcpListener::from_std(listener)?;
        tokio::spawn(accept(admin.clone(), listener, connections.clone()));
    }
    Ok(())
}

async fn accept(admin: Arc<Admin>, listener: TcpListener, connections: Arc<Semaphore>) {
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let Ok((stream, peer)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        let local = stream.local_addr().is_ok_and(loopback) && loopback(peer);
        let admin = admin.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let admin = admin.clone();
                async move { Ok::<_, Infallible>(admin.handle(&request, local).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE)
                .serve_connection(TokioIo::new(stream), service);
            // A scraper that goes away is no event.
            let _ = connection.await;
            drop(permit);
        });
    }
}

fn loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

impl Admin {
    async fn handle(&self, request: &Request<Incoming>, local: bool) -> Response<Full<Bytes>> {
        let reading = matches!(*request.method(), Method::GET | Method::HEAD);
        match request.uri().path() {
            "/metrics" if reading => respond(StatusCode::OK, OPEN_METRICS, self.ctx.metrics.encode()),
            "/live" if reading => respond(StatusCode::OK, TEXT, "live\n".to_owned()),
            "/ready" if reading => self.ready().await,
            "/config" | "/drain" if !local => {
                respond(StatusCode::FORBIDDEN, TEXT, "only on loopback\n".to_owned())
            }
            "/config" if reading => respond(StatusCode::OK, JSON, format!("{:#}\n", self.config())),
            "/drain" if request.method() == Method::POST => {
                // Full: somebody has asked before.
                let _ = self.stop.try_send(());
                respond(StatusCode::ACCEPTED, TEXT, "draining\n".to_owned())
            }
            "/drain" => not_allowed("POST"),
            "/metrics" | "/live" | "/ready" | "/config" => not_allowed("GET, HEAD"),
            _ => {
                let known = "there are /metrics, /live, /ready, /config and /drain\n".to_owned();
                respond(StatusCode::NOT_FOUND, TEXT, known)
            }
        }
    }

    async fn ready(&self) -> Response<Full<Bytes>> {
        let mut missing = self.ctx.ready.missing();
        if self.ctx.drain.phase() > Phase::Serving {
            missing.push("draining".to_owned());
        }
        for address in self.listeners() {
            if !matches!(timeout(PROBE, TcpStream::connect(address)).await, Ok(Ok(_))) {
                missing.push(format!("listener {address} does not answer"));
            }
        }
        if missing.is_empty() {
            respond(StatusCode::OK, TEXT, "ready\n".to_owned())
        } else {
            respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready: {}\n", missing.join(", ")))
        }
    }

    /// The listeners of explicit inbounds and upstreams; those of redirection are covered by the workers' beat, and
    /// a connection to them that was not redirected would be reported as a loop.
    fn listeners(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let config = &self.ctx.config;
        let inbounds = config.inbounds.iter().map(|inbound| inbound.listen);
        inbounds.chain(config.upstreams.iter().map(|upstream| upstream.listen)).take(1)
    }

    fn config(&self) -> Value {
        let credentials = &self.ctx.credentials;
        let bundle = credentials.bundle();
        let leaf = credentials.leaf().map(|leaf| {
            json!({
                "identity": leaf.id().as_str(),
                "not_before": seconds(leaf.not_before()),
                "not_after": seconds(leaf.not_after()),
            })
        });
        let inbound = self.ctx.inbound.load();
        let ranges = self.ctx.directory.ranges();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "configuration": self.ctx.config,
            "certificate": leaf,
            "trust": { "epoch": bundle.epoch(), "roots": bundle.roots().len(), "trust_domain": bundle.trust_domain().as_str() },
            "phase": format!("{:?}", self.ctx.drain.phase()),
            "not_ready": self.ctx.ready.missing(),
            "inbound_policy": {
                "mode": inbound.mode, "terminating": inbound.terminating,
                "ports": inbound.ports.iter().map(|(port, protocol)| (port.to_string(), format!("{protocol:?}"))).collect::<std::collections::BTreeMap<_, _>>(),
            },
            "ranges": { "mesh": ranges.mesh, "outbound": format!("{:?}", ranges.outbound) },
            "discovery": self.discovery.book().report(),
        })
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}

fn not_allowed(allow: &'static str) -> Response<Full<Bytes>> {
    let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, format!("use {allow}\n"));
    response.headers_mut().insert(ALLOW, http::HeaderValue::from_static(allow));
    response
}
