//! The field of these tests: two sidecars with three doors, applications behind them, and the well-behaved client that
//! an attack must not hurt.

use std::{
    convert::Infallible,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::{body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_core::model::Protocol;
use outrigger_proxy::config::{Config, Mtls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, SemaphorePermit},
};

use crate::frames::Peer;
pub(crate) use crate::harness::*;

/// What an attack may cost in memory.
const MOST_GROWTH: u64 = 64 * 1024 * 1024;

/// The well-behaved client's slowest hundredth, at most. It should stay below three times what it is in peace, but a
/// machine with other work would break such a promise; that ratio is printed.
const SLOWEST: Duration = Duration::from_secs(1);

/// How long the end of a connection is waited for.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// Requests of the well-behaved client in peace, and at least under attack.
const IN_PEACE: usize = 30;
const UNDER_ATTACK: usize = 100;

/// Attacks at once: each has threads of its own, and heavy ones want the machine for themselves.
const AT_ONCE: u32 = 2;
static TURN: Semaphore = Semaphore::const_new(AT_ONCE as usize);

/// Panics on threads without a name, which are the sidecars' workers.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Who watches while a test attacks.
pub(crate) struct Siege<'a> {
    sidecars: Vec<&'a Sidecar>,
    client: Option<JoinHandle<()>>,
    watch: Arc<Watch>,
    peace: usize,
    memory: u64,
    panics: usize,
    /// What is wrong in a table of cases: one run is to show all of it.
    faults: Vec<String>,
    begun: Instant,
    _turn: SemaphorePermit<'static>,
}

#[derive(Default)]
struct Watch {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    latencies: Vec<Duration>,
    failures: Vec<String>,
    memory: u64,
}

impl Watch {
    fn note(&self, latency: Duration, result: Result<(), String>) {
        let mut seen = self.seen.lock().unwrap();
        match result {
            Ok(()) => seen.latencies.push(latency),
            Err(error) => seen.failures.push(format!("after {latency:?}: {error}")),
        }
        seen.memory = seen.memory.max(memory());
    }
}

/// What the well-behaved client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    Http1,
    Http2,
}

/// Both: for applications that serve both.
pub(crate) const BOTH: &[Speaks] = &[Speaks::Http1, Speaks::Http2];

impl<'a> Siege<'a> {
    /// Begins to watch; `address` leads through `sidecars` to an application that answers `/good`.
    pub(crate) async fn begin(
        sidecars: impl IntoIterator<Item = &'a Sidecar>,
        address: SocketAddr,
        speaks: &'static [Speaks],
    ) -> Self {
        Self::take(1, sidecars, address, speaks).await
    }

    /// The same with no other attack beside it.
    pub(crate) async fn heavy(
        sidecars: impl IntoIterator<Item = &'a Sidecar>,
        address: SocketAddr,
        speaks: &'static [Speaks],
    ) -> Self {
        Self::take(AT_ONCE, sidecars, address, speaks).await
    }

