//! What becomes of one request, step by step, and who says so.
//!
//! The question goes the way of a request: the client's sidecar finds a route, picks a backend and changes the head, the server's
//! sidecar decides on what arrives. Every decision is made by the sidecars' own code from what they would be pushed; only the order of
//! the questions, and what is drawn by chance there, is here: of several backends all are followed.

mod answer;
mod way;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use outrigger_api::v1;
use outrigger_core::access::{Access, By, Caller, Verdict};
use outrigger_core::limit::Limits;
use outrigger_core::model::{self, Protocol};
use outrigger_core::path::EscapedSlashes;
use outrigger_core::reason::Reason;
use outrigger_core::request::{Request, View};
use outrigger_core::route::{Backend, Filters, Found, Matched, Rule};
use outrigger_core::traffic::Traffic;

pub use self::answer::{Explanation, Origin, Outcome, Step};
use self::way::Way;

use crate::catalog::{
    Catalog, CatalogProtocol, CatalogService, Workload, identity_namespace, identity_parts,
};
use crate::kinds::{Decision, ExternalProtocol};
use crate::resolve::{External, Resolved, ServicePolicy};

/// What would become of this?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Who asks.
    pub from: From,
    /// Whom it asks.
    pub to: To,
    /// What it asks; `None`: a connection for bytes.
    pub request: Option<Request>,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct From {
    /// Its SPIFFE id; `None`: it is not in the mesh, or calls past its sidecar.
    pub identity: Option<String>,
    /// Whose consumer routes hold for it.
    pub namespace: String,
    /// Where it is; 0.0.0.0: not known, and in no network but the one of everything.
    pub address: IpAddr,
}

/// Whom it asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct To {
    /// `<name>.<namespace>`.
    pub service: String,
    /// The service's port.
    pub port: u16,
}

/// Answers a question.
pub fn explain(question: &Question, resolved: &Resolved, catalog: &Catalog) -> Explanation {
    Evaluator::new(resolved, catalog).explain(question)
}

impl From {
    /// As this workload.
    pub fn workload(workload: &Workload) -> Self {
        Self {
            identity: workload.identity.clone(),
            namespace: workload.namespace.clone(),
            address: workload.address,
        }
    }

    /// As a SPIFFE id, or `<namespace>/<service account>` of the mesh's trust domain; at the address of a workload that has it.
    pub fn identity(identity: &str, catalog: &Catalog) -> Self {
        let identity = match identity.split_once('/') {
            Some((namespace, account)) if !identity.contains(':') => {
                format!("spiffe://{}/ns/{namespace}/sa/{account}", catalog.trust_domain)
            }
            _ => identity.to_owned(),
        };
        let workloads = catalog.workloads();
        let workload = workloads.iter().find(|workload| workload.identity.as_ref() == Some(&identity));
        Self {
            namespace: identity_namespace(&identity).unwrap_or_default().to_owned(),
            address: workload.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |workload| workload.address),
            identity: Some(identity),
        }
    }

    /// Somebody of whom nothing is known.
    pub fn nobody() -> Self {
        Self { identity: None, namespace: String::new(), address: IpAddr::V4(Ipv4Addr::UNSPECIFIED) }
    }

    /// For people: `<namespace>/<service account>`, or the address.
    pub fn name(&self) -> String {
        match self.identity.as_deref().map(|identity| identity_parts(identity).ok_or(identity)) {
            Some(Ok((namespace, account))) => format!("{namespace}/{account}"),
            Some(Err(identity)) => identity.to_owned(),
            None => format!("{} without an identity", self.address),
        }
    }
}

/// The server's side of one workload.
struct Server {
    mtls: v1::inbound::Mode,
    access: Result<Option<Access>, String>,
    /// Policies with limits, which are not looked into.
    limits: Vec<String>,
    /// The limits themselves, for what they ask of paths.
    counted: Limits,
}

