//! What access policies decide, counted by policy and rule.
//!
//! Every request is decided on, so that a counter must cost no look-up: a verdict says by its place who decided, and a thread keeps
//! what it counts with by that place, for as long as the policies stay what they are.

use outrigger_core::access::{Access, Verdict};

use crate::metrics::{Decided, Metrics};

/// The counters of one thread.
#[derive(Default)]
pub(super) struct Decisions {
    /// The policies' that they are about.
    epoch: u64,
    /// By [`Verdict::decider`]; made when there is something to count.
    counters: Vec<Option<Decided>>,
}

impl Decisions {
    pub(super) fn count(&mut self, metrics: &Metrics, epoch: u64, access: &Access, verdict: &Verdict<'_>) {
        if self.epoch != epoch || self.counters.len() != access.deciders() {
            self.epoch = epoch;
            self.counters.clear();
            self.counters.resize_with(access.deciders(), || None);
        }
        let decision = match (verdict.allowed, verdict.audited) {
            (false, _) => "denied",
            (true, false) => "allowed",
            (true, true) => "audited",
        };
        self.add(verdict.decider, || {
            let (policy, rule) = verdict.by.names();
            metrics.decided(policy, rule, decision)
        });
        for audit in &verdict.audits {
            let decision = if audit.would_allow { "would_allow" } else { "would_deny" };
            self.add(audit.decider, || metrics.decided(audit.policy, audit.rule, decision));
        }
    }

    fn add(&mut self, decider: usize, counter: impl FnOnce() -> Decided) {
        if let Some(known) = self.counters.get_mut(decider) {
            known.get_or_insert_with(counter).inc();
        }
    }
}
