//! Where messages end, and what two readers could disagree about: from applications in HTTP/1.x, and from a peer that
//! writes its own HTTP/2.

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use outrigger_core::model::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

/// Answers every request with what it read of it: the head, then the body as it was framed.
async fn mirror() -> std::net::SocketAddr {
    tcp_app(|mut stream| async move {
        let mut seen = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer).await {
                Ok(read @ 1..) => seen.extend_from_slice(&buffer[..read]),
                _ => return,
            }
            while let Some(end) = whole_request(&seen) {
                let request: Vec<u8> = seen.drain(..end).collect();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", request.len());
                stream.write_all(&[head.as_bytes(), &request].concat()).await.unwrap();
            }
        }
    })
    .await
}

/// How long the first request is, once it is there.
fn whole_request(seen: &[u8]) -> Option<usize> {
    let text = String::from_utf8_lossy(seen).to_ascii_lowercase();
    let head = text.find("\r\n\r\n")? + 4;
    if text[..head].contains("transfer-encoding: chunked") {
        return Some(head + text[head..].find("0\r\n\r\n")? + 5);
    }
    let length = text[..head]
        .split("content-length: ")
        .nth(1)
        .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
    (seen.len() >= head + length).then_some(head + length)
}

/// Client -> sidecar -> application, both in clear.
fn in_clear(app: std::net::SocketAddr) -> (Sidecar, std::net::SocketAddr) {
    let ca = Ca::new();
    let endpoints = vec![endpoint("one", app, None)];
    let (client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Http1, endpoints));
    (client, address)
}

fn body(text: &'static str) -> BoxBody<Bytes, std::convert::Infallible> {
    let frames = [Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from_static(text.as_bytes())))];
    StreamBody::new(tokio_stream::iter(frames)).boxed()
}

fn marked(method: &str, mark: &str) -> http::request::Builder {
    Request::builder().method(method).uri("http://app.example/p").header("outrigger-h1", mark)
}

async fn ask(
    pair: &Pair,
    request: Request<BoxBody<Bytes, std::convert::Infallible>>,
) -> (http::response::Parts, String) {
    let mut peer = meshed(pair).await;
    let (head, body, _) = whole(soon("the answer", peer.send_request(request)).await.unwrap()).await;
    (head, String::from_utf8_lossy(&body).into_owned())
}

#[track_caller]
fn assert_reason(answer: &str, status: &str, reason: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(answer.contains(&format!("outrigger-reason: proxy; {reason}; ")), "{answer}");
}

