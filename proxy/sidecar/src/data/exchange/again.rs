//! Another try after one that has failed, where a policy asks for it: whether, when, and where.
//!
//! Whether is decided by `outrigger_core::retry`; here is what it needs to know, and the pause. What is certain to have done
//! nothing (no connection, a stream that was refused unread) needs no policy and is in `ask`.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use outrigger_core::{
    deadline,
    reason::Reason,
    retry::{self, Failure, Retry, Tried, Verdict, Why},
};
use outrigger_http::h2::Code;

use super::{Exchange, State};
use crate::data::{Worker, exchanges::Key, leg::Leg, reasons::Refusal, view::Seen};

/// What was tried, and what an exchange waits for.
#[derive(Default)]
pub(super) struct Tries {
    /// Tries that a policy asked for.
    retries: u32,
    /// How often the caller had tried before, as it says.
    callers: Option<u32>,
    /// A pause before the next one.
    rests_until: Option<Instant>,
    /// When the one that is under way has taken too long.
    one_until: Option<Instant>,
    /// When another endpoint is asked beside it.
    hedge_at: Option<Instant>,
}

impl Exchange {
    /// When it wants to be woken.
    pub(in crate::data) fn wants_waking(&self) -> Option<Instant> {
        let waits = matches!(self.state, State::Connecting | State::Asked);
        let one = [self.tries.rests_until, self.tries.one_until, self.tries.hedge_at];
        let one = one.into_iter().flatten().filter(|_| waits);
        one.chain(self.plan.delayed_until).chain(self.plan.deadline).min()
    }

    /// Its moment has come.
    pub(in crate::data) fn woken(&mut self, worker: &Rc<Worker>, key: Key, now: Instant) {
        let past = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if past(self.plan.deadline) {
            return self.too_late(worker);
        }
        if past(self.plan.delayed_until) {
            self.plan.delayed_until = None;
            self.next_endpoint(worker, key);
        }
        if past(self.tries.rests_until) {
            self.tries.rests_until = None;
            self.next_endpoint(worker, key);
        }
        if past(self.tries.one_until) {
            self.tries.one_until = None;
            self.took_too_long(worker, key);
        }
        if past(self.tries.hedge_at) {
            self.tries.hedge_at = None;
            self.hedge_if_it_may(worker, key);
        }
        self.set_alarm(worker);
    }

    /// Has itself woken.
    pub(super) fn set_alarm(&self, worker: &Worker) {
        if let Some(at) = self.wants_waking() {
            worker.alarm.set(at);
        }
    }

    /// A try begins: how long it may take.
    pub(super) fn begins_try(&mut self, worker: &Worker) {
        let now = Instant::now();
        // A mirror sees the request as it is.
        if let Some(deadline) = self.plan.deadline.filter(|_| !self.is_discarded()) {
            let left = deadline.saturating_duration_since(now);
            if self.is_grpc {
                self.head.fields.set(deadline::GRPC_HEADER, &deadline::grpc_timeout(left));
            } else {
                let name = deadline::header_beside(self.head.fields.iter().next().map(|(name, _)| name));
                self.head.fields.set(name, &deadline::milliseconds(left));
            }
        }
        let Some(traffic) = &self.plan.traffic else { return };
        self.tries.one_until = traffic.timeouts.per_try.map(|limit| now + limit);
        if self.shadow.is_none() && self.rival.is_none() {
            self.tries.hedge_at = traffic.hedge.as_ref().map(|hedge| now + hedge.after);
        }
        self.set_alarm(worker);
    }

    /// The deadline has passed.
    fn too_late(&mut self, worker: &Rc<Worker>) {
        self.plan.deadline = None;
        match self.state {
            State::Over | State::Switched => {}
            State::Connecting | State::Asked => {
                let took = self.begun.map(|begun| begun.elapsed()).unwrap_or_default();
                let limit = self.plan.traffic.as_ref().and_then(|traffic| traffic.timeouts.request.flatten());
                // How long a caller has patience says nothing of the endpoint; what the policy calls too long does.
                if limit.is_some_and(|limit| took >= limit) {
                    self.was_silent(worker);
                }
                let whose = match &self.plan.traffic {
                    Some(traffic) if limit.is_some_and(|limit| took >= limit) => &*traffic.timeouts.origin,
                    _ => "the caller's own time-out",
                };
                let (whom, waited) = (self.whom(), self.why_it_waited());
                let text = format!("not answered within {} ms ({whose}) by {whom}{waited}", took.as_millis());
                self.refuse(worker, Refusal::new(Reason::RequestTimeout, text));
            }
            State::Answering => self.cut(worker, Code::CANCEL),
        }
    }

    /// The endpoint has not answered in time. Where nothing at all was heard on its connection since, nobody else is to wait for it.
    pub(super) fn was_silent(&mut self, worker: &Worker) {
        // Who stands in line has asked nobody.
        let Some(attempt) = self.attempt.as_mut().filter(|_| self.in_line.is_none()) else { return };
        attempt.failed();
        if let (Some(Leg::H2(connection, _)), Some(target), Some(begun)) =
            (&self.up, &self.target, self.begun)
            && !connection.was_heard_since(begun)
        {
            worker.pool.forget(worker, target, connection);
        }
    }

