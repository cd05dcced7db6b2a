//! Applications that answer HTTP/1.1 badly. Behind each bad answer the next request on the same way must get its own.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    frames::END_STREAM,
    scripted::{Script, response, scripted},
    support::*,
};

const POISON: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nPOISON";

/// Doors to a scripted application in HTTP/1.1, and what each test asks behind its bad answer.
async fn asks_on(field: &Field, door: Door, path: &str) -> (String, String) {
    let bad = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    let first = exchange(field.address(door), bad.as_bytes()).await;
    let good = b"GET /good HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    (first, exchange(field.address(door), good).await)
}

fn say(text: impl Into<Vec<u8>>) -> Script {
    Script::Say(text.into())
}

#[track_caller]
fn assert_good(what: &impl std::fmt::Debug, answer: &str) {
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\ngood"), "{what:?}: {answer:?}");
}

// A7
#[tokio::test]
async fn what_follows_a_response_is_nobodys_answer() {
    let (app, _) = scripted(|_, path| {
        let head = match path {
            "/204" => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
            "/204-length" => format!("HTTP/1.1 204 No Content\r\ncontent-length: {}\r\n\r\n", POISON.len()),
            "/204-chunks" => "HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
            "/304" => format!("HTTP/1.1 304 Not Modified\r\ncontent-length: {}\r\n\r\n", POISON.len()),
            "/304-chunks" => "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
            "/length" => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
            "/nothing" => "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned(),
            _ => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n".to_owned(),
        };
        say(head + POISON)
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for path in
            ["/204", "/204-length", "/204-chunks", "/304", "/304-chunks", "/length", "/nothing", "/chunks"]
        {
            for _ in 0..3 {
                let (first, good) = asks_on(&field, door, path).await;
                assert_eq!(first.matches("HTTP/1.1 ").count(), 1, "{door:?} {path}: {first:?}");
                assert!(!first.contains("POISON"), "{door:?} {path}: {first:?}");
                assert_good(&(door, path), &good);
            }
        }
    }
    siege.lift().await;
}

// A7
#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    let (app, _) = scripted(|_, path| match path {
        "/chunks" => say(format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{POISON}")),
        _ => say(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{POISON}", POISON.len())),
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for path in ["/length", "/chunks"] {
            let request = format!(
                "HEAD {path} HTTP/1.1\r\nhost: a\r\n\r\nGET /good HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
            );
            let answer = exchange(field.address(door), request.as_bytes()).await;
            assert!(!answer.contains("POISON"), "{door:?} {path}: {answer:?}");
            assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 2, "{door:?} {path}: {answer:?}");
            assert!(answer.ends_with("\r\n\r\ngood"), "{door:?} {path}: {answer:?}");
        }
    }
    siege.lift().await;
}

