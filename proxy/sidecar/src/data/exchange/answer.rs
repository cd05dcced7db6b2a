//! The response's way back, the mesh's own answers, and what is counted.
//!
//! A request is counted when its response's head goes out, or for gRPC, whose outcome is in the trailers, at the end of its
//! body. The duration is until the head in either case.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use outrigger_core::{reason::Reason, retry};
use outrigger_http::{
    fields::Fields,
    h1::{Error, Framing},
    h2::Code,
    head::{ResponseHead, Version},
};

use super::{Exchange, MAX_INTERIM, State, plan::says_so_in_trailers, shadow::Shadow};
use crate::{
    data::{
        Worker,
        exchanges::Key,
        leg::Leg,
        message,
        reasons::{Refusal, is_grpc, reason_of, tell},
        serve::Handler,
    },
    metrics::{Edge, Outcome},
};

/// Stands for the status of a gRPC response that ended without one: it was cut off.
const NO_GRPC_STATUS: &str = "none";

/// Counts a request when it is dropped.
pub(super) struct Record {
    edge: Rc<Edge>,
    outcome: Outcome,
    took: Duration,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.edge.request(self.outcome, self.took);
    }
}

impl Exchange {
    /// The response's head has come, in [`answer_mut`](Self::answer_mut). `framing` is where its body ends, as far as
    /// that is known.
    pub(in crate::data) fn answered(&mut self, worker: &Rc<Worker>, key: Key, framing: Framing) {
        if self.state != State::Asked {
            return;
        }
        let now = Instant::now();
        self.moved = Some(now);
        if self.asks_a_sidecar() && self.goes_elsewhere(worker, key, reason_of(&self.answer.fields)) {
            return;
        }
        if self.was_failure(worker, key, None) {
            return;
        }
        if !framing.is_empty() && self.may_depend_on_trailers() && says_so_in_trailers(&self.answer.fields) {
            // What was read with it is looked at first: a status without a message may be all that follows.
            self.held = Some(framing);
            return worker.turn.ready(key);
        }
        self.accept(worker, key, framing);
    }

    /// Whether the answer, or its trailers, say that the try has failed, and another one follows.
    fn was_failure(&mut self, worker: &Rc<Worker>, key: Key, trailers: Option<&Fields>) -> bool {
        let Some(failure) = retry::failure(self.is_grpc, self.answer.status, |name| {
            trailers.unwrap_or(&self.answer.fields).get(name)
        }) else {
            return false;
        };
        let by_policy = self.is_refused_by_policy();
        if let Some(attempt) = &mut self.attempt {
            if by_policy {
                attempt.answered_by_policy();
            } else if failure.is_the_endpoints_fault() {
                attempt.answered(false);
            }
        }
        self.tries_again(worker, key, &failure)
    }

    /// Whether the peer's sidecar answers, because of a policy.
    pub(super) fn is_refused_by_policy(&self) -> bool {
        self.asks_a_sidecar() && reason_of(&self.answer.fields).is_some_and(is_a_policys)
    }

    /// More has come of an answer whose head was held back. Returns whether the exchange goes on with it.
    pub(super) fn release_held(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        data: &[u8],
        end: Option<&Fields>,
    ) -> bool {
        let Some(framing) = self.held.take() else { return true };
        if data.is_empty()
            && let Some(trailers) = end
            && self.was_failure(worker, key, Some(trailers))
        {
            return false;
        }
        self.accept(worker, key, framing);
        self.state != State::Over
    }

    /// Takes the answer for the one that the client gets.
    pub(super) fn accept(&mut self, worker: &Rc<Worker>, key: Key, framing: Framing) {
        if let Some(Shadow::Hedge(of)) = self.shadow {
            return self.hand_over(worker, of, framing);
        }
        if let Some(checks) = self.checks.take() {
            // Nobody waits any more: it was too late.
            let _ = checks.send(Some(self.answer.status < 400));
        }
        self.drop_rival(worker);
        self.request.forget();
        let switched = self.message.has_switched(&self.answer);
        let cleaned = self.clean_answer();
        if let Some(attempt) = &mut self.attempt {
            // What failed by its status was counted where that was found out.
            attempt.answered(cleaned.is_ok());
            if attempt.is_trial() {
                attempt.tells_success();
            }
        }
        if let Err(refusal) = cleaned {
            return self.refuse(worker, refusal);
        }
        self.plan.change_response(&mut self.answer.fields);
        if let Some(admission) = &mut self.admission {
            admission.answered(self.answer.status < 500);
            if let Some(standing) = &admission.standing {
                tell(standing, &mut self.answer.fields);
            }
        }
        if switched {
            return self.switch(worker, key);
        }
        if self.message.switches() {
            // What the client sends is no part of the request: there is nothing more of that. Behind a CONNECT it is
            // not to be read as a request either (RFC 9112, 11.2).
            self.request.ended = true;
            if let (Some(Leg::H1(down)), true) = (&self.down, self.message.is_connect) {
                down.close_after();
            }
            if let (Some(up), false) = (&self.up, self.request.end_sent) {
                self.request.end_sent = true;
                up.send(worker, &[], true);
            }
        }
        self.response.ended = framing.is_empty();
        self.record();
        self.state = State::Answering;
        self.respond(worker);
        self.settle(worker);
    }

