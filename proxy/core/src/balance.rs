//! Which endpoint takes a request, for one service on one thread.
//!
//! **Load** is peak-EWMA: an endpoint's response time, which rises to a slower sample at once and sinks slowly,
//! times what it has pending. An estimate that no sample confirms returns to what is typical of the service, not to
//! zero: an idle endpoint is presumed average, so neither a new endpoint nor one with a small weight draws a crowd.
//!
//! **Weights** decide who is asked; load only who is spared. The first choice is drawn by weight, the second among the
//! others, and it replaces the first with the probability by which it is less loaded. Equal loads thus give exactly
//! the weights. (To take the lesser of two always, as P2C does, would let noise give a canary half of the traffic.)
//! A policy may choose otherwise ([`crate::traffic::Algorithm`]); weights hold in each.
//!
//! **Who may be asked** (`gather`). Tiers: healthy and degraded endpoints first, then draining, then unhealthy ones. There is always a
//! last resort, because health checks fail more often together than endpoints do. Endpoints that the breaker has ejected are left out
//! while another one stands, and each is tried by one request when its time has come. Only a service whose endpoints have all
//! stopped to answer is not asked, but for one request now and then: to wait would help nobody.
//!
//! **Subset**: of many endpoints a proxy uses at most `max_endpoints`, by rendezvous hashing of its own identity and
//! the endpoint's id, so that connections stay few, all proxies together cover all endpoints, and a change of one
//! endpoint changes at most one member. Algorithms that hash requests use all endpoints: a key must mean the same one to all proxies.

mod choose;
mod gather;
mod slot;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use self::{
    choose::Table,
    gather::{Gathered, OnPort},
    slot::{FLOOR, Slot},
};
use crate::{
    breaker::circuit::Signal,
    hash::{hash, mix},
    live::Live,
    model::{Endpoint, Service},
    traffic::Algorithm,
};

/// Endpoints of a service that a proxy uses at once, by default.
pub const MAX_ENDPOINTS: usize = 32;

/// How much of the difference to a new sample the typical response time takes over.
const TYPICAL_STEP: f64 = 0.05;

/// How long a connect failure puts an endpoint aside at first; it doubles with every failure in a row.
const ASIDE_MIN: Duration = Duration::from_secs(1);

/// How long at most.
const ASIDE_MAX: Duration = Duration::from_secs(30);

/// How long a sidecar's own word that it drains counts. The catalog says so, too, before this is over.
const DRAINED_FOR: Duration = Duration::from_secs(30);

/// The endpoints of one service and what this thread knows of their load. Not shared between threads; what is known of
/// failures is, by [`Live`].
#[derive(Debug)]
pub struct Balancer {
    seed: u64,
    max_endpoints: usize,
    /// Our own; empty: not known.
    zone: Arc<str>,
    live: Arc<Live>,
    snapshot: Option<Arc<Service>>,
    policy: Policy,
    /// Sorted by the endpoint's id, as in the snapshot.
    slots: Vec<Slot>,
    /// The service ports that endpoints list.
    listed: BTreeSet<u16>,
    /// By service port: a listed one, or 0. Made when first asked for.
    on_ports: BTreeMap<u16, OnPort>,
    /// For algorithms that hash, by the same port.
    tables: BTreeMap<u16, Table>,
    /// Some slot has come whose time is not known yet.
    has_newcomers: bool,
    /// In seconds; `None`: nothing has answered yet.
    typical: Option<f64>,
    next_serial: u64,
    /// Reused by every pick.
    candidates: Vec<(usize, u64)>,
}

/// What the service's policy says of balancing.
#[derive(Debug, Clone, Copy, Default)]
struct Policy {
    algorithm: Algorithm,
    slow_start: Duration,
    zone_percent: u32,
}

/// What came of a choice.
#[derive(Debug, Clone)]
pub enum Pick {
    /// This one.
    Endpoint(Picked),
    /// There is none for the port, or all were tried.
    NoEndpoints,
    /// None has answered lately, and one is being tried by somebody else.
    AllFailing,
}

