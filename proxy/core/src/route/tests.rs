mod naive;

use v1::{path_match::Kind as Path, value_match::Kind as Value};

use super::*;
use crate::request::Request;

pub(super) fn path(kind: Path, value: &str) -> v1::PathMatch {
    v1::PathMatch { kind: kind.into(), value: value.into() }
}

pub(super) fn value(name: &str, kind: Value, value: &str) -> v1::ValueMatch {
    v1::ValueMatch { name: name.into(), kind: kind.into(), value: value.into() }
}

fn exact(tests: &[(&str, &str)]) -> Vec<v1::ValueMatch> {
    tests.iter().map(|(name, text)| value(name, Value::Exact, text)).collect()
}

fn on_path(kind: Path, text: &str) -> v1::RouteMatch {
    v1::RouteMatch { path: Some(path(kind, text)), ..v1::RouteMatch::default() }
}

fn on_call(service: &str, method: &str) -> v1::RouteMatch {
    let grpc = v1::GrpcMatch { regex: false, service: service.into(), method: method.into() };
    v1::RouteMatch { grpc: Some(grpc), ..v1::RouteMatch::default() }
}

/// A route `default/r`, with one rule for each list of matches.
fn route(kind: &str, rules: Vec<Vec<v1::RouteMatch>>) -> v1::Route {
    let rule = |matches| v1::RouteRule { matches, ..v1::RouteRule::default() };
    v1::Route {
        kind: kind.into(),
        name: "default/r".into(),
        rules: rules.into_iter().map(rule).collect(),
        ..v1::Route::default()
    }
}

fn routes(wire: &[v1::Route]) -> Routes {
    Routes::from_wire(wire, "default").unwrap()
}

/// The number of the rule that takes a request, in the one route that there is.
fn taken(routes: &Routes, request: &Request) -> Option<usize> {
    match routes.find(80, request) {
        Found::Rule(rule, _) => rule.name.rsplit_once(' ').unwrap().1.parse().ok(),
        Found::NoMatch => None,
        Found::NoRoutes => panic!("there is a route"),
    }
}

fn get(target: &str) -> Request {
    Request::new("GET", target)
}

fn call(path: &str) -> Request {
    Request::new("POST", path).with("content-type", "application/grpc")
}

/// What the Gateway API's own suite expects (conformance/tests/httproute-path-match-order).
#[test]
fn conformance_path_match_order() {
    let routes = routes(&[route(
        "HTTPRoute",
        vec![
            vec![on_path(Path::Exact, "/match")],
            vec![on_path(Path::Exact, "/match/exact")],
            vec![on_path(Path::Exact, "/match/exact/one")],
            vec![on_path(Path::Prefix, "/match/")],
            vec![on_path(Path::Prefix, "/match/prefix/")],
            vec![on_path(Path::Prefix, "/match/prefix/one")],
        ],
    )]);
    for (target, expected) in [
        ("/match/exact/one", Some(2)),
        ("/match/exact", Some(1)),
        ("/match", Some(0)),
        ("/match/prefix/one/any", Some(5)),
        ("/match/prefix/any", Some(4)),
        ("/match/any", Some(3)),
        ("/match?query", Some(0)),
        ("/matches", None),
        ("/", None),
    ] {
        assert_eq!(taken(&routes, &get(target)), expected, "{target}");
    }
}

