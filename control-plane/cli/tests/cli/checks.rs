//! `check`, before and after an installation, and on hosts.

use serde_json::json;

use crate::{
    cluster::{Cluster, failure, list, pod},
    fake::Fake,
};

#[test]
fn a_cluster_is_checked_before_an_installation() {
    let cluster = Cluster::start();
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "n1" },
        "status": { "nodeInfo": {
            "operatingSystem": "linux", "kernelVersion": "6.8.0", "architecture": "amd64", "kubeletVersion": "v1.34.4",
            "bootID": "", "containerRuntimeVersion": "", "kubeProxyVersion": "", "machineID": "", "osImage": "", "systemUUID": "",
        } },
    });
    cluster.answer("/api/v1/nodes", 200, list(&[node]));
    insta::assert_snapshot!(cluster.run(&["check", "--pre"]));
    let namespaces = "namespaces is forbidden: User \"ann\" cannot list resource \"namespaces\"";
    cluster.answer("/api/v1/namespaces", 403, failure(403, namespaces));
    let unknown = cluster.run(&["check", "--pre"]);
    assert_eq!(unknown.code, 2, "what may not be seen is no yes: {unknown}");
    assert!(unknown.stdout.contains(namespaces), "{unknown}");
    let review = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let denied = json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {},
        "spec": {}, "status": { "allowed": false } });
    cluster.answer(review, 201, denied);
    let denied = cluster.run(&["check", "--pre", "-o", "json"]);
    assert_eq!(denied.code, 1, "{denied}");
    let findings: serde_json::Value = serde_json::from_str(&denied.stdout).unwrap();
    let permissions = findings.as_array().unwrap().iter().find(|one| one["check"] == "permissions").unwrap();
    assert_eq!(permissions["result"], "failed");
    assert!(permissions["seen"].as_str().unwrap().contains("deployments.apps -n outrigger-system"));
}

#[test]
fn an_installation_is_checked() {
    let cluster = Cluster::start();
    let empty = cluster.run(&["check"]);
    assert_eq!(empty.code, 1, "{empty}");
    assert!(empty.stdout.contains("there is no Deployment outrigger-injector"), "{empty}");

    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "x" },
        "spec": { "replicas": 1, "selector": {}, "template": {} }, "status": { "readyReplicas": 1 },
    });
    for name in ["outrigger-controller", "outrigger-injector"] {
        cluster.answer(
            &format!("/apis/apps/v1/namespaces/outrigger-system/deployments/{name}"),
            200,
            deployment.clone(),
        );
    }
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "shop", "labels": { "outrigger.dev/inject": "enabled" } } });
    cluster.answer("/api/v1/namespaces", 200, list(&[namespace]));
    let bundle = |namespace: &str| {
        json!({ "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": "outrigger-trust-bundle", "namespace": namespace }, "data": { "trust-bundle.pem": "x" } })
    };
    cluster.answer("/api/v1/configmaps", 200, list(&[bundle("outrigger-system"), bundle("shop")]));
    let mut old = pod("orders-1", "orders", true);
    old["metadata"]["namespace"] = json!("shop");
    cluster.answer("/api/v1/pods", 200, list(&[old]));
    insta::assert_snapshot!(cluster.run(&["check"]));
}

#[test]
fn a_mesh_of_hosts_is_checked() {
    let fake = Fake::start();
    insta::assert_snapshot!(fake.run(&["check"]));
    let away = fake.run(&["check", "--server", "127.0.0.1:1"]);
    assert_eq!(away.code, 1, "{away}");
    let pre = fake.run(&["check", "--pre"]);
    assert!(pre.code == 2 && pre.stderr.contains("no cluster is chosen"), "{pre}");
}
