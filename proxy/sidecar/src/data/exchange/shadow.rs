//! Copies of a request: for somebody who is to see it (a mirror), and to another endpoint when the first one is slow (a hedge).
//!
//! A copy is an exchange of its own that has no client. What a mirror is answered is thrown away. What a hedge is answered first is
//! handed over to the exchange whose copy it is, with the connection that it came on; whichever of the two comes second is
//! cancelled.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use outrigger_core::{model::Protocol, retry};
use outrigger_http::{fields::Fields, h1::Framing, h2::Code, head::Version};
use tokio::sync::oneshot;

use super::{Exchange, State};
use crate::{
    data::{Worker, balance::Route, exchanges::Key, reasons::Refusal, serve::Handler},
    drain,
};

/// What a health check calls itself.
const USER_AGENT: &[u8] = concat!("outrigger-health/", env!("CARGO_PKG_VERSION")).as_bytes();

/// How long a mirror may take whose service has no `timeouts.request`: nobody waits for it, so nobody else would end it.
const MIRROR_LIMIT: Duration = Duration::from_secs(30);
/// Mirrors under way in one thread. Each has a connection where it is asked over HTTP/1.1; a request beyond is not copied.
const MIRRORS: usize = 1_024;

/// Why an exchange has no client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shadow {
    /// Nobody waits for its answer.
    Mirror,
    /// This exchange does.
    Hedge(Key),
    /// A health check, which looks at its status.
    Check,
}

impl Exchange {
    /// Sends copies of the request to those who are to see it.
    pub(super) fn mirror(&mut self, worker: &Rc<Worker>) {
        for way in std::mem::take(&mut self.plan.mirrors) {
            // The worker has one itself.
            if Rc::strong_count(&worker.mirroring) > MIRRORS {
                continue;
            }
            let copy = worker.begin(|copy, worker, key| {
                copy.begin_copy(worker, self, Shadow::Mirror, &way);
                copy.mirrored = Some(worker.mirroring.clone());
                let traffic = way.target.service.peek().traffic.clone();
                let limit = traffic.and_then(|traffic| traffic.timeouts.request.flatten());
                copy.plan.deadline = copy.begun.map(|begun| begun + limit.unwrap_or(MIRROR_LIMIT));
                copy.set_alarm(worker);
                copy.next_endpoint(worker, key);
            });
            self.mirrors.push(copy);
        }
    }

    /// Asks another endpoint beside the one that is slow.
    pub(super) fn hedge(&mut self, worker: &Rc<Worker>, key: Key) {
        let Some(way) = self.way().cloned() else { return };
        let rival = worker.begin(|copy, worker, copy_key| {
            copy.begin_copy(worker, self, Shadow::Hedge(key), &way);
            copy.request.copy(&self.request);
            copy.tried.extend(self.attempt.as_ref().map(|attempt| attempt.endpoint.id.clone()));
            copy.next_endpoint(worker, copy_key);
        });
        // It may have ended where it began: there was no endpoint for it.
        self.rival = Some(rival).filter(|rival| worker.exchanges.lives(*rival));
    }

    /// Asks an endpoint whether it is well; whoever waits for the answer is told whether it was a good one, or that nobody was asked.
    pub(in crate::data) fn check(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        way: &Rc<Route>,
        path: &str,
        answer: oneshot::Sender<Option<bool>>,
    ) {
        let service = way.target.service.load();
        let is_h2 = service.protocol(way.target.port) == Protocol::Http2;
        self.shadow = Some(Shadow::Check);
        self.checks = Some(answer);
        self.state = State::Connecting;
        self.message.version = if is_h2 { Version::Http2 } else { Version::Http11 };
        self.framing = Some(Framing::Empty);
        self.request.ended = true;
        self.head.version = self.message.version;
        self.head.set_method(b"GET");
        self.head.set_path(Some(path.as_bytes()));
        self.head.set_authority(Some(service.name.as_bytes()));
        self.head.fields.push(b"host", service.name.as_bytes());
        self.head.fields.push(b"user-agent", USER_AGENT);
        self.handler = Some(Handler::Outbound(way.clone()));
        self.next_endpoint(worker, key);
    }

    /// Ends an exchange that has no client.
    pub(in crate::data) fn end(&mut self, worker: &Rc<Worker>) {
        self.give_up(worker, Code::CANCEL);
    }

    /// Whether nobody reads what it is answered.
    pub(super) fn is_discarded(&self) -> bool {
        matches!(self.shadow, Some(Shadow::Mirror | Shadow::Check))
    }

