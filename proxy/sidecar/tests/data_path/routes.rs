//! Routes: which rule takes a request, where it goes, and what is changed on the way.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use http::{Request, Response};
use outrigger_api::v1;
use outrigger_core::model::{Protocol, Service};
use tokio::{io::AsyncReadExt as _, net::TcpListener};

use crate::support::*;

/// Answers with a word and what it was asked.
async fn named(name: &'static str) -> std::net::SocketAddr {
    http1_app(move |request: Request<hyper::body::Incoming>| async move {
        let headers = request.headers();
        let said: Vec<String> = ["x-set", "x-added", "x-gone", "host"]
            .iter()
            .flat_map(|name| headers.get_all(*name))
            .map(|value| value.to_str().unwrap().to_owned())
            .collect();
        let mut answer = Response::new(full(format!("{name} {} {}", request.uri(), said.join(","))));
        answer.headers_mut().insert("x-of-the-application", "kept out".parse().unwrap());
        answer
    })
    .await
}

fn backend(service: &str, weight: u32) -> v1::Backend {
    v1::Backend { service: service.to_owned(), port: 80, weight, ..v1::Backend::default() }
}

fn prefix(value: &str) -> v1::RouteMatch {
    let kind = v1::path_match::Kind::Prefix.into();
    v1::RouteMatch {
        path: Some(v1::PathMatch { kind, value: value.to_owned() }),
        ..v1::RouteMatch::default()
    }
}

fn route(rules: Vec<v1::RouteRule>) -> v1::Service {
    let route = v1::Route {
        kind: "HTTPRoute".to_owned(),
        name: "default/app".to_owned(),
        rules,
        ..v1::Route::default()
    };
    v1::Service { routes: vec![route], ..v1::Service::default() }
}

fn rule(matches: Vec<v1::RouteMatch>, backends: Vec<v1::Backend>) -> v1::RouteRule {
    v1::RouteRule { name: "rule 0".to_owned(), matches, backends, ..v1::RouteRule::default() }
}

/// Services `app.default` with these policies and `other.default`, each with an application of its name.
async fn two(wire: v1::Service) -> (Sidecar, std::net::SocketAddr) {
    let ca = Ca::new();
    let app = endpoint("app", named("app").await, None);
    let other = endpoint("other", named("other").await, None);
    let service = Service { routes: policies(wire).routes, ..service(Protocol::Http1, vec![app]) };
    let other =
        Service { name: "other.default".into(), ..crate::support::service(Protocol::Http1, vec![other]) };
    let (client, address, _) = Sidecar::client_of(ca.context("client", config()), service, vec![other]);
    (client, address)
}