    /// Takes out of the head what was meant for this proxy only.
    fn clean_answer(&mut self) -> Result<(), Refusal> {
        if self.asks_a_sidecar() {
            message::clean_sidecar_response(&mut self.answer)
        } else {
            message::clean_response(&mut self.answer)
        }
    }

    /// The response says that bytes follow.
    fn switch(&mut self, worker: &Rc<Worker>, key: Key) {
        self.record();
        self.state = State::Switched;
        self.answer.fields.remove("content-length");
        if let Some(Leg::H1(up)) = &self.up {
            up.switch_sending();
        }
        match &self.down {
            Some(Leg::H1(down)) => {
                if self.message.is_upgrade {
                    self.answer.status = 101;
                    self.answer.set_reason(None);
                    self.answer.fields.push(b"Connection", b"upgrade");
                    if let Some(protocol) = self.head.protocol() {
                        let protocol = protocol.to_vec();
                        self.answer.fields.push(b"Upgrade", &protocol);
                    }
                }
                self.answer.version = Version::Http11;
                down.send_response(worker, &self.answer, Framing::Tunnel);
                down.switch_reading();
            }
            Some(Leg::H2(down, id)) => {
                let (down, id) = (down.clone(), *id);
                self.write_for_h2_client(true, |head| down.send_response(worker, id, head, false));
            }
            None => {}
        }
        self.go_on(worker, key);
    }

    /// Sends the response's head to the client.
    fn respond(&mut self, worker: &Rc<Worker>) {
        let end = self.response.ended;
        match self.down.clone() {
            Some(Leg::H1(down)) => {
                let framing = self.framing_for_h1(end);
                if framing == Framing::UntilClose {
                    down.close_after();
                }
                self.answer.version = self.message.version.min(Version::Http11);
                let keeps = down.keeps();
                if !keeps {
                    self.answer.fields.push(b"Connection", b"close");
                } else if self.answer.version == Version::Http10 {
                    self.answer.fields.push(b"Connection", b"keep-alive");
                }
                self.response.end_sent = framing.is_empty();
                down.send_response(worker, &self.answer, framing);
            }
            Some(Leg::H2(down, id)) => {
                self.response.end_sent = end;
                self.write_for_h2_client(false, |head| down.send_response(worker, id, head, end));
            }
            None => {}
        }
    }

    /// Hands `write` the head as the client of HTTP/2 gets it.
    fn write_for_h2_client(&mut self, switched: bool, write: impl FnOnce(&ResponseHead)) {
        let to_sidecar = matches!(&self.handler, Some(Handler::Inbound(entry)) if entry.peer().is_some());
        if to_sidecar {
            message::response_to_sidecar(self.message, switched, &mut self.answer, write);
        } else {
            write(&self.answer);
        }
    }

    /// How the response is framed for a client of HTTP/1.x (RFC 9112, 6.3). `end`: it has no body.
    fn framing_for_h1(&mut self, end: bool) -> Framing {
        let status = self.answer.status;
        if self.message.is_head || status == 204 || status == 304 {
            return Framing::Empty;
        }
        let length = self.answer.fields.get("content-length");
        if let Some(length) = length.and_then(|length| str::from_utf8(length).ok()?.parse().ok()) {
            return Framing::Length(length);
        }
        if end {
            self.answer.fields.push(b"Content-Length", b"0");
            return Framing::Length(0);
        }
        if self.message.version == Version::Http10 { Framing::UntilClose } else { Framing::Chunked }
    }

    /// An interim response has come.
    pub(in crate::data) fn interim(&mut self, worker: &Rc<Worker>) {
        self.moved = Some(Instant::now());
        self.interims += 1;
        if self.interims > MAX_INTERIM {
            let error = Error::Malformed("there are too many interim responses");
            return self.bad_answer(worker, &error);
        }
        let cleaned = self.clean_answer();
        // HTTP/1.0 knows none (RFC 9110, 15.2), and 101 is an answer to a switch.
        if cleaned.is_err() || self.message.version == Version::Http10 || self.answer.status == 101 {
            return;
        }
        match self.down.clone() {
            Some(Leg::H1(down)) => {
                self.answer.version = Version::Http11;
                down.send_interim(worker, &self.answer);
            }
            Some(Leg::H2(down, id)) => {
                self.write_for_h2_client(false, |head| down.send_response(worker, id, head, false));
            }
            None => {}
        }
    }

