//! Policies: written, read, taken back, and what goes wrong with that.

use crate::fake::{Fake, Ran};

const ACCESS: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: orders, namespace: shop}
spec:
  targetRef: {kind: Service, name: orders}
  rules:
  - name: web
    action: Allow
    from: [{serviceAccounts: [shop/web]}]
    to: [{methods: [GET]}]
";
const TRAFFIC: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, labels: {fate: refused}}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: 2s}
  retry: {attempts: 2, on: [5xx]}
";

fn applied() -> Fake {
    let fake = Fake::start();
    fake.write("p/access.yaml", ACCESS);
    fake.write("p/traffic.yml", TRAFFIC);
    fake.write("p/notes.txt", "not one of them");
    let ran = fake.run(&["policy", "apply", "-f", "p", "-n", "shop"]);
    assert_eq!(ran.code, 0, "{ran}");
    fake
}

/// Without the moments at which things happened.
fn timeless(ran: Ran) -> Ran {
    let is_moment = |line: &&str| !line.starts_with("Created:") && !line.starts_with("Updated:");
    let stdout = ran.stdout.lines().filter(is_moment).map(|line| line.to_owned() + "\n").collect();
    Ran { stdout, ..ran }
}

#[test]
fn a_folder_is_applied_as_one_and_again_changes_nothing() {
    let fake = Fake::start();
    fake.write("p/access.yaml", ACCESS);
    fake.write("p/traffic.yml", TRAFFIC);
    let apply = ["policy", "apply", "-f", "p", "-n", "shop"];
    let dry = fake.run(&[&apply[..], &["--dry-run"]].concat());
    insta::assert_snapshot!("apply_dry_run", dry);
    assert_eq!(fake.run(&["policy", "get", "-A"]).stdout, "none\n", "a dry run writes nothing");
    assert!(fake.run(&apply).stdout.contains("AccessPolicy shop/orders created"));
    assert!(fake.run(&apply).stdout.contains("AccessPolicy shop/orders unchanged"));
    let names = fake.run(&[&apply[..], &["-o", "name"]].concat()).stdout;
    assert_eq!(names, "AccessPolicy/shop/orders\nTrafficPolicy/shop/orders\n");
}

#[test]
fn what_the_files_do_not_hold_goes_where_it_is_asked_for() {
    let fake = applied();
    fake.run_with(&["policy", "apply", "-f", "-"], &ACCESS.replace("namespace: shop", "namespace: bank"));
    let access = fake.run(&["policy", "get", "ap/shop/orders", "-o", "yaml"]).stdout;
    fake.write("access.yaml", &access);

    // The context's namespace is not enough to have things deleted.
    let unnamed = fake.run(&["policy", "apply", "-f", "access.yaml", "--prune"]);
    assert_eq!(unnamed.code, 2, "{unnamed}");
    assert!(
        unnamed.stderr.contains("--namespace") && unnamed.stderr.contains("--all-namespaces"),
        "{unnamed}"
    );
    let alone = fake.run(&["policy", "apply", "-f", "access.yaml", "-A"]);
    assert_eq!(alone.code, 2, "{alone}");

    let prune = ["policy", "apply", "-f", "access.yaml", "--prune", "-n", "shop"];
    let dry = fake.run(&[&prune[..], &["--dry-run"]].concat());
    assert_eq!(
        dry.stdout,
        "AccessPolicy shop/orders unchanged (dry run)\nTrafficPolicy shop/orders deleted (dry run)\n",
        "{dry}"
    );
    assert_eq!(
        fake.run(&prune).stdout,
        "AccessPolicy shop/orders unchanged\nTrafficPolicy shop/orders deleted\n"
    );
    let left = fake.run(&["policy", "get", "-A", "-o", "name"]).stdout;
    assert_eq!(
        left, "AccessPolicy/bank/orders\nAccessPolicy/shop/orders\n",
        "of another namespace nothing goes"
    );

    let everywhere = fake.run(&["policy", "apply", "-f", "access.yaml", "--prune", "-A"]);
    assert!(everywhere.stdout.contains("AccessPolicy bank/orders deleted\n"), "{everywhere}");
    assert_eq!(fake.run(&["policy", "get", "-A", "-o", "name"]).stdout, "AccessPolicy/shop/orders\n");
}

