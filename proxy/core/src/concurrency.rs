//! How much the workload is asked at once: a fixed bound, or one that follows its response times.
//!
//! A workload that is asked more than it can do at once does not do more: requests wait in it, and in the end all are
//! late. What waits too long is better refused at once, by whoever stands before it.
//!
//! **The adaptive bound** compares response times with what they are when nothing waits, the base. As long as they
//! are below one and a half of it the bound grows, by its square root a step; above that it shrinks in proportion.
//! Both are means over the same requests, so that a workload whose requests differ among themselves looks slow in
//! neither.
//!
//! **The base** cannot be seen while requests wait, and a guess that creeps up with the queue lets the queue creep up
//! with it. So under overload, and only then, a *probe* lowers the bound for a moment until the queue is gone and
//! looks; this is what BBR does with round-trip times. Probes cost at most 1/30 of the time. Without overload the
//! base follows what is seen.
//!
//! A failure that was fast says nothing of how much the workload can bear. A slow one counts like a slow answer.
//!
//! Requests touch atomics only. Whoever ends a step tries a lock that nobody waits for.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use outrigger_api::v1;

use crate::criteria::ports;

/// Where the adaptive bound ends if nobody sets one: no workload does more at once on one host.
const MAX_ADAPTIVE: u32 = 10_000;

/// Where it begins: high enough for a workload that has just started and is not overloaded.
const BEGIN: u32 = 100;

/// A step is at least so long, and has at least so many answers: few say more about chance than about load.
const STEP: Duration = Duration::from_millis(100);
const STEP_ANSWERS: u64 = 10;

/// Requests that a probe looks at, and how long it waits for them at most, beside 20 times the base. It takes the
/// first that enter and waits for all of them: the first that end would be the fast ones.
const PROBE_REQUESTS: u64 = 100;
const PROBE_MAX: Duration = Duration::from_secs(1);

/// One refused request for so many answers is overload, and worth a probe; fewer are chance.
const OVERLOAD: u64 = 10;

/// Between two probes, in time and in multiples of the last one's length.
const PROBE_EVERY: Duration = Duration::from_secs(15);
const PROBE_REST: u64 = 30;

/// What the bound is divided by in a probe, and its least: far below any useful bound, yet not one request after the
/// other. The first probe takes the least, because until then the bound says nothing.
const PROBE_DIVISOR: u32 = 8;
const PROBE_MIN: u32 = 2;

/// Response times, in thousandths of the base, up to which nothing is taken to wait.
const TOLERANCE: u64 = 1_500;

/// How much of its difference to the next bound the bound makes in a step, in thousandths.
const GAIN: u64 = 300;

/// What part of its distance from a step's mean the base makes at once: one step is noisy.
const FOLLOW: u64 = 16;

/// The bound of one workload, for the ports that a policy says.
#[derive(Debug)]
pub struct Concurrency {
    wire: v1::Concurrency,
    ports: Vec<u16>,
    max: u32,
    counts: Counts,
    adaptive: Option<Adaptive>,
}

/// What every request writes, on a cache line of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Counts {
    in_flight: AtomicU32,
    bound: AtomicU32,
}

#[derive(Debug)]
struct Adaptive {
    began: Instant,
    /// Answers of this step or probe, and the nanoseconds that they took together.
    answers: AtomicU64,
    took: AtomicU64,
    /// When the step, or the probe, is over at the earliest, in nanoseconds since `began`.
    due: AtomicU64,
    /// Nanoseconds; 0: not known.
    base: AtomicU64,
    /// Counts the changes between probes and steps: an answer says something only of the phase in which it was asked
    /// for.
    phase: AtomicU32,
    is_probe: AtomicBool,
    /// Requests that have entered in this probe, and those of the first of them that have ended.
    probed: AtomicU64,
    probed_ended: AtomicU64,
    /// Requests of this step that were refused.
    refused: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The bound in thousandths; in a probe, what it was before.
    bound: u64,
    probe_began: u64,
    next_probe: u64,
    /// A probe has found a base.
    is_found: bool,
}

/// A request under way: it counts until it is dropped.
#[derive(Debug)]
pub struct Permit {
    of: Arc<Concurrency>,
    entered: Instant,
    /// `None`: how long it takes is not looked at.
    phase: Option<u32>,
}

