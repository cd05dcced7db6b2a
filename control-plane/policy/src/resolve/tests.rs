//! What policies come to, object by object; `properties` asks what must hold of any, `wire` what becomes of a field.

mod properties;
mod wire;

use std::sync::Arc;

use outrigger_api::v1;

use super::*;
use crate::catalog::Workload;
use crate::kind::Kind;
use crate::kinds::DefaultAction;
use crate::object::Object;

/// Objects of one text, each a second younger than the one before.
pub(crate) fn policies(text: &str) -> Policies {
    let documents = text.split("\n---\n").filter(|document| !document.trim().is_empty());
    documents.zip(0..).map(|(document, created)| stored(document, created)).collect()
}

pub(crate) fn stored(document: &str, created: i64) -> (Key, Arc<Stored>) {
    let object: Object =
        serde_saphyr::from_str(document).unwrap_or_else(|fault| panic!("{fault}\n{document}"));
    let stored = Stored { revision: 1, created, updated: created, author: "test".to_owned(), object };
    (stored.object.key(), Arc::new(stored))
}

/// `shop`: `web` on 80, `orders` on 80 and 9090 (grpc), each with one workload; `bank`: `pay` on any port.
pub(crate) fn catalog() -> Catalog {
    serde_json::from_value(serde_json::json!({
        "trustDomain": "outrigger.local",
        "meshNamespace": "outrigger-system",
        "defaults": {"mtls": "Strict", "inbound": "Allow", "outbound": "Allow"},
        "services": [
            {"name": "web", "namespace": "shop", "ports": [{"port": 80, "name": "http"}],
             "endpoints": [endpoint("web", "10.0.0.1", serde_json::json!({"80": 8080}))]},
            {"name": "orders", "namespace": "shop",
             "ports": [{"port": 80, "name": "http"}, {"port": 9090, "name": "grpc"}],
             "endpoints": [endpoint("orders", "10.0.0.2", serde_json::json!({"80": 8080, "9090": 9090}))]},
            {"name": "pay", "namespace": "bank", "ports": [{"port": 0}],
             "endpoints": [{"id": "pay-1", "address": "10.0.0.3", "ports": {"0": 7000},
                            "identity": "spiffe://outrigger.local/ns/bank/sa/pay"}]},
        ],
    }))
    .unwrap()
}

fn endpoint(name: &str, address: &str, ports: serde_json::Value) -> serde_json::Value {
    let mut endpoint = serde_json::json!({
        "id": format!("{name}-1"), "address": address, "labels": {"app": name},
        "identity": format!("spiffe://outrigger.local/ns/shop/sa/{name}"),
    });
    endpoint["ports"] = ports;
    endpoint
}

pub(crate) fn traffic(name: &str, namespace: &str, target: &str, fields: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{targetRef: {{{target}}}, {fields}}}\n---\n"
    )
}

pub(crate) fn route(kind: &str, name: &str, namespace: &str, parent: &str, rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{parentRefs: [{{group: '', kind: Service, {parent}}}], rules: [{rules}]}}\n---\n"
    )
}

pub(crate) fn access(name: &str, namespace: &str, target: &str, fields: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{targetRef: {{{target}}}, {fields}}}\n---\n"
    )
}

pub(crate) fn defaults(namespace: &str, fields: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshDefaults\nmetadata: {{name: default, namespace: {namespace}}}\n\
         spec: {{{fields}}}\n---\n"
    )
}

pub(crate) fn external(name: &str, namespace: &str, host: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: ExternalService\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{hosts: ['{host}'], ports: [{{port: 443, protocol: TCP}}]}}\n---\n"
    )
}

fn of(text: &str) -> Resolved {
    resolve(&policies(text), &catalog())
}

fn workload(identity: &str) -> Vec<Workload> {
    let mut workloads = catalog().workloads();
    workloads.retain(|workload| workload.identity.as_deref() == Some(identity));
    workloads
}

fn inbound(resolved: &Resolved, namespace: &str, name: &str) -> InboundPolicy {
    let identity = format!("spiffe://outrigger.local/ns/{namespace}/sa/{name}");
    resolved.inbound(&identity, &workload(&identity))
}

/// Type, status and reason of an object's conditions.
fn conditions(resolved: &Resolved, kind: Kind, namespace: &str, name: &str) -> Vec<String> {
    let conditions = resolved.conditions(&Key::new(kind, namespace, name));
    conditions.iter().map(|c| format!("{:?}={:?} {:?}", c.kind, c.status, c.reason)).collect()
}