#[test]
fn standard_input_and_several_files_are_taken() {
    let fake = Fake::start();
    fake.write("traffic.yaml", TRAFFIC);
    let ran = fake.run_with(&["policy", "apply", "-f", "-", "-f", "traffic.yaml", "-n", "shop"], ACCESS);
    assert_eq!(ran.stdout, "AccessPolicy shop/orders created\nTrafficPolicy shop/orders created\n", "{ran}");
}

#[test]
fn every_fault_of_every_file_is_told_and_nothing_is_written() {
    let fake = Fake::start();
    fake.write("p/a.yaml", &ACCESS.replace("action: Allow", "action: Maybe"));
    fake.write("p/b.yaml", &TRAFFIC.replace("timeouts", "timeout"));
    let ran = fake.run(&["policy", "apply", "-f", "p", "-n", "shop"]);
    assert_eq!(ran.code, 1, "{ran}");
    assert!(ran.stderr.contains("p/a.yaml:8:") && ran.stderr.contains("p/b.yaml:6:"), "{ran}");
    assert_eq!(fake.run(&["policy", "get", "-A"]).stdout, "none\n");
}

#[test]
fn one_object_in_two_files_is_a_fault() {
    let fake = Fake::start();
    fake.write("p/a.yaml", ACCESS);
    fake.write("p/b.yaml", ACCESS);
    insta::assert_snapshot!(fake.run(&["policy", "apply", "-f", "p"]));
}

#[test]
fn a_fault_that_the_controller_finds_has_its_place_in_the_file() {
    let fake = Fake::start();
    fake.write("a.yaml", &ACCESS.replace("Service, name: orders", "Service, name: nowhere"));
    insta::assert_snapshot!(fake.run(&["policy", "apply", "-f", "a.yaml"]));
}

#[test]
fn warnings_go_to_standard_error() {
    let fake = Fake::start();
    let audit = ACCESS.replace("  rules:", "  mode: Audit\n  rules:");
    let ran = fake.run_with(&["policy", "apply", "-f", "-"], &audit);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "AccessPolicy shop/orders created\n"), "{ran}");
    assert_eq!(ran.stderr, "warning: standard input:6:3: spec.mode: nothing is refused by it\n", "{ran}");
}

#[test]
fn each_doubt_is_told_once() {
    let fake = Fake::start();
    let text =
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshDefaults\nmetadata: {name: default}\nspec: {}\n";
    for command in [
        &["policy", "validate", "-f", "-"][..],
        &["policy", "validate", "-f", "-", "--live"],
        &["policy", "diff", "-f", "-"],
        &["policy", "apply", "-f", "-"],
    ] {
        let ran = fake.run_with(command, text);
        assert_eq!(ran.stderr, "warning: standard input:4:1: spec: says nothing\n", "{command:?}: {ran}");
    }
}

#[test]
fn what_others_lose_by_a_deletion_is_told_and_what_goes_with_it_is_not() {
    let fake = Fake::start();
    let route = "\
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: orders, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: orders}]
  rules: [{backendRefs: [{name: orders, port: 8080}]}]
";
    let both = route.to_owned() + "---\n" + &TRAFFIC.replace("kind: Service", "kind: HTTPRoute");
    fake.write("both.yaml", &both);
    assert_eq!(fake.run(&["policy", "apply", "-f", "both.yaml", "-n", "shop"]).code, 0);
    let alone = fake.run(&["policy", "delete", "hr/shop/orders", "--dry-run"]);
    let told = "warning: HTTPRoute shop/orders: TrafficPolicy shop/orders refers to it\n";
    assert_eq!((alone.code, &*alone.stderr), (0, told), "{alone}");
    let both = fake.run(&["policy", "delete", "-f", "both.yaml", "-n", "shop"]);
    assert_eq!(both.stderr, "", "{both}");
    assert_eq!(both.stdout, "TrafficPolicy shop/orders deleted\nHTTPRoute shop/orders deleted\n");
}