// A7
#[tokio::test]
async fn a_response_that_can_be_read_in_two_ways_is_refused() {
    let (app, _) = scripted(|_, path| {
        let head = match path {
            "/both" => "HTTP/1.1 200 OK\r\ncontent-length: 15\r\ntransfer-encoding: chunked",
            "/lengths" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6",
            "/negative" => "HTTP/1.1 200 OK\r\ncontent-length: -5",
            "/huge" => "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551616",
            "/codings" => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, identity",
            "/twice" => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked",
            "/old" => "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked",
            "/nul" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx: a\0b",
            "/return" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx: a\rb",
            "/space" => "HTTP/1.1 200 OK\r\ncontent-length : 5",
            "/nameless" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n: b",
            "/version" => "HTTP/2.0 200 OK\r\ncontent-length: 5",
            "/protocol" => "ICY 200 OK\r\ncontent-length: 5",
            "/letters" => "HTTP/1.1 abc OK\r\ncontent-length: 5",
            "/long" => "HTTP/1.1 2000 OK\r\ncontent-length: 5",
            "/short" => "HTTP/1.1 20 OK\r\ncontent-length: 5",
            _ => "\x16\x03\x01 nothing like it",
        };
        say(format!("{head}\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))
    })
    .await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for path in [
            "/both",
            "/lengths",
            "/negative",
            "/huge",
            "/codings",
            "/twice",
            "/old",
            "/nul",
            "/return",
            "/space",
            "/nameless",
            "/version",
            "/protocol",
            "/letters",
            "/long",
            "/short",
            "/nothing",
        ] {
            let (answer, good) = asks_on(&field, door, path).await;
            let refused = is_refused(&answer, &["502"]) && !answer.contains("hello");
            let says_why = answer.contains("outrigger-reason: proxy; upstream_protocol; ");
            siege.check(refused && says_why, || format!("{door:?} {path} -> {answer:?}"));
            assert_good(&(door, path), &good);
        }
    }
    siege.lift().await;
}

// A7, A9
#[tokio::test]
async fn a_response_head_beyond_the_limits_is_refused() {
    let (app, _) = scripted(|_, path| {
        let lines = match path {
            "/large" => format!("x: {}\r\n", "y".repeat(1024 * 1024)),
            "/lines" => "x: y\r\n".repeat(100_000),
            _ => format!("x: {}", "y".repeat(8 * 1024 * 1024)),
        };
        say(format!("HTTP/1.1 200 OK\r\n{lines}content-length: 5\r\n\r\nhello"))
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for path in ["/large", "/lines", "/endless"] {
            let (answer, good) = asks_on(&field, door, path).await;
            assert_refused(&(door, path), &answer, &["502"]);
            assert!(answer.contains("outrigger-reason: proxy; "), "{door:?} {path}: {answer:?}");
            assert_good(&(door, path), &good);
        }
    }
    siege.lift().await;
}

// A7
#[tokio::test]
async fn a_response_that_breaks_off_is_passed_on_as_broken() {
    let (app, _) = scripted(|_, path| {
        Script::SayAndClose(match path {
            "/length" => b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello".to_vec(),
            "/chunk" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\nhello".to_vec(),
            "/chunks" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec(),
            "/trailers" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n".to_vec(),
            "/garbage" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloXXXX".to_vec(),
            "/huge" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n10000000000000005\r\nhello\r\n0\r\n\r\n".to_vec(),
            "/head" => b"HTTP/1.1 200 OK\r\ncontent-le".to_vec(),
            _ => Vec::new(),
        })
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for path in ["/length", "/chunk", "/chunks", "/trailers", "/garbage", "/huge"] {
            let (answer, good) = asks_on(&field, door, path).await;
            // The head may have been on its way, or not; a whole answer it is not.
            if answer.starts_with("HTTP/1.1 200 ") {
                let head = answer.to_ascii_lowercase();
                let framed =
                    head.contains("content-length: 10\r\n") || head.contains("transfer-encoding: chunked");
                assert!(framed && !answer.ends_with("0\r\n\r\n"), "{door:?} {path}: {answer:?}");
            } else {
                assert!(
                    answer.is_empty() || answer.starts_with("HTTP/1.1 502 "),
                    "{door:?} {path}: {answer:?}"
                );
            }
            assert_good(&(door, path), &good);
        }
        for path in ["/head", "/nothing"] {
            let (answer, good) = asks_on(&field, door, path).await;
            assert_refused(&(door, path), &answer, &["502"]);
            assert!(answer.contains("outrigger-reason: proxy; upstream_"), "{door:?} {path}: {answer:?}");
            assert_good(&(door, path), &good);
        }
    }
    // To an HTTP/2 client of a server that is reached as HTTP/1.1 only the mesh could translate; it does not.
    siege.lift().await;
}

// A7
#[tokio::test]
async fn interim_responses_without_end_are_bounded() {
    const INTERIM: &[u8] = b"HTTP/1.1 102 Processing\r\n\r\n";
    let (app, _) = scripted(|_, path| match path {
        "/few" => say([INTERIM.repeat(3), response("ok")].concat()),
        // Some 100 MiB.
        _ => Script::Repeat(Vec::new(), INTERIM.repeat(1000), 4_000),
    })
    .await;
    let field = field(app);
    let mut siege = field.besiege_heavily(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        let (few, _) = asks_on(&field, door, "/few").await;
        assert!(few.contains("HTTP/1.1 200 ") && few.ends_with("\r\n\r\nok"), "{door:?}: {few:?}");
        let request = b"GET /flood HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let answer = exchange(field.address(door), request).await;
        let last = answer.rfind("HTTP/1.1 ").map_or("", |at| &answer[at..]);
        siege.check(last.starts_with("HTTP/1.1 502 "), || format!("{door:?}: {last:?}"));
    }
    siege.lift().await;
}

// A8
#[tokio::test]
async fn a_switch_that_nobody_asked_for_is_refused() {
    let (app, record) = scripted(|_, _| {
        say(format!(
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\n{POISON}"
        ))
    })
    .await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        for head in ["", "upgrade: foo\r\n", "connection: upgrade\r\nupgrade: h2c\r\n"] {
            let request = format!(
                "GET /p HTTP/1.1\r\nhost: a\r\n{head}\r\nGET /never HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
            );
            let answer = exchange(field.address(door), request.as_bytes()).await;
            let refused = answer.starts_with("HTTP/1.1 502 ") && !answer.contains("POISON");
            siege.check(refused, || format!("{door:?} {head:?} -> {answer:?}"));
            let seen = record.requests();
            let tunnelled = seen.iter().any(|request| !request.body.is_empty());
            siege.check(!tunnelled, || format!("{door:?} {head:?}: {seen:?}"));
            record.clear();
        }
    }
    siege.lift().await;
}

// A8
#[tokio::test]
async fn an_upgrade_that_is_not_taken_is_a_request_like_any_other() {
    let (app, record) = scripted(|_, _| say(response("ok"))).await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        let request = "GET /p HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\n\
                       GET /next HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let answer = exchange(field.address(door), request.as_bytes()).await;
        assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 2, "{door:?}: {answer:?}");
        assert_eq!(record.lines(), ["GET /p HTTP/1.1", "GET /next HTTP/1.1"], "{door:?}");
        record.clear();
    }
    siege.lift().await;
}

