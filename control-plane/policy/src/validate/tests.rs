use std::sync::Arc;

use super::*;
use crate::catalog::{CatalogEndpoint, CatalogHealth, CatalogPort};
use crate::kinds::DefaultAction;
use crate::object::Stored;

fn catalog() -> Catalog {
    let service = |name: &str, protocol, identity: Option<&str>, last| CatalogService {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        ports: vec![CatalogPort { port: 80, name: "main".to_owned(), protocol }],
        endpoints: vec![CatalogEndpoint {
            id: name.to_owned(),
            address: std::net::IpAddr::from([10, 0, 0, last]),
            ports: BTreeMap::from([(80, 8080)]),
            identity: identity.map(str::to_owned),
            zone: String::new(),
            health: CatalogHealth::Healthy,
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            probes: Vec::new(),
        }],
    };
    let mut catalog = Catalog {
        services: vec![
            service("orders", CatalogProtocol::Http1, Some("spiffe://outrigger.local/ns/shop/sa/orders"), 1),
            service("db", CatalogProtocol::Tcp, Some("spiffe://outrigger.local/ns/shop/sa/db"), 2),
            service("legacy", CatalogProtocol::Detect, None, 3),
        ],
        ..Catalog::default()
    };
    catalog.defaults.inbound = DefaultAction::Deny;
    catalog
}

fn objects(text: &str) -> Vec<Object> {
    let parsed = crate::parse("p.yaml", text, "shop").unwrap_or_else(|faults| panic!("{faults:#?}"));
    parsed.into_iter().map(|parsed| parsed.object).collect()
}

fn kept(text: &str) -> Policies {
    let stored = |object| Stored { object, revision: 1, created: 1, updated: 1, author: String::new() };
    objects(text).into_iter().map(|object| (object.key(), Arc::new(stored(object)))).collect()
}

fn told(text: &str, before: &str, catalog: &Catalog) -> String {
    lines(&validate(&objects(text), &[], &kept(before), catalog))
}

/// What is told when these go.
fn told_of_deletion(deleted: &[&str], before: &str, catalog: &Catalog) -> String {
    let deleted: Vec<Key> = deleted.iter().map(|key| key.parse().unwrap()).collect();
    lines(&validate(&[], &deleted, &kept(before), catalog))
}

fn lines(findings: &Findings) -> String {
    let lines = |kind: &str, findings: &[Finding]| -> String {
        findings.iter().map(|finding| format!("{kind} {finding}\n")).collect::<Vec<_>>().concat()
    };
    lines("error", &findings.errors) + &lines("warning", &findings.warnings)
}

fn policy(kind: &str, name: &str, spec: &str) -> String {
    let version =
        if kind.ends_with("Route") { crate::kind::GATEWAY_API_VERSION } else { crate::kind::API_VERSION };
    format!("---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n")
}

const ROUTE: &str = "{parentRefs: [{group: \"\", kind: Service, name: orders}], rules: [{name: pay, backendRefs: [{name: orders, port: 80}]}]}";

#[test]
fn what_is_sound_is_told_nothing() {
    let text = [
        policy("HTTPRoute", "r", ROUTE),
        policy(
            "TrafficPolicy",
            "a",
            "{targetRef: {kind: Service, name: orders, port: 80}, retry: {attempts: 1}}",
        ),
        policy(
            "TrafficPolicy",
            "b",
            "{targetRef: {kind: HTTPRoute, name: r, sectionName: pay}, retry: {attempts: 1}}",
        ),
        policy(
            "TrafficPolicy",
            "c",
            "{targetRef: {kind: HTTPRoute, name: r, sectionName: rule-0}, retry: {attempts: 1}}",
        ),
        policy(
            "AccessPolicy",
            "a",
            "{targetRef: {kind: Service, name: orders}, rules: [{action: Allow, from: [{namespaces: [shop]}]}]}",
        ),
        policy(
            "AccessPolicy",
            "b",
            "{targetRef: {kind: Workload, labels: {app: db}, port: 5432}, rules: [{action: Deny, from: [{identities: ['spiffe://*']}]}]}",
        ),
        policy("ExternalService", "e", "{hosts: [a.example.com], ports: [{port: 443, protocol: TCP}]}"),
    ];
    assert_eq!(told(&text.concat(), "", &catalog()), "");
}

#[test]
fn references_that_lead_nowhere_are_told() {
    let text = [
        policy(
            "HTTPRoute",
            "a",
            "{parentRefs: [{group: '', kind: Service, name: ordrs}], rules: [{backendRefs: [{name: pay, port: 80}, {name: orders, port: 81}]}]}",
        ),
        policy(
            "HTTPRoute",
            "b",
            "{parentRefs: [{group: '', kind: Service, name: orders, port: 81}, {group: '', kind: Service, name: orders, sectionName: web}, {group: '', kind: Service, name: db}]}",
        ),
        policy(
            "HTTPRoute",
            "c",
            "{parentRefs: [{group: '', kind: Service, name: orders, namespace: other}]}",
        ),
        policy("TrafficPolicy", "a", "{targetRef: {kind: Mesh}, retry: {attempts: 1}}"),
        policy("TrafficPolicy", "b", "{targetRef: {kind: Service, name: nobody}, retry: {attempts: 1}}"),
        policy(
            "TrafficPolicy",
            "c",
            "{targetRef: {kind: Service, name: orders, port: 81}, retry: {attempts: 1}}",
        ),
        policy(
            "TrafficPolicy",
            "d",
            "{targetRef: {kind: Service, name: db}, retry: {attempts: 1}, hedge: {after: 1s}}",
        ),
        policy(
            "TrafficPolicy",
            "e",
            "{targetRef: {kind: HTTPRoute, name: a, sectionName: rule-1}, retry: {attempts: 1}}",
        ),
        policy("TrafficPolicy", "f", "{targetRef: {kind: GRPCRoute, name: a}, retry: {attempts: 1}}"),
    ];
    insta::assert_snapshot!(told(&text.concat(), "", &catalog()));
}