fn attempts(traffic: Option<&v1::Traffic>) -> Option<(u32, &str)> {
    let retry = traffic?.retry.as_ref()?;
    Some((retry.attempts, &retry.origin))
}

const EVERYTHING_TO_ORDERS: &str = "{backendRefs: [{name: orders, port: 80}]}";

#[test]
fn the_more_specific_target_wins() {
    let steps = [
        traffic("mesh", "outrigger-system", "kind: Mesh", "retry: {attempts: 1}, timeouts: {idle: 9s}"),
        traffic("namespace", "shop", "kind: Namespace", "retry: {attempts: 2}"),
        traffic("service", "shop", "kind: Service, name: orders", "retry: {attempts: 3}"),
        traffic("port", "shop", "kind: Service, name: orders, port: 80", "retry: {attempts: 4}"),
        traffic("route", "shop", "kind: HTTPRoute, name: orders", "retry: {attempts: 5}"),
        traffic("rule", "shop", "kind: HTTPRoute, name: orders, sectionName: rule-0", "retry: {attempts: 6}"),
    ];
    // With its own retry, which is the nearest word of all, and without.
    for (own, at_most) in [("", 6), ("retry: {attempts: 7, codes: [503]}, ", 7)] {
        let rule = format!("{{{own}backendRefs: [{{name: orders, port: 80}}]}}");
        let orders = route("HTTPRoute", "orders", "shop", "name: orders", &rule);
        for most in 1..=steps.len() {
            let resolved = of(&format!("{orders}{}", steps[..most].concat()));
            let policy = resolved.service("orders.shop");
            let at_80 =
                policy.routes.iter().find(|route| route.ports.is_empty() || route.ports == [80]).unwrap();
            let expected = if own.is_empty() { u32::try_from(most).unwrap() } else { at_most };
            let traffic = at_80.rules[0].traffic.as_ref();
            assert_eq!(attempts(traffic).unwrap().0, expected, "{most}");
            assert_eq!(
                traffic.unwrap().timeouts.as_ref().unwrap().idle,
                Some(9000),
                "the mesh's own word stays"
            );
            assert_eq!(
                attempts(policy.traffic.as_ref()).unwrap().0,
                expected.min(3).min(u32::try_from(most).unwrap())
            );
            // Port 9090 knows nothing of port 80's policy.
            let at_9090 =
                policy.routes.iter().find(|route| route.ports.is_empty() || route.ports == [9090]).unwrap();
            let expected = if most == 4 && own.is_empty() { 3 } else { expected };
            assert_eq!(attempts(at_9090.rules[0].traffic.as_ref()).unwrap().0, expected, "{most} at 9090");
        }
        let resolved = of(&steps.concat());
        assert_eq!(
            attempts(resolved.service("web.shop").traffic.as_ref()),
            Some((2, "TrafficPolicy shop/namespace"))
        );
        assert_eq!(attempts(resolved.service("pay.bank").traffic.as_ref()).unwrap().0, 1);
        assert_eq!(attempts(resolved.service("not-there.shop").traffic.as_ref()).unwrap().0, 2);
    }
}

#[test]
fn of_two_policies_with_one_target_the_older_stays_and_the_younger_is_told() {
    let first = traffic("b", "shop", "kind: Service, name: orders", "retry: {attempts: 1}");
    let second = traffic("a", "shop", "kind: Service, name: orders", "timeouts: {request: 1s}");
    let resolved = of(&format!("{first}{second}"));
    let traffic_ = resolved.service("orders.shop").traffic.unwrap();
    assert_eq!((attempts(Some(&traffic_)), &traffic_.timeouts), (Some((1, "TrafficPolicy shop/b")), &None));
    assert_eq!(conditions(&resolved, Kind::TrafficPolicy, "shop", "b"), ["Accepted=True Accepted"]);
    assert_eq!(conditions(&resolved, Kind::TrafficPolicy, "shop", "a"), ["Accepted=False Conflicted"]);
    // As soon as the older one goes.
    assert!(of(&second).service("orders.shop").traffic.unwrap().timeouts.is_some());
    // A rule has two names, and is one target.
    let rule = format!("{{name: pay, {}", EVERYTHING_TO_ORDERS.trim_start_matches('{'));
    let resolved = of(&[
        route("HTTPRoute", "orders", "shop", "name: orders", &rule),
        traffic("a", "shop", "kind: HTTPRoute, name: orders, sectionName: pay", "retry: {attempts: 1}"),
        traffic("b", "shop", "kind: HTTPRoute, name: orders, sectionName: rule-0", "retry: {attempts: 2}"),
    ]
    .concat());
    assert_eq!(conditions(&resolved, Kind::TrafficPolicy, "shop", "b"), ["Accepted=False Conflicted"]);
}

