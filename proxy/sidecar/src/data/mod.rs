//! The path of a connection through one worker thread.
//!
//! - outbound: `accept` (here) -> resolve -> `detect` -> balance -> connect (`outbound`; for requests `exchange`)
//! - inbound: `accept` (here) -> handshake (`tls`, `session`) -> authorize -> forward (`inbound`; for requests `exchange`)
//!
//! What a connection turns out to be is in `serve`: HTTP (`h1`, `h2`) or bytes (`relay`), each above a `wire`. A request is an
//! `exchange` between two `leg`s; `message` cleans its heads, `pool` and `apps` keep the connections to endpoints, and
//! the `turn` of the run queue sends what was written. Refusals are made in `reasons`.
//!
//! Everything on a thread is in [`Worker`], in `Rc` and cells. Each connection is a task, requests are not; a panic
//! ends the exchange or the connection that it is in, only.

mod alarm;
mod apps;
mod authorize;
mod balance;
mod buffers;
mod carry;
mod decisions;
mod detect;
mod exchange;
mod exchanges;
mod h1;
mod h2;
mod health;
mod inbound;
mod leg;
mod line;
mod message;
mod outbound;
mod pool;
mod reasons;
mod relay;
mod serve;
mod session;
mod tls;
mod turn;
mod view;
mod wire;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::Future,
    io,
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use outrigger_core::{balance::Balancer, speaks_first::Memory};
use outrigger_http::{fields::Fields, h2::Heads, head::RequestHead};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::spawn_local,
    time::{sleep, timeout},
};

use self::{
    alarm::Alarm,
    apps::Apps,
    balance::Shared,
    decisions::Decisions,
    exchanges::{Exchanges, Key},
    pool::Pool,
    serve::{Connection, Next},
    session::Gate,
    turn::Turn,
};
use crate::{
    config::ConfigDuration,
    context::Context,
    drain::{Phase, Side, Work},
    metrics::{Direction, Edge},
    workers::Listeners,
};

/// Between two rounds of the worker's own chores, at most and at least. Time-outs are as precise as that, or as a quarter
/// of the shortest of them.
const TICK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(10));

/// Clients' budgets are filled up once in this time; a little less, so that rounds of [`TICK`] do not miss every other.
const SECOND: Duration = Duration::from_millis(950);

/// How long `accept` pauses when the process is out of descriptors or memory: at first, and at most. Long enough not to
/// spin, short enough to recover within a second of a release.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// Balancers and edges kept for services that are not in use at the moment.
const MAX_KEPT: usize = 1024;

/// How long connections that have nothing left to do may take to say so to their peers.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Everything of one thread.
pub(crate) struct Worker {
    pub(crate) ctx: Arc<Context>,
    pub(crate) listeners: Listeners,
    pub(crate) pool: Pool,
    pub(crate) apps: Apps,
    pub(crate) rng: RefCell<fastrand::Rng>,
    /// Who spoke first, by service and port.
    pub(crate) outbound_memory: RefCell<Memory<(Arc<str>, u16)>>,
    /// The same, by the workload's own port.
    pub(crate) inbound_memory: RefCell<Memory<u16>>,
    /// What access policies have decided.
    decisions: RefCell<Decisions>,
    pub(crate) exchanges: Exchanges,
    pub(crate) turn: Turn,
    pub(crate) alarm: Alarm,
    /// Admits handshakes.
    pub(crate) gate: Gate,
    /// Heads that HTTP/2 connections read into.
    pub(crate) heads: RefCell<Heads>,
    /// Heads and trailers that HTTP/1.x connections read into.
    pub(crate) spare_request: RefCell<RequestHead>,
    pub(crate) spare_trailers: RefCell<Fields>,
    pub(crate) no_trailers: Fields,
    /// Exchanges that have begun in the bytes that are being looked at.
    pub(crate) fresh: RefCell<Vec<Key>>,
    /// This round of chores is the first one of a second.
    new_second: Cell<bool>,
    /// Streams that clients have reset in this second.
    resets: Cell<u32>,
    /// Connections that are served, looked at now and then.
    served: RefCell<Listed>,
    busy: [RefCell<(usize, Option<Work>)>; 2],
    services: RefCell<HashMap<Arc<str>, Rc<Shared>>>,
    edges: RefCell<HashMap<EdgeKey, Rc<Edge>>>,
    identity: RefCell<Identity>,
    /// Held by each copy for a mirror that is under way.
    mirroring: Rc<()>,
    leaving: Cell<bool>,
    /// Connections to endpoints that have left their pool and still serve.
    retired: RefCell<Vec<Rc<h2::H2>>>,
    connections: Cell<usize>,
    connection_ended: Notify,
}

#[derive(Default)]
struct Listed {
    places: Vec<Option<Connection>>,
    free: Vec<usize>,
}

