use super::*;
use crate::resolve::resolve;
use crate::resolve::tests::{access, catalog, defaults, external, policies, route, traffic};

fn between(old: &str, new: &str) -> Vec<String> {
    let catalog = catalog();
    changes(&resolve(&policies(old), &catalog), &resolve(&policies(new), &catalog), &catalog)
}

#[test]
fn nothing_is_different_where_nothing_changes() {
    let text = traffic("t", "shop", "kind: Namespace", "retry: {attempts: 2}");
    assert_eq!(between(&text, &text), Vec::<String>::new());
    // Written differently, it comes to the same.
    let same = access("a", "shop", "kind: Namespace", "rules: [{action: Allow}]");
    let other = access("b", "shop", "kind: Service, name: web", "rules: [{action: Allow}]");
    assert_eq!(between(&same, &other), Vec::<String>::new());
}

#[test]
fn a_retry_that_goes_is_told_for_whom_and_by_whom() {
    let old = traffic("t", "shop", "kind: Service, name: web", "retry: {attempts: 2}");
    let new = traffic("t", "shop", "kind: Service, name: web", "retry: {attempts: 0}");
    assert_eq!(
        between(&old, &new),
        ["everybody -> web.shop:80 GET /: retries 2 -> 0, by TrafficPolicy shop/t"]
    );
}

#[test]
fn a_service_that_any_port_leads_to_is_told_by_the_ports_of_its_endpoints() {
    let policy = |attempts: u32| {
        traffic("t", "bank", "kind: Service, name: pay", &format!("retry: {{attempts: {attempts}}}"))
    };
    let line = "retries 2 -> 0, by TrafficPolicy bank/t";
    assert_eq!(between(&policy(2), &policy(0)), [format!("everybody -> pay.bank:7000 GET /: {line}")]);

    let to_80 =
        route("HTTPRoute", "r", "bank", "name: pay, port: 80", "{backendRefs: [{name: pay, port: 80}]}");
    let lines = between("", &to_80);
    assert!(lines.iter().all(|line| line.contains("-> pay.bank:80 ")), "{lines:?}");
    assert!(!lines.is_empty(), "a port that only a route names is asked at too");

    let mut catalog = catalog();
    let pay = catalog.services.iter_mut().find(|service| service.name == "pay").unwrap();
    pay.endpoints.clear();
    let [old, new] = [2, 0].map(|attempts| resolve(&policies(&policy(attempts)), &catalog));
    let nobody_serves_it = format!("everybody -> pay.bank GET /: {line}");
    assert_eq!(changes(&old, &new, &catalog), [nobody_serves_it], "no port is made up");
}

#[test]
fn what_a_rule_denies_is_told_with_its_name() {
    let rule = "rules: [{name: no-admin, action: Deny, from: [{namespaces: [bank]}], to: [{methods: [POST], paths: [{type: PathPrefix, value: /admin}]}]}]";
    let lines = between("", &access("a", "shop", "kind: Service, name: web", rule));
    assert_eq!(
        lines,
        [
            // What is denied by its path is denied where paths cannot be seen.
            "bank/pay -> web.shop:80 bytes: Allow -> Deny 403, by AccessPolicy shop/a, no-admin",
            "bank/pay -> web.shop:80 POST /admin: Allow -> Deny 403, by AccessPolicy shop/a, no-admin",
        ]
    );
}

#[test]
fn routes_defaults_and_the_whole_are_compared() {
    let canary = route(
        "HTTPRoute",
        "r",
        "shop",
        "name: web",
        "{matches: [{headers: [{name: x-canary, value: 'yes'}]}], backendRefs: [{name: orders, port: 80}]}, {backendRefs: [{name: web, port: 80}]}",
    );
    let lines = between("", &canary);
    assert_eq!(
        lines,
        [
            "everybody -> web.shop:80 GET /: route none -> shop/r",
            "everybody -> web.shop:80 POST /: route none -> shop/r",
            "everybody -> web.shop:80 GET / (x-canary: yes): route none -> shop/r; backend web.shop -> orders.shop",
        ]
    );
    let lines = between("", &defaults("shop", "mtls: Permissive, outbound: Deny"));
    assert!(
        lines.contains(&"namespace shop: outbound Allow -> Deny, by MeshDefaults shop/default".to_owned()),
        "{lines:?}"
    );
    assert!(lines.contains(&"shop/web: mtls Strict -> Permissive".to_owned()), "{lines:?}");
    let lines = between(
        &traffic("t", "shop", "kind: Namespace", "bulkhead: {maxRequests: 1}"),
        &traffic("t", "shop", "kind: Service, name: web", "bulkhead: {maxRequests: 2}, hedge: {after: 5ms}"),
    );
    assert_eq!(
        lines,
        [
            "web.shop: hedge is set, by TrafficPolicy shop/t",
            "web.shop: bulkhead changes, by TrafficPolicy shop/t",
            "orders.shop: bulkhead is the proxy's own again",
        ]
    );
    assert_eq!(
        between("", &external("api", "shop", "api.example.com")),
        ["api.example.com: leads to api.shop"]
    );
}

#[test]
fn there_is_an_end_to_it() {
    let rules: Vec<String> = (0..200)
        .map(|at| format!("{{action: Deny, to: [{{paths: [{{type: Exact, value: /{at}}}]}}]}}"))
        .collect();
    let many = access("a", "shop", "kind: Namespace", &format!("rules: [{}]", rules.join(", ")));
    let lines = between("", &many);
    assert!(lines.len() <= MAX_LINES);
    assert!(lines.len() > MAX_REQUESTS, "both services are asked");
}
