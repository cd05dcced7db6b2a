//! What would be: differences, cases and explanations, and the exit codes that scripts branch on.

use crate::fake::Fake;

/// Everybody is refused but web, which may read; and reading may be repeated.
const POLICIES: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: {name: default, namespace: shop}
spec: {inbound: Deny}
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: orders, namespace: shop}
spec:
  targetRef: {kind: Service, name: orders}
  rules:
  - name: web-reads
    action: Allow
    from: [{serviceAccounts: [shop/web]}]
    to: [{methods: [GET]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, namespace: shop}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: 2s}
";
const CASES: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: PolicyTest
cases:
- name: web may read
  from: {service: web.shop}
  to: {service: orders.shop, port: 8080}
  request: {path: /}
  expect: {decision: Allow, policy: shop/orders, rule: web-reads, timeout: 2s}
- name: web may not write
  from: {service: web.shop}
  to: {service: orders.shop, port: 8080}
  request: {method: POST, path: /}
  expect: {decision: Deny, status: 403}
";

#[test]
fn a_difference_is_shown_in_the_text_and_in_effect() {
    let fake = Fake::start();
    fake.write("p.yaml", POLICIES);
    let new = fake.run(&["policy", "diff", "-f", "p.yaml"]);
    insta::assert_snapshot!("diff_of_new_objects", new);
    fake.run(&["policy", "apply", "-f", "p.yaml"]);
    let none = fake.run(&["policy", "diff", "-f", "p.yaml"]);
    assert_eq!((none.code, none.stdout.as_str()), (0, ""), "{none}");
    fake.write(
        "p.yaml",
        &POLICIES.replace("request: 2s", "request: 3s").replace("methods: [GET]", "methods: [GET, POST]"),
    );
    insta::assert_snapshot!("diff_of_changes", fake.run(&["policy", "diff", "-f", "p.yaml"]));
    // The same, written in another way.
    fake.write("p.yaml", &POLICIES.replace("{inbound: Deny}", "\n  inbound: \"Deny\""));
    assert_eq!(fake.run(&["policy", "diff", "-f", "p.yaml"]).code, 0);
}

#[test]
fn a_difference_that_could_not_be_found_out_has_another_exit_code() {
    let fake = Fake::start();
    fake.write("p.yaml", POLICIES);
    let unreachable = fake.run(&["policy", "diff", "-f", "p.yaml", "--server", "127.0.0.1:1"]);
    assert_eq!(unreachable.code, 2, "{unreachable}");
    let faulty = fake.run_with(&["policy", "diff", "-f", "-"], &POLICIES.replace("inbound", "inbond"));
    assert!(faulty.code == 2 && faulty.stderr.contains("standard input:4:"), "{faulty}");
}

#[test]
fn cases_are_run_without_a_controller() {
    let fake = Fake::start();
    fake.write("policies.yaml", POLICIES);
    fake.write("cases.yaml", CASES);
    let test = |arguments: &[&str]| {
        fake.run_in(&[&["policy", "test", "-f", "cases.yaml"], arguments].concat(), "", &[])
    };
    let passed = test(&["-p", "policies.yaml"]);
    assert_eq!(
        passed.stdout, "PASS  web may read\nPASS  web may not write\n2 passed, 0 failed\n",
        "{passed}"
    );
    assert_eq!(passed.code, 0);
    // Without the policies everybody may do everything.
    let failed = test(&[]);
    assert_eq!(failed.code, 1, "{failed}");
    insta::assert_snapshot!("cases_that_failed", failed);
    let junit = test(&["-p", "policies.yaml", "-o", "junit"]);
    assert!(junit.stdout.contains("tests=\"2\" failures=\"0\""), "{junit}");
    let json: serde_json::Value = serde_json::from_str(&test(&["-o", "json"]).stdout).unwrap();
    assert_eq!((&json["passed"], &json["failed"]), (&0.into(), &2.into()));
}

#[test]
fn cases_and_policies_may_share_a_file() {
    let fake = Fake::start();
    let both = format!("{POLICIES}---\n{CASES}");
    let ran = fake.run_with(&["policy", "test", "-f", "-"], &both);
    assert_eq!(ran.code, 0, "{ran}");
}