type EdgeKey = (bool, Arc<str>, Option<Arc<str>>);

/// Our own identity and the trust bundle's epoch, as of the credentials' epoch.
#[derive(Default)]
struct Identity {
    credentials: Option<u64>,
    own: Option<Arc<str>>,
    trust: u64,
}

/// Serves until the drain is over. Needs a runtime that spawns local tasks, one for each thread.
pub async fn run(ctx: Arc<Context>, listeners: Listeners) {
    let worker = Rc::new(Worker::new(ctx, listeners));
    let Listeners { outbound, inbound, upstreams, inbounds } = &worker.listeners;
    for at in 0..outbound.len() {
        worker.listen(Direction::Outbound, move |l| &l.outbound[at], outbound::transparent);
    }
    for at in 0..inbound.len() {
        worker.listen(Direction::Inbound, move |l| &l.inbound[at], inbound::transparent);
    }
    for at in 0..upstreams.len() {
        let serve = move |worker, stream| outbound::upstream(worker, stream, at);
        worker.listen(Direction::Outbound, move |l| &l.upstreams[at].1, serve);
    }
    for at in 0..inbounds.len() {
        let serve = move |worker, stream| inbound::explicit(worker, stream, at);
        worker.listen(Direction::Inbound, move |l| &l.inbounds[at].1, serve);
    }
    let chores = worker.clone().chores();
    let turns = worker.clone().turns();
    let alarms = worker.clone().alarms();
    let health = worker.clone().health_checks();
    let over = async {
        worker.ctx.drain.reached(Phase::Outbound).await;
        tokio::select! {
            () = worker.ended() => {}
            () = async {
                worker.ctx.drain.reached(Phase::Now).await;
                // What is under way has ended or is to be cut; connections between requests still say goodbye.
                let _ = timeout(LAST_WORDS, worker.ended()).await;
            } => {}
        }
    };
    tokio::select! {
        () = chores => {}
        () = turns => {}
        () = alarms => {}
        () = health => {}
        () = over => {}
    }
}

impl Worker {
    fn new(ctx: Arc<Context>, listeners: Listeners) -> Self {
        Self {
            ctx,
            listeners,
            pool: Pool::default(),
            apps: Apps::default(),
            rng: RefCell::new(fastrand::Rng::new()),
            outbound_memory: RefCell::default(),
            inbound_memory: RefCell::default(),
            decisions: RefCell::default(),
            exchanges: Exchanges::default(),
            turn: Turn::default(),
            alarm: Alarm::default(),
            gate: Gate::default(),
            heads: RefCell::default(),
            spare_request: RefCell::default(),
            spare_trailers: RefCell::default(),
            no_trailers: Fields::default(),
            fresh: RefCell::default(),
            new_second: Cell::new(false),
            resets: Cell::new(0),
            served: RefCell::default(),
            busy: Default::default(),
            services: RefCell::default(),
            edges: RefCell::default(),
            identity: RefCell::default(),
            mirroring: Rc::default(),
            leaving: Cell::new(false),
            retired: RefCell::default(),
            connections: Cell::new(0),
            connection_ended: Notify::new(),
        }
    }

