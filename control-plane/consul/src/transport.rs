//! One HTTP/1.1 exchange with one agent.
//!
//! On hyper's connection API: a blocking query occupies its connection for a minute, so a general pool has little to
//! share. What there is: a few idle connections per agent, so that a watch does not shake hands anew for each poll,
//! and a ceiling on all connections, because an agent admits 200 per client address
//! (`limits.http_max_conns_per_client`) and cuts off what goes beyond.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use crate::{AgentAddress, Call, ClientConfig, Error, Resolve, Tls, Token, encode::Query};

/// Largest answer that is read. Ten thousand instances with checks are about 20 MB.
pub(crate) const BODY_LIMIT: usize = 64 * 1024 * 1024;
/// Below the 200 that an agent admits; the rest is for others on the same address.
const MAX_CONNECTIONS: usize = 180;
/// Idle connections kept per agent.
const MAX_IDLE: usize = 16;
/// Shorter than the idle time-out of common load balancers (60 s), so that we close first.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// TCP and TLS handshakes with one agent; short, because the next agent may answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How much of an error's body is kept: Consul's messages are one line.
const MESSAGE_LIMIT: usize = 300;

/// What carries HTTP.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Dialled = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send>>;
/// Opens a connection; tests put one in that needs no network, so that they can stop the clock.
pub(crate) type Dial = Arc<dyn Fn(AgentAddress) -> Dialled + Send + Sync>;

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// Percent-encoded.
    pub(crate) path: String,
    pub(crate) query: Query,
    pub(crate) body: Bytes,
    /// For the whole exchange, the last byte of the body included.
    pub(crate) deadline: Duration,
}

impl Request {
    fn call(&self, agent: &AgentAddress) -> Call {
        Call { method: self.method.clone(), path: self.path.clone(), agent: agent.authority() }
    }
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) call: Call,
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// `Err` unless the status is 200.
    pub(crate) fn ok(self) -> Result<Self, Error> {
        if self.status == 200 {
            return Ok(self);
        }
        Err(Error::Status { call: self.call, status: self.status, message: shown(&self.body) })
    }

    pub(crate) fn json<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, Error> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Error::Answer { call: self.call.clone(), message: error.to_string() })
    }
}

/// What an agent says of a failure. Consul names accessors, never tokens; a proxy in between may say anything, so it is kept
/// short and printable.
pub(crate) fn shown(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(&said[..said.len().min(4 * MESSAGE_LIMIT)]);
    let text = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_LIMIT);
    text.collect::<String>().trim().to_owned()
}

struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Ends the connection with this value, also in the middle of an exchange.
    _driver: AbortOnDropHandle<()>,
    _permit: OwnedSemaphorePermit,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// The way to all agents of one client.
pub(crate) struct Transport {
    agents: Vec<(AgentAddress, Mutex<VecDeque<Idle>>)>,
    token: Token,
    dial: Dial,
    connections: Arc<Semaphore>,
}

impl Transport {
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, Error> {
        let tls = config.tls.as_ref().map(connector).transpose()?;
        let dial = network_dial(config.resolve.clone(), tls);
        Ok(Self::with_dial(config, dial))
    }

    pub(crate) fn with_dial(config: &ClientConfig, dial: Dial) -> Self {
        Self {
            agents: config.agents.iter().map(|agent| (agent.clone(), Mutex::default())).collect(),
            token: config.token.clone(),
            dial,
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }
    }

    pub(crate) fn agents(&self) -> usize {
        self.agents.len()
    }

    /// Sends `request` to agent number `agent`. Any status is an answer.
    pub(crate) async fn exchange(&self, agent: usize, request: &Request) -> Result<Answer, Error> {
        let deadline = request.deadline;
        match tokio::time::timeout(deadline, self.try_exchange(agent, request)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout { call: request.call(&self.agents[agent].0), after: deadline }),
        }
    }

    async fn try_exchange(&self, agent: usize, request: &Request) -> Result<Answer, Error> {
        let (address, _) = &self.agents[agent];
        let head = self.head(address, request).await?;
        // Only a read may go twice: a kept connection can turn out closed after the request was written.
        if request.method == Method::GET
            && let Some(mut connection) = self.take_idle(agent)
            && let Ok(answer) = run(&mut connection, head.clone(), request.call(address)).await
        {
            self.keep(agent, connection);
            return Ok(answer);
        }
        let mut connection = self.connect(address, request).await?;
        let answer = run(&mut connection, head, request.call(address)).await?;
        self.keep(agent, connection);
        Ok(answer)
    }

    async fn head(
        &self,
        agent: &AgentAddress,
        request: &Request,
    ) -> Result<http::Request<Full<Bytes>>, Error> {
        let refuse = |error: http::Error| Error::Config(format!("request for {}: {error}", request.path));
        let mut head = http::Request::builder()
            .method(request.method.clone())
            .uri(request.query.target(&request.path))
            .header(header::HOST, agent.authority())
            .header(header::USER_AGENT, concat!("outrigger/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(request.body.clone()))
            .map_err(refuse)?;
        if let Some(token) = self.token().await? {
            head.headers_mut().insert("x-consul-token", token);
        }
        Ok(head)
    }

    async fn token(&self) -> Result<Option<HeaderValue>, Error> {
        let text = match &self.token {
            Token::None => return Ok(None),
            Token::Value(secret) => secret.expose().to_owned(),
            Token::File(path) => tokio::fs::read_to_string(path)
                .await
                .map_err(|source| Error::Token { path: path.clone(), source })?,
        };
        let mut value = HeaderValue::from_str(text.trim())
            .map_err(|_| Error::Config("the token holds characters that no header may hold".into()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn take_idle(&self, agent: usize) -> Option<Connection> {
        let mut idle = self.agents[agent].1.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|entry| entry.since.elapsed() < IDLE_LIMIT && !entry.connection.sender.is_closed());
        idle.pop_back().map(|entry| entry.connection)
    }

    fn keep(&self, agent: usize, connection: Connection) {
        let mut idle = self.agents[agent].1.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE && !connection.sender.is_closed() {
            idle.push_back(Idle { connection, since: Instant::now() });
        }
    }

    async fn connect(&self, agent: &AgentAddress, request: &Request) -> Result<Connection, Error> {
        let permit = Arc::clone(&self.connections)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed: this file does not call close()");
        let failed = |source| Error::Connect { call: request.call(agent), source };
        let io = tokio::time::timeout(CONNECT_LIMIT, (self.dial)(agent.clone()))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "handshake took more than 3 s")))
            .map_err(failed)?;
        let (sender, driver) =
            http1::handshake(TokioIo::new(io)).await.map_err(|error| failed(io::Error::other(error)))?;
        // The driver's own error reaches the exchange that it breaks.
        let driver = tokio::spawn(async move { drop(driver.await) });
        Ok(Connection { sender, _driver: AbortOnDropHandle::new(driver), _permit: permit })
    }
}

