//! Retries, time-outs, hedges, breakers and bounds, as policies ask for them.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use outrigger_api::v1;
use outrigger_core::model::{Endpoint, Protocol, Service};

use crate::support::*;

fn with(traffic: v1::Traffic, protocol: Protocol, endpoints: Vec<Arc<Endpoint>>) -> Service {
    Service {
        traffic: policies(v1::Service { traffic: Some(traffic), ..v1::Service::default() }).traffic,
        ..service(protocol, endpoints)
    }
}

fn retry() -> v1::Retry {
    v1::Retry {
        attempts: 2,
        statuses: vec![503],
        grpc_codes: vec![14],
        backoff: 1,
        max_backoff: 50,
        budget_percent: 20,
        budget_floor: 100,
        max_body: 1024,
        ..v1::Retry::default()
    }
}

fn retrying() -> v1::Traffic {
    v1::Traffic { retry: Some(retry()), ..v1::Traffic::default() }
}

/// Fails the first `failures` requests with 503, and counts all; a good answer repeats the request's body.
async fn failing(failures: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = http1_app(move |request: Request<hyper::body::Incoming>| {
        let count = count.clone();
        async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let mut answer = Response::new(full(body));
            if count.fetch_add(1, Ordering::SeqCst) < failures {
                *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            }
            answer
        }
    })
    .await;
    (app, asked)
}

/// A client's sidecar before one application in clear.
fn before(traffic: v1::Traffic, app: SocketAddr) -> (Sidecar, SocketAddr) {
    let ca = Ca::new();
    let service = with(traffic, Protocol::Http1, vec![endpoint("app", app, None)]);
    let (client, address, _) = Sidecar::client(ca.context("client", config()), service);
    (client, address)
}

async fn ask(address: SocketAddr, request: Request<Body>) -> (http::response::Parts, String) {
    let mut client = http1(address).await;
    let (head, body, _) = whole(soon("the response", client.send_request(request)).await.unwrap()).await;
    (head, String::from_utf8(body.to_vec()).unwrap())
}

fn put(body: &'static str) -> Request<Body> {
    Request::put("/").header("host", "app.example").body(full(body)).unwrap()
}

fn post(body: &'static str) -> Request<Body> {
    Request::post("/").header("host", "app.example").body(full(body)).unwrap()
}

#[tokio::test]
async fn a_failed_request_is_sent_again_with_its_body() {
    let (app, asked) = failing(2).await;
    let (client, address) = before(retrying(), app);
    let (head, body) = ask(address, put("the body")).await;
    assert_eq!((head.status.as_u16(), body.as_str()), (200, "the body"));
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    let metrics = client.metrics();
    let line = r#"outrigger_retries_total{service="app.default",outcome="retried"} 2"#;
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn attempts_are_counted_and_the_last_failure_is_the_answer() {
    let (app, asked) = failing(9).await;
    let (_client, address) = before(retrying(), app);
    let (head, _) = ask(address, get("/")).await;
    assert_eq!((head.status.as_u16(), asked.load(Ordering::SeqCst)), (503, 3));
}

#[tokio::test]
async fn what_is_not_safe_is_sent_once_unless_it_bears_a_key() {
    let (app, asked) = failing(1).await;
    let (_client, address) = before(retrying(), app);
    assert_eq!(ask(address, post("pay")).await.0.status, 503);
    assert_eq!(asked.load(Ordering::SeqCst), 1);

    let (app, asked) = failing(1).await;
    let (_client, address) = before(retrying(), app);
    let mut keyed = post("pay");
    keyed.headers_mut().insert("idempotency-key", "\"1\"".parse().unwrap());
    assert_eq!(ask(address, keyed).await.0.status, 200);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_body_that_is_too_large_to_keep_is_sent_once() {
    let (app, asked) = failing(1).await;
    let (_client, address) = before(retrying(), app);
    let request = Request::put("/").header("host", "app.example").body(full("x".repeat(64 * 1024))).unwrap();
    assert_eq!(ask(address, request).await.0.status, 503);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_application_that_asks_for_patience_is_given_it() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = http1_app(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async {
            let mut answer = Response::new(full(""));
            *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            answer.headers_mut().insert("retry-after", "60".parse().unwrap());
            answer
        }
    })
    .await;
    let (_client, address) = before(retrying(), app);
    assert_eq!(ask(address, get("/")).await.0.status, 503);
    assert_eq!(asked.load(Ordering::SeqCst), 1, "a minute is longer than the longest pause");
}

#[tokio::test]
async fn a_grpc_status_is_read_from_the_head_and_from_trailers() {
    for in_trailers in [false, true] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let app = http2_app(move |_| {
            let first = count.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                let status: http::HeaderValue = if first { "14" } else { "0" }.parse().unwrap();
                let mut answer = if in_trailers {
                    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), status)]);
                    let body = http_body_util::Empty::new().with_trailers(async move { Some(Ok(trailers)) });
                    Response::new(body.boxed())
                } else {
                    let mut answer = Response::new(full(""));
                    answer.headers_mut().insert("grpc-status", status);
                    answer
                };
                answer.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
                answer
            }
        })
        .await;
        let ca = Ca::new();
        // A call is a POST: that it may be repeated is the policy's word, which names the status.
        let service = with(retrying(), Protocol::Http2, vec![endpoint("app", app, None)]);
        let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
        let mut client = http2(address).await;
        let request = Request::post("http://app.example/a.B/C")
            .header("content-type", "application/grpc")
            .body(full("\0\0\0\0\0"))
            .unwrap();
        let (head, _, trailers) = whole(soon("the call", client.send_request(request)).await.unwrap()).await;
        let status = head.headers.get("grpc-status").or_else(|| trailers.as_ref()?.get("grpc-status"));
        assert_eq!(status.unwrap(), "0", "in trailers: {in_trailers}");
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }
}

