//! Routes as they are pushed, checked.

use std::{collections::BTreeSet, sync::Arc};

use outrigger_api::v1;

use super::{Backend, Filters, Rule, table::Entry};
use crate::{
    matching::{GrpcMatcher, PathMatcher, ValueMatcher},
    traffic::Traffic,
};

/// Matches of all routes of one service: 32 routes of the size that the Gateway API allows.
pub const MAX_MATCHES: usize = 4_096;

/// Regular expressions in them. Each takes up to 64 KiB, and those of paths are tried one by one.
pub const MAX_EXPRESSIONS: usize = 256;

/// Backends of one rule; the Gateway API allows 16.
const MAX_BACKENDS: usize = 64;

/// What routes have of that of which a service may have only so much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weight {
    /// Matches; a rule without one has one.
    pub matches: usize,
    /// Regular expressions in them.
    pub expressions: usize,
}

impl Weight {
    /// That of rules.
    pub fn of<'a>(rules: impl IntoIterator<Item = &'a v1::RouteRule>) -> Self {
        let of_rule = |rule: &v1::RouteRule| match &rule.matches[..] {
            [] => Self { matches: 1, expressions: 0 },
            matches => matches.iter().map(Self::of_match).fold(Self::default(), Self::with),
        };
        rules.into_iter().map(of_rule).fold(Self::default(), Self::with)
    }

    fn of_match(wire: &v1::RouteMatch) -> Self {
        let is_regex = |test: &&v1::ValueMatch| test.kind() == v1::value_match::Kind::Regex;
        let paths = wire.path.iter().filter(|path| path.kind() == v1::path_match::Kind::Regex).count();
        let values = wire.headers.iter().chain(&wire.query).filter(is_regex).count();
        let calls = wire.grpc.iter().filter(|call| call.regex).count() * 2;
        Self { matches: 1, expressions: paths + values + calls }
    }

    /// Both together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            matches: self.matches.saturating_add(other.matches),
            expressions: self.expressions.saturating_add(other.expressions),
        }
    }

    /// So many of it.
    #[must_use]
    pub fn times(self, count: usize) -> Self {
        Self {
            matches: self.matches.saturating_mul(count),
            expressions: self.expressions.saturating_mul(count),
        }
    }

    /// Whether a service may have so much.
    ///
    /// # Errors
    /// What it would have too much of, after "with it the service has".
    pub fn fits(self) -> Result<(), String> {
        if self.matches > MAX_MATCHES {
            return Err(format!("with it the service has more than {MAX_MATCHES} matches"));
        }
        if self.expressions > MAX_EXPRESSIONS {
            return Err(format!("with it the service has more than {MAX_EXPRESSIONS} regular expressions"));
        }
        Ok(())
    }
}

/// One route.
pub(super) struct Route {
    pub(super) is_grpc: bool,
    /// It holds for clients of its own namespace only.
    pub(super) is_consumers: bool,
    /// Empty: all.
    pub(super) ports: BTreeSet<u16>,
    /// In the order of its rules.
    pub(super) entries: Vec<Arc<Entry>>,
    created: i64,
    name: String,
}

impl Route {
    /// `weight`: of the routes before it, and then of it too.
    pub(super) fn from_wire(wire: &v1::Route, weight: &mut Weight) -> Result<Self, String> {
        let is_grpc = match &*wire.kind {
            "HTTPRoute" => false,
            "GRPCRoute" => true,
            _ => return Err("a route is an HTTPRoute or a GRPCRoute".to_owned()),
        };
        let mut ports = BTreeSet::new();
        for port in &wire.ports {
            let number = u16::try_from(*port).ok().filter(|port| *port != 0);
            ports.insert(number.ok_or_else(|| format!("port {port} is no port"))?);
        }
        let mut entries = Vec::new();
        for (number, rule) in wire.rules.iter().enumerate() {
            let name = if rule.name.is_empty() { format!("rule {number}") } else { rule.name.clone() };
            let in_rule = |fault| format!("{name}: {fault}");
            let compiled =
                Arc::new(compile(format!("{} {}, {name}", wire.kind, wire.name), rule).map_err(in_rule)?);
            let replaces_prefix = compiled.backends.iter().filter_map(|backend| backend.filters.as_deref());
            let replaces_prefix = replaces_prefix.chain([&compiled.filters]).any(Filters::replace_a_prefix);
            let every_request = [v1::RouteMatch::default()];
            let matches = if rule.matches.is_empty() { &every_request[..] } else { &rule.matches };
            for wire in matches {
                *weight = weight.with(Weight::of_match(wire));
                weight.fits().map_err(in_rule)?;
                let entry = entry(wire, is_grpc, compiled.clone()).map_err(in_rule)?;
                if replaces_prefix && entry.prefix().is_none() {
                    return Err(in_rule("it replaces a prefix, and matches by something else".to_owned()));
                }
                entries.push(Arc::new(entry));
            }
        }
        Ok(Self {
            is_grpc,
            is_consumers: !wire.client_namespace.is_empty(),
            ports,
            entries,
            created: wire.created,
            name: wire.name.clone(),
        })
    }

