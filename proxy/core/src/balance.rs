//! Which endpoint takes a request: two choices, the less loaded one, for one service on one thread.
//!
//! **Load** is peak-EWMA: an endpoint's response time, which rises to a slower sample at once and sinks slowly,
//! times what it has pending. An estimate that no sample confirms returns to what is typical of the service, not to
//! zero: an idle endpoint is presumed average, so neither a new endpoint nor one with a small weight draws a crowd.
//!
//! **Weights** decide who is asked; load only who is spared. The first choice is drawn by weight, the second among the
//! others, and it replaces the first with the probability by which it is less loaded. Equal loads thus give exactly
//! the weights. (To take the lesser of two always, as P2C does, would let noise give a canary half of the traffic.)
//!
//! **Tiers**: healthy and degraded endpoints first, then draining, then unhealthy ones. There is always a last
//! resort, because health checks fail more often together than endpoints do.
//!
//! **Subset**: of many endpoints a proxy uses at most `max_endpoints`, by rendezvous hashing of its own identity and
//! the endpoint's id, so that connections stay few, all proxies together cover all endpoints, and a change of one
//! endpoint changes at most one member.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    hash::hash,
    model::{Endpoint, Health, Service},
};

/// Endpoints of a service that a proxy uses at once, by default.
pub const MAX_ENDPOINTS: usize = 32;

/// Within this time an estimate loses all but 1/e of its distance from what it sinks to: an outlier weighs for some
/// hundred requests at common rates, and is forgotten within a quarter of a minute.
const DECAY: Duration = Duration::from_secs(5);

/// Response times below this are equal: on one network, differences of microseconds are noise.
const FLOOR: f64 = 0.001;

/// The least response time that a failure counts as, in seconds; it doubles with every failure in a row. Fast
/// failures must not look like fast answers.
const FAILURE_PENALTY: f64 = 1.0;

/// The most that it counts as, in seconds, so that an endpoint that recovers is found out within a minute.
const MAX_FAILURE_PENALTY: f64 = 30.0;

/// How much of the difference to a new sample the typical response time takes over.
const TYPICAL_STEP: f64 = 0.05;

/// What a degraded endpoint's weight counts for, in quarters of a healthy one's.
const DEGRADED_QUARTERS: u64 = 1;

/// How long a connect failure puts an endpoint aside at first; it doubles with every failure in a row.
const ASIDE_MIN: Duration = Duration::from_secs(1);

/// How long at most.
const ASIDE_MAX: Duration = Duration::from_secs(30);

/// How long a sidecar's own word that it drains counts. The catalog says so, too, before this is over.
const DRAINED_FOR: Duration = Duration::from_secs(30);

/// The endpoints of one service and what this thread knows of their load. Not shared between threads.
#[derive(Debug)]
pub struct Balancer {
    seed: u64,
    max_endpoints: usize,
    snapshot: Option<Arc<Service>>,
    /// Sorted by the endpoint's id, as in the snapshot.
    slots: Vec<Slot>,
    /// The service ports that endpoints list.
    listed: BTreeSet<u16>,
    /// Per service port, the slots that this proxy uses; the port is a listed one or 0. Made when first asked for.
    subsets: BTreeMap<u16, Vec<usize>>,
    /// In seconds; `None`: nothing has answered yet.
    typical: Option<f64>,
    next_serial: u64,
    /// Reused by every pick.
    candidates: Vec<(usize, u64)>,
}

#[derive(Debug)]
struct Slot {
    endpoint: Arc<Endpoint>,
    /// Tells this slot from an earlier one of the same id.
    serial: u64,
    /// Rendezvous score of the id with our own identity.
    score: u64,
    pending: u32,
    /// Seconds, and when that was so.
    estimate: Option<(f64, Instant)>,
    /// Failed responses in a row.
    failures: u32,
    /// Failed connects in a row.
    connect_failures: u32,
    aside_until: Option<Instant>,
    /// Until then one request is given time to find out whether connects still fail.
    trial_until: Option<Instant>,
    drained_until: Option<Instant>,
}

