//! Serving HTTP on an accepted connection: hyper's two servers with every limit said aloud, who handles a request, and
//! when the connection ends.
//!
//! hyper is a detail of this folder. What it does not do for us is here too: its time-out for a request's head also
//! runs while a kept-alive connection is idle, which would close connections under clients that pool them, so that
//! we watch bytes and requests ourselves.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use futures_util::future::{FutureExt, LocalBoxFuture};
use http::{HeaderValue, Method, Request, Response, header::CONNECTION};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::Service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use outrigger_core::reason::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Worker,
    balance::Route,
    body::{Body, BodyError},
    inbound,
    pool::{CONNECTION_WINDOW, FRAME_BYTES, SEND_BUFFER, STREAM_WINDOW},
    reasons::{Refusal, is_grpc, reason_of},
    request,
    stream::Stream,
};
use crate::{drain::Phase, metrics::Direction};

/// Header lines of one message. hyper's own bound is 100; cookies and gRPC metadata come near it.
pub(crate) const MAX_HEADERS: usize = 512;

/// Streams that a peer may open at once on one connection.
const MAX_STREAMS: u32 = 1000;

/// Streams that a peer reset before we looked at them, at most (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;

/// Streams that we reset because of the peer's errors, at most over a connection's life (CVE-2025-8671). For strangers
/// only: h2 also counts what is nobody's error, the rest of a request's body that crosses an early response on the
/// wire, and a connection that lives for days would run into any limit.
const MAX_LOCAL_RESETS: usize = 1024;

/// hyper's least buffer for a head.
const MIN_HEAD_BYTES: usize = 8192;

/// Runs what hyper wants run on this thread.
#[derive(Clone)]
pub(crate) struct LocalExecutor(pub(crate) Rc<Worker>);

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// Who answers the requests of a connection.
#[derive(Clone)]
pub(crate) enum Handler {
    Outbound(Rc<Route>),
    Inbound(Rc<inbound::Entry>),
    Refuse(Refusal),
}

impl Handler {
    fn direction(&self) -> Direction {
        match self {
            Self::Outbound(_) | Self::Refuse(_) => Direction::Outbound,
            Self::Inbound(_) => Direction::Inbound,
        }
    }
}

struct Handling {
    handler: Handler,
    activity: Arc<Activity>,
}

impl Service<Request<Incoming>> for Handling {
    type Response = Response<Body>;
    type Error = BodyError;
    type Future = LocalBoxFuture<'static, Result<Response<Body>, BodyError>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let active = Activity::begin(&self.activity);
        let handler = self.handler.clone();
        let is_http1 = self.activity.version == Version::Http1;
        let is_connect = request.method() == Method::CONNECT;
        async move {
            let mut response = match handler {
                Handler::Outbound(route) => request::outbound(route, request, active).await?,
                Handler::Inbound(entry) => inbound::request(entry, request, active).await?,
                Handler::Refuse(refusal) => refusal.response(is_grpc(request.headers())),
            };
            // What follows a request that two readers could end in two places, or a tunnel that was not opened, is
            // not to be read as a request (RFC 9112, 11.2).
            let bad = reason_of(response.headers()) == Some(Reason::BadRequest);
            let no_tunnel = is_connect && !response.status().is_success();
            if is_http1 && (bad || no_tunnel) {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response)
        }
        .boxed_local()
    }
}

/// Which HTTP a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// When a mutual TLS connection has to move to new credentials: at `move_at`, or when `epoch` has passed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Validity {
    pub(crate) move_at: SystemTime,
    pub(crate) epoch: u64,
}

/// Serves a connection to its end.
pub(crate) async fn serve(
    worker: &Rc<Worker>,
    stream: Stream,
    version: Version,
    handler: Handler,
    validity: Option<Validity>,
) {
    let activity = Arc::new(Activity::new(version));
    let is_stranger = !matches!(handler, Handler::Outbound(_)) && validity.is_none();
    let leave = leave(worker.clone(), handler.direction(), activity.clone(), validity);
    let io = TokioIo::new(Watched { stream, activity: activity.clone() });
    let service = Handling { handler, activity: activity.clone() };
    let result = match version {
        Version::Http1 => {
            let mut connection = pin!(http1(worker).serve_connection(io, service).with_upgrades());
            match run(connection.as_mut(), leave).await {
                Some(Left::Gracefully) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
                Some(Left::AtOnce) => Ok(()),
                None => return,
            }
        }
        Version::Http2 => {
            let mut connection = pin!(http2(worker, is_stranger).serve_connection(io, service));
            match run(connection.as_mut(), leave).await {
                Some(Left::Gracefully) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
                Some(Left::AtOnce) => Ok(()),
                None => return,
            }
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "an HTTP connection broke while it was closed");
    }
}

/// Drives a connection until it ends (`None`) or we want to leave it.
async fn run<C>(connection: Pin<&mut C>, leave: impl Future<Output = Left>) -> Option<Left>
where
    C: Future<Output = hyper::Result<()>>,
{
    tokio::select! {
        result = connection => {
            if let Err(error) = result {
                tracing::debug!(%error, "an HTTP connection broke");
            }
            None
        }
        left = leave => Some(left),
    }
}

enum Left {
    /// GOAWAY, or `Connection: close` with the next response.
    Gracefully,
    /// The client is too slow.
    AtOnce,
}

