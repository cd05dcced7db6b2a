//! HTTP/2 and gRPC through two sidecars.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use outrigger_core::model::Protocol;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::support::*;

type Chunks = mpsc::Sender<Result<Frame<Bytes>, Infallible>>;

fn channel() -> (Chunks, BoxBody<Bytes, Infallible>) {
    let (sender, receiver) = mpsc::channel(4);
    (sender, StreamBody::new(ReceiverStream::new(receiver)).boxed())
}

#[expect(clippy::unnecessary_wraps, reason = "as streams want it")]
fn data(text: &str) -> Result<Frame<Bytes>, Infallible> {
    Ok(Frame::data(Bytes::copy_from_slice(text.as_bytes())))
}

#[expect(clippy::unnecessary_wraps, reason = "as streams want it")]
fn trailers(status: &str) -> Result<Frame<Bytes>, Infallible> {
    let mut map = HeaderMap::new();
    map.insert("grpc-status", status.parse().unwrap());
    Ok(Frame::trailers(map))
}

fn call(path: &str, body: BoxBody<Bytes, Infallible>) -> Request<BoxBody<Bytes, Infallible>> {
    Request::post(format!("http://app.example{path}"))
        .version(Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

/// Kubernetes' ports are called `http` whatever version their application knows.
#[tokio::test]
async fn a_port_that_is_called_http_has_every_version() {
    let app = http2_app(|request| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        Response::new(full("two"))
    })
    .await;
    let pair = pair(app, Protocol::Http1);
    let mut client = http2(pair.address).await;
    let sent = client.send_request(call("/", full("")));
    let (head, body, _) = whole(soon("the call", sent).await.unwrap()).await;
    assert_eq!((head.status, body.as_ref()), (StatusCode::OK, b"two".as_ref()));
}

#[tokio::test]
async fn a_call_passes_with_metadata_and_trailers() {
    let app = http2_app(|request| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        let seen = (
            request.uri().to_string(),
            request.headers()["te"].clone(),
            request.headers()["outrigger-client-id"].clone(),
            request.headers().get_all("x-bin").iter().map(http::HeaderValue::len).sum::<usize>(),
        );
        assert!(!request.headers().contains_key("outrigger-h1"));
        let collected = request.into_body().collect().await.unwrap();
        let frames = [data(&format!("{seen:?} {}", collected.to_bytes().len())), trailers("0")];
        let mut response = Response::new(StreamBody::new(tokio_stream::iter(frames)).boxed());
        response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        response
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http2(pair.address).await;
    let mut request = call("/svc/Unary", full(vec![7; 300_000]));
    for _ in 0..60 {
        request.headers_mut().append("x-bin", "b".repeat(1000).parse().unwrap());
    }
    let (head, body, trailers) = whole(soon("the call", client.send_request(request)).await.unwrap()).await;
    assert_eq!(head.status, StatusCode::OK);
    let body = String::from_utf8_lossy(&body).into_owned();
    assert!(body.contains("http://app.example/svc/Unary"), "{body}");
    assert!(body.contains(id("client").as_str()), "{body}");
    assert!(body.ends_with("60000) 300000"), "{body}");
    assert_eq!(trailers.unwrap()["grpc-status"], "0");
    for (sidecar, direction) in [(&pair.client, "outbound"), (&pair.server, "inbound")] {
        eventually("the count", || {
            sidecar.metrics().lines().any(|line| {
                line.starts_with(&format!(r#"outrigger_requests_total{{direction="{direction}""#))
                    && line
                        .contains(r#"protocol="http2",tls="mutual",code="200",grpc_status="0",reason=""} 1"#)
            })
        })
        .await;
    }
}

#[tokio::test]
async fn both_sides_of_a_stream_talk_in_turn() {
    let app = http2_app(|request| async move {
        let (sender, body) = channel();
        tokio::spawn(async move {
            let mut request = request.into_body();
            while let Some(Ok(frame)) = request.frame().await {
                // The end of a stream may come as an empty frame.
                if let Some(bytes) = frame.into_data().ok().filter(|bytes| !bytes.is_empty()) {
                    let _ = sender.send(data(&format!("echo {}", String::from_utf8_lossy(&bytes)))).await;
                }
            }
            let _ = sender.send(trailers("0")).await;
        });
        Response::new(body)
    })
    .await;
    let pair = pair(app, Protocol::Http2);
    let mut client = http2(pair.address).await;
    let (sender, body) = channel();
    let mut response = soon("the head", client.send_request(call("/svc/Bidi", body))).await.unwrap();
    for n in 0..5 {
        sender.send(data(&format!("{n}"))).await.unwrap();
        let frame = soon("a message", response.body_mut().frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), format!("echo {n}"));
    }
    drop(sender);
    let last = soon("the trailers", response.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(last.into_trailers().unwrap()["grpc-status"], "0");
}

#[tokio::test]
async fn giving_up_reaches_the_application() {
    let gone = Arc::new(AtomicUsize::new(0));
    let counter = gone.clone();
    let app = http2_app(move |request| {
        let counter = counter.clone();
        async move {
            let (sender, body) = channel();
            tokio::spawn(async move {
                // Endless, until the reader has gone.
                while sender.send(data(&"x".repeat(10_000))).await.is_ok() {}
                counter.fetch_add(1, Ordering::SeqCst);
                drop(request);
            });
            Response::new(body)
        }
    })
    .await;
    let pair = pair(app, Protocol::Http2);
    let mut client = http2(pair.address).await;
    let mut response = client.send_request(call("/svc/Stream", full(""))).await.unwrap();
    soon("a message", response.body_mut().frame()).await.unwrap().unwrap();
    drop(response);
    eventually("the cancellation", || gone.load(Ordering::SeqCst) == 1).await;
    // The connection goes on.
    let response = client.send_request(call("/svc/Stream", full(""))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_slow_reader_holds_up_nobody_else() {
    let app = http2_app(|request| async move {
        let (sender, body) = channel();
        let endless = request.uri().path() == "/endless";
        tokio::spawn(async move { while sender.send(data(&"x".repeat(10_000))).await.is_ok() && endless {} });
        Response::new(body)
    })
    .await;
    let pair = pair(app, Protocol::Http2);
    // One connection, so that the streams share its window, with windows that the test's client never runs out of.
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut client = http2(pair.address).await;
        let mut response = client.send_request(call("/endless", full(""))).await.unwrap();
        soon("a first message", response.body_mut().frame()).await.unwrap().unwrap();
        slow.push((client, response));
    }
    // Nothing more is read from these; wait until their windows are full.
    tokio::time::timeout(Duration::from_millis(300), std::future::pending::<()>()).await.unwrap_err();
    let mut client = http2(pair.address).await;
    for _ in 0..20 {
        let (head, body, _) =
            whole(soon("another call", client.send_request(call("/one", full("")))).await.unwrap()).await;
        assert_eq!(head.status, StatusCode::OK);
        assert_eq!(body.len(), 10_000);
    }
}

#[tokio::test]
async fn a_refusal_is_a_grpc_status_to_a_grpc_caller() {
    let app = nobody();
    let pair = pair(app, Protocol::Http2);
    let mut client = http2(pair.address).await;
    let (head, _, _) =
        whole(soon("the call", client.send_request(call("/svc/Unary", full("x")))).await.unwrap()).await;
    assert_eq!(head.status, StatusCode::OK);
    assert_eq!(head.headers["grpc-status"], "14");
    assert!(head.headers["outrigger-reason"].to_str().unwrap().starts_with("proxy; connect_failed; "));
}

#[tokio::test]
async fn a_reset_in_the_middle_is_no_end() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut server = h2::server::handshake(stream).await.unwrap();
        let mut calls = 0;
        let mut open = Vec::new();
        while let Some(Ok((_, mut respond))) = server.accept().await {
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            body.send_data(Bytes::from_static(b"half"), false).unwrap();
            calls += 1;
            open.push(body);
            // The reset follows when the head has gone out: with the next call.
            if calls == 2 {
                open[0].send_reset(h2::Reason::CANCEL);
            }
        }
    });
    let pair = pair(app, Protocol::Http2);
    // The h2 crate itself: hyper's client takes a stream that was cancelled for one that has ended.
    let stream = tokio::net::TcpStream::connect(pair.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut bodies = Vec::new();
    for _ in 0..2 {
        let request = Request::get("http://app.example/").body(()).unwrap();
        let (response, _) = client.send_request(request, true).unwrap();
        let mut body = soon("the head", response).await.unwrap().into_body();
        assert_eq!(soon("the half", body.data()).await.unwrap().unwrap(), "half");
        bodies.push(body);
    }
    let error = soon("the cut", bodies[0].data()).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::CANCEL), "{error}");
}

#[tokio::test]
async fn a_reset_before_the_head_is_passed_on_as_it_came() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut server = h2::server::handshake(stream).await.unwrap();
        // As a gRPC server does whose deadline has passed: its client tells it from its own clock.
        while let Some(Ok((_, mut respond))) = server.accept().await {
            respond.send_reset(h2::Reason::CANCEL);
        }
    });
    let pair = pair(app, Protocol::Http2);
    let stream = tokio::net::TcpStream::connect(pair.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get("http://app.example/").body(()).unwrap();
    let (response, _) = client.send_request(request, true).unwrap();
    let error = soon("the reset", response).await.unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::CANCEL), "{error}");
}