#[tokio::test]
async fn a_try_that_takes_too_long_is_followed_by_another() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = http1_app(move |_| {
        let first = count.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if first {
                std::future::pending::<()>().await;
            }
            Response::new(full("second"))
        }
    })
    .await;
    let traffic = v1::Traffic {
        retry: Some(v1::Retry { per_try_timeout: true, ..retry() }),
        timeouts: Some(v1::Timeouts { per_try: Some(100), ..v1::Timeouts::default() }),
        ..v1::Traffic::default()
    };
    let (_client, address) = before(traffic, app);
    let (head, body) = ask(address, get("/")).await;
    assert_eq!((head.status.as_u16(), body.as_str()), (200, "second"));
}

#[tokio::test]
async fn a_request_ends_at_its_deadline_and_the_application_is_told_how_long_it_has() {
    let app = http1_app(|request: Request<hyper::body::Incoming>| async move {
        let told = request.headers().get("request-timeout-ms").unwrap().to_str().unwrap();
        let told: u64 = told.parse().unwrap();
        assert!((1..=300).contains(&told), "{told}");
        if request.uri() == "/slow" {
            std::future::pending::<()>().await;
        }
        Response::new(full(told.to_string()))
    })
    .await;
    let origin = "TrafficPolicy default/t".to_owned();
    let timeouts = v1::Timeouts { request: Some(300), origin, ..v1::Timeouts::default() };
    let traffic = v1::Traffic { timeouts: Some(timeouts), ..v1::Traffic::default() };
    let (_client, address) = before(traffic, app);
    assert_eq!(ask(address, get("/")).await.0.status, 200);
    let begun = Instant::now();
    let (head, body) = ask(address, get("/slow")).await;
    assert_eq!(head.status, 504);
    assert!(body.contains("request_timeout: not answered within"), "{body}");
    assert!(body.contains("(TrafficPolicy default/t) by endpoint app of app.default"), "{body}");
    assert!(begun.elapsed() >= Duration::from_millis(300));

    // A caller that waits less is taken at its word.
    let mut hasty = get("/");
    hasty.headers_mut().insert("request-timeout-ms", "200".parse().unwrap());
    let (_, told) = ask(address, hasty).await;
    assert!(told.parse::<u64>().unwrap() <= 200, "{told}");
}

#[tokio::test]
async fn another_endpoint_is_asked_beside_one_that_is_slow() {
    let slow = http1_app(|_| async {
        std::future::pending::<()>().await;
        Response::new(full("slow"))
    })
    .await;
    let fast = http1_app(|_| async { Response::new(full("fast")) }).await;
    let ca = Ca::new();
    let traffic = v1::Traffic {
        hedge: Some(v1::Hedge { after: 50, origin: String::new() }),
        retry: Some(retry()),
        ..v1::Traffic::default()
    };
    let service =
        with(traffic, Protocol::Http1, vec![endpoint("slow", slow, None), endpoint("fast", fast, None)]);
    let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
    for _ in 0..8 {
        let (head, body) = ask(address, get("/")).await;
        assert_eq!((head.status.as_u16(), body.as_str()), (200, "fast"));
    }
}

