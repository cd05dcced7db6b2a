//! What an inbound request costs before it is forwarded: its path in one form, whether it may, and whether there is
//! room.
#![allow(missing_docs, reason = "the macros of criterion write functions without any")]

use std::{hint::black_box, sync::Arc, time::Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use outrigger_api::v1;
use outrigger_core::{
    access::{Access, Caller},
    concurrency::Concurrency,
    limit::Limits,
    path::{EscapedSlashes, normalise},
    request::{Request, View},
};

/// A workload with a dozen callers, each with a few paths.
fn policies() -> Vec<v1::AccessPolicy> {
    let path = |value: String| v1::PathMatch { kind: v1::path_match::Kind::Prefix.into(), value };
    let rule = |at: usize| v1::AccessRule {
        name: format!("rule {at}"),
        deny: at == 0,
        from: vec![v1::Source {
            identities: vec![format!("spiffe://outrigger.local/ns/shop/sa/caller-{at}")],
            ..Default::default()
        }],
        to: vec![v1::Operation {
            methods: vec!["GET".into(), "POST".into()],
            paths: vec![path(format!("/api/{at}")), path("/api/v1".into())],
            ..Default::default()
        }],
    };
    let limit = |per: v1::rate_limit::Per| v1::RateLimit {
        name: "limit".into(),
        per: per.into(),
        millirequests: 1_000_000_000_000,
        burst: 1_000,
        ..Default::default()
    };
    vec![v1::AccessPolicy {
        name: "shop/api".into(),
        rules: (0..12).map(rule).collect(),
        limits: vec![limit(v1::rate_limit::Per::Total), limit(v1::rate_limit::Per::Caller)],
        ..Default::default()
    }]
}

fn inbound(criterion: &mut Criterion) {
    let now = Instant::now();
    let wire = v1::Access { default: v1::Default::Deny.into(), policies: policies(), ..Default::default() };
    let access = Access::from_wire(&wire).expect("the policies are valid");
    let limits = Limits::from_wire(&wire.policies, EscapedSlashes::Reject, now).expect("so are the limits");
    let adaptive = v1::Concurrency { adaptive: true, ..Default::default() };
    let concurrency = Arc::new(Concurrency::from_wire(&adaptive, now).expect("and the bound"));
    let caller = Caller::new(Some("spiffe://outrigger.local/ns/shop/sa/caller-11"), [10, 0, 0, 1].into());
    let request = Request::new("GET", "/api/v1/orders/1234?page=2").with("accept", "*/*");

    criterion.bench_function("normalise", |bench| {
        bench.iter(|| normalise(black_box(request.target()), EscapedSlashes::Reject));
    });
    criterion.bench_function("access/12 rules", |bench| {
        bench.iter(|| access.request(black_box(&caller), 80, black_box(&request), request.path()).allowed);
    });
    criterion.bench_function("limits/total and per caller", |bench| {
        bench.iter(|| limits.check(black_box(&caller), 80, black_box(&request), request.path(), now).is_ok());
    });
    criterion.bench_function("concurrency/adaptive", |bench| {
        bench.iter(|| {
            if let Some(permit) = concurrency.enter(black_box(now)) {
                permit.done(now, true);
            }
        });
    });
}

criterion_group!(benches, inbound);
criterion_main!(benches);
