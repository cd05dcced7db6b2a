//! A request from the workload: balance -> connect -> the response back.
//!
//! What may be tried again is decided by what is certain: where no connection was made, or the peer said that it did
//! not look at the request, nothing has happened yet. Everything else is answered with a reason and left to the caller.

use std::{future::Future, rc::Rc, sync::Arc};

use http::{Request, Response};
use hyper::body::Incoming;
use outrigger_core::{key::Alpn, reason::Reason};
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    apps,
    balance::{Attempt, MAX_ATTEMPTS, Route},
    body::{Body, BodyError},
    http::Active,
    message::{self, Message},
    pool::{self, Lease, PoolKey, SendError},
    reasons::{Refusal, causes, is_grpc, reason_of},
    record::record,
    tls::ConnectError,
    upgrade,
};
use crate::{
    drain::Side,
    metrics::{Direction, Edge},
};

/// Answers one request.
pub(crate) async fn outbound(
    route: Rc<Route>,
    request: Request<Incoming>,
    active: Active,
) -> Result<Response<Body>, BodyError> {
    let begun = Instant::now();
    let work = route.worker.ctx.drain.work(Side::Outbound);
    let grpc = is_grpc(request.headers());
    let protocol = if request.version() < http::Version::HTTP_2 { "http1" } else { "http2" };
    let mut exchange = Exchange { route: route.clone(), edge: route.edge(None) };
    let result = match Message::from_application(request) {
        Ok(message) => exchange.run(message, (active, work)).await,
        Err(refusal) => Err(refusal),
    };
    let reset = result.as_ref().err().and_then(|refusal| refusal.reset);
    let response = result.unwrap_or_else(|refusal| {
        tracing::debug!(service = %route.service(), reason = %refusal.reason, text = %refusal.text, "refused");
        refusal.response(grpc)
    });
    let response = record(&exchange.edge, protocol, begun, response);
    reset.map_or(Ok(response), |reset| Err(h2::Error::from(reset).into()))
}

/// One request on its way.
struct Exchange {
    route: Rc<Route>,
    /// The edge to the endpoint that was asked last.
    edge: Rc<Edge>,
}

/// An answer's head and what must live as long as its body.
struct Answer {
    response: Response<Incoming>,
    lease: Option<Lease>,
    from_sidecar: bool,
}

/// Why an endpoint gave none.
enum Failure {
    /// It could not be connected to.
    Connect(ConnectError),
    /// It leaves, and has not looked at the request.
    Left,
    /// The request was sent.
    Broken(String, Option<h2::Reason>),
}

