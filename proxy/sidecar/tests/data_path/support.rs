//! Two sidecars in one process, on loopback, with a directory filled by hand: no controller.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_api::v1;
use outrigger_certs::{CertificateAuthority, Leaf, SpiffeId, TrustBundle, TrustDomain};
use outrigger_core::{
    external::ExternalHosts,
    model::{Endpoint, Health, Port, Protocol, Service},
    resolve::Ranges,
};
use outrigger_proxy::{
    config::{Config, ConfigDuration, Inbound, Upstream},
    context::{Context, InboundPolicy},
    data,
    discovery::directory::{Directory, Key, ServiceHandle, Target},
    drain::Phase,
    workers::Listeners,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const SERVICE: &str = "app.default";

pub(crate) type Body = BoxBody<Bytes, Infallible>;

pub(crate) type Answer = Response<Body>;

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} took longer than {PATIENCE:?}"))
}

/// Looks again and again until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn domain() -> TrustDomain {
    "outrigger.local".parse().unwrap()
}

pub(crate) fn id(account: &str) -> SpiffeId {
    SpiffeId::new(&domain(), "default", account).unwrap()
}

/// A certificate authority for the workloads of a test.
pub(crate) struct Ca(CertificateAuthority);

impl Ca {
    pub(crate) fn new() -> Self {
        let text = CertificateAuthority::generate_pem(&domain()).unwrap();
        Self(CertificateAuthority::from_store(&text, &domain()).unwrap())
    }

    pub(crate) fn bundle(&self) -> &TrustBundle {
        self.0.bundle()
    }

    pub(crate) fn leaf(&self, account: &str) -> Leaf {
        self.0.issue_own(&id(account), Duration::from_hours(1)).unwrap()
    }

    pub(crate) fn context(&self, account: &str, config: Config) -> Context {
        let (context, _) = Context::new(config, self.0.bundle().clone());
        context.credentials.set_leaf(self.leaf(account)).unwrap();
        told(&context, v1::Inbound::default());
        context
    }
}

/// What the controller says of who may call.
pub(crate) fn told(context: &Context, inbound: v1::Inbound) {
    let old = context.inbound.load();
    if let Some(policy) = InboundPolicy::from_wire(inbound, &context.config, &old).unwrap() {
        context.inbound.store(policy);
    }
}

pub(crate) fn config() -> Config {
    Config::default()
}

pub(crate) fn listener() -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// An address where nobody listens.
pub(crate) fn nobody() -> SocketAddr {
    listener().local_addr().unwrap()
}

/// A listener that leads to `SERVICE`.
fn upstream() -> (Upstream, std::net::TcpListener, SocketAddr) {
    let socket = listener();
    let address = socket.local_addr().unwrap();
    (Upstream { service: format!("{SERVICE}:80"), listen: address }, socket, address)
}

/// Listeners on their way to a worker.
#[derive(Default)]
struct Sockets {
    outbound: Vec<std::net::TcpListener>,
    inbound: Vec<std::net::TcpListener>,
    upstreams: Vec<(Upstream, std::net::TcpListener)>,
    inbounds: Vec<(Inbound, std::net::TcpListener)>,
}

/// A sidecar's worker on a thread of its own.
pub(crate) struct Sidecar {
    pub(crate) context: Arc<Context>,
    threads: Vec<JoinHandle<()>>,
}

impl Sidecar {
    fn start(context: Context, sockets: Sockets) -> Self {
        // RUST_LOG=outrigger_proxy=debug shows what the sidecars think.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let mut sidecar = Self { context: Arc::new(context), threads: Vec::new() };
        sidecar.work(sockets);
        sidecar
    }