/// conformance/tests/httproute-method-matching.
#[test]
fn conformance_method_matching() {
    let method = |wire: v1::RouteMatch, method: &str| v1::RouteMatch { method: method.into(), ..wire };
    let version = |wire: v1::RouteMatch, version: &str| v1::RouteMatch {
        headers: exact(&[("version", version)]),
        ..wire
    };
    let (any, prefix) = (v1::RouteMatch::default, |text| on_path(Path::Prefix, text));
    let routes = routes(&[route(
        "HTTPRoute",
        vec![
            vec![method(any(), "POST")],
            vec![method(any(), "GET")],
            vec![method(prefix("/path1"), "GET")],
            vec![method(version(any(), "one"), "PUT")],
            vec![method(version(prefix("/path2"), "two"), "POST")],
            vec![method(prefix("/path3"), "PATCH"), method(version(prefix("/path4"), "three"), "DELETE")],
            vec![prefix("/path5")],
            vec![method(any(), "PATCH")],
            vec![version(any(), "four")],
        ],
    )]);
    for (method, target, version, expected) in [
        ("POST", "/", "", Some(0)),
        ("GET", "/", "", Some(1)),
        ("HEAD", "/", "", None),
        ("GET", "/path1", "", Some(2)),
        ("PUT", "/", "one", Some(3)),
        ("POST", "/path2", "two", Some(4)),
        ("PATCH", "/path3", "", Some(5)),
        ("DELETE", "/path4", "three", Some(5)),
        ("PUT", "/", "", None),
        ("DELETE", "/path4", "", None),
        ("PATCH", "/path5", "", Some(6)),
        ("PATCH", "/", "four", Some(7)),
        // Methods are case-sensitive.
        ("get", "/", "", None),
    ] {
        let request = Request::new(method, target).with("version", version);
        assert_eq!(taken(&routes, &request), expected, "{method} {target} {version}");
    }
}

/// conformance/tests/httproute-header-matching.
#[test]
fn conformance_header_matching() {
    let on = |tests: &[(&str, &str)]| v1::RouteMatch { headers: exact(tests), ..v1::RouteMatch::default() };
    let routes = routes(&[route(
        "HTTPRoute",
        vec![
            vec![on(&[("version", "one")])],
            vec![on(&[("version", "two")])],
            vec![on(&[("Version", "two"), ("color", "orange")])],
            vec![on(&[("color", "blue")]), on(&[("color", "green")])],
            vec![on(&[("color", "red")]), on(&[("color", "yellow")])],
        ],
    )]);
    for (headers, expected) in [
        (&[("Version", "one")][..], Some(0)),
        (&[("Version", "two")], Some(1)),
        (&[("Version", "two"), ("Color", "orange")], Some(2)),
        (&[("Version", "two"), ("Color", "blue")], Some(1)),
        (&[("Color", "orange")], None),
        (&[("Some-Other-Header", "one")], None),
        (&[("Color", "blue")], Some(3)),
        (&[("Color", "green")], Some(3)),
        (&[("Color", "red")], Some(4)),
        (&[("Color", "yellow")], Some(4)),
        (&[("Color", "purple")], None),
    ] {
        let request = headers.iter().fold(get("/"), |request, (name, text)| request.with(name, *text));
        assert_eq!(taken(&routes, &request), expected, "{headers:?}");
    }
}

/// conformance/tests/httproute-query-param-matching.
#[test]
fn conformance_query_param_matching() {
    let on = |wire: v1::RouteMatch, tests: &[(&str, &str)]| v1::RouteMatch { query: exact(tests), ..wire };
    let version = |version: &str| v1::RouteMatch {
        headers: exact(&[("version", version)]),
        ..v1::RouteMatch::default()
    };
    let (any, prefix) = (v1::RouteMatch::default, |text| on_path(Path::Prefix, text));
    let routes = routes(&[route(
        "HTTPRoute",
        vec![
            vec![on(any(), &[("animal", "whale")])],
            vec![on(any(), &[("animal", "dolphin")])],
            vec![on(any(), &[("animal", "dolphin"), ("color", "blue")]), on(any(), &[("ANIMAL", "Whale")])],
            vec![on(prefix("/path1"), &[("animal", "whale")])],
            vec![on(version("one"), &[("animal", "whale")])],
            vec![prefix("/path5")],
            vec![on(any(), &[("animal", "hydra")])],
            vec![version("four")],
        ],
    )]);
    for (target, version, expected) in [
        ("/?animal=whale", "", Some(0)),
        ("/?animal=dolphin", "", Some(1)),
        ("/?animal=dolphin&color=blue", "", Some(2)),
        ("/?ANIMAL=Whale", "", Some(2)),
        ("/?animal=whale&otherparam=irrelevant", "", Some(0)),
        ("/?animal=dolphin&color=yellow", "", Some(1)),
        ("/?color=blue", "", None),
        ("/?animal=dog", "", None),
        ("/?animal=whaledolphin", "", None),
        ("/", "", None),
        ("/path1?animal=whale", "", Some(3)),
        ("/?animal=whale", "one", Some(4)),
        ("/path5?animal=hydra", "", Some(5)),
        ("/?animal=hydra", "four", Some(7)),
        // The first value counts, and escapes are undone.
        ("/?animal=whale&animal=dolphin", "", Some(0)),
        ("/?&=&animal=%77h%61le", "", Some(0)),
        ("/?%61nimal=whale", "", Some(0)),
        ("/?animal=whale%", "", None),
        ("/?animal=%zzwhale", "", None),
        ("/?animal", "", None),
    ] {
        assert_eq!(taken(&routes, &get(target).with("version", version)), expected, "{target} {version}");
    }
}

