//! What the policies say of a request: decided once, when its head is there, before anything is asked of anybody.
//!
//! A route's rule names where the request goes, what is changed in its head and in its response's, and how long it may take; where no
//! rule takes it, the service's own policy holds. What the other parts of an exchange need of that is kept in the [`Plan`].

use std::{
    net::IpAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use outrigger_core::{
    deadline, fault,
    reason::Reason,
    route::{Backend, Filters, Found, HeaderChange, Matched, Redirect, Rule},
    traffic::Traffic,
};
use outrigger_http::{fields::Fields, head::RequestHead};

use super::Exchange;
use crate::data::{
    Worker,
    balance::Route,
    reasons::{Refusal, asked_for, cut, is_grpc},
    view::Seen,
};

/// What was decided.
#[derive(Default)]
pub(super) struct Plan {
    /// The rule that took the request, and its backend's place.
    rule: Option<(Arc<Rule>, usize)>,
    /// The way to where it goes, where that is not what was dialled.
    via: Option<Rc<Route>>,
    /// How it is called; `None`: nobody has a policy.
    pub(super) traffic: Option<Arc<Traffic>>,
    /// Until when all must be over.
    pub(super) deadline: Option<Instant>,
    /// A pause before it sets out.
    pub(super) delayed_until: Option<Instant>,
    /// Who gets a copy.
    pub(super) mirrors: Vec<Rc<Route>>,
}

/// What becomes of a request.
pub(super) enum Planned {
    Goes,
    Refused(Refusal),
    /// The client is to ask elsewhere: this status, there.
    Redirected(u16, Vec<u8>),
}

impl Plan {
    fn filters(&self) -> impl Iterator<Item = &Filters> {
        self.rule.iter().flat_map(|(rule, backend)| {
            [Some(&rule.filters), rule.backends.get(*backend).and_then(|backend| backend.filters.as_deref())]
                .into_iter()
                .flatten()
        })
    }

    /// Changes a response's header as the route says.
    pub(super) fn change_response(&self, fields: &mut Fields) {
        for change in self.filters().filter_map(|filters| filters.response_headers.as_ref()) {
            apply(fields, change);
        }
    }

    /// What a balancer that hashes goes by.
    pub(super) fn hash(&self, head: &RequestHead, source: Option<IpAddr>) -> Option<u64> {
        self.traffic.as_ref()?.load_balancer.hash(&Seen(head), source)
    }

    /// How long nothing may pass; `configured` where no policy says it.
    pub(super) fn idle(&self, configured: Option<Duration>) -> Option<Duration> {
        self.traffic.as_ref().and_then(|traffic| traffic.timeouts.idle).unwrap_or(configured)
    }

    /// Whether a policy says how long all may take.
    pub(super) fn has_time_limit(&self) -> bool {
        self.traffic.as_ref().is_some_and(|traffic| traffic.timeouts.request.is_some())
    }

    /// The way to where the request goes, where a route or its authority has chosen it.
    pub(super) fn via(&self) -> Option<&Rc<Route>> {
        self.via.as_ref()
    }
}

impl Exchange {
    /// Decides what becomes of the request to `route`, and changes its head as its rule says.
    pub(super) fn plan(&mut self, worker: &Worker, route: &Rc<Route>) -> Planned {
        let chosen;
        let route = if route.is_pinned() {
            let authority = self.head.authority();
            let Some(way) = authority.and_then(|authority| route.chosen_by(authority)) else {
                // An endpoint's own address means exactly that endpoint: nothing of its service holds.
                return Planned::Goes;
            };
            self.plan.via = Some(way.clone());
            chosen = way;
            &chosen
        } else {
            route
        };
        let service = route.target.service.peek();
        let found = service.routes.find(route.target.port, &Seen(&self.head));
        let traffic = match found {
            Found::NoRoutes => service.traffic.clone(),
            Found::NoMatch => {
                let at = format!("{}:{}", service.name, route.target.port);
                let routes = service.routes.attached(route.target.port).into_iter().collect::<Vec<_>>();
                let text = no_route(&self.head, &at, &routes.join(", "));
                return Planned::Refused(Refusal::new(Reason::NoRoute, text));
            }
            Found::Rule(rule, matched) => {
                let rule = rule.clone();
                if let Some(redirect) = &rule.filters.redirect {
                    return self.redirected(redirect, matched);
                }
                if let Err(refusal) = self.choose_backend(worker, route, &rule, matched) {
                    return Planned::Refused(refusal);
                }
                rule.traffic.clone()
            }
        };
        // Hedges are taken from the same budget.
        if traffic.as_ref().is_some_and(|traffic| traffic.retry.is_some() || traffic.hedge.is_some()) {
            self.plan.via.as_ref().unwrap_or(route).counts_request();
        }
        self.plan.traffic = traffic;
        self.set_deadline();
        self.inject_faults(worker)
    }

    fn redirected(&mut self, redirect: &Redirect, matched: Matched) -> Planned {
        // What applications speak to us is in clear.
        let location = redirect.location(&Seen(&self.head), matched, false);
        Planned::Redirected(redirect.status, location)
    }

    fn choose_backend(
        &mut self,
        worker: &Worker,
        route: &Rc<Route>,
        rule: &Arc<Rule>,
        matched: Matched,
    ) -> Result<(), Refusal> {
        let picked = rule.pick(&mut worker.rng.borrow_mut());
        let Some(backend) = picked.map(|at| &rule.backends[at]) else {
            let text = format!("{} has no backend that takes anything", rule.name);
            return Err(Refusal::new(Reason::InvalidBackend, text));
        };
        let way = way_to(route, backend).map_err(|reason| {
            let text = format!("{} leads to {}:{}: {reason}", rule.name, backend.service, backend.port);
            Refusal::new(Reason::InvalidBackend, text)
        })?;
        if way.is_some() {
            self.plan.via = way;
        }
        self.plan.rule = picked.map(|at| (rule.clone(), at));
        for filters in [Some(&rule.filters), backend.filters.as_deref()].into_iter().flatten() {
            for mirror in &filters.mirrors {
                // A copy that cannot be sent is not missed by anybody; that it was to be is the policy's status.
                if fault::draw(mirror.per_million, &mut worker.rng.borrow_mut())
                    && let Ok(way) = way_to(route, &mirror.backend)
                {
                    self.plan.mirrors.push(way.unwrap_or_else(|| route.clone()));
                }
            }
            change_request(&mut self.head, filters, matched);
        }
        Ok(())
    }

    /// The moment at which all must be over: the policy's time-out and the caller's own, whichever comes first.
    fn set_deadline(&mut self) {
        let Some(begun) = self.begun else { return };
        let policy = self.plan.traffic.as_ref().and_then(|traffic| traffic.timeouts.request.flatten());
        let caller = deadline::asked(&Seen(&self.head));
        self.plan.deadline = policy.into_iter().chain(caller).min().map(|timeout| begun + timeout);
    }

    fn inject_faults(&mut self, worker: &Worker) -> Planned {
        let Some(fault) = self.plan.traffic.as_ref().and_then(|traffic| traffic.fault.as_ref()) else {
            return Planned::Goes;
        };
        let rng = &mut worker.rng.borrow_mut();
        if let Some(delay) = fault.delay(rng) {
            self.plan.delayed_until = self.begun.map(|begun| begun + delay);
        }
        if let Some(abort) = fault.abort(rng) {
            let text = format!("a fault that {} injects", fault.origin);
            let refusal = Refusal::new(Reason::FaultInjected, text).saying(abort.status, abort.grpc);
            return Planned::Refused(refusal);
        }
        Planned::Goes
    }
}

/// Why a request gets nowhere that the routes at an address do not speak of.
fn no_route(head: &RequestHead, at: &str, routes: &str) -> String {
    let host = head.authority().or_else(|| head.fields.get("host")).unwrap_or_default();
    format!(
        "no rule of {} takes {} at {at} (host {}); a rule without matches would take the rest",
        cut(routes.to_owned()),
        asked_for(head),
        cut(String::from_utf8_lossy(host).into_owned())
    )
}

/// The way to a backend; `None`: it is the service that was dialled.
fn way_to(route: &Rc<Route>, backend: &Backend) -> Result<Option<Rc<Route>>, Arc<str>> {
    if let Some(why) = &backend.invalid {
        return Err(why.clone());
    }
    if **route.service() == *backend.service && route.target.port == backend.port {
        return Ok(None);
    }
    route.to(backend).map(Some).ok_or_else(|| "there is no such service".into())
}

fn change_request(head: &mut RequestHead, filters: &Filters, matched: Matched) {
    if let Some(change) = &filters.request_headers {
        apply(&mut head.fields, change);
    }
    let Some(rewrite) = &filters.rewrite else { return };
    if let Some(target) = head.path().map(|target| rewrite.target(target, matched)) {
        head.set_path(Some(&target));
    }
    if let Some(host) = &rewrite.hostname {
        head.set_authority(Some(host.as_bytes()));
        if head.fields.contains("host") {
            head.fields.set("host", host.as_bytes());
        }
    }
}

fn apply(fields: &mut Fields, change: &HeaderChange) {
    for (name, value) in &change.set {
        fields.set(name, value);
    }
    for (name, value) in &change.add {
        fields.push(name.as_bytes(), value);
    }
    for name in &change.remove {
        fields.remove(name);
    }
}

/// Whether what is said of the response's status is in its trailers.
pub(super) fn says_so_in_trailers(fields: &Fields) -> bool {
    is_grpc(fields) && !fields.contains("grpc-status")
}