#[test]
fn a_target_that_is_not_there_or_not_ones_own_is_refused() {
    for (namespace, target, expected) in [
        ("shop", "kind: Service, name: nobody", "Accepted=False TargetNotFound"),
        ("shop", "kind: Service, name: orders, port: 81", "Accepted=False TargetNotFound"),
        ("bank", "kind: Service, name: pay, port: 81", "Accepted=True Accepted"),
        ("bank", "kind: Service, name: orders", "Accepted=False TargetNotFound"),
        ("bank", "kind: Service, name: orders, namespace: shop", "Accepted=False Invalid"),
        ("shop", "kind: Mesh", "Accepted=False Invalid"),
        ("shop", "kind: HTTPRoute, name: nobody", "Accepted=False TargetNotFound"),
        ("shop", "kind: GRPCRoute, name: orders", "Accepted=False TargetNotFound"),
        ("shop", "kind: HTTPRoute, name: orders, sectionName: rule-1", "Accepted=False TargetNotFound"),
        ("shop", "kind: HTTPRoute, name: orders, sectionName: rule-0", "Accepted=True Accepted"),
    ] {
        let text = route("HTTPRoute", "orders", "shop", "name: orders", EVERYTHING_TO_ORDERS)
            + &traffic("p", namespace, target, "retry: {attempts: 1}");
        let resolved = of(&text);
        assert_eq!(
            conditions(&resolved, Kind::TrafficPolicy, namespace, "p"),
            [expected],
            "{namespace} {target}"
        );
    }
}

#[test]
fn a_port_s_policy_holds_at_that_port_only() {
    let port = traffic(
        "p",
        "shop",
        "kind: Service, name: orders, port: 80",
        "retry: {attempts: 4}, bulkhead: {maxRequests: 1}",
    );
    let resolved = of(&port);
    let policy = resolved.service("orders.shop");
    assert_eq!(policy.traffic, None);
    let [to_itself] = &policy.routes[..] else { panic!("{:?}", policy.routes) };
    assert_eq!((&*to_itself.ports, &*to_itself.name), (&[80][..], "shop/orders"));
    let backend = &to_itself.rules[0].backends[0];
    assert_eq!((&*backend.service, backend.port, backend.weight), ("orders.shop", 80, 1));
    assert_eq!(attempts(to_itself.rules[0].traffic.as_ref()).unwrap().0, 4);
    assert_eq!(to_itself.rules[0].traffic.as_ref().unwrap().bulkhead, None);
    assert_eq!(
        conditions(&resolved, Kind::TrafficPolicy, "shop", "p"),
        ["Accepted=True Accepted", "PartiallyInvalid=True UnsupportedValue"]
    );
    // Of a service whose ports cannot be listed, the copy for the port comes first.
    let text = traffic("p", "bank", "kind: Service, name: pay, port: 80", "retry: {attempts: 4}")
        + &route("HTTPRoute", "pay", "bank", "name: pay", "{backendRefs: [{name: pay, port: 80}]}");
    let routes = of(&text).service("pay.bank").routes;
    assert_eq!(routes.iter().map(|route| &*route.ports).collect::<Vec<_>>(), [&[80][..], &[]]);
    assert_eq!(routes[1].rules[0].traffic, None);
}

#[test]
fn routes_of_other_namespaces_are_for_their_own_clients() {
    let text = route("HTTPRoute", "own", "shop", "name: orders, port: 80", EVERYTHING_TO_ORDERS)
        + &route(
            "HTTPRoute",
            "theirs",
            "bank",
            "name: orders, namespace: shop, sectionName: http",
            "{backendRefs: [{name: pay, port: 1}]}",
        );
    let resolved = of(&text);
    let routes = resolved.service("orders.shop").routes;
    let seen: Vec<_> =
        routes.iter().map(|route| (&*route.name, &*route.client_namespace, &*route.ports)).collect();
    assert_eq!(seen, [("shop/own", "", &[80][..]), ("bank/theirs", "bank", &[80][..])]);
    assert_eq!(routes[1].rules[0].backends[0].service, "pay.bank", "the route's own namespace");
    assert_eq!(
        conditions(&resolved, Kind::HttpRoute, "bank", "theirs"),
        ["Accepted=True Accepted", "ResolvedRefs=True ResolvedRefs"]
    );
}

