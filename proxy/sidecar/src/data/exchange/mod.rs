//! One request and its response: the two sides and what passes between them.
//!
//! An exchange has no task. Its connections tell it what they read, and it acts at once: chooses an endpoint, writes the request into
//! that endpoint's connection, the response into the client's, and passes bodies on as far as there is room ([`pipe`]). What has to
//! wait, for a connection or for room, is taken up again by the turn ([`super::turn`]).
//!
//! - `plan`: what the policies say of the request
//! - `ask`: endpoints, connections, the request, and what is certain to have done nothing
//! - `again`: another try that a policy asks for, and time-outs
//! - `shadow`: copies of the request
//! - `answer`: the response, refusals, and what is counted

mod again;
mod answer;
mod ask;
mod pipe;
mod plan;
mod shadow;

use std::{io, rc::Rc, sync::Arc, time::Instant};

use outrigger_core::bulkhead::Permit;
use outrigger_http::{
    fields::Fields,
    h1::{Error, Framing},
    h2::Code,
    head::{RequestHead, ResponseHead},
};

use tokio::sync::oneshot;

use self::{
    again::Tries,
    answer::Record,
    pipe::Pipe,
    plan::{Plan, Planned},
    shadow::Shadow,
};
use super::{
    Busy, Worker,
    authorize::Admission,
    balance::Attempt,
    exchanges::Key,
    leg::Leg,
    line::InLine,
    message::{self, Message},
    pool::PoolKey,
    reasons::{Refusal, is_grpc},
    serve::{Handler, head_refusal},
};
use crate::{
    drain,
    metrics::{Direction, Edge},
};

/// The largest head whose memory is kept for another exchange.
const SMALL_HEAD: usize = 8 * 1024;

/// Interim responses to one request, at most: a server has no use for more, a loop of them would never end.
const MAX_INTERIM: u8 = 64;

/// How far an exchange has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Over,
    /// Waits for a connection.
    Connecting,
    /// The request goes out, or has.
    Asked,
    /// The response's head has gone out.
    Answering,
    /// Bytes instead of messages, both ways.
    Switched,
}

#[derive(Default)]
pub(crate) struct Exchange {
    state: State,
    down: Option<Leg>,
    up: Option<Leg>,
    handler: Option<Handler>,
    head: RequestHead,
    message: Message,
    /// How the request's body is framed where it came from.
    framing: Option<Framing>,
    answer: ResponseHead,
    request: Pipe,
    response: Pipe,
    is_grpc: bool,
    interims: u8,
    // Which endpoints were tried.
    attempt: Option<Attempt>,
    attempts: usize,
    tried: Vec<Arc<str>>,
    /// What it is connected to, or waits for.
    target: Option<PoolKey>,
    /// How often the request was sent again to the same application.
    repeats: u8,
    // What the policies say.
    /// Inbound: that it may.
    admission: Option<Admission>,
    plan: Plan,
    /// Its place among the requests to its service, and among those that wait for a connection.
    runs: Option<Permit>,
    waits: Option<Permit>,
    /// Where all connections that its service may have are in use.
    in_line: Option<InLine>,
    tries: Tries,
    /// The answer's head is here and waits for what comes with it, which may be its status.
    held: Option<Framing>,
    shadow: Option<Shadow>,
    mirrors: Vec<Key>,
    /// Of a mirror: that it counts among those under way.
    mirrored: Option<Rc<()>>,
    /// Who waits for the status of a health check.
    checks: Option<oneshot::Sender<Option<bool>>>,
    /// The hedge that is under way.
    rival: Option<Key>,
    /// What the client is told if the hedge fails, too.
    failed: Option<Refusal>,
    // What is counted.
    edge: Option<Rc<Edge>>,
    record: Option<Record>,
    begun: Option<Instant>,
    /// When the request's last byte came.
    asked_at: Option<Instant>,
    /// When a byte passed last.
    moved: Option<Instant>,
    busy: Option<Busy>,
}

impl Exchange {
    pub(super) fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// As new, with its memory.
    pub(super) fn reset(&mut self) {
        self.request.reset();
        self.response.reset();
        self.head.clear();
        self.answer.clear();
        self.tried.clear();
        *self = Self {
            head: std::mem::take(&mut self.head),
            answer: std::mem::take(&mut self.answer),
            request: std::mem::take(&mut self.request),
            response: std::mem::take(&mut self.response),
            tried: std::mem::take(&mut self.tried),
            ..Self::default()
        };
    }

    /// Whether it is worth keeping for another request.
    pub(super) fn is_small(&self) -> bool {
        self.head.fields.capacity() + self.answer.fields.capacity() <= 2 * SMALL_HEAD
    }

