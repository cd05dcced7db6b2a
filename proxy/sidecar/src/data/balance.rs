//! Endpoints for requests and connections: what `outrigger_core::balance` decides, and the bookkeeping around it.

use std::{cell::RefCell, collections::HashMap, net::SocketAddr, rc::Rc, sync::Arc, time::Instant};

use outrigger_core::{
    balance::{Balancer, Outcome, Token},
    key::{Alpn, ConnectionKey},
    model::Endpoint,
    reason::Reason,
};

use super::{Worker, reasons::Refusal, tls::ConnectError};
use crate::{
    discovery::directory::Target,
    metrics::{Direction, Edge, Picks},
};

/// Endpoints that one request or connection tries: enough to get past a host that died, few enough to bound the wait.
pub(crate) const MAX_ATTEMPTS: usize = 3;

/// What one thread knows of a service, whoever calls it.
pub(crate) struct Shared {
    balancer: RefCell<Balancer>,
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
    pub(crate) fn new(balancer: Balancer, edge: Rc<Edge>) -> Self {
        Self { balancer: balancer.into(), edge, counted: RefCell::default() }
    }
}

/// Where the requests of one connection lead.
pub(crate) struct Route {
    pub(crate) worker: Rc<Worker>,
    pub(crate) target: Target,
    shared: Rc<Shared>,
}

impl Route {
    pub(crate) fn new(worker: Rc<Worker>, target: Target) -> Self {
        let shared = worker.service(target.service.name());
        Self { worker, target, shared }
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

    /// Chooses an endpoint that is not among `tried`.
    pub(crate) fn attempt(self: &Rc<Self>, tried: &[Arc<str>]) -> Result<Attempt, Refusal> {
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
            let picked = balancer.pick(port, Instant::now(), &mut self.worker.rng.borrow_mut(), tried);
            if let Some(picked) = picked {
                let token = balancer.start(&picked);
                attempt = Some(Attempt::new(self, picked.endpoint, picked.address, Some(token)));
            }
        }
        let attempt = attempt.ok_or_else(|| {
            let text = match &self.target.endpoint {
                Some(id) => format!("endpoint {id} of {} has left", service.name),
                None => format!("{} has no endpoint for port {port}", service.name),
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

    /// The head of a response came, or the connection for bytes stands.
    pub(crate) fn answered(&mut self, well: bool) {
        let rtt = self.begun.elapsed();
        self.outcome = Some(if well { Outcome::Success { rtt } } else { Outcome::Failure });
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