impl Pick {
    /// The endpoint, if one was chosen.
    pub fn endpoint(self) -> Option<Picked> {
        match self {
            Self::Endpoint(picked) => Some(picked),
            Self::NoEndpoints | Self::AllFailing => None,
        }
    }
}

/// An endpoint that was chosen.
#[derive(Debug, Clone)]
pub struct Picked {
    /// Its snapshot.
    pub endpoint: Arc<Endpoint>,
    /// Its address, with the port for the service port asked for.
    pub address: SocketAddr,
    serial: u64,
    /// As [`Balancer::on_ports`] knows it.
    port: u16,
    is_trial: bool,
}

/// A request that counts as pending until it is finished.
#[derive(Debug)]
#[must_use = "hand it to Balancer::finish, or the request counts as pending for ever"]
pub struct Token {
    id: Arc<str>,
    serial: u64,
    port: u16,
    is_trial: bool,
    /// That it answers well has been told.
    is_told: bool,
}

impl Token {
    /// Whether it is to find out if an ejected endpoint answers again.
    pub fn is_trial(&self) -> bool {
        self.is_trial
    }

    /// Whether [`Balancer::answers`] was told.
    pub fn is_told(&self) -> bool {
        self.is_told
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered.
    Success {
        /// Until the head of the response; for bytes, until the connection stood.
        rtt: Duration,
    },
    /// It was answered with an error that the endpoint is to blame for.
    Error,
    /// It was not answered.
    Failure,
    /// The caller gave up. That says nothing of the endpoint, unless it had been slow.
    Abandoned {
        /// How long the caller had waited for the head of the response; zero if it had come.
        waited: Duration,
    },
}

impl Balancer {
    /// A balancer without endpoints. `own_identity` should differ between proxies (SPIFFE id and address, say) and be
    /// the same on all threads of one: it chooses the subset. `max_endpoints` counts as at least 1. `live` is the service's, and
    /// the same on all threads.
    pub fn new(own_identity: &str, max_endpoints: usize, live: Arc<Live>) -> Self {
        Self {
            seed: hash(0, own_identity.as_bytes()),
            max_endpoints: max_endpoints.max(1),
            zone: Arc::default(),
            live,
            snapshot: None,
            policy: Policy::default(),
            slots: Vec::new(),
            listed: BTreeSet::new(),
            on_ports: BTreeMap::new(),
            tables: BTreeMap::new(),
            has_newcomers: false,
            typical: None,
            next_serial: 0,
            candidates: Vec::new(),
        }
    }

    /// The same in a zone, whose endpoints a policy may prefer.
    #[must_use]
    pub fn in_zone(self, zone: Arc<str>) -> Self {
        Self { zone, ..self }
    }

    /// Takes over a snapshot; free if it is the one from last time. What is known of an endpoint stays while its id
    /// and address do.
    pub fn update(&mut self, service: &Arc<Service>) {
        if self.snapshot.as_ref().is_some_and(|last| Arc::ptr_eq(last, service)) {
            return;
        }
        self.live.adopt(service);
        let is_first = self.snapshot.replace(Arc::clone(service)).is_none();
        let policy = service.traffic.as_ref().map(|traffic| &traffic.load_balancer);
        self.policy = policy.map_or_else(Policy::default, |policy| Policy {
            algorithm: policy.algorithm,
            slow_start: policy.slow_start,
            zone_percent: policy.zone_percent,
        });
        let mut old = std::mem::take(&mut self.slots).into_iter().peekable();
        for endpoint in &service.endpoints {
            while old.next_if(|slot| slot.endpoint.id < endpoint.id).is_some() {}
            let known = old
                .next_if(|slot| slot.endpoint.id == endpoint.id)
                .filter(|slot| slot.endpoint.address == endpoint.address);
            let slot = match known {
                Some(slot) => Slot { endpoint: Arc::clone(endpoint), ..slot },
                None => self.new_slot(endpoint, is_first),
            };
            self.slots.push(slot);
        }
        self.listed = self.slots.iter().flat_map(|slot| slot.endpoint.ports.keys().copied()).collect();
        self.on_ports.clear();
        let (algorithm, listed) = (self.policy.algorithm, &self.listed);
        self.tables.retain(|port, table| table.is_of(algorithm) && (*port == 0 || listed.contains(port)));
    }

