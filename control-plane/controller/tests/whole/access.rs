//! Users of a cluster at the API: who they are and what they may is what the API server says, and nothing without it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::harness::{Bench, bring_ca};

/// An API server that reviews tokens and access, and keeps whatever else it is given.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<Cluster>>);

#[derive(Default)]
struct Cluster {
    /// Token to user.
    users: BTreeMap<&'static str, &'static str>,
    /// `<user> <verb> <resource>.<group>[/<name>][ -n <namespace>]`.
    rules: BTreeSet<String>,
    objects: BTreeMap<String, Value>,
    is_away: bool,
    reviews: usize,
}

async fn serve(State(Server(cluster)): State<Server>, method: Method, uri: Uri, body: String) -> Response {
    let mut cluster = cluster.lock().unwrap();
    let object: Value = serde_json::from_str(&body).unwrap_or_default();
    let path = uri.path();
    if cluster.is_away {
        return status(StatusCode::INTERNAL_SERVER_ERROR, "etcd is away");
    }
    if path.ends_with("/tokenreviews") {
        cluster.reviews += 1;
        assert!(object["spec"]["audiences"].is_null(), "the API server's own audience: {object}");
        let user = object["spec"]["token"].as_str().and_then(|token| cluster.users.get(token));
        let said = match user {
            Some(user) => json!({
                "authenticated": true,
                "user": { "username": user, "uid": "7", "groups": ["system:authenticated"], "extra": { "scopes": ["a"] } },
                "audiences": ["https://kubernetes.default.svc"],
            }),
            None => json!({ "error": "invalid bearer token" }),
        };
        return (StatusCode::CREATED, Json(with(object, said))).into_response();
    }
    if path.ends_with("/subjectaccessreviews") {
        cluster.reviews += 1;
        let spec = &object["spec"];
        assert_eq!(
            (&spec["uid"], &spec["extra"]["scopes"][0]),
            (&json!("7"), &json!("a")),
            "all that was proved"
        );
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let wanted = &spec["resourceAttributes"];
        let named = |before: &str, value: &Value| match text(value) {
            value if value.is_empty() => value,
            value => format!("{before}{value}"),
        };
        let asked = format!(
            "{} {} {}.{}{}{}",
            text(&spec["user"]),
            text(&wanted["verb"]),
            text(&wanted["resource"]),
            text(&wanted["group"]),
            named("/", &wanted["name"]),
            named(" -n ", &wanted["namespace"]),
        );
        let said = json!({ "allowed": cluster.rules.contains(&asked) });
        return (StatusCode::CREATED, Json(with(object, said))).into_response();
    }
    if method == Method::POST {
        let name = format!("{path}/{}", object["metadata"]["name"].as_str().unwrap_or_default());
        cluster.objects.insert(name, object.clone());
        return (StatusCode::CREATED, Json(object)).into_response();
    }
    match cluster.objects.get(path) {
        Some(object) => Json(object.clone()).into_response(),
        None => status(StatusCode::NOT_FOUND, "there is no such object"),
    }
}

fn with(mut object: Value, status: Value) -> Value {
    object["status"] = status;
    object
}

fn status(code: StatusCode, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code.as_u16(), "message": message, "reason": "Unknown",
    });
    (code, Json(status)).into_response()
}

impl Server {
    async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(serve).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!(
            "{{apiVersion: v1, kind: Config, current-context: c, \
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}], \
             clusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}], \
             users: [{{name: u, user: {{token: controllers-own}}}}]}}"
        )
    }

    fn change<T>(&self, change: impl FnOnce(&mut Cluster) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    fn allow(&self, rule: &str) {
        self.change(|cluster| cluster.rules.insert(rule.to_owned()));
    }
}

async fn bench() -> (Server, Bench, tempfile::TempDir) {
    let server = Server::default();
    server.change(|cluster| cluster.users = BTreeMap::from([("anns", "ann"), ("bobs", "bob")]));
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, server.start().await).unwrap();
    let bench = Bench::start_with(&[], |config| {
        bring_ca(config);
        config.kubernetes.enabled = true;
        config.kubernetes.kubeconfig = Some(kubeconfig);
    })
    .await;
    (server, bench, directory)
}

fn policy(namespace: &str) -> Value {
    json!({
        "apiVersion": "outrigger.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": { "name": "slow", "namespace": namespace },
        "spec": { "targetRef": { "kind": "Service", "name": "orders" }, "timeouts": { "request": "2s" } },
    })
}

