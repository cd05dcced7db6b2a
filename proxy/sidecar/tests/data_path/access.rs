//! Who may call: access policies, probes, limits, and what a new policy does to what is under way.

use std::{net::SocketAddr, time::Duration};

use http::{Request, Response};
use outrigger_api::v1;
use outrigger_core::model::Protocol;
use outrigger_proxy::config::Mtls;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

fn denying(rules: Vec<v1::AccessRule>) -> v1::Inbound {
    access(v1::Default::Deny, rules)
}

fn access(default: v1::Default, rules: Vec<v1::AccessRule>) -> v1::Inbound {
    let policy = v1::AccessPolicy { name: "default/app".to_owned(), rules, ..v1::AccessPolicy::default() };
    let access = v1::Access {
        default: default.into(),
        default_origin: "MeshDefaults outrigger-system/default".to_owned(),
        policies: vec![policy],
        ..Default::default()
    };
    v1::Inbound { access: Some(access), ..v1::Inbound::default() }
}

fn rule(name: &str, deny: bool, from: &str, to: v1::Operation) -> v1::AccessRule {
    let from = v1::Source { identities: vec![id(from).as_str().to_owned()], ..v1::Source::default() };
    v1::AccessRule { name: name.to_owned(), deny, from: vec![from], to: vec![to] }
}

fn everything() -> v1::Operation {
    v1::Operation::default()
}

fn under(prefix: &str) -> v1::Operation {
    let kind = v1::path_match::Kind::Prefix.into();
    v1::Operation {
        paths: vec![v1::PathMatch { kind, value: prefix.to_owned() }],
        ..v1::Operation::default()
    }
}

async fn echo_path() -> SocketAddr {
    http1_app(|request: Request<hyper::body::Incoming>| async move {
        Response::new(full(request.uri().to_string()))
    })
    .await
}

