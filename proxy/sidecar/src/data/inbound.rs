//! Connections to the workload: accept -> handshake -> authorize -> forward.
//!
//! A peer's sidecar is known by the ALPN of its `ClientHello`, before anything is answered. Everything else is not ours:
//! `Strict` refuses it, `Permissive` passes it on as it came and counts it by source and port. Nothing is sent to the
//! application before the handshake has ended, but for servers that speak first in `Permissive`: these are connected to
//! when the client has been silent for a while.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::BytesMut;
use http::{Request, Response};
use hyper::body::Incoming;
use outrigger_certs::SpiffeId;
use outrigger_core::{
    detect::Detection,
    key::Alpn,
    model::Protocol,
    reason::Reason,
    speaks_first::{self, EARLY_CONNECT_AFTER, Plan, plan},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{
    Worker, apps,
    body::{Body, BodyError},
    detect::{First, first_bytes, read_more},
    http::{Active, Handler, Validity, Version, refuse, serve},
    message::{self, Message},
    now,
    outbound::http_version,
    pool::{self, Lease, PoolKey, SendError},
    reasons::{Refusal, causes, is_grpc},
    record::record,
    relay::{Ended, relay},
    request::passed_on,
    stream::{Rewind, Stream},
    tls::{self, Hello, Secured, Sniffer},
    upgrade,
};
use crate::{
    config::Mtls,
    drain::Side,
    metrics::{Direction, Edge},
};

/// Where one connection leads, and who is at its other end.
pub(crate) struct Entry {
    worker: Rc<Worker>,
    /// The application's own address.
    destination: SocketAddr,
    /// The port that peers dial.
    port: u16,
    /// Proved by mutual TLS.
    peer: Option<SpiffeId>,
    edge: Rc<Edge>,
}

/// A redirected connection.
pub(crate) async fn transparent(worker: Rc<Worker>, stream: TcpStream) {
    let original = outrigger_intercept::original_destination(&stream).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read a connection's original destination");
        None
    });
    let Some(address) = original.filter(|address| !worker.listeners.contains(*address)) else {
        worker.ctx.metrics.refused(Direction::Inbound, Reason::Loop.code());
        return Stream::plain(stream).reset_on_close();
    };
    arrive(worker, stream, address, address.port()).await;
}

/// A connection to an explicit inbound.
pub(crate) async fn explicit(worker: Rc<Worker>, stream: TcpStream, at: usize) {
    let inbound = worker.listeners.inbounds[at].0.clone();
    arrive(worker, stream, inbound.forward, inbound.listen.port()).await;
}

async fn arrive(worker: Rc<Worker>, mut stream: TcpStream, destination: SocketAddr, port: u16) {
    let Ok(source) = stream.peer_addr() else { return };
    let (mode, hint) = {
        let policy = worker.ctx.inbound.load();
        let hint = match policy.protocol(port) {
            Protocol::Detect => policy.protocol(destination.port()),
            hint => hint,
        };
        (policy.mode, hint)
    };
    let mut buffer = BytesMut::new();
    let mut early = None;
    let patience = match mode {
        Mtls::Strict => Some(worker.ctx.config.timeouts.handshake.get()),
        Mtls::Permissive => early_connect_after(&worker, hint, port),
    };
    let mut first = first_bytes(&mut stream, &mut buffer, patience).await.unwrap_or(First::End);
    if first == First::Silence && mode == Mtls::Permissive {
        let Ok(mut application) = tls::dial(&worker.ctx, destination, false).await else {
            return Stream::plain(stream).reset_on_close();
        };
        let mut greeting = BytesMut::new();
        tokio::select! {
            client = first_bytes(&mut stream, &mut buffer, None) => first = client.unwrap_or(First::End),
            _ = read_more(&mut application, &mut greeting) => {
                worker.ctx.metrics.detected(Direction::Inbound, "server_first");
                worker.inbound_memory.borrow_mut().record(port, speaks_first::First::Server, now());
                worker.ctx.metrics.unmeshed(source.ip(), port, "passed");
                let entry = Rc::new(Entry::new(worker, destination, port, None));
                let stream = Stream::Plain(Rewind::new(stream, buffer));
                return entry.join(stream, Stream::plain(application), &greeting).await;
            }
        }
        early = Some(application);
    }
    worker.ctx.metrics.detected(Direction::Inbound, first.as_str());
    if matches!(first, First::Bytes(_)) {
        worker.inbound_memory.borrow_mut().record(port, speaks_first::First::Client, now());
    }
    if first == First::Bytes(Detection::Tls) && is_sidecar(&worker, &mut stream, &mut buffer).await {
        return meshed(worker, Rewind::new(stream, buffer), destination, port, early).await;
    }
    let stream = Stream::Plain(Rewind::new(stream, buffer));
    let version = http_version(first);
    if mode == Mtls::Strict {
        worker.ctx.metrics.unmeshed(source.ip(), port, "refused");
        let text = format!("port {port} takes mutual TLS only; {} sent none", source.ip().to_canonical());
        let refusal = Refusal::new(Reason::PlaintextRefused, text);
        return refuse(&worker, stream, version, refusal, Direction::Inbound).await;
    }
    worker.ctx.metrics.unmeshed(source.ip(), port, "passed");
    let entry = Rc::new(Entry::new(worker.clone(), destination, port, None));
    match version {
        Some(version) if hint != Protocol::Tcp => {
            drop(early);
            serve(&worker, stream, version, Handler::Inbound(entry), None).await;
        }
        _ => entry.bytes(stream, early).await,
    }
}