    /// Has one thread more serve these listeners.
    fn work(&mut self, sockets: Sockets) {
        let shared = self.context.clone();
        self.threads.push(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build_local(tokio::runtime::LocalOptions::default())
                .unwrap();
            runtime.block_on(async {
                let mut listeners = Listeners::default();
                let tokio = |listener| TcpListener::from_std(listener).unwrap();
                listeners.outbound = sockets.outbound.into_iter().map(tokio).collect();
                listeners.inbound = sockets.inbound.into_iter().map(tokio).collect();
                for (upstream, listener) in sockets.upstreams {
                    listeners.upstreams.push((upstream, TcpListener::from_std(listener).unwrap()));
                }
                for (inbound, listener) in sockets.inbounds {
                    listeners.inbounds.push((inbound, TcpListener::from_std(listener).unwrap()));
                }
                data::run(shared, listeners).await;
            });
        }));
    }

    /// Another thread of a client's sidecar, and the address where it listens.
    pub(crate) fn another_thread(&mut self) -> SocketAddr {
        let (upstream, socket, address) = upstream();
        self.work(Sockets { upstreams: vec![(upstream, socket)], ..Sockets::default() });
        address
    }

    /// A sidecar beside `application`, and the address under which peers reach it.
    pub(crate) fn server(context: Context, application: SocketAddr) -> (Self, SocketAddr) {
        let socket = listener();
        let address = socket.local_addr().unwrap();
        let inbound = Inbound { listen: address, forward: application };
        (Self::start(context, Sockets { inbounds: vec![(inbound, socket)], ..Sockets::default() }), address)
    }

    /// A sidecar beside a client, and the address that leads to `SERVICE`.
    pub(crate) fn client(context: Context, service: Service) -> (Self, SocketAddr, ServiceHandle) {
        Self::client_of(context, service, Vec::new())
    }

    /// The same with other services beside it, to which routes may lead.
    pub(crate) fn client_of(
        mut context: Context,
        service: Service,
        others: Vec<Service>,
    ) -> (Self, SocketAddr, ServiceHandle) {
        let handle = ServiceHandle::new(Arc::new(service));
        let target = |service| Target { service, port: 80, endpoint: None };
        let mut known = vec![(Key::Service(SERVICE.into()), target(handle.clone()))];
        for other in others {
            let name = other.name.clone();
            known.push((Key::Service(name), target(ServiceHandle::new(Arc::new(other)))));
        }
        context.directory = Directory::fixed(known, Ranges::default());
        let (upstream, socket, address) = upstream();
        (
            Self::start(context, Sockets { upstreams: vec![(upstream, socket)], ..Sockets::default() }),
            address,
            handle,
        )
    }

    /// A sidecar beside a client, and the address that leads to one endpoint of `SERVICE`, of which `host` is an external host.
    pub(crate) fn dialling(
        mut context: Context,
        service: Service,
        endpoint: &str,
        host: &str,
    ) -> (Self, SocketAddr) {
        let service = ServiceHandle::new(Arc::new(service));
        let target = Target { service, port: 80, endpoint: Some(endpoint.into()) };
        context.directory = Directory::fixed([(Key::Service(SERVICE.into()), target)], Ranges::default());
        let host = v1::ExternalHost { host: host.to_owned(), service: SERVICE.to_owned() };
        context.directory.set_external_hosts(ExternalHosts::from_wire(vec![host]).unwrap());
        Self::unknown(context)
    }

    /// A sidecar with listeners for redirected connections, and their addresses: outbound, inbound.
    pub(crate) fn transparent(context: Context) -> (Self, SocketAddr, SocketAddr) {
        let (outbound, inbound) = (listener(), listener());
        let addresses = (outbound.local_addr().unwrap(), inbound.local_addr().unwrap());
        let sockets = Sockets { outbound: vec![outbound], inbound: vec![inbound], ..Sockets::default() };
        (Self::start(context, sockets), addresses.0, addresses.1)
    }

    /// A sidecar whose upstream is a service that its directory does not know.
    pub(crate) fn unknown(context: Context) -> (Self, SocketAddr) {
        let (upstream, socket, address) = upstream();
        (Self::start(context, Sockets { upstreams: vec![(upstream, socket)], ..Sockets::default() }), address)
    }

    pub(crate) fn metrics(&self) -> String {
        self.context.metrics.encode()
    }

    /// Waits until the worker has returned by itself.
    pub(crate) async fn ended(mut self) {
        for thread in std::mem::take(&mut self.threads) {
            soon("the worker's end", tokio::task::spawn_blocking(|| thread.join())).await.unwrap().unwrap();
        }
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.context.drain.advance(Phase::Now);
        for thread in std::mem::take(&mut self.threads) {
            assert!(thread.join().is_ok() || std::thread::panicking(), "a worker panicked");
        }
    }
}

pub(crate) fn endpoint(name: &str, address: SocketAddr, identity: Option<&SpiffeId>) -> Arc<Endpoint> {
    Arc::new(Endpoint {
        id: name.into(),
        address: address.ip(),
        ports: BTreeMap::from([(80, address.port())]),
        weight: 1,
        health: Health::Healthy,
        identity: identity.map(|identity| identity.as_str().into()),
        zone: "".into(),
    })
}

pub(crate) fn service(protocol: Protocol, endpoints: Vec<Arc<Endpoint>>) -> Service {
    let mut endpoints = endpoints;
    endpoints.sort_by(|a, b| a.id.cmp(&b.id));
    Service {
        name: SERVICE.into(),
        ports: BTreeMap::from([(80, Port { name: "http".into(), protocol })]),
        endpoints,
        source: "test".into(),
        ..policies(v1::Service::default())
    }
}