/// conformance/tests/httproute-matching-across-routes and grpcroute-exact-method-matching.
#[test]
fn conformance_across_routes_and_grpc() {
    let version = |version: &str| v1::RouteMatch {
        headers: exact(&[("version", version)]),
        ..v1::RouteMatch::default()
    };
    let first = route("HTTPRoute", vec![vec![on_path(Path::Prefix, "/"), version("one")]]);
    let second = v1::Route {
        name: "default/s".into(),
        ..route("HTTPRoute", vec![vec![on_path(Path::Prefix, "/v2"), version("two")]])
    };
    let both = routes(&[first, second]);
    for (target, version, expected) in [
        ("/", "", "HTTPRoute default/r, rule 0"),
        ("/example", "one", "HTTPRoute default/r, rule 0"),
        ("/v2", "", "HTTPRoute default/s, rule 0"),
        ("/v2/example", "", "HTTPRoute default/s, rule 0"),
        ("/", "two", "HTTPRoute default/s, rule 0"),
    ] {
        let request = get(target).with("version", version);
        let Found::Rule(rule, _) = both.find(80, &request) else { panic!("{target}") };
        assert_eq!(&*rule.name, expected, "{target} {version}");
    }

    let echo = "gateway_api_conformance.echo_basic.grpcecho.GrpcEcho";
    let calls =
        routes(&[route("GRPCRoute", vec![vec![on_call(echo, "Echo")], vec![on_call(echo, "EchoTwo")]])]);
    for (method, expected) in [("Echo", Some(0)), ("EchoTwo", Some(1)), ("EchoThree", None)] {
        assert_eq!(taken(&calls, &call(&format!("/{echo}/{method}"))), expected);
    }
}

#[test]
fn a_grpc_route_takes_calls_only() {
    let routes = routes(&[route("GRPCRoute", vec![vec![on_call("", "M")], vec![]])]);
    assert_eq!(taken(&routes, &call("/s.S/M")), Some(0));
    assert_eq!(taken(&routes, &call("/s.S/N")), Some(1));
    assert_eq!(taken(&routes, &call("/s.S")), None);
    assert_eq!(taken(&routes, &Request::new("POST", "/s.S/M")), None);
    assert_eq!(taken(&routes, &get("/s.S/M").with("content-type", "application/grpc")), None);
}

#[test]
fn a_header_is_one_value_whatever_lines_it_came_in() {
    let on = |name, text| v1::RouteMatch {
        headers: vec![value(name, Value::Regex, text)],
        ..v1::RouteMatch::default()
    };
    let wire = vec![
        vec![on("x-env", "test, canary")],
        vec![on("cookie", "a=1; b=2; c=3")],
        vec![on("host", "a.b(:80)?")],
    ];
    let routes = routes(&[route("HTTPRoute", wire)]);
    let with = |values: &[(&str, &str)]| {
        values.iter().fold(get("/"), |request, (name, text)| request.with(name, *text))
    };
    assert_eq!(taken(&routes, &with(&[("x-env", "test, canary")])), Some(0));
    assert_eq!(taken(&routes, &with(&[("x-env", "test"), ("x-env", "canary")])), Some(0));
    assert_eq!(taken(&routes, &with(&[("x-env", "test"), ("x-env", "canary"), ("x-env", "")])), None);
    assert_eq!(taken(&routes, &with(&[("cookie", "a=1"), ("cookie", "b=2"), ("cookie", "c=3")])), Some(1));
    let named = |authority: &str| Request { authority: Some(authority.into()), ..get("/") };
    assert_eq!(taken(&routes, &named("a.b:80")), Some(2));
    assert_eq!(taken(&routes, &named("a.b:81").with("host", "a.b")), None);
    assert_eq!(taken(&routes, &get("/").with("host", "a.b")), Some(2));
}

