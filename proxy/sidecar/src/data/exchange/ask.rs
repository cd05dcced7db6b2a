//! The request's way to an endpoint: which one, over which connection, and what may be tried again.
//!
//! What may be tried again is decided by what is certain: where no connection was made, or the peer said that it did
//! not look at the request, nothing has happened yet. Everything else is answered with a reason and left to the caller.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc};

use outrigger_core::{
    bulkhead::Place,
    key::Alpn,
    reason::Reason,
    retry::{self, Failure},
};
use outrigger_http::{
    h1::{Asked, Framing},
    h2::{Code, NotOpened},
};

use super::{Exchange, State};
use crate::data::{
    Worker,
    apps::Apps,
    balance::{MAX_ATTEMPTS, Route},
    exchanges::Key,
    h1::H1,
    h2::{H2, not_opened},
    leg::Leg,
    message,
    pool::{Found, PoolKey},
    reasons::Refusal,
    serve::Handler,
    tls::ConnectError,
    view::Seen,
};
use crate::metrics::Direction;

/// How often a request is sent again to the same application, where that is safe: on a new connection of its own, or on one that
/// somebody else may bring down again.
const MAX_REPEATS: u8 = 3;

impl Exchange {
    /// The way to where the request goes; `None`: to the own application.
    pub(super) fn way(&self) -> Option<&Rc<Route>> {
        if let Some(way) = self.plan.via() {
            return Some(way);
        }
        match &self.handler {
            Some(Handler::Outbound(route)) => Some(route),
            _ => None,
        }
    }

    /// Chooses an endpoint that was not tried and turns to it.
    pub(super) fn next_endpoint(&mut self, worker: &Rc<Worker>, key: Key) {
        let Some(route) = self.way().cloned() else { return };
        self.in_line = None;
        self.begins_try(worker);
        let attempt = match route.attempt(&self.tried, || self.plan.hash(&self.head, route.source)) {
            Ok(attempt) => attempt,
            Err(refusal) => return self.refuse(worker, refusal),
        };
        self.attempts += 1;
        self.edge = Some(attempt.edge.clone());
        let target = match attempt.key(worker, Alpn::H2) {
            Ok(Some(key)) => PoolKey::Mesh(key),
            Ok(None) => PoolKey::Plain(attempt.address),
            Err(error) => return self.refuse(worker, error.refusal()),
        };
        self.attempt = Some(attempt);
        self.target = Some(target);
        self.connect(worker, key);
    }

    /// Who is asked, as refusals say it.
    pub(super) fn whom(&self) -> String {
        match (&self.attempt, self.way()) {
            (Some(attempt), Some(way)) => {
                format!("endpoint {} of {} ({})", attempt.endpoint.id, way.service(), attempt.address)
            }
            (None, Some(way)) => way.service().to_string(),
            (_, None) => "the application".to_owned(),
        }
    }

    /// Whether what it turns to is a peer's sidecar.
    pub(super) fn asks_a_sidecar(&self) -> bool {
        matches!(self.target, Some(PoolKey::Mesh(_)))
    }

    fn direction(&self) -> Direction {
        if self.way().is_some() { Direction::Outbound } else { Direction::Inbound }
    }

    /// Finds a connection to the target, or waits for one.
    pub(super) fn connect(&mut self, worker: &Rc<Worker>, key: Key) {
        self.state = State::Connecting;
        let Some(target) = &self.target else { return };
        if let (PoolKey::Plain(address), true) = (target, self.message.is_h1()) {
            let address = *address;
            if self.way().is_some_and(|way| !way.line().is_empty()) {
                return self.stand_in_line(worker, key, address);
            }
            if self.takes_used()
                && let Some(connection) = worker.apps.take(address)
            {
                return self.ask_h1(worker, key, connection);
            }
            let Ok(place) = self.way().map(|way| way.holds_connection()).transpose() else {
                return self.stand_in_line(worker, key, address);
            };
            if let Err(refusal) = self.begins_to_wait() {
                return self.refuse(worker, refusal);
            }
            return self.connect_h1(worker, key, address, place);
        }
        match worker.pool.find(worker, target, key, self.way()) {
            Found::Connection(connection) => self.ask_h2(worker, key, connection),
            Found::Connecting => {
                if let Err(refusal) = self.begins_to_wait() {
                    self.refuse(worker, refusal);
                }
            }
            // Its other connections may be on their way out, too: have the balancer think again.
            Found::PeerLeft => self.unprocessed(worker, key),
            Found::Nothing(error) => self.connect_failed(worker, key, &error),
        }
    }

    /// Whether it may go out on a connection that has served others. What follows a switch is no HTTP: such a connection is never
    /// given back.
    fn takes_used(&self) -> bool {
        !self.message.switches() && self.repeats == 0
    }