async fn ask(address: SocketAddr, path: &str) -> (http::response::Parts, String) {
    let mut client = http1(address).await;
    let (head, body, _) = whole(soon("the response", client.send_request(get(path))).await.unwrap()).await;
    (head, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn nothing_but_what_a_rule_names_comes_in_where_the_default_denies() {
    let pair = pair(echo_path().await, Protocol::Http1);
    told(&pair.server.context, denying(vec![rule("read", false, "client", under("/orders"))]));
    assert_eq!(ask(pair.address, "/orders/1").await.0.status, 200);
    let (head, body) = ask(pair.address, "/admin").await;
    assert_eq!(head.status, 403);
    let reason = head.headers["outrigger-reason"].to_str().unwrap();
    assert!(reason.starts_with("proxy; access_denied; "), "{reason}");
    assert!(body.contains("MeshDefaults outrigger-system/default"), "{body}");
    let metrics = pair.server.metrics();
    assert!(metrics.contains("outrigger_access_decisions_total{"), "{metrics}");
    assert!(metrics.contains(r#"decision="denied"} 1"#), "{metrics}");
}

#[tokio::test]
async fn a_deny_wins_and_says_which_rule_it_was() {
    let pair = pair(echo_path().await, Protocol::Http1);
    let rules =
        vec![rule("all", false, "client", everything()), rule("no-admin", true, "client", under("/admin"))];
    told(&pair.server.context, denying(rules));
    assert_eq!(ask(pair.address, "/").await.0.status, 200);
    let (head, body) = ask(pair.address, "/admin/x").await;
    assert_eq!(head.status, 403);
    assert!(body.contains("default/app") && body.contains("no-admin"), "{body}");
}

#[tokio::test]
async fn each_decision_is_counted_with_who_made_it() {
    let pair = pair(echo_path().await, Protocol::Http1);
    let rules = vec![
        rule("orders", false, "client", under("/orders")),
        rule("no-admin", true, "client", under("/admin")),
    ];
    let mut inbound = access(v1::Default::Allow, rules.clone());
    let policies = &mut inbound.access.as_mut().unwrap().policies;
    let name = "default/trial".to_owned();
    policies.push(v1::AccessPolicy { name, rules, audit: true, ..v1::AccessPolicy::default() });
    told(&pair.server.context, inbound.clone());
    for path in ["/orders/1", "/orders/2", "/admin", "/", "/orders/3"] {
        ask(pair.address, path).await;
    }
    let counts = |policy: &str, rule: &str, decision: &str| {
        let labels = format!(r#"policy="{policy}",rule="{rule}",decision="{decision}""#);
        let line = format!("outrigger_access_decisions_total{{{labels}}} ");
        pair.server.metrics().lines().find_map(|text| text.strip_prefix(&line)?.parse::<u64>().ok())
    };
    assert_eq!(counts("default/app", "orders", "allowed"), Some(3));
    assert_eq!(counts("default/app", "no-admin", "denied"), Some(1));
    assert_eq!(counts("MeshDefaults outrigger-system/default", "default", "allowed"), Some(1));
    assert_eq!(counts("default/trial", "orders", "would_allow"), Some(3));
    assert_eq!(counts("default/trial", "no-admin", "would_deny"), Some(1));

    // Under other policies the places of rules are others; what was counted stays.
    inbound.access.as_mut().unwrap().policies[0].rules.reverse();
    told(&pair.server.context, inbound);
    ask(pair.address, "/orders/4").await;
    assert_eq!(counts("default/app", "orders", "allowed"), Some(4));
    assert_eq!(counts("default/app", "no-admin", "denied"), Some(1));
}

#[tokio::test]
async fn what_was_decided_on_is_what_is_forwarded() {
    let pair = pair(echo_path().await, Protocol::Http1);
    let rules =
        vec![rule("all", false, "client", everything()), rule("no-admin", true, "client", under("/admin"))];
    told(&pair.server.context, access(v1::Default::Allow, rules));
    assert_eq!(ask(pair.address, "/a//b/../c/%7euser?q=%2f").await.1, "/a/c/~user?q=%2f");
    for hidden in ["//admin", "/./admin", "/x/../admin", "/%61dmin", "/admin/", "/x/%2e%2e/admin?y"] {
        let (head, _) = ask(pair.address, hidden).await;
        assert_eq!(head.status, 403, "{hidden}");
    }
    for refused in ["/a%2fb", "/a%00b", "/../admin"] {
        let (head, _) = ask(pair.address, refused).await;
        assert_eq!(head.status, 400, "{refused}");
    }
}

#[tokio::test]
async fn before_the_controller_has_spoken_nobody_comes_in() {
    let app = echo_path().await;
    let ca = Ca::new();
    let (context, _) = outrigger_proxy::context::Context::new(config(), ca.bundle().clone());
    context.credentials.set_leaf(ca.leaf("server")).unwrap();
    let (server, inbound) = Sidecar::server(context, app);
    let service = service(Protocol::Http1, vec![endpoint("one", inbound, Some(&id("server")))]);
    let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
    let (head, body) = ask(address, "/").await;
    assert_eq!(head.status, 503);
    assert!(body.contains("discovery_unavailable: the controller has not said yet who may call"), "{body}");
    told(&server.context, v1::Inbound::default());
    assert_eq!(ask(address, "/").await.0.status, 200);
}

#[tokio::test]
async fn a_rule_of_http_never_allows_bytes_and_a_deny_of_http_denies_them() {
    for (rules, passes) in [
        (vec![rule("bytes", false, "client", everything())], true),
        (vec![rule("paths", false, "client", under("/"))], false),
        (
            vec![
                rule("bytes", false, "client", everything()),
                rule("no-admin", true, "client", under("/admin")),
            ],
            false,
        ),
    ] {
        let app = tcp_app(|mut stream| async move {
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
        })
        .await;
        let pair = pair(app, Protocol::Tcp);
        told(&pair.server.context, denying(rules.clone()));
        let mut stream = TcpStream::connect(pair.address).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        let mut answer = Vec::new();
        let read = soon("the end", stream.read_to_end(&mut answer)).await;
        assert_eq!(read.is_ok() && answer == b"ping", passes, "{rules:?}");
    }
}

#[tokio::test]
async fn callers_without_an_identity_learn_the_code_only() {
    let permissive = |config: &mut outrigger_proxy::config::Config| config.mtls = Mtls::Permissive;
    let pair = pair_with(echo_path().await, Protocol::Http1, |_| {}, permissive);
    told(&pair.server.context, denying(vec![rule("read", false, "client", everything())]));
    let (head, body) = ask(pair.inbound, "/").await;
    assert_eq!(head.status, 403);
    assert_eq!(head.headers["outrigger-reason"].to_str().unwrap().trim_end(), "proxy; access_denied;");
    assert!(!body.contains("default"), "{body}");
}

#[tokio::test]
async fn a_probe_comes_in_in_clear_and_nothing_else_does() {
    let pair = pair(echo_path().await, Protocol::Http1);
    let mut inbound = denying(vec![]);
    inbound.mode = v1::inbound::Mode::Strict.into();
    inbound.access.as_mut().unwrap().probes = vec![v1::Probe {
        port: pair.inbound.port().into(),
        method: "GET".to_owned(),
        path: "/healthz".to_owned(),
        ..v1::Probe::default()
    }];
    told(&pair.server.context, inbound);
    assert_eq!(ask(pair.inbound, "/healthz?verbose").await.0.status, 200);
    let (head, body) = ask(pair.inbound, "/").await;
    assert_eq!(head.status, 403);
    assert!(body.contains("plaintext_refused"), "{body}");
}

#[tokio::test]
async fn a_new_policy_ends_what_it_refuses_and_nothing_else() {
    let app = http1_app(|request: Request<hyper::body::Incoming>| async move {
        if request.uri() == "/stream" {
            std::future::pending::<()>().await;
        }
        Response::new(full("ok"))
    })
    .await;
    let pair = pair(app, Protocol::Http1);
    told(&pair.server.context, denying(vec![rule("all", false, "client", everything())]));
    let mut waits = http1(pair.address).await;
    let waiting = tokio::spawn(async move { waits.send_request(get("/stream")).await });
    // It is under way once the application's sidecar knows of it: a request after it was answered.
    assert_eq!(ask(pair.address, "/").await.0.status, 200);
    told(&pair.server.context, denying(vec![rule("some", false, "client", under("/other"))]));
    let (head, body, _) = whole(soon("the end", waiting).await.unwrap().unwrap()).await;
    assert_eq!(head.status, 403, "{body:?}");
    assert_eq!(ask(pair.address, "/other").await.0.status, 200);
}

#[tokio::test]
async fn a_new_policy_ends_connections_of_bytes_that_it_refuses() {
    let app = tcp_app(|mut stream| async move {
        stream.write_all(b"hello").await.unwrap();
        let _ = stream.read(&mut [0; 8]).await;
    })
    .await;
    let pair = pair(app, Protocol::Tcp);
    told(&pair.server.context, denying(vec![rule("all", false, "client", everything())]));
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    let mut greeting = [0; 5];
    soon("the greeting", stream.read_exact(&mut greeting)).await.unwrap();
    told(&pair.server.context, denying(vec![]));
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 8])).await;
    assert!(matches!(ended.expect("it must end"), Ok(0) | Err(_)));
}

#[tokio::test]
async fn a_caller_that_asks_too_often_is_told_when_to_come_back() {
    let pair = pair(echo_path().await, Protocol::Http1);
    let limit = v1::RateLimit {
        name: "slow".to_owned(),
        per: v1::rate_limit::Per::Caller.into(),
        millirequests: 100,
        burst: 3,
        tell_remaining: true,
        ..v1::RateLimit::default()
    };
    let mut inbound = access(v1::Default::Allow, vec![]);
    inbound.access.as_mut().unwrap().policies[0].limits = vec![limit];
    told(&pair.server.context, inbound);
    for left in [2, 1, 0] {
        let (head, _) = ask(pair.address, "/").await;
        assert_eq!(head.status, 200);
        let standing = head.headers["ratelimit"].to_str().unwrap();
        assert!(standing.starts_with(&format!("\"slow\";r={left};t=")), "{standing}");
        assert_eq!(head.headers["ratelimit-policy"], "\"slow\";q=3;w=30");
    }
    let (head, body) = ask(pair.address, "/").await;
    assert_eq!(head.status, 429);
    assert!(body.contains("rate_limited: AccessPolicy default/app, slow allows no more"), "{body}");
    let after: u64 = head.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=10).contains(&after), "{after}");
    assert_eq!(head.headers["ratelimit-policy"], "\"slow\";q=3;w=30");
    assert!(head.headers["ratelimit"].to_str().unwrap().starts_with("\"slow\";r=0;t="), "{head:?}");
}