#[test]
fn of_tests_with_one_name_the_first_counts() {
    let headers = exact(&[("X", "1"), ("x", "2")]);
    let query = exact(&[("q", "1"), ("q", "2"), ("Q", "3")]);
    let twice = v1::RouteMatch { headers, query, ..v1::RouteMatch::default() };
    let once = v1::RouteMatch { headers: exact(&[("x", "1")]), ..v1::RouteMatch::default() };
    let two = v1::RouteMatch { headers: exact(&[("x", "1"), ("y", "1")]), ..v1::RouteMatch::default() };
    let routes = routes(&[route("HTTPRoute", vec![vec![once], vec![twice], vec![two]])]);
    let request = |target| get(target).with("x", "1");
    assert_eq!(taken(&routes, &request("/")), Some(0));
    assert_eq!(taken(&routes, &request("/?q=1&Q=3")), Some(1));
    // Two headers and no parameter before one header and two parameters: what is ignored does not count.
    assert_eq!(taken(&routes, &request("/?q=1&Q=3").with("y", "1")), Some(2));
}

#[test]
fn routes_hold_at_their_ports_for_their_clients() {
    let at = |name: &str, client: &str, ports: &[u32]| v1::Route {
        name: name.into(),
        client_namespace: client.into(),
        ports: ports.to_vec(),
        ..route("HTTPRoute", vec![vec![]])
    };
    let found = |wire: &[v1::Route], namespace: &str, port| match Routes::from_wire(wire, namespace)
        .unwrap()
        .find(port, &get("/"))
    {
        Found::NoRoutes => "none".to_owned(),
        Found::NoMatch => "no match".to_owned(),
        Found::Rule(rule, _) => rule.name.to_string(),
    };
    let one = [at("p/80", "", &[80])];
    assert_eq!(found(&one, "c", 80), "HTTPRoute p/80, rule 0");
    assert_eq!(found(&one, "c", 81), "none");
    assert_eq!(found(&[], "c", 80), "none");
    let wire = [at("p/all", "", &[]), at("c/81", "c", &[81]), at("d/all", "d", &[])];
    for (namespace, port, expected) in [
        ("c", 80, "HTTPRoute p/all, rule 0"),
        ("c", 81, "HTTPRoute c/81, rule 0"),
        ("d", 80, "HTTPRoute d/all, rule 0"),
        ("d", 81, "HTTPRoute d/all, rule 0"),
        ("e", 81, "HTTPRoute p/all, rule 0"),
        ("", 81, "HTTPRoute p/all, rule 0"),
    ] {
        assert_eq!(found(&wire, namespace, port), expected, "{namespace} {port}");
    }
    let empty = [v1::Route { rules: Vec::new(), ..at("p/empty", "", &[]) }];
    assert_eq!(found(&empty, "c", 80), "no match");
}

#[test]
fn the_oldest_routes_kind_holds() {
    let http = v1::Route { created: 2, ..route("HTTPRoute", vec![vec![]]) };
    let grpc = v1::Route { created: 1, ..route("GRPCRoute", vec![vec![]]) };
    for wire in [[http.clone(), grpc.clone()], [grpc.clone(), http.clone()]] {
        assert_eq!(taken(&routes(&wire), &get("/")), None);
        assert_eq!(taken(&routes(&wire), &call("/a.A/B")), Some(0));
    }
    let http = v1::Route { created: 0, ..http };
    for wire in [[http.clone(), grpc.clone()], [grpc, http]] {
        assert_eq!(taken(&routes(&wire), &get("/")), Some(0));
    }
}

#[test]
fn what_was_matched_is_known() {
    let routes = routes(&[route(
        "HTTPRoute",
        vec![vec![on_path(Path::Prefix, "/foo/")], vec![on_path(Path::Exact, "/exact")], vec![]],
    )]);
    for (target, expected) in
        [("/foo/bar", Some(4)), ("/foo?x", Some(4)), ("/exact", None), ("/other", Some(0)), ("*", Some(0))]
    {
        let Found::Rule(_, matched) = routes.find(80, &get(target)) else { panic!("{target}") };
        assert_eq!(matched.prefix, expected, "{target}");
    }
}