    fn connect_h1(&self, worker: &Rc<Worker>, key: Key, address: SocketAddr, place: Option<Place>) {
        let place = place.zip(self.way().map(|way| way.line().clone()));
        Apps::connect(worker, address, self.direction(), place, key);
    }

    /// Waits for one of the connections to its service, of which there are as many as a policy allows.
    fn stand_in_line(&mut self, worker: &Rc<Worker>, key: Key, address: SocketAddr) {
        // A check is no reason for anybody to wait for longer, and its own wait would count against the endpoint.
        if let (Some(_), Some(way)) = (&self.checks, self.way()) {
            let refusal = Refusal::new(Reason::LimitReached, way.why_it_waits());
            return self.refuse(worker, refusal);
        }
        if let Err(refusal) = self.begins_to_wait() {
            return self.refuse(worker, refusal);
        }
        let Some(way) = self.way() else { return };
        let in_line = way.stands_in_line(key, address, self.takes_used());
        // One that is idle, to another endpoint, holds a place for nobody.
        worker.apps.let_one_go(way.line());
        self.in_line = Some(in_line);
    }

    /// It is its turn in the line: there is a place for a connection, or one that has served others.
    pub(in crate::data) fn called(&mut self, worker: &Rc<Worker>, key: Key, place: Option<Place>) {
        let (Some(_), Some(PoolKey::Plain(address))) = (&self.in_line, &self.target) else { return };
        let address = *address;
        if self.takes_used()
            && let Some(connection) = worker.apps.take(address)
        {
            return self.ask_h1(worker, key, connection);
        }
        // Without a place: the connection has ended meanwhile, and who waits first gets its place.
        if place.is_some() {
            self.in_line = None;
            self.connect_h1(worker, key, address, place);
        }
    }

    /// A connection is there, or not, after all.
    pub(in crate::data) fn connected(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        target: &PoolKey,
        outcome: Result<(), &ConnectError>,
    ) {
        // It may have turned elsewhere meanwhile.
        if self.state != State::Connecting || self.target.as_ref() != Some(target) {
            return;
        }
        match outcome {
            Ok(()) => self.connect(worker, key),
            Err(error) => self.connect_failed(worker, key, error),
        }
    }

    /// The same for a connection of HTTP/1.1, which is this exchange's alone. Returns whether it is wanted still.
    pub(in crate::data) fn connected_h1(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        address: SocketAddr,
        connection: &Rc<H1>,
    ) -> bool {
        let wanted = self.state == State::Connecting && self.target == Some(PoolKey::Plain(address));
        if wanted {
            self.ask_h1(worker, key, connection.clone());
        }
        wanted
    }

    fn ask_h1(&mut self, worker: &Rc<Worker>, key: Key, connection: Rc<H1>) {
        self.asking();
        let message = self.message;
        let length = self
            .head
            .fields
            .get("content-length")
            .and_then(|length| str::from_utf8(length).ok()?.parse().ok());
        let framing = match (self.framing, length) {
            _ if message.switches() => Framing::Empty,
            (Some(Framing::UntilClose), Some(length)) => Framing::Length(length),
            (Some(Framing::UntilClose), None) => Framing::Chunked,
            (framing, _) => framing.unwrap_or(Framing::Empty),
        };
        let asked = Asked { head: message.is_head, connect: message.is_connect, upgrade: message.is_upgrade };
        message::to_h1(message, &mut self.head, |head| {
            connection.send_request(worker, key, head, framing, asked);
        });
        self.request.end_sent = framing.is_empty() && !message.switches();
        let up = Leg::H1(connection);
        if !self.request.end_sent && !message.switches() {
            self.request.pump(worker, key, self.down.as_ref(), &up);
        }
        self.up = Some(up);
    }

    fn ask_h2(&mut self, worker: &Rc<Worker>, key: Key, connection: Rc<H2>) {
        let message = self.message;
        let from_sidecar = self.asks_a_sidecar();
        if message.is_upgrade {
            match (connection.serves_extended_connect(), &self.target) {
                (Some(true), _) | (_, None) => {}
                (None, Some(target)) => return worker.pool.wait(target, key),
                (Some(false), _) => {
                    let text = format!("{} does not serve extended CONNECT", self.whom());
                    return self.broken(worker, key, text, None);
                }
            }
        }
        let end = self.request.ended && self.request.is_empty();
        let write = |head: &_| connection.send_request(worker, key, head, end);
        let opened = if from_sidecar {
            message::to_sidecar(message, &mut self.head, write)
        } else {
            message::to_h2(message, &mut self.head, write)
        };
        let id = match opened {
            Ok(id) => id,
            Err(NotOpened::Leaving | NotOpened::Exhausted) => return self.unprocessed(worker, key),
            Err(error @ NotOpened::Full) => return self.refuse(worker, not_opened(error)),
        };
        self.asking();
        if let Some(attempt) = &self.attempt {
            attempt.connected();
        }
        self.request.end_sent = end;
        let up = Leg::H2(connection, id);
        if !end {
            self.request.pump(worker, key, self.down.as_ref(), &up);
        }
        self.up = Some(up);
    }

