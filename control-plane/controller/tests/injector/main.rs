//! The injector as a whole: its TLS port, its certificate and its namespaces from an API over HTTP. The cases are those of a
//! hostile or broken client of a webhook.

#![allow(clippy::unwrap_used, reason = "what fails here fails a test")]
#![expect(
    clippy::needless_pass_by_value,
    reason = "a case reads better without a reference to each piece of JSON"
)]

mod api;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame};
use hyper::client::conn::http2::SendRequest;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::ByteString;
use outrigger_controller::config::Config;
use outrigger_controller::injector::Injector;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use api::FakeApi;

const HOST: &str = "outrigger-injector.outrigger-system.svc";
const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    api: FakeApi,
    injector: Injector,
    ca: Ca,
    _folder: tempfile::TempDir,
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    /// The Secret with a new certificate.
    fn secret(&self) -> Value {
        let key = KeyPair::generate().unwrap();
        let leaf =
            CertificateParams::new(vec![HOST.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let data = |text: String| ByteString(text.into_bytes());
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": { "name": "outrigger-injector-tls", "namespace": "outrigger-system" },
            "data": { "tls.crt": data(leaf.pem()), "tls.key": data(key.serialize_pem()) },
        })
    }
}

impl World {
    async fn start() -> Self {
        let (api, url) = FakeApi::start().await;
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
            "clusters": [{ "name": "c", "cluster": { "server": url } }],
            "users": [{ "name": "u", "user": {} }],
        });
        std::fs::write(&kubeconfig, text.to_string()).unwrap();
        let mut config = Config { metrics_listen: ([127, 0, 0, 1], 0).into(), ..Config::default() };
        config.kubernetes.kubeconfig = Some(kubeconfig);
        config.injector.listen = ([127, 0, 0, 1], 0).into();
        let injector = Injector::start(&config).await.unwrap();
        Self { api, injector, ca: Ca::new(), _folder: folder }
    }

    /// With a certificate and a namespace `shop` that opted in.
    async fn ready() -> Self {
        let world = Self::start().await;
        world.api.put("namespaces", &namespace("shop", json!({ "outrigger.dev/inject": "enabled" })));
        world.api.put("secrets", &world.ca.secret());
        world.until_ready().await;
        world
    }

    async fn until_ready(&self) {
        until("the injector is ready", || async { self.monitoring("/ready").await.0 == StatusCode::OK })
            .await;
    }

    async fn monitoring(&self, path: &str) -> (StatusCode, String) {
        let tcp = TcpStream::connect(self.injector.metrics_listen).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "x").body(Full::<Bytes>::default()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// A connection as the API server makes it.
    async fn connect(&self, root: &CertificateDer<'static>) -> std::io::Result<Client> {
        let tcp = TcpStream::connect(self.injector.listen).await?;
        self.over(tcp, root).await.map(|(sender, leaf)| Client { sender, leaf })
    }

    /// What sends requests over it, and the webhook's certificate.
    async fn over<B>(
        &self,
        tcp: TcpStream,
        root: &CertificateDer<'static>,
    ) -> std::io::Result<(SendRequest<B>, Vec<u8>)>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from(HOST).unwrap();
        let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        let leaf = tls.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await.unwrap();
        tokio::spawn(connection);
        Ok((sender, leaf))
    }

    async fn client(&self) -> Client {
        self.connect(&self.ca.root).await.unwrap()
    }
}

#[derive(Clone)]
struct Client {
    sender: SendRequest<Full<Bytes>>,
    leaf: Vec<u8>,
}

impl Client {
    async fn send(&mut self, method: Method, body: impl Into<Bytes>) -> (StatusCode, Bytes) {
        self.send_to("/inject", method, body).await
    }

    async fn send_to(&mut self, path: &str, method: Method, body: impl Into<Bytes>) -> (StatusCode, Bytes) {
        let uri = format!("https://{HOST}{path}?timeout=10s");
        let request = Request::builder().method(method).uri(uri).header("content-type", "application/json");
        let request = request.body(Full::new(body.into())).unwrap();
        let response = self.sender.send_request(request).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    /// The response to a review of `pod`.
    async fn review(&mut self, pod: &Value) -> Value {
        self.answered(&review("shop", pod)).await
    }

    async fn answered(&mut self, review: &Value) -> Value {
        self.answered_by("/inject", review).await
    }

    async fn answered_by(&mut self, path: &str, review: &Value) -> Value {
        let (status, body) = self.send_to(path, Method::POST, review.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
        let answer: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (&answer["apiVersion"], &answer["kind"]),
            (&json!("admission.k8s.io/v1"), &json!("AdmissionReview"))
        );
        assert_eq!(answer["response"]["uid"], review["request"]["uid"]);
        answer["response"].clone()
    }
}

fn review(namespace: &str, pod: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": { "group": "", "version": "v1", "kind": "Pod" },
            "resource": { "group": "", "version": "v1", "resource": "pods" },
            "namespace": namespace, "operation": "CREATE", "userInfo": { "username": "admin" },
            "object": pod, "oldObject": null, "dryRun": false, "options": null,
        },
    })
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}