    /// What is added to a text about a time-out.
    pub(super) fn why_it_waited(&self) -> String {
        let way = self.way().filter(|_| self.in_line.is_some());
        way.map_or_else(String::new, |way| format!(": {}", way.why_it_waits()))
    }

    /// The try that is under way has taken too long.
    fn took_too_long(&mut self, worker: &Rc<Worker>, key: Key) {
        let waited = self.why_it_waited();
        let text = format!("not answered within the time-out of one try by {}{waited}", self.whom());
        let refusal = Refusal::new(Reason::RequestTimeout, text);
        let failure = if self.in_line.is_some() { Failure::NothingHappened } else { Failure::PerTryTimeout };
        self.was_silent(worker);
        self.failed_try(worker, key, &failure, refusal);
    }

    /// A try has failed: another one follows, or the client is told.
    pub(super) fn failed_try(&mut self, worker: &Rc<Worker>, key: Key, failure: &Failure, refusal: Refusal) {
        // Whoever refused a connection has counted that.
        if let Some(attempt) = self.attempt.as_mut().filter(|_| *failure != Failure::NothingHappened) {
            attempt.failed();
        }
        if let Some(up) = self.up.take() {
            up.abort(worker, Code::CANCEL);
        }
        if !self.tries_again(worker, key, failure) && !self.leaves_it_to_rival(&refusal) {
            self.refuse(worker, refusal);
        }
    }

    fn retry(&self) -> Option<&Retry> {
        // A hedge is another try already.
        self.plan.traffic.as_ref()?.retry.as_ref().filter(|_| self.shadow.is_none())
    }

    /// Bytes of the request's body that are worth keeping.
    pub(super) fn keeps_bytes(&self) -> Option<usize> {
        self.retry().map(|retry| retry.max_body)
    }

    /// Whether an answer whose status is in its trailers may be followed by another try.
    pub(super) fn may_depend_on_trailers(&self) -> bool {
        self.retry().is_some_and(|retry| !retry.grpc_codes.is_empty())
    }

    /// Whether a failed try is followed by another one, which then pauses or is under way.
    pub(super) fn tries_again(&mut self, worker: &Rc<Worker>, key: Key, failure: &Failure) -> bool {
        let Some(route) = self.way().cloned() else { return false };
        if self.retry().is_none() || route.is_pinned() {
            return false;
        }
        let now = Instant::now();
        // Read before the head says how often we have tried.
        let callers = *self.tries.callers.get_or_insert_with(|| retry::attempt_of(&Seen(&self.head)));
        let tried = Tried {
            retries: self.tries.retries,
            is_safe: retry::is_safe_to_repeat(&Seen(&self.head)),
            is_repeatable: self.request.is_repeatable(),
            is_answered: !matches!(self.state, State::Connecting | State::Asked),
            callers_attempt: callers,
            left: self.plan.deadline.map(|deadline| deadline.saturating_duration_since(now)),
        };
        let Some(retry) = self.retry() else { return false };
        let after = match retry.decide(failure, &tried, &mut worker.rng.borrow_mut()) {
            Verdict::Again { after } if route.takes_from_budget(retry, now) => after,
            Verdict::Again { .. } => {
                route.counts_retry("budget");
                return false;
            }
            // An answer that the policy does not speak of is no failed try.
            Verdict::No(Why::NotNamed) => return false,
            Verdict::No(why) => {
                route.counts_retry(why.as_str());
                return false;
            }
        };
        route.counts_retry("retried");
        self.tries.retries += 1;
        self.go_back(worker);
        self.rest(worker, key, now, after);
        true
    }

    /// As before the first try, but for what was tried.
    fn go_back(&mut self, worker: &Rc<Worker>) {
        if let Some(up) = self.up.take() {
            up.abort(worker, Code::CANCEL);
        }
        if let Some(attempt) = self.attempt.take() {
            let id = attempt.endpoint.id.clone();
            drop(attempt);
            self.tried.push(id);
        }
        if !self.has_others() {
            self.tried.clear();
        }
        self.tries.one_until = None;
        (self.target, self.in_line) = (None, None);
        self.request.again();
        let attempt = self.tries.retries.saturating_add(self.tries.callers.unwrap_or(0));
        retry::mark_attempt(attempt, |name, value| self.head.fields.set(name, value));
        self.state = State::Connecting;
    }

    fn rest(&mut self, worker: &Rc<Worker>, key: Key, now: Instant, after: Duration) {
        if after.is_zero() {
            return self.next_endpoint(worker, key);
        }
        self.tries.rests_until = Some(now + after);
        self.set_alarm(worker);
    }

    fn hedge_if_it_may(&mut self, worker: &Rc<Worker>, key: Key) {
        let Some(traffic) = self.plan.traffic.clone() else { return };
        let is_whole = self.request.ended && self.request.is_repeatable();
        let may = self.state == State::Asked
            && self.rival.is_none()
            && is_whole
            && retry::is_safe_to_repeat(&Seen(&self.head));
        let Some(route) = self.way().cloned().filter(|route| may && !route.is_pinned()) else { return };
        let now = Instant::now();
        let fits = match &traffic.retry {
            Some(retry) => route.takes_from_budget(retry, now),
            None => route.takes_from_budget(&Retry::default(), now),
        };
        if fits {
            route.counts_retry("hedged");
            self.hedge(worker, key);
        } else {
            route.counts_retry("budget");
        }
    }
}
