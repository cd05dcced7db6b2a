use outrigger_core::request::Request;

use super::*;
use crate::kinds::Probe;
use crate::resolve::resolve;
use crate::resolve::tests::{access, catalog, defaults, external, policies, route, traffic};
use crate::value::Span;
use outrigger_core::deadline;

fn ask(text: &str, from: &From, service: &str, port: u16, request: Option<Request>) -> Explanation {
    let catalog = catalog();
    let resolved = resolve(&policies(text), &catalog);
    let to = To { service: service.to_owned(), port };
    explain(&Question { from: from.clone(), to, request }, &resolved, &catalog)
}

fn web() -> From {
    From::identity("shop/web", &catalog())
}

fn stranger() -> From {
    From { identity: None, namespace: "bank".to_owned(), address: "10.9.9.9".parse().unwrap() }
}

#[test]
fn a_request_s_way_is_told_step_by_step() {
    let text = [
        traffic("slow", "shop", "kind: Namespace", "timeouts: {request: 3s}, retry: {attempts: 2}"),
        route(
            "HTTPRoute",
            "orders",
            "shop",
            "name: orders",
            "{name: pay, matches: [{path: {value: /pay}}], \
              filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}}], \
              backendRefs: [{name: orders, port: 80, weight: 3}, {name: gone, port: 80}]}",
        ),
        access(
            "orders",
            "shop",
            "kind: Service, name: orders",
            "rules: [{name: web-pays, action: Allow, from: [{serviceAccounts: [shop/web]}], \
               to: [{methods: [POST], paths: [{type: PathPrefix, value: /v2}]}]}]",
        ),
        defaults("shop", "inbound: Deny"),
    ]
    .concat();
    let explanation = ask(&text, &web(), "orders.shop", 80, Some(Request::new("POST", "/pay/1?a=b")));
    assert_eq!(
        explanation.to_string(),
        "    route  this rule takes it  [HTTPRoute shop/orders, pay]\n  \
         timeout  3s  [TrafficPolicy shop/slow]\n  \
         retries  none: the method is not safe to repeat, and there is no Idempotency-Key  [TrafficPolicy shop/slow]\n  \
         backend  75 % to orders.shop port 80\n  \
         rewrite  /v2/1?a=b\n   \
         access  allowed  [AccessPolicy shop/orders, web-pays]\n  \
         backend  25 % to gone.shop, which is invalid: there is no service gone.shop\n       \
         =>  Allow at orders.shop\n       \
         =>  Error 500 (invalid_backend) at gone.shop\n"
    );
    assert_eq!(explanation.outcome, explanation.outcomes[1], "the worst");
    let allowed = &explanation.outcomes[0];
    assert_eq!((allowed.policy.as_deref(), allowed.rule.as_deref()), (Some("shop/orders"), Some("web-pays")));
    assert_eq!((allowed.route.as_deref(), allowed.retries), (Some("shop/orders"), 0));
    assert_eq!(allowed.timeout.map(Span::millis), Some(3000));
    let json = serde_json::to_value(&explanation).unwrap();
    assert_eq!(serde_json::from_value::<Explanation>(json).unwrap(), explanation);
}

#[test]
fn what_a_pod_s_host_asks_of_it_passes_as_it_does_there() {
    let mut catalog = catalog();
    let probe = |path: &str| Probe {
        port: 8080,
        method: Some("GET".to_owned()),
        path: Some(path.to_owned()),
        nodes: Vec::new(),
    };
    catalog.services[1].endpoints[0].probes = vec![probe("/ready")];
    let resolved = resolve(&policies(&defaults("shop", "inbound: Deny")), &catalog);
    for (path, expected) in
        [("/ready", "Allow at orders.shop"), ("/other", "Deny 403 (plaintext_refused) at orders.shop")]
    {
        let to = To { service: "orders.shop".to_owned(), port: 80 };
        let question = Question { from: stranger(), to, request: Some(Request::new("GET", path)) };
        assert_eq!(explain(&question, &resolved, &catalog).outcome.to_string(), expected);
    }
}

