//! The rules of `HTTPRoute`s and `GRPCRoute`s as the wire's messages.
//!
//! References are looked up here. One that leads nowhere stays in its rule, with the reason: its share of the requests gets an error,
//! as the Gateway API asks for, and is not given to the others, who may not be able to bear it.

use outrigger_api::v1;

use super::access::path_kind;
use super::condition::ConditionReason;
use super::layers::Layer;
use super::services::Services;
use super::traffic::{BACKOFF, BUDGET_FLOOR, BUDGET_PERCENT, MAX_BACKOFF, MAX_BODY};
use crate::kind::Key;
use crate::kinds::{
    BackendObjectReference, BackendRef, GrpcFilter, GrpcMatch, GrpcMethodMatch, GrpcRule, HeaderMatch,
    HeaderModifier, HttpFilter, HttpHeader, HttpMatch, HttpRetry, HttpRule, MatchType, ParentReference,
    PathMatch, PathMatchType, PathModifier, PathModifierType, QueryParamMatch, RequestMirror,
    RequestRedirect, UrlRewrite,
};

/// A rule, and what it says of how its backends are called, which is the most specific word on it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rule {
    /// Without `traffic`.
    pub(crate) wire: v1::RouteRule,
    pub(crate) layer: Layer,
}

/// Reads the rules of one route.
pub(crate) struct Reader<'a> {
    pub(crate) services: &'a Services,
    pub(crate) route: &'a Key,
    pub(crate) parents: &'a [ParentReference],
    /// The route's key, for the origins.
    pub(crate) origin: &'a str,
    /// References that lead nowhere.
    pub(crate) faults: Vec<(ConditionReason, String)>,
}

impl Reader<'_> {
    pub(crate) fn http(&mut self, rules: &[HttpRule]) -> Vec<Rule> {
        if rules.is_empty() {
            return vec![everything()];
        }
        rules.iter().enumerate().map(|(at, rule)| self.http_rule(at, rule)).collect()
    }

    pub(crate) fn grpc(&mut self, rules: &[GrpcRule]) -> Vec<Rule> {
        if rules.is_empty() {
            return vec![everything()];
        }
        rules.iter().enumerate().map(|(at, rule)| self.grpc_rule(at, rule)).collect()
    }

    fn http_rule(&mut self, at: usize, rule: &HttpRule) -> Rule {
        let filters = self.filters(&rule.filters);
        let wire = v1::RouteRule {
            name: name(rule.name.as_ref(), at),
            matches: rule.matches.iter().map(http_match).collect(),
            filters,
            backends: rule.backend_refs.iter().map(|backend| self.weighted(backend)).collect(),
            traffic: None,
        };
        let timeout =
            |span: Option<crate::value::Span>| span.map(|span| (span.millis(), self.origin.to_owned()));
        let timeouts = rule.timeouts.clone().unwrap_or_default();
        let layer = Layer {
            request: timeout(timeouts.request),
            per_try: timeout(timeouts.backend_request),
            retry: rule.retry.as_ref().map(|retry| self::retry(retry, self.origin)),
            ..Layer::default()
        };
        Rule { wire, layer }
    }

    fn grpc_rule(&mut self, at: usize, rule: &GrpcRule) -> Rule {
        let wire = v1::RouteRule {
            name: name(rule.name.as_ref(), at),
            matches: rule.matches.iter().map(grpc_match).collect(),
            filters: self.filters(&rule.filters),
            backends: rule.backend_refs.iter().map(|backend| self.weighted(backend)).collect(),
            traffic: None,
        };
        Rule { wire, layer: Layer::default() }
    }

    fn weighted<F: Filter>(&mut self, backend: &BackendRef<F>) -> v1::Backend {
        let filters = self.filters(&backend.filters);
        v1::Backend { weight: backend.weight.unwrap_or(1), filters, ..self.backend(&backend.reference()) }
    }

    /// A backend of weight 1.
    fn backend(&mut self, reference: &BackendObjectReference) -> v1::Backend {
        let namespace = reference.namespace.as_deref().unwrap_or(&self.route.namespace);
        let service = format!("{}.{namespace}", reference.name);
        let fault = self.fault_of(reference, namespace, &service);
        if let Some(fault) = &fault
            && !self.faults.contains(fault)
        {
            self.faults.push(fault.clone());
        }
        v1::Backend {
            service,
            port: reference.port.unwrap_or(0).into(),
            weight: 1,
            filters: None,
            invalid: fault.map(|(_, text)| text).unwrap_or_default(),
        }
    }

    fn fault_of(
        &self,
        reference: &BackendObjectReference,
        namespace: &str,
        service: &str,
    ) -> Option<(ConditionReason, String)> {
        let group = reference.group.as_deref().unwrap_or_default();
        let kind = reference.kind.as_deref().unwrap_or("Service");
        if !matches!(group, "" | "core") || kind != "Service" {
            return Some((ConditionReason::InvalidKind, format!("{kind} {service} is not a Service")));
        }
        // Before the lookup: who may not refer to a service is not told whether there is one.
        if !self.services.permit(self.route, self.parents, namespace, &reference.name) {
            let message = format!(
                "no ReferenceGrant in namespace {namespace} lets {}s of namespace {} refer to service {service}",
                self.route.kind, self.route.namespace
            );
            return Some((ConditionReason::RefNotPermitted, message));
        }
        let Some(port) = reference.port else {
            return Some((
                ConditionReason::BackendNotFound,
                format!("the reference to {service} names no port"),
            ));
        };
        self.services.check(service, Some(port)).err().map(|fault| (ConditionReason::BackendNotFound, fault))
    }

    fn filters<F: Filter>(&mut self, filters: &[F]) -> Option<v1::Filters> {
        let mut wire = v1::Filters::default();
        for filter in filters {
            filter.write(self, &mut wire);
        }
        (wire != v1::Filters::default()).then_some(wire)
    }

    fn mirror(&mut self, mirror: &RequestMirror) -> v1::Mirror {
        let per_million = match (mirror.percent, &mirror.fraction) {
            (Some(percent), _) => u64::from(percent) * 10_000,
            (None, Some(fraction)) => {
                u64::from(fraction.numerator) * 1_000_000
                    / u64::from(fraction.denominator.unwrap_or(100).max(1))
            }
            (None, None) => 1_000_000,
        };
        v1::Mirror {
            backend: Some(self.backend(&mirror.backend_ref)),
            per_million: u32::try_from(per_million.min(1_000_000)).unwrap_or(1_000_000),
        }
    }
}

