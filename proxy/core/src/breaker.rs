//! When an endpoint is put aside, and for how long.
//!
//! What one request finds out holds for all threads: what is known of an endpoint is shared ([`crate::live`]), for each port apart,
//! since a port that fails says nothing of the others. **An endpoint is ejected** when it fails several times in a row, or
//! too often of late; then one request tries it, and it comes back or stays away for twice as long. **Never too many**: what fails
//! everywhere is the service, and to send all its traffic to the rest would only end these, too. **A dead service**, of which no
//! endpoint answers any more, is asked twice a second and no more often; one that answers with failures goes on being asked, since its answers
//! say more than ours would.

pub(crate) mod circuit;
mod window;

pub use self::circuit::Cause;

use std::{sync::Arc, time::Duration};

use outrigger_api::v1;

use crate::traffic::{percent, unless_zero};

/// Windows longer than this remember what nobody cares about any more.
const MAX_WINDOW: Duration = Duration::from_hours(1);

/// When an endpoint is put aside, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breaker {
    /// Failures in a row; 0: they do not count.
    pub consecutive: u32,
    /// Successes in the window fall below this percentage; 0: they do not count.
    pub success_percent: u32,
    /// What the percentage looks back over; an hour at most.
    pub window: Duration,
    /// With fewer requests in the window, the percentage says nothing.
    pub min_requests: u32,
    /// Answers that take longer count as failures in the window.
    pub slow: Option<Duration>,
    /// How long at first; doubled each time in a row.
    pub base_ejection: Duration,
    /// How long at most.
    pub max_ejection: Duration,
    /// At most this percentage of a service's endpoints is aside at once.
    pub max_ejected_percent: u32,
    /// Who said so.
    pub origin: Arc<str>,
}

impl Default for Breaker {
    /// What holds without a policy: five failures in a row, which no endpoint that works has by chance; a second aside at first, for
    /// most faults are restarts; never more than half of a service, for what fails everywhere is not an endpoint's fault.
    fn default() -> Self {
        Self {
            consecutive: 5,
            success_percent: 0,
            window: Duration::from_secs(10),
            min_requests: 0,
            slow: None,
            base_ejection: Duration::from_secs(1),
            max_ejection: Duration::from_secs(30),
            max_ejected_percent: 50,
            origin: Arc::default(),
        }
    }
}

impl Breaker {
    pub(crate) fn from_wire(wire: &v1::Breaker) -> Result<Self, String> {
        let default = Self::default();
        let base_ejection = unless_zero(wire.base_ejection).unwrap_or(default.base_ejection);
        let window = unless_zero(wire.window).unwrap_or(default.window);
        if window > MAX_WINDOW {
            return Err(format!("the window is {} s, more than an hour", window.as_secs()));
        }
        Ok(Self {
            consecutive: wire.consecutive,
            success_percent: percent("the least success", wire.success_percent)?,
            window,
            min_requests: wire.min_requests,
            slow: unless_zero(wire.slow),
            base_ejection,
            max_ejection: unless_zero(wire.max_ejection).unwrap_or(default.max_ejection).max(base_ejection),
            max_ejected_percent: percent("the most that may be ejected", wire.max_ejected_percent)?,
            origin: (&*wire.origin).into(),
        })
    }
}