/// A service as a sidecar holds it, or why it refuses it.
type Pushed = Result<Arc<model::Service>, String>;

/// Answers questions, and keeps what sidecars would be pushed.
pub(crate) struct Evaluator<'a> {
    resolved: &'a Resolved,
    catalog: &'a Catalog,
    workloads: BTreeMap<String, Vec<Workload>>,
    /// By name and the client's namespace.
    services: RefCell<BTreeMap<(String, String), Pushed>>,
    servers: RefCell<BTreeMap<(String, IpAddr), Arc<Server>>>,
}

impl<'a> Evaluator<'a> {
    pub(crate) fn new(resolved: &'a Resolved, catalog: &'a Catalog) -> Self {
        let mut workloads: BTreeMap<String, Vec<Workload>> = BTreeMap::new();
        for workload in catalog.workloads() {
            for service in workload.services.keys() {
                workloads.entry(service.clone()).or_default().push(workload.clone());
            }
        }
        Self { resolved, catalog, workloads, services: RefCell::default(), servers: RefCell::default() }
    }

    pub(crate) fn workloads_behind(&self, service: &str) -> &[Workload] {
        self.workloads.get(service).map_or(&[], Vec::as_slice)
    }

    /// The port at which the service's clients ask, where there is exactly one.
    pub(crate) fn only_port(&self, service: &str) -> Option<u16> {
        let ports = match self.catalog.service(service) {
            Some(service) => service.client_ports(),
            None => self.external(service)?.ports.iter().map(|port| port.port).collect(),
        };
        ports.first().copied().filter(|_| ports.len() == 1)
    }

    pub(crate) fn explain(&self, question: &Question) -> Explanation {
        let mut way = Way::new(question);
        self.client(&mut way);
        way.arrive()
    }

    fn external(&self, service: &str) -> Option<&External> {
        self.resolved.externals().iter().find(|external| external.service == service)
    }

    /// The service as a client of the namespace is pushed it; `None`: there is none.
    fn service(&self, name: &str, namespace: &str) -> Option<Pushed> {
        let key = (name.to_owned(), namespace.to_owned());
        if let Some(known) = self.services.borrow().get(&key) {
            return Some(known.clone());
        }
        let policy = self.resolved.service(name);
        let wire = match self.catalog.service(name) {
            Some(service) => of_catalog(service, policy),
            None => of_external(self.external(name)?, policy),
        };
        let service =
            model::Service::from_wire(wire, namespace).map(Arc::new).map_err(|fault| fault.to_string());
        self.services.borrow_mut().insert(key, service.clone());
        Some(service)
    }

    fn server(&self, identity: &str, workload: &Workload) -> Arc<Server> {
        let key = (identity.to_owned(), workload.address);
        if let Some(known) = self.servers.borrow().get(&key) {
            return known.clone();
        }
        let policy = self.resolved.inbound(identity, std::slice::from_ref(workload));
        let policies = policy.access.iter().flat_map(|access| &access.policies);
        let limits = |access: &v1::Access| {
            let slashes = EscapedSlashes::from_wire(access.escaped_slashes());
            Limits::from_wire(&access.policies, slashes, Instant::now())
        };
        let counted = policy.access.as_ref().map_or_else(|| Ok(Limits::default()), limits);
        let access = policy.access.as_ref().map(Access::from_wire).transpose();
        // What the sidecar would refuse of either it refuses whole.
        let (access, counted) = match counted {
            Ok(counted) => (access, counted),
            Err(fault) => (access.and(Err(fault)), Limits::default()),
        };
        let server = Arc::new(Server {
            mtls: policy.mtls,
            limits: policies
                .filter(|policy| !policy.limits.is_empty())
                .map(|policy| policy.name.clone())
                .collect(),
            access,
            counted,
        });
        self.servers.borrow_mut().insert(key, server.clone());
        server
    }

    // ---- the client's side ----

