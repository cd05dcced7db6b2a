//! HTTP/1.1 through two sidecars.

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use outrigger_core::model::Protocol;

use crate::support::*;

async fn echo(request: Request<hyper::body::Incoming>) -> Answer {
    let head = format!("{} {} {:?}", request.method(), request.uri(), request.version());
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut response = Response::new(full(body));
    for (name, value) in &headers {
        response
            .headers_mut()
            .append(format!("saw-{name}").parse::<http::HeaderName>().unwrap(), value.clone());
    }
    response.headers_mut().insert("saw", head.parse().unwrap());
    response
}

#[tokio::test]
async fn a_request_arrives_as_it_was_sent() {
    let app = http1_app(echo).await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let request = Request::post("/path?q=1")
        .header("host", "app.example:8080")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("x-hop", "gone")
        .header("connection", "x-hop")
        .body(full("question"))
        .unwrap();
    let (head, body, _) = whole(soon("the response", client.send_request(request)).await.unwrap()).await;
    assert_eq!(head.status, StatusCode::OK);
    assert_eq!(head.headers["saw"], "POST /path?q=1 HTTP/1.1");
    assert_eq!(head.headers["saw-host"], "app.example:8080");
    assert_eq!(head.headers["saw-content-length"], "8");
    assert_eq!(head.headers.get_all("saw-cookie").iter().count(), 2);
    assert_eq!(head.headers["saw-outrigger-client-id"], id("client").as_str());
    assert!(!head.headers.contains_key("saw-x-hop"));
    assert!(!head.headers.contains_key("saw-outrigger-h1"));
    assert_eq!(body, "question");

    let metrics = pair.client.metrics();
    for expected in [
        r#"outrigger_requests_total{direction="outbound",service="app.default",peer="spiffe://outrigger.local/ns/default/sa/server",protocol="http1",tls="mutual",code="200",grpc_status="",reason=""} 1"#,
        r#"tls_version="1.3",key_exchange="X25519MLKEM768"} 1"#,
    ] {
        assert!(metrics.contains(expected), "{expected} is missing in\n{metrics}");
    }
}

#[tokio::test]
async fn large_bodies_stream_both_ways() {
    const CHUNK: usize = 64 * 1024;
    const CHUNKS: usize = 256;
    let app = http1_app(|request| async {
        // Sent back as it comes: neither side holds the whole.
        Response::new(request.into_body().map_err(|_| unreachable!()).boxed())
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let chunks = futures_util::stream::iter((0..CHUNKS).map(|n| {
        Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(vec![
            u8::try_from(n % 251).unwrap();
            CHUNK
        ])))
    }));
    let request = Request::post("/").header("host", "a").body(StreamBody::new(chunks).boxed()).unwrap();
    let (head, body, _) = whole(soon("the response", client.send_request(request)).await.unwrap()).await;
    assert_eq!(head.status, StatusCode::OK);
    assert_eq!(body.len(), CHUNK * CHUNKS);
    assert!(
        body.chunks(CHUNK).enumerate().all(|(n, chunk)| chunk.iter().all(|b| usize::from(*b) == n % 251))
    );
}

#[tokio::test]
async fn responses_without_a_body_keep_their_meaning() {
    let app = tcp_app(|mut stream| async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut seen = Vec::new();
        loop {
            let mut buffer = [0; 1024];
            let read = stream.read(&mut buffer).await.unwrap_or(0);
            if read == 0 {
                return;
            }
            seen.extend_from_slice(&buffer[..read]);
            while let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") {
                let request: Vec<u8> = seen.drain(..end + 4).collect();
                let answer: &[u8] = if request.starts_with(b"HEAD") {
                    b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"
                } else if request.starts_with(b"GET /204") {
                    b"HTTP/1.1 204 No Content\r\nx: 1\r\n\r\n"
                } else if request.starts_with(b"GET /304") {
                    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 99\r\netag: \"e\"\r\n\r\n"
                } else {
                    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
                };
                stream.write_all(answer).await.unwrap();
            }
        }
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let request = "HEAD / HTTP/1.1\r\nhost: a\r\n\r\nGET /204 HTTP/1.1\r\nhost: a\r\n\r\nGET /304 HTTP/1.1\r\nhost: a\r\n\r\n\
                   GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let answer = raw(pair.address, request.as_bytes()).await.to_ascii_lowercase();
    // Pipelined, in order, and nothing that the application did not say.
    let expected = "http/1.1 200 ok\r\ncontent-length: 1234\r\n\r\n\
                    http/1.1 204 no content\r\nx: 1\r\n\r\n\
                    http/1.1 304 not modified\r\ncontent-length: 99\r\netag: \"e\"\r\n\r\n\
                    http/1.1 200 ok\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn http10_stays_http10() {
    let app = http1_app(echo).await;
    let pair = pair(app, Protocol::Detect);
    let answer = raw(pair.address, b"GET /old HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    assert!(answer.contains("saw: GET /old HTTP/1.0\r\n"), "{answer}");
}

#[tokio::test]
async fn trailers_pass_in_both_directions() {
    let app = http1_app(|request| async move {
        let trailers = request.into_body().collect().await.unwrap().trailers().cloned().unwrap_or_default();
        let seen = trailers.get("checksum").cloned();
        let frames = [
            Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from_static(b"body"))),
            Ok(Frame::trailers(
                [("answer-checksum".parse().unwrap(), "43".parse().unwrap())].into_iter().collect(),
            )),
        ];
        let mut response = Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed());
        response.headers_mut().insert("trailer", "answer-checksum".parse().unwrap());
        if let Some(seen) = seen {
            response.headers_mut().insert("saw", seen);
        }
        response
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let frames = [
        Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from_static(b"body"))),
        Ok(Frame::trailers([("checksum".parse().unwrap(), "42".parse().unwrap())].into_iter().collect())),
    ];
    let request = Request::post("/")
        .header("host", "a")
        .header("te", "trailers")
        .header("trailer", "checksum")
        .body(StreamBody::new(futures_util::stream::iter(frames)).boxed())
        .unwrap();
    let (head, body, trailers) = whole(client.send_request(request).await.unwrap()).await;
    assert_eq!(head.headers["saw"], "42");
    assert_eq!(body, "body");
    assert_eq!(trailers.unwrap()["answer-checksum"], "43");
}

