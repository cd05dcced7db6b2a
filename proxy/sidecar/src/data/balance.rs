//! Endpoints for requests and connections: what `outrigger_core::balance` decides, and the bookkeeping around it.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use outrigger_core::{
    balance::{Balancer, Outcome, Pick, Token},
    bulkhead::{Bulkhead, Permit, Permits, Place},
    key::{Alpn, ConnectionKey},
    live::Live,
    model::{Endpoint, Service},
    reason::Reason,
    retry::Retry,
    route::Backend,
};

use super::{
    Worker,
    exchanges::Key,
    line::{InLine, Line},
    reasons::{Refusal, cut},
    tls::ConnectError,
};
use crate::{
    discovery::directory::{ServiceHandle, Target},
    metrics::{Direction, Edge, Picks, Retries},
};

/// Endpoints that one request or connection tries: enough to get past a host that died, few enough to bound the wait.
pub(crate) const MAX_ATTEMPTS: usize = 3;

/// Services that one connection remembers the way to.
const MAX_WAYS: usize = 32;

/// What one thread knows of a service, whoever calls it.
pub(crate) struct Shared {
    balancer: RefCell<Balancer>,
    /// What all threads know.
    live: Arc<Live>,
    /// Requests that wait for a connection.
    line: Rc<Line>,
    retries: RefCell<Vec<(&'static str, Retries)>>,
    /// Where no endpoint was chosen.
    edge: Rc<Edge>,
    /// By the endpoint's name.
    counted: RefCell<HashMap<Arc<str>, Counted>>,
}

/// Where the requests to one endpoint are counted.
struct Counted {
    picks: Picks,
    identity: Option<Arc<str>>,
    edge: Rc<Edge>,
}

impl Shared {
    pub(crate) fn new(balancer: Balancer, live: Arc<Live>, edge: Rc<Edge>) -> Self {
        Self {
            balancer: balancer.into(),
            line: Line::new(live.clone()),
            live,
            retries: RefCell::default(),
            edge,
            counted: RefCell::default(),
        }
    }

    /// The ids of the endpoints on a port that this proxy uses.
    pub(super) fn used(&self, service: &Arc<Service>, port: u16) -> Vec<Arc<str>> {
        let mut balancer = self.balancer.borrow_mut();
        balancer.update(service);
        balancer.used(port)
    }
}

/// Where the requests of one connection lead.
pub(crate) struct Route {
    pub(crate) worker: Rc<Worker>,
    pub(crate) target: Target,
    /// Where the client's connection comes from.
    pub(super) source: Option<IpAddr>,
    shared: Rc<Shared>,
    /// Where its service's routes, or a request's authority, have led to.
    ways: RefCell<Vec<Rc<Route>>>,
}

impl Route {
    pub(crate) fn new(worker: Rc<Worker>, target: Target, source: Option<IpAddr>) -> Self {
        let shared = worker.service(target.service.name());
        Self { worker, target, source, shared, ways: RefCell::default() }
    }

    /// The way to what a rule of the service's routes leads to, where that is known.
    pub(crate) fn to(&self, backend: &Backend) -> Option<Rc<Self>> {
        self.way(&backend.service, backend.port, || self.worker.ctx.directory.known_service(&backend.service))
    }

    /// The way that the authority of a request chooses where an endpoint's own address was dialled: to the service as a whole,
    /// if that is an external one and the authority is one of its hosts. Its owner gave that name one meaning, wherever a client
    /// has looked it up.
    pub(super) fn chosen_by(&self, authority: &[u8]) -> Option<Rc<Self>> {
        let chosen = {
            let hosts = self.worker.ctx.directory.external_hosts();
            let service = hosts.service_of_authority(str::from_utf8(authority).ok()?)?;
            service == self.service()
        };
        if !chosen {
            return None;
        }
        self.way(self.service(), self.target.port, || Some(self.target.service.clone()))
    }

    fn way(
        &self,
        service: &Arc<str>,
        port: u16,
        known: impl FnOnce() -> Option<ServiceHandle>,
    ) -> Option<Rc<Self>> {
        let mut ways = self.ways.borrow_mut();
        let is_it = |way: &&Rc<Self>| **way.service() == **service && way.target.port == port;
        if let Some(way) = ways.iter().find(is_it) {
            return Some(way.clone());
        }
        let target = Target { service: known()?, port, endpoint: None };
        let way = Rc::new(Self::new(self.worker.clone(), target, self.source));
        if ways.len() == MAX_WAYS {
            ways.clear();
        }
        ways.push(way.clone());
        Some(way)
    }

    pub(crate) fn service(&self) -> &Arc<str> {
        self.target.service.name()
    }

    /// Whether an endpoint's own address was dialled: then there is no other.
    pub(crate) fn is_pinned(&self) -> bool {
        self.target.endpoint.is_some()
    }

    /// Where a request is counted for which no endpoint was chosen yet.
    pub(crate) fn edge(&self) -> Rc<Edge> {
        self.shared.edge.clone()
    }