    async fn take(
        turns: u32,
        sidecars: impl IntoIterator<Item = &'a Sidecar>,
        address: SocketAddr,
        speaks: &'static [Speaks],
    ) -> Self {
        count_panics();
        let turn = TURN.acquire_many(turns).await.unwrap();
        let panics = PANICS.load(Ordering::SeqCst);
        let watch = Arc::new(Watch::default());
        let watching = watch.clone();
        let client = std::thread::Builder::new()
            .name("the well-behaved client".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(work(address, speaks, &watching));
            })
            .unwrap();
        let mut siege = Self {
            sidecars: sidecars.into_iter().collect(),
            client: Some(client),
            watch,
            peace: 0,
            memory: 0,
            panics,
            faults: Vec::new(),
            begun: Instant::now(),
            _turn: turn,
        };
        siege.worked(IN_PEACE).await;
        let mut seen = siege.watch.seen.lock().unwrap();
        siege.peace = seen.latencies.len();
        seen.memory = memory();
        siege.memory = seen.memory;
        drop(seen);
        siege
    }

    async fn worked(&self, requests: usize) {
        eventually("the well-behaved client's requests", || {
            let seen = self.watch.seen.lock().unwrap();
            seen.latencies.len() + seen.failures.len() >= requests
        })
        .await;
    }

    /// Notes a fault that does not end the test at once.
    pub(crate) fn check(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.faults.push(fault());
        }
    }

    /// Ends the watch: no fault was noted, nobody panicked, memory did not grow, and the well-behaved client noticed nothing.
    pub(crate) async fn lift(mut self) {
        self.worked(self.peace + UNDER_ATTACK).await;
        self.watch.stop.store(true, Ordering::SeqCst);
        let client = self.client.take().expect("a siege is lifted once");
        // Not on this thread: an application here may owe the client its last answer.
        let ended = tokio::task::spawn_blocking(|| client.join());
        soon("the well-behaved client's end", ended).await.unwrap().expect("the well-behaved client lives");
        let seen = std::mem::take(&mut *self.watch.seen.lock().unwrap());
        let (peace, attack) = seen.latencies.split_at(self.peace);
        let (calm, slow) = (slowest_hundredth(peace), slowest_hundredth(attack));
        let grown = seen.memory.max(memory()).saturating_sub(self.memory);
        println!(
            "{:?}: {} requests under attack, {} failed; p99 {slow:?}, in peace {calm:?}; memory + {} KiB",
            self.begun.elapsed(),
            attack.len(),
            seen.failures.len(),
            grown / 1024,
        );
        for failure in seen.failures.iter().take(3) {
            println!("{failure}");
        }
        assert!(self.faults.is_empty(), "{} faults:\n{}", self.faults.len(), self.faults.join("\n"));
        let failed = seen.failures.len();
        assert!(failed * 1000 <= attack.len(), "{failed} of {}: {:?}", attack.len(), seen.failures[0]);
        assert!(slow <= SLOWEST, "the well-behaved client waited {slow:?}, in peace {calm:?}");
        assert!(grown <= MOST_GROWTH, "memory grew by {} MiB", grown / 1024 / 1024);
        for sidecar in &self.sidecars {
            let metrics = sidecar.metrics();
            assert!(metrics.contains("outrigger_panics_total 0\n"), "{metrics}");
        }
        assert_eq!(PANICS.load(Ordering::SeqCst), self.panics, "a worker's task panicked");
    }
}

impl Drop for Siege<'_> {
    fn drop(&mut self) {
        self.watch.stop.store(true, Ordering::SeqCst);
    }
}

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name().is_none() {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            usual(panic);
        }));
    });
}

fn slowest_hundredth(latencies: &[Duration]) -> Duration {
    let mut sorted = latencies.to_vec();
    sorted.sort();
    sorted.get(sorted.len() * 99 / 100).copied().unwrap_or_default()
}

