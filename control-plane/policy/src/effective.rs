//! What a change of policies comes to: for whom something is different, not which lines are.
//!
//! Requests are made up from what the old and the new policies look at (methods, paths, headers, gRPC methods), asked by every identity
//! of the catalog, and both answers compared. A difference that only shows with other requests (a regular expression, for which none is
//! made up) is not seen; what belongs to a service or to a namespace as a whole is compared as it is.

use std::collections::{BTreeMap, BTreeSet};

use outrigger_api::v1;
use outrigger_core::request::Request;

use crate::catalog::{Catalog, CatalogService};
use crate::explain::{Evaluator, From, Outcome, Question, To};
use crate::resolve::{Resolved, ServicePolicy};

/// Requests that are made up for one port of a service; more are left out.
const MAX_REQUESTS: usize = 64;
/// Identities that ask; more are left out.
const MAX_CALLERS: usize = 256;
/// Lines; the last says how many are left out.
const MAX_LINES: usize = 200;
/// Callers that a line names.
const MAX_NAMES: usize = 3;

/// What is different, a line each, as `shop/web -> orders.shop:80 POST /pay: retries 2 -> 0, by TrafficPolicy shop/pay`. Empty: nothing
/// that can be seen.
pub fn changes(old: &Resolved, new: &Resolved, catalog: &Catalog) -> Vec<String> {
    let mut lines = of_the_whole(old, new, catalog);
    let comparison = Comparison {
        old: Evaluator::new(old, catalog),
        new: Evaluator::new(new, catalog),
        callers: callers(catalog),
    };
    for service in &catalog.services {
        let name = service.full_name();
        let policies = [old.service(&name), new.service(&name)];
        lines.extend(of_service(&name, &policies));
        let accesses = comparison.accesses(old, new, &name);
        if policies[0] == policies[1] && accesses.iter().all(|[old, new]| old == new) {
            continue;
        }
        let requests = requests(&policies, accesses.iter().flatten().flatten());
        for port in ports(service, &policies) {
            lines.extend(comparison.of_port(&To { service: name.clone(), port }, &requests));
        }
    }
    if lines.len() > MAX_LINES {
        let more = lines.len() - (MAX_LINES - 1);
        lines.truncate(MAX_LINES - 1);
        lines.push(format!("and {more} more"));
    }
    lines
}

struct Comparison<'a> {
    old: Evaluator<'a>,
    new: Evaluator<'a>,
    callers: Vec<From>,
}

/// Everybody who can prove who it is, and somebody who cannot.
fn callers(catalog: &Catalog) -> Vec<From> {
    let mut seen = BTreeSet::new();
    let workloads = catalog.workloads();
    let with_identity = workloads.iter().filter(|workload| workload.identity.is_some());
    let distinct = with_identity.filter(|workload| seen.insert(workload.identity.clone()));
    distinct.take(MAX_CALLERS).map(From::workload).chain([From::nobody()]).collect()
}

impl Comparison<'_> {
    /// What the workloads behind a service are told of access, before and after.
    fn accesses(&self, old: &Resolved, new: &Resolved, service: &str) -> Vec<[Option<v1::Access>; 2]> {
        let workloads = self.new.workloads_behind(service).iter();
        let told = workloads.filter_map(|workload| {
            let identity = workload.identity.as_deref()?;
            let of = |resolved: &Resolved| resolved.inbound(identity, std::slice::from_ref(workload)).access;
            Some([of(old), of(new)])
        });
        let mut accesses: Vec<_> = told.collect();
        accesses.dedup();
        accesses
    }

    fn of_port(&self, to: &To, requests: &[Option<Request>]) -> Vec<String> {
        let mut by_difference: BTreeMap<(usize, String), Vec<String>> = BTreeMap::new();
        for (at, request) in requests.iter().enumerate() {
            for from in &self.callers {
                let question = Question { from: from.clone(), to: to.clone(), request: request.clone() };
                let (old, new) = (self.old.explain(&question), self.new.explain(&question));
                if let Some(difference) =
                    difference(&old.outcome, &new.outcome, [&old.outcomes, &new.outcomes])
                {
                    by_difference.entry((at, difference)).or_default().push(from.name());
                }
            }
        }
        let line = |((at, difference), callers): ((usize, String), Vec<String>)| {
            let what = requests[at].as_ref().map_or("bytes".to_owned(), label);
            format!("{} -> {} {what}: {difference}", names(&callers, self.callers.len()), place(to))
        };
        by_difference.into_iter().map(line).collect()
    }
}

fn place(to: &To) -> String {
    if to.port == 0 { to.service.clone() } else { format!("{}:{}", to.service, to.port) }
}

fn label(request: &Request) -> String {
    let text = String::from_utf8_lossy;
    let line = format!("{} {}", text(&request.method), text(&request.target));
    let headers: Vec<String> =
        request.headers.iter().map(|(name, value)| format!("{name}: {}", text(value))).collect();
    if headers.is_empty() { line } else { format!("{line} ({})", headers.join(", ")) }
}