    fn new_slot(&mut self, endpoint: &Arc<Endpoint>, is_first: bool) -> Slot {
        self.next_serial += 1;
        self.has_newcomers |= !is_first;
        Slot::new(endpoint, self.next_serial, hash(self.seed, endpoint.id.as_bytes()), !is_first)
    }

    /// Chooses an endpoint that serves `service_port` and whose id is not in `exclude` (those that this request has
    /// already tried). `key`: what algorithms that hash go by; without one they choose as by default.
    pub fn pick(
        &mut self,
        service_port: u16,
        now: Instant,
        rng: &mut fastrand::Rng,
        exclude: &[Arc<str>],
        key: Option<u64>,
    ) -> Pick {
        self.date_newcomers(now);
        let port = self.on_port(service_port);
        let mut candidates = std::mem::take(&mut self.candidates);
        let gathered = self.gather(port, now, exclude, &mut candidates);
        let chosen = match gathered {
            Gathered::Trial(at) => Some(at),
            Gathered::Candidates => self.choose(port, &mut candidates, now, rng, key),
            Gathered::Nobody | Gathered::AllFailing => None,
        };
        self.candidates = candidates;
        match chosen.and_then(|at| self.picked(at, port, now, matches!(gathered, Gathered::Trial(_)))) {
            Some(picked) => Pick::Endpoint(picked),
            None if gathered == Gathered::AllFailing => Pick::AllFailing,
            None => Pick::NoEndpoints,
        }
    }

    fn picked(&mut self, at: usize, port: u16, now: Instant, is_trial: bool) -> Option<Picked> {
        // A last resort is a trial, too: how it ends says whether the endpoint works.
        let is_trial = is_trial || self.on_ports[&port].begins_trial(at, self.live.millis(now), true);
        let slot = &mut self.slots[at];
        if slot.connect_failures > 0 {
            slot.trial_until = Some(now + ASIDE_MIN);
        }
        Some(Picked {
            address: slot.endpoint.socket_address(port)?,
            endpoint: Arc::clone(&slot.endpoint),
            serial: slot.serial,
            port,
            is_trial,
        })
    }

    /// New slots get the time at which they are first seen.
    fn date_newcomers(&mut self, now: Instant) {
        if std::mem::take(&mut self.has_newcomers) {
            self.slots.iter_mut().for_each(|slot| slot.date(now));
        }
    }

    /// The ids of the endpoints on a port that this proxy uses.
    pub fn used(&mut self, service_port: u16) -> Vec<Arc<str>> {
        let port = self.on_port(service_port);
        let id = |at: &usize| Arc::clone(&self.slots[*at].endpoint.id);
        self.on_ports[&port].subset.iter().map(id).collect()
    }

    /// Counts a request as pending at the endpoint.
    pub fn start(&mut self, picked: &Picked) -> Token {
        let id = Arc::clone(&picked.endpoint.id);
        let token =
            Token { id, serial: picked.serial, port: picked.port, is_trial: picked.is_trial, is_told: false };
        if let Some(slot) = self.slot_of(&token) {
            slot.pending = slot.pending.saturating_add(1);
        }
        token
    }

    /// The endpoint has begun to answer well, in `rtt`. Its breaker learns it now: a stream may take hours to end, and until then an
    /// ejected endpoint would stay so, and failures that lie far apart would be in a row.
    pub fn answers(&mut self, token: &mut Token, rtt: Duration, now: Instant) {
        let Some(at) = self.index(&token.id).filter(|at| self.slots[*at].serial == token.serial) else {
            return;
        };
        if token.is_trial {
            self.slots[at].estimate = None;
        }
        self.tell_others(at, token, Outcome::Success { rtt }, now);
        (token.is_trial, token.is_told) = (false, true);
    }

