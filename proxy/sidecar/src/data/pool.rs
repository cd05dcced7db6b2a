//! HTTP/2 connections to endpoints, shared by all requests of one thread that agree on the key.
//!
//! One connection per key while its streams last, another when they are used up. Exchanges that need a connection while one is
//! being made wait for that one: a burst after a restart makes one handshake, not a thousand. The connection is made
//! by a task of its own, so that a caller who gives up does not take it away from the others.
//!
//! A connection leaves the pool when its peer says so (GOAWAY), when it was idle, when either leaf nears its end, or
//! when our identity or the trust bundle changed. Requests on it finish: it closes with the last.

use std::{
    cell::RefCell,
    collections::HashMap,
    hash::{Hash, Hasher},
    net::SocketAddr,
    panic::AssertUnwindSafe,
    rc::Rc,
    time::{Duration, Instant, SystemTime},
};

use futures_util::FutureExt;
use outrigger_core::{bulkhead::Place, key::ConnectionKey, reason::Reason};
use tokio::task::spawn_local;

use super::{
    Worker,
    balance::Route,
    exchanges::Key,
    h2::H2,
    tls::{self, ClientConfigs, ConnectError, Whom},
    wire::Wire,
};
use crate::metrics::Direction;

/// A connection without a request is closed after this. Long enough for the pauses of a busy service, short enough
/// for peers to forget us.
const IDLE: Duration = Duration::from_mins(1);

/// Connections under one key: a peer that lets each have few streams must not cost us all our ports.
const MAX_CONNECTIONS: usize = 16;

/// How long the SETTINGS of a new connection are waited for, which say how many streams it takes and whether extended CONNECT
/// is served: longer than an application's pause, shorter than its callers' patience.
const SETTINGS_WAIT: Duration = Duration::from_secs(5);

/// What makes two connections interchangeable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PoolKey {
    /// Mutual TLS between sidecars.
    Mesh(ConnectionKey),
    /// In clear, to the own application or to an endpoint without a sidecar.
    Plain(SocketAddr),
}

/// By the address alone: who is there and which epoch it is seldom differs at one address, and each request hashes a key.
impl Hash for PoolKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::Mesh(key) => key.address.hash(state),
            Self::Plain(address) => address.hash(state),
        }
    }
}

/// What there is for an exchange.
pub(crate) enum Found {
    /// Streams can be opened on it.
    Connection(Rc<H2>),
    /// The peer has ended a connection since a request was last sent its way: its workload leaves.
    PeerLeft,
    /// The exchange is told when there is one.
    Connecting,
    /// There will be none.
    Nothing(ConnectError),
}

/// The connections of one thread.
#[derive(Default)]
pub(crate) struct Pool {
    slots: RefCell<HashMap<PoolKey, Slot>>,
    pub(crate) configs: RefCell<ClientConfigs>,
}

#[derive(Default)]
struct Slot {
    connections: Vec<Rc<H2>>,
    connecting: bool,
    waiting: Vec<Key>,
    /// Those that wait for a connection's SETTINGS, and until when.
    unsettled: Vec<(Key, Instant)>,
    /// The peer of one of the connections has said GOAWAY since somebody looked.
    peer_left: bool,
}

impl Slot {
    fn is_empty(&self) -> bool {
        self.connections.is_empty()
            && !self.connecting
            && self.waiting.is_empty()
            && self.unsettled.is_empty()
    }
}

impl Pool {
    /// A connection of this key with room for a stream; made if there is none. `route`: by which others could be found.
    pub(super) fn find(
        &self,
        worker: &Rc<Worker>,
        key: &PoolKey,
        waits: Key,
        route: Option<&Rc<Route>>,
    ) -> Found {
        let most = worker.ctx.config.limits.streams_per_connection;
        let most =
            route.and_then(|route| route.most_streams()).map_or(most, |bound| most.min(bound)) as usize;
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = slots.get_mut(key) {
            if std::mem::take(&mut slot.peer_left) && route.is_some() {
                return Found::PeerLeft;
            }
            let has_room = |c: &&Rc<H2>| c.available() > 0 && c.open_streams() < most;
            if let Some(connection) = slot.connections.iter().find(has_room) {
                return Found::Connection(connection.clone());
            }
            if slot.connections.iter().any(|connection| connection.is_unsettled()) {
                slot.unsettled.push((waits, Instant::now() + SETTINGS_WAIT));
                return Found::Connecting;
            }
        }
        let slot = slots.entry(key.clone()).or_default();
        if !slot.connecting {
            if slot.connections.len() >= MAX_CONNECTIONS {
                let text = format!("all streams of {MAX_CONNECTIONS} connections to the endpoint are in use");
                return Found::Nothing(ConnectError::new(Reason::Overloaded, text));
            }
            let place = match route.map(|route| route.holds_connection()).transpose() {
                Ok(place) => place,
                Err(refusal) => return Found::Nothing(ConnectError::new(refusal.reason, refusal.text)),
            };
            slot.connecting = true;
            let service = route.map_or("", |route| route.service()).to_owned();
            spawn_local(connecting(worker.clone(), key.clone(), service, place));
        }
        slot.waiting.push(waits);
        Found::Connecting
    }

    /// Has an exchange told when a connection's SETTINGS have come.
    pub(super) fn wait(&self, key: &PoolKey, waits: Key) {
        let until = Instant::now() + SETTINGS_WAIT;
        self.slots.borrow_mut().entry(key.clone()).or_default().unsettled.push((waits, until));
    }