#[test]
fn a_store_that_takes_no_writes_is_a_failure_that_says_so() {
    let fake = applied();
    fake.break_store();
    insta::assert_snapshot!(fake.run(&["policy", "delete", "ap/shop/orders"]));
}

#[test]
fn objects_are_listed() {
    let fake = applied();
    insta::assert_snapshot!(fake.run(&["policy", "get", "-n", "shop"]));
    insta::assert_snapshot!(fake.run(&["policy", "get", "tp", "-A", "-o", "wide"]));
    assert_eq!(fake.run(&["policy", "get", "ap", "-n", "other"]).stdout, "none\n");
    let one = fake.run(&["policy", "get", "ap/shop/orders", "-o", "json"]).stdout;
    let one: serde_json::Value = serde_json::from_str(&one).unwrap();
    assert_eq!((&one["kind"], &one["metadata"]["resourceVersion"]), (&"AccessPolicy".into(), &"1".into()));
    assert_eq!(one["status"]["proxies"]["on"], 2);
    let all = fake.run(&["policy", "get", "-A", "-o", "json"]).stdout;
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    assert_eq!((&all["kind"], all["items"].as_array().unwrap().len()), (&"List".into(), 2));
}

#[test]
fn what_get_prints_as_yaml_is_what_apply_takes() {
    let fake = applied();
    let yaml = fake.run(&["policy", "get", "-n", "shop", "-o", "yaml"]).stdout;
    let again = fake.run_with(&["policy", "apply", "-f", "-"], &yaml);
    assert_eq!(
        again.stdout, "AccessPolicy shop/orders unchanged\nTrafficPolicy shop/orders unchanged\n",
        "{again}"
    );
}

#[test]
fn an_edit_of_what_somebody_else_has_changed_since_is_refused() {
    let fake = applied();
    let mine = fake.run(&["policy", "get", "ap/shop/orders", "-o", "yaml"]).stdout;
    fake.run_with(&["policy", "apply", "-f", "-"], &ACCESS.replace("GET", "POST"));
    let ran = fake.run_with(&["policy", "apply", "-f", "-"], &mine);
    assert_eq!(ran.code, 1, "{ran}");
    assert!(ran.stderr.contains("is at revision 3, not at 1"), "{ran}");
}

#[test]
fn an_object_is_described() {
    let fake = applied();
    insta::assert_snapshot!(timeless(fake.run(&[
        "policy",
        "describe",
        "TrafficPolicy",
        "orders",
        "-n",
        "shop"
    ])));
    let conflicted =
        TRAFFIC.replace("fate: refused", "fate: conflicted").replace("name: orders, l", "name: young, l");
    fake.run_with(&["policy", "apply", "-f", "-", "-n", "shop"], &conflicted);
    insta::assert_snapshot!(timeless(fake.run(&["policy", "describe", "tp/shop/young"])));
}

#[test]
fn who_writes_is_told() {
    let fake = applied();
    let author = |name: &str| {
        let get = fake.run(&["policy", "get", name, "-o", "wide"]).stdout;
        get.lines().nth(1).unwrap().split_whitespace().last().unwrap().to_owned()
    };
    assert_eq!(author("ap/shop/orders"), "ann", "the user");
    let (server, file) = (fake.address().to_string(), fake.home().join("token").display().to_string());
    let environment =
        [("OUTRIGGER_SERVER", &*server), ("OUTRIGGER_TOKEN_FILE", &*file), ("OUTRIGGER_AUTHOR", "pipeline")];
    fake.run_in(&["policy", "apply", "-f", "-"], &ACCESS.replace("GET", "POST"), &environment);
    assert_eq!(author("ap/shop/orders"), "pipeline");
}

