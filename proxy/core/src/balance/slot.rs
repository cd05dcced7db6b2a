//! What one thread knows of one endpoint.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::model::{Endpoint, Health};

/// Within this time an estimate loses all but 1/e of its distance from what it sinks to: an outlier weighs for some
/// hundred requests at common rates, and is forgotten within a quarter of a minute.
const DECAY: Duration = Duration::from_secs(5);

/// Response times below this are equal: on one network, differences of microseconds are noise.
pub(super) const FLOOR: f64 = 0.001;

/// The least response time that a failure counts as, in seconds; it doubles with every failure in a row. Fast
/// failures must not look like fast answers.
const FAILURE_PENALTY: f64 = 1.0;

/// The most that it counts as, in seconds, so that an endpoint that recovers is found out within a minute.
const MAX_FAILURE_PENALTY: f64 = 30.0;

/// What a degraded endpoint's weight counts for, in quarters of a healthy one's.
const DEGRADED_QUARTERS: u64 = 1;

/// What share of its weight a new endpoint begins with, in percent, where it starts slowly: enough to be asked, and warm up.
const FIRST_PERCENT: u64 = 10;

/// Tiers of health, best first.
pub(super) const TIERS: u8 = 3;

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) endpoint: Arc<Endpoint>,
    /// Tells this slot from an earlier one of the same id.
    pub(super) serial: u64,
    /// Rendezvous score of the id with our own identity.
    pub(super) score: u64,
    pub(super) joined: Joined,
    pub(super) pending: u32,
    /// Seconds, and when that was so.
    pub(super) estimate: Option<(f64, Instant)>,
    /// Failed responses in a row.
    pub(super) failures: u32,
    /// Failed connects in a row.
    pub(super) connect_failures: u32,
    pub(super) aside_until: Option<Instant>,
    /// Until then one request is given time to find out whether connects still fail.
    pub(super) trial_until: Option<Instant>,
    pub(super) drained_until: Option<Instant>,
    /// How far it is from its next turn; the largest of all is next.
    pub(super) turn: i128,
}

/// When an endpoint came.
#[derive(Debug, Clone, Copy)]
pub(super) enum Joined {
    /// It was there before we looked.
    Long,
    /// Since the last request.
    Lately,
    At(Instant),
}

impl Slot {
    pub(super) fn new(endpoint: &Arc<Endpoint>, serial: u64, score: u64, is_newcomer: bool) -> Self {
        Self {
            endpoint: Arc::clone(endpoint),
            serial,
            score,
            joined: if is_newcomer { Joined::Lately } else { Joined::Long },
            pending: 0,
            estimate: None,
            failures: 0,
            connect_failures: 0,
            aside_until: None,
            trial_until: None,
            drained_until: None,
            turn: 0,
        }
    }

    pub(super) fn date(&mut self, now: Instant) {
        if matches!(self.joined, Joined::Lately) {
            self.joined = Joined::At(now);
        }
    }

    pub(super) fn tier(&self, now: Instant) -> u8 {
        let pushed = tier(self.endpoint.health);
        let drained = self.drained_until.is_some_and(|until| now < until);
        if drained { pushed.max(tier(Health::Draining)) } else { pushed }
    }

    /// In parts of four hundred, never 0.
    pub(super) fn weight(&self, now: Instant, slow_start: Duration) -> u64 {
        let quarters = if self.endpoint.health == Health::Degraded { DEGRADED_QUARTERS } else { 4 };
        u64::from(self.endpoint.weight.max(1)) * quarters * self.percent(now, slow_start)
    }

    fn percent(&self, now: Instant, slow_start: Duration) -> u64 {
        let Joined::At(at) = self.joined else { return 100 };
        let (age, whole) = (now.saturating_duration_since(at).as_millis(), slow_start.as_millis());
        if age >= whole {
            return 100;
        }
        FIRST_PERCENT.max(u64::try_from(age * 100 / whole).unwrap_or(100))
    }

    pub(super) fn is_aside(&self, now: Instant) -> bool {
        [self.aside_until, self.trial_until].iter().flatten().any(|until| now < *until)
    }

    pub(super) fn connected(&mut self) {
        self.connect_failures = 0;
        self.aside_until = None;
        self.trial_until = None;
    }

    /// Answered within `rtt` seconds.
    pub(super) fn succeeded(&mut self, rtt: f64, typical: f64, now: Instant) {
        self.sample(rtt, typical, now);
        self.failures = 0;
        self.connected();
    }

    pub(super) fn failed(&mut self, typical: f64, now: Instant) {
        let penalty = FAILURE_PENALTY * f64::from(1_u32 << self.failures.min(16));
        self.sample(penalty.clamp(2.0 * typical, MAX_FAILURE_PENALTY.max(2.0 * typical)), typical, now);
        self.failures = self.failures.saturating_add(1);
    }

    /// Somebody gave up after so many seconds.
    pub(super) fn waited(&mut self, waited: f64, typical: f64, now: Instant) {
        if waited > self.estimate(typical, now) {
            self.sample(waited, typical, now);
        }
    }

    /// The response time to expect, in seconds.
    pub(super) fn estimate(&self, typical: f64, now: Instant) -> f64 {
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

    /// `share`: of its weight in the mean of all.
    pub(super) fn load(&self, typical: f64, share: f64, now: Instant) -> f64 {
        self.estimate(typical, now).max(FLOOR) * self.queue(share)
    }

    /// What it has pending, and this request.
    pub(super) fn queue(&self, share: f64) -> f64 {
        f64::from(self.pending) / share + 1.0
    }
}

/// What is left of a distance after `elapsed`.
fn decay(elapsed: Duration) -> f64 {
    (-elapsed.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

pub(super) fn tier(health: Health) -> u8 {
    match health {
        Health::Healthy | Health::Degraded => 0,
        Health::Draining => 1,
        // Unready ones are left out before tiers count.
        Health::Unhealthy | Health::Unready => 2,
    }
}