    /// A place among the service's requests.
    pub(crate) fn holds_request(&self) -> Result<Permit, Refusal> {
        self.bounded(Permits::request, "requests are under way")
    }

    /// A place among the requests that wait for a connection to the service.
    pub(crate) fn holds_pending(&self) -> Result<Permit, Refusal> {
        self.bounded(Permits::pending, "requests wait for a connection")
    }

    /// A place among the connections to the service.
    pub(crate) fn holds_connection(&self) -> Result<Place, Refusal> {
        self.bounded(Permits::connection, "connections are open")
    }

    /// Those who wait for one, on this thread.
    pub(super) fn line(&self) -> &Rc<Line> {
        &self.shared.line
    }

    /// Has a request wait for a connection to `address`; `takes_used`: to one that has served others, too.
    pub(super) fn stands_in_line(&self, key: Key, address: SocketAddr, takes_used: bool) -> InLine {
        let service = self.target.service.peek();
        let bulkhead = service.traffic.as_ref().and_then(|traffic| traffic.bulkhead.as_ref());
        self.shared.line.enter(&self.worker, bulkhead, (key, address, takes_used))
    }

    /// Why a request waits that stands in the line.
    pub(super) fn why_it_waits(&self) -> String {
        let service = self.target.service.peek();
        let bulkhead = service.traffic.as_ref().and_then(|traffic| traffic.bulkhead.as_ref());
        let origin = bulkhead.map_or("", |bulkhead| &bulkhead.origin);
        format!("as many connections to {} as {origin} allows were in use", service.name)
    }

    fn bounded<T>(
        &self,
        take: impl FnOnce(&Permits, Option<&Bulkhead>) -> Option<T>,
        what: &str,
    ) -> Result<T, Refusal> {
        let service = self.target.service.peek();
        let bulkhead = service.traffic.as_ref().and_then(|traffic| traffic.bulkhead.as_ref());
        take(self.shared.live.permits(), bulkhead).ok_or_else(|| {
            let origin = bulkhead.map_or("", |bulkhead| &bulkhead.origin);
            let text = format!("as many {what} as {origin} allows for {}", service.name);
            Refusal::new(Reason::LimitReached, text)
        })
    }

    /// The most streams on one connection, where a policy says it.
    pub(crate) fn most_streams(&self) -> Option<u32> {
        let service = self.target.service.peek();
        service.traffic.as_ref()?.bulkhead.as_ref()?.streams
    }

    /// Counts a request that may be tried again: what the budget is a share of.
    pub(crate) fn counts_request(&self) {
        self.shared.live.budget().request(Instant::now());
    }

    /// Whether the budget has room for another try, which it then counts.
    pub(crate) fn takes_from_budget(&self, retry: &Retry, now: Instant) -> bool {
        self.shared.live.budget().take(retry, now)
    }

    /// Counts what became of a failed try.
    pub(crate) fn counts_retry(&self, outcome: &'static str) {
        let mut retries = self.shared.retries.borrow_mut();
        if let Some((_, known)) = retries.iter().find(|(known, _)| *known == outcome) {
            return known.inc();
        }
        let handle = self.worker.ctx.metrics.retries(self.service(), outcome);
        handle.inc();
        retries.push((outcome, handle));
    }

    /// Chooses an endpoint that is not among `tried`; `hash` is what a balancer that hashes goes by.
    pub(crate) fn attempt(
        self: &Rc<Self>,
        tried: &[Arc<str>],
        hash: impl FnOnce() -> Option<u64>,
    ) -> Result<Attempt, Refusal> {
        let service = self.target.service.load();
        let port = self.target.port;
        let mut attempt = None;
        if let Some(id) = &self.target.endpoint {
            attempt = service.endpoint(id).and_then(|endpoint| {
                let address = endpoint.socket_address(port)?;
                Some(Attempt::new(self, endpoint.clone(), address, None))
            });
        } else {
            let mut balancer = self.shared.balancer.borrow_mut();
            balancer.update(&service);
            let rng = &mut self.worker.rng.borrow_mut();
            match balancer.pick(port, Instant::now(), rng, tried, hash()) {
                Pick::Endpoint(picked) => {
                    let token = balancer.start(&picked);
                    attempt = Some(Attempt::new(self, picked.endpoint, picked.address, Some(token)));
                }
                Pick::AllFailing => {
                    let text = format!(
                        "all endpoints of {} have failed just now; one is tried again soon",
                        service.name
                    );
                    return Err(Refusal::new(Reason::EndpointsFailing, text));
                }
                Pick::NoEndpoints => {}
            }
        }
        let attempt = attempt.ok_or_else(|| {
            let text = match &self.target.endpoint {
                Some(id) => format!("endpoint {id} of {} has left, and it was dialled itself", service.name),
                None => no_endpoint(&service, port),
            };
            Refusal::new(Reason::NoEndpoints, text)
        })?;
        Ok(attempt)
    }

