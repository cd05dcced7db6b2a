//! Connections to the workload: accept -> handshake -> authorize -> forward.
//!
//! A peer's sidecar is known by the ALPN of its `ClientHello`, before anything is answered. Everything else is not ours:
//! `Strict` refuses it, `Permissive` passes it on as it came and counts it by source and port. Nothing is sent to the
//! application before the handshake has ended, but for servers that speak first in `Permissive`: these are connected to
//! when the client has been silent for a while.

use std::{
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use outrigger_certs::SpiffeId;
use outrigger_core::{
    detect::Detection,
    key::Alpn,
    model::Protocol,
    reason::Reason,
    speaks_first::{self, EARLY_CONNECT_AFTER, Plan, plan},
};
use tokio::{net::TcpStream, time::timeout};

use super::{
    Next, Worker,
    detect::{First, first_bytes, read_more, silent_for_too_long},
    outbound::http_version,
    relay::Relay,
    serve::{Handler, Validity, Version, refuse, serve},
    tls::{self, Hello, Secured, Sniffer, Whom},
    wire::{Wire, reset_on_close},
};
use crate::{
    config::Mtls,
    metrics::{Direction, Edge},
};

/// Where one connection leads, and who is at its other end.
pub(crate) struct Entry {
    /// The application's own address.
    destination: SocketAddr,
    /// The port that peers dial.
    port: u16,
    /// Where the connection comes from.
    source: IpAddr,
    /// Proved by mutual TLS.
    peer: Option<SpiffeId>,
    edge: Rc<Edge>,
}

/// A redirected connection.
pub(crate) async fn transparent(worker: Rc<Worker>, stream: TcpStream) -> Next {
    let original = outrigger_intercept::original_destination(&stream).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read a connection's original destination");
        None
    });
    let Some(address) = original.filter(|address| !worker.listeners.contains(*address)) else {
        worker.ctx.metrics.refused(Direction::Inbound, Reason::Loop.code());
        return reset(&stream);
    };
    arrive(worker, stream, address, address.port()).await
}

/// A connection to an explicit inbound.
pub(crate) async fn explicit(worker: Rc<Worker>, stream: TcpStream, at: usize) -> Next {
    let inbound = worker.listeners.inbounds[at].0.clone();
    arrive(worker, stream, inbound.forward, inbound.listen.port()).await
}

fn reset(stream: &TcpStream) -> Next {
    reset_on_close(stream);
    Next::Done
}

async fn arrive(worker: Rc<Worker>, mut stream: TcpStream, destination: SocketAddr, port: u16) -> Next {
    let Ok(source) = stream.peer_addr().map(|source| source.ip()) else { return Next::Done };
    let (mode, hint) = {
        let policy = worker.ctx.inbound.load();
        let hint = match policy.protocol(port) {
            Protocol::Detect => policy.protocol(destination.port()),
            hint => hint,
        };
        (policy.mode, hint)
    };
    let mut buffer = Vec::new();
    let mut early = None;
    let patience = match mode {
        Mtls::Strict => Some(worker.ctx.config.timeouts.handshake.get()),
        Mtls::Permissive => early_connect_after(&worker, hint, port),
    };
    let mut first = first_bytes(&mut stream, &mut buffer, patience).await.unwrap_or(First::End);
    if first == First::Silence && mode == Mtls::Permissive {
        let Ok(mut application) = tls::dial(&worker.ctx, destination, Whom::Application).await else {
            return reset(&stream);
        };
        let mut greeting = Vec::new();
        tokio::select! {
            client = first_bytes(&mut stream, &mut buffer, None) => first = client.unwrap_or(First::End),
            _ = read_more(&mut application, &mut greeting) => {
                worker.ctx.metrics.detected(Direction::Inbound, "server_first");
                worker.inbound_memory.borrow_mut().record(port, speaks_first::First::Server, Instant::now());
                worker.ctx.metrics.unmeshed(source, port, "passed");
                let entry = Entry::new(&worker, destination, port, source, None);
                let wire = Wire::plain(stream, buffer);
                let admitted = entry
                    .admit_connection(&worker)
                    .and_then(|open| entry.admit_bytes(&worker).map(|()| open));
                return match admitted {
                    Ok(open) => entry.join(wire, application, greeting).guarded(Vec::new(), open),
                    Err(refusal) => refuse(&worker, wire, None, refusal, Direction::Inbound),
                };
            }
            () = silent_for_too_long(&worker.ctx.config.timeouts) => return Next::Done,
        }
        early = Some(application);
    }
    worker.ctx.metrics.detected(Direction::Inbound, first.as_str());
    if matches!(first, First::Bytes(_)) {
        worker.inbound_memory.borrow_mut().record(port, speaks_first::First::Client, Instant::now());
    }
    if first == First::Bytes(Detection::Tls) && is_sidecar(&worker, &mut stream, &mut buffer).await {
        return meshed(worker, (stream, buffer), destination, port, source, early).await;
    }
    told(&worker).await;
    let wire = Wire::plain(stream, buffer);
    let version = http_version(first).filter(|_| hint != Protocol::Tcp);
    let entry = Entry::new(&worker, destination, port, source, None);
    if worker.ctx.inbound.load().mode == Mtls::Strict && !entry.may_be_probe(&worker) {
        worker.ctx.metrics.unmeshed(source, port, "refused");
        return refuse(&worker, wire, http_version(first), entry.plaintext_refused(), Direction::Inbound);
    }
    worker.ctx.metrics.unmeshed(source, port, "passed");
    let open = match entry.admit_connection(&worker) {
        Ok(open) => open,
        Err(refusal) => return refuse(&worker, wire, http_version(first), refusal, Direction::Inbound),
    };
    let next = match version {
        Some(version) => serve(&worker, wire, version, Handler::Inbound(Rc::new(entry)), None),
        None => entry.bytes(&worker, wire, early).await,
    };
    next.guarded(Vec::new(), open)
}