    /// What came in place of a response, or as its body, is no HTTP.
    pub(in crate::data) fn bad_answer(&mut self, worker: &Rc<Worker>, error: &Error) {
        let up = self.up.take();
        if let Some(up) = up {
            up.abort(worker, Code::PROTOCOL_ERROR);
        }
        if self.state != State::Asked {
            return self.cut(worker, Code::INTERNAL_ERROR);
        }
        let text = format!("the response of {} is refused: {error}", self.whom());
        if let Some(attempt) = &mut self.attempt {
            attempt.failed();
        }
        self.refuse(worker, Refusal::new(Reason::UpstreamProtocol, text));
    }

    /// Sends the client elsewhere, and ends the exchange.
    pub(super) fn redirect(&mut self, worker: &Rc<Worker>, status: u16, location: &[u8]) {
        self.answer.clear();
        self.answer.status = status;
        self.answer.fields.push(b"location", location);
        self.answer.fields.push(b"content-length", b"0");
        self.answer_here(worker, "", false, None);
    }

    /// Answers in the application's stead, and ends the exchange.
    #[expect(clippy::needless_pass_by_value, reason = "a refusal is answered once")]
    pub(super) fn refuse(&mut self, worker: &Rc<Worker>, refusal: Refusal) {
        tracing::debug!(reason = %refusal.reason, text = %refusal.text, "refused");
        if let Some(up) = self.up.take() {
            up.abort(worker, Code::CANCEL);
        }
        if let Some(checks) = self.checks.take() {
            let _ = checks.send(refusal.is_not_ours().then_some(false));
        }
        let body = refusal.response(self.is_grpc, &mut self.answer);
        self.answer_here(worker, &body, refusal.reason == Reason::BadRequest, refusal.reset);
    }

    /// Answers with what is in `answer`. `unclear`: where the request ends is not certain.
    fn answer_here(&mut self, worker: &Rc<Worker>, body: &str, unclear: bool, reset: Option<Code>) {
        self.record();
        self.state = State::Answering;
        let whole = self.request.ended && !self.message.switches();
        match self.down.clone() {
            Some(Leg::H1(down)) => {
                // What follows a request that two readers could end in two places, or a tunnel that was not opened, is
                // not to be read as a request (RFC 9112, 11.2).
                if unclear || self.message.is_connect || !whole {
                    down.close_after();
                }
                self.response.ended = body.is_empty();
                self.respond(worker);
                if !self.message.is_head && !body.is_empty() {
                    down.send(worker, body.as_bytes(), true);
                } else if !self.response.end_sent {
                    down.send(worker, &[], true);
                }
            }
            Some(Leg::H2(down, id)) => {
                if let Some(code) = reset {
                    down.reset(worker, id, code);
                } else {
                    let empty = body.is_empty() || self.message.is_head;
                    self.response.ended = empty;
                    self.respond(worker);
                    let all = empty || down.send(worker, id, body.as_bytes(), true) == body.len();
                    // A window that has no room for a few hundred bytes is not waited for: the head said it all.
                    if !self.request.ended || !all {
                        down.reset(worker, id, Code::NO_ERROR);
                    }
                }
            }
            None => {}
        }
        self.over(worker);
    }

    /// Has the request counted that is answered with what is in `answer`.
    fn record(&mut self) {
        // A hedge is no request of its own, and a health check nobody's.
        let is_counted = !matches!(self.shadow, Some(Shadow::Hedge(_) | Shadow::Check));
        let (Some(edge), Some(begun), true) = (&self.edge, self.begun, is_counted) else {
            return;
        };
        let fields = &self.answer.fields;
        let status = grpc_status(fields);
        let in_trailers = is_grpc(fields) && status.is_none();
        let protocol = if self.message.is_h1() { "http1" } else { "http2" };
        let outcome = Outcome {
            protocol,
            code: self.answer.status,
            grpc_status: status.unwrap_or(if in_trailers { NO_GRPC_STATUS } else { "" }),
            reason: reason_of(fields).map_or("", Reason::code),
        };
        let record = Record { edge: edge.clone(), outcome, took: begun.elapsed() };
        // Dropped at once, it counts at once.
        self.record = in_trailers.then_some(record);
    }

    pub(super) fn record_trailers(&mut self, trailers: &Fields) {
        if let (Some(attempt), Some(status)) =
            (&mut self.attempt, retry::grpc_status(|name| trailers.get(name)))
            && self.is_grpc
            && retry::is_endpoints_fault(status)
        {
            attempt.answered(false);
        }
        if let Some(record) = &mut self.record {
            record.outcome.grpc_status = grpc_status(trailers).unwrap_or(NO_GRPC_STATUS);
        }
    }
}

/// Whether a peer's sidecar that answers with this does what a policy says, and its application is not to blame.
fn is_a_policys(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::AccessDenied
            | Reason::PlaintextRefused
            | Reason::RateLimited
            | Reason::LimitReached
            | Reason::FaultInjected
            | Reason::BadRequest
    )
}

/// A gRPC status, as a word for metrics.
fn grpc_status(fields: &Fields) -> Option<&'static str> {
    const CODES: [&str; 17] =
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"];
    let value = fields.get("grpc-status")?;
    Some(CODES.iter().find(|code| code.as_bytes() == value).unwrap_or(&"other"))
}