/// How long a client may be silent before its port's server is connected to in `Permissive`; `None`: for ever.
///
/// Never at once, not even where the server is known to speak first: a sidecar's `ClientHello` must win against the
/// application's greeting, or the peer would read the greeting in its place.
fn early_connect_after(worker: &Worker, hint: Protocol, port: u16) -> Option<Duration> {
    let memory = worker.inbound_memory.borrow().recall(&port, now());
    match plan(hint, memory, port) {
        Plan::Opaque | Plan::Detect { early_connect_after: Duration::ZERO } => Some(EARLY_CONNECT_AFTER),
        Plan::Http1 | Plan::Http2 => worker.ctx.config.timeouts.idle.enabled(),
        Plan::Detect { .. } => Some(worker.ctx.config.timeouts.detect.get()),
    }
}

/// Whether a `ClientHello` that has begun is a sidecar's.
async fn is_sidecar(worker: &Worker, stream: &mut TcpStream, buffer: &mut BytesMut) -> bool {
    let mut sniffer = Sniffer::new();
    let look = async {
        loop {
            match sniffer.look(buffer) {
                Hello::Ours => return true,
                Hello::Foreign => return false,
                Hello::NeedMore => {}
            }
            if !matches!(read_more(stream, buffer).await, Ok(1..)) {
                return false;
            }
        }
    };
    timeout(worker.ctx.config.timeouts.handshake.get(), look).await.unwrap_or(false)
}

/// A connection from a peer's sidecar.
async fn meshed(
    worker: Rc<Worker>,
    stream: Rewind,
    destination: SocketAddr,
    port: u16,
    early: Option<TcpStream>,
) {
    let secured = match tls::accept(&worker.ctx, stream).await {
        Ok(secured) => secured,
        Err(outcome) => return worker.ctx.metrics.handshake_failed(Direction::Inbound, outcome),
    };
    let Secured { stream, alpn, peer, facts, move_at, epoch } = secured;
    let entry = Rc::new(Entry::new(worker.clone(), destination, port, Some(peer)));
    let _info = worker.ctx.metrics.mesh_connection(Direction::Inbound, &service_label(port), &facts);
    match alpn {
        Alpn::H2 => {
            let _open = worker.ctx.metrics.connection(Direction::Inbound, "mesh_h2");
            drop(early);
            let validity = Some(Validity { move_at, epoch });
            serve(&worker, stream, Version::Http2, Handler::Inbound(entry), validity).await;
        }
        Alpn::Tcp => {
            let _open = worker.ctx.metrics.connection(Direction::Inbound, "mesh_tcp");
            match entry.authorize(None) {
                Ok(()) => entry.bytes(stream, early).await,
                Err(refusal) => refuse(&worker, stream, None, refusal, Direction::Inbound).await,
            }
        }
    }
}

fn service_label(port: u16) -> String {
    format!("port:{port}")
}

impl Entry {
    fn new(worker: Rc<Worker>, destination: SocketAddr, port: u16, peer: Option<SpiffeId>) -> Self {
        let caller: Option<Arc<str>> = peer.as_ref().map(|peer| peer.as_str().into());
        let edge = worker.edge(Direction::Inbound, &service_label(port).into(), caller.as_ref());
        Self { worker, destination, port, peer, edge }
    }

    /// The one place where inbound traffic is allowed or not: a request, or (`None`) a connection for bytes. Without
    /// policies everything is allowed; a mode that takes mutual TLS only has been applied before.
    #[expect(clippy::unnecessary_wraps, reason = "policies will refuse")]
    fn authorize(&self, request: Option<&Message>) -> Result<(), Refusal> {
        tracing::trace!(
            peer = ?self.peer,
            port = self.port,
            method = request.map(|request| request.method.as_str()),
            path = request.map(Message::path),
            "allowed"
        );
        Ok(())
    }

    /// Bytes to the application.
    async fn bytes(&self, stream: Stream, early: Option<TcpStream>) {
        let application = match early {
            Some(application) => Ok(application),
            None => tls::dial(&self.worker.ctx, self.destination, false).await,
        };
        match application {
            Ok(application) => self.join(stream, Stream::plain(application), &[]).await,
            Err(error) => {
                self.worker.ctx.metrics.refused(Direction::Inbound, error.reason.code());
                tracing::debug!(error = &*error.text, "the application takes no connection");
                stream.reset_on_close();
            }
        }
    }