/// Waits until there is a reason to end a connection.
async fn leave(
    worker: Rc<Worker>,
    direction: Direction,
    activity: Arc<Activity>,
    validity: Option<Validity>,
) -> Left {
    let drained = async {
        match direction {
            Direction::Outbound => worker.ctx.drain.reached(Phase::Outbound).await,
            Direction::Inbound => {
                let late = worker.is_leaving();
                worker.leaving().await;
                if late {
                    // Accepted while we were leaving already, from somebody who has not heard: one request is served.
                    tokio::select! {
                        () = activity.first.notified() => {}
                        () = worker.ctx.drain.reached(Phase::Outbound) => {}
                    }
                }
            }
        }
        Left::Gracefully
    };
    let outdated = async {
        match validity {
            None => std::future::pending().await,
            Some(validity) => worker.outdated(validity).await,
        }
        Left::Gracefully
    };
    tokio::select! {
        left = drained => left,
        left = outdated => left,
        left = activity.ends(&worker) => left,
    }
}

fn http1(worker: &Worker) -> http1::Builder {
    let limits = &worker.ctx.config.limits;
    let mut builder = http1::Builder::new();
    builder
        .half_close(true)
        .preserve_header_case(true)
        .auto_date_header(false)
        .max_buf_size((limits.header_bytes as usize).max(MIN_HEAD_BYTES))
        .max_headers(MAX_HEADERS)
        .timer(TokioTimer::new())
        .header_read_timeout(None);
    builder
}

fn http2(worker: &Rc<Worker>, is_stranger: bool) -> http2::Builder<LocalExecutor> {
    let config = &worker.ctx.config;
    let mut builder = http2::Builder::new(LocalExecutor(worker.clone()));
    builder
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(config.limits.header_bytes)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(is_stranger.then_some(MAX_LOCAL_RESETS));
    if let Some(interval) = config.timeouts.ping_interval.enabled() {
        builder.keep_alive_interval(interval).keep_alive_timeout(config.timeouts.ping_timeout.get());
    }
    builder
}

/// What happens on a connection: requests under way, and since when there are none.
///
/// hyper wants connections that can be sent to other threads, which is why this is not a `Cell`; nobody contends.
pub(crate) struct Activity {
    version: Version,
    active: AtomicUsize,
    waiting: Mutex<Waiting>,
    first: Notify,
}

#[derive(Clone, Copy)]
struct Waiting {
    since: Instant,
    /// A request's head has begun.
    head: bool,
}

/// A request under way.
pub(crate) struct Active(Arc<Activity>);

impl Drop for Active {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.wait(false);
        }
    }
}

impl Activity {
    fn new(version: Version) -> Self {
        Self {
            version,
            active: AtomicUsize::new(0),
            waiting: Mutex::new(Waiting { since: Instant::now(), head: false }),
            first: Notify::new(),
        }
    }

    fn begin(this: &Arc<Self>) -> Active {
        this.active.fetch_add(1, Ordering::Relaxed);
        this.first.notify_one();
        Active(this.clone())
    }

    fn wait(&self, head: bool) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) =
            Waiting { since: Instant::now(), head };
    }

    fn waiting(&self) -> Waiting {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes_came(&self) {
        // HTTP/2 bounds its heads itself, and its pings are no request.
        if self.version == Version::Http1 && self.active.load(Ordering::Relaxed) == 0 && !self.waiting().head
        {
            self.wait(true);
        }
    }

    /// Waits until a request's head took too long, or no request came for too long.
    async fn ends(&self, worker: &Worker) -> Left {
        let timeouts = &worker.ctx.config.timeouts;
        let (head, idle) = (timeouts.headers.enabled(), timeouts.idle.enabled());
        // Looked at that often: precise enough for time-outs of seconds, and two timers an hour are no cost.
        let Some(pace) = [head, idle].into_iter().flatten().min() else {
            return std::future::pending().await;
        };
        loop {
            sleep(pace.max(Duration::from_millis(1))).await;
            loop {
                if self.active.load(Ordering::Relaxed) > 0 {
                    break;
                }
                let waiting = self.waiting();
                let (limit, left) =
                    if waiting.head { (head, Left::AtOnce) } else { (idle, Left::Gracefully) };
                let Some(limit) = limit else { break };
                let end = waiting.since + limit;
                if end <= Instant::now() {
                    return left;
                }
                if end > Instant::now() + pace {
                    break;
                }
                sleep_until(end).await;
            }
        }
    }
}

/// A connection that says when bytes come.
struct Watched {
    stream: Stream,
    activity: Arc<Activity>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.activity.bytes_came();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Refuses every request of a connection, or the connection if it is no HTTP.
pub(crate) async fn refuse(
    worker: &Rc<Worker>,
    stream: Stream,
    version: Option<Version>,
    refusal: Refusal,
    direction: Direction,
) {
    worker.ctx.metrics.refused(direction, refusal.reason.code());
    tracing::debug!(reason = %refusal.reason, text = %refusal.text, "refused");
    match version {
        Some(version) => serve(worker, stream, version, Handler::Refuse(refusal), None).await,
        None => stream.reset_on_close(),
    }
}

/// Whether the leaf behind a connection ends soon.
pub(crate) fn ends_soon(validity: Validity) -> bool {
    validity.move_at <= SystemTime::now()
}