    /// Runs a task. A panic ends it alone, and is counted.
    pub(crate) fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        let worker = self.clone();
        spawn_local(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                worker.ctx.metrics.panicked();
            }
        });
    }

    /// Accepts connections and runs `serve` for each.
    fn listen<F>(
        self: &Rc<Self>,
        direction: Direction,
        listener: impl Fn(&Listeners) -> &TcpListener + 'static,
        serve: impl Fn(Rc<Self>, TcpStream) -> F + 'static,
    ) where
        F: Future<Output = Next> + 'static,
    {
        let worker = self.clone();
        self.spawn(async move {
            let mut pause = ACCEPT_PAUSE.0;
            loop {
                let accepted = tokio::select! {
                    accepted = listener(&worker.listeners).accept() => accepted,
                    () = worker.ctx.drain.reached(Phase::Outbound) => return,
                };
                match accepted {
                    Ok((stream, _)) => {
                        pause = ACCEPT_PAUSE.0;
                        worker.admit(direction, stream, &serve);
                    }
                    Err(error) => {
                        worker.ctx.metrics.accept_failed();
                        if is_exhausted(&error) {
                            tracing::warn!(%error, "cannot accept connections: raise the limit of open files or memory");
                            sleep(pause).await;
                            pause = (pause * 2).min(ACCEPT_PAUSE.1);
                        }
                    }
                }
            }
        });
    }

    fn admit<F>(
        self: &Rc<Self>,
        direction: Direction,
        stream: TcpStream,
        serve: &impl Fn(Rc<Self>, TcpStream) -> F,
    ) where
        F: Future<Output = Next> + 'static,
    {
        let metrics = &self.ctx.metrics;
        let Some(admission) = metrics.admit(self.ctx.config.limits.connections as usize) else {
            metrics.refused(direction, outrigger_core::reason::Reason::Overloaded.code());
            wire::reset_on_close(&stream);
            return;
        };
        tls::configure(&stream, &self.ctx.config.timeouts);
        let open = metrics.connection(direction, "accepted");
        self.connections.set(self.connections.get() + 1);
        let ended = Ended(self.clone());
        // Boxed, so that what found out what it is does not stay part of the task.
        let serve = Box::pin(serve(self.clone(), stream));
        let worker = self.clone();
        self.spawn(async move {
            let _guards = (admission, open, ended);
            serve.await.run(worker).await;
        });
    }

    /// Waits until no accepted connection is left.
    async fn ended(&self) {
        while self.connections.get() > 0 {
            self.connection_ended.notified().await;
        }
    }

    /// What has to be done now and then, for ever.
    async fn chores(self: Rc<Self>) {
        let pace = self.pace();
        let mut policies = self.ctx.inbound.changes();
        let mut phase = Phase::Serving;
        let mut second = Instant::now();
        loop {
            self.notice_leaving();
            let now = Instant::now();
            // Not each round: budgets are per second, and rounds may be much shorter.
            self.new_second.set(now.saturating_duration_since(second) >= SECOND);
            if self.new_second.get() {
                second = now;
                self.resets.set(0);
            }
            self.sweep_served(now);
            for key in self.exchanges.keys() {
                self.with(key, |exchange, worker| exchange.sweep(worker, now));
            }
            self.exchanges.sweep();
            self.pool.sweep(&self, now);
            self.retired.borrow_mut().retain(|connection| {
                connection.sweep(&self, now);
                connection.is_alive()
            });
            self.apps.sweep(now);
            self.services.borrow_mut().retain_used(MAX_KEPT);
            self.edges.borrow_mut().retain_used(MAX_KEPT);
            let next = match phase {
                Phase::Serving => Phase::Inbound,
                Phase::Inbound => Phase::Outbound,
                Phase::Outbound | Phase::Now => Phase::Now,
            };
            tokio::select! {
                () = sleep(pace) => {}
                // What is under way is judged by the new one at once.
                _ = policies.changed() => {}
                () = self.ctx.drain.reached(next), if phase < Phase::Now => phase = self.ctx.drain.phase(),
            }
        }
    }

    /// How often time-outs are looked at.
    fn pace(&self) -> Duration {
        let timeouts = &self.ctx.config.timeouts;
        let all = [
            timeouts.request,
            timeouts.idle,
            timeouts.headers,
            timeouts.ping_interval,
            timeouts.ping_timeout,
        ];
        let shortest = all.into_iter().filter_map(ConfigDuration::enabled).min().unwrap_or(TICK.0);
        (shortest / 4).clamp(TICK.1, TICK.0)
    }

    fn sweep_served(&self, now: Instant) {
        let count = self.served.borrow().places.len();
        for at in 0..count {
            let connection = self.served.borrow().places.get(at).cloned().flatten();
            if let Some(connection) = connection {
                connection.sweep(self, now);
            }
        }
        let mut served = self.served.borrow_mut();
        if served.free.len() == served.places.len() {
            *served = Listed::default();
        }
    }

    /// Has a connection looked at now and then, while the guard lives.
    pub(crate) fn list(self: &Rc<Self>, connection: Connection) -> ListGuard {
        let mut served = self.served.borrow_mut();
        let at = served.free.pop().unwrap_or_else(|| {
            served.places.push(None);
            served.places.len() - 1
        });
        served.places[at] = Some(connection);
        ListGuard { worker: self.clone(), at }
    }

    /// Looks after a connection to an endpoint until it has ended, outside of its pool.
    pub(crate) fn retire(&self, connection: &Rc<h2::H2>) {
        connection.retire(self);
        self.look_after(connection);
    }

    /// The same for one that ends already.
    pub(crate) fn look_after(&self, connection: &Rc<h2::H2>) {
        self.retired.borrow_mut().push(connection.clone());
    }

    /// Counts a piece of work for the drain, while the guard lives. Threads meet only when one begins or stops to be
    /// busy.
    pub(crate) fn busy(self: &Rc<Self>, side: Side) -> Busy {
        let mut busy = self.busy[side as usize].borrow_mut();
        if busy.0 == 0 {
            busy.1 = Some(self.ctx.drain.work(side));
        }
        busy.0 += 1;
        Busy { worker: self.clone(), side }
    }

    /// Whether what is bounded per second begins anew in this round of chores.
    pub(crate) fn is_new_second(&self) -> bool {
        self.new_second.get()
    }

    /// Counts a stream that a client has reset; returns how many there were in this second.
    pub(crate) fn counts_reset(&self) -> u32 {
        self.resets.set(self.resets.get().saturating_add(1));
        self.resets.get()
    }

    fn notice_leaving(&self) {
        self.leaving.set(self.ctx.inbound.load().terminating || self.ctx.drain.phase() >= Phase::Inbound);
    }

    /// Whether the workload is about to end.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// Our own SPIFFE id, and the trust bundle's epoch.
    pub(crate) fn identity(&self) -> (Option<Arc<str>>, u64) {
        let credentials = &self.ctx.credentials;
        let epoch = credentials.epoch();
        let mut identity = self.identity.borrow_mut();
        if identity.credentials != Some(epoch) {
            *identity = Identity {
                credentials: Some(epoch),
                own: credentials.leaf().map(|leaf| leaf.id().as_str().into()),
                trust: credentials.trust_epoch(),
            };
        }
        (identity.own.clone(), identity.trust)
    }

    /// What this thread knows of a service.
    pub(crate) fn service(&self, name: &Arc<str>) -> Rc<Shared> {
        let mut services = self.services.borrow_mut();
        let service = services.entry(name.clone()).or_insert_with(|| {
            let own = self.identity().0.unwrap_or_default();
            let most = self.ctx.config.limits.endpoints_per_service.into();
            let live = self.ctx.lives.of(name);
            let balancer = Balancer::new(&format!("{own} {}", host_name()), most, live.clone())
                .in_zone(self.ctx.inbound.load().zone.as_str().into());
            Rc::new(Shared::new(balancer, live, self.edge(Direction::Outbound, name, None)))
        });
        service.clone()
    }

    /// This thread's handles of an edge.
    pub(crate) fn edge(&self, direction: Direction, service: &Arc<str>, peer: Option<&Arc<str>>) -> Rc<Edge> {
        let key = (direction == Direction::Inbound, service.clone(), peer.cloned());
        let mut edges = self.edges.borrow_mut();
        let make = || Rc::new(self.ctx.metrics.edge(direction, service, peer.map(|peer| &**peer)));
        edges.entry(key).or_insert_with(make).clone()
    }
}

