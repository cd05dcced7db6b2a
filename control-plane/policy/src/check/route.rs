//! `HTTPRoute` and `GRPCRoute`, but for their filters: the Gateway API's own rules, which a cluster's API server checks and nobody
//! else does elsewhere, and the fields that are not supported.

use super::{Problems, filters, names};
use crate::bounds::MAX_ATTEMPTS;
use crate::fields::refusal;
use crate::kinds::{
    BackendObjectReference, BackendRef, GrpcMethodMatch, GrpcRoute, HeaderMatch, HttpFilterType, HttpMatch,
    HttpRoute, HttpRule, MatchType, ParentReference, PathMatchType, Unsupported,
};

// The Gateway API's bounds.
const MAX_PARENTS: usize = 32;
const MAX_HOSTNAMES: usize = 16;
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 64;
/// Of all rules together.
const MAX_ALL_MATCHES: usize = 128;
pub(super) const MAX_ENTRIES: usize = 16;
const MAX_WEIGHT: u32 = 1_000_000;
const MAX_QUERY_VALUE: usize = 1024;

pub(super) fn http(out: &mut Problems, route: &HttpRoute) {
    common(out, &route.parent_refs, route.use_default_gateways.as_ref(), &route.hostnames);
    out.at_most("spec.rules", &route.rules, MAX_RULES);
    let matches: usize = route.rules.iter().map(|rule| rule.matches.len()).sum();
    rules(out, matches, route.rules.iter().map(|rule| rule.name.as_deref()));
    for (number, rule) in route.rules.iter().enumerate() {
        http_rule(out, &format!("spec.rules[{number}]"), rule);
    }
}

pub(super) fn grpc(out: &mut Problems, route: &GrpcRoute) {
    common(out, &route.parent_refs, route.use_default_gateways.as_ref(), &route.hostnames);
    out.at_most("spec.rules", &route.rules, MAX_RULES);
    let matches: usize = route.rules.iter().map(|rule| rule.matches.len()).sum();
    rules(out, matches, route.rules.iter().map(|rule| rule.name.as_deref()));
    for (number, rule) in route.rules.iter().enumerate() {
        let at = format!("spec.rules[{number}]");
        refused(out, &at, "sessionPersistence", rule.session_persistence.as_ref());
        out.at_most(&format!("{at}.matches"), &rule.matches, MAX_MATCHES);
        for (index, one) in rule.matches.iter().enumerate() {
            let at = format!("{at}.matches[{index}]");
            if let Some(method) = &one.method {
                let kind = method.kind.unwrap_or_default();
                out.take(format!("{at}.method"), grpc_method(kind, method));
            }
            headers(out, &format!("{at}.headers"), &one.headers);
        }
        filters::check(out, &format!("{at}.filters"), &rule.filters, &[]);
        out.at_most(&format!("{at}.backendRefs"), &rule.backend_refs, MAX_ENTRIES);
        for (index, backend) in rule.backend_refs.iter().enumerate() {
            let at = format!("{at}.backendRefs[{index}]");
            weighted(out, &at, backend);
            filters::check(out, &format!("{at}.filters"), &backend.filters, &[]);
        }
    }
}