/// An endpoint that was chosen.
#[derive(Debug, Clone)]
pub struct Picked {
    /// Its snapshot.
    pub endpoint: Arc<Endpoint>,
    /// Its address, with the port for the service port asked for.
    pub address: SocketAddr,
    serial: u64,
}

/// A request that counts as pending until it is finished.
#[derive(Debug)]
#[must_use = "hand it to Balancer::finish, or the request counts as pending for ever"]
pub struct Token {
    id: Arc<str>,
    serial: u64,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered.
    Success {
        /// Until the head of the response; for bytes, until the connection stood.
        rtt: Duration,
    },
    /// It was not answered, or with an error that the endpoint is to blame for.
    Failure,
    /// The caller gave up. That says nothing of the endpoint, unless it had been slow.
    Abandoned {
        /// How long the caller had waited for the head of the response; zero if it had come.
        waited: Duration,
    },
}

impl Balancer {
    /// A balancer without endpoints. `own_identity` should differ between proxies (SPIFFE id and address, say) and be
    /// the same on all threads of one: it chooses the subset. `max_endpoints` counts as at least 1.
    pub fn new(own_identity: &str, max_endpoints: usize) -> Self {
        Self {
            seed: hash(0, own_identity.as_bytes()),
            max_endpoints: max_endpoints.max(1),
            snapshot: None,
            slots: Vec::new(),
            listed: BTreeSet::new(),
            subsets: BTreeMap::new(),
            typical: None,
            next_serial: 0,
            candidates: Vec::new(),
        }
    }

    /// Takes over a snapshot; free if it is the one from last time. What is known of an endpoint stays while its id
    /// and address do.
    pub fn update(&mut self, service: &Arc<Service>) {
        if self.snapshot.as_ref().is_some_and(|last| Arc::ptr_eq(last, service)) {
            return;
        }
        self.snapshot = Some(Arc::clone(service));
        let mut old = std::mem::take(&mut self.slots).into_iter().peekable();
        for endpoint in &service.endpoints {
            while old.next_if(|slot| slot.endpoint.id < endpoint.id).is_some() {}
            let known = old
                .next_if(|slot| slot.endpoint.id == endpoint.id)
                .filter(|slot| slot.endpoint.address == endpoint.address);
            let slot = match known {
                Some(slot) => Slot { endpoint: Arc::clone(endpoint), ..slot },
                None => self.new_slot(endpoint),
            };
            self.slots.push(slot);
        }
        self.listed = self.slots.iter().flat_map(|slot| slot.endpoint.ports.keys().copied()).collect();
        self.subsets.clear();
    }

    fn new_slot(&mut self, endpoint: &Arc<Endpoint>) -> Slot {
        self.next_serial += 1;
        Slot {
            endpoint: Arc::clone(endpoint),
            serial: self.next_serial,
            score: hash(self.seed, endpoint.id.as_bytes()),
            pending: 0,
            estimate: None,
            failures: 0,
            connect_failures: 0,
            aside_until: None,
            trial_until: None,
            drained_until: None,
        }
    }

    /// Chooses an endpoint that serves `service_port` and whose id is not in `exclude` (those that this request has
    /// already tried); `None` only if there is none.
    pub fn pick(
        &mut self,
        service_port: u16,
        now: Instant,
        rng: &mut fastrand::Rng,
        exclude: &[Arc<str>],
    ) -> Option<Picked> {
        let mut candidates = std::mem::take(&mut self.candidates);
        self.gather(service_port, now, exclude, &mut candidates);
        let chosen = self.choose(&candidates, now, rng);
        self.candidates = candidates;
        let slot = &mut self.slots[chosen?];
        if slot.connect_failures > 0 {
            slot.trial_until = Some(now + ASIDE_MIN);
        }
        Some(Picked {
            address: slot.endpoint.socket_address(service_port)?,
            endpoint: Arc::clone(&slot.endpoint),
            serial: slot.serial,
        })
    }

