//! Whether the proxy can do its work: what is still missing, by name, and whether every worker still turns.
//!
//! "The process runs" says nothing. What counts is on the data path: a certificate, the mesh's ranges, listeners that
//! are open, and threads that come round to serve them.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A worker that did not come round for this long hangs: its turns take microseconds.
const WORKER_SILENCE: Duration = Duration::from_secs(5);

/// Something without which there is no service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blocker {
    /// The first certificate.
    Certificate,
    /// The mesh's ranges.
    Mesh,
    /// Who may call the own workload.
    Policy,
    /// The listeners.
    Listeners,
}

impl Blocker {
    /// The name in `/ready`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Mesh => "mesh",
            Self::Policy => "policy",
            Self::Listeners => "listeners",
        }
    }
}

/// What is missing, and when each worker last came round.
#[derive(Debug)]
pub struct Readiness(Mutex<State>);

#[derive(Debug)]
struct State {
    missing: BTreeSet<Blocker>,
    beats: Vec<Instant>,
}

impl Default for Readiness {
    fn default() -> Self {
        let missing = [Blocker::Certificate, Blocker::Mesh, Blocker::Policy, Blocker::Listeners].into();
        Self(Mutex::new(State { missing, beats: Vec::new() }))
    }
}

impl Readiness {
    /// `blocker` is there.
    pub fn clear(&self, blocker: Blocker) {
        if self.lock().missing.remove(&blocker) {
            tracing::debug!(blocker = blocker.as_str(), "ready");
        }
    }

    /// `blocker` is missing again.
    pub fn block(&self, blocker: Blocker) {
        self.lock().missing.insert(blocker);
    }

    /// Worker number `worker` came round. Called by each worker once a second, never on a request's path.
    pub fn beat(&self, worker: usize) {
        let now = Instant::now();
        let mut state = self.lock();
        if state.beats.len() <= worker {
            state.beats.resize(worker + 1, now);
        }
        state.beats[worker] = now;
    }

    /// What is missing, in words; empty when ready.
    pub fn missing(&self) -> Vec<String> {
        let state = self.lock();
        let blockers = state.missing.iter().map(|blocker| blocker.as_str().to_owned());
        let hanging = (0..state.beats.len())
            .filter(|worker| state.beats[*worker].elapsed() > WORKER_SILENCE)
            .map(|worker| format!("worker {worker} hangs"));
        blockers.chain(hanging).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_must_be_there() {
        let ready = Readiness::default();
        assert_eq!(ready.missing(), ["certificate", "mesh", "policy", "listeners"]);
        ready.clear(Blocker::Mesh);
        ready.clear(Blocker::Policy);
        ready.clear(Blocker::Listeners);
        ready.clear(Blocker::Certificate);
        ready.beat(1);
        assert!(ready.missing().is_empty());
        ready.block(Blocker::Certificate);
        assert_eq!(ready.missing(), ["certificate"]);
    }
}