/// A gRPC method, also in an `AccessPolicy`.
pub(super) fn grpc_method(kind: MatchType, method: &GrpcMethodMatch) -> Result<(), String> {
    let word = |text: &str| {
        let starts = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        starts && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    if method.service.is_none() && method.method.is_none() {
        return Err("has neither `service` nor `method`".to_owned());
    }
    if kind == MatchType::RegularExpression {
        return method.service.iter().chain(&method.method).try_for_each(|text| names::expression(text));
    }
    if let Some(service) = &method.service
        && !service.strip_prefix('.').unwrap_or(service).split('.').all(word)
    {
        return Err(names::not_a(service, "gRPC service", "package.Service"));
    }
    match &method.method {
        Some(name) if !word(name) => Err(names::not_a(name, "gRPC method", "a word, as in `Charge`")),
        _ => Ok(()),
    }
}

/// What is there and not supported.
fn refused(out: &mut Problems, at: &str, field: &str, value: Option<&Unsupported>) {
    if value.is_some() {
        out.error(format!("{at}.{field}"), format!("is not supported: {}", refusal(field)));
    }
}

fn common(
    out: &mut Problems,
    parents: &[ParentReference],
    use_default_gateways: Option<&Unsupported>,
    hostnames: &[String],
) {
    refused(out, "spec", "useDefaultGateways", use_default_gateways);
    out.at_most("spec.parentRefs", parents, MAX_PARENTS);
    if parents.is_empty() {
        out.error(
            "spec.parentRefs",
            "is missing: name the Service, as in {group: \"\", kind: Service, name: orders}",
        );
    } else if !parents.iter().any(ParentReference::is_service) {
        let message = "names no Service: write {group: \"\", kind: Service, name: ...}, without which a Gateway is meant";
        out.error("spec.parentRefs", message);
    }
    for (number, parent) in parents.iter().enumerate() {
        let at = format!("spec.parentRefs[{number}]");
        if !parent.is_service() {
            out.warn(at, "is no Service: it is left to the controller that it is for");
            continue;
        }
        out.take(format!("{at}.name"), names::service(&parent.name));
        if let Some(namespace) = &parent.namespace {
            out.take(format!("{at}.namespace"), names::namespace(namespace));
        }
        if parent.port == Some(0) {
            out.error(format!("{at}.port"), "0 is not 1 to 65535");
        }
        if let Some(section) = &parent.section_name
            && !names::is_subdomain(section)
        {
            out.error(format!("{at}.sectionName"), names::not_a(section, "port's name", names::SUBDOMAIN));
        }
        let which = |parent: &ParentReference| {
            (parent.namespace.clone(), parent.name.clone(), parent.port, parent.section_name.clone())
        };
        // The list is bounded above, but for the fault that it is too long.
        if parents
            .iter()
            .take(number.min(MAX_PARENTS))
            .any(|other| other.is_service() && which(other) == which(parent))
        {
            out.error(at, "is there twice: one must go");
        }
    }
    out.at_most("spec.hostnames", hostnames, MAX_HOSTNAMES);
    if !hostnames.is_empty() {
        let message =
            "says nothing for a Service (GEP-1294): match the header `host` where hosts must be told apart";
        out.warn("spec.hostnames", message);
    }
    for (number, hostname) in hostnames.iter().enumerate() {
        let name = hostname.strip_prefix("*.").unwrap_or(hostname);
        out.take(format!("spec.hostnames[{number}]"), names::host(name));
    }
}

fn rules<'a>(out: &mut Problems, matches: usize, rules: impl Iterator<Item = Option<&'a str>>) {
    if matches > MAX_ALL_MATCHES {
        out.error(
            "spec.rules",
            format!("have {matches} matches: at most {MAX_ALL_MATCHES} are taken in one route"),
        );
    }
    let mut named = Vec::new();
    for (number, name) in rules.enumerate() {
        let Some(name) = name else { continue };
        let path = format!("spec.rules[{number}].name");
        if !names::is_subdomain(name) {
            out.error(path.clone(), names::not_a(name, "rule's name", names::SUBDOMAIN));
        }
        named.push((path, name));
    }
    out.unique(named.into_iter());
}