    /// It panicked: nothing that it touched can be trusted.
    pub(super) fn panicked(&mut self, worker: &Worker) {
        for leg in [self.down.take(), self.up.take()].into_iter().flatten() {
            leg.abort(worker, Code::INTERNAL_ERROR);
        }
    }

    pub(super) fn take_head(&mut self, head: RequestHead) -> RequestHead {
        std::mem::replace(&mut self.head, head)
    }

    pub(super) fn swap_head(&mut self, head: &mut RequestHead) {
        std::mem::swap(&mut self.head, head);
    }

    pub(super) fn answer_mut(&mut self) -> &mut ResponseHead {
        &mut self.answer
    }

    // What the client's connection tells.

    /// A request has come, its head by [`swap_head`](Self::swap_head). Unless it is refused,
    /// [`set_out`](Self::set_out) must follow.
    pub(super) fn begin(&mut self, worker: &Rc<Worker>, down: Leg, handler: &Handler, framing: Framing) {
        self.start(worker, down, handler, is_grpc(&self.head.fields));
        self.framing = Some(framing);
        self.request.ended = framing.is_empty();
        self.asked_at = self.request.ended.then(Instant::now);
        let head = &mut self.head;
        let message = match handler {
            Handler::Refuse(refusal) => return self.refuse(worker, (**refusal).clone()),
            Handler::Inbound(entry) if entry.peer().is_some() => Message::from_sidecar(head, framing),
            Handler::Inbound(_) | Handler::Outbound(_) => Message::from_application(head, framing),
        };
        self.message = match message {
            Ok(message) => message,
            Err(refusal) => return self.refuse(worker, refusal),
        };
        if self.message.switches() {
            // What follows is not of the message.
            self.request.ended = false;
        }
        if let Handler::Outbound(route) = handler {
            match self.plan(worker, route) {
                Planned::Goes => match self.way().map(|way| way.holds_request()).transpose() {
                    Ok(runs) => self.runs = runs,
                    Err(refusal) => return self.refuse(worker, refusal),
                },
                Planned::Refused(refusal) => return self.refuse(worker, refusal),
                Planned::Redirected(status, location) => return self.redirect(worker, status, &location),
            }
        }
        self.request.keep(framing, self.keeps_bytes());
    }

    /// Turns to an endpoint, or to the application.
    pub(super) fn set_out(&mut self, worker: &Rc<Worker>, key: Key) {
        if self.state != State::Connecting {
            return;
        }
        match &self.handler {
            Some(Handler::Outbound(_)) => {
                if !self.plan.mirrors.is_empty() {
                    self.mirror(worker);
                }
                self.set_alarm(worker);
                if self.plan.delayed_until.is_none() {
                    self.next_endpoint(worker, key);
                }
            }
            Some(Handler::Inbound(entry)) => {
                let entry = entry.clone();
                let now = self.begun.unwrap_or_else(Instant::now);
                match entry.admit(worker, &mut self.head, now) {
                    Ok(admission) => self.admission = Some(admission),
                    Err(refusal) => return self.refuse(worker, refusal),
                }
                message::identify(&mut self.head.fields, entry.peer());
                self.target = Some(PoolKey::Plain(entry.destination()));
                self.connect(worker, key);
            }
            Some(Handler::Refuse(_)) | None => {}
        }
    }

    /// A head has come that its codec refused.
    pub(super) fn refuse_head(&mut self, worker: &Rc<Worker>, down: Leg, handler: &Handler, error: &Error) {
        self.start(worker, down, handler, false);
        self.refuse(worker, head_refusal(error));
    }

    fn start(&mut self, worker: &Rc<Worker>, down: Leg, handler: &Handler, grpc: bool) {
        let now = Instant::now();
        (self.begun, self.moved) = (Some(now), Some(now));
        self.state = State::Connecting;
        self.down = Some(down);
        self.is_grpc = grpc;
        self.busy = Some(worker.busy(match handler {
            Handler::Inbound(_) => drain::Side::Inbound,
            Handler::Outbound(_) | Handler::Refuse(_) => drain::Side::Outbound,
        }));
        self.edge = match handler {
            Handler::Outbound(route) => Some(route.edge()),
            Handler::Inbound(entry) => Some(entry.edge().clone()),
            Handler::Refuse(_) => None,
        };
        self.handler = Some(handler.clone());
        self.message.version = self.head.version;
    }

