//! Refusals, failover, time-outs and leaving.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use outrigger_core::{model::Protocol, resolve::Ranges};
use outrigger_proxy::{config::DrainTimes, discovery::directory::Directory, drain::Phase};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    time::timeout,
};

use crate::support::*;

async fn hello(_: Request<hyper::body::Incoming>) -> Answer {
    Response::new(full("hello"))
}

fn reason(head: &http::response::Parts) -> &str {
    head.headers.get("outrigger-reason").map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn a_service_without_endpoints_says_so() {
    let ca = Ca::new();
    let (_client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Http1, vec![]));
    let mut client = http1(address).await;
    let (head, body, _) = whole(soon("the refusal", client.send_request(get("/"))).await.unwrap()).await;
    assert_eq!(head.status, 503);
    assert!(reason(&head).starts_with("proxy; no_endpoints; "), "{head:?}");
    let said = "app.default has no endpoint for port 80: it has none at all";
    assert!(String::from_utf8_lossy(&body).contains(said), "{body:?}");
}

#[tokio::test]
async fn an_unknown_service_is_refused_with_a_response_or_a_reset() {
    let ca = Ca::new();
    let mut context = ca.context("client", config());
    context.directory = Directory::fixed([], Ranges::default());
    let (_client, address) = Sidecar::unknown(context);
    let answer = raw(address, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("; discovery_unavailable; "), "{answer}");
    assert!(is_reset(address).await);
}

