use std::fmt::Write as _;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::object::Spec;

fn faults(text: &str) -> String {
    match parse_with_tests("p.yaml", text, "default") {
        Ok(_) => panic!("taken:\n{text}"),
        Err(faults) => faults.iter().map(|fault| format!("{fault}\n")).collect::<Vec<_>>().concat(),
    }
}

fn objects(text: &str) -> Vec<Object> {
    let parsed = parse("p.yaml", text, "shop");
    parsed.unwrap_or_else(|faults| panic!("{faults:#?}")).into_iter().map(|parsed| parsed.object).collect()
}

const GOOD: &str = r#"
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: {name: default, namespace: outrigger-system}
spec:
  mtls: Strict
  inbound: Deny
  outbound: Audit
  escapedSlashes: Reject
  probes: [{port: 8080, path: /healthz}, {port: 5432, nodes: [10.0.0.0/24]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: pay}
spec:
  targetRef: {kind: HTTPRoute, name: pay, sectionName: rule-0}
  timeouts: {request: 1m30s, perTry: 250ms, idle: 0s}
  retry:
    attempts: 2
    on: [5xx, gateway-error, reset, connect-failure, per-try-timeout, 429, unavailable]
    unsafeMethods: true
    backoff: {base: 25ms, max: 250ms}
    budget: {percent: 20, minPerSecond: 10}
    maxBodyBytes: 65536
  hedge: {after: 100ms}
  fault: {delay: {duration: 1s, percent: 0.5}, abort: {grpcStatus: 14, percent: 100}}
  loadBalancer:
    algorithm: RingHash
    hash: [{header: x-user}, {cookie: session}, {query: user}, {source: true}]
    slowStart: 30s
    zone: {minHealthyPercent: 70}
  circuitBreaker:
    consecutiveFailures: 0
    successRate: {percent: 90, window: 10s, minRequests: 20}
    slow: 2s
    ejection: {base: 5s, max: 1m, maxPercent: 50}
  bulkhead: {maxConnections: 10, maxPending: 10, maxRequests: 100, maxStreams: 100}
  healthCheck: {path: "/ready?deep=1", interval: 5s, timeout: 1s, healthy: 1, unhealthy: 3}
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: orders, labels: {app.kubernetes.io/name: orders}}
spec:
  targetRef: {kind: Service, name: orders, port: 80}
  rules:
    - name: web
      action: Allow
      from:
        - identities: ["spiffe://outrigger.local/ns/shop/sa/*"]
        - {namespaces: [shop], cidrs: [10.0.0.0/8]}
        - serviceAccounts: [shop/web]
      to:
        - methods: [GET]
          paths: [{type: PathPrefix, value: /orders}]
          headers: [{name: x-a, type: Present}, {name: x-b, value: "1"}]
        - grpc: [{service: shop.Orders, method: Get}]
    - {action: Deny, from: [{unauthenticated: true}]}
  limits:
    - {name: all, per: Total, requestsPerSecond: 0.5, burst: 2}
    - {per: Caller, maxConnections: 5}
    - {per: Header, header: x-tenant, requestsPerSecond: 10}
---
apiVersion: outrigger.dev/v1alpha1
kind: ExternalService
metadata: {name: stripe}
spec:
  hosts: [api.stripe.com]
  ports: [{port: 443, name: https, protocol: TCP}]
  endpoints: [{address: 192.0.2.1, zone: a, weight: 2}, {address: "2001:db8::1"}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: pay}
spec:
  parentRefs: [{group: "", kind: Service, name: orders, port: 80}]
  rules:
    - name: pay
      matches:
        - path: {type: PathPrefix, value: /pay}
          headers: [{name: x-beta, value: "true"}]
          queryParams: [{type: RegularExpression, name: v, value: "[12]"}]
          method: POST
      filters:
        - type: RequestHeaderModifier
          requestHeaderModifier: {set: [{name: x-a, value: b}], add: [{name: x-c, value: d}], remove: [x-e]}
        - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}
        - {type: RequestMirror, requestMirror: {backendRef: {name: shadow, port: 80}, fraction: {numerator: 1, denominator: 1000}}}
      backendRefs: [{name: pay-v2, port: 80, weight: 10}, {name: pay, port: 80, weight: 90}]
      timeouts: {request: 2s, backendRequest: 500ms}
      retry: {codes: [503], attempts: 2, backoff: 50ms}
    - filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: charge}