fn backend(service: &str, weight: u32) -> v1::Backend {
    v1::Backend { service: service.into(), port: 80, weight, ..v1::Backend::default() }
}

#[test]
fn backends_are_drawn_by_weight() {
    let rule = |weights: &[u32]| {
        let backends = weights.iter().map(|weight| backend("a.b", *weight)).collect();
        let rule = v1::RouteRule { backends, ..v1::RouteRule::default() };
        let wire = v1::Route { rules: vec![rule], ..route("HTTPRoute", Vec::new()) };
        match routes(&[wire]).find(80, &get("/")) {
            Found::Rule(rule, _) => rule.clone(),
            other => panic!("{other:?}"),
        }
    };
    let mut rng = fastrand::Rng::with_seed(7);
    assert_eq!(rule(&[]).pick(&mut rng), None);
    assert_eq!(rule(&[0, 0]).pick(&mut rng), None);
    let weights = [0, 90, 0, 10, u32::MAX / 1_000_000, 0];
    let rule_ = rule(&weights);
    let mut drawn = [0_u32; 6];
    for _ in 0..100_000 {
        drawn[rule_.pick(&mut rng).unwrap()] += 1;
    }
    let total: u32 = weights.iter().sum();
    for (weight, drawn) in weights.iter().zip(drawn) {
        let expected = f64::from(*weight) / f64::from(total) * 100_000.0;
        assert!((f64::from(drawn) - expected).abs() <= 700.0, "{weight}: {drawn}, not {expected}");
        assert_eq!(*weight == 0, drawn == 0);
    }
    // The sum of weights is more than 32 bits hold.
    assert!(rule(&[u32::MAX, u32::MAX, u32::MAX]).pick(&mut rng).is_some());
}

#[test]
fn what_a_rule_may_ask_is_known_beforehand() {
    let mirror = |service| v1::Filters {
        mirrors: vec![v1::Mirror { backend: Some(backend(service, 0)), per_million: 1 }],
        ..v1::Filters::default()
    };
    let rule = v1::RouteRule {
        filters: Some(mirror("m.n")),
        backends: vec![
            backend("z.n", 1),
            backend("s.n", 1),
            backend("none.n", 0),
            v1::Backend { filters: Some(mirror("k.n")), ..backend("z.n", 1) },
            v1::Backend { invalid: "no such service".into(), ..backend("invalid.n", 1) },
        ],
        ..v1::RouteRule::default()
    };
    let wire = v1::Route { rules: vec![rule], ..route("HTTPRoute", Vec::new()) };
    let others = v1::Route { client_namespace: "other".into(), ..wire.clone() };
    let service = v1::Service {
        name: "s".into(),
        namespace: "n".into(),
        routes: vec![wire, others],
        traffic: Some(v1::Traffic::default()),
        ..v1::Service::default()
    };
    let service = crate::model::Service::from_wire(service, "n").unwrap();
    assert_eq!(
        service.leads_to.iter().map(|name| &**name).collect::<Vec<_>>(),
        ["k.n", "m.n", "none.n", "z.n"]
    );
    assert!(service.traffic.is_some());
    let Found::Rule(rule, _) = service.routes.find(80, &get("/")) else { panic!("a rule") };
    assert_eq!(rule.backends[4].invalid.as_deref(), Some("no such service"));
}