    /// Counts a request as pending at the endpoint.
    pub fn start(&mut self, picked: &Picked) -> Token {
        let token = Token { id: Arc::clone(&picked.endpoint.id), serial: picked.serial };
        if let Some(slot) = self.slot_of(&token) {
            slot.pending = slot.pending.saturating_add(1);
        }
        token
    }

    /// Takes the request off and learns from its outcome. Harmless if the endpoint has left meanwhile.
    #[expect(clippy::needless_pass_by_value, reason = "a token is finished once")]
    pub fn finish(&mut self, token: Token, outcome: Outcome, now: Instant) {
        let typical = self.typical();
        let Some(slot) = self.slot_of(&token) else { return };
        slot.pending = slot.pending.saturating_sub(1);
        match outcome {
            Outcome::Success { rtt } => {
                let rtt = rtt.as_secs_f64();
                slot.sample(rtt, typical, now);
                slot.failures = 0;
                slot.connected();
                let typical = self.typical.get_or_insert(rtt);
                *typical += (rtt - *typical) * TYPICAL_STEP;
            }
            Outcome::Failure => {
                let penalty = FAILURE_PENALTY * f64::from(1_u32 << slot.failures.min(16));
                slot.sample(
                    penalty.clamp(2.0 * typical, MAX_FAILURE_PENALTY.max(2.0 * typical)),
                    typical,
                    now,
                );
                slot.failures = slot.failures.saturating_add(1);
            }
            Outcome::Abandoned { waited } => {
                let waited = waited.as_secs_f64();
                if waited > slot.estimate(typical, now) {
                    slot.sample(waited, typical, now);
                }
            }
        }
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

    /// Makes sure that the subset for a port exists; returns its key.
    fn subset(&mut self, service_port: u16) -> u16 {
        // All ports that nobody lists have the same endpoints: those that answer for any.
        let port = if self.listed.contains(&service_port) { service_port } else { 0 };
        self.subsets.entry(port).or_insert_with(|| {
            let serves = |at: &usize| self.slots[*at].endpoint.socket_address(port).is_some();
            let mut members: Vec<usize> = (0..self.slots.len()).filter(serves).collect();
            // Health before score: a proxy must not be left with the failing ones of a service that works.
            let rank = |at: &usize| (tier(self.slots[*at].endpoint.health), self.slots[*at].score, *at);
            members.sort_unstable_by_key(rank);
            members.truncate(self.max_endpoints);
            members
        });
        port
    }

    /// Leaves in `found` the slots to choose from, with their weights: the best tier that has any, from the subset if
    /// it can be, without those put aside if it can be.
    fn gather(
        &mut self,
        service_port: u16,
        now: Instant,
        exclude: &[Arc<str>],
        found: &mut Vec<(usize, u64)>,
    ) {
        let port = self.subset(service_port);
        let subset = &self.subsets[&port];
        found.clear();
        for wanted in 0..TIERS {
            let in_tier = |at: &usize| self.slots[*at].tier(now) == wanted;
            found.extend(subset.iter().filter(|at| in_tier(at)).map(|at| (*at, 0)));
            self.drop_aside(found, now);
            let allowed = |at: &usize| !exclude.contains(&self.slots[*at].endpoint.id);
            found.retain(|(at, _)| allowed(at));
            if found.is_empty() {
                // All are excluded or aside; better one that is aside than a worse tier.
                found.extend(subset.iter().filter(|at| in_tier(at) && allowed(at)).map(|at| (*at, 0)));
            }
            if found.is_empty() && subset.len() == self.max_endpoints {
                let serves = |at: &usize| self.slots[*at].endpoint.socket_address(service_port).is_some();
                let all = (0..self.slots.len()).filter(|at| serves(at) && in_tier(at) && allowed(at));
                found.extend(all.map(|at| (at, 0)));
            }
            if !found.is_empty() {
                break;
            }
        }
        for (at, weight) in found {
            *weight = self.slots[*at].weight();
        }
    }

    /// Drops the slots that are put aside from `found`, but never more than half of them.
    fn drop_aside(&self, found: &mut Vec<(usize, u64)>, now: Instant) {
        let most = found.len() / 2;
        let is_aside = |at: usize| self.slots[at].is_aside(now);
        if found.iter().filter(|(at, _)| is_aside(*at)).count() > most {
            // Those that come back first stay.
            found.sort_by_key(|(at, _)| self.slots[*at].aside_until.filter(|_| is_aside(*at)));
            found.truncate(found.len() - most);
        } else {
            found.retain(|(at, _)| !is_aside(*at));
        }
    }

    fn choose(&self, candidates: &[(usize, u64)], now: Instant, rng: &mut fastrand::Rng) -> Option<usize> {
        let total: u64 = candidates.iter().map(|(_, weight)| weight).sum();
        let (first, first_weight) = *draw(candidates, total, None, rng)?;
        let Some((second, _)) = draw(candidates, total - first_weight, Some(first), rng) else {
            return Some(first);
        };
        #[expect(clippy::cast_precision_loss, reason = "weights are only compared")]
        let mean_weight = total as f64 / candidates.len() as f64;
        let load = |at: usize| self.slots[at].load(self.typical(), mean_weight, now);
        Some(if rng.f64() < 1.0 - load(*second) / load(first) { *second } else { first })
    }
}

/// Draws one by weight, but not `except`; `total` is the sum of the others' weights.
fn draw<'a>(
    candidates: &'a [(usize, u64)],
    total: u64,
    except: Option<usize>,
    rng: &mut fastrand::Rng,
) -> Option<&'a (usize, u64)> {
    if total == 0 {
        return None;
    }
    let mut left = rng.u64(0..total);
    candidates.iter().filter(|(at, _)| Some(*at) != except).find(|(_, weight)| {
        let here = left < *weight;
        left = left.saturating_sub(*weight);
        here
    })
}

