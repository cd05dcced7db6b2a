//! Upgrades and CONNECT through two sidecars.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::ext::Protocol as Extended;
use hyper_util::rt::TokioIo;
use outrigger_core::model::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

/// Answers the switch, then echoes what comes and ends with it.
fn switch(mut request: Request<hyper::body::Incoming>) -> Answer {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        let mut buffer = [0; 1024];
        loop {
            let read = stream.read(&mut buffer).await.unwrap();
            if read == 0 {
                break;
            }
            stream.write_all(&buffer[..read]).await.unwrap();
        }
        stream.write_all(b"the end").await.unwrap();
        stream.shutdown().await.unwrap();
    });
    Response::new(Empty::<Bytes>::new().boxed())
}

async fn talk<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut stream: S) {
    for text in ["one", "two"] {
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = [0; 3];
        soon("the echo", stream.read_exact(&mut answer)).await.unwrap();
        assert_eq!(answer, text.as_bytes());
    }
    // Half-close: what follows the end of one direction still comes.
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon("the rest", stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"the end");
}

#[tokio::test]
async fn a_websocket_is_switched_at_both_ends() {
    let app = http1_app(|request| async move {
        assert_eq!(request.method(), Method::GET);
        assert_eq!(request.headers()["upgrade"], "websocket");
        assert_eq!(request.headers()["connection"], "upgrade");
        let key = request.headers()["sec-websocket-key"].clone();
        let mut response = switch(request);
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert("connection", "upgrade".parse().unwrap());
        response.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        response.headers_mut().insert("sec-websocket-accept", key);
        response
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    for _ in 0..3 {
        let mut client = http1(pair.address).await;
        let mut request = get("/chat");
        request.headers_mut().insert("connection", "keep-alive, Upgrade".parse().unwrap());
        request.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        request.headers_mut().insert("sec-websocket-key", "k".parse().unwrap());
        let response = soon("the switch", client.send_request(request)).await.unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(response.headers()["upgrade"], "websocket");
        assert_eq!(response.headers()["sec-websocket-accept"], "k");
        talk(TokioIo::new(hyper::upgrade::on(response).await.unwrap())).await;
    }
}

#[tokio::test]
async fn an_upgrade_that_is_refused_is_an_answer_like_any_other() {
    for status in [StatusCode::OK, StatusCode::FORBIDDEN] {
        let app = http1_app(move |_| async move {
            let mut response = Response::new(full("no"));
            *response.status_mut() = status;
            response
        })
        .await;
        let pair = pair(app, Protocol::Detect);
        let mut client = http1(pair.address).await;
        for _ in 0..2 {
            let mut request = get("/chat");
            request.headers_mut().insert("connection", "upgrade".parse().unwrap());
            request.headers_mut().insert("upgrade", "websocket".parse().unwrap());
            let (head, body, _) =
                whole(soon("the answer", client.send_request(request)).await.unwrap()).await;
            assert_eq!(head.status, status, "{head:?}");
            assert!(!head.headers.contains_key("outrigger-h1"));
            assert_eq!(body, "no");
        }
    }
}

#[tokio::test]
async fn h2c_is_not_offered_on() {
    let app = http1_app(|request| async move {
        assert!(!request.headers().contains_key("upgrade"));
        assert!(!request.headers().contains_key("http2-settings"));
        Response::new(full("plain"))
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let mut request = get("/");
    request.headers_mut().insert("connection", "Upgrade, HTTP2-Settings".parse().unwrap());
    request.headers_mut().insert("upgrade", "h2c".parse().unwrap());
    request.headers_mut().insert("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA".parse().unwrap());
    let (head, body, _) = whole(soon("the answer", client.send_request(request)).await.unwrap()).await;
    assert_eq!((head.status, body.as_ref()), (StatusCode::OK, b"plain".as_ref()));
}

#[tokio::test]
async fn connect_reaches_an_application_that_is_a_proxy() {
    let app = http1_app(|request| async move {
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri(), "elsewhere.example:443");
        switch(request)
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let request = Request::connect("elsewhere.example:443")
        .header("host", "elsewhere.example:443")
        .body(full(""))
        .unwrap();
    let response = soon("the tunnel", client.send_request(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    talk(TokioIo::new(hyper::upgrade::on(response).await.unwrap())).await;
}

#[tokio::test]
async fn extended_connect_passes_between_http2_applications() {
    let app = http2_app(|request| async move {
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.extensions().get::<Extended>().unwrap().as_str(), "websocket");
        assert_eq!(request.uri().path(), "/chat");
        switch(request)
    })
    .await;
    let pair = pair(app, Protocol::Http2);
    let mut client = http2(pair.address).await;
    // The client's first request tells it that extended CONNECT is served.
    let mut request = Request::connect("http://app.example/chat").body(full("")).unwrap();
    request.extensions_mut().insert(Extended::from_static("websocket"));
    let response = soon("the tunnel", client.send_request(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    talk(TokioIo::new(hyper::upgrade::on(response).await.unwrap())).await;
}

#[tokio::test]
async fn a_peer_cannot_open_a_tunnel_for_more_http() {
    let app = http1_app(|_| async { Response::new(full("reached")) }).await;
    let pair = pair(app, Protocol::Detect);
    for protocol in ["h2c", "H2C", "foo, h2c", "foo\r\nx: y", "", "HTTP/2.0", "TLS/1.0"] {
        for mark in [Some("1.1; method=GET"), None] {
            let mut peer = meshed(&pair).await;
            // The first answer comes after the SETTINGS that allow extended CONNECT.
            let mut first = Request::get("http://app.example/").body(full("")).unwrap();
            first.headers_mut().insert("outrigger-h1", "1.1".parse().unwrap());
            let (head, _, _) = whole(soon("the first answer", peer.send_request(first)).await.unwrap()).await;
            assert_eq!(head.status, StatusCode::OK);
            let mut request = Request::connect("http://app.example/").body(full("")).unwrap();
            if let Some(mark) = mark {
                request.headers_mut().insert("outrigger-h1", mark.parse().unwrap());
            }
            request.extensions_mut().insert(Extended::from(protocol));
            let response = match soon("the refusal", peer.send_request(request)).await {
                Ok(response) => response,
                // What no field may hold is refused by the codec, with a reset.
                Err(error) => {
                    assert!(protocol.is_empty() || protocol.contains(['\r', ',']), "{protocol:?}: {error}");
                    continue;
                }
            };
            assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{protocol:?}");
            let reason = response.headers()["outrigger-reason"].to_str().unwrap();
            assert!(reason.starts_with("proxy; bad_request; "), "{protocol:?} -> {reason}");
        }
    }
}