    pub(super) fn asking(&mut self) {
        self.state = State::Asked;
        (self.waits, self.in_line) = (None, None);
    }

    /// Counts among those that wait for a connection.
    fn begins_to_wait(&mut self) -> Result<(), Refusal> {
        if self.waits.is_none() {
            self.waits = self.way().map(|way| way.holds_pending()).transpose()?;
        }
        Ok(())
    }

    /// No connection could be made: nothing was sent, so another endpoint may be tried.
    pub(super) fn connect_failed(&mut self, worker: &Rc<Worker>, key: Key, error: &ConnectError) {
        let Some(attempt) = &mut self.attempt else { return self.refuse(worker, error.refusal()) };
        if error.reason == Reason::NoCertificate {
            return self.refuse(worker, error.refusal());
        }
        if !matches!(error.reason, Reason::Overloaded | Reason::LimitReached) {
            attempt.connect_failed(worker);
        }
        let id = attempt.endpoint.id.clone();
        self.tried.push(id);
        if self.was_last_attempt() || !self.has_others() {
            return self.failed_try(worker, key, &Failure::NothingHappened, error.refusal());
        }
        self.try_again(worker, key);
    }

    fn was_last_attempt(&self) -> bool {
        self.attempts >= MAX_ATTEMPTS || self.way().is_none_or(|route| route.is_pinned())
    }

    pub(super) fn has_others(&self) -> bool {
        let Some(route) = self.way() else { return false };
        let others = |id: &Arc<str>| !self.tried.contains(id);
        route.target.service.peek().endpoints.iter().any(|endpoint| others(&endpoint.id))
    }

    fn try_again(&mut self, worker: &Rc<Worker>, key: Key) {
        self.attempt = None;
        self.up = None;
        self.request.again();
        self.state = State::Connecting;
        self.next_endpoint(worker, key);
    }

    /// A peer's sidecar says that its application takes no connection, and so has not seen the request: whether another is
    /// asked.
    pub(super) fn goes_elsewhere(&mut self, worker: &Rc<Worker>, key: Key, reason: Option<Reason>) -> bool {
        let elsewhere = matches!(reason, Some(Reason::ConnectFailed | Reason::ConnectTimeout));
        if !elsewhere || self.was_last_attempt() || !self.request.is_repeatable() || !self.has_others() {
            return false;
        }
        if let Some(up) = self.up.take() {
            up.abort(worker, Code::CANCEL);
        }
        let error = ConnectError::new(Reason::ConnectFailed, "the peer's application");
        self.connect_failed(worker, key, &error);
        true
    }

    /// The endpoint leaves and has not looked at the request.
    pub(super) fn unprocessed(&mut self, worker: &Rc<Worker>, key: Key) {
        if let Some(attempt) = &self.attempt {
            attempt.drained();
            if self.attempts < MAX_ATTEMPTS && self.request.is_repeatable() {
                return self.try_again(worker, key);
            }
            let refusal = Refusal::new(Reason::UpstreamReset, format!("{} is shutting down", self.whom()));
            return self.failed_try(worker, key, &Failure::NothingHappened, refusal);
        }
        if self.request.is_repeatable() && self.repeats < MAX_REPEATS {
            self.repeats += 1;
            self.request.again();
            return self.connect(worker, key);
        }
        let text = "the application refused the request";
        self.refuse(worker, Refusal::new(Reason::UpstreamReset, text));
    }

    /// The connection went before there was an answer.
    pub(super) fn unanswered(
        &mut self,
        worker: &Rc<Worker>,
        key: Key,
        up: Option<&Leg>,
        error: Option<&io::Error>,
    ) {
        // The classic race: an application that closes an idle connection just when a request goes out on it; or one that ends
        // a connection because of what others did on it.
        let is_shared = match up {
            Some(Leg::H1(connection)) => connection.was_used(),
            Some(Leg::H2(connection, _)) => self.attempt.is_none() && connection.was_shared(),
            None => false,
        };
        let is_safe = || retry::is_safe_to_repeat(&Seen(&self.head));
        if is_shared && self.request.is_repeatable() && is_safe() && self.repeats < MAX_REPEATS {
            self.repeats += 1;
            self.request.again();
            return self.connect(worker, key);
        }
        let error = error.map_or_else(|| "it closed the connection".to_owned(), ToString::to_string);
        self.broken(worker, key, format!("{} gave no response: {error}", self.whom()), None);
    }

    /// The request was sent, and there will be no answer. `reset`: said in these terms.
    pub(super) fn broken(&mut self, worker: &Rc<Worker>, key: Key, text: String, reset: Option<Code>) {
        self.held = None;
        let refusal = Refusal::new(Reason::UpstreamReset, text).resetting(reset);
        self.failed_try(worker, key, &Failure::Reset, refusal);
    }
}