#[test]
fn what_is_not_there_is_a_failure_unless_it_may_be_missing() {
    let fake = Fake::start();
    insta::assert_snapshot!(fake.run(&["policy", "get", "ap", "nobody"]));
    assert_eq!(fake.run(&["policy", "delete", "ap", "nobody"]).code, 1);
    assert_eq!(fake.run(&["policy", "delete", "ap", "nobody", "--ignore-not-found"]).code, 0);
    assert_eq!(fake.run(&["policy", "get", "pod"]).code, 1);
    assert_eq!(fake.run(&["policy", "gett"]).code, 2, "a command line that is wrong");
}

#[test]
fn objects_are_deleted_by_name_by_file_and_by_revision() {
    let fake = applied();
    let dry = fake.run(&["policy", "delete", "ap/shop/orders", "--dry-run"]);
    assert_eq!(dry.stdout, "AccessPolicy shop/orders deleted (dry run)\n", "{dry}");
    let stale = fake.run(&["policy", "delete", "ap/shop/orders", "--revision", "9"]);
    assert_eq!(stale.code, 1, "{stale}");
    assert_eq!(fake.run(&["policy", "delete", "ap/shop/orders", "--revision", "1"]).code, 0);
    let file = fake.run(&["policy", "delete", "-f", "p/traffic.yml", "-n", "shop"]);
    assert_eq!(file.stdout, "TrafficPolicy shop/orders deleted\n", "{file}");
    assert_eq!(fake.run(&["policy", "get", "-A"]).stdout, "none\n");
}

#[test]
fn an_object_goes_back_to_what_it_was() {
    let fake = applied();
    fake.run_with(&["policy", "apply", "-f", "-"], &ACCESS.replace("GET", "POST"));
    insta::assert_snapshot!(fake.run(&["policy", "history", "ap", "orders", "-n", "shop"]));
    let back = fake.run(&["policy", "rollback", "ap", "orders", "-n", "shop"]);
    assert_eq!(back.stdout, "AccessPolicy shop/orders configured\n", "{back}");
    let yaml = fake.run(&["policy", "get", "ap/shop/orders", "-o", "yaml"]).stdout;
    assert!(yaml.contains("GET") && !yaml.contains("POST"), "{yaml}");
    let named = fake.run(&["policy", "rollback", "ap/shop/orders", "--to-revision", "3", "--dry-run"]);
    assert_eq!(named.stdout, "AccessPolicy shop/orders configured (dry run)\n", "{named}");
    // A deleted object comes back too: what was there before is its last revision that had an object.
    fake.run(&["policy", "delete", "ap/shop/orders"]);
    assert_eq!(fake.run(&["policy", "rollback", "ap/shop/orders"]).code, 0);
    let only = fake.run(&["policy", "rollback", "tp/shop/orders"]);
    assert!(only.code == 1 && only.stderr.contains("no earlier revision"), "{only}");
}

#[test]
fn files_are_validated_with_and_without_a_controller() {
    let fake = Fake::start();
    fake.write("a.yaml", ACCESS);
    let alone = fake.run_in(&["policy", "validate", "-f", "a.yaml"], "", &[]);
    assert_eq!(alone.stdout, "1 object is valid; references were not checked (--live does)\n", "{alone}");
    let live = fake.run(&["policy", "validate", "-f", "a.yaml", "--live"]);
    assert_eq!(live.stdout, "1 object is valid; references were checked\n", "{live}");
    // A reference that leads nowhere yet is a warning with its place.
    fake.write("b.yaml", &ACCESS.replace("kind: Service, name: orders", "kind: Service, name: later"));
    insta::assert_snapshot!(fake.run(&["policy", "validate", "-f", "b.yaml", "--live"]));
    let faulty = fake.run_with(&["policy", "validate", "-f", "-"], &ACCESS.replace("GET", "get it"));
    assert!(faulty.code == 1 && faulty.stderr.contains("standard input:10:"), "{faulty}");
}