#[tokio::test]
async fn an_endpoint_that_fails_again_and_again_is_put_aside() {
    let (bad, asked) = failing(usize::MAX).await;
    let good = http1_app(|_| async { Response::new(full("good")) }).await;
    let ca = Ca::new();
    // By latency alone it would hardly be asked again.
    let load_balancer = v1::LoadBalancer {
        algorithm: v1::load_balancer::Algorithm::RoundRobin.into(),
        ..v1::LoadBalancer::default()
    };
    let traffic = v1::Traffic { load_balancer: Some(load_balancer), ..v1::Traffic::default() };
    let endpoints = vec![endpoint("bad", bad, None), endpoint("good", good, None)];
    let service = with(traffic, Protocol::Http1, endpoints);
    let (client, address, _) = Sidecar::client(ca.context("client", config()), service);
    for _ in 0..200 {
        ask(address, get("/")).await;
    }
    let failures = asked.load(Ordering::SeqCst);
    // Five in a row, and the trials since; without a breaker it would be about a hundred.
    assert!((5..=12).contains(&failures), "{failures}");
    let metrics = client.metrics();
    assert!(metrics.contains(r#"outrigger_ejections_total{service="app.default","#), "{metrics}");
}

#[tokio::test]
async fn when_no_endpoint_answers_nobody_waits_for_them() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let dead = tcp_app(move |stream| {
        count.fetch_add(1, Ordering::SeqCst);
        async move { drop(stream) }
    })
    .await;
    let (_client, address) = before(v1::Traffic::default(), dead);
    let mut refused = 0;
    for _ in 0..50 {
        let (_, body) = ask(address, get("/")).await;
        refused += usize::from(body.contains("endpoints_failing"));
    }
    assert!(refused >= 35, "{refused} refused, {} asked", asked.load(Ordering::SeqCst));
}

#[tokio::test]
async fn what_a_single_endpoint_answers_is_passed_on_whatever_it_is() {
    let (bad, asked) = failing(usize::MAX).await;
    let (_client, address) = before(v1::Traffic::default(), bad);
    for _ in 0..50 {
        assert_eq!(ask(address, get("/")).await.0.status, 503);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 50);
}

#[tokio::test]
async fn no_more_requests_are_under_way_than_the_bulkhead_allows() {
    let app = http1_app(|_| async {
        std::future::pending::<()>().await;
        Response::new(full(""))
    })
    .await;
    let bulkhead =
        v1::Bulkhead { requests: 2, origin: "TrafficPolicy default/b".to_owned(), ..Default::default() };
    let traffic = v1::Traffic { bulkhead: Some(bulkhead), ..v1::Traffic::default() };
    let (_client, address) = before(traffic, app);
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = http1(address).await;
        held.push(tokio::spawn(async move { client.send_request(get("/")).await.map(drop) }));
    }
    let end = Instant::now() + PATIENCE;
    loop {
        // Until both are under way this one may be taken for one of them: it gives up soon.
        let mut client = http1(address).await;
        let answer = tokio::time::timeout(Duration::from_millis(200), client.send_request(get("/"))).await;
        if let Ok(Ok(answer)) = answer {
            let (head, body, _) = whole(answer).await;
            let body = String::from_utf8_lossy(&body).into_owned();
            assert_eq!(head.status, 503);
            assert!(body.contains("limit_reached") && body.contains("TrafficPolicy default/b"), "{body}");
            break;
        }
        assert!(Instant::now() < end, "never refused");
    }
}

fn connections(connections: u32, pending: u32) -> v1::Traffic {
    let origin = "TrafficPolicy default/b".to_owned();
    let bulkhead = v1::Bulkhead { connections, pending, origin, ..Default::default() };
    v1::Traffic { bulkhead: Some(bulkhead), ..v1::Traffic::default() }
}

/// An application that answers when the gate is open, and how many requests have come to it.
async fn gated(gate: tokio::sync::watch::Receiver<bool>) -> (SocketAddr, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = http1_app(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        let mut gate = gate.clone();
        async move {
            gate.wait_for(|open| *open).await.unwrap();
            Response::new(full("done"))
        }
    })
    .await;
    (app, asked)
}