/// This process's resident bytes: sidecars, applications and attackers together.
fn memory() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Asks for `/good` until told to stop.
async fn work(address: SocketAddr, speaks: &[Speaks], watch: &Watch) {
    let (mut one, mut two) = (None, None);
    for at in 0.. {
        if watch.stop.load(Ordering::SeqCst) {
            return;
        }
        let begun = Instant::now();
        let asked = async {
            match speaks[at % speaks.len()] {
                Speaks::Http1 => {
                    let ready = match &mut one {
                        Some(sender) => Http1::ready(sender).await.is_ok(),
                        None => false,
                    };
                    if !ready {
                        one = Some(http1(address).await);
                    }
                    one.as_mut().unwrap().send_request(get("/good")).await
                }
                Speaks::Http2 => {
                    let ready = match &mut two {
                        Some(sender) => Http2::ready(sender).await.is_ok(),
                        None => false,
                    };
                    if !ready {
                        two = Some(http2(address).await);
                    }
                    two.as_mut().unwrap().send_request(get("http://app.example/good")).await
                }
            }
        };
        let answered = async {
            let response = asked.await.map_err(|error| format!("{error:?}"))?;
            let (head, body) = response.into_parts();
            let body = body.collect().await.map_err(|error| format!("{error:?}"))?.to_bytes();
            if head.status == 200 && body == "good" { Ok(()) } else { Err(format!("{head:?} {body:?}")) }
        };
        let result = tokio::time::timeout(PATIENCE / 2, answered).await;
        watch.note(begun.elapsed(), result.unwrap_or_else(|_| Err("no answer in time".to_owned())));
        // Its pace.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Two sidecars around an application, and one that reaches the application in clear.
pub(crate) struct Field {
    pub(crate) pair: Pair,
    pub(crate) direct: Sidecar,
    /// Leads to the application in clear.
    pub(crate) in_clear: SocketAddr,
}

/// The server's sidecar takes plaintext as well.
pub(crate) fn field(application: SocketAddr) -> Field {
    field_with(application, |_| {})
}

/// The same with a configuration for all three.
pub(crate) fn field_with(application: SocketAddr, change: impl Fn(&mut Config)) -> Field {
    // The peers of these tests do not answer pings.
    let change = |config: &mut Config| {
        config.timeouts.ping_interval = millis(0);
        change(config);
    };
    let permissive = |config: &mut Config| {
        config.mtls = Mtls::Permissive;
        config.timeouts.detect = millis(50);
        change(config);
    };
    let pair = pair_with(application, Protocol::Detect, change, permissive);
    let mut direct = config();
    change(&mut direct);
    let endpoints = vec![endpoint("one", application, None)];
    let service = service(Protocol::Detect, endpoints);
    let (direct, in_clear, _) = Sidecar::client(Ca::new().context("client", direct), service);
    Field { pair, direct, in_clear }
}

/// A way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// The workload's own side: the client's sidecar, mutual TLS, the server's sidecar.
    Outbound,
    /// The same without a sidecar at the other end.
    InClear,
    /// The server's sidecar, in plaintext.
    Plain,
    /// The server's sidecar, from a peer with a certificate. HTTP/2 only.
    Mesh,
}

impl Field {
    pub(crate) fn sidecars(&self) -> [&Sidecar; 3] {
        [&self.pair.client, &self.pair.server, &self.direct]
    }

    pub(crate) fn address(&self, door: Door) -> SocketAddr {
        match door {
            Door::Outbound => self.pair.address,
            Door::InClear => self.in_clear,
            Door::Plain | Door::Mesh => self.pair.inbound,
        }
    }

    /// An HTTP/2 client at a door.
    pub(crate) async fn peer(&self, door: Door, settings: &[(u16, u32)]) -> Peer {
        match door {
            Door::Mesh => Peer::dial(mesh_tls(&self.pair).await, settings).await,
            _ => Peer::dial(TcpStream::connect(self.address(door)).await.unwrap(), settings).await,
        }
    }

    /// The same, reading nothing.
    pub(crate) async fn deaf_peer(&self, door: Door) -> Peer {
        match door {
            Door::Mesh => Peer::dial_unread(mesh_tls(&self.pair).await, &[]).await,
            _ => Peer::dial_unread(TcpStream::connect(self.address(door)).await.unwrap(), &[]).await,
        }
    }

    /// Every sidecar's metrics.
    pub(crate) fn metrics(&self) -> String {
        self.sidecars().map(Sidecar::metrics).concat()
    }

    /// Watches `self` under attack.
    pub(crate) async fn besiege(&self, speaks: &'static [Speaks]) -> Siege<'_> {
        Siege::begin(self.sidecars(), self.pair.address, speaks).await
    }

    pub(crate) async fn besiege_heavily(&self, speaks: &'static [Speaks]) -> Siege<'_> {
        Siege::heavy(self.sidecars(), self.pair.address, speaks).await
    }
}

/// Doors for HTTP/1.1.
pub(crate) const H1_DOORS: [Door; 3] = [Door::Outbound, Door::InClear, Door::Plain];

/// Doors for HTTP/2.
pub(crate) const H2_DOORS: [Door; 3] = [Door::Outbound, Door::Mesh, Door::Plain];

/// What the application saw.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Requests, without those for `/good`.
    pub(crate) asked: AtomicUsize,
    /// Of these, under way.
    pub(crate) live: AtomicUsize,
    /// Requests for `/never`.
    pub(crate) never: AtomicUsize,
}

impl Tally {
    /// Waits until nothing is under way.
    pub(crate) async fn idle(&self) {
        let ended = async {
            while self.live.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let ended = tokio::time::timeout(PATIENCE / 2, ended).await.is_ok();
        let live = self.live.load(Ordering::SeqCst);
        assert!(ended, "{live} of {} requests live on in the application", self.asked());
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// No request for `/never` has arrived.
    #[track_caller]
    pub(crate) fn assert_never(&self, what: &impl fmt::Debug) {
        assert_eq!(self.never.load(Ordering::SeqCst), 0, "{what:?} reached the application");
    }
}

/// A request under way.
struct Live(Arc<Tally>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A well-behaved application that serves both versions of HTTP:
/// - `/good`: four bytes;
/// - `/slow`: never an answer;
/// - `/big/<n>`: so many KiB;
/// - `/endless`: a body without end;
/// - `/echo`: how many bytes the request had;
/// - `/never`: what must not arrive.
pub(crate) async fn application() -> (SocketAddr, Arc<Tally>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tally = Arc::new(Tally::default());
    let shared = tally.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve_well(stream, shared.clone()));
        }
    });
    (address, tally)
}

/// Serves one connection of [`application`].
pub(crate) async fn serve_well(stream: TcpStream, tally: Arc<Tally>) {
    let service = service_fn(move |request| {
        let tally = tally.clone();
        async move { Ok::<_, Infallible>(answer(request, tally).await) }
    });
    let is_http2 = speaks_http2(&stream).await;
    let io = TokioIo::new(stream);
    if is_http2 {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .enable_connect_protocol()
            // The application is to bear what it is sent; the tests are about who is in front of it.
            .max_concurrent_streams(10_000)
            // Its memory is measured with that of the sidecars.
            .max_send_buf_size(16 * 1024)
            .max_pending_accept_reset_streams(100_000)
            .max_local_error_reset_streams(None)
            .serve_connection(io, service)
            .await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .half_close(true)
            .max_buf_size(256 * 1024)
            .max_headers(1024)
            .serve_connection(io, service)
            .await;
    }
}

/// Whether a connection begins with the preface, of which three bytes tell it from every method.
pub(crate) async fn speaks_http2(stream: &TcpStream) -> bool {
    let mut first = [0; 3];
    loop {
        match stream.peek(&mut first).await {
            Ok(3) => return &first == b"PRI",
            Ok(1..) => tokio::time::sleep(Duration::from_millis(1)).await,
            _ => return false,
        }
    }
}

async fn answer(request: Request<Incoming>, tally: Arc<Tally>) -> Answer {
    let path = request.uri().path().to_owned();
    if path == "/good" {
        return Response::new(full("good"));
    }
    tally.asked.fetch_add(1, Ordering::SeqCst);
    tally.live.fetch_add(1, Ordering::SeqCst);
    if path == "/never" {
        tally.never.fetch_add(1, Ordering::SeqCst);
    }
    let live = Live(tally);
    if path == "/slow" {
        std::future::pending::<()>().await;
    }
    if path == "/echo" {
        let bytes = request.into_body().collect().await.map(|body| body.to_bytes().len());
        return Response::new(full(format!("{bytes:?}")));
    }
    let kib = match path.strip_prefix("/big/") {
        Some(kib) => kib.parse().unwrap(),
        None if path == "/endless" => usize::MAX,
        None => 1,
    };
    // In few pieces, but for those that are not whole.
    let (block, blocks) = if kib % 16 == 0 || kib == usize::MAX { (16, kib / 16) } else { (1, kib) };
    let block = Bytes::from_static(&[b'x'; 16 * 1024]).slice(..block * 1024);
    let frames = std::iter::repeat_n(block, blocks).map(move |block| {
        let _lives_as_long_as_the_body = &live;
        Ok::<_, Infallible>(Frame::data(block))
    });
    let mut response = Response::new(StreamBody::new(tokio_stream::iter(frames)).boxed());
    if kib != usize::MAX {
        response.headers_mut().insert("content-length", (kib * 1024).into());
    }
    response
}

/// Said of a connection that should have ended.
const STILL_OPEN: &str = " [still open]";

/// Sends bytes as an HTTP/1.1 client would, reads all that comes until the other side closes, and says what it was.
/// A reset after an answer is an end, too. What does not end is cut off, and said to be open still.
pub(crate) async fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let mut answer = Vec::new();
    let reading = async {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = read.read(&mut buffer).await {
            answer.extend_from_slice(&buffer[..read]);
        }
    };
    let writing = async {
        // Who is refused early cannot write to the end.
        let _ = write.write_all(request).await;
        std::future::pending::<()>().await;
    };
    let is_open = tokio::time::timeout(ENDS_WITHIN, async {
        tokio::select! {
            () = reading => {}
            () = writing => {}
        }
    })
    .await
    .is_err();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    if is_open { answer + STILL_OPEN } else { answer }
}

/// Whether this is one answer with one of these statuses, nothing after it, and the end of the connection.
pub(crate) fn is_refused(answer: &str, statuses: &[&str]) -> bool {
    let status = answer.strip_prefix("HTTP/1.1 ").or_else(|| answer.strip_prefix("HTTP/1.0 "));
    let status = status.and_then(|rest| rest.get(..3)).unwrap_or_default();
    // A reason may speak of HTTP/1.1, too.
    let lines = ["HTTP/1.1 ", "HTTP/1.0 "].into_iter().flat_map(|version| answer.split(version).skip(1));
    let answers = lines.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())).count();
    statuses.contains(&status) && answers == 1 && !answer.ends_with(STILL_OPEN)
}

#[track_caller]
pub(crate) fn assert_refused(what: &impl fmt::Debug, answer: &str, statuses: &[&str]) {
    assert!(is_refused(answer, statuses), "{what:?} -> {answer:?}");
}

impl Field {
    /// Whether a reason stands in an answer or, where whoever asked is not told, in a metric.
    pub(crate) fn says_why(&self, answer: &str, reason: &str) -> bool {
        let told = answer.contains(&format!("outrigger-reason: proxy; {reason};"));
        told || self.metrics().contains(&format!("\"{reason}\""))
    }
}
