//! A `TrafficPolicy` as a layer of the wire's messages.
//!
//! What is left out of a field that is there gets its default here, not at the proxy: what holds can then be read in one place, and a
//! proxy of another version does not mean something else by it.

use outrigger_api::v1;

use super::layers::Layer;
use crate::kinds::{
    Algorithm, Bulkhead, CircuitBreaker, Concurrency, Fault, HashKey, HealthCheck, Hedge, LoadBalancer,
    Retry, TrafficPolicy,
};
use crate::value::{GrpcCode, RetryOn, Span};

/// Tries wait this long at first, in milliseconds: a restart of a process is not waited for, a burst is spread.
pub(crate) const BACKOFF: u32 = 25;
/// And this long at most, ten times the first.
pub(crate) const MAX_BACKOFF: u32 = 250;
/// Retries may add a tenth to what a service in trouble gets: at the end of a chain of four it is then asked less than one and a half
/// times as often.
pub(crate) const BUDGET_PERCENT: u32 = 10;
/// Retries a second beside, so that a service with few requests has some.
pub(crate) const BUDGET_FLOOR: u32 = 1;
/// Bytes of a body that are kept: most calls' whole.
pub(crate) const MAX_BODY: u32 = 64 * 1024;

/// What one policy says.
pub(crate) fn layer(policy: &TrafficPolicy, origin: &str) -> Layer {
    let timeouts = policy.timeouts.clone().unwrap_or_default();
    let timeout = |span: Option<Span>| span.map(|span| (span.millis(), origin.to_owned()));
    Layer {
        request: timeout(timeouts.request),
        per_try: timeout(timeouts.per_try),
        idle: timeout(timeouts.idle),
        retry: policy.retry.as_ref().map(|retry| self::retry(retry, origin)),
        hedge: policy.hedge.as_ref().map(|hedge| self::hedge(hedge, origin)),
        fault: policy.fault.as_ref().map(|fault| self::fault(fault, origin)),
        load_balancer: policy.load_balancer.as_ref().map(|balancer| load_balancer(balancer, origin)),
        breaker: policy.circuit_breaker.as_ref().map(|breaker| self::breaker(breaker, origin)),
        bulkhead: policy.bulkhead.as_ref().map(|bulkhead| self::bulkhead(bulkhead, origin)),
        health_check: policy.health_check.as_ref().map(|check| health_check(check, origin)),
        concurrency: policy.concurrency.as_ref().map(|concurrency| self::concurrency(concurrency, origin)),
    }
}

fn millis(span: Option<Span>, default: u32) -> u32 {
    span.map_or(default, Span::millis)
}

fn retry(retry: &Retry, origin: &str) -> v1::Retry {
    let backoff = retry.backoff.clone().unwrap_or_default();
    let base = millis(backoff.base, BACKOFF);
    let budget = retry.budget.clone().unwrap_or_default();
    let mut wire = v1::Retry {
        attempts: retry.attempts,
        unsafe_methods: retry.unsafe_methods,
        backoff: base,
        max_backoff: millis(backoff.max, MAX_BACKOFF).max(base),
        budget_percent: budget.percent.unwrap_or(BUDGET_PERCENT),
        budget_floor: budget.min_per_second.unwrap_or(BUDGET_FLOOR),
        max_body: retry.max_body_bytes.unwrap_or(MAX_BODY),
        origin: origin.to_owned(),
        ..v1::Retry::default()
    };
    for on in retry.on.as_deref().unwrap_or(&RetryOn::DEFAULT) {
        match on {
            RetryOn::ServerError => wire.statuses.extend(500..600),
            RetryOn::GatewayError => wire.statuses.extend([502, 503, 504]),
            RetryOn::Status(status) => wire.statuses.push((*status).into()),
            RetryOn::Reset => wire.reset = true,
            RetryOn::PerTryTimeout => wire.per_try_timeout = true,
            RetryOn::Grpc(code) => wire.grpc_codes.push(code.code()),
            // A request that reached nobody is always sent elsewhere.
            RetryOn::ConnectFailure => {}
        }
    }
    for list in [&mut wire.statuses, &mut wire.grpc_codes] {
        list.sort_unstable();
        list.dedup();
    }
    wire
}

