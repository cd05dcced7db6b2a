//! What is known of one endpoint on one port, over all threads, and of all of a service's on that port.
//!
//! ```text
//! closed --failures--> open --time--> trial --success--> closed
//!                       ^               |
//!                       +---failure-----+   (for twice as long)
//! ```
//!
//! An endpoint's state is one word: every step is one compare-and-swap, and a request to an endpoint that works only reads it. What a
//! group counts (who is ejected, who would be) changes with the step of the endpoint that it counts; a place under the cap is taken
//! before the endpoint is ejected, so that there is never one too many.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    Breaker,
    window::{self, Window},
};
use crate::padded::Padded;

/// How long a trial has before another request is let through beside it.
const TRIAL: Duration = Duration::from_secs(5);

/// In which each endpoint of a service whose endpoints all fail is tried once: half of what a caller notices of a recovery. Also
/// between a trial without a result and the next one.
const ROUND: Duration = Duration::from_millis(500);

/// Between two trials of such a service at the least: a large one's round takes longer, so that few callers wait for a trial's end.
const BETWEEN_TRIALS: Duration = Duration::from_millis(20);

/// Ejections in a row that are told apart: by then the longest one is reached.
const MAX_ROW: u32 = 31;

/// Failures in a row that are told apart.
pub(super) const MAX_CONSECUTIVE: u32 = (1 << 12) - 1;

/// Milliseconds since the group's service was first used. 43 bits: 278 years.
pub(crate) type Millis = u64;

/// What a request says of its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// It was answered, in this time.
    Success(Duration),
    /// It was answered with a failure.
    Error,
    /// It was not answered.
    Silence,
}

/// Why an endpoint was ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Failures in a row.
    Consecutive,
    /// Too few successes in the window.
    SuccessRate,
    /// A trial has failed.
    Trial,
}

impl Cause {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Consecutive, Self::SuccessRate, Self::Trial];

    /// As a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Consecutive => "consecutive",
            Self::SuccessRate => "success_rate",
            Self::Trial => "trial",
        }
    }
}

/// Whether an endpoint may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Stands,
    Ejected,
    /// It is ejected, and one request may find out whether it still fails.
    MayTry,
}

/// Counts of ejections, by [`Cause::ALL`].
pub(crate) type Ejections = [AtomicU64; 3];

/// The endpoints of a service on one port.
#[derive(Debug)]
pub(crate) struct Group {
    breaker: Breaker,
    /// Milliseconds.
    slot: u64,
    /// Endpoints in the upper half, ejected ones in the lower.
    places: Padded<AtomicU64>,
    /// Endpoints that would be ejected if there were a place.
    withheld: AtomicU32,
    /// Endpoints that have failed their health checks.
    unwell: AtomicU32,
    next_trial: AtomicU64,
    /// Trials of all while all fail.
    turns: AtomicUsize,
    ejections: Arc<Ejections>,
}

/// One endpoint on one port.
#[derive(Debug)]
pub(crate) struct Circuit {
    pub(crate) address: IpAddr,
    state: AtomicU64,
    /// It has failed its health checks.
    unwell: AtomicBool,
    window: Window,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Kind {
    #[default]
    Closed,
    Open,
    Trial,
    /// The endpoint has left.
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct State {
    kind: Kind,
    /// Failures in a row.
    consecutive: u32,
    /// The last failure was no answer.
    silent: bool,
    /// It would be ejected if there were a place.
    withheld: bool,
    /// Ejections in a row.
    row: u32,
    /// When an ejection ends, or a trial has taken too long.
    until: Millis,
}

impl State {
    fn unpack(word: u64) -> Self {
        let kind = match word & 3 {
            0 => Kind::Closed,
            1 => Kind::Open,
            2 => Kind::Trial,
            _ => Kind::Gone,
        };
        #[expect(clippy::cast_possible_truncation, reason = "masked")]
        let bits = |from: u32, mask: u32| (word >> from) as u32 & mask;
        Self {
            kind,
            silent: bits(2, 1) == 1,
            withheld: bits(3, 1) == 1,
            row: bits(4, MAX_ROW),
            consecutive: bits(9, MAX_CONSECUTIVE),
            until: word >> 21,
        }
    }

    fn pack(self) -> u64 {
        let kind = match self.kind {
            Kind::Closed => 0,
            Kind::Open => 1,
            Kind::Trial => 2,
            Kind::Gone => 3,
        };
        kind | u64::from(self.silent) << 2
            | u64::from(self.withheld) << 3
            | u64::from(self.row.min(MAX_ROW)) << 4
            | u64::from(self.consecutive.min(MAX_CONSECUTIVE)) << 9
            | self.until << 21
    }

    fn is_ejected(self) -> bool {
        matches!(self.kind, Kind::Open | Kind::Trial)
    }
}

impl Group {
    pub(crate) fn new(breaker: Breaker, ejections: Arc<Ejections>) -> Self {
        Self {
            slot: window::slot_length(breaker.window),
            breaker,
            places: Padded::default(),
            withheld: AtomicU32::new(0),
            unwell: AtomicU32::new(0),
            next_trial: AtomicU64::new(0),
            turns: AtomicUsize::new(0),
            ejections,
        }
    }

    /// How many may be ejected of `total`: the share, rounded down, and never the last one.
    fn cap(&self, total: u64) -> u64 {
        (total * u64::from(self.breaker.max_ejected_percent) / 100).min(total.saturating_sub(1))
    }

    fn places(&self) -> (u64, u64) {
        let word = self.places.0.load(Ordering::SeqCst);
        (word >> 32, word & u64::from(u32::MAX))
    }

    /// Whether some endpoint has failed its health checks.
    pub(crate) fn has_unwell(&self) -> bool {
        self.unwell.load(Ordering::Relaxed) > 0
    }

    /// Endpoints that are ejected.
    pub(crate) fn ejected(&self) -> u64 {
        self.places().1
    }

    /// Whether some endpoint stands only because too many are ejected.
    pub(crate) fn is_panicking(&self) -> bool {
        self.withheld.load(Ordering::Relaxed) > 0
    }

    /// How many endpoints there are. Returns how many more are ejected than may be.
    pub(crate) fn resize(&self, total: usize) -> u64 {
        let total = u64::from(u32::try_from(total).unwrap_or(u32::MAX));
        let resized = |word: u64| Some(total << 32 | word & u64::from(u32::MAX));
        let _ = self.places.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, resized);
        self.ejected().saturating_sub(self.cap(total))
    }

    fn take_place(&self) -> bool {
        let taken = |word: u64| (word & u64::from(u32::MAX) < self.cap(word >> 32)).then_some(word + 1);
        self.places.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, taken).is_ok()
    }