impl Concurrency {
    /// Checks what was pushed. `now`: before any request enters.
    pub fn from_wire(wire: &v1::Concurrency, now: Instant) -> Result<Self, String> {
        let fault = |error| format!("{}: {error}", wire.origin);
        let ports = ports(&wire.ports).map_err(fault)?;
        let max = match (wire.max_requests, wire.adaptive) {
            (0, false) => u32::MAX,
            (0, true) => MAX_ADAPTIVE,
            (max, _) => max,
        };
        let bound = if wire.adaptive { max.min(BEGIN) } else { max };
        Ok(Self {
            wire: wire.clone(),
            ports,
            max,
            counts: Counts { in_flight: AtomicU32::new(0), bound: AtomicU32::new(bound) },
            adaptive: wire.adaptive.then(|| Adaptive::new(bound, now)),
        })
    }

    /// Goes on with what `old` has learnt, if both say the same.
    #[must_use]
    pub fn adopt(self, old: &Arc<Self>) -> Arc<Self> {
        if self.wire == old.wire { old.clone() } else { Arc::new(self) }
    }

    /// Whether it is about this port.
    pub fn is_about(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }

    /// Who set it.
    pub fn origin(&self) -> &str {
        &self.wire.origin
    }

    /// Requests that may be under way at once, now.
    pub fn bound(&self) -> u32 {
        self.counts.bound.load(Relaxed)
    }

    /// Requests that are under way.
    pub fn in_flight(&self) -> u32 {
        self.counts.in_flight.load(Relaxed)
    }

    /// Lets a request in, or refuses it at once.
    pub fn enter(self: &Arc<Self>, now: Instant) -> Option<Permit> {
        let bound = self.bound();
        let entered = self
            .counts
            .in_flight
            .fetch_update(Relaxed, Relaxed, |in_flight| (in_flight < bound).then_some(in_flight + 1));
        if entered.is_err() {
            if let Some(adaptive) = &self.adaptive {
                adaptive.refused(self, now);
            }
            return None;
        }
        let phase = self.adaptive.as_ref().and_then(Adaptive::entered);
        Some(Permit { of: self.clone(), entered: now, phase })
    }
}

impl Permit {
    /// The request has ended; `success`: with an answer that the workload is not to blame for. A permit that is only
    /// dropped says nothing of the workload.
    pub fn done(self, now: Instant, success: bool) {
        if let Some(adaptive) = &self.of.adaptive {
            adaptive.answered(&self, now, success);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.of.counts.in_flight.fetch_sub(1, Relaxed);
    }
}

fn nanos(of: Duration) -> u64 {
    u64::try_from(of.as_nanos()).unwrap_or(u64::MAX)
}

impl Adaptive {
    fn new(bound: u32, now: Instant) -> Self {
        Self {
            began: now,
            answers: AtomicU64::new(0),
            took: AtomicU64::new(0),
            due: AtomicU64::new(nanos(STEP)),
            base: AtomicU64::new(0),
            phase: AtomicU32::new(0),
            is_probe: AtomicBool::new(false),
            probed: AtomicU64::new(0),
            probed_ended: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            state: Mutex::new(State {
                bound: u64::from(bound) * 1_000,
                probe_began: 0,
                next_probe: 0,
                is_found: false,
            }),
        }
    }