#[test]
fn routes_of_one_service_are_merged_the_oldest_first() {
    let text = route("HTTPRoute", "z", "shop", "name: orders", EVERYTHING_TO_ORDERS)
        + &route("HTTPRoute", "a", "shop", "name: orders", EVERYTHING_TO_ORDERS);
    let routes = of(&text).service("orders.shop").routes;
    assert_eq!(
        routes.iter().map(|route| (&*route.name, route.created)).collect::<Vec<_>>(),
        [("shop/z", 0), ("shop/a", 1)]
    );
    let tied: Policies = policies(&text)
        .into_iter()
        .map(|(key, stored)| (key, Arc::new(Stored { created: 5, ..(*stored).clone() })))
        .collect();
    let routes = resolve(&tied, &catalog()).service("orders.shop").routes;
    assert_eq!(routes.iter().map(|route| &*route.name).collect::<Vec<_>>(), ["shop/a", "shop/z"]);
}

#[test]
fn a_port_has_the_kind_of_its_oldest_route() {
    for (older, younger, left, expected) in [
        ("name: orders", "name: orders", None, "Accepted=False Conflicted"),
        ("name: orders, port: 9090", "name: orders", Some(&[80][..]), "Accepted=True Accepted"),
        ("name: orders, port: 9090", "name: orders, port: 80", Some(&[80]), "Accepted=True Accepted"),
        ("name: orders", "name: orders, port: 9090", None, "Accepted=False Conflicted"),
        ("name: orders, port: 81", "name: orders, port: 9090", Some(&[9090]), "Accepted=True Accepted"),
        ("name: web", "name: orders", Some(&[]), "Accepted=True Accepted"),
    ] {
        for [first, second] in [["HTTPRoute", "GRPCRoute"], ["GRPCRoute", "HTTPRoute"]] {
            let text = route(first, "older", "shop", older, EVERYTHING_TO_ORDERS)
                + &route(second, "younger", "shop", younger, EVERYTHING_TO_ORDERS);
            let resolved = of(&text);
            let routes = resolved.service("orders.shop").routes;
            let route = routes.iter().find(|route| route.kind == second);
            assert_eq!(route.map(|route| &*route.ports), left, "{older} {younger}");
            let kind = if second == "HTTPRoute" { Kind::HttpRoute } else { Kind::GrpcRoute };
            assert_eq!(conditions(&resolved, kind, "shop", "younger")[0], expected, "{older} {younger}");
        }
    }
}

#[test]
fn what_sidecars_would_refuse_is_not_pushed() {
    let many: Vec<String> =
        (0..257).map(|at| format!("{{path: {{type: RegularExpression, value: '/{at}'}}}}")).collect();
    for (text, kind) in [
        (
            route("HTTPRoute", "x", "shop", "name: orders", &format!("{{matches: [{}]}}", many.join(", "))),
            Kind::HttpRoute,
        ),
        (
            route(
                "HTTPRoute",
                "x",
                "shop",
                "name: orders",
                "{matches: [{path: {type: RegularExpression, value: '('}}]}",
            ),
            Kind::HttpRoute,
        ),
        (traffic("x", "shop", "kind: Namespace", "healthCheck: {path: live}"), Kind::TrafficPolicy),
        (
            access("x", "shop", "kind: Namespace", "rules: [{action: Allow, from: [{cidrs: [x]}]}]"),
            Kind::AccessPolicy,
        ),
    ] {
        let resolved = of(&text);
        assert_eq!(conditions(&resolved, kind, "shop", "x")[0], "Accepted=False Invalid");
        assert_eq!(resolved.service("orders.shop"), ServicePolicy::default());
        assert_eq!(inbound(&resolved, "shop", "orders").access, None);
    }
    let probes = defaults("shop", "inbound: Deny, probes: [{port: 1, path: live}, {port: 2, path: /live}]");
    let resolved = of(&probes);
    let told = inbound(&resolved, "shop", "orders").access.unwrap();
    assert_eq!((told.default(), told.probes.len()), (v1::Default::Deny, 1));
    assert_eq!(
        conditions(&resolved, Kind::MeshDefaults, "shop", "default"),
        ["Accepted=True Accepted", "PartiallyInvalid=True UnsupportedValue"]
    );
    // A path that only one of the modes can take is left to the mode that holds where it is asked.
    let slash = "rules: [{action: Deny, to: [{paths: [{type: Exact, value: '/a%2Fb'}]}]}]";
    assert_eq!(
        conditions(&of(&access("x", "shop", "kind: Namespace", slash)), Kind::AccessPolicy, "shop", "x"),
        ["Accepted=True Accepted"]
    );
}