fn opened(client: &Sidecar) -> Option<String> {
    let metrics = client.metrics();
    let line = r#"outrigger_connections_total{direction="outbound",kind="plain_h1"} "#;
    metrics.lines().find_map(|text| text.strip_prefix(line)).map(str::to_owned)
}

#[tokio::test]
async fn requests_wait_for_a_connection_where_there_may_be_no_more() {
    let (open, gate) = tokio::sync::watch::channel(false);
    let (app, asked) = gated(gate).await;
    let (client, address) = before(connections(1, 2), app);
    let mut all = vec![tokio::spawn(ask(address, get("/")))];
    eventually("it is under way", || asked.load(Ordering::SeqCst) == 1).await;
    all.extend((0..7).map(|_| tokio::spawn(ask(address, get("/")))));
    // Two wait, whichever they are; the others are told so at once.
    eventually("five are refused", || all.iter().filter(|one| one.is_finished()).count() == 5).await;
    open.send(true).unwrap();
    let mut statuses = Vec::new();
    for one in all {
        let (head, body) = soon("the answer", one).await.unwrap();
        if head.status == 503 {
            let said =
                "limit_reached: as many requests wait for a connection as TrafficPolicy default/b allows";
            assert!(body.contains(said), "{body}");
        }
        statuses.push(head.status.as_u16());
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 200, 503, 503, 503, 503, 503]);
    assert_eq!(opened(&client).as_deref(), Some("1"), "one after the other on one connection");
}

#[tokio::test]
async fn who_waits_for_a_connection_for_too_long_is_told_why_and_nobody_is_blamed() {
    let (open, gate) = tokio::sync::watch::channel(false);
    let (app, asked) = gated(gate).await;
    let (_client, address) = before(connections(1, 0), app);
    let first = tokio::spawn(ask(address, get("/")));
    eventually("it is under way", || asked.load(Ordering::SeqCst) == 1).await;
    // As many as would have the endpoint put aside, were it to blame.
    for _ in 0..6 {
        let mut hasty = get("/");
        hasty.headers_mut().insert("request-timeout-ms", "50".parse().unwrap());
        let (head, body) = ask(address, hasty).await;
        assert_eq!(head.status, 504);
        let said = "as many connections to app.default as TrafficPolicy default/b allows were in use";
        assert!(body.contains(said), "{body}");
    }
    open.send(true).unwrap();
    assert_eq!(first.await.unwrap().0.status, 200);
    assert_eq!(ask(address, get("/")).await.0.status, 200);
    assert_eq!(asked.load(Ordering::SeqCst), 2, "nobody asks for those who have given up");
}

#[tokio::test]
async fn a_connection_that_ends_makes_room_for_another() {
    let (open, gate) = tokio::sync::watch::channel(false);
    let app = http1_app(move |_| {
        let mut gate = gate.clone();
        async move {
            gate.wait_for(|open| *open).await.unwrap();
            let mut answer = Response::new(full("done"));
            answer.headers_mut().insert("connection", "close".parse().unwrap());
            answer
        }
    })
    .await;
    let (client, address) = before(connections(2, 0), app);
    let all: Vec<_> = (0..7).map(|_| tokio::spawn(ask(address, get("/")))).collect();
    open.send(true).unwrap();
    for one in all {
        assert_eq!(soon("the answer", one).await.unwrap().0.status, 200);
    }
    assert_eq!(opened(&client).as_deref(), Some("7"));
}