#[test]
fn rules_without_effect_are_told() {
    let allow =
        policy("AccessPolicy", "a", "{targetRef: {kind: Namespace}, rules: [{name: web, action: Allow}]}");
    let mut open = catalog();
    open.defaults.inbound = DefaultAction::Allow;
    insta::assert_snapshot!(told(&allow, "", &open));
    let closed = policy("MeshDefaults", "default", "{inbound: Deny}");
    assert!(!told(&allow, &closed, &open).contains("allows what the default"));

    let text = [
        policy(
            "AccessPolicy",
            "b",
            "{targetRef: {kind: Service, name: db}, rules: [{action: Allow, to: [{methods: [GET]}]}, {action: Deny, to: [{paths: [{type: Exact, value: /}]}]}], limits: [{per: Total, requestsPerSecond: 1}]}",
        ),
        policy(
            "AccessPolicy",
            "c",
            "{targetRef: {kind: Service, name: legacy}, rules: [{action: Deny, from: [{identities: ['spiffe://other/ns/shop/sa/*']}]}]}",
        ),
        policy(
            "AccessPolicy",
            "d",
            "{targetRef: {kind: Workload, labels: {app: none}}, rules: [{action: Deny}]}",
        ),
        policy("AccessPolicy", "e", "{targetRef: {kind: Mesh}, rules: [{action: Deny}]}"),
        policy("AccessPolicy", "f", "{targetRef: {kind: Service, name: x}, rules: [{action: Deny}]}"),
        policy("ExternalService", "x", "{hosts: [a.example.com], ports: [{port: 443, protocol: TCP}]}"),
        policy("ExternalService", "orders", "{hosts: [a.example.com], ports: [{port: 443, protocol: TCP}]}"),
        policy("MeshDefaults", "default", "{mtls: Strict, inbound: Deny}"),
    ];
    insta::assert_snapshot!(told(&text.concat(), "", &catalog()));
}

#[test]
fn of_two_with_one_target_the_older_one_counts() {
    let of =
        |name: &str| policy("TrafficPolicy", name, "{targetRef: {kind: Namespace}, retry: {attempts: 1}}");
    insta::assert_snapshot!(told(&of("a"), &of("z"), &catalog()));
    insta::assert_snapshot!(told(&of("z"), &(of("z") + &of("a")), &catalog()));
    // A policy does not conflict with what it replaces.
    assert_eq!(told(&of("a"), &of("a"), &catalog()), "");
}

#[test]
fn objects_that_no_file_was_parsed_for_are_checked_alone_too() {
    let mut object = objects(&policy("MeshDefaults", "default", "{mtls: Strict}")).remove(0);
    object.metadata.namespace = String::new();
    object.metadata.name = "other".to_owned();
    let findings = validate(&[object.clone(), object], &[], &Policies::new(), &catalog());
    let paths: Vec<&str> = findings.errors.iter().map(|finding| &*finding.path).collect();
    assert_eq!(paths, ["", "metadata.namespace", "metadata.name"]);
}

#[test]
fn what_a_deletion_takes_from_others_is_told() {
    let world = [
        policy("HTTPRoute", "r", ROUTE),
        policy(
            "HTTPRoute",
            "out",
            "{parentRefs: [{group: '', kind: Service, name: orders}], rules: [{backendRefs: [{name: orders, port: 80}, {name: partner, port: 80}]}]}",
        ),
        policy("TrafficPolicy", "on-r", "{targetRef: {kind: HTTPRoute, name: r, sectionName: pay}, retry: {attempts: 1}}"),
        policy("TrafficPolicy", "on-partner", "{targetRef: {kind: Service, name: partner}, retry: {attempts: 1}}"),
        policy("TrafficPolicy", "on-orders", "{targetRef: {kind: Service, name: orders}, retry: {attempts: 1}}"),
        policy("ExternalService", "partner", "{hosts: [a.example.com], ports: [{port: 80, protocol: HTTP}]}"),
        policy("MeshDefaults", "default", "{inbound: Deny, outbound: Deny}"),
        policy("AccessPolicy", "a", "{targetRef: {kind: Namespace}, rules: [{name: web, action: Allow}]}"),
        policy("AccessPolicy", "b", "{targetRef: {kind: Namespace}, rules: [{name: web, action: Deny}]}"),
    ]
    .concat();
    let mut catalog = catalog();
    catalog.defaults.inbound = DefaultAction::Allow;
    let told = |deleted: &[&str]| told_of_deletion(deleted, &world, &catalog);
    insta::assert_snapshot!(
        [
            "HTTPRoute shop/r",
            "ExternalService shop/partner",
            "MeshDefaults shop/default",
            "AccessPolicy shop/a",
        ]
        .map(|key| told(&[key]))
        .concat()
    );
    // Nothing stays that would miss it.
    assert_eq!(told(&["HTTPRoute shop/r", "TrafficPolicy shop/on-r"]), "");
    for key in ["TrafficPolicy shop/on-orders", "AccessPolicy shop/b", "HTTPRoute shop/out"] {
        assert_eq!(told(&[key]), "");
    }
}
