//! Connections from the workload: accept -> resolve -> detect, and bytes on to an endpoint. Requests go on in
//! `request`.
//!
//! The original destination decides the service before a byte is read; the bytes decide how it is carried, and only
//! where the port's hint does not.

use std::{
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use outrigger_core::{
    bulkhead::Place,
    detect::Detection,
    key::Alpn,
    reason::Reason,
    resolve::{Knowledge, Resolution, resolve},
    speaks_first::{self, Plan, plan},
};
use tokio::{net::TcpStream, time::timeout};

use super::{
    Next, Worker,
    balance::{Attempt, MAX_ATTEMPTS, Route},
    detect::{First, first_bytes, silent_for_too_long},
    reasons::Refusal,
    relay::Relay,
    serve::{Handler, Version, refuse, serve},
    tls::{self, ConnectError, Whom},
    wire::{Wire, reset_on_close},
};
use crate::{
    discovery::directory::Target,
    metrics::{Direction, Edge, OpenGuard},
};

/// How long a client that is to be refused may take to show whether it can read an HTTP response.
const REFUSAL_WAIT: Duration = Duration::from_millis(250);

/// How soon a sidecar says that its application takes no connection.
const KEPT_FOR: Duration = Duration::from_millis(50);

/// A redirected connection.
pub(crate) async fn transparent(worker: Rc<Worker>, stream: TcpStream) -> Next {
    let original = match outrigger_intercept::original_destination(&stream) {
        Ok(original) => original,
        Err(error) => {
            tracing::warn!(%error, "cannot read a connection's original destination");
            return reset(&stream);
        }
    };
    let Some(address) = original.filter(|address| !worker.listeners.contains(*address)) else {
        let text = "the proxy's own port was dialled; dial the address that is meant";
        return refuse_connection(&worker, stream, Refusal::new(Reason::Loop, text)).await;
    };
    let directory = &worker.ctx.directory;
    let knowledge = directory.resolve(address).await;
    match resolve(address.ip(), knowledge, &directory.ranges()) {
        Resolution::Mesh(target) => carry(worker, stream, target).await,
        Resolution::PassThrough { audit } => {
            worker.ctx.metrics.passed_through(if audit { "audited" } else { "allowed" });
            if audit {
                tracing::info!(%address, "passed to a destination outside the mesh");
            }
            pass_through(&worker, stream, address).await
        }
        Resolution::Refuse(reason) => {
            let text = leads_nowhere(&address.to_string(), reason);
            refuse_connection(&worker, stream, Refusal::new(reason, text)).await
        }
    }
}

/// A connection to an explicit upstream.
pub(crate) async fn upstream(worker: Rc<Worker>, stream: TcpStream, at: usize) -> Next {
    let upstream = &worker.listeners.upstreams[at].0;
    let Some((service, port)) = upstream.target() else { return Next::Done };
    let reason = match worker.ctx.directory.resolve_service(service, port).await {
        Knowledge::Found(target) => return carry(worker, stream, target).await,
        Knowledge::NotFound => Reason::NoSuchDestination,
        Knowledge::Silent => Reason::DiscoveryUnavailable,
    };
    let text = leads_nowhere(&upstream.service, reason);
    refuse_connection(&worker, stream, Refusal::new(reason, text)).await
}

/// Why a connection to an address, or to a service, goes nowhere.
fn leads_nowhere(dialled: &str, reason: Reason) -> String {
    let why = match reason {
        Reason::NoSuchDestination => "it is the mesh's, and nothing that the controller knows is there",
        Reason::OutboundDenied => {
            "it is outside the mesh, where the outbound default lets nobody go; an ExternalService would name it"
        }
        Reason::DiscoveryUnavailable => "the controller has not said in time where it leads",
        _ => "it leads nowhere",
    };
    format!("{dialled}: {why}")
}

fn reset(stream: &TcpStream) -> Next {
    reset_on_close(stream);
    Next::Done
}

/// Answers with a reason where the client speaks HTTP, else with a reset.
async fn refuse_connection(worker: &Rc<Worker>, mut stream: TcpStream, refusal: Refusal) -> Next {
    let mut buffer = Vec::new();
    let first = first_bytes(&mut stream, &mut buffer, Some(REFUSAL_WAIT)).await.unwrap_or(First::End);
    let wire = Wire::plain(stream, buffer);
    refuse(worker, wire, http_version(first), refusal, Direction::Outbound)
}

pub(crate) fn http_version(first: First) -> Option<Version> {
    match first {
        First::Bytes(Detection::Http1) => Some(Version::Http1),
        First::Bytes(Detection::Http2) => Some(Version::Http2),
        _ => None,
    }
}

/// Bytes to the original destination, as if we were not there.
async fn pass_through(worker: &Rc<Worker>, stream: TcpStream, address: SocketAddr) -> Next {
    match tls::dial(&worker.ctx, address, Whom::Outside).await {
        Ok(upstream) => {
            let wire = Wire::plain(upstream, Vec::new());
            let upstream = Upstream { wire, edge: None, open: Vec::new() };
            join(stream, Vec::new(), upstream, Vec::new())
        }
        Err(error) => {
            tracing::debug!(%address, error = &*error.text, "cannot pass a connection through");
            reset(&stream)
        }
    }
}

/// Carries a connection to a service of the mesh.
async fn carry(worker: Rc<Worker>, mut stream: TcpStream, target: Target) -> Next {
    let port = target.port;
    let hint = worker.ctx.config.protocol(port).unwrap_or_else(|| target.service.load().protocol(port));
    let destination = (target.service.name().clone(), port);
    let memory = worker.outbound_memory.borrow().recall(&destination, Instant::now());
    let source = stream.peer_addr().ok().map(|source| source.ip());
    let route = Rc::new(Route::new(worker.clone(), target, source));
    let mut buffer = Vec::new();
    let version = match plan(hint, memory, port) {
        Plan::Opaque => None,
        Plan::Http1 => {
            let first = tokio::select! {
                first = first_bytes(&mut stream, &mut buffer, None) => first.unwrap_or(First::End),
                () = silent_for_too_long(&worker.ctx.config.timeouts) => return Next::Done,
            };
            // "http" is what ports are called that also serve HTTP/2 to those who know it.
            http_version(first).or(Some(Version::Http1))
        }
        Plan::Http2 => Some(Version::Http2),
        Plan::Detect { early_connect_after } => {
            let decided = match decide(&route, &mut stream, &mut buffer, early_connect_after).await {
                Ok(Some(decided)) => decided,
                Ok(None) => return Next::Done,
                Err(refusal) => return refuse_connection(&worker, stream, refusal).await,
            };
            let (outcome, first) = match &decided {
                Decided::Client(first, _) => (first.as_str(), speaks_first::First::Client),
                Decided::Server(..) => ("server_first", speaks_first::First::Server),
            };
            worker.ctx.metrics.detected(Direction::Outbound, outcome);
            worker.outbound_memory.borrow_mut().record(destination, first, Instant::now());
            match decided {
                Decided::Server(upstream, greeting) => {
                    return join(stream, buffer, upstream, greeting);
                }
                Decided::Client(_, Some(upstream)) => {
                    return join(stream, buffer, upstream, Vec::new());
                }
                Decided::Client(first, None) => http_version(first),
            }
        }
    };
    if let Some(version) = version {
        return serve(&worker, Wire::plain(stream, buffer), version, Handler::Outbound(route), None);
    }
    match connect(&route).await {
        Ok(upstream) => join(stream, buffer, upstream, Vec::new()),
        Err(refusal) => {
            worker.ctx.metrics.refused(Direction::Outbound, refusal.reason.code());
            tracing::debug!(reason = %refusal.reason, text = %refusal.text, "no endpoint for a connection");
            reset(&stream)
        }
    }
}

/// Who decided what a connection speaks.
enum Decided {
    /// The client, with its first bytes; and the early connection, if it is of use.
    Client(First, Option<Upstream>),
    /// The server: the early connection and its first bytes.
    Server(Upstream, Vec<u8>),
}

/// Waits for whoever speaks first, and connects early if the client does not. `None`: nobody has spoken for too long.
async fn decide(
    route: &Rc<Route>,
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    early_connect_after: Duration,
) -> Result<Option<Decided>, Refusal> {
    // An error is the end of the stream, too; whoever writes next learns more.
    let first = first_bytes(stream, buffer, Some(early_connect_after)).await.unwrap_or(First::End);
    if first != First::Silence {
        return Ok(Some(Decided::Client(first, None)));
    }
    let upstream = tokio::select! {
        first = first_bytes(stream, buffer, None) => return Ok(Some(Decided::Client(first.unwrap_or(First::End), None))),
        upstream = connect(route) => upstream?,
    };
    let first = tokio::select! {
        first = first_bytes(stream, buffer, None) => first.unwrap_or(First::End),
        // An error shows again where the bytes would go.
        greeting = upstream.wire.read() => return Ok(Some(Decided::Server(upstream, greeting.unwrap_or_default()))),
        () = silent_for_too_long(&route.worker.ctx.config.timeouts) => return Ok(None),
    };
    if http_version(first).is_none() {
        return Ok(Some(Decided::Client(first, Some(upstream))));
    }
    route.worker.spawn(async move {
        upstream.wire.finish();
        let _ = poll_fn(|cx| upstream.wire.poll_sent(cx)).await;
    });
    Ok(Some(Decided::Client(first, None)))
}

/// A connection for bytes.
struct Upstream {
    wire: Wire,
    /// Where it is counted; `None` outside of the mesh's services.
    edge: Option<Rc<Edge>>,
    open: Vec<OpenGuard>,
}

/// Whether an endpoint takes a connection, and keeps it for a moment: of one beside a sidecar the sidecar takes it first, and ends it
/// if the application does not. `None`: it was not asked.
pub(super) async fn reaches(route: &Rc<Route>) -> Option<bool> {
    let upstream = match connect(route).await {
        Ok(upstream) => upstream,
        Err(refusal) => return refusal.is_not_ours().then_some(false),
    };
    match timeout(KEPT_FOR, upstream.wire.read()).await {
        Ok(read) => Some(read.is_ok_and(|bytes| !bytes.is_empty())),
        Err(_) => Some(true),
    }
}

/// Connects to an endpoint for bytes. Nothing is sent, so another may be tried.
async fn connect(route: &Rc<Route>) -> Result<Upstream, Refusal> {
    let mut tried = Vec::new();
    loop {
        let mut attempt = route.attempt(&tried, || None)?;
        let place = route.holds_connection()?;
        match open(route, &attempt, place).await {
            Ok(upstream) => {
                attempt.answered(true);
                return Ok(upstream);
            }
            // Ours, not the endpoint's fault.
            Err(error) if error.reason == Reason::NoCertificate => return Err(error.refusal()),
            Err(error) => {
                attempt.connect_failed(&route.worker);
                tried.push(attempt.endpoint.id.clone());
                let others = route.target.service.load().endpoints.len() > tried.len();
                if tried.len() == MAX_ATTEMPTS || route.is_pinned() || !others {
                    return Err(error.refusal());
                }
            }
        }
    }
}

async fn open(route: &Route, attempt: &Attempt, place: Place) -> Result<Upstream, ConnectError> {
    let worker = &route.worker;
    let metrics = &worker.ctx.metrics;
    let edge = Some(attempt.edge.clone());
    let Some(key) = attempt.key(worker, Alpn::Tcp)? else {
        let stream = tls::dial(&worker.ctx, attempt.address, Whom::Outside).await?;
        let open = metrics.connection(Direction::Outbound, "plain_tcp").holding(Some(place));
        return Ok(Upstream { wire: Wire::plain(stream, Vec::new()), edge, open: vec![open] });
    };
    let secured = tls::connect(worker, &key).await.inspect_err(|error| {
        metrics.handshake_failed(Direction::Outbound, error.reason.code());
    })?;
    let open = metrics.connection(Direction::Outbound, "mesh_tcp").holding(Some(place));
    let info = metrics.mesh_connection(Direction::Outbound, route.service(), &secured.facts);
    Ok(Upstream { wire: secured.wire, edge, open: vec![open, info] })
}

/// Relays between the workload and an upstream. `buffer` was read from the workload, `greeting` from the upstream.
fn join(stream: TcpStream, buffer: Vec<u8>, upstream: Upstream, greeting: Vec<u8>) -> Next {
    let client = Wire::plain(stream, buffer);
    let Upstream { wire, edge, open } = upstream;
    Next::Relay(Relay::new(client, wire, Direction::Outbound, edge, open), greeting)
}