    async fn join(&self, mut stream: Stream, mut application: Stream, greeting: &[u8]) {
        let _work = self.worker.ctx.drain.work(Side::Inbound);
        if stream.write_all(greeting).await.is_err() {
            return application.reset_on_close();
        }
        let idle = self.worker.ctx.config.timeouts.idle.enabled();
        let (ended, relayed) = relay(&mut stream, &mut application, idle).await;
        self.edge.received.inc_by(relayed.forth);
        self.edge.sent.inc_by(relayed.back + greeting.len() as u64);
        if ended == Ended::Broken {
            stream.reset_on_close();
            application.reset_on_close();
        }
    }

    async fn exchange(
        &self,
        mut message: Message,
        held: impl Sized + 'static,
    ) -> Result<Response<Body>, Refusal> {
        self.authorize(Some(&message))?;
        message.identify(self.peer.as_ref());
        let idle = self.worker.ctx.config.timeouts.idle.enabled();
        message.body.set_idle(idle);
        message.body.remember();
        let (mut response, lease) = self.send(&message).await?;
        message.body.forget();
        let version = response.version();
        let switched = message.has_switched(&response);
        let upstream = switched.then(|| hyper::upgrade::on(&mut response));
        let (mut head, incoming) = response.into_parts();
        message::clean_response(&mut head)?;
        let held = (lease, held);
        let to_sidecar = self.peer.is_some();
        if let Some(upstream) = upstream
            && let Some(downstream) = message.on_upgrade.take()
        {
            message.switched(&mut head, to_sidecar);
            let edge = self.edge.clone();
            upgrade::tunnel(&self.worker, Direction::Inbound, downstream, upstream, edge, held);
            return Ok(Response::from_parts(head, Body::empty()));
        }
        if to_sidecar && message.switches() {
            message.not_switched(&mut head);
        }
        Ok(Response::from_parts(head, passed_on(incoming, version, idle, held)))
    }

    /// Sends a request to the application as it was when it left its client.
    async fn send(&self, message: &Message) -> Result<(Response<Incoming>, Option<Lease>), Refusal> {
        let broken = |error: &hyper::Error| {
            if message.body.has_failed() {
                return message::broken_body();
            }
            let text = format!("the application gave no response: {}", causes(error));
            Refusal::new(Reason::UpstreamReset, text)
        };
        if message.is_h1() {
            let sent = apps::send(&self.worker, self.destination, Direction::Inbound, message.to_h1()).await;
            return match sent {
                Ok(response) => Ok((response, None)),
                Err(apps::SendError::Connect(error)) => Err(error.refusal()),
                Err(apps::SendError::Sent(error)) => Err(broken(&error)),
            };
        }
        let key = PoolKey::Plain(self.destination);
        let mut again = true;
        loop {
            let lease = pool::acquire(&self.worker, &key, "").await.map_err(|error| error.refusal())?;
            if message.needs_extended_connect() && !lease.serves_extended_connect().await {
                return Err(Refusal::new(
                    Reason::UpstreamReset,
                    "the application does not serve extended CONNECT",
                ));
            }
            match lease.send(message.to_h2()).await {
                Ok(response) => return Ok((response, Some(lease))),
                Err(SendError::Unprocessed) if again && message.body.is_repeatable() => again = false,
                Err(SendError::Unprocessed) => {
                    return Err(Refusal::new(Reason::UpstreamReset, "the application refused the request"));
                }
                Err(SendError::Broken(error)) => {
                    return Err(broken(&error).resetting(pool::reset_by_peer(&error)));
                }
            }
        }
    }
}

/// Answers one request.
pub(crate) async fn request(
    entry: Rc<Entry>,
    request: Request<Incoming>,
    active: Active,
) -> Result<Response<Body>, BodyError> {
    let begun = tokio::time::Instant::now();
    let work = entry.worker.ctx.drain.work(Side::Inbound);
    let grpc = is_grpc(request.headers());
    let message = match entry.peer {
        Some(_) => Message::from_sidecar(request),
        None => Message::from_application(request),
    };
    let mut protocol = "http1";
    let result = match message {
        Ok(message) => {
            if !message.is_h1() {
                protocol = "http2";
            }
            entry.exchange(message, (active, work)).await
        }
        Err(refusal) => Err(refusal),
    };
    let reset = result.as_ref().err().and_then(|refusal| refusal.reset);
    let response = result.unwrap_or_else(|refusal| {
        tracing::debug!(port = entry.port, reason = %refusal.reason, text = %refusal.text, "refused");
        refusal.response(grpc)
    });
    let response = record(&entry.edge, protocol, begun, response);
    reset.map_or(Ok(response), |reset| Err(h2::Error::from(reset).into()))
}
