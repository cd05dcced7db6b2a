//! What the decisions of one request cost. All of it together must stay far below a microsecond, or the budget of the
//! hot path (ARCHITECTURE.md) is gone before a byte moves.
#![allow(missing_docs, reason = "the macros of criterion write functions without any")]

use std::{
    collections::BTreeMap,
    hint::black_box,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use outrigger_api::v1;
use outrigger_core::{
    balance::{Balancer, MAX_ENDPOINTS, Outcome},
    detect::detect,
    headers::{claims_identity, connection_tokens, is_hop_by_hop, is_mesh_internal, misspells_framing},
    live::Live,
    mark::H1Mark,
    model::{Endpoint, Health, Port, Protocol, Service},
    request::Request,
    resolve::{Knowledge, OutboundDefault, Ranges, resolve},
    route::{Found, Routes},
};

const PORT: u16 = 80;

/// What a browser or a client library sends along with a request, and what gateways add.
const NAMES: [&str; 12] = [
    "host",
    "user-agent",
    "accept",
    "accept-encoding",
    "content-type",
    "content-length",
    "authorization",
    "cookie",
    "x-forwarded-for",
    "x-request-id",
    "traceparent",
    "connection",
];

fn service(endpoints: u8) -> Arc<Service> {
    let endpoint = |number: u8| Endpoint {
        id: format!("pod-{number:02}").into(),
        address: IpAddr::from([10, 0, 0, number]),
        ports: BTreeMap::from([(PORT, 8080)]),
        weight: 1,
        health: Health::Healthy,
        identity: Some("spiffe://outrigger.local/ns/default/sa/app".into()),
        zone: "a".into(),
    };
    Arc::new(Service {
        name: "app.default".into(),
        ports: BTreeMap::from([(PORT, Port { name: "http".into(), protocol: Protocol::Detect })]),
        endpoints: (1..=endpoints).map(|number| Arc::new(endpoint(number))).collect(),
        source: "bench".into(),
        routes: Routes::default(),
        traffic: None,
        leads_to: Vec::new(),
    })
}

/// One request's share of balancing: the snapshot of the moment, a choice, its end.
fn balance(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("balance");
    for endpoints in [10, 32] {
        let service = service(endpoints);
        let mut random = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let live = Arc::new(Live::new(now));
        let mut balancer =
            Balancer::new("spiffe://outrigger.local/ns/default/sa/client", MAX_ENDPOINTS, live);
        group.bench_function(BenchmarkId::new("pick, start, finish", endpoints), |bencher| {
            bencher.iter(|| {
                balancer.update(&service);
                now += Duration::from_micros(100);
                let pick = balancer.pick(PORT, now, &mut random, &[], None);
                let picked = pick.endpoint().expect("there are endpoints");
                let token = balancer.start(&picked);
                let rtt = Duration::from_micros(u64::from(picked.address.port()));
                balancer.finish(token, Outcome::Success { rtt }, now);
                picked
            });
        });
    }
    group.finish();
}

fn resolution(criterion: &mut Criterion) {
    let mesh = ["10.0.0.0/8", "172.16.0.0/12", "fd00::/8"];
    let ranges = Ranges {
        mesh: Some(mesh.iter().map(|range| range.parse().expect("a range")).collect()),
        outbound: OutboundDefault::Allow,
    };
    let (inside, outside) = (IpAddr::from([10, 1, 2, 3]), IpAddr::from([203, 0, 113, 1]));
    let mut group = criterion.benchmark_group("resolve");
    group.bench_function("found", |bencher| {
        bencher.iter(|| resolve(black_box(inside), Knowledge::Found(1_u32), &ranges));
    });
    group.bench_function("outside the mesh", |bencher| {
        bencher.iter(|| resolve::<u32>(black_box(outside), Knowledge::NotFound, &ranges));
    });
    group.finish();
}

fn detection(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("detect");
    let first_bytes: [(&str, &[u8]); 4] = [
        ("HTTP/1.1", b"GET /api/v1/orders/42?expand=lines HTTP/1.1\r\nHost: orders\r\n\r\n"),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("opaque", b"\x00\x00\x00\x2a\x00\x12\x00\x00"),
    ];
    for (name, bytes) in first_bytes {
        group.bench_function(name, |bencher| bencher.iter(|| detect(black_box(bytes))));
    }
    group.finish();
}

/// The rules that every header of a request is held against.
fn headers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("headers");
    group.bench_function("twelve names of a request", |bencher| {
        bencher.iter(|| {
            let connection = connection_tokens([&b"keep-alive"[..]]).unwrap_or_default();
            let passes = |name: &&&str| {
                let name = name.as_bytes();
                !is_hop_by_hop(name, &connection)
                    && !is_mesh_internal(name)
                    && !claims_identity(name)
                    && !misspells_framing(name)
            };
            black_box(&NAMES).iter().filter(passes).count()
        });
    });
    group.bench_function("the mark of HTTP/1.1", |bencher| {
        bencher.iter(|| H1Mark::request(black_box(b"1.1; case=t")));
    });
    group.finish();
}

/// A request's way through a service's routes, of which each has two matches: by path, and by path and header.
fn routing(criterion: &mut Criterion) {
    use v1::{path_match::Kind as Path, value_match::Kind as Value};
    let matching = |number: usize, headers| v1::RouteMatch {
        path: Some(v1::PathMatch { kind: Path::Prefix.into(), value: format!("/api/v1/resource-{number}") }),
        headers,
        ..v1::RouteMatch::default()
    };
    let header =
        v1::ValueMatch { name: "x-version".into(), kind: Value::Exact.into(), value: "canary".into() };
    let mut group = criterion.benchmark_group("route");
    for number in [1, 1_000] {
        let rule = |number| v1::RouteRule {
            matches: vec![matching(number, Vec::new()), matching(number, vec![header.clone()])],
            ..v1::RouteRule::default()
        };
        let route = v1::Route {
            kind: "HTTPRoute".into(),
            rules: (0..number).map(rule).collect(),
            ..v1::Route::default()
        };
        let routes = Routes::from_wire(&[route], "default").expect("valid routes");
        let request = NAMES.iter().fold(
            Request::new("GET", &format!("/api/v1/resource-{}/42?expand=lines", number - 1)),
            |request, name| request.with(name, "value"),
        );
        group.bench_function(BenchmarkId::new("find", number), |bencher| {
            bencher.iter(|| matches!(routes.find(black_box(PORT), &request), Found::Rule(..)));
        });
    }
    group.finish();
}

criterion_group!(core, balance, resolution, detection, headers, routing);
criterion_main!(core);