#[test]
fn a_reference_that_leads_nowhere_is_told_and_keeps_its_share() {
    for (parent, rule, expected) in [
        (
            "name: nobody",
            EVERYTHING_TO_ORDERS,
            ["Accepted=False NoMatchingParent", "ResolvedRefs=True ResolvedRefs"],
        ),
        (
            "name: orders, port: 81",
            EVERYTHING_TO_ORDERS,
            ["Accepted=False NoMatchingParent", "ResolvedRefs=True ResolvedRefs"],
        ),
        (
            "name: orders, sectionName: x",
            EVERYTHING_TO_ORDERS,
            ["Accepted=False NoMatchingParent", "ResolvedRefs=True ResolvedRefs"],
        ),
        (
            "name: orders",
            "{backendRefs: [{name: v2, port: 80}]}",
            ["Accepted=True Accepted", "ResolvedRefs=False BackendNotFound"],
        ),
        (
            "name: orders",
            "{backendRefs: [{name: orders, port: 81}]}",
            ["Accepted=True Accepted", "ResolvedRefs=False BackendNotFound"],
        ),
        (
            "name: orders",
            "{backendRefs: [{name: x, kind: Bucket, group: x, port: 81}]}",
            ["Accepted=True Accepted", "ResolvedRefs=False InvalidKind"],
        ),
    ] {
        let resolved = of(&route("HTTPRoute", "r", "shop", parent, rule));
        assert_eq!(conditions(&resolved, Kind::HttpRoute, "shop", "r"), expected, "{parent} {rule}");
        let routes = resolved.service("orders.shop").routes;
        assert_eq!(routes.is_empty(), expected[0].contains("False"));
        let invalid = routes.first().is_some_and(|route| !route.rules[0].backends[0].invalid.is_empty());
        assert_eq!(invalid, expected[1].contains("False"), "{parent} {rule}");
    }
    let gateways_only = route("HTTPRoute", "r", "shop", "name: orders", EVERYTHING_TO_ORDERS)
        .replace("group: '', kind: Service, ", "");
    assert_eq!(
        conditions(&of(&gateways_only), Kind::HttpRoute, "shop", "r"),
        ["Accepted=False NoMatchingParent"]
    );
}

#[test]
fn access_policies_of_all_targets_count_together() {
    let allow = "rules: [{action: Allow, from: [{serviceAccounts: [shop/web]}]}]";
    let text = [
        access("mesh", "outrigger-system", "kind: Mesh", allow),
        access("namespace", "shop", "kind: Namespace, port: 22", allow),
        access("service", "shop", "kind: Service, name: orders", allow),
        access("port", "shop", "kind: Service, name: orders, port: 80", &format!("mode: Audit, {allow}")),
        access("labels", "shop", "kind: Workload, labels: {app: orders}", allow),
        access("others", "shop", "kind: Workload, labels: {app: orders, tier: back}", allow),
        access("elsewhere", "bank", "kind: Namespace", allow),
    ]
    .concat();
    let resolved = of(&text);
    let access = inbound(&resolved, "shop", "orders").access.unwrap();
    let seen: Vec<_> = access.policies.iter().map(|p| (&*p.name, p.audit, &*p.ports)).collect();
    assert_eq!(
        seen,
        [
            ("outrigger-system/mesh", false, &[][..]),
            ("shop/labels", false, &[]),
            ("shop/namespace", false, &[22]),
            ("shop/port", true, &[8080]),
            ("shop/service", false, &[8080, 9090]),
        ]
    );
    assert_eq!(access.policies[0].rules[0].name, "rule 0");
    assert_eq!(access.policies[0].rules[0].from[0].identities, ["spiffe://outrigger.local/ns/shop/sa/web"]);
    assert_eq!(access.default(), v1::Default::Allow, "a policy flips no default");
    let pay = inbound(&resolved, "bank", "pay").access.unwrap();
    assert_eq!(
        pay.policies.iter().map(|p| &*p.name).collect::<Vec<_>>(),
        ["bank/elsewhere", "outrigger-system/mesh"]
    );
    // Before the catalog knows any of its workloads.
    let early = resolved.inbound("spiffe://outrigger.local/ns/shop/sa/new", &[]).access.unwrap();
    assert_eq!(
        early.policies.iter().map(|p| &*p.name).collect::<Vec<_>>(),
        ["outrigger-system/mesh", "shop/namespace"]
    );
}

