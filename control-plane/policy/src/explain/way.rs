//! A question on its way: what was decided so far, and how it ends.

use outrigger_core::deadline;
use outrigger_core::reason::Reason;
use outrigger_core::request::Request;
use outrigger_core::traffic::Traffic;

use super::Question;
use super::answer::{Explanation, Origin, Outcome, Step};
use crate::kinds::Decision;
use crate::value::Span;

/// A question on its way.
pub(super) struct Way<'q> {
    pub(super) question: &'q Question,
    pub(super) steps: Vec<Step>,
    pub(super) outcomes: Vec<Outcome>,
    /// What is known of every outcome from here on.
    pub(super) so_far: Outcome,
}

impl<'q> Way<'q> {
    pub(super) fn new(question: &'q Question) -> Self {
        let so_far = Outcome {
            decision: Decision::Allow,
            status: None,
            reason: None,
            policy: None,
            rule: None,
            route: None,
            backend: None,
            retries: 0,
            retries_by: None,
            timeout: None,
            timeout_by: None,
        };
        Self { question, steps: Vec::new(), outcomes: Vec::new(), so_far }
    }

    pub(super) fn step(&mut self, what: &str, decision: impl Into<String>, by: Option<Origin>) {
        self.steps.push(Step { what: what.to_owned(), decision: decision.into(), by });
    }

    pub(super) fn ends(&mut self, decision: Decision, reason: Reason) {
        let status = Some(reason.http_status());
        let reason = Some(reason.code().to_owned());
        self.outcomes.push(Outcome { decision, status, reason, ..self.so_far.clone() });
    }

    /// Says how it is called. `false`: it is not, a fault is made of it.
    pub(super) fn is_called(&mut self, traffic: Option<&Traffic>, request: Option<&Request>) -> bool {
        let asked = request.and_then(deadline::asked);
        let policy = traffic.and_then(|traffic| traffic.timeouts.request);
        if let Some(Some(timeout)) =
            policy.filter(|policy| policy.is_none_or(|policy| asked.is_none_or(|a| policy <= a)))
        {
            let origin = traffic.map(|traffic| traffic.timeouts.origin.to_string()).unwrap_or_default();
            self.is_over_after(timeout, Origin::of(&origin), origin);
        } else if let Some(asked) = asked {
            self.is_over_after(asked, None, "the request".to_owned());
        }
        let (Some(traffic), Some(request)) = (traffic, request) else { return true };
        if let Some(policy) = &traffic.retry {
            let may = policy.may_repeat(request);
            self.so_far.retries = if may { policy.attempts } else { 0 };
            self.so_far.retries_by = Some(policy.origin.to_string());
            let text = match (policy.attempts, may) {
                (0, _) => "none".to_owned(),
                (attempts, true) => format!("up to {attempts}"),
                (_, false) => {
                    "none: the method is not safe to repeat, and there is no Idempotency-Key".to_owned()
                }
            };
            self.step("retries", text, Origin::of(&policy.origin));
        }
        let Some(fault) = &traffic.fault else { return true };
        let percent = |per_million: u32| f64::from(per_million) / 10_000.0;
        if fault.delay_per_million > 0 {
            let text = format!("{} % wait {} ms", percent(fault.delay_per_million), fault.delay.as_millis());
            self.step("fault", text, Origin::of(&fault.origin));
        }
        if fault.abort_per_million > 0 {
            let text = format!("{} % are aborted", percent(fault.abort_per_million));
            self.step("fault", text, Origin::of(&fault.origin));
        }
        if fault.abort_per_million < 1_000_000 {
            return true;
        }
        let status = fault.abort.status.unwrap_or(Reason::FaultInjected.http_status());
        self.ends(Decision::Error, Reason::FaultInjected);
        if let Some(outcome) = self.outcomes.last_mut() {
            outcome.status = Some(status);
        }
        false
    }

    fn is_over_after(&mut self, timeout: std::time::Duration, by: Option<Origin>, origin: String) {
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self.so_far.timeout = Some(Span::from_millis(millis));
        self.so_far.timeout_by = Some(origin);
        self.step("timeout", Span::from_millis(millis).to_string(), by);
    }

    pub(super) fn arrive(self) -> Explanation {
        let worst = self.outcomes.iter().max_by_key(|outcome| match outcome.decision {
            Decision::Allow => 0,
            Decision::Redirect => 1,
            Decision::NoRoute => 2,
            Decision::Error => 3,
            Decision::Deny => 4,
        });
        // Every way pushes one; should one not, nothing has stopped it.
        let outcome = worst.unwrap_or(&self.so_far).clone();
        Explanation { steps: self.steps, outcome, outcomes: self.outcomes }
    }
}
