//! `TrafficPolicy`.

use super::{Problems, names};
use crate::bounds::{MAX_ATTEMPTS, MAX_BODY, MAX_COUNT, MAX_HASH_KEYS, MAX_RETRY_ON, MAX_ROW};
use crate::kinds::{
    Algorithm, CircuitBreaker, Fault, HashKey, HealthCheck, LoadBalancer, Retry, Timeouts, TrafficPolicy,
    TrafficTargetKind,
};
use crate::value::{RetryOn, Span};

pub(super) fn check(out: &mut Problems, namespace: &str, spec: &TrafficPolicy) {
    target(out, namespace, spec);
    let bare = TrafficPolicy {
        target_ref: spec.target_ref.clone(),
        timeouts: None,
        retry: None,
        hedge: None,
        fault: None,
        load_balancer: None,
        circuit_breaker: None,
        bulkhead: None,
        health_check: None,
        concurrency: None,
    };
    if *spec == bare {
        out.error("spec", "sets nothing beside `targetRef`");
    }
    if let Some(timeouts) = &spec.timeouts {
        check_timeouts(out, timeouts);
    }
    if let Some(retry) = &spec.retry {
        check_retry(out, retry);
    }
    if let Some(hedge) = &spec.hedge {
        not_zero(out, "spec.hedge.after", Some(hedge.after));
    }
    if let Some(fault) = &spec.fault {
        check_fault(out, fault);
    }
    if let Some(balancer) = &spec.load_balancer {
        check_balancer(out, balancer);
    }
    if let Some(breaker) = &spec.circuit_breaker {
        check_breaker(out, breaker);
    }
    if let Some(bulkhead) = &spec.bulkhead {
        let bounds = [
            ("maxConnections", bulkhead.max_connections),
            ("maxPending", bulkhead.max_pending),
            ("maxRequests", bulkhead.max_requests),
            ("maxStreams", bulkhead.max_streams),
        ];
        if bounds.iter().all(|(_, bound)| bound.is_none()) {
            out.error("spec.bulkhead", "sets no bound");
        }
        for (field, bound) in bounds {
            out.range(format!("spec.bulkhead.{field}"), bound, 1, MAX_COUNT);
        }
    }
    if let Some(health) = &spec.health_check {
        check_health(out, health);
    }
    if let Some(concurrency) = &spec.concurrency {
        if matches!(spec.target_ref.kind, TrafficTargetKind::HttpRoute | TrafficTargetKind::GrpcRoute) {
            let message = "is kept at the workloads' own sidecars, which know no route: target a Service";
            out.error("spec.concurrency", message);
        }
        if concurrency.max_requests.is_none() && !concurrency.adaptive {
            out.error(
                "spec.concurrency",
                "has neither `maxRequests` nor `adaptive: true`: it would bound nothing",
            );
        }
        out.range("spec.concurrency.maxRequests".to_owned(), concurrency.max_requests, 1, MAX_COUNT);
    }
}

fn target(out: &mut Problems, namespace: &str, spec: &TrafficPolicy) {
    use TrafficTargetKind::{GrpcRoute, HttpRoute, Mesh, Namespace, Service};
    let target = &spec.target_ref;
    let kind = target.kind;
    match (&target.name, kind) {
        (Some(name), Service) => out.take("spec.targetRef.name", names::service(name)),
        (Some(name), HttpRoute | GrpcRoute) => {
            if !names::is_subdomain(name) {
                out.error("spec.targetRef.name", names::not_a(name, "name", names::SUBDOMAIN));
            }
        }
        (None, Service | HttpRoute | GrpcRoute) => {
            out.error("spec.targetRef.name", "is missing: say which one");
        }
        (Some(_), Mesh | Namespace) => {
            out.error("spec.targetRef.name", format!("is for a Service or a route: there is one {kind:?}"));
        }
        (None, Mesh | Namespace) => {}
    }
    if let Some(group) = &target.group {
        let known: &[&str] = match kind {
            Mesh => &["outrigger.dev"],
            Namespace | Service => &["", "core"],
            HttpRoute | GrpcRoute => &["gateway.networking.k8s.io"],
        };
        if !known.contains(&group.as_str()) {
            let message = format!("is not the group of this kind: write \"{}\", or leave it out", known[0]);
            out.error("spec.targetRef.group", message);
        }
    }
    match (&target.namespace, kind) {
        (Some(_), Mesh) => {
            out.error("spec.targetRef.namespace", "is for a Service or a route: there is one Mesh");
        }
        (Some(other), _) if other != namespace => {
            let message = format!("is not the policy's own, `{namespace}`: write the policy there");
            out.error("spec.targetRef.namespace", message);
        }
        _ => {}
    }
    match (&target.section_name, kind) {
        (Some(_), Service) => out.error("spec.targetRef.sectionName", "is for a route's rule: use `port`"),
        (Some(_), Mesh | Namespace) => out.error("spec.targetRef.sectionName", "is for a route's rule"),
        (Some(name), HttpRoute | GrpcRoute) => {
            if !names::is_subdomain(name) {
                out.error("spec.targetRef.sectionName", names::not_a(name, "rule's name", names::SUBDOMAIN));
            }
        }
        (None, _) => {}
    }
    match (target.port, kind) {
        (Some(0), Service) => out.error("spec.targetRef.port", "0 is not 1 to 65535"),
        (Some(_), Mesh | Namespace | HttpRoute | GrpcRoute) => {
            out.error("spec.targetRef.port", "is for a Service");
        }
        _ => {}
    }
}

