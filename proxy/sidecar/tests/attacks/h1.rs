//! HTTP/1.1 heads that two readers could read in two ways, or that are too long.

use crate::{scripted::recorder, support::*};

/// A request that nobody asked for, behind one that must be refused.
const SMUGGLED: &str = "GET /never HTTP/1.1\r\nhost: a\r\n\r\n";

const LIMIT: usize = 128 * 1024;

/// Sends each request with a smuggled one behind it to each door: 400, and the application sees nothing.
async fn refuses_all(requests: &[String]) {
    let (app, record) = recorder().await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for request in requests {
            let answer = exchange(field.address(door), format!("{request}{SMUGGLED}").as_bytes()).await;
            siege.check(is_refused(&answer, &["400"]), || format!("{door:?} {request:?} -> {answer:?}"));
            siege.check(record.is_empty(), || format!("{door:?} {request:?} arrived: {:?}", record.bytes()));
            record.clear();
            let says_why = field.says_why(&answer, "bad_request");
            siege.check(says_why, || format!("{door:?} {request:?}: nothing names the reason"));
        }
    }
    siege.lift().await;
}

/// Requests with these header lines and a body of five bytes in either framing.
fn with_lines(lines: &[&str]) -> Vec<String> {
    let request =
        |lines: &&str| format!("POST /p HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    lines.iter().map(request).collect()
}

// A1
#[tokio::test]
async fn a_length_beside_chunks_is_refused_in_either_order() {
    let mut requests = with_lines(&[
        "content-length: 5\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 5",
        "Transfer-Encoding: Chunked\r\nx: y\r\nContent-Length: 15",
        "content-length: 15\r\ncontent-length: 15\r\ntransfer-encoding: chunked",
    ]);
    // The body of one reader is another reader's request.
    requests.push(format!(
        "POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
        5 + SMUGGLED.len()
    ));
    refuses_all(&requests).await;
}

// A2
#[tokio::test]
async fn a_transfer_coding_is_chunked_once_or_the_request_is_refused() {
    let mut requests = with_lines(&[
        "transfer-encoding: chunked, identity",
        "transfer-encoding: identity",
        "transfer-encoding: identity, chunked",
        "transfer-encoding: xchunked",
        "transfer-encoding: chunkedx",
        "transfer-encoding: chunked;q=0.5",
        "transfer-encoding: \"chunked\"",
        "transfer-encoding: chunked, chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: identity",
        "transfer-encoding: gzip\r\ntransfer-encoding: chunked",
        "transfer-encoding: \x0bchunked",
        "transfer-encoding: chunked\x0b",
        "transfer-encoding: ch\x00unked",
        "transfer-encoding:",
        "transfer-encoding : chunked",
        "transfer-encoding:\r\n chunked",
    ]);
    requests.push(
        "POST /p HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".into(),
    );
    refuses_all(&requests).await;
}

// A3
#[tokio::test]
async fn a_content_length_is_one_number_or_the_request_is_refused() {
    let lines = with_lines(&[
        "content-length: 5\r\ncontent-length: 6",
        "content-length: 6\r\ncontent-length: 5",
        "content-length: 5, 6",
        "content-length: +5",
        "content-length: -1",
        "content-length: 0x5",
        "content-length: 5 5",
        "content-length: 5;",
        "content-length: 5.0",
        "content-length: \"5\"",
        "content-length: ",
        "content-length: ,",
        "content-length: 18446744073709551616",
        "content-length: 99999999999999999999999999999999",
        "content-length: 5\r\ncontent-length: ",
    ]);
    refuses_all(&lines).await;
}

// A3
#[tokio::test]
async fn equal_content_lengths_are_merged_or_refused() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for lengths in ["content-length: 5\r\ncontent-length: 5", "content-length: 5, 5"] {
            let request = format!(
                "POST /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{lengths}\r\n\r\nhello{SMUGGLED}"
            );
            let answer = exchange(field.address(door), request.as_bytes()).await;
            assert_refused(&(door, lengths), &answer, &["200", "400"]);
            record.assert_never(&door);
            for request in record.requests() {
                let head = request.head.to_ascii_lowercase();
                assert_eq!(head.matches("content-length: 5\r\n").count(), 1, "{head}");
                assert_eq!(request.body, b"hello");
            }
            record.clear();
        }
    }
    siege.lift().await;
}

// A4
#[tokio::test]
async fn malformed_field_lines_are_refused() {
    let lines = with_lines(&[
        "content-length: 0\r\nx: a\r\n b",
        "content-length: 0\r\nx: a\r\n\tb",
        "content-length: 0\r\nx : a",
        "content-length: 0\r\nx\t: a",
        "content-length : 5",
        "content-length: 0\r\n: a",
        "content-length: 0\r\nx",
        "content-length: 0\r\nx y: a",
        "content-length: 0\r\nx: a\x00b",
        "content-length: 0\r\nx: a\rb",
        "content-length: 0\r\nx: a\r\rGET /never HTTP/1.1",
        "content-length: 0\r\nx\r: a",
        "content-length: 0\r\nx\x00: a",
        "content-length: 0\r\n\x0b: a",
        "content-length: 0\r\nx(y): a",
        "content-length: 0\r\nx: a\x7f",
        "content-length: 0\r\nx: \x01",
    ]);
    refuses_all(&lines).await;
}