// A8
#[tokio::test]
async fn a_connection_that_was_switched_serves_no_other_request() {
    let (app, record) = scripted(|_, _| {
        say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\nhello")
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        let mut stream = TcpStream::connect(field.address(door)).await.unwrap();
        let request = b"GET /p HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"hello") {
            let read = soon("the switch", stream.read_buf(&mut seen)).await.unwrap();
            assert!(read > 0, "{door:?}: {:?}", String::from_utf8_lossy(&seen));
        }
        assert!(seen.starts_with(b"HTTP/1.1 101 "), "{door:?}: {:?}", String::from_utf8_lossy(&seen));
        // Inside of the tunnel this is nobody's request.
        stream.write_all(b"GET /tunnelled HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        eventually("the bytes", || record.bytes().contains("/tunnelled")).await;
        drop(stream);
        let of_tunnel = record.requests()[0].connection;
        for _ in 0..5 {
            let good = b"GET /other HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            exchange(field.address(door), good).await;
        }
        let shared = record
            .requests()
            .iter()
            .any(|request| request.connection == of_tunnel && request.head.contains("/other"));
        assert!(!shared, "{door:?}: {:?}", record.requests());
        record.clear();
    }
    siege.lift().await;
}

// A7, from HTTP/2 to HTTP/1.1: a peer's mark has the server's sidecar speak HTTP/1.1.
#[tokio::test]
async fn a_response_that_breaks_off_resets_its_stream() {
    let (app, _) = scripted(|_, path| {
        Script::SayAndClose(match path {
            "/length" => b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello".to_vec(),
            _ => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec(),
        })
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    let mut peer = field.peer(Door::Mesh, &[]).await;
    for (stream, path) in [(1, "/length"), (3, "/chunks")] {
        let fields = [
            (":method", "GET"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "a"),
            ("outrigger-h1", "1.1"),
        ];
        peer.send(&crate::frames::headers(stream, END_STREAM, &fields)).await;
        peer.wait("the reset", |log| log.reset(stream)).await;
        assert!(!peer.look(|log| log.finished(stream)), "{path} looks whole");
    }
    siege.lift().await;
}