    fn client(&self, way: &mut Way<'_>) {
        let (from, to) = (&way.question.from, &way.question.to);
        let service = match self.service(&to.service, &from.namespace) {
            None => {
                way.step("service", format!("there is no {}", to.service), None);
                return way.ends(Decision::Error, Reason::NoSuchDestination);
            }
            Some(Err(fault)) => {
                way.step("service", format!("sidecars refuse what the policies come to: {fault}"), None);
                return way.ends(Decision::Error, Reason::DiscoveryUnavailable);
            }
            Some(Ok(service)) => service,
        };
        let request = way.question.request.as_ref();
        let Some(request) = request.filter(|_| service.protocol(to.port) != Protocol::Tcp) else {
            way.step("route", "bytes are not routed: they go to the service itself", None);
            return self.itself(way, service.traffic.as_deref(), None);
        };
        match service.routes.find(to.port, request) {
            Found::NoRoutes => {
                way.step("route", "no route is attached to the port: it goes to the service itself", None);
                self.itself(way, service.traffic.as_deref(), Some(request));
            }
            Found::NoMatch => {
                way.step("route", "the service has routes, and no rule of them takes it", None);
                way.ends(Decision::NoRoute, Reason::NoRoute);
            }
            Found::Rule(rule, matched) => self.by_rule(way, rule, matched, request),
        }
    }

    fn itself(&self, way: &mut Way<'_>, traffic: Option<&Traffic>, request: Option<&Request>) {
        if way.is_called(traffic, request) {
            let to = &way.question.to;
            self.backend(way, &to.service, to.port, request);
        }
    }

    fn by_rule(&self, way: &mut Way<'_>, rule: &Rule, matched: Matched, request: &Request) {
        let (route, name) = rule.name.split_once(", ").unwrap_or((&rule.name, ""));
        // A port's TrafficPolicy comes as a rule of its own, which nobody has written.
        let is_written = route.parse().is_ok_and(|key| !self.resolved.conditions(&key).is_empty());
        if is_written {
            let by = Origin { object: route.to_owned(), rule: Some(name.to_owned()) };
            way.step("route", "this rule takes it", Some(by));
            way.so_far.route = route.split_once(' ').map(|(_, name)| name.to_owned());
        } else {
            way.step("route", "no route is attached to the port: it goes to the service itself", None);
        }
        if let Some(redirect) = &rule.filters.redirect {
            let location = redirect.location(request, matched, false);
            way.step(
                "redirect",
                format!("{} to {}", redirect.status, String::from_utf8_lossy(&location)),
                None,
            );
            let outcome = Outcome { status: Some(redirect.status), ..way.so_far.clone() };
            way.outcomes.push(Outcome { decision: Decision::Redirect, ..outcome });
            return;
        }
        if !way.is_called(rule.traffic.as_deref(), Some(request)) {
            return;
        }
        let total: u64 = rule.backends.iter().map(|backend| u64::from(backend.weight)).sum();
        if total == 0 {
            way.step("backend", "the rule has none that takes anything", None);
            return way.ends(Decision::Error, Reason::InvalidBackend);
        }
        for backend in rule.backends.iter().filter(|backend| backend.weight > 0) {
            self.by_backend(way, rule, backend, matched, total, request);
        }
    }

    fn by_backend(
        &self,
        way: &mut Way<'_>,
        rule: &Rule,
        backend: &Backend,
        matched: Matched,
        total: u64,
        request: &Request,
    ) {
        let share = u64::from(backend.weight) * 100 / total;
        way.so_far.backend = Some(backend.service.to_string());
        if let Some(why) = &backend.invalid {
            way.step("backend", format!("{share} % to {}, which is invalid: {why}", backend.service), None);
            return way.ends(Decision::Error, Reason::InvalidBackend);
        }
        way.step("backend", format!("{share} % to {} port {}", backend.service, backend.port), None);
        let mut changed = request.clone();
        for filters in [Some(&rule.filters), backend.filters.as_deref()].into_iter().flatten() {
            change(&mut changed, filters, matched);
        }
        if changed.target != request.target {
            way.step("rewrite", String::from_utf8_lossy(&changed.target), None);
        }
        self.backend(way, &backend.service, backend.port, Some(&changed));
    }