    fn since_began(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.began))
    }

    /// The phase to which a request's time counts.
    fn entered(&self) -> Option<u32> {
        let phase = self.phase.load(Relaxed);
        let is_one_too_many =
            self.is_probe.load(Relaxed) && self.probed.fetch_add(1, Relaxed) >= PROBE_REQUESTS;
        (!is_one_too_many).then_some(phase)
    }

    fn refused(&self, of: &Concurrency, now: Instant) {
        self.refused.fetch_add(1, Relaxed);
        // Else a probe that nobody answers would never end.
        let now = self.since_began(now);
        if self.is_probe.load(Relaxed) && now >= self.due.load(Relaxed) {
            self.turn(of, now);
        }
    }

    fn answered(&self, permit: &Permit, now: Instant, success: bool) {
        if permit.phase != Some(self.phase.load(Relaxed)) {
            return;
        }
        let took = nanos(now.saturating_duration_since(permit.entered));
        if success || took > self.base.load(Relaxed) {
            self.took.fetch_add(took, Relaxed);
            self.answers.fetch_add(1, Relaxed);
        }
        let is_last =
            self.is_probe.load(Relaxed) && self.probed_ended.fetch_add(1, Relaxed) + 1 >= PROBE_REQUESTS;
        let now = self.since_began(now);
        if is_last || now >= self.due.load(Relaxed) {
            self.turn(&permit.of, now);
        }
    }

    /// Ends the step or the probe, if there is enough to go by and nobody else is doing it.
    fn turn(&self, of: &Concurrency, now: u64) {
        let Ok(mut state) = self.state.try_lock() else { return };
        let is_probe = self.is_probe.load(Relaxed);
        let is_due = now >= self.due.load(Relaxed);
        let answers = self.answers.load(Relaxed);
        if is_probe && (is_due || self.probed_ended.load(Relaxed) >= PROBE_REQUESTS) {
            if let Some(seen) = self.mean().filter(|_| answers >= STEP_ANSWERS) {
                // A probe is noisy, too: two that are near each other are one.
                let base = self.base.load(Relaxed);
                let is_near = state.is_found && seen / 2 < base && base / 2 < seen;
                self.base.store(if is_near { u64::midpoint(base, seen) } else { seen }, Relaxed);
                state.is_found = true;
            }
            let length = now.saturating_sub(state.probe_began);
            state.next_probe = now + nanos(PROBE_EVERY).max(length.saturating_mul(PROBE_REST));
            self.begin_phase(of, false, state.bound, now + nanos(STEP));
        } else if !is_probe && is_due && answers >= STEP_ANSWERS {
            let Some(seen) = self.mean() else { return };
            let refused = self.refused.swap(0, Relaxed);
            let base = self.follow(seen, refused > 0);
            state.bound = next_bound(state.bound, base, seen, is_used(of, refused > 0))
                .clamp(1_000, u64::from(of.max) * 1_000);
            if refused > answers / OVERLOAD && now >= state.next_probe {
                state.probe_began = now;
                let bound = if state.is_found { whole(state.bound) / PROBE_DIVISOR } else { PROBE_MIN };
                let longest = nanos(PROBE_MAX).saturating_add(base.saturating_mul(20));
                self.begin_phase(
                    of,
                    true,
                    u64::from(bound.max(PROBE_MIN).min(of.max)) * 1_000,
                    now + longest,
                );
            } else {
                of.counts.bound.store(whole(state.bound), Relaxed);
                self.due.store(now + nanos(STEP), Relaxed);
            }
        }
    }

    fn begin_phase(&self, of: &Concurrency, is_probe: bool, bound: u64, due: u64) {
        self.is_probe.store(is_probe, Relaxed);
        self.phase.fetch_add(1, Relaxed);
        self.mean();
        self.probed.store(0, Relaxed);
        self.probed_ended.store(0, Relaxed);
        self.refused.store(0, Relaxed);
        self.due.store(due, Relaxed);
        of.counts.bound.store(whole(bound), Relaxed);
    }

    /// The mean response time since the last call. An answer that comes between the two reads blurs it by its share.
    fn mean(&self) -> Option<u64> {
        let (took, answers) = (self.took.swap(0, Relaxed), self.answers.swap(0, Relaxed));
        took.checked_div(answers).map(|mean| mean.max(1))
    }

    /// Takes a step's mean into the base: what is faster soon, what is slower late, and not at all if requests may
    /// have waited.
    fn follow(&self, seen: u64, refused: bool) -> u64 {
        let base = self.base.load(Relaxed);
        let base = match base {
            0 => seen,
            _ if refused && seen > base => base,
            _ => base - base / FOLLOW + seen / FOLLOW,
        };
        self.base.store(base, Relaxed);
        base
    }
}

/// Whether the bound is what holds requests back, or soon will be: else it has no reason to grow.
fn is_used(of: &Concurrency, refused: bool) -> bool {
    refused || of.in_flight() > of.bound() / 2
}

/// The bound after a step; both bounds in thousandths.
fn next_bound(bound: u64, base: u64, seen: u64, is_used: bool) -> u64 {
    let share = (TOLERANCE.saturating_mul(base) / seen).clamp(500, 1_000);
    if share == 1_000 && !is_used {
        return bound;
    }
    let next = bound * share / 1_000 + (bound * 1_000).isqrt();
    (bound * (1_000 - GAIN) + next * GAIN) / 1_000
}

fn whole(thousandths: u64) -> u32 {
    u32::try_from(thousandths / 1_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