/// What a filter of either kind of route comes to. Kinds that are not supported are refused where they are written.
trait Filter {
    fn write(&self, reader: &mut Reader<'_>, wire: &mut v1::Filters);
}

impl Filter for HttpFilter {
    fn write(&self, reader: &mut Reader<'_>, wire: &mut v1::Filters) {
        if let Some(change) = &self.request_header_modifier {
            wire.request_headers = Some(header_change(change));
        }
        if let Some(change) = &self.response_header_modifier {
            wire.response_headers = Some(header_change(change));
        }
        if let Some(redirect) = &self.request_redirect {
            wire.redirect = Some(self::redirect(redirect));
        }
        if let Some(rewrite) = &self.url_rewrite {
            wire.rewrite = Some(self::rewrite(rewrite));
        }
        if let Some(mirror) = &self.request_mirror {
            let mirror = reader.mirror(mirror);
            wire.mirrors.push(mirror);
        }
    }
}

impl Filter for GrpcFilter {
    fn write(&self, reader: &mut Reader<'_>, wire: &mut v1::Filters) {
        if let Some(change) = &self.request_header_modifier {
            wire.request_headers = Some(header_change(change));
        }
        if let Some(change) = &self.response_header_modifier {
            wire.response_headers = Some(header_change(change));
        }
        if let Some(mirror) = &self.request_mirror {
            let mirror = reader.mirror(mirror);
            wire.mirrors.push(mirror);
        }
    }
}

fn name(name: Option<&String>, at: usize) -> String {
    name.cloned().unwrap_or_else(|| format!("rule {at}"))
}

/// A route without rules has one that matches everything and has no backend.
fn everything() -> Rule {
    Rule { wire: v1::RouteRule { name: name(None, 0), ..v1::RouteRule::default() }, layer: Layer::default() }
}

fn http_match(http: &HttpMatch) -> v1::RouteMatch {
    v1::RouteMatch {
        path: http.path.as_ref().and_then(path_match),
        headers: http.headers.iter().map(header_match).collect(),
        query: http.query_params.iter().map(query_match).collect(),
        method: http.method.map(|method| method.as_str().to_owned()).unwrap_or_default(),
        grpc: None,
    }
}

/// `None`: any path, which is what the prefix `/` says as well.
fn path_match(path: &PathMatch) -> Option<v1::PathMatch> {
    let kind = path.kind.unwrap_or_default();
    let value = path.value.as_deref().unwrap_or("/");
    (kind != PathMatchType::PathPrefix || value != "/")
        .then(|| v1::PathMatch { kind: path_kind(kind).into(), value: value.to_owned() })
}

fn value_kind(kind: Option<MatchType>) -> v1::value_match::Kind {
    match kind.unwrap_or_default() {
        MatchType::Exact => v1::value_match::Kind::Exact,
        MatchType::RegularExpression => v1::value_match::Kind::Regex,
    }
}

fn header_match(header: &HeaderMatch) -> v1::ValueMatch {
    v1::ValueMatch {
        name: header.name.to_ascii_lowercase(),
        kind: value_kind(header.kind).into(),
        value: header.value.clone(),
    }
}

fn query_match(query: &QueryParamMatch) -> v1::ValueMatch {
    v1::ValueMatch {
        name: query.name.clone(),
        kind: value_kind(query.kind).into(),
        value: query.value.clone(),
    }
}

fn grpc_match(grpc: &GrpcMatch) -> v1::RouteMatch {
    v1::RouteMatch {
        headers: grpc.headers.iter().map(header_match).collect(),
        grpc: grpc.method.as_ref().map(grpc_method),
        ..v1::RouteMatch::default()
    }
}

pub(crate) fn grpc_method(method: &GrpcMethodMatch) -> v1::GrpcMatch {
    v1::GrpcMatch {
        regex: method.kind == Some(MatchType::RegularExpression),
        service: method.service.clone().unwrap_or_default(),
        method: method.method.clone().unwrap_or_default(),
    }
}

fn header_change(change: &HeaderModifier) -> v1::HeaderChange {
    let field = |header: &HttpHeader| v1::HeaderField {
        name: header.name.to_ascii_lowercase(),
        value: header.value.clone(),
    };
    v1::HeaderChange {
        set: change.set.iter().map(field).collect(),
        add: change.add.iter().map(field).collect(),
        remove: change.remove.iter().map(|name| name.to_ascii_lowercase()).collect(),
    }
}

fn redirect(redirect: &RequestRedirect) -> v1::Redirect {
    v1::Redirect {
        scheme: redirect.scheme.clone().unwrap_or_default(),
        hostname: redirect.hostname.clone().unwrap_or_default(),
        path: redirect.path.as_ref().map(path_change),
        port: redirect.port.unwrap_or(0).into(),
        status: redirect.status_code.unwrap_or(302).into(),
    }
}

fn rewrite(rewrite: &UrlRewrite) -> v1::Rewrite {
    v1::Rewrite {
        hostname: rewrite.hostname.clone().unwrap_or_default(),
        path: rewrite.path.as_ref().map(path_change),
    }
}

fn path_change(path: &PathModifier) -> v1::PathChange {
    use v1::path_change::Change;
    let change = match path.kind {
        PathModifierType::ReplaceFullPath => {
            Change::Full(path.replace_full_path.clone().unwrap_or_else(|| "/".to_owned()))
        }
        PathModifierType::ReplacePrefixMatch => {
            Change::Prefix(path.replace_prefix_match.clone().unwrap_or_else(|| "/".to_owned()))
        }
    };
    v1::PathChange { change: Some(change) }
}

/// GEP-1731: beside the codes, a connection that ended without an answer and a try that took too long are tried again. Its budget is
/// the one that holds without a word.
fn retry(retry: &HttpRetry, origin: &str) -> v1::Retry {
    let backoff = retry.backoff.map_or(BACKOFF, crate::value::Span::millis);
    let mut statuses: Vec<u32> = retry.codes.iter().map(|code| (*code).into()).collect();
    statuses.sort_unstable();
    statuses.dedup();
    v1::Retry {
        attempts: retry.attempts.unwrap_or(1),
        statuses,
        reset: true,
        per_try_timeout: true,
        backoff,
        max_backoff: backoff.saturating_mul(10).max(MAX_BACKOFF),
        budget_percent: BUDGET_PERCENT,
        budget_floor: BUDGET_FLOOR,
        max_body: MAX_BODY,
        origin: origin.to_owned(),
        ..v1::Retry::default()
    }
}