spec:
  parentRefs: [{group: "", kind: Service, name: orders}]
  rules:
    - matches: [{method: {service: shop.Pay, method: Charge}, headers: [{name: x-a, value: b}]}]
      backendRefs: [{name: pay, port: 80}]
"#;

#[test]
fn one_of_each_kind_is_read() {
    let objects = objects(GOOD);
    let keys: Vec<String> = objects.iter().map(|object| object.key().to_string()).collect();
    let expected = [
        "MeshDefaults outrigger-system/default",
        "TrafficPolicy shop/pay",
        "AccessPolicy shop/orders",
        "ExternalService shop/stripe",
        "HTTPRoute shop/pay",
        "GRPCRoute shop/charge",
    ];
    assert_eq!(keys, expected);
    for object in &objects {
        assert_eq!(self::objects(&object.to_yaml()), std::slice::from_ref(object));
        let json = serde_json::to_string(object).unwrap();
        assert_eq!(serde_json::from_str::<Object>(&json).unwrap(), *object);
        // JSON is YAML.
        assert_eq!(self::objects(&json), std::slice::from_ref(object));
    }
}

#[test]
fn what_the_server_adds_is_no_fault() {
    let objects = objects(
        r#"
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata:
  name: default
  generation: 3
  resourceVersion: "17"
  uid: 7b1f
  creationTimestamp: 2026-11-25T10:00:00Z
  managedFields: [{manager: kubectl}]
  ownerReferences: []
spec: {mtls: Strict}
status: {conditions: [{type: Accepted, status: "True"}], proxies: 7}
"#,
    );
    let metadata = &objects[0].metadata;
    assert_eq!((metadata.generation, metadata.resource_version.as_deref()), (Some(3), Some("17")));
}

#[test]
fn a_file_without_an_object_is_none() {
    for text in ["", "\n", "# only words\n", "---\n---\n", "null\n"] {
        assert!(objects(text).is_empty(), "{text:?}");
    }
}

#[test]
fn a_test_is_read_beside_objects_and_refused_among_them() {
    let text = r"
kind: PolicyTest
cases:
  - name: web may read
    from: {identity: shop/web}
    to: {service: orders.shop, port: 80}
    request: {path: /orders, headers: {x-a: b}}
    expect: {decision: Allow, policy: shop/orders, rule: web, retries: 2, timeout: 2s}
";
    let documents = parse_with_tests("t.yaml", &format!("{text}---{GOOD}"), "shop").unwrap();
    assert_eq!((documents.objects.len(), documents.tests.len()), (6, 1));
    let fault = documents.tests[0].fault(0, "expected Allow, got Deny").to_string();
    assert_eq!(fault, "t.yaml:4:5: cases[0]: expected Allow, got Deny");
    insta::assert_snapshot!(parse("t.yaml", text, "shop").unwrap_err()[0]);
}

#[test]
fn later_findings_have_a_place_too() {
    let parsed = parse("p.yaml", GOOD, "shop").unwrap();
    for (path, stands) in [
        ("spec.rules[0].from[1].cidrs[0]", "10.0.0.0/8]}"),
        ("metadata.labels[\"app.kubernetes.io/name\"]", "app.kubernetes.io/name: orders}"),
        ("spec.targetRef", "targetRef: {kind: Service, name: orders"),
        // What is not there is where it would be.
        ("spec.rules[1].name", "{action: Deny, "),
        ("spec.mode", "spec:"),
        ("", "apiVersion:"),
    ] {
        let fault = parsed[2].fault(path, "no");
        let line = GOOD.lines().nth(usize::try_from(fault.line).unwrap() - 1).unwrap();
        let rest: String = line.chars().skip(usize::try_from(fault.column).unwrap() - 1).collect();
        assert!(rest.starts_with(stands), "{fault}: {rest}");
    }
}