    // ---- the server's side ----

    fn backend(&self, way: &mut Way<'_>, service: &str, port: u16, request: Option<&Request>) {
        way.so_far.backend = Some(service.to_owned());
        if self.catalog.service(service).is_none() && self.external(service).is_some() {
            way.step("access", format!("{service} is outside the mesh: nobody of ours decides there"), None);
            return way.outcomes.push(way.so_far.clone());
        }
        let workloads = self.workloads_behind(service).iter().filter_map(|workload| {
            let ports = &workload.services[service];
            Some((workload, *ports.get(&port).or_else(|| ports.get(&0))?))
        });
        let before = way.outcomes.len();
        for (workload, own_port) in workloads {
            self.workload(way, workload, own_port, request, before);
        }
        if way.outcomes.len() == before {
            way.step("endpoint", format!("{service} has none for port {port}"), None);
            way.ends(Decision::Error, Reason::NoEndpoints);
        }
    }

    /// Adds what comes of it at a workload, unless another one since `before` says the same.
    fn workload(
        &self,
        way: &mut Way<'_>,
        workload: &Workload,
        port: u16,
        request: Option<&Request>,
        before: usize,
    ) {
        let Some(identity) = &workload.identity else {
            let outcome = way.so_far.clone();
            if !way.outcomes[before..].contains(&outcome) {
                way.step(
                    "access",
                    format!("{} is not in the mesh: nobody decides there", workload.address),
                    None,
                );
                way.outcomes.push(outcome);
            }
            return;
        };
        let server = self.server(identity, workload);
        let mut at = Way {
            steps: Vec::new(),
            outcomes: Vec::new(),
            so_far: way.so_far.clone(),
            question: way.question,
        };
        decide(&mut at, &server, port, request);
        if !at.outcomes.iter().all(|outcome| way.outcomes[before..].contains(outcome)) {
            way.steps.append(&mut at.steps);
            way.outcomes.append(&mut at.outcomes);
        }
    }
}

fn decide(way: &mut Way<'_>, server: &Server, port: u16, request: Option<&Request>) {
    let from = &way.question.from;
    let caller = Caller::new(from.identity.as_deref(), from.address);
    let is_plaintext = caller.identity.is_none() && server.mtls == v1::inbound::Mode::Strict;
    let access = match &server.access {
        Err(fault) => {
            way.step("access", format!("the sidecar refuses what the policies come to: {fault}"), None);
            return way.ends(Decision::Error, Reason::DiscoveryUnavailable);
        }
        Ok(access) => access.as_ref(),
    };
    let verdict = match (access, request) {
        (None, _) => None,
        (Some(access), None) => Some(access.connection(&caller, port)),
        (Some(access), Some(request)) => {
            match access.judged(port, request.target(), server.counted.decides_on_paths(port)) {
                Ok(target) => {
                    let end = target.iter().position(|byte| *byte == b'?').unwrap_or(target.len());
                    Some(access.request(&caller, port, request, &target[..end]))
                }
                Err(fault) => {
                    way.step("path", format!("{fault}: rules cannot be asked about it"), None);
                    return way.ends(Decision::Deny, Reason::BadRequest);
                }
            }
        }
    };
    let is_probe = verdict.as_ref().is_some_and(|verdict| verdict.by == By::Probe);
    if is_plaintext && !is_probe {
        way.step("mtls", "plaintext is refused: the mode is Strict", None);
        return way.ends(Decision::Deny, Reason::PlaintextRefused);
    }
    let Some(verdict) = verdict else {
        way.step("access", "nobody has a policy: allowed", None);
        way.so_far.policy = Some("default".to_owned());
        return way.outcomes.push(way.so_far.clone());
    };
    tell(way, &verdict);
    if !verdict.allowed {
        return way.ends(Decision::Deny, Reason::AccessDenied);
    }
    for policy in &server.limits {
        way.step("limits", "may refuse it with 429", Some(Origin::access(policy, None)));
    }
    way.outcomes.push(way.so_far.clone());
}