    /// A piece of a body; `end`: the last, with trailers. Returns whether more may come.
    pub(super) fn body(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        from_client: bool,
        data: &[u8],
        end: Option<&Fields>,
    ) -> bool {
        self.moved = Some(Instant::now());
        let inbound = matches!(self.handler, Some(Handler::Inbound(_)));
        let mut cleaned;
        let end = match end {
            Some(trailers) if !trailers.is_empty() => {
                cleaned = trailers.clone();
                message::clean_trailers(&mut cleaned, inbound && from_client);
                Some(&cleaned)
            }
            end => end,
        };
        let takes_more = if from_client {
            if end.is_some() {
                self.asked_at = self.moved;
            }
            if !self.mirrors.is_empty() {
                self.copy_body(worker, data, end);
            }
            let sink = self.up.as_ref().filter(|_| self.state != State::Connecting);
            self.request.take(worker, key, (data, end), self.down.as_ref(), sink);
            self.request.takes_more()
        } else {
            if self.held.is_some() && !self.release_held(worker, key, data, end) {
                return true;
            }
            if let Some(trailers) = end {
                self.record_trailers(trailers);
            }
            if self.is_discarded() {
                return self.discard(worker, data, end.is_some());
            }
            self.response.take(worker, key, (data, end), self.up.as_ref(), self.down.as_ref());
            self.response.takes_more()
        };
        self.settle(worker);
        takes_more
    }

    /// The request's body is not what its head announced.
    pub(super) fn bad_body(&mut self, worker: &Rc<Worker>) {
        if matches!(self.state, State::Connecting | State::Asked) {
            return self.refuse(worker, message::broken_body());
        }
        self.cut(worker, Code::PROTOCOL_ERROR);
    }

    /// A connection has gone.
    pub(super) fn lost(&mut self, worker: &Rc<Worker>, key: Key, client: bool, error: Option<&io::Error>) {
        if client {
            self.down = None;
            return self.give_up(worker, Code::CANCEL);
        }
        let up = self.up.take();
        match self.state {
            State::Over | State::Connecting => {}
            State::Asked => self.unanswered(worker, key, up.as_ref(), error),
            State::Answering if self.response.ended => self.settle(worker),
            State::Answering | State::Switched => self.cut(worker, Code::INTERNAL_ERROR),
        }
    }

    /// A stream of HTTP/2 was reset, by its peer or because its peer broke a rule.
    pub(super) fn reset_by(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        client: bool,
        code: Code,
        by_peer: bool,
        unprocessed: bool,
    ) {
        if client {
            if let Some(down) = self.down.take() {
                // The stream has gone, its bytes still count in the window of the connection.
                self.request.settle_debts(worker, &down);
            }
            // A client that broke a rule gets no word of it further than this.
            return self.give_up(worker, if by_peer { code } else { Code::CANCEL });
        }
        self.release_up(worker);
        match self.state {
            State::Over | State::Connecting => {}
            State::Asked if unprocessed => self.unprocessed(worker, key),
            _ if self.held.is_some() => {
                self.broken(worker, key, format!("{} reset its answer: {code}", self.whom()), None);
            }
            State::Asked => {
                let reset = Some(code).filter(|_| by_peer && !self.message.is_h1());
                let text = format!("{} reset the request: {code}", self.whom());
                self.broken(worker, key, text, reset);
            }
            State::Answering if self.response.ended => self.settle(worker),
            State::Answering | State::Switched => {
                self.cut(worker, if by_peer { code } else { Code::INTERNAL_ERROR });
            }
        }
    }

    /// Goes on where it had to wait.
    pub(super) fn go_on(&mut self, worker: &Rc<Worker>, key: Key) {
        if matches!(self.state, State::Over | State::Connecting) {
            return;
        }
        if let Some(framing) = self.held.take() {
            self.accept(worker, key, framing);
        }
        self.moved = Some(Instant::now());
        if let Some(up) = &self.up {
            self.request.pump(worker, key, self.down.as_ref(), up);
        }
        if let Some(down) = self.down.as_ref().filter(|_| self.state != State::Asked) {
            self.response.pump(worker, key, self.up.as_ref(), down);
        }
        self.settle(worker);
    }

    /// Ends the exchange when everything has gone to where it belongs.
    fn settle(&mut self, worker: &Rc<Worker>) {
        match self.state {
            State::Switched if self.request.end_sent && self.response.end_sent => self.over(worker),
            State::Over | State::Connecting | State::Asked | State::Switched => {}
            State::Answering if self.response.end_sent => {
                if !self.request.ended {
                    // What is left of the request is of no use to anybody (RFC 9113, 8.1).
                    if let Some(down @ Leg::H2(..)) = &self.down {
                        down.abort(worker, Code::NO_ERROR);
                    }
                }
                if let (Some(up), false) = (&self.up, self.request.end_sent && self.response.ended) {
                    up.abort(worker, Code::CANCEL);
                }
                self.over(worker);
            }
            State::Answering => {
                if self.response.ended && self.request.end_sent {
                    // An application's connection may serve others already.
                    self.release_up(worker);
                }
            }
        }
    }

