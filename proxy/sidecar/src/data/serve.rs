//! Serving HTTP on an accepted connection: who answers its requests, and when the connection ends.

use std::{
    rc::Rc,
    time::{Instant, SystemTime},
};

use outrigger_core::{limit::OpenConnection, reason::Reason};
use outrigger_http::h2;

use super::{
    Worker,
    balance::Route,
    h1::{self, H1},
    h2::H2,
    inbound,
    reasons::Refusal,
    relay::Relay,
    wire::Wire,
};
use crate::{
    drain::Phase,
    metrics::{Direction, OpenGuard},
};

/// Streams that a peer may open at once on one connection.
const MAX_STREAMS: u32 = 1000;

/// Work that a stranger may cause in vain: in a burst, and again each second. Clients of applications cancel calls by the
/// hundred; an attack resets streams by the ten thousand (CVE-2023-44487, CVE-2025-8671).
const STRANGERS_BUDGET: h2::Budget = h2::Budget { resets: 500, errors: 100, frames: 2000 };

/// The same for peers' sidecars, which carry many clients' calls.
const PEERS_BUDGET: h2::Budget = h2::Budget { resets: 5000, errors: 1000, frames: 10_000 };

/// Who answers the requests of a connection.
#[derive(Clone)]
pub(crate) enum Handler {
    Outbound(Rc<Route>),
    Inbound(Rc<inbound::Entry>),
    Refuse(Rc<Refusal>),
}

impl Handler {
    pub(super) fn direction(&self) -> Direction {
        match self {
            Self::Outbound(_) | Self::Refuse(_) => Direction::Outbound,
            Self::Inbound(_) => Direction::Inbound,
        }
    }
}

/// Which HTTP a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// When a mutual TLS connection has to move to new credentials: at `move_at`, or when `epoch` has passed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Validity {
    pub(crate) move_at: SystemTime,
    pub(crate) epoch: u64,
}

impl Validity {
    /// Whether that time has come.
    pub(crate) fn is_over(self, worker: &Worker) -> bool {
        self.epoch != worker.identity().1 || self.move_at <= SystemTime::now()
    }
}

/// What a connection knows as a server.
pub(crate) struct Server {
    handler: Handler,
    validity: Option<Validity>,
    /// Accepted while the workload was leaving already, from somebody who has not heard: one request is served.
    late: bool,
}

impl Server {
    pub(super) fn handler(&self) -> &Handler {
        &self.handler
    }

    /// Whether the client is a peer's sidecar, which has proved it.
    pub(super) fn is_peer(&self) -> bool {
        self.validity.is_some()
    }

    /// Whether the client is to go elsewhere; `served`: it has had an answer.
    pub(super) fn leaves(&self, worker: &Worker, served: bool) -> bool {
        let phase = worker.ctx.drain.phase();
        let drained = match self.handler.direction() {
            Direction::Outbound => phase >= Phase::Outbound,
            Direction::Inbound if self.late && !served => phase >= Phase::Outbound,
            Direction::Inbound => worker.is_leaving(),
        };
        drained || self.validity.is_some_and(|validity| validity.is_over(worker))
    }

    /// Whether a request that comes now is the connection's last.
    pub(super) fn is_last_request(&self, worker: &Worker) -> bool {
        self.leaves(worker, true)
    }
}

/// A connection with which the worker looks now and then whether it should end.
#[derive(Clone)]
pub(crate) enum Connection {
    H1(Rc<H1>),
    H2(Rc<H2>),
    Relay(Rc<Relay>),
}

impl Connection {
    pub(super) fn sweep(&self, worker: &Worker, now: Instant) {
        match self {
            Self::H1(connection) => connection.sweep(worker, now),
            Self::H2(connection) => connection.sweep(worker, now),
            Self::Relay(relay) => relay.sweep(worker, now),
        }
    }
}

/// What an accepted connection has turned out to be, to be run to its end.
///
/// Whatever found it out is gone by then: a task keeps the memory of all that it awaits, and these live for hours.
pub(crate) enum Next {
    /// Nothing, any more.
    Done,
    H1(Rc<H1>),
    H2(Rc<H2>),
    /// With what the server said already.
    Relay(Rc<Relay>, Vec<u8>),
    /// The same, while these guards live.
    Guarded(Box<(Next, Guards)>),
}

/// What counts a connection, and what it takes of its caller's bounds.
type Guards = (Vec<OpenGuard>, Option<OpenConnection>);

impl Next {
    /// Keeps the guards as long as the connection.
    pub(crate) fn guarded(self, open: Vec<OpenGuard>, permit: OpenConnection) -> Self {
        Self::Guarded(Box::new((self, (open, Some(permit)))))
    }

    pub(super) async fn run(self, worker: Rc<Worker>) {
        let (next, _guards) = match self {
            Self::Guarded(guarded) => (guarded.0, guarded.1),
            next => (next, Guards::default()),
        };
        match next {
            Self::Done | Self::Guarded(_) => {}
            Self::H1(connection) => {
                let _listed = worker.list(Connection::H1(connection.clone()));
                connection.run(worker.clone()).await;
            }
            Self::H2(connection) => {
                let _listed = worker.list(Connection::H2(connection.clone()));
                connection.run(worker.clone()).await;
            }
            Self::Relay(relay, greeting) => relay.run(worker, greeting).await,
        }
    }
}

/// Serves HTTP on a connection.
pub(crate) fn serve(
    worker: &Rc<Worker>,
    wire: Wire,
    version: Version,
    handler: Handler,
    validity: Option<Validity>,
) -> Next {
    let is_stranger = !matches!(handler, Handler::Outbound(_)) && validity.is_none();
    let late = handler.direction() == Direction::Inbound && worker.is_leaving();
    let server = Server { handler, validity, late };
    match version {
        Version::Http1 => Next::H1(H1::new(worker, wire, h1::Side::Client(server))),
        Version::Http2 => {
            let budget = if is_stranger { STRANGERS_BUDGET } else { PEERS_BUDGET };
            Next::H2(H2::server(worker, wire, server, MAX_STREAMS, budget))
        }
    }
}

/// Refuses every request of a connection, or the connection if it is no HTTP.
pub(crate) fn refuse(
    worker: &Rc<Worker>,
    wire: Wire,
    version: Option<Version>,
    refusal: Refusal,
    direction: Direction,
) -> Next {
    worker.ctx.metrics.refused(direction, refusal.reason.code());
    tracing::debug!(reason = %refusal.reason, text = %refusal.text, "refused");
    if let Some(version) = version {
        return serve(worker, wire, version, Handler::Refuse(Rc::new(refusal)), None);
    }
    wire.reset_on_close();
    Next::Done
}

/// The reason for a head that its codec refused.
pub(super) fn head_refusal(error: &outrigger_http::h1::Error) -> Refusal {
    use outrigger_http::h1::Error;
    let reason = match error {
        Error::TargetTooLong | Error::HeadTooLarge => Reason::HeadersTooLarge,
        Error::Malformed(_) | Error::Truncated => Reason::BadRequest,
    };
    Refusal::new(reason, error.to_string())
}