#[test]
fn what_comes_of_a_request() {
    let get = |target: &str| Some(Request::new("GET", target));
    let deny = defaults("outrigger-system", "inbound: Deny, probes: [{port: 8080, path: /live}]");
    let to_orders = route(
        "HTTPRoute",
        "r",
        "shop",
        "name: orders, port: 80",
        "{matches: [{path: {value: /a}}], backendRefs: [{name: orders, port: 80}]}",
    );
    let redirect = route(
        "HTTPRoute",
        "r",
        "shop",
        "name: orders",
        "{filters: [{type: RequestRedirect, requestRedirect: {hostname: other, statusCode: 301}}]}",
    );
    let paths = access(
        "p",
        "shop",
        "kind: Namespace",
        "rules: [{action: Deny, to: [{paths: [{type: PathPrefix, value: /admin}]}]}]",
    );
    let audit = access("p", "shop", "kind: Namespace", "mode: Audit, rules: [{action: Deny}]");
    let abort =
        traffic("f", "shop", "kind: Service, name: orders", "fault: {abort: {status: 418, percent: 100}}");
    let seldom =
        traffic("f", "shop", "kind: Service, name: orders", "fault: {abort: {status: 418, percent: 99.9}}");
    let outside = external("api", "shop", "api.example.com");
    for (what, text, from, service, port, request, expected) in [
        ("nothing said", "", web(), "orders.shop", 80, get("/"), "Allow at orders.shop"),
        ("bytes", "", web(), "orders.shop", 80, None, "Allow at orders.shop"),
        (
            "strict",
            "",
            stranger(),
            "orders.shop",
            80,
            get("/"),
            "Deny 403 (plaintext_refused) at orders.shop",
        ),
        ("default", &deny, web(), "orders.shop", 80, get("/"), "Deny 403 (access_denied) at orders.shop"),
        ("probe", &deny, stranger(), "orders.shop", 80, get("/live"), "Allow at orders.shop"),
        ("any port", "", web(), "pay.bank", 123, get("/"), "Allow at pay.bank"),
        ("no service", "", web(), "nobody.shop", 80, get("/"), "Error 503 (no_such_destination)"),
        ("no port", "", web(), "orders.shop", 81, get("/"), "Error 503 (no_endpoints) at orders.shop"),
        ("a rule", &to_orders, web(), "orders.shop", 80, get("/a/b"), "Allow at orders.shop"),
        ("no rule", &to_orders, web(), "orders.shop", 80, get("/b"), "NoRoute 404 (no_route)"),
        ("another port", &to_orders, web(), "orders.shop", 9090, get("/b"), "Allow at orders.shop"),
        ("redirect", &redirect, web(), "orders.shop", 80, get("/b"), "Redirect 301"),
        (
            "path",
            &paths,
            web(),
            "orders.shop",
            80,
            get("/x/../admin"),
            "Deny 403 (access_denied) at orders.shop",
        ),
        (
            "odd path",
            &paths,
            web(),
            "orders.shop",
            80,
            get("/x%2f..%2fadmin"),
            "Deny 400 (bad_request) at orders.shop",
        ),
        (
            "bytes with paths",
            &paths,
            web(),
            "orders.shop",
            80,
            None,
            "Deny 403 (access_denied) at orders.shop",
        ),
        ("audit", &audit, web(), "orders.shop", 80, get("/"), "Allow at orders.shop"),
        ("fault", &abort, web(), "orders.shop", 80, get("/"), "Error 418 (fault_injected)"),
        ("seldom", &seldom, web(), "orders.shop", 80, get("/"), "Allow at orders.shop"),
        ("outside", &outside, web(), "api.shop", 443, None, "Allow at api.shop"),
    ] {
        let explanation = ask(text, &from, service, port, request);
        assert_eq!(explanation.outcome.to_string(), expected, "{what}\n{explanation}");
    }
}

#[test]
fn consumer_routes_are_for_their_namespace_and_ports_for_themselves() {
    let text = route(
        "HTTPRoute",
        "r",
        "bank",
        "name: orders, namespace: shop",
        "{backendRefs: [{name: pay, port: 1}]}",
    ) + &traffic("t", "shop", "kind: Service, name: orders, port: 80", "retry: {attempts: 4}");
    let get = Some(Request::new("GET", "/"));
    let own = ask(&text, &web(), "orders.shop", 80, get.clone());
    assert_eq!(
        (own.outcome.backend.as_deref(), own.outcome.route.as_deref(), own.outcome.retries),
        (Some("orders.shop"), None, 4)
    );
    assert_eq!(own.outcome.retries_by.as_deref(), Some("TrafficPolicy shop/t"));
    assert_eq!(ask(&text, &web(), "orders.shop", 9090, get.clone()).outcome.retries, 0);
    let bank = From::identity("bank/pay", &catalog());
    let theirs = ask(&text, &bank, "orders.shop", 80, get).outcome;
    assert_eq!(
        (theirs.backend.as_deref(), theirs.route.as_deref(), theirs.retries),
        (Some("pay.bank"), Some("bank/r"), 4)
    );
}

#[test]
fn the_caller_s_own_deadline_counts_if_it_is_shorter() {
    let text = traffic("t", "shop", "kind: Namespace", "timeouts: {request: 2s}");
    for (asked, expected, by) in [("500", 500, "the request"), ("5000", 2000, "TrafficPolicy shop/t")] {
        let request = Request::new("GET", "/").with(deadline::HEADER, asked);
        let outcome = ask(&text, &web(), "orders.shop", 80, Some(request)).outcome;
        assert_eq!(
            (outcome.timeout.map(Span::millis), outcome.timeout_by.as_deref()),
            (Some(expected), Some(by))
        );
    }
}
