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

/// Where the requests of one connection lead.
pub(crate) struct Route {
    pub(crate) worker: Rc<Worker>,
    pub(crate) target: Target,
    balancer: Rc<RefCell<Balancer>>,
    picks: RefCell<HashMap<Arc<str>, Picks>>,
}

impl Route {
    pub(crate) fn new(worker: Rc<Worker>, target: Target) -> Self {
        let balancer = worker.balancer(target.service.name());
        Self { worker, target, balancer, picks: RefCell::default() }
    }

    pub(crate) fn service(&self) -> &Arc<str> {
        self.target.service.name()
    }

    /// Whether an endpoint's own address was dialled: then there is no other.
    pub(crate) fn is_pinned(&self) -> bool {
        self.target.endpoint.is_some()
    }

    pub(crate) fn edge(&self, peer: Option<&Arc<str>>) -> Rc<Edge> {
        self.worker.edge(Direction::Outbound, self.service(), peer)
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
            let mut balancer = self.balancer.borrow_mut();
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
        self.count(&attempt.endpoint.id);
        Ok(attempt)
    }

    fn count(&self, endpoint: &Arc<str>) {
        let mut picks = self.picks.borrow_mut();
        if picks.len() > usize::from(self.worker.ctx.config.limits.endpoints_per_service) {
            picks.clear();
        }
        let make = || self.worker.ctx.metrics.picks(self.service(), endpoint);
        picks.entry(endpoint.clone()).or_insert_with(make).inc();
    }
}

/// One endpoint chosen for one request or connection. Dropped without an outcome, the caller has given up.
pub(crate) struct Attempt {
    balancer: Rc<RefCell<Balancer>>,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) address: SocketAddr,
    /// `None` where there was no choice.
    token: Option<Token>,
    begun: Instant,
    outcome: Option<Outcome>,
}

impl Attempt {
    fn new(route: &Route, endpoint: Arc<Endpoint>, address: SocketAddr, token: Option<Token>) -> Self {
        let balancer = route.balancer.clone();
        Self { balancer, endpoint, address, token, begun: Instant::now(), outcome: None }
    }

    /// The head of a response came, or the connection for bytes stands.
    pub(crate) fn answered(&mut self, well: bool) {
        let rtt = self.begun.elapsed();
        self.outcome = Some(if well { Outcome::Success { rtt } } else { Outcome::Failure });
    }

    pub(crate) fn connected(&self) {
        self.balancer.borrow_mut().connected(&self.endpoint.id);
    }

    /// The peer's sidecar said that it drains.
    pub(crate) fn drained(&self) {
        self.balancer.borrow_mut().drained(&self.endpoint.id, Instant::now());
    }

    /// No connection could be made.
    pub(crate) fn connect_failed(&mut self, worker: &Worker) {
        self.outcome = Some(Outcome::Failure);
        let mut rng = worker.rng.borrow_mut();
        self.balancer.borrow_mut().connect_failed(&self.endpoint.id, Instant::now(), &mut rng);
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
            self.balancer.borrow_mut().finish(token, outcome, Instant::now());
        }
    }
}