fn not_zero(out: &mut Problems, path: &str, span: Option<Span>) {
    if span.is_some_and(|span| span.millis() == 0) {
        out.error(path, "is 0: it must be longer");
    }
}

/// Of two that both end, the first must not be the longer one.
fn ordered(
    out: &mut Problems,
    path: &str,
    (name, one): (&str, Option<Span>),
    (other_name, other): (&str, Option<Span>),
) {
    if let (Some(one), Some(other)) = (one, other)
        && other.millis() > 0
        && one > other
    {
        out.error(format!("{path}.{name}"), format!("{one} is longer than `{other_name}`, {other}"));
    }
}

fn check_timeouts(out: &mut Problems, timeouts: &Timeouts) {
    if *timeouts == Timeouts::default() {
        out.error("spec.timeouts", "sets none of `request`, `perTry` and `idle`");
    }
    ordered(out, "spec.timeouts", ("perTry", timeouts.per_try), ("request", timeouts.request));
}

fn check_retry(out: &mut Problems, retry: &Retry) {
    out.range("spec.retry.attempts".to_owned(), Some(retry.attempts), 0, MAX_ATTEMPTS);
    if let Some(on) = &retry.on {
        if on.is_empty() {
            out.error(
                "spec.retry.on",
                "is empty: leave it out for the usual, or write `attempts: 0` for no retry",
            );
        }
        out.at_most("spec.retry.on", on, MAX_RETRY_ON);
        out.unique(on.iter().enumerate().map(|(number, one)| (format!("spec.retry.on[{number}]"), *one)));
        let ignored = |one: &&RetryOn| matches!(one, RetryOn::Status(status) if *status < 500);
        if let Some(one) = on.iter().find(ignored)
            && !matches!(one, RetryOn::Status(408 | 409 | 421 | 425 | 429))
        {
            out.warn(
                "spec.retry.on",
                format!("{one} says that the request is wrong: the same one will be so again"),
            );
        }
    }
    if let Some(backoff) = &retry.backoff {
        not_zero(out, "spec.retry.backoff.base", backoff.base);
        not_zero(out, "spec.retry.backoff.max", backoff.max);
        ordered(out, "spec.retry.backoff", ("base", backoff.base), ("max", backoff.max));
    }
    if let Some(budget) = &retry.budget {
        out.range("spec.retry.budget.percent".to_owned(), budget.percent, 0, 100);
        out.range("spec.retry.budget.minPerSecond".to_owned(), budget.min_per_second, 0, MAX_COUNT);
    }
    out.range("spec.retry.maxBodyBytes".to_owned(), retry.max_body_bytes, 0, MAX_BODY);
}