fn names(callers: &[String], all: usize) -> String {
    if callers.len() == all {
        return "everybody".to_owned();
    }
    let named = callers[..callers.len().min(MAX_NAMES)].join(", ");
    match callers.len().saturating_sub(MAX_NAMES) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

fn difference(old: &Outcome, new: &Outcome, all: [&[Outcome]; 2]) -> Option<String> {
    let mut differences = Vec::new();
    let mut differs = |field: &str, old: String, new: String, by: Option<String>| {
        if old != new {
            let by = by.filter(|by| !by.is_empty()).map(|by| format!(", by {by}")).unwrap_or_default();
            differences.push(format!("{field}{old} -> {new}{by}"));
        }
    };
    let decision = |outcome: &Outcome| match outcome.status {
        Some(status) => format!("{:?} {status}", outcome.decision),
        None => format!("{:?}", outcome.decision),
    };
    differs("", decision(old), decision(new), who_decides(new));
    let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    differs("route ", text(&old.route), text(&new.route), None);
    let backends = |outcomes: &[Outcome]| {
        let backends: BTreeSet<&str> =
            outcomes.iter().filter_map(|outcome| outcome.backend.as_deref()).collect();
        let backends: Vec<&str> = backends.into_iter().collect();
        if backends.is_empty() { "none".to_owned() } else { backends.join("+") }
    };
    differs("backend ", backends(all[0]), backends(all[1]), None);
    differs("retries ", old.retries.to_string(), new.retries.to_string(), new.retries_by.clone());
    let timeout =
        |outcome: &Outcome| outcome.timeout.map_or("none".to_owned(), |timeout| timeout.to_string());
    differs("timeout ", timeout(old), timeout(new), new.timeout_by.clone());
    (!differences.is_empty()).then(|| differences.join("; "))
}

fn who_decides(outcome: &Outcome) -> Option<String> {
    match (outcome.policy.as_deref()?, &outcome.rule) {
        ("default", _) => Some("default".to_owned()),
        (policy, Some(rule)) => Some(format!("AccessPolicy {policy}, {rule}")),
        (policy, None) => Some(format!("AccessPolicy {policy}")),
    }
}

/// The ports to ask at: the service's and, where any port leads to it, those that routes name. 0: nobody serves it yet.
fn ports(service: &CatalogService, policies: &[ServicePolicy; 2]) -> BTreeSet<u16> {
    let mut ports = service.client_ports();
    if service.takes_any_port() {
        let routes = policies.iter().flat_map(|policy| &policy.routes);
        ports.extend(routes.flat_map(|route| &route.ports).filter_map(|port| u16::try_from(*port).ok()));
    }
    if ports.is_empty() {
        ports.insert(0);
    }
    ports
}

/// A connection for bytes, a plain request, and one for each thing that is looked at.
fn requests<'a>(
    policies: &'a [ServicePolicy; 2],
    accesses: impl Iterator<Item = &'a v1::Access>,
) -> Vec<Option<Request>> {
    let rules = policies.iter().flat_map(|policy| policy.routes.iter().flat_map(|route| &route.rules));
    let of_routes = rules.flat_map(|rule| &rule.matches).filter_map(of_match);
    let operations = accesses.flat_map(|access| access.policies.iter().flat_map(|policy| &policy.rules));
    let of_access = operations.flat_map(|rule| &rule.to).flat_map(of_operation);
    let mut requests = vec![None];
    for request in
        [Request::new("GET", "/"), Request::new("POST", "/")].into_iter().chain(of_routes).chain(of_access)
    {
        if requests.len() < MAX_REQUESTS && !requests.contains(&Some(request.clone())) {
            requests.push(Some(request));
        }
    }
    requests
}

fn of_match(wire: &v1::RouteMatch) -> Option<Request> {
    if let Some(grpc) = &wire.grpc {
        return with_headers(of_grpc(grpc)?, &wire.headers);
    }
    let method = if wire.method.is_empty() { "GET" } else { &wire.method };
    let path = match &wire.path {
        None => "/",
        Some(path) if path.kind() == v1::path_match::Kind::Regex => return None,
        Some(path) => &path.value,
    };
    let mut target = path.to_owned();
    for (at, query) in wire.query.iter().enumerate() {
        if query.kind() == v1::value_match::Kind::Regex {
            return None;
        }
        let join = if at == 0 { '?' } else { '&' };
        target = format!("{target}{join}{}={}", query.name, query.value);
    }
    with_headers(Request::new(method, &target), &wire.headers)
}

/// One for each pair of what it lists.
fn of_operation(operation: &v1::Operation) -> Vec<Request> {
    let grpc = operation.grpc.iter().filter_map(of_grpc);
    let methods: Vec<&str> = match &operation.methods[..] {
        [] => vec!["GET"],
        methods => methods.iter().map(String::as_str).collect(),
    };
    let literal = operation.paths.iter().filter(|path| path.kind() != v1::path_match::Kind::Regex);
    let mut paths: Vec<&str> = literal.map(|path| &*path.value).collect();
    if operation.paths.is_empty() {
        paths.push("/");
    }
    let plain = methods.iter().flat_map(|method| paths.iter().map(|path| Request::new(method, path)));
    grpc.chain(plain).filter_map(|request| with_headers(request, &operation.headers)).collect()
}

