//! An `AccessPolicy` as the wire's message, and what namespaces and the mesh say by default.
//!
//! A selector that can match nobody (two lists that exclude each other) leaves its rule out. It never leaves the selector out: a rule
//! without selectors is about everybody.

use outrigger_api::v1;

use super::rules::grpc_method;

use crate::kinds::{
    AccessMode, AccessPolicy, AccessRule, Action, DefaultAction, EscapedSlashes, HeaderCondition,
    HeaderConditionType, Limit, LimitPer, Operation, PathMatchType, Probe, Source,
};
use crate::value::Rate;

/// The policy, about all ports of a workload. `name` is `<namespace>/<name>`.
pub(crate) fn policy(policy: &AccessPolicy, name: String, trust_domain: &str) -> v1::AccessPolicy {
    v1::AccessPolicy {
        name,
        audit: policy.mode == AccessMode::Audit,
        ports: Vec::new(),
        rules: policy
            .rules
            .iter()
            .zip(0..)
            .filter_map(|(rule, at)| self::rule(rule, at, trust_domain))
            .collect(),
        limits: policy
            .limits
            .iter()
            .zip(0..)
            .filter_map(|(limit, at)| self::limit(limit, at, trust_domain))
            .collect(),
    }
}

fn rule(rule: &AccessRule, at: u32, trust_domain: &str) -> Option<v1::AccessRule> {
    Some(v1::AccessRule {
        name: rule.name.clone().unwrap_or_else(|| format!("rule {at}")),
        deny: rule.action == Action::Deny,
        from: sources(rule.from.as_deref(), trust_domain)?,
        to: operations(rule.to.as_deref())?,
    })
}

fn limit(limit: &Limit, at: u32, trust_domain: &str) -> Option<v1::RateLimit> {
    use v1::rate_limit::Per;
    let per = match limit.per {
        LimitPer::Total => Per::Total,
        LimitPer::Caller => Per::Caller,
        LimitPer::Header => Per::Header,
    };
    let millirequests = limit.requests_per_second.map_or(0, Rate::thousandths);
    // The rate of one second, at least one request.
    let one_second = u32::try_from(millirequests.div_ceil(1000)).unwrap_or(u32::MAX).max(1);
    Some(v1::RateLimit {
        name: limit.name.clone().unwrap_or_else(|| format!("limit {at}")),
        per: per.into(),
        header: limit.header.clone().unwrap_or_default(),
        millirequests,
        burst: limit.burst.unwrap_or(one_second),
        connections: limit.max_connections.unwrap_or(0),
        to: operations(limit.to.as_deref())?,
        from: sources(limit.from.as_deref(), trust_domain)?,
        tell_remaining: limit.tell_remaining.unwrap_or_default(),
    })
}

/// `None`: nobody can match. An empty list: everybody does.
fn sources(from: Option<&[Source]>, trust_domain: &str) -> Option<Vec<v1::Source>> {
    let Some(from) = from else { return Some(Vec::new()) };
    let sources: Vec<_> = from.iter().filter_map(|from| source(from, trust_domain)).collect();
    (!sources.is_empty()).then_some(sources)
}

fn source(source: &Source, trust_domain: &str) -> Option<v1::Source> {
    let accounts: Option<Vec<String>> = source.service_accounts.as_ref().map(|accounts| {
        let parts = accounts.iter().filter_map(|account| account.split_once('/'));
        parts.map(|(namespace, name)| identity(trust_domain, namespace, name)).collect()
    });
    let identities = match (&source.identities, accounts) {
        (None, None) => Vec::new(),
        (Some(identities), None) => some(identities.clone())?,
        (None, Some(accounts)) => some(accounts)?,
        // Both must hold.
        (Some(identities), Some(accounts)) => some(
            accounts
                .into_iter()
                .filter(|account| identities.iter().any(|identity| covers(identity, account)))
                .collect(),
        )?,
    };
    let wire = v1::Source {
        identities,
        namespaces: listed(source.namespaces.as_ref())?,
        cidrs: listed(source.cidrs.as_ref())?,
        unauthenticated: source.unauthenticated,
    };
    // A selector that says nothing is refused where it is written; here it must not become everybody.
    (wire != v1::Source::default()).then_some(wire)
}