impl Slot {
    fn tier(&self, now: Instant) -> u8 {
        let pushed = tier(self.endpoint.health);
        let drained = self.drained_until.is_some_and(|until| now < until);
        if drained { pushed.max(tier(Health::Draining)) } else { pushed }
    }

    /// In quarters, never 0.
    fn weight(&self) -> u64 {
        let quarters = if self.endpoint.health == Health::Degraded { DEGRADED_QUARTERS } else { 4 };
        u64::from(self.endpoint.weight.max(1)) * quarters
    }

    fn is_aside(&self, now: Instant) -> bool {
        [self.aside_until, self.trial_until].iter().flatten().any(|until| now < *until)
    }

    fn connected(&mut self) {
        self.connect_failures = 0;
        self.aside_until = None;
        self.trial_until = None;
    }

    /// The response time to expect, in seconds.
    fn estimate(&self, typical: f64, now: Instant) -> f64 {
        let Some((estimate, at)) = self.estimate else { return typical };
        typical + (estimate - typical) * decay(now.saturating_duration_since(at))
    }

    fn sample(&mut self, rtt: f64, typical: f64, now: Instant) {
        let estimate = match self.estimate {
            // A peak counts at once; anything less draws the estimate down as time goes by.
            Some((estimate, at)) if rtt < estimate => {
                rtt + (estimate - rtt) * decay(now.saturating_duration_since(at))
            }
            None if rtt < typical => rtt + (typical - rtt) / 2.0,
            _ => rtt,
        };
        self.estimate = Some((estimate, now));
    }

    fn load(&self, typical: f64, mean_weight: f64, now: Instant) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "weights are only compared")]
        let share = self.weight() as f64 / mean_weight;
        self.estimate(typical, now).max(FLOOR) * (f64::from(self.pending) / share + 1.0)
    }
}

/// What is left of a distance after `elapsed`.
fn decay(elapsed: Duration) -> f64 {
    (-elapsed.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

/// Tiers, best first.
const TIERS: u8 = 3;

fn tier(health: Health) -> u8 {
    match health {
        Health::Healthy | Health::Degraded => 0,
        Health::Draining => 1,
        Health::Unhealthy => 2,
    }
}

#[cfg(test)]
mod tests;
