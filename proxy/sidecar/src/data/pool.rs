//! HTTP/2 connections to endpoints, shared by all requests of one thread that agree on the key.
//!
//! One connection per key while its streams last, another when they are used up. Requests that need a connection while one is
//! being made wait for that one: a burst after a restart makes one handshake, not a thousand. The connection is made
//! by a task of its own, so that a caller who gives up does not take it away from the others.
//!
//! A connection leaves the pool when its peer says so (GOAWAY), when it was idle, when either leaf nears its end, or
//! when our identity or the trust bundle changed. Requests on it finish: it closes with the last.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    task::Poll,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, future::Shared};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use outrigger_core::{key::ConnectionKey, reason::Reason};
use tokio::{
    sync::oneshot,
    task::spawn_local,
    time::{Instant, timeout},
};

use super::{
    Worker,
    body::Body,
    http::LocalExecutor,
    stream::Stream,
    tls::{self, ClientConfigs, ConnectError},
};
use crate::metrics::{Direction, OpenGuard};

/// A connection without a request is closed after this. Long enough for the pauses of a busy service, short enough
/// for peers to forget us.
const IDLE: Duration = Duration::from_mins(1);

/// Connections under one key: a peer that lets each have few streams must not cost us all our ports.
const MAX_CONNECTIONS: usize = 16;

/// Flow-control window of a stream: 1 MiB carries 400 Mbit/s over 20 ms.
pub(crate) const STREAM_WINDOW: u32 = 1024 * 1024;

/// Window of a connection: this many bytes may wait for slow readers before they slow down the others.
pub(crate) const CONNECTION_WINDOW: u32 = 64 * STREAM_WINDOW;

/// Bytes in one frame: four TLS records.
pub(crate) const FRAME_BYTES: u32 = 64 * 1024;

/// Bytes buffered for sending, for each stream.
pub(crate) const SEND_BUFFER: usize = 256 * 1024;

/// How long a new connection is waited for until its peer's SETTINGS say that extended CONNECT is served.
const SETTINGS_WAIT: Duration = Duration::from_secs(1);

/// What makes two connections interchangeable.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum PoolKey {
    /// Mutual TLS between sidecars.
    Mesh(ConnectionKey),
    /// In clear, to the own application or to an endpoint without a sidecar.
    Plain(SocketAddr),
}

/// The connections of one thread.
#[derive(Default)]
pub(crate) struct Pool {
    slots: RefCell<HashMap<PoolKey, Slot>>,
    pub(crate) configs: RefCell<ClientConfigs>,
}

#[derive(Default)]
struct Slot {
    connections: Vec<Rc<Connection>>,
    connecting: Option<Shared<oneshot::Receiver<Result<(), ConnectError>>>>,
}

/// What drives a connection and knows its settings.
type Driver = hyper::client::conn::http2::Connection<TokioIo<Stream>, Body, LocalExecutor>;

/// Ends a connection when its task does, however that comes.
struct Ended(Rc<RefCell<Option<Driver>>>);

impl Drop for Ended {
    fn drop(&mut self) {
        let driver = self.0.borrow_mut().take();
        // Dropped after the cell is free again.
        drop(driver);
    }
}

struct Connection {
    sender: SendRequest<Body>,
    /// `None` once the connection has ended: hyper's end of the queue of requests must go with it.
    driver: Rc<RefCell<Option<Driver>>>,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    move_at: Option<SystemTime>,
    _open: [Option<OpenGuard>; 2],
}

/// A stream's place in a connection, given back when dropped.
pub(crate) struct Lease(Rc<Connection>);

impl Connection {
    fn is_open(&self) -> bool {
        self.driver.borrow().is_some()
    }
}

impl Lease {
    /// Sends a request; the body of the response is still to come.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        self.0.sender.clone().try_send_request(request).await.map_err(|mut error| {
            if error.take_message().is_some() || was_refused(error.error()) {
                SendError::Unprocessed
            } else {
                SendError::Broken(error.into_error())
            }
        })
    }

    /// Waits until the peer has said that it serves extended CONNECT; `false` if it does not.
    pub(crate) async fn serves_extended_connect(&self) -> bool {
        // hyper does not tell when SETTINGS arrive; they are the first thing that the peer sends.
        let poll = async {
            loop {
                match &*self.0.driver.borrow() {
                    Some(driver) if driver.is_extended_connect_protocol_enabled() => return true,
                    Some(_) => {}
                    None => return false,
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SETTINGS_WAIT, poll).await.unwrap_or(false)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        if self.0.streams.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Why there is no response.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The peer has not looked at the request (RFC 9113, 8.7): it may go to another, if its body is repeatable.
    Unprocessed,
    /// The request was sent.
    Broken(hyper::Error),
}

/// The code with which the peer reset the stream, if that is what happened.
pub(crate) fn reset_by_peer(error: &hyper::Error) -> Option<h2::Reason> {
    let error = std::error::Error::source(error)?.downcast_ref::<h2::Error>()?;
    if error.is_reset() && error.is_remote() { error.reason() } else { None }
}

fn was_refused(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<h2::Error>());
    source.is_some_and(|error| {
        // A GOAWAY without an error ends only the streams that it leaves out.
        let left_out = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
        error.is_remote() && (left_out || error.reason() == Some(h2::Reason::REFUSED_STREAM))
    })
}

impl Pool {
    /// Whether a pooled connection of this key was ended by its peer since the last call: its workload leaves.
    pub(crate) fn peer_left(&self, key: &PoolKey) -> bool {
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(key) else { return false };
        let before = slot.connections.len();
        slot.connections.retain(|connection| connection.is_open());
        slot.connections.len() < before
    }

    /// Closes what has been idle for long and lets go of what has become out of date. Called about once a second.
    pub(crate) fn sweep(&self, worker: &Worker) {
        let now = Instant::now();
        let wall = SystemTime::now();
        let (own, epoch) = worker.identity();
        self.slots.borrow_mut().retain(|key, slot| {
            let current = match key {
                PoolKey::Mesh(key) => key.trust_epoch == epoch && Some(&key.own_identity) == own.as_ref(),
                PoolKey::Plain(_) => true,
            };
            slot.connections.retain(|connection| {
                let idle = connection.streams.get() == 0 && now - connection.idle_since.get() >= IDLE;
                let ends = connection.move_at.is_some_and(|at| at <= wall);
                current && !idle && !ends
            });
            !slot.connections.is_empty() || slot.connecting.is_some()
        });
    }

    fn find(&self, worker: &Worker, key: &PoolKey) -> Option<Lease> {
        let slots = self.slots.borrow();
        let most = worker.ctx.config.limits.streams_per_connection as usize;
        let connection = slots.get(key)?.connections.iter().find(|connection| {
            let driver = connection.driver.borrow();
            driver
                .as_ref()
                .is_some_and(|driver| connection.streams.get() < most.min(driver.current_max_send_streams()))
        })?;
        connection.streams.set(connection.streams.get() + 1);
        Some(Lease(connection.clone()))
    }
}

/// A place on a connection of this key, made if there is none.
pub(crate) async fn acquire(
    worker: &Rc<Worker>,
    key: &PoolKey,
    service: &str,
) -> Result<Lease, ConnectError> {
    loop {
        if let Some(lease) = worker.pool.find(worker, key) {
            return Ok(lease);
        }
        let connecting = start_connecting(worker, key, service)?;
        match connecting.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(ConnectError::new(Reason::ConnectFailed, "connecting was interrupted")),
        }
    }
}