/// `spiffe://<trust domain>/ns/<namespace>/sa/<name>`.
pub(crate) fn identity(trust_domain: &str, namespace: &str, name: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{name}")
}

fn covers(pattern: &str, identity: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => identity.starts_with(beginning),
        None => pattern == identity,
    }
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// A list that is there and empty matches nothing.
fn listed<T: Clone>(list: Option<&Vec<T>>) -> Option<Vec<T>> {
    list.map_or(Some(Vec::new()), |list| some(list.clone()))
}

/// `None`: nothing can match. An empty list: everything does.
fn operations(to: Option<&[Operation]>) -> Option<Vec<v1::Operation>> {
    let Some(to) = to else { return Some(Vec::new()) };
    some(to.iter().filter_map(operation).collect())
}

fn operation(operation: &Operation) -> Option<v1::Operation> {
    fn each<T, W>(list: Option<&Vec<T>>, wire: impl Fn(&T) -> W) -> Option<Vec<W>> {
        list.map_or(Some(Vec::new()), |list| some(list.iter().map(wire).collect()))
    }
    let wire = v1::Operation {
        ports: each(operation.ports.as_ref(), |port| (*port).into())?,
        methods: listed(operation.methods.as_ref())?,
        paths: each(operation.paths.as_ref(), |path| v1::PathMatch {
            kind: path_kind(path.kind).into(),
            value: path.value.clone(),
        })?,
        headers: each(operation.headers.as_ref(), header)?,
        grpc: each(operation.grpc.as_ref(), grpc_method)?,
    };
    (wire != v1::Operation::default()).then_some(wire)
}

pub(crate) fn path_kind(kind: PathMatchType) -> v1::path_match::Kind {
    use v1::path_match::Kind;
    match kind {
        PathMatchType::Exact => Kind::Exact,
        PathMatchType::PathPrefix => Kind::Prefix,
        PathMatchType::RegularExpression => Kind::Regex,
    }
}

fn header(header: &HeaderCondition) -> v1::ValueMatch {
    use v1::value_match::Kind;
    let kind = match header.kind {
        HeaderConditionType::Exact => Kind::Exact,
        HeaderConditionType::RegularExpression => Kind::Regex,
        HeaderConditionType::Present => Kind::Present,
    };
    v1::ValueMatch {
        name: header.name.to_ascii_lowercase(),
        kind: kind.into(),
        value: header.value.clone().unwrap_or_default(),
    }
}

pub(crate) fn default(action: DefaultAction) -> v1::Default {
    match action {
        DefaultAction::Allow => v1::Default::Allow,
        DefaultAction::Audit => v1::Default::Audit,
        DefaultAction::Deny => v1::Default::Deny,
    }
}

pub(crate) fn escaped_slashes(mode: EscapedSlashes) -> v1::access::EscapedSlashes {
    match mode {
        EscapedSlashes::Reject => v1::access::EscapedSlashes::Reject,
        EscapedSlashes::Keep => v1::access::EscapedSlashes::Keep,
        EscapedSlashes::Decode => v1::access::EscapedSlashes::Decode,
    }
}

/// `None`: it says neither how it is known nor where it comes from; checked where it is written, and never a way past the policies.
pub(crate) fn probe(probe: &Probe) -> Option<v1::Probe> {
    match &probe.path {
        Some(path) => Some(v1::Probe {
            port: probe.port.into(),
            method: probe.method.clone().unwrap_or_else(|| "GET".to_owned()),
            path: path.clone(),
            nodes: Vec::new(),
        }),
        None if !probe.nodes.is_empty() => {
            Some(v1::Probe { port: probe.port.into(), nodes: probe.nodes.clone(), ..v1::Probe::default() })
        }
        None => None,
    }
}