async fn run(
    connection: &mut Connection,
    head: http::Request<Full<Bytes>>,
    call: Call,
) -> Result<Answer, Error> {
    let broken = |error: hyper::Error| Error::Broken { call: call.clone(), message: describe(&error) };
    connection.sender.ready().await.map_err(broken)?;
    let response = connection.sender.send_request(head).await.map_err(broken)?;
    let (parts, mut incoming) = response.into_parts();
    let mut body = BytesMut::new();
    while let Some(frame) = incoming.frame().await {
        if let Ok(data) = frame.map_err(broken)?.into_data() {
            if body.len() + data.len() > BODY_LIMIT {
                return Err(Error::TooLarge { call, limit: BODY_LIMIT });
            }
            body.extend_from_slice(&data);
        }
    }
    Ok(Answer { call, status: parts.status.as_u16(), headers: parts.headers, body: body.freeze() })
}

/// hyper's error with its cause, which says more.
fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn network_dial(resolve: Option<Resolve>, tls: Option<(TlsConnector, Option<ServerName<'static>>)>) -> Dial {
    Arc::new(move |agent: AgentAddress| {
        let resolve = resolve.clone();
        let tls = tls.clone();
        Box::pin(async move {
            let tcp = dial_tcp(&agent, resolve).await?;
            if !agent.https {
                return Ok(Box::new(tcp) as Box<dyn Io>);
            }
            let (connector, name) =
                tls.ok_or_else(|| io::Error::other("https without tls settings (checked at start)"))?;
            let name = match name {
                Some(name) => name,
                None => ServerName::try_from(agent.host.clone()).map_err(io::Error::other)?,
            };
            Ok(Box::new(connector.connect(name, tcp).await?) as Box<dyn Io>)
        })
    })
}

async fn dial_tcp(agent: &AgentAddress, resolve: Option<Resolve>) -> io::Result<TcpStream> {
    let addresses = match (agent.ip(), resolve) {
        (Some(ip), _) => vec![ip],
        (None, _) if agent.host == "localhost" => {
            vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
        }
        (None, Some(resolve)) => resolve(agent.host.clone()).await?,
        (None, None) => return Err(io::Error::other("a name without a resolver (checked at start)")),
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for ip in addresses {
        match TcpStream::connect(SocketAddr::new(ip, agent.port)).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connector(tls: &Tls) -> Result<(TlsConnector, Option<ServerName<'static>>), Error> {
    fn refuse(what: &str, error: impl std::fmt::Display) -> Error {
        Error::Config(format!("tls {what}: {error}"))
    }
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&tls.ca_pem) {
        let certificate = certificate.map_err(|error| refuse("ca_pem", error))?;
        roots.add(certificate).map_err(|error| refuse("ca_pem", error))?;
    }
    if roots.is_empty() {
        return Err(refuse("ca_pem", "it holds no certificate"));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| refuse("versions", error))?
        .with_root_certificates(roots);
    let config = match (&tls.client_cert_pem, &tls.client_key_pem) {
        (None, None) => builder.with_no_client_auth(),
        (Some(chain), Some(key)) => {
            let chain = CertificateDer::pem_slice_iter(chain)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| refuse("client_cert_pem", error))?;
            let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
                .map_err(|_| refuse("client_key_pem", "it holds no private key"))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| refuse("client_cert_pem", error))?
        }
        _ => return Err(refuse("client certificate", "certificate and key go together")),
    };
    let name = match &tls.server_name {
        Some(name) => Some(ServerName::try_from(name.clone()).map_err(|error| refuse("server_name", error))?),
        None => None,
    };
    Ok((TlsConnector::from(Arc::new(config)), name))
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