    pub(super) fn holds_at(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }

    /// What decides between routes that match equally: the smaller one wins.
    pub(super) fn seniority(&self) -> (i64, &str, bool) {
        (self.created, &self.name, self.is_grpc)
    }
}

fn compile(name: String, wire: &v1::RouteRule) -> Result<Rule, String> {
    if wire.backends.len() > MAX_BACKENDS {
        return Err(format!("{} backends; at most {MAX_BACKENDS} are taken", wire.backends.len()));
    }
    let filters = wire.filters.as_ref().map(Filters::from_wire).transpose()?.unwrap_or_default();
    if filters.redirect.is_some() && !wire.backends.is_empty() {
        return Err("a redirect and backends exclude each other".to_owned());
    }
    let backends = wire.backends.iter().map(Backend::from_wire).collect::<Result<Vec<_>, _>>()?;
    let rewrites = |backend: &Backend| backend.filters.as_ref().is_some_and(|own| own.rewrite.is_some());
    if filters.rewrite.is_some() && backends.iter().any(rewrites) {
        // The prefix that was matched is gone when the second one looks for it.
        return Err("a rewrite of the rule and one of a backend exclude each other".to_owned());
    }
    Ok(Rule {
        name: name.into(),
        filters,
        backends,
        traffic: wire.traffic.as_ref().map(Traffic::from_wire).transpose()?.map(Arc::new),
    })
}

fn entry(wire: &v1::RouteMatch, is_grpc: bool, rule: Arc<Rule>) -> Result<Entry, String> {
    let headers = first_of_each(&wire.headers, ValueMatcher::header)?;
    let query = first_of_each(&wire.query, ValueMatcher::query)?;
    if is_grpc {
        if wire.path.is_some() || !wire.query.is_empty() || !wire.method.is_empty() {
            return Err("a match of HTTP in a GRPCRoute".to_owned());
        }
        let any = v1::GrpcMatch::default();
        let call = wire.grpc.as_ref().unwrap_or(&any);
        return Ok(Entry::call(call, GrpcMatcher::from_wire(call)?, headers, rule));
    }
    if wire.grpc.is_some() {
        return Err("a match of gRPC in an HTTPRoute".to_owned());
    }
    let any = v1::PathMatch { kind: v1::path_match::Kind::Prefix.into(), value: "/".to_owned() };
    let path = wire.path.as_ref().unwrap_or(&any);
    let method = (!wire.method.is_empty()).then(|| wire.method.as_bytes().into());
    Ok(Entry::path(path, PathMatcher::from_wire(path)?, method, headers, query, rule))
}

/// Of entries with one name the first counts (Gateway API, `HTTPHeaderMatch.name`).
fn first_of_each(
    wire: &[v1::ValueMatch],
    check: fn(&v1::ValueMatch) -> Result<ValueMatcher, String>,
) -> Result<Vec<ValueMatcher>, String> {
    let mut tests: Vec<ValueMatcher> = Vec::with_capacity(wire.len());
    for test in wire {
        let test = check(test)?;
        if tests.iter().all(|other| other.name() != test.name()) {
            tests.push(test);
        }
    }
    Ok(tests)
}