fn check_fault(out: &mut Problems, fault: &Fault) {
    if fault.delay.is_none() && fault.abort.is_none() {
        out.error("spec.fault", "has neither `delay` nor `abort`");
    }
    if let Some(delay) = &fault.delay {
        not_zero(out, "spec.fault.delay.duration", Some(delay.duration));
    }
    if let Some(abort) = &fault.abort {
        match (abort.status, abort.grpc_status) {
            (Some(_), Some(_)) => {
                out.error("spec.fault.abort", "has both `status` and `grpcStatus`: write one");
            }
            (None, None) => out.error("spec.fault.abort", "has neither `status` nor `grpcStatus`"),
            (None, Some(code)) if code.code() == 0 => {
                out.error("spec.fault.abort.grpcStatus", "`ok` is no error");
            }
            _ => {}
        }
        out.range("spec.fault.abort.status".to_owned(), abort.status, 200, 599);
    }
}

fn check_balancer(out: &mut Problems, balancer: &LoadBalancer) {
    if *balancer == LoadBalancer::default() {
        out.error("spec.loadBalancer", "sets nothing");
    }
    let hashes = matches!(balancer.algorithm, Some(Algorithm::RingHash | Algorithm::Maglev));
    if hashes && balancer.hash.is_empty() {
        out.error("spec.loadBalancer.hash", "is missing: say what of a request is hashed");
    }
    if !hashes && !balancer.hash.is_empty() {
        out.error("spec.loadBalancer.hash", "is for the algorithms RingHash and Maglev");
    }
    out.at_most("spec.loadBalancer.hash", &balancer.hash, MAX_HASH_KEYS);
    for (number, key) in balancer.hash.iter().enumerate() {
        check_hash(out, &format!("spec.loadBalancer.hash[{number}]"), key);
    }
    let percent = balancer.zone.as_ref().map(|zone| zone.min_healthy_percent);
    out.range("spec.loadBalancer.zone.minHealthyPercent".to_owned(), percent, 0, 100);
}

fn check_hash(out: &mut Problems, at: &str, key: &HashKey) {
    let set = [key.header.is_some(), key.cookie.is_some(), key.query.is_some(), key.source.is_some()];
    if set.into_iter().filter(|set| *set).count() != 1 {
        out.error(at, "must have one of `header`, `cookie`, `query` and `source`");
    }
    if let Some(header) = &key.header {
        out.take(format!("{at}.header"), names::header(header));
    }
    if let Some(cookie) = &key.cookie
        && names::header(cookie).is_err()
    {
        out.error(format!("{at}.cookie"), names::not_a(cookie, "cookie's name", "a word, as in `session`"));
    }
    if key.query.as_ref().is_some_and(String::is_empty) {
        out.error(format!("{at}.query"), "is empty: write the parameter's name");
    }
    if key.source == Some(false) {
        out.error(format!("{at}.source"), "is `true`, or left out");
    }
}

fn check_breaker(out: &mut Problems, breaker: &CircuitBreaker) {
    let at = "spec.circuitBreaker";
    if *breaker == CircuitBreaker::default() {
        out.error(at, "sets nothing");
    }
    out.range(format!("{at}.consecutiveFailures"), breaker.consecutive_failures, 0, MAX_COUNT);
    if let Some(rate) = &breaker.success_rate {
        out.range(format!("{at}.successRate.percent"), Some(rate.percent), 0, 100);
        not_zero(out, &format!("{at}.successRate.window"), rate.window);
        out.range(format!("{at}.successRate.minRequests"), rate.min_requests, 1, MAX_COUNT);
    }
    if let Some(ejection) = &breaker.ejection {
        not_zero(out, &format!("{at}.ejection.base"), ejection.base);
        not_zero(out, &format!("{at}.ejection.max"), ejection.max);
        ordered(out, &format!("{at}.ejection"), ("base", ejection.base), ("max", ejection.max));
        out.range(format!("{at}.ejection.maxPercent"), ejection.max_percent, 0, 100);
    }
}

fn check_health(out: &mut Problems, health: &HealthCheck) {
    let at = "spec.healthCheck";
    if let Some(path) = &health.path {
        let path = path.split_once('?').map_or(&**path, |(path, _)| path);
        out.take(format!("{at}.path"), names::path(path));
    }
    not_zero(out, &format!("{at}.interval"), health.interval);
    not_zero(out, &format!("{at}.timeout"), health.timeout);
    ordered(out, at, ("timeout", health.timeout), ("interval", health.interval));
    out.range(format!("{at}.healthy"), health.healthy, 1, MAX_ROW);
    out.range(format!("{at}.unhealthy"), health.unhealthy, 1, MAX_ROW);
}