    /// The SETTINGS of a connection have come.
    pub(super) fn settled(&self, worker: &Rc<Worker>, target: &PoolKey) {
        let waiting = self.slots.borrow_mut().get_mut(target).map(|slot| std::mem::take(&mut slot.unsettled));
        for (key, _) in waiting.into_iter().flatten() {
            worker.with(key, |exchange, worker| exchange.connected(worker, key, target, Ok(())));
        }
    }

    /// The peer of a connection said GOAWAY.
    pub(super) fn peer_leaves(&self, key: &PoolKey) {
        if let Some(slot) = self.slots.borrow_mut().get_mut(key) {
            slot.peer_left = true;
        }
    }

    /// Nothing is heard on a connection: what comes from now on makes another one, for a path that was cut and is whole again is
    /// found out by a new connection at once, by an old one when its next retransmission is due.
    pub(super) fn forget(&self, worker: &Worker, key: &PoolKey, connection: &Rc<H2>) {
        if let Some(slot) = self.slots.borrow_mut().get_mut(key) {
            slot.connections.retain(|other| !Rc::ptr_eq(other, connection));
        }
        worker.retire(connection);
    }

    /// A connection has gone. Those that wait for its SETTINGS begin anew.
    pub(super) fn ended(&self, worker: &Rc<Worker>, target: &PoolKey, connection: &Rc<H2>) {
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(target) else { return };
        slot.connections.retain(|other| !Rc::ptr_eq(other, connection));
        let mut waiting = Vec::new();
        if !slot.connections.iter().any(|connection| connection.is_unsettled()) {
            waiting = std::mem::take(&mut slot.unsettled);
        }
        if slot.is_empty() && !slot.peer_left {
            slots.remove(target);
        }
        drop(slots);
        for (key, _) in waiting {
            worker.with(key, |exchange, worker| exchange.connected(worker, key, target, Ok(())));
        }
    }

    /// Closes what has been idle for long and lets go of what has become out of date. Called about once a second.
    pub(super) fn sweep(&self, worker: &Rc<Worker>, now: Instant) {
        let wall = SystemTime::now();
        let (own, epoch) = worker.identity();
        let mut late = Vec::new();
        self.slots.borrow_mut().retain(|target, slot| {
            let current = match target {
                PoolKey::Mesh(key) => key.trust_epoch == epoch && Some(&key.own_identity) == own.as_ref(),
                PoolKey::Plain(_) => true,
            };
            slot.connections.retain(|connection| {
                connection.sweep(worker, now);
                let keep = current && !connection.is_idle(now, IDLE) && !connection.has_to_move(wall);
                if !keep {
                    worker.retire(connection);
                }
                keep
            });
            slot.unsettled.retain(|(key, until)| {
                let waits = now < *until;
                if !waits {
                    late.push((*key, target.clone()));
                }
                waits
            });
            !slot.is_empty()
        });
        for (key, target) in late {
            let error = ConnectError::new(Reason::UpstreamReset, "the endpoint sent no SETTINGS");
            worker.with(key, |exchange, worker| exchange.connected(worker, key, &target, Err(&error)));
        }
    }
}

/// Makes a connection and tells those who wait for it.
async fn connecting(worker: Rc<Worker>, target: PoolKey, service: String, place: Option<Place>) {
    // A panic in here must not leave the key without a way to connect again.
    let result = AssertUnwindSafe(Box::pin(connect(&worker, &target, &service, place))).catch_unwind().await;
    let result = result.unwrap_or_else(|_| {
        worker.ctx.metrics.panicked();
        Err(ConnectError::new(Reason::ConnectFailed, "internal error"))
    });
    let waiting = {
        let mut slots = worker.pool.slots.borrow_mut();
        let slot = slots.entry(target.clone()).or_default();
        slot.connecting = false;
        if let Ok(connection) = &result {
            slot.connections.push(connection.clone());
        }
        std::mem::take(&mut slot.waiting)
    };
    let error = match result {
        Ok(connection) => {
            worker.spawn(connection.run(worker.clone()));
            None
        }
        Err(error) => Some(error),
    };
    for key in waiting {
        let outcome = error.as_ref().map_or(Ok(()), Err);
        worker.with(key, |exchange, worker| exchange.connected(worker, key, &target, outcome));
    }
}

async fn connect(
    worker: &Rc<Worker>,
    key: &PoolKey,
    service: &str,
    place: Option<Place>,
) -> Result<Rc<H2>, ConnectError> {
    let metrics = &worker.ctx.metrics;
    let (wire, move_at, info) = match key {
        PoolKey::Mesh(key) => {
            let secured = tls::connect(worker, key).await.inspect_err(|error| {
                metrics.handshake_failed(Direction::Outbound, error.reason.code());
            })?;
            let info = metrics.mesh_connection(Direction::Outbound, service, &secured.facts);
            (secured.wire, Some(secured.move_at), Some(info))
        }
        PoolKey::Plain(address) => {
            (Wire::plain(tls::dial(&worker.ctx, *address, Whom::Outside).await?, Vec::new()), None, None)
        }
    };
    let kind = if info.is_some() { "mesh_h2" } else { "plain_h2" };
    let open = metrics.connection(Direction::Outbound, kind).holding(place);
    Ok(H2::client(worker, wire, key.clone(), move_at, [Some(open), info]))
}