fn of_grpc(grpc: &v1::GrpcMatch) -> Option<Request> {
    if grpc.regex {
        return None;
    }
    let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
    let target = format!("/{}/{}", or(&grpc.service, "any.Service"), or(&grpc.method, "Method"));
    Some(Request::new("POST", &target).with("content-type", "application/grpc"))
}

fn with_headers(request: Request, headers: &[v1::ValueMatch]) -> Option<Request> {
    headers.iter().try_fold(request, |request, header| match header.kind() {
        v1::value_match::Kind::Regex => None,
        _ => Some(request.with(&header.name, header.value.as_bytes())),
    })
}

/// What no single request shows.
fn of_service(name: &str, [old, new]: &[ServicePolicy; 2]) -> Vec<String> {
    fn compare<T: PartialEq>(
        field: &str,
        old: Option<&T>,
        new: Option<&T>,
        origin: impl Fn(&T) -> &str,
    ) -> Option<String> {
        if old == new {
            return None;
        }
        let by = |of: &T| if origin(of).is_empty() { String::new() } else { format!(", by {}", origin(of)) };
        Some(match (old, new) {
            (_, None) => format!("{field} is the proxy's own again"),
            (None, Some(new)) => format!("{field} is set{}", by(new)),
            (Some(_), Some(new)) => format!("{field} changes{}", by(new)),
        })
    }
    let default = v1::Traffic::default();
    let old = old.traffic.as_ref().unwrap_or(&default);
    let new = new.traffic.as_ref().unwrap_or(&default);
    let fields = [
        compare("hedge", old.hedge.as_ref(), new.hedge.as_ref(), |t| &t.origin),
        compare("fault", old.fault.as_ref(), new.fault.as_ref(), |t| &t.origin),
        compare("loadBalancer", old.load_balancer.as_ref(), new.load_balancer.as_ref(), |t| &t.origin),
        compare("circuitBreaker", old.breaker.as_ref(), new.breaker.as_ref(), |t| &t.origin),
        compare("bulkhead", old.bulkhead.as_ref(), new.bulkhead.as_ref(), |t| &t.origin),
        compare("healthCheck", old.health_check.as_ref(), new.health_check.as_ref(), |t| &t.origin),
    ];
    fields.into_iter().flatten().map(|change| format!("{name}: {change}")).collect()
}

/// Of namespaces, workloads and names.
fn of_the_whole(old: &Resolved, new: &Resolved, catalog: &Catalog) -> Vec<String> {
    let mut lines = Vec::new();
    let workloads = catalog.workloads();
    let namespaces: BTreeSet<&str> = workloads.iter().map(|workload| &*workload.namespace).collect();
    for namespace in namespaces {
        let (was, is) = (old.outbound(namespace), new.outbound(namespace));
        if was.default != is.default {
            let by = if is.origin.is_empty() { String::new() } else { format!(", by {}", is.origin) };
            lines.push(format!("namespace {namespace}: outbound {:?} -> {:?}{by}", was.default, is.default));
        }
    }
    let mut seen = BTreeSet::new();
    for workload in &workloads {
        let Some(identity) = workload.identity.as_deref() else { continue };
        let of = |resolved: &Resolved| resolved.inbound(identity, std::slice::from_ref(workload));
        let (was, is, name) = (of(old), of(new), From::workload(workload).name());
        let mut changes = Vec::new();
        if was.mtls != is.mtls {
            changes.push(format!("{name}: mtls {:?} -> {:?}", was.mtls, is.mtls));
        }
        if was.concurrency != is.concurrency {
            changes.push(format!("{name}: concurrency changes"));
        }
        let limits = |policy: Option<v1::Access>| -> Vec<(String, Vec<v1::RateLimit>)> {
            let policies = policy.into_iter().flat_map(|access| access.policies);
            policies
                .map(|policy| (policy.name, policy.limits))
                .filter(|(_, limits)| !limits.is_empty())
                .collect()
        };
        if limits(was.access) != limits(is.access) {
            changes.push(format!("{name}: limits change"));
        }
        lines.extend(changes.into_iter().filter(|line| seen.insert(line.clone())));
    }
    let hosts = |resolved: &Resolved| -> BTreeSet<(String, String)> {
        let of = |e: &crate::resolve::External| {
            e.hosts.iter().map(|host| (host.clone(), e.service.clone())).collect::<Vec<_>>()
        };
        resolved.externals().iter().flat_map(of).collect()
    };
    let (was, is) = (hosts(old), hosts(new));
    lines.extend(was.difference(&is).map(|(host, service)| format!("{host}: leads no longer to {service}")));
    lines.extend(is.difference(&was).map(|(host, service)| format!("{host}: leads to {service}")));
    lines
}

#[cfg(test)]
mod tests;