#[tokio::test]
async fn a_refused_stream_goes_out_again_with_its_body() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut server = h2::server::handshake(stream).await.unwrap();
        let mut refused = false;
        while let Some(Ok((request, mut respond))) = server.accept().await {
            if !refused {
                refused = true;
                respond.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut seen = Vec::new();
                while let Some(Ok(bytes)) = body.data().await {
                    let _ = body.flow_control().release_capacity(bytes.len());
                    seen.extend_from_slice(&bytes);
                }
                let trailers = body.trailers().await.unwrap().unwrap();
                let answer = format!("{} {}", seen.len(), trailers["checksum"].to_str().unwrap());
                let mut body = respond.send_response(Response::new(()), false).unwrap();
                body.send_data(answer.into(), true).unwrap();
            });
        }
    });
    let pair = pair(app, Protocol::Http2);
    let mut client = http2(pair.address).await;
    let mut trailers = HeaderMap::new();
    trailers.insert("checksum", "42".parse().unwrap());
    let frames = [data(&"x".repeat(10_000)), data(&"y".repeat(10_000)), Ok(Frame::trailers(trailers))];
    let body = StreamBody::new(tokio_stream::iter(frames)).boxed();
    let (head, body, _) = whole(soon("the call", client.send_request(call("/", body))).await.unwrap()).await;
    assert_eq!((head.status, body.as_ref()), (StatusCode::OK, b"20000 42".as_ref()), "{head:?}");
}