#[test]
fn all_faults_of_a_file_are_told_at_once() {
    insta::assert_snapshot!(faults(
        r#"
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: Pay, labels: {version: 1}}
spec:
  targetRef: {kind: Servce, name: orders}
  timeout: {request: 2s}
  timeouts: {request: 2, perTry: 1 minute, idle: 2000h}
  retry: {attempts: 70000000000, on: [4xx, 200, reset], on: [reset], unsafeMethods: yes}
  hedge: {}
  fault: {delay: {duration: 1s, percent: 0.00001}, abort: {grpcStatus: nope, percent: 101}}
  loadBalancer: [RingHash]
  bulkhead:
---
apiVersion: outrigger.dev/v1
kind: AccessPolicy
metadata: {name: orders}
spec:
  targetRef: {kind: Workload}
  rules:
    - {action: allow}
    - {action: Allow, from: []}
    - {action: Allow, from: [{}]}
    - {action: Allow, from: [{identities: []}, {unauthenticated: false}], to: [{ports: [0, 80]}, {methods: [get]}]}
    - {action: Allow, from: [{identities: ["spiffe://a/ns/b", "spiffe://a/ns/b/sa/c*d"], cidrs: [10.0.0.1/8, 10.0.0.1, ten]}]}
    - {action: Deny, to: [{paths: [{type: RegularExpression, value: "a("}, {type: Exact, value: a//b}, {type: PathPrefix, value: "/a//b"}]}]}
  limits: [{per: Header}, {per: Total, maxConnections: 1, burst: 0}]
---
kind: Service
---
[1, 2]
---
apiVersion: v1
---
kind: 7
---
kind: accesspolicy
"#
    ));
}

#[test]
fn an_item_that_is_put_aside_does_not_move_the_others() {
    let faults = faults(
        r"
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: a}
spec:
  targetRef: {kind: Namespace}
  rules:
    - {action: allow}
    - {action: Allow}
    - {action: Deny, from: []}
",
    );
    let lines: Vec<&str> = faults.lines().collect();
    assert!(lines[0].starts_with("p.yaml:8:8: spec.rules[0].action: "), "{faults}");
    assert!(lines[1].starts_with("p.yaml:10:22: spec.rules[2].from: "), "{faults}");
    assert_eq!(lines.len(), 2);
}

#[test]
fn the_gateway_apis_rules_hold_outside_of_a_cluster() {
    insta::assert_snapshot!(faults(
        r#"
apiVersion: gateway.networking.k8s.io/v1beta1
kind: HTTPRoute
metadata: {name: pay}
spec:
  parentRefs: [{name: orders}]
  useDefaultGateways: All
  hostnames: [Shop.example.com]
  rules:
    - name: a
      matches: [{path: {value: /a}}, {path: {type: Exact, value: /b/../c}}, {method: GRAB}, {headers: [{name: ":path", value: x}]}]
      filters:
        - {type: CORS, cors: {maxAge: 5}}
        - {type: ExtensionRef, extensionRef: {group: x, kind: Y, name: z}}
        - {type: RequestRedirect, urlRewrite: {hostname: a.b}}
        - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}}
        - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: a}, {name: transfer-encoding, value: chunked}, {name: outrigger-reason, value: x}]}}
        - {type: RequestMirror, requestMirror: {backendRef: {name: b, port: 80}, percent: 5, fraction: {numerator: 2, denominator: 1}}}
      backendRefs:
        - {name: pay}
        - {name: pay, port: 80, weight: 1000001, filters: [{type: RequestRedirect, requestRedirect: {port: 0}}]}
        - {kind: Pod, group: "", name: pay}
      timeouts: {request: 1s, backendRequest: 2s}
      retry: {codes: [200], attempts: 11}
      sessionPersistence: {sessionName: x}
    - {name: a}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: pay}
spec:
  rules:
    - matches: [{method: {}}, {method: {service: "a b"}}, {path: {value: /a}}]
      filters: [{type: URLRewrite}]
"#
    ));
}

#[test]
fn text_that_is_no_yaml_says_where() {
    for (name, text) in [
        ("tab", "kind:\n\t- a\n"),
        ("unclosed", "kind: [a, b\n"),
        ("key", "kind: a\n  b: c\n"),
        ("control", "kind: \"a\u{1}\"\n"),
    ] {
        insta::assert_snapshot!(format!("no_yaml_{name}"), faults(text));
    }
}

#[test]
fn duplicate_keys_are_told_with_the_first_ones_line() {
    insta::assert_snapshot!(faults(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshDefaults\nmetadata: {name: default}\nspec: {mtls: Strict}\nspec: {mtls: Permissive}\n"
    ));
}

#[test]
fn the_same_object_twice_is_a_fault() {
    let one = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshDefaults\nmetadata: {name: default}\nspec: {mtls: Strict}\n";
    insta::assert_snapshot!(faults(&format!("{one}---\n{one}")));
}

