//! HTTP/1.1 connections in clear: to the own application, and to endpoints without a sidecar.
//!
//! The classic race of such pools is an application that closes an idle connection just when a request goes out on
//! it. Two things bear on it: connections are kept for less time than applications keep them, and a request that died
//! on a *reused* connection before any byte of an answer is sent once more on a new one, if that is safe.

use std::{cell::RefCell, collections::HashMap, net::SocketAddr, rc::Rc, time::Duration};

use http::{Method, Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use outrigger_core::reason::Reason;
use tokio::{task::spawn_local, time::Instant};

use super::{
    Worker,
    body::Body,
    http::MAX_HEADERS,
    message::check_framing,
    patient::Patient,
    stream::Stream,
    tls::{self, ConnectError},
};
use crate::metrics::Direction;

/// Idle connections are kept this long: less than the 5 s that Node.js, the shortest of the common servers, keeps
/// them.
const IDLE: Duration = Duration::from_secs(3);

/// Idle connections to one address.
const MAX_IDLE: usize = 256;

/// Idle connections of one thread.
#[derive(Default)]
pub(crate) struct Apps(RefCell<HashMap<SocketAddr, Vec<Idle>>>);

struct Idle {
    sender: SendRequest<Body>,
    since: Instant,
}

impl Apps {
    fn take(&self, address: SocketAddr) -> Option<SendRequest<Body>> {
        let mut idle = self.0.borrow_mut();
        let connections = idle.get_mut(&address)?;
        // The youngest first: the others may then grow old enough to be closed.
        while let Some(Idle { sender, since }) = connections.pop() {
            if sender.is_ready() && since.elapsed() < IDLE {
                return Some(sender);
            }
        }
        None
    }

    fn give(&self, address: SocketAddr, sender: SendRequest<Body>) {
        let mut idle = self.0.borrow_mut();
        let connections = idle.entry(address).or_default();
        if connections.len() < MAX_IDLE {
            connections.push(Idle { sender, since: Instant::now() });
        }
    }

    /// Closes what is too old. Called about once a second.
    pub(crate) fn sweep(&self) {
        self.0.borrow_mut().retain(|_, connections| {
            connections.retain(|idle| idle.since.elapsed() < IDLE && !idle.sender.is_closed());
            !connections.is_empty()
        });
    }
}

/// Why there is no response.
#[derive(Debug)]
pub(crate) enum SendError {
    /// Nothing was sent; the body is as it was.
    Connect(ConnectError),
    /// The request, or a part of it, was sent.
    Sent(hyper::Error),
}

/// Sends a request in origin form, or CONNECT, and returns the response with its body still to come. Dials where
/// there is no connection to reuse.
pub(crate) async fn send(
    worker: &Rc<Worker>,
    address: SocketAddr,
    direction: Direction,
    request: Request<Body>,
) -> Result<Response<Incoming>, SendError> {
    // What follows a CONNECT or an upgrade is no HTTP: such a connection is never given back.
    let switches =
        request.method() == Method::CONNECT || request.headers().contains_key(http::header::UPGRADE);
    let mut request = request;
    if !switches && let Some(sender) = worker.apps.take(address) {
        let again = is_safe_to_repeat(&request).then(|| copy(&request));
        match send_on(worker, address, sender, request).await {
            Ok(response) => return Ok(response),
            Err((error, unsent)) => match (unsent, again) {
                (Some(unsent), _) => request = unsent,
                (None, Some(again)) if died_unanswered(&error) && again.body().is_repeatable() => {
                    request = again;
                }
                (None, _) => return Err(SendError::Sent(error)),
            },
        }
    }
    let sender = connect(worker, address, direction).await.map_err(SendError::Connect)?;
    if switches {
        let mut sender = sender;
        return sender.send_request(request).await.map_err(SendError::Sent);
    }
    send_on(worker, address, sender, request).await.map_err(|(error, _)| SendError::Sent(error))
}

async fn send_on(
    worker: &Rc<Worker>,
    address: SocketAddr,
    mut sender: SendRequest<Body>,
    request: Request<Body>,
) -> Result<Response<Incoming>, (hyper::Error, Option<Request<Body>>)> {
    match sender.try_send_request(request).await {
        Ok(mut response) => {
            // Where its response ends is doubtful: whoever handles it will refuse it.
            if check_framing(response.headers_mut()).is_err() {
                return Ok(response);
            }
            let worker = worker.clone();
            spawn_local(async move {
                // Ready again means that the response was read to its end and the connection may be reused.
                if sender.ready().await.is_ok() {
                    worker.apps.give(address, sender);
                }
            });
            Ok(response)
        }
        Err(mut error) => {
            let unsent = error.take_message();
            Err((error.into_error(), unsent))
        }
    }
}

async fn connect(
    worker: &Rc<Worker>,
    address: SocketAddr,
    direction: Direction,
) -> Result<SendRequest<Body>, ConnectError> {
    let ctx = &worker.ctx;
    let stream = Stream::plain(tls::dial(ctx, address, false).await?);
    let open = ctx.metrics.connection(direction, "plain_h1");
    let (sender, driver) = http1::Builder::new()
        .preserve_header_case(true)
        .max_buf_size(ctx.config.limits.header_bytes as usize)
        .max_headers(MAX_HEADERS)
        .handshake(TokioIo::new(Patient::new(stream)))
        .await
        .map_err(|error| ConnectError::new(Reason::ConnectFailed, format!("{address}: {error}")))?;
    worker.spawn(async move {
        let _open = open;
        if let Err(error) = driver.with_upgrades().await {
            tracing::debug!(%address, %error, "a connection to an application broke");
        }
    });
    Ok(sender)
}

/// RFC 9110, 9.2.2, or the caller says so.
fn is_safe_to_repeat(request: &Request<Body>) -> bool {
    request.method().is_idempotent() || request.headers().contains_key("idempotency-key")
}

/// Whether the connection ended before any byte of a response.
fn died_unanswered(error: &hyper::Error) -> bool {
    let io = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    error.is_incomplete_message()
        || error.is_canceled()
        || error.is_closed()
        || io.is_some_and(|error| {
            use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
            matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
        })
}

fn copy(request: &Request<Body>) -> Request<Body> {
    let mut copy = Request::new(request.body().again());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy
}
