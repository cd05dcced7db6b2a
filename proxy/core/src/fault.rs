//! Failures that a policy injects, so that people see what their callers do with them.
//!
//! Delay and abort are drawn independently: a share of the requests can have both, one, or none.

use std::{sync::Arc, time::Duration};

use outrigger_api::v1;

use crate::traffic::ms;

/// What is injected, and how often.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fault {
    /// How long a delayed request waits.
    pub delay: Duration,
    /// How many of a million requests are delayed.
    pub delay_per_million: u32,
    /// What an aborted request is answered.
    pub abort: Abort,
    /// How many of a million requests are aborted.
    pub abort_per_million: u32,
    /// Who said so.
    pub origin: Arc<str>,
}

/// What an aborted request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abort {
    /// The status for HTTP; `None`: as any other injected fault.
    pub status: Option<u16>,
    /// The status for gRPC; `None`: as any other injected fault.
    pub grpc: Option<u8>,
}

/// Whether a request is one of `per_million` of a million. More than a million count as all.
pub fn draw(per_million: u32, rng: &mut fastrand::Rng) -> bool {
    per_million > 0 && rng.u32(0..1_000_000) < per_million
}

impl Fault {
    pub(crate) fn from_wire(wire: &v1::Fault) -> Result<Self, String> {
        let status = match wire.abort_status {
            0 => None,
            status @ 200..=599 => u16::try_from(status).ok(),
            other => return Err(format!("{other} is no status to answer with")),
        };
        let grpc = match wire.abort_grpc {
            None => None,
            Some(code @ 0..=16) => u8::try_from(code).ok(),
            Some(other) => return Err(format!("{other} is no gRPC status")),
        };
        Ok(Self {
            delay: ms(wire.delay),
            delay_per_million: wire.delay_per_million,
            abort: Abort { status, grpc },
            abort_per_million: wire.abort_per_million,
            origin: (&*wire.origin).into(),
        })
    }

    /// How long this request is held up, if it is one of the share.
    pub fn delay(&self, rng: &mut fastrand::Rng) -> Option<Duration> {
        (!self.delay.is_zero() && draw(self.delay_per_million, rng)).then_some(self.delay)
    }

    /// What this request is answered instead, if it is one of the share.
    pub fn abort(&self, rng: &mut fastrand::Rng) -> Option<Abort> {
        draw(self.abort_per_million, rng).then_some(self.abort)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_kept() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut of_100_000 = |per_million| (0..100_000).filter(|_| draw(per_million, &mut rng)).count();
        assert_eq!(of_100_000(0), 0);
        assert_eq!(of_100_000(1_000_000), 100_000);
        assert_eq!(of_100_000(u32::MAX), 100_000);
        assert!(of_100_000(100_000).abs_diff(10_000) < 500);
    }

    #[test]
    fn delay_and_abort_are_drawn_apart() {
        let wire = v1::Fault {
            delay: 20,
            delay_per_million: 500_000,
            abort_status: 418,
            abort_grpc: Some(9),
            abort_per_million: 500_000,
            origin: "TrafficPolicy a/b".to_owned(),
        };
        let fault = Fault::from_wire(&wire).unwrap();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut seen = [0_u32; 4];
        for _ in 0..10_000 {
            let (delay, abort) = (fault.delay(&mut rng), fault.abort(&mut rng));
            assert!(delay.is_none_or(|delay| delay == Duration::from_millis(20)));
            assert!(abort.is_none_or(|abort| abort == Abort { status: Some(418), grpc: Some(9) }));
            seen[usize::from(delay.is_some()) * 2 + usize::from(abort.is_some())] += 1;
        }
        assert!(seen.iter().all(|seen| seen.abs_diff(2500) < 200), "{seen:?}");
        assert_eq!(
            Fault { delay: Duration::ZERO, delay_per_million: 1_000_000, ..fault }.delay(&mut rng),
            None
        );
    }

    #[test]
    fn what_nobody_can_answer_is_refused() {
        for wire in [
            v1::Fault { abort_status: 101, ..v1::Fault::default() },
            v1::Fault { abort_status: 600, ..v1::Fault::default() },
            v1::Fault { abort_grpc: Some(17), ..v1::Fault::default() },
        ] {
            assert!(Fault::from_wire(&wire).is_err(), "{wire:?}");
        }
    }
}