fn http_rule(out: &mut Problems, at: &str, rule: &HttpRule) {
    refused(out, at, "sessionPersistence", rule.session_persistence.as_ref());
    out.at_most(&format!("{at}.matches"), &rule.matches, MAX_MATCHES);
    for (index, one) in rule.matches.iter().enumerate() {
        http_match(out, &format!("{at}.matches[{index}]"), one);
    }
    filters::check(out, &format!("{at}.filters"), &rule.filters, &rule.matches);
    let redirect = rule.filters.iter().position(|filter| filter.kind == HttpFilterType::RequestRedirect);
    if let Some(index) = redirect
        && !rule.backend_refs.is_empty()
    {
        let message = "answers the client, so that `backendRefs` get nothing: one of them must go";
        out.error(format!("{at}.filters[{index}]"), message);
    }
    out.at_most(&format!("{at}.backendRefs"), &rule.backend_refs, MAX_ENTRIES);
    for (index, backend) in rule.backend_refs.iter().enumerate() {
        let at = format!("{at}.backendRefs[{index}]");
        weighted(out, &at, backend);
        filters::check(out, &format!("{at}.filters"), &backend.filters, &rule.matches);
        for (number, filter) in backend.filters.iter().enumerate() {
            if filter.kind == HttpFilterType::RequestRedirect {
                out.error(
                    format!("{at}.filters[{number}]"),
                    "is not for one backend: put it into the rule's `filters`",
                );
            }
        }
    }
    if rule.backend_refs.is_empty() && redirect.is_none() {
        out.warn(at, "has no `backendRefs`: its requests are answered with 500");
    }
    if let Some(timeouts) = &rule.timeouts
        && let (Some(request), Some(backend)) = (timeouts.request, timeouts.backend_request)
        && request.millis() > 0
        && backend > request
    {
        let message = format!("{backend} is longer than `request`, {request}");
        out.error(format!("{at}.timeouts.backendRequest"), message);
    }
    if let Some(retry) = &rule.retry {
        out.range(format!("{at}.retry.attempts"), retry.attempts, 0, MAX_ATTEMPTS);
        for (index, code) in retry.codes.iter().enumerate() {
            out.range(format!("{at}.retry.codes[{index}]"), Some(*code), 400, 599);
        }
    }
}

fn http_match(out: &mut Problems, at: &str, one: &HttpMatch) {
    if let Some(path) = &one.path
        && let Some(value) = &path.value
    {
        let result = match path.kind.unwrap_or_default() {
            PathMatchType::RegularExpression => names::expression(value),
            PathMatchType::Exact | PathMatchType::PathPrefix => names::path(value),
        };
        out.take(format!("{at}.path.value"), result);
    }
    headers(out, &format!("{at}.headers"), &one.headers);
    let at = format!("{at}.queryParams");
    out.at_most(&at, &one.query_params, MAX_ENTRIES);
    for (index, param) in one.query_params.iter().enumerate() {
        let at = format!("{at}[{index}]");
        out.take(format!("{at}.name"), names::header(&param.name));
        let result = match param.kind.unwrap_or_default() {
            MatchType::RegularExpression => names::expression(&param.value),
            MatchType::Exact if param.value.is_empty() => Err("is empty: write the value".to_owned()),
            MatchType::Exact if param.value.len() > MAX_QUERY_VALUE => {
                Err(format!("has {} bytes: at most {MAX_QUERY_VALUE} are taken", param.value.len()))
            }
            MatchType::Exact => Ok(()),
        };
        out.take(format!("{at}.value"), result);
    }
}

fn headers(out: &mut Problems, at: &str, headers: &[HeaderMatch]) {
    out.at_most(at, headers, MAX_ENTRIES);
    for (index, header) in headers.iter().enumerate() {
        let at = format!("{at}[{index}]");
        out.take(format!("{at}.name"), names::header(&header.name));
        let result = match header.kind.unwrap_or_default() {
            MatchType::RegularExpression => names::expression(&header.value),
            MatchType::Exact if header.value.is_empty() => Err("is empty: write the value".to_owned()),
            MatchType::Exact => names::header_value(&header.value),
        };
        out.take(format!("{at}.value"), result);
    }
}

fn weighted<F>(out: &mut Problems, at: &str, backend: &BackendRef<F>) {
    reference(out, at, &backend.reference());
    out.range(format!("{at}.weight"), backend.weight, 0, MAX_WEIGHT);
}

pub(super) fn reference(out: &mut Problems, at: &str, reference: &BackendObjectReference) {
    let group = reference.group.as_deref().unwrap_or_default();
    let kind = reference.kind.as_deref().unwrap_or("Service");
    // What a reference of another kind comes to is the Gateway API's to say: its requests get 500, the route stays.
    if !matches!(group, "" | "core") || kind != "Service" {
        out.warn(at, "is no Service, the only kind that is known: its share of the requests gets 500");
        return;
    }
    out.take(format!("{at}.name"), names::service(&reference.name));
    if let Some(namespace) = &reference.namespace {
        out.take(format!("{at}.namespace"), names::namespace(namespace));
    }
    match reference.port {
        None => out.error(format!("{at}.port"), "is missing: a Service is called at a port"),
        Some(0) => out.error(format!("{at}.port"), "0 is not 1 to 65535"),
        Some(_) => {}
    }
}
