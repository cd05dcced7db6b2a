//! What becomes of the fields of one object.

use super::*;

#[test]
fn what_is_left_out_of_a_field_has_its_default_here() {
    let fields = "retry: {attempts: 2}, hedge: {after: 50ms}, circuitBreaker: {successRate: {percent: 90}}, \
        loadBalancer: {algorithm: Maglev, hash: [{header: x-user}, {source: true}]}, \
        fault: {abort: {grpcStatus: unavailable, percent: 0.5}}, healthCheck: {path: /live}";
    let traffic = of(&traffic("t", "shop", "kind: Namespace", fields)).service("web.shop").traffic.unwrap();
    let retry = traffic.retry.unwrap();
    assert_eq!((retry.statuses, retry.grpc_codes, retry.reset), (vec![502, 503, 504], vec![], true));
    assert_eq!(
        (retry.backoff, retry.max_backoff, retry.budget_percent, retry.budget_floor),
        (25, 250, 10, 1)
    );
    assert_eq!((retry.max_body, retry.per_try_timeout, retry.unsafe_methods), (65_536, false, false));
    assert_eq!(traffic.hedge.unwrap().after, 50);
    let breaker = traffic.breaker.unwrap();
    assert_eq!(
        (breaker.consecutive, breaker.success_percent, breaker.window, breaker.min_requests),
        (5, 90, 10_000, 20)
    );
    assert_eq!(
        (breaker.base_ejection, breaker.max_ejection, breaker.max_ejected_percent),
        (1000, 30_000, 50)
    );
    let balancer = traffic.load_balancer.unwrap();
    assert_eq!((balancer.algorithm(), balancer.hash.len()), (v1::load_balancer::Algorithm::Maglev, 2));
    let fault = traffic.fault.unwrap();
    assert_eq!((fault.abort_status, fault.abort_grpc, fault.abort_per_million), (0, Some(14), 5000));
    let check = traffic.health_check.unwrap();
    assert_eq!(
        (&*check.path, check.interval, check.timeout, check.healthy, check.unhealthy),
        ("/live", 10_000, 1000, 1, 3)
    );
}

#[test]
fn filters_and_matches_are_the_gateway_api_s() {
    let rule = "{matches: [{path: {value: /a}, method: POST, headers: [{name: X-A, value: b, type: RegularExpression}], \
          queryParams: [{name: Q, value: c}]}, {path: {type: PathPrefix, value: /}}], \
        filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-S, value: s}], remove: [X-R]}}, \
          {type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}, fraction: {numerator: 1, denominator: 8}}}, \
          {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}], \
        timeouts: {request: 2s, backendRequest: 1s}, retry: {codes: [503, 500], backoff: 100ms}, \
        backendRefs: [{name: orders, port: 80, weight: 9, filters: [{type: ResponseHeaderModifier, \
          responseHeaderModifier: {add: [{name: X-V, value: '1'}]}}]}, {name: web, port: 80}]}, \
       {filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]}";
    let routes = of(&route("HTTPRoute", "r", "shop", "name: orders", rule)).service("orders.shop").routes;
    let [first, second] = &routes[0].rules[..] else { panic!() };
    assert_eq!((&*first.name, &*second.name), ("rule 0", "rule 1"));
    let wire = &first.matches[0];
    assert_eq!(
        wire.path.as_ref().map(|path| (path.kind(), &*path.value)),
        Some((v1::path_match::Kind::Prefix, "/a"))
    );
    assert_eq!(
        (&*wire.method, &*wire.headers[0].name, wire.headers[0].kind()),
        ("POST", "x-a", v1::value_match::Kind::Regex)
    );
    assert_eq!((&*wire.query[0].name, wire.query[0].kind()), ("Q", v1::value_match::Kind::Exact));
    assert_eq!(first.matches[1].path, None, "the prefix / is any path");
    let filters = first.filters.as_ref().unwrap();
    let headers = filters.request_headers.as_ref().unwrap();
    assert_eq!((&*headers.set[0].name, &*headers.remove[0]), ("x-s", "x-r"));
    assert_eq!(filters.mirrors[0].per_million, 125_000);
    assert_eq!(filters.mirrors[0].backend.as_ref().unwrap().service, "web.shop");
    assert!(filters.rewrite.is_some());
    assert_eq!(first.backends.iter().map(|backend| backend.weight).collect::<Vec<_>>(), [9, 1]);
    assert!(first.backends[0].filters.as_ref().unwrap().response_headers.is_some());
    let traffic = first.traffic.as_ref().unwrap();
    let (timeouts, retry) = (traffic.timeouts.as_ref().unwrap(), traffic.retry.as_ref().unwrap());
    assert_eq!(
        (timeouts.request, timeouts.per_try, &*timeouts.origin),
        (Some(2000), Some(1000), "HTTPRoute shop/r")
    );
    assert_eq!(
        (retry.attempts, &*retry.statuses, retry.reset, retry.backoff, retry.max_backoff),
        (1, &[500, 503][..], true, 100, 1000)
    );
    assert_eq!(second.filters.as_ref().unwrap().redirect.as_ref().unwrap().status, 302);
    let grpc = "{matches: [{method: {service: a.B, method: C}}], backendRefs: [{name: orders, port: 9090}]}";
    let routes = of(&route("GRPCRoute", "r", "shop", "name: orders", grpc)).service("orders.shop").routes;
    let wire = routes[0].rules[0].matches[0].grpc.as_ref().unwrap();
    assert_eq!((&*wire.service, &*wire.method, wire.regex), ("a.B", "C", false));
}