/// A service with the policies of `wire` and nothing else.
pub(crate) fn policies(wire: v1::Service) -> Service {
    let named = v1::Service { name: "app".into(), namespace: "default".into(), ..wire };
    Service::from_wire(named, "default").unwrap()
}

/// Client -> sidecar -> mesh -> sidecar -> application.
pub(crate) struct Pair {
    pub(crate) client: Sidecar,
    pub(crate) server: Sidecar,
    /// Where the client connects to.
    pub(crate) address: SocketAddr,
    /// Where the server's sidecar listens.
    pub(crate) inbound: SocketAddr,
}

pub(crate) fn pair(application: SocketAddr, protocol: Protocol) -> Pair {
    pair_with(application, protocol, |_| {}, |_| {})
}

pub(crate) fn pair_with(
    application: SocketAddr,
    protocol: Protocol,
    client: impl FnOnce(&mut Config),
    server: impl FnOnce(&mut Config),
) -> Pair {
    let ca = Ca::new();
    let (mut client_config, mut server_config) = (config(), config());
    client(&mut client_config);
    server(&mut server_config);
    let (server, inbound) = Sidecar::server(ca.context("server", server_config), application);
    let endpoints = vec![endpoint("one", inbound, Some(&id("server")))];
    let (client, address, _) =
        Sidecar::client(ca.context("client", client_config), service(protocol, endpoints));
    Pair { client, server, address, inbound }
}

pub(crate) fn millis(millis: u64) -> ConfigDuration {
    ConfigDuration::from_millis(millis)
}

pub(crate) fn full(text: impl Into<Bytes>) -> BoxBody<Bytes, Infallible> {
    Full::new(text.into()).boxed()
}

/// An HTTP/1.1 application.
pub(crate) async fn http1_app<F, Fut>(handler: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Answer> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let handler = handler.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let answer = handler(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .half_close(true)
                    .max_buf_size(256 * 1024)
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
                    .await;
            });
        }
    });
    address
}

/// An HTTP/2 application with prior knowledge.
pub(crate) async fn http2_app<F, Fut>(handler: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Answer> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let handler = handler.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let answer = handler(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .timer(TokioTimer::new())
                    .enable_connect_protocol()
                    .max_header_list_size(256 * 1024)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    address
}

/// An application that serves bytes, one task per connection.
pub(crate) async fn tcp_app<F, Fut>(handler: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(handler(stream));
        }
    });
    address
}

pub(crate) type Http1 = hyper::client::conn::http1::SendRequest<BoxBody<Bytes, Infallible>>;
pub(crate) type Http2 = hyper::client::conn::http2::SendRequest<BoxBody<Bytes, Infallible>>;

pub(crate) async fn http1(address: SocketAddr) -> Http1 {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(256 * 1024)
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection.with_upgrades());
    sender
}

pub(crate) async fn http2(address: SocketAddr) -> Http2 {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .max_header_list_size(256 * 1024)
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

/// TLS to a pair's server as its client's sidecar makes it.
pub(crate) async fn mesh_tls(pair: &Pair) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = pair.client.context.credentials.client_config(&id("server"), &[b"outrigger-h2"]).unwrap();
    let stream = TcpStream::connect(pair.inbound).await.unwrap();
    tokio_rustls::TlsConnector::from(config).connect(outrigger_certs::server_name(), stream).await.unwrap()
}

/// A peer with the client's certificate that writes what it likes to the server's sidecar.
pub(crate) async fn meshed(pair: &Pair) -> Http2 {
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(mesh_tls(pair).await))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

pub(crate) fn get(path: &str) -> Request<BoxBody<Bytes, Infallible>> {
    Request::get(path).header("host", "app.example").body(full("")).unwrap()
}

/// Head and whole body of a response.
pub(crate) async fn whole(response: Response<Incoming>) -> (http::response::Parts, Bytes, Option<HeaderMap>) {
    let (head, body) = response.into_parts();
    let collected = soon("the body", body.collect()).await.unwrap();
    let trailers = collected.trailers().cloned();
    (head, collected.to_bytes(), trailers)
}

/// One request in bytes, and everything that comes back until the end.
pub(crate) async fn raw(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is an end, too.
    let _ = soon("the answer", stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Whether a connection that says nothing is reset, which may show as early as in `connect`.
pub(crate) async fn is_reset(address: SocketAddr) -> bool {
    match TcpStream::connect(address).await {
        Err(_) => true,
        Ok(mut stream) => soon("the reset", stream.read(&mut [0; 8])).await.is_err(),
    }
}