    fn free_place(&self) {
        self.places.0.fetch_sub(1, Ordering::SeqCst);
    }

    fn threshold(&self) -> u32 {
        self.breaker.consecutive.min(MAX_CONSECUTIVE)
    }

    /// Which of `endpoints` that all fail a request may try now: they take turns. `None`: none, another request has just begun to.
    /// There is one endpoint at least.
    pub(crate) fn takes_turn(&self, endpoints: usize, now: Millis) -> Option<usize> {
        let endpoints = endpoints.max(1);
        let between = u32::try_from(endpoints)
            .map_or(BETWEEN_TRIALS, |endpoints| ROUND / endpoints)
            .max(BETWEEN_TRIALS);
        let begun = |at| (at <= now).then_some(now + millis(between));
        self.next_trial.fetch_update(Ordering::Relaxed, Ordering::Relaxed, begun).ok()?;
        Some(self.turns.fetch_add(1, Ordering::Relaxed) % endpoints)
    }

    fn count(&self, cause: Cause) {
        self.ejections[cause as usize].fetch_add(1, Ordering::Relaxed);
    }
}

impl Circuit {
    pub(crate) fn new(address: IpAddr) -> Self {
        Self { address, state: AtomicU64::new(0), unwell: AtomicBool::new(false), window: Window::default() }
    }

    fn state(&self) -> State {
        State::unpack(self.state.load(Ordering::Relaxed))
    }