fn hedge(hedge: &Hedge, origin: &str) -> v1::Hedge {
    v1::Hedge { after: hedge.after.millis(), origin: origin.to_owned() }
}

fn fault(fault: &Fault, origin: &str) -> v1::Fault {
    let (delay, abort) = (fault.delay.as_ref(), fault.abort.as_ref());
    v1::Fault {
        delay: delay.map_or(0, |delay| delay.duration.millis()),
        delay_per_million: delay.map_or(0, |delay| delay.percent.per_million()),
        abort_status: abort.and_then(|abort| abort.status).map_or(0, u32::from),
        abort_grpc: abort.and_then(|abort| abort.grpc_status).map(GrpcCode::code),
        abort_per_million: abort.map_or(0, |abort| abort.percent.per_million()),
        origin: origin.to_owned(),
    }
}

fn load_balancer(balancer: &LoadBalancer, origin: &str) -> v1::LoadBalancer {
    use v1::load_balancer::Algorithm as Wire;
    let algorithm = match balancer.algorithm.unwrap_or(Algorithm::PeakEwma) {
        Algorithm::PeakEwma => Wire::PeakEwma,
        Algorithm::LeastRequest => Wire::LeastRequest,
        Algorithm::RoundRobin => Wire::RoundRobin,
        Algorithm::Random => Wire::Random,
        Algorithm::RingHash => Wire::RingHash,
        Algorithm::Maglev => Wire::Maglev,
    };
    v1::LoadBalancer {
        algorithm: algorithm.into(),
        hash: balancer.hash.iter().filter_map(hash_key).collect(),
        slow_start: millis(balancer.slow_start, 0),
        zone_percent: balancer.zone.as_ref().map_or(0, |zone| zone.min_healthy_percent),
        origin: origin.to_owned(),
    }
}

fn hash_key(key: &HashKey) -> Option<v1::HashKey> {
    use v1::hash_key::Key;
    let named = (key.header.clone().map(Key::Header))
        .or_else(|| key.cookie.clone().map(Key::Cookie))
        .or_else(|| key.query.clone().map(Key::Query))
        .or_else(|| (key.source == Some(true)).then_some(Key::Source(true)))?;
    Some(v1::HashKey { key: Some(named) })
}

/// What is left out is as without a policy: five failures in a row, a second aside at first and half a minute at most, never more
/// than half of the endpoints.
fn breaker(breaker: &CircuitBreaker, origin: &str) -> v1::Breaker {
    let rate = breaker.success_rate.as_ref();
    let ejection = breaker.ejection.clone().unwrap_or_default();
    let base = millis(ejection.base, 1000);
    v1::Breaker {
        consecutive: breaker.consecutive_failures.unwrap_or(5),
        success_percent: rate.map_or(0, |rate| rate.percent),
        window: millis(rate.and_then(|rate| rate.window), 10_000),
        min_requests: rate.and_then(|rate| rate.min_requests).unwrap_or(20),
        slow: millis(breaker.slow, 0),
        base_ejection: base,
        max_ejection: millis(ejection.max, 30_000).max(base),
        max_ejected_percent: ejection.max_percent.unwrap_or(50),
        origin: origin.to_owned(),
    }
}

fn bulkhead(bulkhead: &Bulkhead, origin: &str) -> v1::Bulkhead {
    v1::Bulkhead {
        connections: bulkhead.max_connections.unwrap_or(0),
        pending: bulkhead.max_pending.unwrap_or(0),
        requests: bulkhead.max_requests.unwrap_or(0),
        streams: bulkhead.max_streams.unwrap_or(0),
        origin: origin.to_owned(),
    }
}

fn health_check(check: &HealthCheck, origin: &str) -> v1::HealthCheck {
    v1::HealthCheck {
        path: check.path.clone().unwrap_or_default(),
        interval: millis(check.interval, 10_000),
        timeout: millis(check.timeout, 1000),
        healthy: check.healthy.unwrap_or(1),
        unhealthy: check.unhealthy.unwrap_or(3),
        origin: origin.to_owned(),
    }
}

fn concurrency(concurrency: &Concurrency, origin: &str) -> v1::Concurrency {
    v1::Concurrency {
        ports: Vec::new(),
        max_requests: concurrency.max_requests.unwrap_or(0),
        adaptive: concurrency.adaptive,
        origin: origin.to_owned(),
    }
}