#[tokio::test]
async fn a_workload_is_asked_no_more_at_once_than_it_says() {
    let (release, gate) = tokio::sync::watch::channel(false);
    let app = http1_app(move |_| {
        let mut gate = gate.clone();
        async move {
            gate.wait_for(|open| *open).await.unwrap();
            Response::new(full("done"))
        }
    })
    .await;
    let pair = pair(app, Protocol::Http1);
    let concurrency = v1::Concurrency {
        max_requests: 2,
        origin: "TrafficPolicy default/c".to_owned(),
        ..Default::default()
    };
    told(&pair.server.context, v1::Inbound { concurrency: vec![concurrency], ..v1::Inbound::default() });
    let mut all = Vec::new();
    for _ in 0..5 {
        let mut client = http1(pair.address).await;
        all.push(tokio::spawn(async move { whole(client.send_request(get("/")).await.unwrap()).await }));
    }
    // Three of five are refused at once, whichever they are; the others wait for the application.
    eventually("three are refused", || all.iter().filter(|one| one.is_finished()).count() == 3).await;
    release.send(true).unwrap();
    let mut statuses = Vec::new();
    for one in all {
        let (head, body, _) = soon("the answer", one).await.unwrap();
        if head.status == 503 {
            let body = String::from_utf8_lossy(&body).into_owned();
            assert!(body.contains("limit_reached") && body.contains("TrafficPolicy default/c"), "{body}");
        }
        statuses.push(head.status.as_u16());
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 503, 503, 503]);
}