// A4
#[tokio::test]
async fn a_line_before_the_first_field_is_no_field() {
    let requests =
        [" x: a", "\tx: a", " host: b"].map(|line| format!("GET /p HTTP/1.1\r\n{line}\r\nhost: a\r\n\r\n"));
    refuses_all(&requests).await;
}

// A5
#[tokio::test]
async fn bare_line_feeds_are_refused_or_written_anew() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for request in [
            "GET /p HTTP/1.1\nhost: a\nconnection: close\n\n".to_owned(),
            "GET /p HTTP/1.1\r\nhost: a\nconnection: close\r\n\r\n".to_owned(),
            "GET /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: y\n\r\n".to_owned(),
            format!("GET /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\n{SMUGGLED}"),
            "POST /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\n0\n\n"
                .to_owned(),
        ] {
            let answer = exchange(field.address(door), request.as_bytes()).await;
            assert_refused(&(door, &request), &answer, &["200", "400"]);
            record.assert_never(&request);
            for seen in record.requests() {
                let text = [seen.head.as_bytes(), &seen.body].concat();
                let bare = text.iter().enumerate().any(|(at, byte)| *byte == b'\n' && text[at - 1] != b'\r');
                assert!(!bare, "{door:?} {request:?} -> {seen:?}");
            }
            record.clear();
        }
    }
    siege.lift().await;
}

// A8
#[tokio::test]
async fn a_target_that_disagrees_with_the_host_is_refused() {
    let mut requests: Vec<String> = [
        "GET http://b/p HTTP/1.1\r\nhost: a",
        "GET http://a:81/p HTTP/1.1\r\nhost: a",
        "GET /p HTTP/1.1\r\nhost: a\r\nhost: b",
        "GET /p HTTP/1.1\r\nhost: a\r\nHost: a, b",
        "GET /p HTTP/1.1\r\nhost: a b",
        "GET /p HTTP/1.1\r\nhost: u@a",
        "GET /p HTTP/1.1\r\nhost: a/never",
        "GET /p HTTP/1.1\r\nx: y",
        "GET p HTTP/1.1\r\nhost: a",
        "GET a:80 HTTP/1.1\r\nhost: a:80",
        "GET http:///p HTTP/1.1\r\nhost: a",
        "CONNECT /p HTTP/1.1\r\nhost: a",
        "CONNECT http://a/ HTTP/1.1\r\nhost: a",
        "CONNECT a HTTP/1.1\r\nhost: a",
        "GET /p x HTTP/1.1\r\nhost: a",
    ]
    .map(|head| format!("{head}\r\n\r\n"))
    .to_vec();
    // hosts that differ only in their port are different authorities
    requests.push("GET http://a/p HTTP/1.1\r\nhost: a:8080\r\n\r\n".into());
    refuses_all(&requests).await;
}

// A8
#[tokio::test]
async fn an_upgrade_to_http_in_another_dress_is_no_upgrade() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for protocol in ["h2c", "H2C", "h2", "HTTP/2.0", "TLS/1.0", "websocket, h2c"] {
            let request = format!(
                "GET /p HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings, close\r\nupgrade: {protocol}\r\n\
                 http2-settings: AAMAAABkAAQAAP__\r\n\r\n{SMUGGLED}"
            );
            let answer = exchange(field.address(door), request.as_bytes()).await;
            assert_refused(&(door, protocol), &answer, &["200"]);
            let bytes = record.bytes().to_ascii_lowercase();
            assert!(!bytes.contains("upgrade") && !bytes.contains("http2-settings"), "{door:?}: {bytes}");
            record.assert_never(&(door, protocol));
            record.clear();
        }
    }
    siege.lift().await;
}

// A9
#[tokio::test]
async fn heads_beyond_the_limits_are_refused() {
    let (app, record) = recorder().await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    let long_line = format!("GET /never{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(2 * LIMIT));
    let many = |lines: usize| format!("GET /never HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(lines));
    let large = format!("GET /never HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(1024 * 1024));
    let endless = format!("GET /never HTTP/1.1\r\nhost: a\r\nx: {}", "y".repeat(4 * 1024 * 1024));
    for door in H1_DOORS {
        for (what, request) in [
            ("a line of 256 KiB", &long_line),
            ("513 lines", &many(513)),
            ("100,000 lines", &many(100_000)),
            ("1 MiB in one field", &large),
            ("a field without end", &endless),
        ] {
            let answer = exchange(field.address(door), request.as_bytes()).await;
            siege.check(is_refused(&answer, &["414", "431"]), || format!("{door:?} {what} -> {answer:?}"));
            let says_why = field.says_why(&answer, "headers_too_large");
            siege.check(says_why, || format!("{door:?} {what}: nothing names the reason"));
            record.assert_never(&what);
        }
    }
    siege.lift().await;
}

// A9
#[tokio::test]
async fn heads_within_the_limits_pass() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    let line = format!("GET /{} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "a".repeat(65 * 1024));
    let lines = format!("GET /p HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{}\r\n", "x: y\r\n".repeat(500));
    for door in H1_DOORS {
        for request in [&line, &lines] {
            let answer = exchange(field.address(door), request.as_bytes()).await;
            let statuses = if request == &line { &["200", "414"][..] } else { &["200"] };
            assert_refused(&(door, &request[..20]), &answer, statuses);
        }
    }
    assert!(record.requests().iter().any(|request| request.head.matches("\r\nx: y").count() == 500));
    siege.lift().await;
}