#[tokio::test]
async fn who_dials_the_proxy_itself_is_sent_away() {
    let ca = Ca::new();
    let (sidecar, outbound, inbound) = Sidecar::transparent(ca.context("client", config()));
    let answer = raw(outbound, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 508 ") && answer.contains("; loop; "), "{answer}");
    assert!(is_reset(inbound).await);
    assert!(sidecar.metrics().contains(r#"outrigger_refused_total{direction="inbound",outcome="loop"} 1"#));
}

#[tokio::test]
async fn a_dead_endpoint_costs_no_request() {
    let app = http1_app(hello).await;
    let ca = Ca::new();
    let (_server, inbound) = Sidecar::server(ca.context("server", config()), app);
    // One is dead at its sidecar, one has a sidecar and no application, one is alive.
    let (_lonely, half_dead) = Sidecar::server(ca.context("server", config()), nobody());
    let endpoints = vec![
        endpoint("alive", inbound, Some(&id("server"))),
        endpoint("dead", nobody(), Some(&id("server"))),
        endpoint("half", half_dead, Some(&id("server"))),
    ];
    let (_client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Detect, endpoints));
    let mut client = http1(address).await;
    for _ in 0..30 {
        let (head, _, _) = whole(soon("the response", client.send_request(get("/"))).await.unwrap()).await;
        assert_eq!(head.status, 200, "{head:?}");
    }
}

#[tokio::test]
async fn an_endpoint_without_a_sidecar_is_served_in_clear() {
    let app = http1_app(|request| async move {
        assert!(!request.headers().keys().any(|name| name.as_str().starts_with("outrigger-")));
        Response::new(full("hello"))
    })
    .await;
    let ca = Ca::new();
    let endpoints = vec![endpoint("plain", app, None)];
    let (_client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Detect, endpoints));
    let mut client = http1(address).await;
    for _ in 0..3 {
        let (head, body, _) = whole(soon("the response", client.send_request(get("/"))).await.unwrap()).await;
        assert_eq!((head.status, body.as_ref()), (StatusCode::OK, b"hello".as_ref()));
    }
}

#[tokio::test]
async fn a_request_without_a_response_ends_in_time() {
    let app = http1_app(|_| std::future::pending::<Answer>()).await;
    let pair = pair_with(app, Protocol::Detect, |client| client.timeouts.request = millis(100), |_| {});
    let mut client = http1(pair.address).await;
    let (head, _, _) = whole(soon("the time-out", client.send_request(get("/"))).await.unwrap()).await;
    assert_eq!(head.status, 504);
    assert!(reason(&head).starts_with("proxy; request_timeout; "), "{head:?}");
}

#[tokio::test]
async fn a_slow_head_is_cut_and_an_idle_connection_is_not() {
    let app = http1_app(hello).await;
    let pair = pair_with(app, Protocol::Http1, |client| client.timeouts.headers = millis(200), |_| {});
    let mut slow = tokio::net::TcpStream::connect(pair.address).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost: ").await.unwrap();
    let mut idle = http1(pair.address).await;
    whole(idle.send_request(get("/")).await.unwrap()).await;
    let read = soon("the cut", slow.read(&mut [0; 8])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    let (head, _, _) = whole(idle.send_request(get("/")).await.unwrap()).await;
    assert_eq!(head.status, 200);
}

#[tokio::test]
async fn a_request_is_repeated_on_a_new_connection_only_where_it_is_safe() {
    // Closes every connection without an answer to its second request.
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = requests.clone();
    let app = tcp_app(move |mut stream| {
        let counter = counter.clone();
        async move {
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer).await;
            counter.fetch_add(1, Ordering::SeqCst);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            if stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                counter.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    let pair = pair(app, Protocol::Http1);
    let mut client = http1(pair.address).await;
    for expected in [1, 3] {
        let (head, _, _) = whole(soon("a GET", client.send_request(get("/"))).await.unwrap()).await;
        assert_eq!(head.status, 200, "{head:?}");
        assert_eq!(requests.load(Ordering::SeqCst), expected);
    }
    let post = Request::post("/").header("host", "a").body(full("once")).unwrap();
    let (head, _, _) = whole(soon("a POST", client.send_request(post)).await.unwrap()).await;
    assert_eq!(head.status, 502, "{head:?}");
    assert!(reason(&head).starts_with("proxy; upstream_reset; "), "{head:?}");
    assert_eq!(requests.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn what_is_under_way_survives_a_drain() {
    let permits = Arc::new(Semaphore::new(0));
    let (gate, arrived) = (permits.clone(), Arc::new(AtomicUsize::new(0)));
    let counter = arrived.clone();
    let app = http1_app(move |_| {
        let (gate, counter) = (gate.clone(), counter.clone());
        async move {
            counter.fetch_add(1, Ordering::SeqCst);
            gate.acquire().await.unwrap().forget();
            Response::new(full("late"))
        }
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let under_way = tokio::spawn(async move { whole(client.send_request(get("/")).await.unwrap()).await });
    eventually("the request", || arrived.load(Ordering::SeqCst) == 1).await;
    let drain = pair.server.context.drain.clone();
    let times = DrainTimes { min: millis(300), max: millis(15_000) };
    let draining = tokio::spawn(async move { drain.run(&times).await });
    eventually("the drain", || pair.server.context.drain.phase() == Phase::Inbound).await;
    // A caller that has not heard yet is still served, on a new connection.
    let mut other = http1(pair.address).await;
    let second = tokio::spawn(async move { whole(other.send_request(get("/")).await.unwrap()).await });
    eventually("the second request", || arrived.load(Ordering::SeqCst) == 2).await;
    permits.add_permits(2);
    for request in [under_way, second] {
        let (head, body, _) = soon("the response", request).await.unwrap();
        assert_eq!((head.status, body.as_ref()), (StatusCode::OK, b"late".as_ref()));
    }
    soon("the drain", draining).await.unwrap();
    pair.server.ended().await;
}

#[tokio::test]
async fn a_rolling_restart_fails_no_request() {
    // It reads what it is sent: hyper closes connections with unread bodies, which would be the application's failure.
    let app = http1_app(|request| async move {
        let body = request.into_body().collect().await.unwrap();
        Response::new(full(body.to_bytes()))
    })
    .await;
    let ca = Ca::new();
    let (one, first) = Sidecar::server(ca.context("server", config()), app);
    let (_two, second) = Sidecar::server(ca.context("server", config()), app);
    let both =
        vec![endpoint("one", first, Some(&id("server"))), endpoint("two", second, Some(&id("server")))];
    let (sidecar, address, handle) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Detect, both));
    let failed = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicUsize::new(0));
    let load: Vec<_> = (0..8)
        .map(|_| {
            let (failed, done) = (failed.clone(), done.clone());
            tokio::spawn(async move {
                let mut client = http1(address).await;
                loop {
                    let post = Request::post("/").header("host", "a").body(full("x")).unwrap();
                    match client.send_request(post).await {
                        Ok(response) if response.status() == 200 => {
                            response.into_body().collect().await.unwrap();
                        }
                        outcome => {
                            eprintln!("failed: {outcome:?}");
                            failed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    eventually("some load", || done.load(Ordering::SeqCst) > 200).await;
    let drain = one.context.drain.clone();
    let times = DrainTimes { min: millis(300), max: millis(10_000) };
    let draining = tokio::spawn(async move { drain.run(&times).await });
    eventually("the drain's begin", || one.context.drain.phase() == Phase::Inbound).await;
    handle.store(Arc::new(service(Protocol::Detect, vec![endpoint("two", second, Some(&id("server")))])));
    soon("the drain", draining).await.unwrap();
    one.ended().await;
    let so_far = done.load(Ordering::SeqCst);
    eventually("load after the restart", || done.load(Ordering::SeqCst) > so_far + 200).await;
    for task in load {
        task.abort();
    }
    assert_eq!(failed.load(Ordering::SeqCst), 0, "{}", sidecar.metrics());
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_the_others_served() {
    let app = http1_app(hello).await;
    let pair = pair_with(app, Protocol::Http1, |client| client.limits.connections = 2, |_| {});
    let mut first = http1(pair.address).await;
    whole(first.send_request(get("/")).await.unwrap()).await;
    let mut second = http1(pair.address).await;
    whole(second.send_request(get("/")).await.unwrap()).await;
    assert!(is_reset(pair.address).await);
    drop(first);
    tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let Ok(mut stream) = tokio::net::TcpStream::connect(pair.address).await else { continue };
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
            let mut answer = String::new();
            if stream.read_to_string(&mut answer).await.is_ok() && answer.starts_with("HTTP/1.1 200") {
                break;
            }
        }
    })
    .await
    .unwrap();
    assert!(
        pair.client
            .metrics()
            .contains(r#"outrigger_refused_total{direction="outbound",outcome="overloaded"}"#)
    );
}

/// Connections that the kernel dropped because somebody's queue was full, on this host since it started.
fn drops() -> u64 {
    let counters = std::fs::read_to_string("/proc/net/netstat").unwrap();
    let mut lines = counters.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "ListenDrops").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// The kernel drops the first SYN and repeats it after a second: later than an endpoint that is away should be noticed, and
/// what the client would see without a mesh.
#[tokio::test]
async fn an_application_whose_queue_is_full_is_waited_for() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let application = socket.listen(1).unwrap();
    let address = application.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        queue.push(stream.unwrap());
    }
    let pair = pair_with(address, Protocol::Http1, |_| {}, |config| config.timeouts.connect = millis(50));
    let before = drops();
    let asked = tokio::spawn(raw(pair.address, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"));
    eventually("a dropped connection", || drops() > before).await;
    drop(queue);
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = application.accept().await.unwrap();
            if matches!(stream.read(&mut [0; 1024]).await, Ok(1..)) {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate").await.unwrap();
            }
        }
    });
    let answer = soon("the answer", asked).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("late"), "{answer}");
    serving.abort();
}