    /// Counts that an endpoint was chosen; returns where the rest is counted.
    fn count(&self, endpoint: &Endpoint) -> Rc<Edge> {
        let mut counted = self.shared.counted.borrow_mut();
        if let Some(known) = counted.get(&endpoint.id)
            && known.identity == endpoint.identity
        {
            known.picks.inc();
            return known.edge.clone();
        }
        if counted.len() > usize::from(self.worker.ctx.config.limits.endpoints_per_service) {
            counted.clear();
        }
        let identity = endpoint.identity.clone();
        let edge = self.worker.edge(Direction::Outbound, self.service(), identity.as_ref());
        let picks = self.worker.ctx.metrics.picks(self.service(), &endpoint.id);
        picks.inc();
        counted.insert(endpoint.id.clone(), Counted { picks, identity, edge: edge.clone() });
        edge
    }
}

/// Why there is nobody to ask at a port: it may be the wrong one.
fn no_endpoint(service: &Service, port: u16) -> String {
    let ports: BTreeSet<u16> =
        service.endpoints.iter().flat_map(|endpoint| endpoint.ports.keys().copied()).collect();
    let why = if ports.is_empty() {
        "it has none at all".to_owned()
    } else {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        format!("it has some for {}", cut(ports.join(", ")))
    };
    format!("{} has no endpoint for port {port}: {why}", service.name)
}

/// One endpoint chosen for one request or connection. Dropped without an outcome, the caller has given up.
pub(crate) struct Attempt {
    shared: Rc<Shared>,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) address: SocketAddr,
    pub(crate) edge: Rc<Edge>,
    /// `None` where there was no choice.
    token: Option<Token>,
    begun: Instant,
    outcome: Option<Outcome>,
}

impl Attempt {
    fn new(route: &Route, endpoint: Arc<Endpoint>, address: SocketAddr, token: Option<Token>) -> Self {
        let (shared, edge) = (route.shared.clone(), route.count(&endpoint));
        Self { shared, endpoint, address, edge, token, begun: Instant::now(), outcome: None }
    }

    /// The head of a response came, or the connection for bytes stands. What says more comes earlier and stands, unless it is
    /// that the rest has failed.
    pub(crate) fn answered(&mut self, well: bool) {
        let rtt = self.begun.elapsed();
        if !well {
            self.outcome = Some(Outcome::Error);
        } else if self.outcome.is_none() {
            self.outcome = Some(Outcome::Success { rtt });
        }
    }

    /// Whether this is to find out if an ejected endpoint answers again.
    pub(crate) fn is_trial(&self) -> bool {
        self.token.as_ref().is_some_and(Token::is_trial)
    }

    /// Tells the breaker that the endpoint answers, where it does and the answer goes on.
    pub(crate) fn tells_success(&mut self) {
        if let (Some(token), Some(Outcome::Success { rtt })) = (&mut self.token, self.outcome)
            && !token.is_told()
        {
            self.shared.balancer.borrow_mut().answers(token, rtt, Instant::now());
        }
    }

    /// There was no answer, or not all of it.
    pub(crate) fn failed(&mut self) {
        self.outcome = Some(Outcome::Failure);
    }

    /// The answer was one of the mesh's own, which says nothing of the endpoint.
    pub(crate) fn answered_by_policy(&mut self) {
        self.outcome = Some(Outcome::Abandoned { waited: Duration::ZERO });
    }

    pub(crate) fn connected(&self) {
        self.shared.balancer.borrow_mut().connected(&self.endpoint.id);
    }

    /// The peer's sidecar said that it drains.
    pub(crate) fn drained(&self) {
        self.shared.balancer.borrow_mut().drained(&self.endpoint.id, Instant::now());
    }

    /// No connection could be made.
    pub(crate) fn connect_failed(&mut self, worker: &Worker) {
        self.outcome = Some(Outcome::Failure);
        let mut rng = worker.rng.borrow_mut();
        self.shared.balancer.borrow_mut().connect_failed(&self.endpoint.id, Instant::now(), &mut rng);
    }

    /// The key of connections to a meshed endpoint, `None` for one without a sidecar.
    pub(crate) fn key(&self, worker: &Worker, alpn: Alpn) -> Result<Option<ConnectionKey>, ConnectError> {
        let Some(expected) = &self.endpoint.identity else { return Ok(None) };
        let (own, trust_epoch) = worker.identity();
        let own_identity = own.ok_or_else(|| {
            ConnectError::new(Reason::NoCertificate, "this workload has no certificate yet")
        })?;
        let expected_identity = expected.clone();
        Ok(Some(ConnectionKey { address: self.address, expected_identity, own_identity, trust_epoch, alpn }))
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(token) = self.token.take() {
            let outcome = self.outcome.unwrap_or(Outcome::Abandoned { waited: self.begun.elapsed() });
            self.shared.balancer.borrow_mut().finish(token, outcome, Instant::now());
        }
    }
}