    /// What health checks say of it.
    pub(crate) fn checked(&self, group: &Group, well: bool) {
        if self.unwell.swap(!well, Ordering::Relaxed) == well {
            if well {
                group.unwell.fetch_sub(1, Ordering::Relaxed);
            } else {
                group.unwell.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Whether it has failed its health checks.
    pub(crate) fn is_unwell(&self) -> bool {
        self.unwell.load(Ordering::Relaxed)
    }

    pub(crate) fn standing(&self, now: Millis) -> Standing {
        let state = self.state();
        match state.kind {
            Kind::Closed | Kind::Gone => Standing::Stands,
            Kind::Open | Kind::Trial if now < state.until => Standing::Ejected,
            Kind::Open | Kind::Trial => Standing::MayTry,
        }
    }

    /// Whether it has not answered for as long as it takes to eject an endpoint, ejected or not. One that answers with failures is
    /// not meant: its answers are its callers'.
    pub(crate) fn is_dead(&self, group: &Group) -> bool {
        let state = self.state();
        group.threshold() > 0 && state.silent && state.consecutive >= group.threshold()
    }

    /// When it may be tried at the latest; the earliest of several is the first to be taken back.
    pub(crate) fn ejected_until(&self) -> Option<Millis> {
        Some(self.state()).filter(|state| state.is_ejected()).map(|state| state.until)
    }

    /// Replaces `old`, and has the group count what has changed but places. Whether it was still so.
    fn step(&self, group: &Group, old: State, new: State) -> bool {
        let stepped =
            self.state.compare_exchange(old.pack(), new.pack(), Ordering::SeqCst, Ordering::Relaxed).is_ok();
        if stepped && old.withheld != new.withheld {
            if new.withheld {
                group.withheld.fetch_add(1, Ordering::Relaxed);
            } else {
                group.withheld.fetch_sub(1, Ordering::Relaxed);
            }
        }
        stepped
    }

    /// Begins a trial of an ejected endpoint. `forced`: also before its time. Says yes to one.
    pub(crate) fn begins_trial(&self, group: &Group, now: Millis, forced: bool) -> bool {
        let old = self.state();
        let may = match old.kind {
            Kind::Open => forced || old.until <= now,
            Kind::Trial => old.until <= now,
            Kind::Closed | Kind::Gone => false,
        };
        may && self.step(group, old, State { kind: Kind::Trial, until: now + millis(TRIAL), ..old })
    }

    /// A trial has ended without a result: another may follow soon, not at once. Its caller has gone, or a policy refused it; with
    /// the next request as the next trial an endpoint that keeps its callers waiting would be asked before all that stand.
    pub(crate) fn gives_trial_back(&self, group: &Group, now: Millis) {
        let old = self.state();
        if old.kind == Kind::Trial {
            self.step(group, old, State { kind: Kind::Open, until: now + millis(ROUND), ..old });
        }
    }

    /// Takes it back before its time.
    pub(crate) fn reinstate(&self, group: &Group) {
        loop {
            let old = self.state();
            if !old.is_ejected() {
                return;
            }
            if self.step(group, old, State::default()) {
                return group.free_place();
            }
        }
    }

    /// The endpoint has left: from now on it is not counted any more.
    pub(crate) fn leave(&self, group: &Group) {
        self.checked(group, true);
        loop {
            let old = self.state();
            if self.step(group, old, State { kind: Kind::Gone, ..State::default() }) {
                if old.is_ejected() {
                    group.free_place();
                }
                return;
            }
        }
    }

    /// Learns from a request. `is_trial`: the one that was to find out whether it still fails. `draw`: by chance, or near it.
    pub(crate) fn record(&self, group: &Group, signal: Signal, is_trial: bool, now: Millis, draw: u64) {
        let is_slow = |rtt| group.breaker.slow.is_some_and(|slow| rtt > slow);
        let mut window_fails = false;
        if group.breaker.success_percent > 0 && self.state().kind == Kind::Closed {
            let slot = now / group.slot;
            let is_success = matches!(signal, Signal::Success(rtt) if !is_slow(rtt));
            self.window.count(slot, is_success);
            // Only a failure ejects. That a success completes the least number of requests, or that older ones have left the window,
            // is no reason; and a success, as by far the most are, need not sum up the window.
            window_fails = !is_success && group.window_fails(self.window.counts(slot));
        }
        loop {
            let old = self.state();
            let stepped = match old.kind {
                // A request from before the ejection says nothing new.
                Kind::Gone | Kind::Open => return,
                Kind::Trial if !is_trial => return,
                Kind::Trial => self.trial_ended(group, old, signal, now, draw),
                Kind::Closed => self.counted(group, old, signal, window_fails, now, draw),
            };
            if stepped {
                return;
            }
        }
    }

    fn trial_ended(&self, group: &Group, old: State, signal: Signal, now: Millis, draw: u64) -> bool {
        if matches!(signal, Signal::Success(_)) {
            let closed = self.step(group, old, State::default());
            if closed {
                group.free_place();
            }
            return closed;
        }
        let new = failed(old, signal);
        let opened = self.step(group, old, group.opened(new, now, draw));
        if opened {
            group.count(Cause::Trial);
        }
        opened
    }

    fn counted(
        &self,
        group: &Group,
        old: State,
        signal: Signal,
        window_fails: bool,
        now: Millis,
        draw: u64,
    ) -> bool {
        let new = match signal {
            Signal::Success(_) => State { consecutive: 0, silent: false, withheld: false, ..old },
            Signal::Error | Signal::Silence => failed(old, signal),
        };
        let row_is_long = group.threshold() > 0 && new.consecutive >= group.threshold();
        if !row_is_long && !window_fails {
            return new == old || self.step(group, old, new);
        }
        if !group.take_place() {
            let new = State { withheld: true, ..new };
            return new == old || self.step(group, old, new);
        }
        let ejected = self.step(group, old, group.opened(new, now, draw));
        if ejected {
            self.window.clear();
            group.count(if row_is_long { Cause::Consecutive } else { Cause::SuccessRate });
        } else {
            group.free_place();
        }
        ejected
    }
}

impl Group {
    fn window_fails(&self, (successes, failures): (u64, u64)) -> bool {
        let all = successes + failures;
        let enough = all >= u64::from(self.breaker.min_requests.max(1));
        enough && successes * 100 < all * u64::from(self.breaker.success_percent)
    }

    /// Put aside from now on, from half to the whole of what the row says, so that proxies do not come back together.
    fn opened(&self, state: State, now: Millis, draw: u64) -> State {
        let whole = self.breaker.base_ejection.saturating_mul(1 << state.row.min(16));
        let half = (millis(whole.min(self.breaker.max_ejection)) / 2).max(1);
        let until = now + half + draw % (half + 1);
        State { kind: Kind::Open, row: (state.row + 1).min(MAX_ROW), withheld: false, until, ..state }
    }
}

fn failed(state: State, signal: Signal) -> State {
    State {
        consecutive: (state.consecutive + 1).min(MAX_CONSECUTIVE),
        silent: signal == Signal::Silence,
        ..state
    }
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX >> 22)
}

#[cfg(test)]
mod tests;
