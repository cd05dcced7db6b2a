//! A controller in a cluster, with nothing but a kubeconfig: how it is reached, who is believed to ask, and what is said
//! where it fails.

use std::fmt::Write as _;

use serde_json::json;

use crate::{
    cluster::{Cluster, failure, list, pod},
    fake::TOKEN,
};

const PODS: &str = "/api/v1/namespaces/outrigger-system/pods";
const FORWARD: &str = "/api/v1/namespaces/outrigger-system/pods/outrigger-controller-1/portforward";

#[test]
fn a_kubeconfig_is_enough() {
    let cluster = Cluster::start();
    let services = cluster.run(&["services", "-o", "name"]);
    assert_eq!((services.code, services.stdout.as_str()), (0, "orders.shop\ndb.shop\n"), "{services}");
    assert!(cluster.was_asked(&format!("GET {FORWARD}")));
    assert!(
        !cluster.was_asked("POST /api/v1/namespaces/outrigger-system/serviceaccounts"),
        "the user's own token"
    );
    // Writes, in the context's namespace.
    cluster.fake.write(
        "slow.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: slow}\n\
         spec: {targetRef: {kind: Service, name: orders}, timeouts: {request: 2s}}\n",
    );
    let applied = cluster.run(&["policy", "apply", "-f", "slow.yaml"]);
    assert_eq!(applied.code, 0, "{applied}");
    assert!(applied.stdout.contains("shop"), "{applied}");
    // By option, from nothing else.
    let named = cluster.run_in(&["proxies", "--kubeconfig", "kubeconfig", "-o", "name"], &[]);
    assert_eq!(named.code, 0, "{named}");
}

#[test]
fn every_controller_is_asked_for_its_proxies() {
    let cluster = Cluster::start();
    let name = |number: u8| format!("outrigger-controller-{number}");
    let pods = [1, 2].map(|number| pod(&name(number), "outrigger-controller", true));
    cluster.answer(PODS, 200, list(&pods));
    let proxies = cluster.run(&["proxies", "-o", "name"]);
    assert_eq!((proxies.code, proxies.stdout.lines().count()), (0, 4), "two of each: {proxies}");
}

#[test]
fn a_plugin_or_a_file_may_give_the_token() {
    let cluster = Cluster::start();
    cluster.fake.write("token-of-ann", TOKEN);
    cluster.kubeconfig("kubeconfig", "tokenFile: token-of-ann");
    assert_eq!(cluster.run(&["services"]).code, 0);
    let credential = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": { "token": TOKEN },
    });
    cluster.fake.write("credential", &credential.to_string());
    let plugin = "exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/cat, args: [credential], \
                  interactiveMode: Never}";
    cluster.kubeconfig("kubeconfig", plugin);
    let services = cluster.run(&["services"]);
    assert_eq!(services.code, 0, "{services}");
    assert!(!cluster.was_asked("POST"));
}

#[test]
fn who_has_no_token_asks_for_one_that_reads_or_one_that_writes() {
    let cluster = Cluster::start();
    let accounts = "/api/v1/namespaces/outrigger-system/serviceaccounts";
    // A password is for the API server alone; an impersonated user has no token of their own.
    for credentials in ["username: ann, password: secret".to_owned(), format!("token: {TOKEN}, as: bob")] {
        cluster.kubeconfig("kubeconfig", &credentials);
        cluster.change(|state| state.asked.clear());
        assert_eq!(cluster.run(&["services"]).code, 0);
        assert!(cluster.was_asked(&format!("POST {accounts}/outrigger-cli-reader/token")));
        assert!(!cluster.was_asked(&format!("POST {accounts}/outrigger-cli-writer/token")));
        let deleted = cluster.run(&["policy", "delete", "tp", "none", "--ignore-not-found"]);
        assert!(cluster.was_asked(&format!("POST {accounts}/outrigger-cli-writer/token")), "{deleted}");
    }
    let forbidden = "serviceaccounts \"outrigger-cli-reader\" is forbidden: User \"ann\" cannot create resource \
                     \"serviceaccounts/token\"";
    cluster.answer(&format!("{accounts}/outrigger-cli-reader/token"), 403, failure(403, forbidden));
    insta::assert_snapshot!(cluster.run(&["services"]));
}

#[test]
fn a_token_goes_to_nobody_but_the_controller() {
    let cluster = Cluster::start();
    cluster.answer(PODS, 200, list(&[pod("outrigger-controller-1", "default", true)]));
    let services = cluster.run(&["services"]);
    assert_eq!(services.code, 1, "{services}");
    assert!(!cluster.was_asked(&format!("GET {FORWARD}")));
}