const APPLY: &str = "/api/v1/policies/apply";
const SLOW: &str = "/api/v1/policies/TrafficPolicy/shop/slow";

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_decides_who_reads_and_who_writes() {
    let (server, bench, _directory) = bench().await;
    assert_eq!(bench.api_as("nobodys", "GET", "/api/v1/services", None).await.0, 401);
    let (status, answer) = bench.api_as("anns", "GET", "/api/v1/services", None).await;
    let message = answer["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!((status, &answer["error"]["code"]), (403, &json!("forbidden")));
    assert_eq!(message, "ann may not get meshviews.outrigger.dev/services");

    // A view by itself.
    server.allow("bob get meshviews.outrigger.dev/services");
    assert_eq!(bench.api_as("bobs", "GET", "/api/v1/services", None).await.0, 200);
    assert_eq!(bench.api_as("bobs", "GET", "/api/v1/proxies", None).await.0, 403);

    // Creating in one namespace is neither creating in another, nor changing, nor deleting, nor reading.
    server.allow("ann create trafficpolicies.outrigger.dev/slow -n shop");
    let apply = |namespace: &str| Some(json!({ "objects": [policy(namespace)] }));
    let (status, answer) = bench.api_as("anns", "POST", APPLY, apply("bank")).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert_eq!((status, message), (403, "ann may not create trafficpolicies.outrigger.dev/slow -n bank"));
    let both = Some(json!({ "objects": [policy("shop"), policy("bank")] }));
    assert_eq!(bench.api_as("anns", "POST", APPLY, both).await.0, 403, "all or nothing");
    let (status, answer) = bench.api_as("anns", "POST", APPLY, apply("shop")).await;
    assert_eq!(status, 200, "{answer}");
    let (_, item) = bench.api("GET", SLOW, None).await;
    assert_eq!(item["author"], "ann", "the history names who was proved, whatever the caller says of itself");
    let (status, answer) = bench.api_as("anns", "POST", APPLY, apply("shop")).await;
    assert_eq!(status, 403, "{answer}");
    assert!(
        answer["error"]["message"].as_str().unwrap().contains("may not update trafficpolicies"),
        "{answer}"
    );
    for (method, path) in [
        ("GET", SLOW.to_owned()),
        ("DELETE", SLOW.to_owned()),
        ("GET", format!("{SLOW}/history")),
        ("POST", format!("{SLOW}/rollback")),
        ("GET", "/api/v1/policies".to_owned()),
        ("GET", "/api/v1/policies?namespace=shop".to_owned()),
        ("GET", "/api/v1/policies?kind=tp&namespace=bank".to_owned()),
    ] {
        let (status, answer) = bench.api_as("anns", method, &path, Some(json!({ "revision": 1 }))).await;
        assert_eq!(status, 403, "{method} {path}: {answer}");
    }
    server.allow("bob list trafficpolicies.outrigger.dev -n shop");
    server.allow("bob delete trafficpolicies.outrigger.dev/slow -n shop");
    let (status, listed) = bench.api_as("bobs", "GET", "/api/v1/policies?kind=tp&namespace=shop", None).await;
    assert_eq!((status, listed["items"].as_array().unwrap().len()), (200, 1), "{listed}");
    assert_eq!(bench.api_as("bobs", "GET", "/api/v1/policies?kind=tp", None).await.0, 403);
    assert_eq!(bench.api_as("bobs", "DELETE", SLOW, None).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_api_server_nobody_new_gets_in() {
    let (server, bench, _directory) = bench().await;
    server.allow("ann get meshviews.outrigger.dev/services");
    assert_eq!(bench.api_as("anns", "GET", "/api/v1/services", None).await.0, 200);
    let reviews = server.change(|cluster| {
        cluster.is_away = true;
        cluster.reviews
    });
    // Who was seen a moment ago; one whom nobody has seen; and a question that was not asked yet.
    assert_eq!(bench.api_as("anns", "GET", "/api/v1/services", None).await.0, 200);
    for (token, path) in [("bobs", "/api/v1/services"), ("anns", "/api/v1/proxies"), ("x", "/api/v1/tokens")]
    {
        let (status, answer) = bench.api_as(token, "GET", path, None).await;
        assert_eq!((status, &answer["error"]["code"]), (503, &json!("cluster_unavailable")), "{answer}");
    }
    assert_eq!(bench.api("GET", "/api/v1/proxies", None).await.0, 200, "the admin token asks nobody");
    server.change(|cluster| cluster.is_away = false);
    assert_eq!(bench.api_as("bobs", "GET", "/api/v1/services", None).await.0, 403, "a failure is not kept");
    assert!(server.change(|cluster| cluster.reviews) > reviews);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_operation_is_open_to_who_may_nothing() {
    let (_server, bench, _directory) = bench().await;
    let (_, described) = bench.api_as("", "GET", "/api/v1/openapi.json", None).await;
    let paths = described["paths"].as_object().unwrap();
    assert!(paths.len() > 10, "{described}");
    for (path, operations) in paths {
        let path = path.replace("{kind}", "tp").replace("{namespace}", "shop");
        let path = path.replace("{name}", "slow").replace("{id}", "x");
        for method in operations.as_object().unwrap().keys() {
            let body =
                if path == APPLY { json!({ "objects": [policy("shop")] }) } else { json!({ "revision": 1 }) };
            let (status, answer) = bench.api_as("bobs", &method.to_uppercase(), &path, Some(body)).await;
            // What is the same in every installation.
            let is_public = matches!(path.as_str(), "/api/v1/openapi.json" | "/api/v1/schemas");
            assert_eq!(status, if is_public { 200 } else { 403 }, "{method} {path}: {answer}");
        }
    }
}