#[tokio::test]
async fn a_body_arrives_whatever_the_method() {
    let app = mirror().await;
    let pair = pair(app, Protocol::Detect);
    let (_direct, direct) = in_clear(app);
    for method in ["GET", "HEAD", "DELETE", "OPTIONS", "POST", "PURGE"] {
        for address in [pair.address, direct] {
            let request = format!(
                "{method} /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n\
                 5\r\nhello\r\n0\r\n\r\n"
            );
            let answer = raw(address, request.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
            // What HEAD is answered has no body.
            if method != "HEAD" {
                assert!(answer.contains("\r\nTransfer-Encoding: chunked\r\n"), "{answer}");
                assert!(answer.ends_with("\r\n5\r\nhello\r\n0\r\n\r\n"), "{answer}");
            }
        }
        if method != "HEAD" {
            let (_, seen) = ask(&pair, marked(method, "1.1").body(body("hello")).unwrap()).await;
            assert!(seen.ends_with("\r\n5\r\nhello\r\n0\r\n\r\n"), "{seen}");
        }
    }
}

#[tokio::test]
async fn no_length_is_made_up_for_what_has_no_body() {
    let app = mirror().await;
    let pair = pair(app, Protocol::Detect);
    let (_direct, direct) = in_clear(app);
    for target in ["GET /p", "OPTIONS *", "TRACE /p", "DELETE /p", "PURGE /p", "POST /p"] {
        for address in [pair.address, direct] {
            let request = format!("{target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
            let answer = raw(address, request.as_bytes()).await;
            let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
            assert!(seen.starts_with(target), "{answer}");
            assert!(!seen.contains("content-length") && !seen.contains("transfer-encoding"), "{answer}");
        }
    }
}

#[tokio::test]
async fn http10_with_a_body_of_unknown_length_is_refused() {
    let pair = pair(mirror().await, Protocol::Detect);
    let (head, _) = ask(&pair, marked("POST", "1.0").body(body("hello")).unwrap()).await;
    assert_eq!(head.status, 400);
    let sized = marked("POST", "1.0").header("content-length", "5").body(body("hello")).unwrap();
    let (head, seen) = ask(&pair, sized).await;
    assert!(head.status == 200 && seen.ends_with("\r\n\r\nhello"), "{seen}");
}

#[tokio::test]
async fn nothing_is_read_after_a_request_that_was_refused() {
    let refusing = http1_app(|_| async {
        let mut response = Response::new(full("no tunnels"));
        *response.status_mut() = http::StatusCode::METHOD_NOT_ALLOWED;
        response
    })
    .await;
    let pair1 = pair(refusing, Protocol::Detect);
    for first in [
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET a.example:80 HTTP/1.1\r\nhost: a.example:80\r\n\r\n",
        "CONNECT /p HTTP/1.1\r\nhost: a\r\n\r\n",
        "CONNECT http://a.example/ HTTP/1.1\r\nhost: a.example\r\n\r\n",
        "CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n",
    ] {
        let answer =
            raw(pair1.address, format!("{first}GET /next HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{first:?} -> {answer}");
        assert!(answer.contains("Connection: close\r\n"), "{first:?} -> {answer}");
        if !first.contains("443") {
            assert_reason(&answer, "400", "bad_request");
        }
    }
}

#[tokio::test]
async fn a_host_is_made_from_the_authority() {
    let app = mirror().await;
    let pair = pair(app, Protocol::Detect);
    let (_direct, direct) = in_clear(app);
    for address in [pair.address, direct] {
        let answer = raw(address, b"GET http://vhost.example/p HTTP/1.1\r\nconnection: close\r\n\r\n").await;
        assert!(answer.contains("\r\n\r\nGET /p HTTP/1.1\r\n"), "{answer}");
        assert!(answer.contains("\r\nHost: vhost.example\r\n"), "{answer}");
    }
    let (_, seen) = ask(&pair, marked("GET", "1.1").body(full("")).unwrap()).await;
    assert!(seen.contains("\r\nHost: app.example\r\n"), "{seen}");
}

#[tokio::test]
async fn lengths_are_one_length() {
    let pair = pair(mirror().await, Protocol::Detect);
    let request = |lengths: [&'static str; 2]| {
        let mut request = marked("POST", "1.1").body(body("hello")).unwrap();
        for length in lengths {
            request.headers_mut().append("content-length", HeaderValue::from_static(length));
        }
        request
    };
    // Between sidecars nobody writes two, not even equal ones: the stream is reset.
    for lengths in [["5", "5"], ["5", "6"]] {
        let mut peer = meshed(&pair).await;
        let refused = soon("the refusal", peer.send_request(request(lengths))).await;
        assert!(refused.is_err_and(|error| error.to_string().contains("http2 error")));
    }
    let twice = "POST /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello";
    let seen = raw(pair.address, twice.as_bytes()).await;
    assert_eq!(seen.matches("content-length: 5\r\n").count(), 1, "{seen}");
    let different = twice.replacen("length: 5", "length: 6", 1);
    assert_reason(&raw(pair.address, different.as_bytes()).await, "400", "bad_request");
}

#[tokio::test]
async fn connect_without_an_authority_is_refused() {
    let pair = pair(mirror().await, Protocol::Detect);
    let mut stream = mesh_tls(&pair).await;
    // The client library always sends a path: HEADERS by hand (RFC 7541, 6.2.2), stream 1, END_STREAM not set.
    let block = b"\x02\x07CONNECT\x00\x0coutrigger-h1\x031.1";
    let head = [0, 0, u8::try_from(block.len()).unwrap(), 1, 4, 0, 0, 0, 1];
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let bytes = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings, &head, block].concat();
    stream.write_all(&bytes).await.unwrap();
    let mut answer = Vec::new();
    // RST_STREAM on stream 1 with PROTOCOL_ERROR (RFC 9113, 8.5).
    let reset = [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 1];
    while !answer.windows(reset.len()).any(|window| window == reset) {
        let read = soon("the refusal", stream.read_buf(&mut answer)).await.unwrap();
        assert!(read > 0, "the end without a refusal: {}", String::from_utf8_lossy(&answer));
    }
}

#[tokio::test]
async fn a_body_that_its_client_breaks_is_its_clients_fault() {
    let app = mirror().await;
    let pair = pair(app, Protocol::Detect);
    let (direct_sidecar, direct) = in_clear(app);
    let request = "POST /p HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n";
    for (address, sidecar) in [(pair.address, &pair.client), (direct, &direct_sidecar)] {
        // More often than a balancer would take from an endpoint that fails.
        for _ in 0..10 {
            assert_reason(&raw(address, request.as_bytes()).await, "400", "bad_request");
        }
        let answer = raw(address, b"GET /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(!sidecar.metrics().contains(r#"reason="upstream_reset""#), "{}", sidecar.metrics());
    }
}

#[tokio::test]
async fn a_response_with_two_ends_is_refused() {
    let app = tcp_app(|mut stream| async move {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            let framing = match String::from_utf8_lossy(&buffer[..read]).split(' ').nth(1) {
                Some("/both") => "content-length: 5\r\ntransfer-encoding: chunked",
                Some("/gzip") => "transfer-encoding: gzip, chunked",
                Some("/twice") => "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
                Some("/lengths") => "content-length: 5\r\ncontent-length: 6",
                _ => "Transfer-Encoding: Chunked",
            };
            let answer = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let (_direct, direct) = in_clear(app);
    for address in [pair.address, direct] {
        for path in ["/both", "/gzip", "/twice"] {
            let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
            let answer = raw(address, request.as_bytes()).await;
            assert_reason(&answer, "502", "upstream_protocol");
            assert!(!answer.contains("hello"), "{answer}");
        }
        // The HTTP library refuses these itself.
        let answer = raw(address, b"GET /lengths HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 502 ") && !answer.contains("hello"), "{answer}");
        let answer = raw(address, b"GET /fine HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("hello"), "{answer}");
    }
}

#[tokio::test]
async fn a_request_is_framed_by_chunked_or_a_length() {
    let pair = pair(mirror().await, Protocol::Detect);
    for codings in [
        "gzip, chunked",
        "identity, chunked",
        "chunked, chunked",
        "chunked\r\ntransfer-encoding: chunked",
        "gzip\r\ntransfer-encoding: chunked",
    ] {
        let request = format!(
            "POST /p HTTP/1.1\r\nhost: a\r\ntransfer-encoding: {codings}\r\n\r\n5\r\nhello\r\n0\r\n\r\n\
             GET /next HTTP/1.1\r\nhost: a\r\n\r\n"
        );
        let answer = raw(pair.address, request.as_bytes()).await;
        assert_reason(&answer, "400", "bad_request");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
}

#[tokio::test]
async fn framing_that_a_careless_reader_would_see_is_stripped() {
    let app = mirror().await;
    let pair = pair(app, Protocol::Detect);
    let (_direct, direct) = in_clear(app);
    for address in [pair.address, direct] {
        let request = "GET /p HTTP/1.1\r\nhost: a\r\nTransfer_Encoding: chunked\r\nContent_Length: 9\r\n\
                       content.length: 9\r\nx-kept: 1\r\nconnection: close\r\n\r\n";
        let answer = raw(address, request.as_bytes()).await.to_ascii_lowercase();
        let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            seen.contains("x-kept: 1") && !seen.contains("encoding") && !seen.contains("length"),
            "{seen}"
        );
    }
}