    /// The endpoint's side has nothing more to do with this.
    fn release_up(&mut self, worker: &Worker) {
        if let Some(up) = self.up.take() {
            // What still waits for the client is ours now, and bounded by the stream's window.
            self.response.settle_debts(worker, &up);
        }
    }

    /// The client has gone or has lost interest.
    fn give_up(&mut self, worker: &Rc<Worker>, code: Code) {
        if let Some(up) = &self.up {
            up.abort(worker, code);
        }
        self.over(worker);
    }

    /// Ends both sides in the middle.
    fn cut(&mut self, worker: &Rc<Worker>, code: Code) {
        if let Some(down) = &self.down {
            down.abort(worker, code);
        }
        self.give_up(worker, Code::CANCEL);
    }

    fn over(&mut self, worker: &Rc<Worker>) {
        if self.state == State::Switched
            && let Some(edge) = &self.edge
        {
            let (forth, back) = (self.request.total, self.response.total);
            let inbound = matches!(self.handler, Some(Handler::Inbound(_)));
            edge.sent.inc_by(if inbound { back } else { forth });
            edge.received.inc_by(if inbound { forth } else { back });
        }
        self.request.drop_rest(worker, self.down.as_ref());
        self.response.drop_rest(worker, self.up.as_ref());
        self.state = State::Over;
        self.tell_original(worker);
        self.drop_rival(worker);
        for key in std::mem::take(&mut self.mirrors) {
            if !self.request.ended {
                worker.with(key, |copy, worker| copy.give_up(worker, Code::CANCEL));
            }
        }
        // Counted when it is dropped.
        self.record = None;
        self.attempt = None;
        (self.admission, self.checks, self.mirrored) = (None, None, None);
        (self.runs, self.waits, self.in_line) = (None, None, None);
        self.busy = None;
        (self.down, self.up) = (None, None);
    }

    /// Ends what a new policy refuses: the stream, not the connection.
    fn judge_again(&mut self, worker: &Rc<Worker>) {
        let (Some(admission), Some(Handler::Inbound(entry))) = (&mut self.admission, &self.handler) else {
            return;
        };
        if self.state == State::Over || admission.epoch == worker.ctx.inbound.load().epoch {
            return;
        }
        match entry.still_admits(worker, Some(&self.head)) {
            Ok(epoch) => admission.epoch = epoch,
            Err(refusal) if matches!(self.state, State::Connecting | State::Asked) => {
                self.refuse(worker, refusal);
            }
            Err(refusal) => {
                worker.ctx.metrics.refused(Direction::Inbound, refusal.reason.code());
                self.cut(worker, Code::CANCEL);
            }
        }
    }

    /// Ends what takes too long, or may not go on. Called now and then, and when the inbound policy has changed.
    pub(super) fn sweep(&mut self, worker: &Rc<Worker>, now: Instant) {
        self.judge_again(worker);
        if let (State::Answering | State::Switched, Some(attempt)) = (self.state, &mut self.attempt) {
            attempt.tells_success();
        }
        let timeouts = &worker.ctx.config.timeouts;
        let passed = |since: Option<Instant>, limit: std::time::Duration| {
            since.is_some_and(|since| now.saturating_duration_since(since) >= limit)
        };
        let waits = matches!(self.state, State::Connecting | State::Asked);
        if let Some(limit) = timeouts.request.enabled()
            && waits
            && !self.plan.has_time_limit()
            && passed(self.asked_at, limit)
        {
            let (whom, waited) = (self.whom(), self.why_it_waited());
            let text = format!("not answered within {limit:?} (timeouts.request) by {whom}{waited}");
            self.was_silent(worker);
            return self.refuse(worker, Refusal::new(outrigger_core::reason::Reason::RequestTimeout, text));
        }
        let Some(limit) = self.plan.idle(timeouts.idle.enabled()) else { return };
        if !passed(self.moved, limit) {
            return;
        }
        match self.state {
            State::Asked if !self.request.ended && !self.message.switches() => self.bad_body(worker),
            State::Answering | State::Switched => self.cut(worker, Code::CANCEL),
            State::Over | State::Connecting | State::Asked => {}
        }
    }
}