async fn ask(address: std::net::SocketAddr, request: Request<Body>) -> (http::response::Parts, String) {
    let mut client = http1(address).await;
    let (head, body, _) = whole(soon("the response", client.send_request(request)).await.unwrap()).await;
    (head, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_rule_leads_to_another_service_and_what_no_rule_takes_is_refused() {
    let rules = vec![
        rule(vec![prefix("/app")], vec![backend("app.default", 1)]),
        rule(vec![prefix("/other")], vec![backend("other.default", 1)]),
    ];
    let (_client, address) = two(route(rules)).await;
    assert_eq!(ask(address, get("/app/1?x=2")).await.1, "app /app/1?x=2 app.example");
    assert_eq!(ask(address, get("/other")).await.1, "other /other app.example");
    let (head, body) = ask(address, get("/others")).await;
    assert_eq!(head.status, 404);
    let said =
        "no_route: no rule of HTTPRoute default/app takes GET /others at app.default:80 (host app.example)";
    assert!(body.contains(said), "{body}");
}

#[tokio::test]
async fn weights_share_and_an_invalid_backend_gets_its_share_of_500s() {
    let invalid =
        v1::Backend { invalid: "there is no Service gone".to_owned(), ..backend("gone.default", 1) };
    let rules = vec![rule(vec![], vec![backend("app.default", 1), backend("other.default", 0), invalid])];
    let (_client, address) = two(route(rules)).await;
    let (mut good, mut bad) = (0, 0);
    for _ in 0..60 {
        let (head, body) = ask(address, get("/")).await;
        match head.status.as_u16() {
            200 if body.starts_with("app ") => good += 1,
            500 if body.contains("there is no Service gone") => bad += 1,
            _ => panic!("{head:?} {body}"),
        }
    }
    // Each is half: that one of them comes fewer than ten times in sixty has a chance of one in 10^7.
    assert!(good > 10 && bad > 10, "{good} {bad}");
}

#[tokio::test]
async fn heads_are_changed_as_the_rule_says() {
    let field = |name: &str, value: &str| v1::HeaderField { name: name.to_owned(), value: value.to_owned() };
    let filters = v1::Filters {
        request_headers: Some(v1::HeaderChange {
            set: vec![field("x-set", "new")],
            add: vec![field("x-added", "two")],
            remove: vec!["x-gone".to_owned()],
        }),
        response_headers: Some(v1::HeaderChange {
            set: vec![field("x-of-the-route", "yes")],
            remove: vec!["x-of-the-application".to_owned()],
            ..v1::HeaderChange::default()
        }),
        rewrite: Some(v1::Rewrite {
            hostname: "inner.example".to_owned(),
            path: Some(v1::PathChange { change: Some(v1::path_change::Change::Prefix("/v2".to_owned())) }),
        }),
        ..v1::Filters::default()
    };
    let rules = vec![v1::RouteRule {
        filters: Some(filters),
        ..rule(vec![prefix("/v1")], vec![backend("app.default", 1)])
    }];
    let (_client, address) = two(route(rules)).await;
    let mut request = get("/v1/a?b=c");
    for (name, value) in [("x-set", "old"), ("x-added", "one"), ("x-gone", "here")] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let (head, body) = ask(address, request).await;
    assert_eq!(body, "app /v2/a?b=c new,one,two,inner.example");
    assert_eq!(head.headers.get("x-of-the-route").unwrap(), "yes");
    assert!(!head.headers.contains_key("x-of-the-application"), "{head:?}");
}

#[tokio::test]
async fn a_redirect_answers_without_asking_anybody() {
    let redirect = v1::Redirect {
        scheme: "https".to_owned(),
        hostname: "new.example".to_owned(),
        status: 301,
        ..v1::Redirect::default()
    };
    let filters = v1::Filters { redirect: Some(redirect), ..v1::Filters::default() };
    let rules = vec![v1::RouteRule { filters: Some(filters), ..rule(vec![], vec![]) }];
    let (_client, address) = two(route(rules)).await;
    let (head, _) = ask(address, get("/a?b")).await;
    assert_eq!(head.status, 301);
    assert_eq!(head.headers.get("location").unwrap(), "https://new.example/a?b");
}

/// A service of which `other.default` sees every request.
async fn mirrored() -> Service {
    let mirror = v1::Mirror { backend: Some(backend("other.default", 1)), per_million: 1_000_000 };
    let filters = v1::Filters { mirrors: vec![mirror], ..v1::Filters::default() };
    let wire = route(vec![v1::RouteRule {
        filters: Some(filters),
        ..rule(vec![], vec![backend("app.default", 1)])
    }]);
    let app = service(Protocol::Http1, vec![endpoint("app", named("app").await, None)]);
    Service { routes: policies(wire).routes, ..app }
}

#[tokio::test]
async fn a_mirror_sees_the_request_with_its_body_and_nobody_waits_for_it() {
    let (seen, saw) = tokio::sync::mpsc::channel(1);
    let shadow = http1_app(move |request: Request<hyper::body::Incoming>| {
        let seen = seen.clone();
        async move {
            let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap().to_bytes();
            seen.send(body).await.unwrap();
            std::future::pending::<Answer>().await
        }
    })
    .await;
    let mut saw = saw;
    let ca = Ca::new();
    let app = mirrored().await;
    let other = Service {
        name: "other.default".into(),
        ..service(Protocol::Http1, vec![endpoint("other", shadow, None)])
    };
    let (_client, address, _) = Sidecar::client_of(ca.context("client", config()), app, vec![other]);
    let request = Request::post("/").header("host", "app.example").body(full("a body")).unwrap();
    let (head, body) = ask(address, request).await;
    assert_eq!((head.status.as_u16(), body.as_str()), (200, "app / app.example"));
    assert_eq!(soon("the mirror", saw.recv()).await.unwrap(), "a body");
}

#[tokio::test]
async fn a_mirror_that_never_answers_is_given_up_when_its_time_is_over() {
    let shadow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shadows_address = shadow.local_addr().unwrap();
    let ca = Ca::new();
    let app = mirrored().await;
    let timeouts = v1::Timeouts { request: Some(200), ..v1::Timeouts::default() };
    let traffic = v1::Traffic { timeouts: Some(timeouts), ..v1::Traffic::default() };
    let other = Service {
        name: "other.default".into(),
        traffic: policies(v1::Service { traffic: Some(traffic), ..v1::Service::default() }).traffic,
        ..service(Protocol::Http1, vec![endpoint("other", shadows_address, None)])
    };
    let (_client, address, _) = Sidecar::client_of(ca.context("client", config()), app, vec![other]);
    assert_eq!(ask(address, get("/")).await.0.status, 200);
    let (mut copy, _) = soon("the mirror", shadow.accept()).await.unwrap();
    let mut head = Vec::new();
    // By a reset, as whoever waits for the rest must know.
    let _ = soon("the copy's end", copy.read_to_end(&mut head)).await;
    let head = String::from_utf8_lossy(&head);
    assert!(head.starts_with("GET / HTTP/1.1\r\n") && !head.contains("request-timeout-ms"), "{head}");
}

#[tokio::test]
async fn faults_are_injected_for_their_share() {
    let fault = v1::Fault {
        abort_status: 418,
        abort_per_million: 1_000_000,
        delay: 50,
        delay_per_million: 1_000_000,
        origin: "TrafficPolicy default/chaos".to_owned(),
        ..v1::Fault::default()
    };
    let traffic = v1::Traffic { fault: Some(fault), ..v1::Traffic::default() };
    let rules =
        vec![v1::RouteRule { traffic: Some(traffic), ..rule(vec![], vec![backend("app.default", 1)]) }];
    let (_client, address) = two(route(rules)).await;
    let (head, body) = ask(address, get("/")).await;
    assert_eq!(head.status, 418);
    assert!(body.contains("fault_injected: a fault that TrafficPolicy default/chaos injects"), "{body}");
}

#[tokio::test]
async fn an_injected_delay_passes_before_the_application_is_asked() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = http1_app(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async { Response::new(full("late")) }
    })
    .await;
    let fault = v1::Fault { delay: 300, delay_per_million: 1_000_000, ..v1::Fault::default() };
    let traffic = v1::Traffic { fault: Some(fault), ..v1::Traffic::default() };
    let ca = Ca::new();
    let service = Service {
        traffic: policies(v1::Service { traffic: Some(traffic), ..v1::Service::default() }).traffic,
        ..service(Protocol::Http1, vec![endpoint("app", app, None)])
    };
    let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
    let begun = std::time::Instant::now();
    let (head, body) = ask(address, get("/")).await;
    assert_eq!((head.status.as_u16(), body.as_str()), (200, "late"));
    assert!(begun.elapsed() >= std::time::Duration::from_millis(300));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn the_authority_chooses_an_external_service_where_one_of_its_endpoints_was_dialled() {
    let filters = v1::Filters {
        request_headers: Some(v1::HeaderChange {
            set: vec![v1::HeaderField { name: "x-set".to_owned(), value: "by the route".to_owned() }],
            ..v1::HeaderChange::default()
        }),
        ..v1::Filters::default()
    };
    let wire = route(vec![v1::RouteRule {
        filters: Some(filters),
        ..rule(vec![], vec![backend("app.default", 1)])
    }]);
    let endpoints = vec![endpoint("dead", nobody(), None), endpoint("one", named("one").await, None)];
    let service = Service { routes: policies(wire).routes, ..service(Protocol::Http1, endpoints) };
    let to = async |address, host: &str| {
        let request = Request::get("/").header("host", host).body(full("")).unwrap();
        let (head, body) = ask(address, request).await;
        (head.status.as_u16(), body)
    };
    let ca = Ca::new();
    let context = || ca.context("client", config());
    let (_client, one) = Sidecar::dialling(context(), service.clone(), "one", "api.partner.example");
    for host in ["api.partner.example", "API.partner.example:8080"] {
        assert_eq!(to(one, host).await, (200, format!("one / by the route,{host}")));
    }
    for host in ["app.example", "x.api.partner.example"] {
        assert_eq!(to(one, host).await, (200, format!("one / {host}")), "exactly that endpoint");
    }
    // The name means the service, whichever of its addresses somebody has looked up.
    let (_client, dead) = Sidecar::dialling(context(), service, "dead", "api.partner.example");
    assert_eq!(to(dead, "api.partner.example").await.0, 200);
    assert_eq!(to(dead, "app.example").await.0, 503);
}