#[tokio::test]
async fn an_idle_connection_to_one_endpoint_makes_room_for_another_endpoint() {
    let one = http1_app(|_| async { Response::new(full("one")) }).await;
    let two = http1_app(|_| async { Response::new(full("two")) }).await;
    let load_balancer = v1::LoadBalancer {
        algorithm: v1::load_balancer::Algorithm::RoundRobin.into(),
        ..v1::LoadBalancer::default()
    };
    let traffic = v1::Traffic { load_balancer: Some(load_balancer), ..connections(1, 0) };
    let ca = Ca::new();
    let endpoints = vec![endpoint("one", one, None), endpoint("two", two, None)];
    let service = with(traffic, Protocol::Http1, endpoints);
    let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
    // By itself an idle connection ends after seconds, of which this many would take longer than anybody waits.
    let begun = Instant::now();
    for _ in 0..100 {
        assert_eq!(ask(address, get("/")).await.0.status, 200);
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn threads_take_turns_where_there_may_be_one_connection() {
    let app = http1_app(|_| async { Response::new(full("done")) }).await;
    let (mut client, busy) = before(connections(1, 0), app);
    let other = client.another_thread();
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    // There is always somebody in the line of the one thread.
    let crowd: Vec<_> = (0..4)
        .map(|_| {
            let over = over.clone();
            tokio::spawn(async move {
                let mut client = http1(busy).await;
                while !over.load(Ordering::SeqCst) {
                    let answer = client.send_request(get("/")).await.unwrap();
                    assert_eq!(whole(answer).await.0.status, 200);
                }
            })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(ask(other, get("/")).await.0.status, 200);
    }
    over.store(true, Ordering::SeqCst);
    for one in crowd {
        soon("the crowd's end", one).await.unwrap();
    }
}

/// Twenty a second; an endpoint changes its side after so many in a row.
fn checks(healthy: u32, unhealthy: u32) -> v1::HealthCheck {
    let path = "/healthz".to_owned();
    v1::HealthCheck { path, interval: 50, timeout: 1000, healthy, unhealthy, ..v1::HealthCheck::default() }
}

#[tokio::test]
async fn a_check_that_finds_no_place_among_the_connections_says_nothing() {
    let (open, gate) = tokio::sync::watch::channel(false);
    let (asked, checked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (asked.clone(), checked.clone());
    let busy = http1_app(move |request: Request<hyper::body::Incoming>| {
        let is_check = request.uri() == "/healthz";
        if is_check { &counts.1 } else { &counts.0 }.fetch_add(1, Ordering::SeqCst);
        let mut gate = gate.clone();
        async move {
            if !is_check {
                gate.wait_for(|open| *open).await.unwrap();
            }
            Response::new(full("busy"))
        }
    })
    .await;
    let sound = http1_app(|_| async { Response::new(full("sound")) }).await;
    // One check that fails would put an endpoint aside for good.
    let health_check = checks(1000, 1);
    let traffic = v1::Traffic { health_check: Some(health_check), ..connections(1, 0) };
    let ca = Ca::new();
    let endpoints = vec![endpoint("busy", busy, None), endpoint("sound", sound, None)];
    let service = with(traffic, Protocol::Http1, endpoints);
    let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
    let held = loop {
        let one = tokio::spawn(ask(address, get("/")));
        eventually("an answer, or none", || one.is_finished() || asked.load(Ordering::SeqCst) > 0).await;
        if asked.load(Ordering::SeqCst) > 0 {
            break one;
        }
    };
    let before = checked.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(checked.load(Ordering::SeqCst), before, "a check went out past the bound");
    open.send(true).unwrap();
    assert_eq!(held.await.unwrap().1, "busy");
    let end = Instant::now() + PATIENCE;
    while ask(address, get("/")).await.1 != "busy" {
        assert!(Instant::now() < end, "it was put aside");
    }
}

#[tokio::test]
async fn an_endpoint_that_fails_its_health_checks_is_asked_when_nothing_else_is_left() {
    let (well, health) = tokio::sync::watch::channel(false);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let ailing = http1_app(move |request: Request<hyper::body::Incoming>| {
        let mut answer = Response::new(full("ailing"));
        if request.uri() == "/healthz" {
            if !*health.borrow() {
                *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            }
        } else {
            count.fetch_add(1, Ordering::SeqCst);
        }
        async move { answer }
    })
    .await;
    let sound = http1_app(|_| async { Response::new(full("sound")) }).await;
    let health_check = checks(1, 2);
    let traffic = v1::Traffic { health_check: Some(health_check), ..v1::Traffic::default() };
    let ca = Ca::new();
    let endpoints = vec![endpoint("ailing", ailing, None), endpoint("sound", sound, None)];
    let service = with(traffic, Protocol::Http1, endpoints);
    let (_client, address, _) = Sidecar::client(ca.context("client", config()), service);
    let end = Instant::now() + PATIENCE;
    // Until it is found out; from then on nobody asks it.
    loop {
        let before = asked.load(Ordering::SeqCst);
        for _ in 0..20 {
            assert_eq!(ask(address, get("/")).await.0.status, 200);
        }
        if asked.load(Ordering::SeqCst) == before {
            break;
        }
        assert!(Instant::now() < end, "it is still asked");
    }
    well.send(true).unwrap();
    while ask(address, get("/")).await.1 != "ailing" {
        assert!(Instant::now() < end, "it is not asked again");
    }
}