fn start_connecting(
    worker: &Rc<Worker>,
    key: &PoolKey,
    service: &str,
) -> Result<Shared<oneshot::Receiver<Result<(), ConnectError>>>, ConnectError> {
    let mut slots = worker.pool.slots.borrow_mut();
    let slot = slots.entry(key.clone()).or_default();
    if let Some(connecting) = &slot.connecting {
        return Ok(connecting.clone());
    }
    slot.connections.retain(|connection| connection.is_open());
    if slot.connections.len() >= MAX_CONNECTIONS {
        let text = format!("all streams of {MAX_CONNECTIONS} connections to the endpoint are in use");
        return Err(ConnectError::new(Reason::Overloaded, text));
    }
    let (done, connecting) = oneshot::channel();
    let connecting = connecting.shared();
    slot.connecting = Some(connecting.clone());
    drop(slots);
    let (worker, key, service) = (worker.clone(), key.clone(), service.to_owned());
    spawn_local(async move {
        // A panic in here must not leave the key without a way to connect again.
        let result = std::panic::AssertUnwindSafe(connect(&worker, &key, &service)).catch_unwind().await;
        let result = result.unwrap_or_else(|_| {
            worker.ctx.metrics.panicked();
            Err(ConnectError::new(Reason::ConnectFailed, "internal error"))
        });
        let mut slots = worker.pool.slots.borrow_mut();
        let slot = slots.entry(key).or_default();
        slot.connecting = None;
        let _ = done.send(result.map(|connection| slot.connections.push(Rc::new(connection))));
    });
    Ok(connecting)
}

async fn connect(worker: &Rc<Worker>, key: &PoolKey, service: &str) -> Result<Connection, ConnectError> {
    let ctx = &worker.ctx;
    let (address, stream, move_at, info) = match key {
        PoolKey::Mesh(key) => {
            let secured = match tls::connect(ctx, &worker.pool.configs, key).await {
                Ok(secured) => secured,
                Err(error) => {
                    ctx.metrics.handshake_failed(Direction::Outbound, error.reason.code());
                    return Err(error);
                }
            };
            let info = ctx.metrics.mesh_connection(Direction::Outbound, service, &secured.facts);
            (key.address, secured.stream, Some(secured.move_at), Some(info))
        }
        PoolKey::Plain(address) => {
            (*address, Stream::plain(tls::dial(ctx, *address, false).await?), None, None)
        }
    };
    let kind = if info.is_some() { "mesh_h2" } else { "plain_h2" };
    let open = Some(ctx.metrics.connection(Direction::Outbound, kind));
    let timeouts = &ctx.config.timeouts;
    let mut builder = Builder::new(LocalExecutor(worker.clone()));
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_send_buf_size(SEND_BUFFER)
        // h2 counts frames that cross a cancellation, over a connection's whole life; these peers are no strangers.
        .max_local_error_reset_streams(None)
        .max_header_list_size(ctx.config.limits.header_bytes);
    if let Some(interval) = timeouts.ping_interval.enabled() {
        // Also while idle: a dead peer is to be found before the next request is.
        builder
            .keep_alive_interval(interval)
            .keep_alive_timeout(timeouts.ping_timeout.get())
            .keep_alive_while_idle(true);
    }
    let (sender, driver) = builder
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| ConnectError::new(Reason::ConnectFailed, format!("{address}: {error}")))?;
    let driver = Rc::new(RefCell::new(Some(driver)));
    let driven = Ended(driver.clone());
    worker.spawn(async move {
        let driving = poll_fn(|cx| match &mut *driven.0.borrow_mut() {
            Some(driver) => driver.poll_unpin(cx),
            None => Poll::Ready(Ok(())),
        });
        if let Err(error) = driving.await {
            tracing::debug!(%address, %error, "a connection to an endpoint broke");
        }
    });
    Ok(Connection {
        sender,
        driver,
        streams: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        move_at,
        _open: [open, info],
    })
}