#[test]
fn what_is_no_route_is_refused() {
    let refused = |wire: v1::Route| Routes::from_wire(&[wire], "default").unwrap_err();
    let http = |matching| route("HTTPRoute", vec![vec![matching]]);
    let grpc = |matching| route("GRPCRoute", vec![vec![matching]]);
    let ruled = |rule| v1::Route { rules: vec![rule], ..route("HTTPRoute", Vec::new()) };
    let redirect = v1::Redirect { status: 302, ..v1::Redirect::default() };
    let prefix = v1::PathChange { change: Some(v1::path_change::Change::Prefix("/x".into())) };
    let rewrite = v1::Filters {
        rewrite: Some(v1::Rewrite { path: Some(prefix), ..v1::Rewrite::default() }),
        ..v1::Filters::default()
    };
    for (wire, text) in [
        (route("TCPRoute", Vec::new()), "TCPRoute default/r: a route is an HTTPRoute or a GRPCRoute"),
        (
            v1::Route { ports: vec![0], ..http(on_path(Path::Exact, "/")) },
            "HTTPRoute default/r: port 0 is no port",
        ),
        (
            v1::Route { ports: vec![65_536], ..http(on_path(Path::Exact, "/")) },
            "HTTPRoute default/r: port 65536 is no port",
        ),
        (
            http(on_path(Path::Exact, "a")),
            "HTTPRoute default/r: rule 0: the path \"a\" does not begin with /",
        ),
        (http(on_call("a", "b")), "HTTPRoute default/r: rule 0: a match of gRPC in an HTTPRoute"),
        (grpc(on_path(Path::Exact, "/a")), "GRPCRoute default/r: rule 0: a match of HTTP in a GRPCRoute"),
        (
            grpc(v1::RouteMatch { method: "GET".into(), ..v1::RouteMatch::default() }),
            "GRPCRoute default/r: rule 0: a match of HTTP in a GRPCRoute",
        ),
        (
            ruled(v1::RouteRule {
                name: "move".into(),
                filters: Some(v1::Filters { redirect: Some(redirect), ..v1::Filters::default() }),
                backends: vec![backend("a.b", 1)],
                ..v1::RouteRule::default()
            }),
            "HTTPRoute default/r: move: a redirect and backends exclude each other",
        ),
        (
            ruled(v1::RouteRule {
                matches: vec![on_path(Path::Prefix, "/a"), on_path(Path::Exact, "/b")],
                filters: Some(rewrite.clone()),
                ..v1::RouteRule::default()
            }),
            "HTTPRoute default/r: rule 0: it replaces a prefix, and matches by something else",
        ),
        (
            ruled(v1::RouteRule {
                matches: vec![on_path(Path::Regex, "/b")],
                backends: vec![v1::Backend { filters: Some(rewrite.clone()), ..backend("a.b", 1) }],
                ..v1::RouteRule::default()
            }),
            "HTTPRoute default/r: rule 0: it replaces a prefix, and matches by something else",
        ),
        (
            ruled(v1::RouteRule {
                filters: Some(rewrite.clone()),
                backends: vec![v1::Backend { filters: Some(rewrite.clone()), ..backend("a.b", 1) }],
                ..v1::RouteRule::default()
            }),
            "HTTPRoute default/r: rule 0: a rewrite of the rule and one of a backend exclude each other",
        ),
        (
            ruled(v1::RouteRule { backends: vec![backend("a.b", 1); 65], ..v1::RouteRule::default() }),
            "HTTPRoute default/r: rule 0: 65 backends; at most 64 are taken",
        ),
    ] {
        assert_eq!(refused(wire), text);
    }
    let broken = http(on_path(Path::Regex, "a)|(b"));
    assert!(refused(broken.clone()).contains("regular expression"));
    // What is another client's does no harm here.
    let others = v1::Route { client_namespace: "other".into(), ..broken };
    assert_eq!(routes(&[others]), Routes::default());
}

#[test]
fn matches_and_expressions_are_bounded_over_all_routes() {
    let half = |matching: v1::RouteMatch, number| route("HTTPRoute", vec![vec![matching; number]]);
    let wire = |matching: &v1::RouteMatch, number: usize| {
        [half(matching.clone(), number / 2), half(matching.clone(), number - number / 2)]
    };
    let plain = on_path(Path::Exact, "/a");
    assert!(Routes::from_wire(&wire(&plain, MAX_MATCHES), "").is_ok());
    assert!(Routes::from_wire(&wire(&plain, MAX_MATCHES + 1), "").is_err());
    let regex = v1::RouteMatch {
        headers: vec![value("x", Value::Regex, "a")],
        query: vec![value("x", Value::Regex, "a")],
        ..v1::RouteMatch::default()
    };
    assert!(Routes::from_wire(&wire(&regex, MAX_EXPRESSIONS / 2), "").is_ok());
    assert!(Routes::from_wire(&wire(&regex, MAX_EXPRESSIONS / 2 + 1), "").is_err());
}