    fn begin_copy(&mut self, worker: &Rc<Worker>, of: &Self, shadow: Shadow, way: &Rc<Route>) {
        let now = Instant::now();
        (self.begun, self.moved) = (Some(now), Some(now));
        self.state = State::Connecting;
        self.shadow = Some(shadow);
        self.head.clone_from(&of.head);
        (self.message, self.framing, self.is_grpc) = (of.message, of.framing, of.is_grpc);
        self.request.ended = of.request.ended && of.request.is_empty();
        self.handler = Some(Handler::Outbound(way.clone()));
        self.busy = Some(worker.busy(drain::Side::Outbound));
        self.edge = Some(way.edge());
    }

    /// Passes a piece of the request's body on to its mirrors.
    pub(super) fn copy_body(&mut self, worker: &Rc<Worker>, data: &[u8], end: Option<&Fields>) {
        self.mirrors.retain(|key| {
            let mut goes_on = false;
            worker.with(*key, |copy, worker| {
                goes_on = copy.body(worker, *key, true, data, end);
                if !goes_on {
                    // Whoever cannot keep up with the request must not hold it up.
                    copy.give_up(worker, Code::CANCEL);
                }
            });
            goes_on
        });
    }

    /// A piece of what a mirror answers.
    pub(super) fn discard(&mut self, worker: &Rc<Worker>, data: &[u8], end: bool) -> bool {
        if let Some(up) = &self.up {
            up.release(worker, data.len());
        }
        if end {
            self.response.ended = true;
            self.response.end_sent = true;
            self.settle(worker);
        }
        true
    }

    /// A hedge was answered, by the head in `answer`: the exchange that it is a copy of goes on with this.
    pub(super) fn hand_over(&mut self, worker: &Rc<Worker>, of: Key, framing: Framing) {
        let mut taken = false;
        worker.with(of, |original, worker| taken = original.take_over(worker, of, self, framing));
        if taken {
            self.over(worker);
        } else {
            self.give_up(worker, Code::CANCEL);
        }
    }

    fn take_over(&mut self, worker: &Rc<Worker>, key: Key, rival: &mut Self, framing: Framing) -> bool {
        let waits = matches!(self.state, State::Connecting | State::Asked);
        // A failure is no answer while there is hope for a better one.
        let failed = self.up.is_some() && rival.was_answered_in_vain();
        self.rival = None;
        if !waits || failed || self.held.is_some() {
            return false;
        }
        let Some(up) = rival.up.take() else { return false };
        if let Some(slow) = self.up.take() {
            slow.abort(worker, Code::CANCEL);
        }
        up.belongs_to(key);
        self.up = Some(up);
        std::mem::swap(&mut self.answer, &mut rival.answer);
        std::mem::swap(&mut self.request, &mut rival.request);
        (self.attempt, self.target) = (rival.attempt.take(), rival.target.take());
        self.edge = self.attempt.as_ref().map(|attempt| attempt.edge.clone());
        (self.failed, rival.shadow) = (None, None);
        self.asking();
        self.answered(worker, key, framing);
        true
    }

    /// Whether another endpoint might have answered better: this one failed, or its sidecar would not let the request in.
    fn was_answered_in_vain(&self) -> bool {
        let code = self.is_grpc.then(|| retry::grpc_status(|name| self.answer.fields.get(name))).flatten();
        let status = self.answer.status;
        self.is_refused_by_policy()
            || status >= 500
            || status == 429
            // UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL and UNAVAILABLE.
            || matches!(code, Some(2 | 4 | 8 | 13 | 14))
    }

    /// A hedge has ended without an answer: whoever waited for nothing else is told why.
    pub(super) fn tell_original(&mut self, worker: &Rc<Worker>) {
        if let Some(Shadow::Hedge(of)) = self.shadow.take() {
            worker.with(of, |original, worker| {
                original.rival = None;
                if let Some(refusal) = original.failed.take() {
                    original.refuse(worker, refusal);
                }
            });
        }
    }

    /// The own try has failed: where a hedge is under way, its answer is waited for.
    pub(super) fn leaves_it_to_rival(&mut self, refusal: &Refusal) -> bool {
        if self.rival.is_none() {
            return false;
        }
        self.failed = Some(refusal.clone());
        self.attempt = None;
        (self.target, self.in_line) = (None, None);
        self.state = State::Connecting;
        true
    }

    /// Cancels the hedge, whose answer is not needed any more.
    pub(super) fn drop_rival(&mut self, worker: &Rc<Worker>) {
        if let Some(rival) = self.rival.take() {
            worker.with(rival, |rival, worker| {
                rival.shadow = None;
                rival.give_up(worker, Code::CANCEL);
            });
        }
    }
}