#[tokio::test]
async fn sixty_kilobytes_of_headers_pass() {
    let app = http1_app(|request| async move {
        let bytes: usize =
            request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        Response::new(full(bytes.to_string()))
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    let mut request = get("/");
    for n in 0..60 {
        request
            .headers_mut()
            .insert(format!("x-{n}").parse::<http::HeaderName>().unwrap(), "v".repeat(1024).parse().unwrap());
    }
    let (head, body, _) = whole(client.send_request(request).await.unwrap()).await;
    assert_eq!(head.status, StatusCode::OK);
    assert!(std::str::from_utf8(&body).unwrap().parse::<usize>().unwrap() > 60 * 1024);
}

#[tokio::test]
async fn an_ambiguous_request_is_refused() {
    let app = http1_app(echo).await;
    let pair = pair(app, Protocol::Detect);
    for request in [
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\nconnection: close\r\n\r\n",
        "GET http://a/ HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n",
        "GET / HTTP/1.1\r\nconnection: close\r\n\r\n",
    ] {
        let answer = raw(pair.address, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{request:?} -> {answer}");
        assert!(answer.contains("outrigger-reason: proxy; bad_request; "), "{request:?} -> {answer}");
    }
}

#[tokio::test]
async fn one_mesh_connection_carries_many_requests() {
    let app = http1_app(echo).await;
    let pair = pair(app, Protocol::Detect);
    let mut tasks = Vec::new();
    for n in 0..40 {
        let address = pair.address;
        tasks.push(tokio::spawn(async move {
            let mut client = http1(address).await;
            for _ in 0..5 {
                let (head, _, _) = whole(client.send_request(get(&format!("/{n}"))).await.unwrap()).await;
                assert_eq!(head.status, StatusCode::OK);
                assert_eq!(head.version, Version::HTTP_11);
            }
        }));
    }
    for task in tasks {
        soon("the requests", task).await.unwrap();
    }
    let metrics = pair.client.metrics();
    assert!(
        metrics.contains(r#"outrigger_connections_total{direction="outbound",kind="mesh_h2"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let app = http1_app(echo).await;
    let pair = pair(app, Protocol::Detect);
    let mut stream = tokio::net::TcpStream::connect(pair.address).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    soon("the interim answer", stream.read_exact(&mut interim)).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n\r\nbody"), "{answer}");
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_request_arrives() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let app = http1_app(|_| async {
        let mut response = Response::new(full("too much"));
        *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
        response
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    for _ in 0..3 {
        let (mut reader, mut writer) =
            tokio::net::TcpStream::connect(pair.address).await.unwrap().into_split();
        writer.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n").await.unwrap();
        // Writes for as long as somebody takes it.
        tokio::spawn(async move { while writer.write_all(&[0; 16 * 1024]).await.is_ok() {} });
        let mut answer = [0; 12];
        soon("the response", reader.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 413");
    }
    let metrics = || pair.server.metrics();
    eventually("the end of the tunnels of bytes", || {
        metrics().contains(r#"outrigger_open_connections{direction="inbound",kind="plain_h1"} 0"#)
    })
    .await;
}

#[tokio::test]
async fn a_response_that_is_cut_off_is_not_taken_for_a_whole_one() {
    let app = tcp_app(|mut stream| async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let _ = stream.read(&mut [0; 1024]).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
            .await
            .unwrap();
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    // The cut may come before the head has gone out.
    if let Ok(response) = soon("the head", client.send_request(get("/"))).await {
        assert!(soon("the cut", response.into_body().collect()).await.is_err());
    }
}

#[tokio::test]
async fn requests_that_were_sent_ahead_are_answered_after_the_client_has_ended() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let app = http1_app(echo).await;
    let pair = pair(app, Protocol::Detect);
    let mut stream = tokio::net::TcpStream::connect(pair.address).await.unwrap();
    let requests = "GET /1 HTTP/1.1\r\nhost: a\r\n\r\n".repeat(3);
    stream.write_all(requests.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answers = String::new();
    soon("the answers", stream.read_to_string(&mut answers)).await.unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 3, "{answers}");
}
