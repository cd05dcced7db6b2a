//! The file of contexts: which setting holds, what is refused, and that tokens stay where they are.

use std::os::unix::fs::PermissionsExt;

use crate::fake::Fake;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

fn run(fake: &Fake, arguments: &[&str]) -> crate::fake::Ran {
    fake.run_in(arguments, "", &[])
}

#[test]
fn a_context_that_was_set_is_used() {
    let fake = Fake::start();
    let server = fake.address().to_string();
    let set = run(
        &fake,
        &["context", "set", "here", "--server", &server, "--token-file", "token", "--namespace", "shop"],
    );
    assert_eq!(set.code, 0, "{set}");
    // The path was given from the home folder; it holds from everywhere.
    let services = run(&fake, &["services", "-o", "name"]);
    assert_eq!((services.code, services.stdout.as_str()), (0, "orders.shop\ndb.shop\n"), "{services}");

    assert_eq!(run(&fake, &["context", "set", "there", "--server", "127.0.0.1:1"]).code, 0);
    insta::assert_snapshot!(run(&fake, &["context", "list", "-o", "wide"]));
    assert_eq!(run(&fake, &["context", "use", "there"]).code, 0);
    let unreachable = run(&fake, &["services"]);
    assert_eq!(unreachable.code, 1, "{unreachable}");
    // Another context for one command, and an option over the context.
    assert_eq!(run(&fake, &["services", "--context", "here"]).code, 0);
    assert_eq!(run(&fake, &["services", "--server", &server, "--token-file", "token"]).code, 0);
}

#[test]
fn the_environment_is_stronger_than_the_context_and_weaker_than_an_option() {
    let fake = Fake::start();
    let server = fake.address().to_string();
    run(&fake, &["context", "set", "here", "--server", "127.0.0.1:1", "--token-file", "token"]);
    let environment = [("OUTRIGGER_SERVER", server.as_str())];
    assert_eq!(fake.run_in(&["services"], "", &environment).code, 0);
    let option = fake.run_in(&["services", "--server", "127.0.0.1:1"], "", &environment);
    assert_eq!(option.code, 1, "{option}");
}

#[test]
fn a_token_in_the_file_is_used_never_shown_and_for_its_owner_only() {
    let fake = Fake::start();
    let text = format!("contexts:\n- name: here\n  server: {}\n  token: {TOKEN}\n", fake.address());
    let path = fake.write("contexts.yaml", &text);
    let named = |arguments: &[&str]| {
        fake.run_in(arguments, "", &[("OUTRIGGER_CONFIG", "contexts.yaml"), ("OUTRIGGER_CONTEXT", "here")])
    };
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    insta::assert_snapshot!(named(&["services"]));
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(named(&["services"]).code, 0);
    for format in ["wide", "json", "yaml"] {
        let list = named(&["context", "list", "-o", format]);
        assert!(list.code == 0 && !list.stdout.contains(TOKEN), "{list}");
    }
    // A change of something else keeps it, and the file stays its owner's.
    assert_eq!(named(&["context", "set", "here", "--namespace", "shop"]).code, 0);
    assert_eq!(named(&["services"]).code, 0);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn every_fault_of_the_file_is_told_and_the_exit_code_is_64() {
    let fake = Fake::start();
    fake.write(
        ".config/outrigger/config.yaml",
        "current-context: a\ncontexts: [{name: a}, {name: a}, {name: b, token-file: x, token: y}]\n",
    );
    let faulty = run(&fake, &["services"]);
    assert_eq!(faulty.code, 64, "{faulty}");
    for fault in ["two contexts are called `a`", "both `token` and `token-file`", "chmod 600"] {
        assert!(faulty.stderr.contains(fault), "{faulty}");
    }
    fake.write(".config/outrigger/config.yaml", "contexts: [{name: a, sever: here}]\n");
    let unknown = run(&fake, &["context", "list"]);
    assert!(unknown.code == 64 && unknown.stderr.contains("sever"), "{unknown}");
    fake.write(".config/outrigger/config.yaml", "current-context: b\ncontexts: [{name: a}]\n");
    let missing = run(&fake, &["services"]);
    assert!(missing.code == 64 && missing.stderr.contains("no context `b`"), "{missing}");
    assert_eq!(run(&fake, &["context", "use", "a"]).code, 0, "a wrong current context can be changed");
}

#[test]
fn a_file_that_was_named_must_exist() {
    let fake = Fake::start();
    let missing = run(&fake, &["services", "--config", "none.yaml"]);
    assert!(missing.code == 1 && missing.stderr.contains("none.yaml"), "{missing}");
}