fn tell(way: &mut Way<'_>, verdict: &Verdict<'_>) {
    let word = if verdict.allowed { "allowed" } else { "denied" };
    let (policy, rule, by) = match verdict.by {
        By::Probe => (None, None, None),
        By::Rule { policy, rule } => {
            (Some(policy.to_string()), Some(rule.to_string()), Some(Origin::access(policy, Some(rule))))
        }
        By::Default { origin } => (Some("default".to_owned()), None, Origin::of(origin)),
    };
    let text = match verdict.by {
        By::Probe => "allowed: it is a probe".to_owned(),
        By::Rule { .. } => word.to_owned(),
        By::Default { .. } if verdict.audited => "allowed by default, and counted".to_owned(),
        By::Default { .. } => format!("{word} by default: no rule is about it"),
    };
    way.step("access", text, by);
    for audit in &verdict.audits {
        let would = if audit.would_allow { "would be allowed" } else { "would be denied" };
        way.step("audit", would, Some(Origin::access(audit.policy, Some(audit.rule))));
    }
    way.so_far.policy = policy;
    way.so_far.rule = rule;
}

/// As the client's sidecar changes a head.
fn change(request: &mut Request, filters: &Filters, matched: Matched) {
    if let Some(change) = &filters.request_headers {
        for (name, value) in &change.set {
            request.headers.retain(|(own, _)| **own != **name);
            request.headers.push((name.to_string(), value.to_vec()));
        }
        request.headers.extend(change.add.iter().map(|(name, value)| (name.to_string(), value.to_vec())));
        request.headers.retain(|(own, _)| !change.remove.iter().any(|name| **name == **own));
    }
    if let Some(rewrite) = &filters.rewrite {
        request.target = rewrite.target(&request.target, matched);
        if let Some(hostname) = &rewrite.hostname {
            request.authority = Some(hostname.as_bytes().to_vec());
        }
    }
}

fn of_catalog(service: &CatalogService, policy: ServicePolicy) -> v1::Service {
    let port = |port: &crate::catalog::CatalogPort| v1::service::Port {
        port: port.port.into(),
        name: port.name.clone(),
        protocol: match port.protocol {
            CatalogProtocol::Detect => v1::Protocol::Unspecified,
            CatalogProtocol::Http1 => v1::Protocol::Http1,
            CatalogProtocol::Http2 => v1::Protocol::Http2,
            CatalogProtocol::Grpc => v1::Protocol::Grpc,
            CatalogProtocol::Tcp => v1::Protocol::Tcp,
        }
        .into(),
    };
    v1::Service {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        ports: service.ports.iter().map(port).collect(),
        routes: policy.routes,
        traffic: policy.traffic,
        ..v1::Service::default()
    }
}

fn of_external(external: &External, policy: ServicePolicy) -> v1::Service {
    let port = |port: &crate::kinds::ExternalPort| v1::service::Port {
        port: port.port.into(),
        name: port.name.clone().unwrap_or_default(),
        protocol: match port.protocol {
            ExternalProtocol::Http => v1::Protocol::Unspecified,
            ExternalProtocol::Http2 => v1::Protocol::Http2,
            ExternalProtocol::Grpc => v1::Protocol::Grpc,
            ExternalProtocol::Tcp => v1::Protocol::Tcp,
        }
        .into(),
    };
    v1::Service {
        name: external.key.name.clone(),
        namespace: external.key.namespace.clone(),
        ports: external.ports.iter().map(port).collect(),
        routes: policy.routes,
        traffic: policy.traffic,
        ..v1::Service::default()
    }
}

#[cfg(test)]
mod tests;