/// An object of one document as it is read, without checks.
fn unchecked(text: &str) -> Result<Object, String> {
    let trees = read("p.yaml", text).map_err(|fault| fault.to_string())?;
    let kind = trees[0].text("kind").unwrap_or_default().parse().map_err(|_| "no kind".to_owned())?;
    object::deserialize_as(kind, &trees[0]).map_err(|error| format!("{}: {error}", path_text(&error.path())))
}

/// Longer than anything here may take, in a debug build on a busy machine.
const BOUND: Duration = Duration::from_secs(10);

fn hostile(text: &str) -> Vec<Fault> {
    let start = Instant::now();
    let faults = parse("h.yaml", text, "default").expect_err("taken");
    assert!(start.elapsed() < BOUND, "took {:?}", start.elapsed());
    assert!(faults.len() <= MAX_FAULTS + 1, "{}", faults.len());
    let bytes: usize = faults.iter().map(|fault| fault.to_string().len()).sum();
    assert!(bytes < 100_000, "{bytes} bytes of faults");
    faults
}

#[test]
fn aliases_come_to_no_more_than_their_bound() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let refer = vec![format!("*a{}", level - 1); 10].join(", ");
        writeln!(bomb, "a{level}: &a{level} [{refer}]").unwrap();
    }
    bomb.push_str("kind: MeshDefaults\n");
    let faults = hostile(&bomb);
    assert!(faults[0].message.starts_with("is not read as YAML"), "{}", faults[0]);
    // A few are fine.
    let text = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshDefaults\nmetadata: {name: default}\nspec: {inbound: &a Deny, outbound: *a}\n";
    assert!(matches!(&objects(text)[0].spec, Spec::MeshDefaults(spec) if spec.inbound == spec.outbound));
}

#[test]
fn deep_nesting_ends() {
    for depth in [100, 100_000] {
        for (open, close) in [("[", "]"), ("{a: ", "}")] {
            let text = format!("kind: {}x{}\n", open.repeat(depth), close.repeat(depth));
            assert!(hostile(&text)[0].message.starts_with("is not read as YAML"));
        }
        let dashes = "- ".repeat(depth);
        assert!(hostile(&format!("{dashes}x\n"))[0].message.starts_with("is not read as YAML"));
    }
}

#[test]
fn a_mebibyte_of_anything_costs_bounded_time() {
    const MIB: usize = 1 << 20;
    let head = "apiVersion: outrigger.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: a}\nspec:\n  targetRef: {kind: Namespace}\n";
    let fill = |line: &str| line.repeat(MIB / line.len());
    let unknown = (0..40_000).map(|number| format!("  field-{number}: 1\n")).collect::<Vec<_>>().concat();
    for text in [
        format!("{head}  rules: [{}]\n", fill("{a: 1}, ")),
        format!("{head}  rules: [{}]\n", fill("{action: Allow, from: []}, ")),
        format!("{head}{unknown}"),
        format!("{head}{}", fill("  rules: []\n")),
        format!("{head}  rules: {}\n", fill("a")),
        format!("kind: {}\n", fill("é")),
        format!("{}: 1\n", fill("k")),
        fill("---\nkind: X\n"),
        fill("- a\n"),
        fill("&a "),
        fill("? "),
        fill("\u{0}"),
        fill("# c\n") + "x: 1\n",
        "a".repeat(MAX_BYTES + 1),
    ] {
        hostile(&text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_text_makes_it_panic(text in any::<String>(), yaml in "[a-z:\\[\\]{}&*!|>'\"#%@,\\-?~ \n\t0-9.]{0,200}") {
        let _ = parse("p.yaml", &text, "default");
        let _ = parse("p.yaml", &yaml, "default");
        let _ = parse("p.yaml", &format!("kind: AccessPolicy\nspec:\n  {yaml}\n"), "default");
    }

    #[test]
    fn no_change_of_a_good_file_makes_it_panic(at in 0..GOOD.len(), cut in 0..40_usize, put in "[\\PC\n]{0,6}") {
        let end = (at + cut).min(GOOD.len());
        let text = format!("{}{put}{}", &GOOD[..at], &GOOD[end..]);
        if let Err(faults) = parse("p.yaml", &text, "default") {
            prop_assert!(!faults.is_empty());
        }
    }
}

mod roundtrip;