impl Exchange {
    async fn run(
        &mut self,
        mut message: Message,
        held: impl Sized + 'static,
    ) -> Result<Response<Body>, Refusal> {
        let worker = self.route.worker.clone();
        message.body.set_idle(worker.ctx.config.timeouts.idle.enabled());
        message.body.remember();
        let mut tried: Vec<Arc<str>> = Vec::new();
        let mut attempts = 0;
        loop {
            let mut attempt = self.route.attempt(&tried)?;
            attempts += 1;
            self.edge = self.route.edge(attempt.endpoint.identity.as_ref());
            let last = attempts == MAX_ATTEMPTS || self.route.is_pinned();
            let sent = send(&self.route, &message, &attempt);
            let failure = match deadline(&self.route, &message.body, sent).await? {
                Ok(answer) => {
                    let reason = answer.from_sidecar.then(|| reason_of(answer.response.headers())).flatten();
                    let elsewhere = matches!(reason, Some(Reason::ConnectFailed | Reason::ConnectTimeout));
                    if elsewhere && !last && message.body.is_repeatable() && self.has_others(&tried) {
                        // The application there does not answer, and so has not seen the request.
                        Failure::Connect(ConnectError::new(Reason::ConnectFailed, "the peer's application"))
                    } else {
                        return self.finish(message, answer, attempt, held);
                    }
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Connect(error) if error.reason == Reason::NoCertificate => {
                    return Err(error.refusal());
                }
                Failure::Connect(error) => {
                    if error.reason != Reason::Overloaded {
                        attempt.connect_failed(&worker);
                    }
                    tried.push(attempt.endpoint.id.clone());
                    if last || !self.has_others(&tried) {
                        return Err(error.refusal());
                    }
                }
                Failure::Left if attempts < MAX_ATTEMPTS && message.body.is_repeatable() => attempt.drained(),
                Failure::Left => {
                    attempt.drained();
                    return Err(Refusal::new(Reason::UpstreamReset, "the endpoint is shutting down"));
                }
                // The endpoint is not to blame: the attempt is dropped without an outcome.
                Failure::Broken(..) if message.body.has_failed() => return Err(message::broken_body()),
                Failure::Broken(text, reset) => {
                    attempt.answered(false);
                    return Err(Refusal::new(Reason::UpstreamReset, text).resetting(reset));
                }
            }
        }
    }

    fn has_others(&self, tried: &[Arc<str>]) -> bool {
        self.route.target.service.load().endpoints.iter().any(|endpoint| !tried.contains(&endpoint.id))
    }

    fn finish(
        &self,
        mut message: Message,
        answer: Answer,
        mut attempt: Attempt,
        held: impl Sized + 'static,
    ) -> Result<Response<Body>, Refusal> {
        let worker = &self.route.worker;
        let Answer { mut response, lease, from_sidecar } = answer;
        message.body.forget();
        let version = response.version();
        let switched = message.has_switched(&response);
        let upstream = switched.then(|| hyper::upgrade::on(&mut response));
        let (mut head, incoming) = response.into_parts();
        let well = head.status.as_u16() < 500;
        let cleaned = if from_sidecar {
            message::clean_sidecar_response(&mut head)
        } else {
            message::clean_response(&mut head)
        };
        attempt.answered(well && cleaned.is_ok());
        cleaned?;
        let held = (attempt, lease, held);
        if let Some(upstream) = upstream
            && let Some(downstream) = message.on_upgrade.take()
        {
            message.switched(&mut head, false);
            upgrade::tunnel(worker, Direction::Outbound, downstream, upstream, self.edge.clone(), held);
            return Ok(Response::from_parts(head, Body::empty()));
        }
        let idle = worker.ctx.config.timeouts.idle.enabled();
        Ok(Response::from_parts(head, passed_on(incoming, version, idle, held)))
    }
}

/// The body of a response, passed on.
pub(crate) fn passed_on(
    incoming: Incoming,
    version: http::Version,
    idle: Option<std::time::Duration>,
    held: impl Sized + 'static,
) -> Body {
    let mut body = Body::incoming(incoming, version).holding(held);
    body.set_idle(idle);
    body.edit_trailers(message::strip_trailers);
    body
}

async fn send(route: &Rc<Route>, message: &Message, attempt: &Attempt) -> Result<Answer, Failure> {
    let worker = &route.worker;
    let key = match attempt.key(worker, Alpn::H2).map_err(Failure::Connect)? {
        Some(key) => PoolKey::Mesh(key),
        None if message.is_h1() => {
            let sent = apps::send(worker, attempt.address, Direction::Outbound, message.to_h1()).await;
            return match sent {
                Ok(response) => Ok(Answer { response, lease: None, from_sidecar: false }),
                Err(apps::SendError::Connect(error)) => Err(Failure::Connect(error)),
                Err(apps::SendError::Sent(error)) => Err(Failure::Broken(causes(&error), None)),
            };
        }
        None => PoolKey::Plain(attempt.address),
    };
    if worker.pool.peer_left(&key) {
        // Its other connections may be on their way out, too: have the balancer think again.
        return Err(Failure::Left);
    }
    let lease = pool::acquire(worker, &key, route.service()).await.map_err(Failure::Connect)?;
    attempt.connected();
    if message.needs_extended_connect() && !lease.serves_extended_connect().await {
        return Err(Failure::Broken("the endpoint does not serve extended CONNECT".to_owned(), None));
    }
    let from_sidecar = matches!(key, PoolKey::Mesh(_));
    let request = if from_sidecar { message.to_sidecar() } else { message.to_h2() };
    match lease.send(request).await {
        Ok(response) => Ok(Answer { response, lease: Some(lease), from_sidecar }),
        Err(SendError::Unprocessed) => Err(Failure::Left),
        Err(SendError::Broken(error)) => {
            let reset = pool::reset_by_peer(&error).filter(|_| !message.is_h1());
            Err(Failure::Broken(causes(&error), reset))
        }
    }
}

/// Bounds the wait for a response's head, counted from the end of the request.
async fn deadline<T>(route: &Route, body: &Body, answer: impl Future<Output = T>) -> Result<T, Refusal> {
    let Some(limit) = route.worker.ctx.config.timeouts.request.enabled() else { return Ok(answer.await) };
    let expired = async {
        sleep(limit).await;
        loop {
            match body.ended() {
                Some(at) if at + limit <= Instant::now() => return,
                Some(at) => sleep_until(at + limit).await,
                None => sleep(limit).await,
            }
        }
    };
    tokio::select! {
        answer = answer => Ok(answer),
        () = expired => Err(Refusal::new(Reason::RequestTimeout, format!("no response in {limit:?}"))),
    }
}
