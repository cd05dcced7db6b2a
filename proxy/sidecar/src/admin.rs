//! The admin port: `/metrics`, `/live` and `/ready` for everybody who can reach the workload; `/config` and `/drain` for
//! its own host only.
//!
//! "Its own host" means that both ends of the connection are loopback addresses: a redirected or routed connection may
//! have one, never both. A browser on the host is made to connect like that by any page that it shows; what it sends
//! then names the page's own domain as Host (DNS rebinding) or says that it comes from another site, and is refused.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderValue, uri::Authority};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HOST, ORIGIN},
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

/// Whether the one Host is `localhost` or a loopback address, with or without a port.
fn names_this_host(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let Ok(authority) = Authority::try_from(host.as_bytes()) else { return false };
    if authority.as_str().contains('@') {
        return false;
    }
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || address.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
}

/// Whether a browser sent this for a page of another origin (Fetch, "Origin"; Fetch Metadata, "Sec-Fetch-Site").
fn is_cross_site(headers: &HeaderMap) -> bool {
    let host = headers.get(HOST).map(HeaderValue::as_bytes).unwrap_or_default();
    let own = |origin: &HeaderValue| origin.as_bytes().strip_prefix(b"http://") == Some(host);
    let mut sites = headers.get_all("sec-fetch-site").iter();
    !headers.get_all(ORIGIN).iter().all(own) || sites.any(|site| site.as_bytes() != b"same-origin")
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
            "/config" | "/drain" if !names_this_host(request.headers()) => {
                respond(StatusCode::FORBIDDEN, TEXT, "Host is not this host: use localhost\n".to_owned())
            }
            "/drain" if is_cross_site(request.headers()) => {
                respond(StatusCode::FORBIDDEN, TEXT, "not for other sites\n".to_owned())
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
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn not_allowed(allow: &'static str) -> Response<Full<Bytes>> {
    let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, format!("use {allow}\n"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn only_names_of_this_host_are_its_own() {
        for host in ["localhost", "LOCALHOST:15490", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:15490"] {
            assert!(names_this_host(&headers(&[("host", host)])), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "sidecar",
            "127.0.0.1.evil.example",
            "10.0.0.1:15490",
            "[::2]",
            "a@b",
        ] {
            assert!(!names_this_host(&headers(&[("host", host)])), "{host}");
        }
        assert!(!names_this_host(&HeaderMap::new()));
        let mut two = headers(&[("host", "localhost")]);
        two.append(HOST, HeaderValue::from_static("localhost"));
        assert!(!names_this_host(&two));
    }

    #[test]
    fn other_sites_are_recognized() {
        let host = ("host", "localhost:15490");
        for own in [
            &[host][..],
            &[host, ("sec-fetch-site", "same-origin")],
            &[host, ("origin", "http://localhost:15490"), ("sec-fetch-site", "same-origin")],
        ] {
            assert!(!is_cross_site(&headers(own)), "{own:?}");
        }
        for other in [
            [host, ("origin", "null")],
            [host, ("origin", "http://localhost:80")],
            [host, ("origin", "https://evil.example")],
            [host, ("sec-fetch-site", "cross-site")],
            [host, ("sec-fetch-site", "same-site")],
        ] {
            assert!(is_cross_site(&headers(&other)), "{other:?}");
        }
    }
}