    /// Takes the request off and learns from its outcome. Harmless if the endpoint has left meanwhile.
    #[expect(clippy::needless_pass_by_value, reason = "a token is finished once")]
    pub fn finish(&mut self, token: Token, outcome: Outcome, now: Instant) {
        let typical = self.typical();
        let Some(at) = self.index(&token.id).filter(|at| self.slots[*at].serial == token.serial) else {
            return;
        };
        let slot = &mut self.slots[at];
        slot.pending = slot.pending.saturating_sub(1);
        match outcome {
            Outcome::Success { rtt } => {
                let rtt = rtt.as_secs_f64();
                if token.is_trial {
                    // It is back: what it failed at before is no estimate any more, and would keep it idle.
                    slot.estimate = None;
                }
                slot.succeeded(rtt, typical, now);
                let typical = self.typical.get_or_insert(rtt);
                *typical += (rtt - *typical) * TYPICAL_STEP;
            }
            Outcome::Error | Outcome::Failure => slot.failed(typical, now),
            Outcome::Abandoned { waited } => slot.waited(waited.as_secs_f64(), typical, now),
        }
        if !(token.is_told && matches!(outcome, Outcome::Success { .. } | Outcome::Abandoned { .. })) {
            self.tell_others(at, &token, outcome, now);
        }
    }

    /// What all threads are to know of it.
    fn tell_others(&mut self, at: usize, token: &Token, outcome: Outcome, now: Instant) {
        if self.on_port(token.port) != token.port {
            return;
        }
        let millis = self.live.millis(now);
        let on_port = &self.on_ports[&token.port];
        let Some(circuit) = &on_port.circuits[at] else { return };
        let signal = match outcome {
            Outcome::Success { rtt } => Signal::Success(rtt),
            Outcome::Error => Signal::Error,
            Outcome::Failure => Signal::Silence,
            Outcome::Abandoned { .. } if token.is_trial => {
                return circuit.gives_trial_back(&on_port.group, millis);
            }
            Outcome::Abandoned { .. } => return,
        };
        // Not the same for two proxies, nor for two failures: as good as chance to those who would come back together.
        let draw = mix(self.slots[at].score ^ millis ^ token.serial);
        circuit.record(&on_port.group, signal, token.is_trial, millis, draw);
    }

    /// A connection to the endpoint of this id stands.
    pub fn connected(&mut self, id: &str) {
        if let Some(slot) = self.slot(id) {
            slot.connected();
        }
    }

    /// A connection to the endpoint of this id could not be made: it is put aside for a while, longer every time.
    /// Afterwards one request a second tries it until a connection stands.
    pub fn connect_failed(&mut self, id: &str, now: Instant, rng: &mut fastrand::Rng) {
        let Some(slot) = self.slot(id) else { return };
        // Failures of connects that were under way together are one failure.
        if slot.aside_until.is_some_and(|until| now < until) {
            return;
        }
        let aside = ASIDE_MIN.saturating_mul(1 << slot.connect_failures.min(16)).min(ASIDE_MAX);
        // From half to the whole, so that proxies do not come back together.
        slot.aside_until = Some(now + aside.mul_f64(0.5 + rng.f64() / 2.0));
        slot.connect_failures = slot.connect_failures.saturating_add(1);
    }

    /// The sidecar of the endpoint of this id said that it drains (GOAWAY): others are preferred for a while, before
    /// the catalog says the same.
    pub fn drained(&mut self, id: &str, now: Instant) {
        if let Some(slot) = self.slot(id) {
            slot.drained_until = Some(now + DRAINED_FOR);
        }
    }

    fn typical(&self) -> f64 {
        self.typical.unwrap_or(FLOOR)
    }

    fn index(&self, id: &str) -> Option<usize> {
        self.slots.binary_search_by(|slot| (*slot.endpoint.id).cmp(id)).ok()
    }

    fn slot(&mut self, id: &str) -> Option<&mut Slot> {
        self.index(id).map(|at| &mut self.slots[at])
    }

    fn slot_of(&mut self, token: &Token) -> Option<&mut Slot> {
        self.slot(&token.id).filter(|slot| slot.serial == token.serial)
    }
}

#[cfg(test)]
mod tests;