fn pod(spec: Value) -> Value {
    let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "web" },
        "spec": { "containers": [{ "name": "web", "image": "web:1" }] } });
    for (name, value) in spec.as_object().unwrap() {
        pod["spec"][name] = value.clone();
    }
    pod
}

fn operations(response: &Value) -> Vec<Value> {
    let ByteString(patch) = serde_json::from_value(response["patch"].clone()).unwrap();
    assert_eq!(response["patchType"], "JSONPatch");
    serde_json::from_slice(&patch).unwrap()
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_says_what_is_missing_and_the_last_good_certificate_stays() {
    let world = World::start().await;
    let (status, text) = world.monitoring("/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.contains("outrigger-injector-tls"), "{text}");
    assert!(world.connect(&world.ca.root).await.is_err(), "no certificate, no connection");

    world.api.put("secrets", &world.ca.secret());
    world.until_ready().await;
    let first = world.client().await.leaf;

    world.api.put("secrets", &world.ca.secret());
    until("new connections get the new certificate", || async { world.client().await.leaf != first }).await;
    let second = world.client().await.leaf;

    let mut broken = world.ca.secret();
    broken["data"]["tls.key"] = json!(ByteString(b"no key".to_vec()));
    world.api.put("secrets", &broken);
    // The watch is in order: when the third is used, the broken one was seen.
    let third = world.ca.secret();
    assert_eq!(world.client().await.leaf, second);
    world.api.put("secrets", &third);
    until("the third is used", || async { world.client().await.leaf != second }).await;

    assert!(
        world.connect(&Ca::new().root).await.is_err(),
        "a client that trusts another CA does not connect"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_its_sidecar() {
    let world = World::ready().await;
    let mut client = world.client().await;
    let response = client.review(&pod(json!({}))).await;
    assert_eq!(response["allowed"], true);
    let operations = operations(&response);
    let containers = operations.iter().find(|operation| operation["path"] == "/spec/initContainers").unwrap();
    assert_eq!(containers["value"][1]["name"], "outrigger-proxy");

    let mut patched = pod(json!({}));
    patched["spec"]["initContainers"] = containers["value"].clone();
    patched["spec"]["volumes"] =
        operations.iter().find(|one| one["path"] == "/spec/volumes").unwrap()["value"].clone();
    patched["metadata"]["labels"] = json!({ "outrigger.dev/injected": "true" });
    let again = client.review(&patched).await;
    assert_eq!((&again["allowed"], &again["patch"]), (&json!(true), &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_review_is_refused_by_http() {
    let world = World::ready().await;
    let mut client = world.client().await;
    let good = review("shop", &pod(json!({})));
    let with = |path: &str, value: Value| {
        let mut review = good.clone();
        *review.pointer_mut(path).unwrap() = value;
        review.to_string()
    };
    let mut no_uid = good.clone();
    no_uid["request"].as_object_mut().unwrap().remove("uid");
    for (what, body, expected) in [
        ("not JSON", "hello".to_owned(), StatusCode::BAD_REQUEST),
        ("empty", String::new(), StatusCode::BAD_REQUEST),
        ("a list", "[]".to_owned(), StatusCode::BAD_REQUEST),
        ("deep", "[".repeat(100_000), StatusCode::BAD_REQUEST),
        ("another kind", with("/kind", json!("Pod")), StatusCode::BAD_REQUEST),
        ("another version", with("/apiVersion", json!("admission.k8s.io/v1beta1")), StatusCode::BAD_REQUEST),
        ("no request", with("/request", Value::Null), StatusCode::BAD_REQUEST),
        ("no uid", no_uid.to_string(), StatusCode::BAD_REQUEST),
        ("an empty uid", with("/request/uid", json!("")), StatusCode::BAD_REQUEST),
        ("a uid that is a number", with("/request/uid", json!(1)), StatusCode::BAD_REQUEST),
        ("a null pod", with("/request/object", Value::Null), StatusCode::BAD_REQUEST),
        ("a pod that is a list", with("/request/object", json!([])), StatusCode::BAD_REQUEST),
        ("10 MiB", " ".repeat(10 << 20), StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        let (status, text) = client.send(Method::POST, body).await;
        assert_eq!(status, expected, "{what}: {}", String::from_utf8_lossy(&text));
        assert!(!text.is_empty(), "{what}: says why");
    }
    let (status, _) = client.send(Method::GET, "").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    let (_, metrics) = world.monitoring("/metrics").await;
    assert!(metrics.contains(r#"outrigger_injector_reviews_total{reason="invalid"} 13"#), "{metrics}");
    assert_eq!(client.review(&pod(json!({}))).await["allowed"], true, "and it serves as before");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_asked_about_passes() {
    let world = World::ready().await;
    let mut client = world.client().await;
    for (path, value) in
        [("/request/operation", json!("UPDATE")), ("/request/kind/kind", json!("Deployment"))]
    {
        let mut review = review("shop", &pod(json!({})));
        *review.pointer_mut(path).unwrap() = value;
        let response = client.answered(&review).await;
        assert_eq!((&response["allowed"], &response["patch"]), (&json!(true), &Value::Null), "{path}");
    }
    for system in ["kube-system", "outrigger-system"] {
        world.api.put("namespaces", &namespace(system, json!({ "outrigger.dev/inject": "enabled" })));
        let response = client.answered(&review(system, &pod(json!({})))).await;
        assert_eq!((&response["allowed"], &response["patch"]), (&json!(true), &Value::Null), "{system}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_judged_beyond_its_schema() {
    let world = World::ready().await;
    let mut client = world.client().await;
    let policy = |path: &str| {
        json!({
            "apiVersion": "outrigger.dev/v1alpha1", "kind": "AccessPolicy",
            "metadata": { "name": "a", "namespace": "shop" },
            "spec": {
                "targetRef": { "kind": "Service", "name": "orders" },
                "rules": [{ "action": "Deny", "to": [{ "paths": [{ "type": "RegularExpression", "value": path }] }] }],
            },
        })
    };
    let mut asked = review("shop", &policy("a("));
    asked["request"]["kind"] =
        json!({ "group": "outrigger.dev", "version": "v1alpha1", "kind": "AccessPolicy" });
    let refused = client.answered_by("/policies", &asked).await;
    assert_eq!((&refused["allowed"], &refused["status"]["code"]), (&json!(false), &json!(422)), "{refused}");
    let message = refused["status"]["message"].as_str().unwrap();
    assert!(message.starts_with("spec.rules[0].to[0].paths[0]: "), "{message}");

    // Who removes a finalizer has not written the expression.
    asked["request"]["operation"] = json!("UPDATE");
    asked["request"]["oldObject"] = policy("a(");
    assert_eq!(client.answered_by("/policies", &asked).await["allowed"], true);
    asked["request"]["oldObject"] = policy("/b");
    assert_eq!(client.answered_by("/policies", &asked).await["allowed"], false);
    asked["request"]["object"] = policy("/a.*");
    assert_eq!(client.answered_by("/policies", &asked).await["allowed"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_run_is_refused_with_each_reason() {
    let world = World::ready().await;
    world.api.put(
        "namespaces",
        &namespace(
            "strict",
            json!({ "outrigger.dev/inject": "enabled", "pod-security.kubernetes.io/enforce": "restricted" }),
        ),
    );
    let mut client = world.client().await;
    let mut annotated = pod(json!({}));
    annotated["metadata"]["annotations"] = json!({ "outrigger.dev/opaque-ports": "\u{202e}/~1", "outrigger.dev/proxy-log-level": "x".repeat(100_000) });
    for (namespace, pod, words) in [
        ("shop", annotated, vec!["outrigger.dev/opaque-ports", "outrigger.dev/proxy-log-level"]),
        (
            "shop",
            pod(json!({ "initContainers": [{ "name": "outrigger-proxy" }] })),
            vec!["an init container outrigger-proxy"],
        ),
        (
            "shop",
            pod(json!({ "containers": [{ "name": "a", "ports": [{ "containerPort": 15401 }] }] })),
            vec!["15401", "\"a\""],
        ),
        ("strict", pod(json!({})), vec!["cni.enabled", "strict"]),
    ] {
        let response = client.answered(&review(namespace, &pod)).await;
        assert_eq!((&response["allowed"], &response["patch"]), (&json!(false), &Value::Null));
        let message = response["status"]["message"].as_str().unwrap();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        assert!(message.len() < 2000, "{message}");
    }
    let response = client.answered(&review("nowhere", &pod(json!({})))).await;
    assert_eq!((&response["allowed"], &response["status"]["code"]), (&json!(false), &json!(503)));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_pods_are_pods() {
    let world = World::ready().await;
    let mut client = world.client().await;
    let containers: Vec<Value> =
        (0..500).map(|number| json!({ "name": format!("c{number}"), "image": "x:1" })).collect();
    let response = client.review(&pod(json!({ "containers": containers }))).await;
    assert_eq!(operations(&response).len(), 3);
    let mut large = pod(json!({}));
    large["metadata"]["annotations"] = json!({ "example.com/a": "\u{fffd}".repeat(1 << 20) });
    let response = client.review(&large).await;
    assert_eq!((&response["allowed"], operations(&response).len()), (&json!(true), 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_watch_leaves_no_pod_without_a_sidecar() {
    let world = World::ready().await;
    let mut client = world.client().await;
    // Never seen; then seen without its label.
    world.api.put_unseen("namespaces", &namespace("new", json!({ "outrigger.dev/inject": "enabled" })));
    assert_eq!(operations(&client.answered(&review("new", &pod(json!({})))).await).len(), 3);
    world.api.put("namespaces", &namespace("late", json!({})));
    let passes = client.answered(&review("late", &pod(json!({})))).await;
    assert_eq!(passes["patch"], Value::Null);
    world.api.put_unseen("namespaces", &namespace("late", json!({ "outrigger.dev/inject": "enabled" })));
    assert_eq!(operations(&client.answered(&review("late", &pod(json!({})))).await).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_the_nodes_network_is_marked_and_told() {
    let world = World::ready().await;
    let mut client = world.client().await;
    let mut pod = pod(json!({ "hostNetwork": true }));
    pod["metadata"]["ownerReferences"] =
        json!([{ "apiVersion": "apps/v1", "kind": "DaemonSet", "name": "agent", "uid": "u-1" }]);
    let mut events = world.api.events();

    let mut dry = review("shop", &pod);
    dry["request"]["dryRun"] = true.into();
    assert_eq!(client.answered(&dry).await["allowed"], true);
    let response = client.review(&pod).await;
    assert_eq!(response["allowed"], true);
    assert!(response["warnings"][0].as_str().unwrap().contains("hostNetwork"));
    let expected = json!([{ "op": "add", "path": "/metadata/annotations", "value": { "outrigger.dev/skipped": "hostNetwork" } }]);
    assert_eq!(Value::from(operations(&response)), expected);

    let written = tokio::time::timeout(PATIENCE, events.wait_for(|events| !events.is_empty()))
        .await
        .unwrap()
        .unwrap()
        .clone();
    assert_eq!(written.len(), 1, "a dry run writes none: {written:?}");
    assert_eq!(written[0]["regarding"]["name"], "agent");
    assert_eq!(written[0]["regarding"]["namespace"], "shop");
    assert_eq!(written[0]["reason"], "InjectionSkipped");
}

#[tokio::test]
async fn an_address_whose_reviews_do_not_come_keeps_nobody_else_waiting() {
    let world = World::ready().await;
    let tcp = TcpStream::connect(world.injector.listen).await.unwrap();
    let (slow, _) = world.over(tcp, &world.ca.root).await.unwrap();
    // Each takes a quarter of what is there for all; what it promises never comes.
    let mut held = Vec::new();
    for _ in 0..16 {
        let request = Request::post(format!("https://{HOST}/inject"))
            .header("content-type", "application/json")
            .header("content-length", 8 << 20)
            .body(StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>()));
        let mut slow = slow.clone();
        held.push(tokio::spawn(async move { slow.send_request(request.unwrap()).await }));
    }
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let tcp = socket.connect(world.injector.listen).await.unwrap();
    let (sender, leaf) = world.over(tcp, &world.ca.root).await.unwrap();
    let body = review("shop", &pod(json!({}))).to_string();
    let start = Instant::now();
    let (status, _) = Client { sender, leaf }.send(Method::POST, body).await;
    assert_eq!(status, StatusCode::OK);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_at_once() {
    let world = World::ready().await;
    let body = Bytes::from(review("shop", &pod(json!({}))).to_string());
    // An API server multiplexes over a few connections.
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(world.client().await);
    }
    let calls: Vec<_> = (0..1000)
        .map(|number| {
            let (mut client, body) = (clients[number % 4].clone(), body.clone());
            tokio::spawn(async move {
                let start = Instant::now();
                let (status, body) = client.send(Method::POST, body).await;
                let answer: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!((status, &answer["response"]["allowed"]), (StatusCode::OK, &json!(true)));
                start.elapsed()
            })
        })
        .collect();
    let mut times = Vec::new();
    for call in calls {
        times.push(call.await.unwrap());
    }
    times.sort_unstable();
    println!("1,000 reviews at once: p50 {:?}, p99 {:?}, as the client sees it", times[500], times[990]);
    // Of an unoptimised build, beside other tests; the figure itself is measured of the real binary in `e2e`.
    assert!(times[990] < Duration::from_secs(2), "{:?}", times[990]);
    let (_, metrics) = world.monitoring("/metrics").await;
    assert!(metrics.contains(r#"outrigger_injector_reviews_total{reason="injected"} 1000"#), "{metrics}");
}