#[test]
fn cases_are_run_against_what_is_in_force_and_files_over_it() {
    let fake = Fake::start();
    fake.write("policies.yaml", POLICIES);
    fake.write("cases.yaml", CASES);
    let live = ["policy", "test", "-f", "cases.yaml", "--live"];
    assert_eq!(fake.run(&live).code, 1, "nothing is in force yet");
    fake.run(&["policy", "apply", "-f", "policies.yaml"]);
    let passed = fake.run(&live);
    assert_eq!(passed.code, 0, "{passed}");
    fake.write("wider.yaml", &POLICIES.replace("[GET]", "[GET, POST]"));
    let wider = fake.run(&[&live[..], &["-p", "wider.yaml"]].concat());
    assert!(wider.code == 1 && wider.stdout.contains("FAIL  web may not write"), "{wider}");
}

#[test]
fn a_test_that_cannot_be_run_is_neither_passed_nor_failed() {
    let fake = Fake::start();
    fake.write("policies.yaml", POLICIES);
    fake.write("cases.yaml", CASES);
    let no_cases = fake.run(&["policy", "test", "-f", "policies.yaml"]);
    assert_eq!(no_cases.code, 2, "{no_cases}");
    let unreachable = fake.run(&["policy", "test", "-f", "cases.yaml", "--live", "--server", "127.0.0.1:1"]);
    assert_eq!(unreachable.code, 2, "{unreachable}");
    let faulty =
        fake.run_with(&["policy", "test", "-f", "-"], &CASES.replace("decision: Deny", "decision: No"));
    assert!(faulty.code == 2 && faulty.stderr.contains("standard input:13:"), "{faulty}");
}

#[test]
fn services_of_a_test_can_come_from_a_file() {
    let fake = Fake::start();
    fake.write("cases.yaml", &CASES.replace("port: 8080", "port: 9"));
    fake.write("policies.yaml", POLICIES);
    let catalog = r#"{"trustDomain": "outrigger.local", "meshNamespace": "outrigger-system",
        "defaults": {"mtls": "Strict", "inbound": "Allow", "outbound": "Allow"}, "services": []}"#;
    fake.write("catalog.json", catalog);
    let test = ["policy", "test", "-f", "cases.yaml", "-p", "policies.yaml"];
    assert_eq!(fake.run(&test).code, 0, "what the cases name is there");
    let ran = fake.run(&[&test[..], &["--catalog", "catalog.json"]].concat());
    assert!(ran.code == 1 && ran.stdout.contains("no workload in the catalog"), "{ran}");
}

#[test]
fn a_request_is_explained_decision_by_decision() {
    let fake = Fake::start();
    fake.write("p.yaml", POLICIES);
    fake.run(&["policy", "apply", "-f", "p.yaml"]);
    let explain = |arguments: &[&str]| {
        fake.run(&[&["policy", "explain", "-n", "shop", "--to", "orders"], arguments].concat())
    };
    insta::assert_snapshot!("explain_allowed", explain(&["--from", "web", "--header", "X-Try: 1"]));
    insta::assert_snapshot!(
        "explain_refused",
        explain(&["--from", "shop/web", "--method", "POST", "--path", "/pay"])
    );
    let bytes = explain(&["--from", "web.shop", "--tcp", "-o", "json"]);
    let bytes: serde_json::Value = serde_json::from_str(&bytes.stdout).unwrap();
    assert_eq!(bytes["outcome"]["decision"], "Deny");
    // As it would be with a file applied.
    fake.write("wider.yaml", &POLICIES.replace("[GET]", "[GET, POST]"));
    let wider = explain(&["--from", "web", "--method", "POST", "-f", "wider.yaml", "-o", "yaml"]);
    assert!(wider.stdout.contains("decision: Allow"), "{wider}");
    let nowhere = fake.run(&["policy", "explain", "--from", "ghost", "--to", "orders.shop"]);
    assert!(nowhere.code == 1 && nowhere.stderr.contains("ghost.default has no workload"), "{nowhere}");
    assert_eq!(explain(&["--header", "no colon"]).code, 1);
}