#[test]
fn what_fails_says_what_to_do() {
    let cluster = Cluster::start();
    let mut told = String::new();
    let mut tell = |what: &str, ran: crate::fake::Ran| writeln!(told, "# {what}\n{ran}").unwrap();
    cluster.answer(PODS, 200, list(&[]));
    tell("no controller", cluster.run(&["services"]));
    cluster.answer(PODS, 200, list(&[pod("outrigger-controller-1", "outrigger-controller", false)]));
    tell("none is ready", cluster.run(&["services"]));
    let forbidden = "pods is forbidden: User \"ann\" cannot list resource \"pods\" in API group \"\" in the namespace \
                     \"outrigger-system\"";
    cluster.answer(PODS, 403, failure(403, forbidden));
    tell("pods may not be listed", cluster.run(&["services"]));
    cluster.answer(PODS, 401, failure(401, "Unauthorized"));
    tell("wrong credentials", cluster.run(&["services"]));
    cluster.answer(PODS, 200, list(&[pod("outrigger-controller-1", "outrigger-controller", true)]));
    cluster.answer(FORWARD, 403, failure(403, "forbidden"));
    tell("ports may not be forwarded", cluster.run(&["services"]));
    cluster.change(|state| {
        state.answers.remove(FORWARD);
        state.fault = Some("failed to connect to localhost:15480 inside namespace: connection refused");
    });
    tell("nobody listens", cluster.run(&["services"]));
    cluster.change(|state| state.fault = None);
    cluster.kubeconfig("kubeconfig", "token: anothers-token-that-the-controller-does-not-know");
    tell("a token that the controller cannot have confirmed", cluster.run(&["services"]));
    cluster.fake.write("kubeconfig", "contexts: {");
    let broken = cluster.run(&["services"]);
    assert_eq!(broken.code, 64, "{broken}");
    insta::assert_snapshot!(told);
    let away = "{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], \
                clusters: [{name: a, cluster: {server: 'http://127.0.0.1:1'}}], users: []}";
    cluster.fake.write("kubeconfig", away);
    let away = cluster.run(&["services"]);
    assert!(away.code == 1 && away.stderr.contains("does not answer at http://127.0.0.1:1"), "{away}");
}

#[test]
fn contexts_of_both_files_are_one_list() {
    let cluster = Cluster::start();
    let address = cluster.fake.address().to_string();
    assert_eq!(cluster.run(&["context"]).stdout.lines().count(), 2);
    insta::assert_snapshot!("only_a_kubeconfig", cluster.run(&["context", "-o", "wide"]));
    let set = ["context", "set", "host", "--server", &address, "--token-file", "token", "-n", "bank"];
    assert_eq!(cluster.run(&set).code, 0);
    insta::assert_snapshot!("both", cluster.run(&["context", "list", "-o", "wide"]));
    let used = |ran: crate::fake::Ran| {
        assert_eq!(ran.code, 0, "{ran}");
        let used: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        format!("{} {} {}", used[0]["by"], used[0]["name"], used[0]["namespace"]).replace('"', "")
    };
    // Ours is the current one; each can be named; what is said on the command line is stronger.
    assert_eq!(used(cluster.run(&["context", "-o", "json"])), "address host bank");
    assert_eq!(used(cluster.run(&["context", "--context", "lab", "-o", "json"])), "cluster lab shop");
    assert_eq!(used(cluster.run(&["context", "--context", "here", "-o", "json"])), "cluster here default");
    assert_eq!(
        used(cluster.run(&["context", "--kubeconfig", "kubeconfig", "-o", "json"])),
        "cluster lab shop"
    );
    assert_eq!(used(cluster.run(&["context", "--context", "lab", "-n", "x", "-o", "json"])), "cluster lab x");
    // Another file may make one of the kubeconfig the current one.
    assert_eq!(cluster.run(&["context", "use", "here"]).code, 0);
    assert_eq!(used(cluster.run(&["context", "-o", "json"])), "cluster here default");
    assert_eq!(used(cluster.run(&["context", "--server", &address, "-o", "json"])), "address null default");
    assert_eq!(cluster.run(&["context", "use", "nowhere"]).code, 1);
    let missing = cluster.run(&["services", "--context", "nowhere"]);
    assert!(missing.code == 64 && missing.stderr.contains("no context `nowhere`"), "{missing}");
    // A file that is only listed may be missing, as for kubectl; one that was named must exist.
    let listed = cluster.run_in(&["context", "-o", "json"], &[("KUBECONFIG", "none:kubeconfig")]);
    assert_eq!(used(listed), "cluster here default");
    assert_eq!(cluster.run(&["services", "--kubeconfig", "none"]).code, 64);
}