#[test]
fn a_selector_that_matches_nobody_never_becomes_everybody() {
    for (from, identities) in [
        ("{serviceAccounts: [shop/web], identities: ['spiffe://outrigger.local/ns/shop/*']}", Some(1)),
        ("{serviceAccounts: [shop/web], identities: ['spiffe://outrigger.local/ns/bank/*']}", None),
        ("{serviceAccounts: []}", None),
        ("{identities: []}", None),
        ("{namespaces: [], cidrs: [10.0.0.0/8]}", None),
        ("{}", None),
    ] {
        let rule = format!("rules: [{{action: Allow, from: [{from}]}}]");
        let resolved = of(&access("a", "shop", "kind: Namespace", &rule));
        let rules = &inbound(&resolved, "shop", "web").access.unwrap().policies[0].rules;
        assert_eq!(rules.first().map(|rule| rule.from[0].identities.len()), identities, "{from}");
    }
    for to in ["{}", "{ports: []}", "{methods: [GET], paths: []}"] {
        let rule = format!("rules: [{{action: Allow, to: [{to}]}}]");
        let resolved = of(&access("a", "shop", "kind: Namespace", &rule));
        assert!(inbound(&resolved, "shop", "web").access.unwrap().policies[0].rules.is_empty(), "{to}");
    }
}

#[test]
fn an_access_policy_is_about_its_own_namespace() {
    for (namespace, target, expected) in [
        ("shop", "kind: Mesh", "Accepted=False Invalid"),
        ("outrigger-system", "kind: Mesh", "Accepted=True Accepted"),
        ("bank", "kind: Service, name: orders", "Accepted=False TargetNotFound"),
        ("shop", "kind: Service, name: orders, port: 81", "Accepted=False TargetNotFound"),
        ("shop", "kind: Service, name: orders", "Accepted=True Accepted"),
        ("shop", "kind: Workload", "Accepted=False Invalid"),
    ] {
        let resolved = of(&access("a", namespace, target, "rules: [{action: Deny}]"));
        assert_eq!(
            conditions(&resolved, Kind::AccessPolicy, namespace, "a"),
            [expected],
            "{namespace} {target}"
        );
        let denied = inbound(&resolved, "shop", "orders").access.is_some();
        assert_eq!(denied, expected.contains("True"), "{namespace} {target}");
    }
}

#[test]
fn limits_have_a_burst_of_one_second() {
    let limits = "limits: [{per: Total, requestsPerSecond: 2.5}, {name: few, per: Caller, requestsPerSecond: 0.1, burst: 7, maxConnections: 3}]";
    let access = inbound(&of(&access("a", "shop", "kind: Namespace", limits)), "shop", "web").access.unwrap();
    let [first, second] = &access.policies[0].limits[..] else { panic!() };
    assert_eq!(
        (&*first.name, first.millirequests, first.burst, first.per()),
        ("limit 0", 2500, 3, v1::rate_limit::Per::Total)
    );
    assert_eq!((&*second.name, second.millirequests, second.burst, second.connections), ("few", 100, 7, 3));
}

