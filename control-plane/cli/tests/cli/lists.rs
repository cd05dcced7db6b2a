//! The commands that list what the controller knows.

use crate::fake::Fake;

#[test]
fn services_and_what_is_wrong_with_their_source() {
    let fake = Fake::start();
    insta::assert_snapshot!(fake.run(&["services"]));
    let wide = fake.run(&["services", "-o", "wide"]).stdout;
    assert!(wide.contains("http=PROTOCOL_HTTP"), "{wide}");
    assert_eq!(fake.run(&["services", "-o", "name"]).stdout, "orders.shop\ndb.shop\n");
}

#[test]
fn json_holds_all_that_the_controller_said() {
    let fake = Fake::start();
    let services: serde_json::Value =
        serde_json::from_str(&fake.run(&["services", "-o", "json"]).stdout).unwrap();
    assert_eq!(services[0]["endpoints"][0]["address"], "10.0.0.1");
    let proxies: serde_json::Value =
        serde_json::from_str(&fake.run(&["proxies", "-o", "json"]).stdout).unwrap();
    assert_eq!(proxies[1]["types"]["Service"]["nack"]["at"], 1);
    assert_eq!(proxies[1]["subscriptions"], 3);
}

#[test]
fn endpoints_of_all_services_and_of_one() {
    let fake = Fake::start();
    insta::assert_snapshot!(fake.run(&["endpoints", "-o", "wide"]));
    let one = fake.run(&["endpoints", "web.shop", "-o", "name"]).stdout;
    assert_eq!(one, "web.shop-3\n");
}

#[test]
fn proxies_and_what_one_holds() {
    let fake = Fake::start();
    insta::assert_snapshot!(fake.run(&["proxies", "-o", "wide"]));
    insta::assert_snapshot!(fake.run(&["proxies", "web"]));
    let missing = fake.run(&["proxies", "nobody"]);
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains("no proxy that is connected is called `nobody`"), "{missing}");
}

#[test]
fn output_that_goes_nowhere_near_a_terminal_has_no_colour() {
    let text = Fake::start().run(&["proxies"]).stdout;
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn completions_know_the_commands() {
    let fake = Fake::start();
    for shell in ["bash", "zsh", "fish"] {
        let script = fake.run(&["completions", shell]);
        assert!(script.code == 0 && script.stdout.contains("endpoints"), "{shell}: {script}");
    }
}

#[test]
fn kinds_have_schemas() {
    let fake = Fake::start();
    insta::assert_snapshot!(fake.run(&["schema"]));
    let schema: serde_json::Value = serde_json::from_str(&fake.run(&["schema", "ap"]).stdout).unwrap();
    assert_eq!(schema["title"], "AccessPolicy");
    let crd = fake.run(&["schema", "AccessPolicy", "-o", "crd"]).stdout;
    assert!(crd.contains("kind: CustomResourceDefinition"), "{crd}");
    assert_eq!(fake.run(&["schema", "policytest"]).code, 0);
    let gateway = fake.run(&["schema", "HTTPRoute", "-o", "crd"]);
    assert!(gateway.code == 1 && gateway.stderr.contains("the Gateway API's"), "{gateway}");
}
