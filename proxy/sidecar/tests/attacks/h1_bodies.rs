//! HTTP/1.1 requests whose bodies are not what their heads say.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    scripted::{Script, recorder, response, scripted},
    support::*,
};

const SMUGGLED: &str = "GET /never HTTP/1.1\r\nhost: a\r\n\r\n";

fn chunked(body: &str) -> String {
    format!("POST /p HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{body}")
}

// A6
#[tokio::test]
async fn malformed_chunks_are_refused_and_no_request_for_the_application() {
    let (app, record) = recorder().await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    let long = "x".repeat(17 * 1024);
    let bodies = [
        // sizes
        "FFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        &format!("{}5\r\nhello\r\n0\r\n\r\n", "0".repeat(64 * 1024)),
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "5 5\r\nhello\r\n0\r\n\r\n",
        "5_0\r\nhello\r\n0\r\n\r\n",
        "\r\nhello\r\n0\r\n\r\n",
        ";x\r\nhello\r\n0\r\n\r\n",
        "zz\r\nhello\r\n0\r\n\r\n",
        // extensions
        &format!("5;{long}\r\nhello\r\n0\r\n\r\n"),
        &"1;xxxxxxxxxxxxxxx\r\nx\r\n".repeat(32 * 1024),
        "5;a\x00b\r\nhello\r\n0\r\n\r\n",
        "5;a\rb\r\nhello\r\n0\r\n\r\n",
        "5;a\nb\r\nhello\r\n0\r\n\r\n",
        // what follows data
        "5\r\nhelloXX0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\rX0\r\n\r\n",
        "5\r\nhello\r\r\n0\r\n\r\n",
        // trailers
        "5\r\nhello\r\n0\r\nno colon\r\n\r\n",
        "5\r\nhello\r\n0\r\nx : y\r\n\r\n",
        "5\r\nhello\r\n0\r\nx: y\x00\r\n\r\n",
        &format!("5\r\nhello\r\n0\r\nx: {}\r\n\r\n", "y".repeat(1024 * 1024)),
        &format!("5\r\nhello\r\n0\r\n{}\r\n", "x: y\r\n".repeat(100_000)),
    ];
    for door in H1_DOORS {
        for body in &bodies {
            let what = (door, &body[..body.len().min(40)]);
            let answer =
                exchange(field.address(door), chunked(&format!("{body}{SMUGGLED}")).as_bytes()).await;
            let refused = is_refused(&answer, &["400", "413", "431"]);
            siege.check(refused, || format!("{what:?} -> {answer:?}"));
            let whole = record.requests();
            siege.check(whole.is_empty(), || format!("{what:?} arrived: {whole:?}"));
            record.clear();
        }
    }
    siege.lift().await;
}

// A6
#[tokio::test]
async fn trailers_frame_nothing_and_name_nobody() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    let trailers = "Content-Length: 9\r\nTransfer-Encoding: chunked\r\nHost: b\r\nOutrigger-Client-Id: spiffe://a/b\r\n\
                    outrigger_client_id: spiffe://a/b\r\nX-Forwarded-Client-Cert: By=x\r\nX-Envoy-Internal: true\r\n\
                    outrigger-reason: proxy; x; y\r\nConnection: x-kept\r\nX-Kept: 1\r\n";
    let mut passed = 0;
    for door in H1_DOORS {
        let request = format!(
            "POST /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\ntrailer: x-kept\r\n\r\n\
             5\r\nhello\r\n0\r\n{trailers}\r\n{SMUGGLED}"
        );
        let answer = exchange(field.address(door), request.as_bytes()).await;
        assert_refused(&door, &answer, &["200", "400"]);
        record.assert_never(&door);
        for request in record.requests() {
            let body = String::from_utf8_lossy(&request.body).to_ascii_lowercase();
            passed += usize::from(body.contains("x-kept: 1"));
            // In clear nobody speaks for the application's mesh: what other meshes say is the server's side's to strip.
            let by_us = ["content-length", "transfer-encoding", "host", "outrigger", "connection"];
            let by_server = ["x-forwarded-client-cert", "x-envoy"];
            let stripped = by_us.iter().chain(by_server.iter().filter(|_| door != Door::InClear));
            for name in stripped {
                assert!(!body.contains(name), "{door:?}: {name} in {body}");
            }
        }
        record.clear();
    }
    println!("trailers passed at {passed} doors");
    siege.lift().await;
}

// A7
#[tokio::test]
async fn a_body_of_any_method_ends_where_its_framing_says() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for method in ["GET", "HEAD", "DELETE", "OPTIONS", "POST"] {
            for (framing, body) in [
                (format!("content-length: {}", SMUGGLED.len()), SMUGGLED.to_owned()),
                (
                    "transfer-encoding: chunked".into(),
                    format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len()),
                ),
            ] {
                let first = format!("{method} /first HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n{body}");
                let second = "GET /second HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
                let answer = exchange(field.address(door), format!("{first}{second}").as_bytes()).await;
                assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 2, "{door:?} {method}: {answer:?}");
                assert_eq!(
                    record.lines(),
                    [format!("{method} /first HTTP/1.1"), "GET /second HTTP/1.1".into()],
                    "{door:?} {framing}"
                );
                record.clear();
            }
        }
    }
    siege.lift().await;
}

// A7
#[tokio::test]
async fn a_request_that_breaks_off_is_never_whole() {
    let (app, record) = recorder().await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for request in [
            "POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello".to_owned(),
            chunked("5\r\nhel"),
            chunked("5\r\nhello\r\n"),
            chunked("5\r\nhello\r\n0\r\n"),
            chunked("5\r\nhello\r\n0\r\nx: y\r\n"),
        ] {
            let mut stream = TcpStream::connect(field.address(door)).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = Vec::new();
            let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
            let answer = String::from_utf8_lossy(&answer);
            let refused = read.is_ok() && !answer.starts_with("HTTP/1.1 2");
            siege.check(refused, || format!("{door:?} {request:?} -> {answer:?}, ended: {}", read.is_ok()));
            let whole = record.requests();
            siege.check(whole.is_empty(), || format!("{door:?} {request:?} arrived: {whole:?}"));
            record.clear();
        }
    }
    siege.lift().await;
}

// A7
#[tokio::test]
async fn an_early_answer_leaves_no_body_behind() {
    // Answers when the head is there, and lets the body come as it may.
    let (app, record) = scripted(|_, _| Script::Say(response("ok"))).await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        // A refusal by the sidecar itself, in front of a body that reads as a request.
        let request = format!(
            "POST /p HTTP/1.1\r\nhost: a\r\nhost: b\r\ncontent-length: {}\r\n\r\n{SMUGGLED}{SMUGGLED}",
            SMUGGLED.len()
        );
        let answer = exchange(field.address(door), request.as_bytes()).await;
        assert_refused(&door, &answer, &["400"]);
        record.assert_never(&door);
    }
    siege.lift().await;
}