#[test]
fn mesh_defaults_are_ranked_field_by_field_and_probes_add_up() {
    let text =
        defaults(
            "outrigger-system",
            "mtls: Permissive, inbound: Deny, outbound: Audit, probes: [{port: 1, path: /live}]",
        ) + &defaults("shop", "mtls: Strict, escapedSlashes: Keep, probes: [{port: 2, nodes: [10.0.0.0/8]}]");
    let resolved = of(&text);
    let (shop, bank) = (inbound(&resolved, "shop", "web"), inbound(&resolved, "bank", "pay"));
    assert_eq!((shop.mtls, bank.mtls), (v1::inbound::Mode::Strict, v1::inbound::Mode::Permissive));
    let (shop, bank) = (shop.access.unwrap(), bank.access.unwrap());
    assert_eq!(
        (shop.default(), &*shop.default_origin),
        (v1::Default::Deny, "MeshDefaults outrigger-system/default")
    );
    assert_eq!(
        (shop.escaped_slashes(), bank.escaped_slashes()),
        (v1::access::EscapedSlashes::Keep, v1::access::EscapedSlashes::Reject)
    );
    assert_eq!(
        shop.probes.iter().map(|probe| (probe.port, &*probe.method)).collect::<Vec<_>>(),
        [(1, "GET"), (2, "")]
    );
    assert_eq!(bank.probes.len(), 1);
    let own = resolved.inbound("spiffe://outrigger.local/ns/outrigger-system/sa/x", &[]).access.unwrap();
    assert_eq!(own.probes.len(), 1, "the mesh's namespace has them once");
    assert_eq!(resolved.outbound("shop").default, v1::mesh::OutboundDefault::Audit);

    let nothing = of("");
    assert_eq!(
        inbound(&nothing, "shop", "web"),
        InboundPolicy { mtls: v1::inbound::Mode::Strict, ..InboundPolicy::default() }
    );
    assert_eq!(
        nothing.outbound("shop"),
        Outbound { default: v1::mesh::OutboundDefault::Allow, origin: String::new() }
    );
    let mut catalog = catalog();
    catalog.defaults.inbound = DefaultAction::Deny;
    let access = resolve(&Policies::new(), &catalog)
        .inbound("spiffe://outrigger.local/ns/shop/sa/web", &[])
        .access
        .unwrap();
    assert_eq!((access.default(), &*access.default_origin), (v1::Default::Deny, ""));

    let named = defaults("shop", "mtls: Permissive").replace("name: default", "name: other");
    assert_eq!(conditions(&of(&named), Kind::MeshDefaults, "shop", "other"), ["Accepted=False Invalid"]);
    assert_eq!(inbound(&of(&named), "shop", "web").mtls, v1::inbound::Mode::Strict);
}

#[test]
fn concurrency_is_kept_at_the_workload_s_own_ports() {
    let text = [
        traffic("namespace", "shop", "kind: Namespace", "concurrency: {maxRequests: 1}"),
        traffic("service", "shop", "kind: Service, name: orders", "concurrency: {maxRequests: 2}"),
        traffic(
            "port",
            "shop",
            "kind: Service, name: orders, port: 80",
            "concurrency: {maxRequests: 3, adaptive: true}",
        ),
        route("HTTPRoute", "orders", "shop", "name: orders", EVERYTHING_TO_ORDERS),
        traffic("route", "shop", "kind: HTTPRoute, name: orders", "concurrency: {maxRequests: 4}"),
    ]
    .concat();
    let resolved = of(&text);
    let seen = |name: &str| {
        let concurrency = inbound(&resolved, "shop", name).concurrency;
        concurrency.into_iter().map(|c| (c.ports, c.max_requests, c.adaptive)).collect::<Vec<_>>()
    };
    assert_eq!(seen("orders"), [(vec![8080], 3, true), (vec![9090], 2, false), (vec![], 1, false)]);
    assert_eq!(seen("web"), [(vec![], 1, false)]);
    assert_eq!(
        conditions(&resolved, Kind::TrafficPolicy, "shop", "route"),
        ["Accepted=True Accepted", "PartiallyInvalid=True UnsupportedValue"]
    );
}

#[test]
fn a_mesh_has_so_many_hosts_and_says_whose_are_too_many() {
    let of_one = |number: usize| {
        let hosts: Vec<String> = (0..64).map(|host| format!("h{host}.s{number}.example")).collect();
        external(&format!("s{number}"), "shop", "HOSTS").replace("'HOSTS'", &hosts.join(", "))
    };
    let all: String = (0..64).map(of_one).collect();
    let resolved = of(&(all + &external("too-many", "shop", "more.example")));
    let hosts: usize = resolved.externals().iter().map(|external| external.hosts.len()).sum();
    assert_eq!(hosts, outrigger_api::MAX_EXTERNAL_HOSTS);
    let refused = conditions(&resolved, Kind::ExternalService, "shop", "too-many");
    assert_eq!(refused, ["Accepted=False LimitReached"]);
}