/// Waits for the controller's first word of who may call, as long as an unknown destination is waited for. Whoever
/// comes before it is refused when it is judged.
async fn told(worker: &Worker) {
    if worker.ctx.inbound.load().is_told {
        return;
    }
    let mut changes = worker.ctx.inbound.changes();
    let is_told = changes.wait_for(|_| worker.ctx.inbound.load().is_told);
    let _ = timeout(worker.ctx.config.timeouts.discovery.get(), is_told).await;
}

/// How long a client may be silent before its port's server is connected to in `Permissive`; `None`: for ever.
///
/// Never at once, not even where the server is known to speak first: a sidecar's `ClientHello` must win against the
/// application's greeting, or the peer would read the greeting in its place.
fn early_connect_after(worker: &Worker, hint: Protocol, port: u16) -> Option<Duration> {
    let memory = worker.inbound_memory.borrow().recall(&port, Instant::now());
    match plan(hint, memory, port) {
        Plan::Opaque | Plan::Detect { early_connect_after: Duration::ZERO } => Some(EARLY_CONNECT_AFTER),
        Plan::Http1 | Plan::Http2 => worker.ctx.config.timeouts.idle.enabled(),
        Plan::Detect { .. } => Some(worker.ctx.config.timeouts.detect.get()),
    }
}

/// Whether a `ClientHello` that has begun is a sidecar's.
async fn is_sidecar(worker: &Worker, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> bool {
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
    (stream, buffer): (TcpStream, Vec<u8>),
    destination: SocketAddr,
    port: u16,
    source: IpAddr,
    early: Option<TcpStream>,
) -> Next {
    let secured = match tls::accept(&worker, stream, buffer).await {
        Ok(secured) => secured,
        Err(outcome) => {
            worker.ctx.metrics.handshake_failed(Direction::Inbound, outcome);
            return Next::Done;
        }
    };
    let Secured { wire, alpn, peer, facts, move_at, epoch } = secured;
    told(&worker).await;
    let entry = Entry::new(&worker, destination, port, source, Some(peer));
    let metrics = &worker.ctx.metrics;
    let info = metrics.mesh_connection(Direction::Inbound, &service_label(port), &facts);
    let open = match entry.admit_connection(&worker) {
        Ok(open) => open,
        Err(refusal) => {
            let version = Some(Version::Http2).filter(|_| alpn == Alpn::H2);
            return refuse(&worker, wire, version, refusal, Direction::Inbound);
        }
    };
    let (kind, next) = match alpn {
        Alpn::H2 => {
            let validity = Some(Validity { move_at, epoch });
            let handler = Handler::Inbound(Rc::new(entry));
            ("mesh_h2", serve(&worker, wire, Version::Http2, handler, validity))
        }
        Alpn::Tcp => ("mesh_tcp", entry.bytes(&worker, wire, early).await),
    };
    next.guarded(vec![info, metrics.connection(Direction::Inbound, kind)], open)
}

fn service_label(port: u16) -> String {
    format!("port:{port}")
}

impl Entry {
    fn new(
        worker: &Rc<Worker>,
        destination: SocketAddr,
        port: u16,
        source: IpAddr,
        peer: Option<SpiffeId>,
    ) -> Self {
        let caller: Option<Arc<str>> = peer.as_ref().map(|peer| peer.as_str().into());
        let edge = worker.edge(Direction::Inbound, &service_label(port).into(), caller.as_ref());
        Self { destination, port, source, peer, edge }
    }

    /// The application's own address.
    pub(super) fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// The workload's port that policies speak of.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Where the connection comes from.
    pub(super) fn source(&self) -> IpAddr {
        self.source
    }

    /// Who calls, proved by mutual TLS.
    pub(super) fn peer(&self) -> Option<&SpiffeId> {
        self.peer.as_ref()
    }

    pub(super) fn edge(&self) -> &Rc<Edge> {
        &self.edge
    }

    /// Bytes to the application, if they may come in.
    async fn bytes(self, worker: &Rc<Worker>, wire: Wire, early: Option<TcpStream>) -> Next {
        if let Err(refusal) = self.admit_bytes(worker) {
            return refuse(worker, wire, None, refusal, Direction::Inbound);
        }
        let application = match early {
            Some(application) => Ok(application),
            None => tls::dial(&worker.ctx, self.destination, Whom::Application).await,
        };
        match application {
            Ok(application) => self.join(wire, application, Vec::new()),
            Err(error) => {
                worker.ctx.metrics.refused(Direction::Inbound, error.reason.code());
                tracing::debug!(error = &*error.text, "the application takes no connection");
                wire.reset_on_close();
                Next::Done
            }
        }
    }

    fn join(self, wire: Wire, application: TcpStream, greeting: Vec<u8>) -> Next {
        let application = Wire::plain(application, Vec::new());
        Next::Relay(Relay::inbound(wire, application, self), greeting)
    }
}