/// An accepted connection, until it ends.
struct Ended(Rc<Worker>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
        self.0.connection_ended.notify_one();
    }
}

/// A connection on the worker's list.
pub(crate) struct ListGuard {
    worker: Rc<Worker>,
    at: usize,
}

impl Drop for ListGuard {
    fn drop(&mut self) {
        let mut served = self.worker.served.borrow_mut();
        let connection = served.places[self.at].take();
        served.free.push(self.at);
        drop(served);
        // Outside of the borrow: it may be the last handle.
        drop(connection);
    }
}

/// A piece of work that is under way.
pub(crate) struct Busy {
    worker: Rc<Worker>,
    side: Side,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut busy = self.worker.busy[self.side as usize].borrow_mut();
        busy.0 -= 1;
        if busy.0 == 0 {
            busy.1 = None;
        }
    }
}

trait RetainUsed {
    /// Drops what nobody holds, once there is more than `most`.
    fn retain_used(&mut self, most: usize);
}

impl<K, V> RetainUsed for HashMap<K, Rc<V>> {
    fn retain_used(&mut self, most: usize) {
        if self.len() > most {
            self.retain(|_, value| Rc::strong_count(value) > 1);
        }
    }
}

/// What tells this host from others with the same identity; the same for all threads.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Whether an error of `accept` lasts until something is released. The others concern one connection.
fn is_exhausted(error: &io::Error) -> bool {
    // EMFILE, ENFILE, ENOBUFS, ENOMEM, for which std has no names.
    matches!(error.raw_os_error(), Some(24 | 23 | 105 | 12))
}

#[cfg(test)]
mod tests {
    use outrigger_certs::{CertificateAuthority, TrustDomain};

    use super::*;
    use crate::config::Config;

    fn worker() -> Rc<Worker> {
        let domain: TrustDomain = "outrigger.local".parse().unwrap();
        let store = CertificateAuthority::generate_pem(&domain).unwrap();
        let bundle = CertificateAuthority::from_store(&store, &domain).unwrap().bundle().clone();
        Rc::new(Worker::new(Arc::new(Context::new(Config::default(), bundle).0), Listeners::default()))
    }

    #[test]
    fn a_panic_ends_its_own_task_and_is_counted() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default())
            .unwrap();
        runtime.block_on(async {
            let worker = worker();
            let (done, other) = tokio::sync::oneshot::channel();
            worker.spawn(async { std::panic::resume_unwind(Box::new("a fault in one connection")) });
            worker.spawn(async move { done.send("served").unwrap() });
            assert_eq!(other.await, Ok("served"));
            assert!(worker.ctx.metrics.encode().contains("outrigger_panics_total 1"));
        });
    }
}