#[test]
fn nobody_takes_a_destination_from_others() {
    let text = [
        external("api", "shop", "API.example.com."),
        external("taken", "bank", "api.example.com"),
        external("web", "shop", "web.example.com"),
        external("own", "shop", "orders.shop.mesh"),
    ]
    .concat();
    let resolved = of(&text);
    let seen: Vec<_> = resolved.externals().iter().map(|e| (&*e.service, &*e.hosts[0])).collect();
    assert_eq!(seen, [("api.shop", "api.example.com")]);
    for (namespace, name, expected) in [
        ("shop", "api", "Accepted=True Accepted"),
        ("bank", "taken", "Accepted=False Conflicted"),
        ("shop", "web", "Accepted=False Conflicted"),
        ("shop", "own", "Accepted=False Invalid"),
    ] {
        assert_eq!(conditions(&resolved, Kind::ExternalService, namespace, name), [expected], "{name}");
    }
    // It is a service like any other.
    let text = text + &traffic("t", "shop", "kind: Service, name: api", "timeouts: {request: 2s}");
    assert_eq!(of(&text).service("api.shop").traffic.unwrap().timeouts.unwrap().request, Some(2000));
}

#[test]
fn what_is_too_much_together_leaves_the_youngest_out() {
    let expressions: Vec<String> =
        (0..200).map(|at| format!("{{path: {{type: RegularExpression, value: '/{at}'}}}}")).collect();
    // A rule has 64 matches at most.
    let rules: Vec<String> =
        expressions.chunks(50).map(|some| format!("{{matches: [{}]}}", some.join(", "))).collect();
    let of_name = |name: &str, namespace: &str| {
        route("HTTPRoute", name, namespace, "name: orders, namespace: shop", &rules.join(", "))
    };
    let resolved = of(&(of_name("older", "shop") + &of_name("younger", "shop") + &of_name("theirs", "bank")));
    let first =
        |namespace: &str, name: &str| conditions(&resolved, Kind::HttpRoute, namespace, name)[0].clone();
    assert_eq!(first("shop", "older"), "Accepted=True Accepted");
    assert_eq!(first("shop", "younger"), "Accepted=False LimitReached");
    assert_eq!(first("bank", "theirs"), "Accepted=False LimitReached");
    let routes = resolved.service("orders.shop").routes;
    assert_eq!(routes.iter().map(|route| &*route.name).collect::<Vec<_>>(), ["shop/older"]);
    for client in ["shop", "bank"] {
        assert!(outrigger_core::route::Routes::from_wire(&routes, client).is_ok());
    }

    let limits: Vec<String> =
        (0..20).map(|at| format!("{{name: l{at}, per: Total, requestsPerSecond: 5}}")).collect();
    // By name the younger one would be the first.
    let limited = |name: &str| {
        let deny = "{name: spy, action: Deny, from: [{namespaces: [bank]}]}";
        access(name, "shop", "kind: Namespace", &format!("rules: [{deny}], limits: [{}]", limits.join(", ")))
    };
    let resolved = of(&(limited("z-older") + &limited("a-younger")));
    let told = inbound(&resolved, "shop", "orders").access.unwrap();
    let told: Vec<_> = told.policies.iter().map(|p| (&*p.name, p.rules.len(), p.limits.len())).collect();
    assert_eq!(told, [("shop/a-younger", 1, 12), ("shop/z-older", 1, 20)]);
    assert_eq!(conditions(&resolved, Kind::AccessPolicy, "shop", "z-older"), ["Accepted=True Accepted"]);
    assert_eq!(
        conditions(&resolved, Kind::AccessPolicy, "shop", "a-younger"),
        ["Accepted=True Accepted", "PartiallyInvalid=True UnsupportedValue"]
    );
    assert_eq!(inbound(&resolved, "bank", "pay").access, None);
}

#[test]
fn probes_hold_where_everything_is_allowed() {
    let resolved = of(&defaults("shop", "probes: [{port: 80, path: /live}]"));
    let told = inbound(&resolved, "shop", "orders");
    assert_eq!(told.mtls, v1::inbound::Mode::Strict);
    let access = told.access.unwrap();
    assert_eq!((access.default(), access.probes.len()), (v1::Default::Allow, 1));
    assert_eq!(inbound(&resolved, "bank", "pay").access, None);
}
