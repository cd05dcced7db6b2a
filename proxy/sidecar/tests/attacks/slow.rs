//! Clients that take their time: heads byte by byte, bodies that stop, answers that nobody reads, and connections that
//! say nothing (the modes of slowhttptest).

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

use crate::{frames::*, support::*};

/// The time-outs that these tests set, and how much later than that somebody must be gone.
const SHORT: u64 = 400;
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Sends `bytes` one by one until the other side closes; how long that took.
async fn trickle(address: std::net::SocketAddr, bytes: &[u8]) -> Duration {
    let (mut read, mut write) = TcpStream::connect(address).await.unwrap().into_split();
    let begun = Instant::now();
    let reading = async {
        let mut buffer = [0; 1024];
        while let Ok(1..) = read.read(&mut buffer).await {}
    };
    let writing = async {
        for byte in bytes.iter().cycle() {
            if write.write_all(&[*byte]).await.is_err() {
                break;
            }
            // Its pace.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::future::pending::<()>().await;
    };
    soon("the cut", async {
        tokio::select! {
            () = reading => {}
            () = writing => {}
        }
    })
    .await;
    begun.elapsed()
}

fn is_cut(after: Duration) -> bool {
    // A little before: clocks of sockets and of timers are not the same.
    (Duration::from_millis(SHORT - 50)..GONE_WITHIN).contains(&after)
}

#[track_caller]
fn assert_cut(what: &impl std::fmt::Debug, after: Duration) {
    assert!(is_cut(after), "{what:?}: cut after {after:?}");
}

// A10
#[tokio::test]
async fn heads_that_trickle_are_cut_however_many() {
    let (app, tally) = application().await;
    let field = field_with(app, |config| config.timeouts.headers = millis(SHORT));
    let siege = field.besiege(BOTH).await;
    let mut clients = JoinSet::new();
    for at in 0..150 {
        let door = H1_DOORS[at % 3];
        let address = field.address(door);
        // Past the first line everybody knows that it is HTTP.
        clients.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /never HTTP/1.1\r\nhost: a\r\n").await.unwrap();
            let begun = Instant::now();
            let (mut read, mut write) = stream.into_split();
            let writing = tokio::spawn(async move {
                while write.write_all(b"x").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
            let mut answer = Vec::new();
            let _ = soon("the cut", read.read_to_end(&mut answer)).await;
            writing.abort();
            (door, begun.elapsed(), String::from_utf8_lossy(&answer).into_owned())
        });
    }
    while let Some(client) = clients.join_next().await {
        let (door, after, answer) = client.unwrap();
        assert_cut(&door, after);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{door:?}: {answer:?}");
    }
    tally.assert_never(&"a head without end");
    siege.lift().await;
}

// A10
#[tokio::test]
async fn a_second_head_is_timed_like_the_first() {
    let (app, _) = application().await;
    let field = field_with(app, |config| config.timeouts.headers = millis(SHORT));
    let siege = field.besiege(BOTH).await;
    for door in H1_DOORS {
        let mut stream = TcpStream::connect(field.address(door)).await.unwrap();
        stream.write_all(b"GET /good HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"good") {
            assert!(soon("the answer", stream.read_buf(&mut seen)).await.unwrap() > 0);
        }
        let begun = Instant::now();
        stream.write_all(b"GET /never HTTP/1.1\r\nhos").await.unwrap();
        let _ = soon("the cut", stream.read_to_end(&mut seen)).await;
        assert_cut(&door, begun.elapsed());
    }
    siege.lift().await;
}

// A10, C3
#[tokio::test]
async fn header_blocks_that_trickle_are_cut() {
    let (app, tally) = application().await;
    let field = field_with(app, |config| config.timeouts.headers = millis(SHORT));
    let mut siege = field.besiege(BOTH).await;
    let start = block(&[(":method", "GET"), (":scheme", "http"), (":path", "/never"), (":authority", "a")]);
    for door in H2_DOORS {
        for (what, bytes) in [
            (
                "a frame that is not finished",
                frame(HEADERS, END_STREAM | END_HEADERS, 1, &start)[..20].to_vec(),
            ),
            ("a frame's head", frame(HEADERS, END_STREAM | END_HEADERS, 1, &start)[..5].to_vec()),
            ("a block that is not finished", frame(HEADERS, END_STREAM, 1, &start)),
        ] {
            let mut peer = field.peer(door, &[]).await;
            let begun = Instant::now();
            peer.send(&bytes).await;
            let over = peer.given_up().await;
            siege.check(over != Over::Never && is_cut(begun.elapsed()), || {
                format!("{door:?} {what}: {over:?}")
            });
            tally.assert_never(&what);
        }
    }
    siege.lift().await;
}

// A10
#[tokio::test]
async fn a_body_that_stops_is_timed_out() {
    let (app, tally) = application().await;
    let field = field_with(app, |config| config.timeouts.idle = millis(SHORT));
    let siege = field.besiege(BOTH).await;
    for door in H1_DOORS {
        for framing in
            ["content-length: 100\r\n\r\nhello", "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"]
        {
            let begun = Instant::now();
            let request = format!("POST /echo HTTP/1.1\r\nhost: a\r\n{framing}");
            let answer = exchange(field.address(door), request.as_bytes()).await;
            assert_cut(&(door, framing), begun.elapsed());
            assert!(!answer.starts_with("HTTP/1.1 2"), "{door:?} {framing}: {answer:?}");
        }
    }
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        let begun = Instant::now();
        peer.send(&[ask(1, 0, "POST", "/echo"), frame(DATA, 0, 1, b"hello")].concat()).await;
        let refused = peer.refused(1).await;
        assert!(refused.is_one(), "{door:?}: {refused:?}");
        assert_cut(&door, begun.elapsed());
    }
    tally.idle().await;
    siege.lift().await;
}

// A10
#[tokio::test]
async fn an_answer_that_nobody_reads_is_timed_out() {
    let (app, tally) = application().await;
    let field = field_with(app, |config| config.timeouts.idle = millis(SHORT));
    let siege = field.besiege(BOTH).await;
    let mut deaf = Vec::new();
    for door in H1_DOORS {
        for _ in 0..5 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4096).unwrap();
            let mut stream = socket.connect(field.address(door)).await.unwrap();
            stream.write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            deaf.push(stream);
        }
    }
    eventually("the requests", || tally.asked() == deaf.len()).await;
    tally.idle().await;
    siege.lift().await;
    drop(deaf);
}

// A10
#[tokio::test]
async fn an_http2_connection_without_a_request_ends() {
    let (app, _) = application().await;
    let field = field_with(app, |config| config.timeouts.idle = millis(SHORT));
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let peer = field.peer(door, &[]).await;
        let begun = Instant::now();
        peer.wait("the end", |log| (log.ended || log.goaway().is_some()).then_some(())).await;
        assert_cut(&door, begun.elapsed());
    }
    siege.lift().await;
}

// A10: what a preface of HTTP/2 is not yet.
#[tokio::test]
async fn first_bytes_that_say_nothing_end_in_time() {
    let (app, tally) = application().await;
    let field = field_with(app, |config| {
        config.timeouts.headers = millis(SHORT);
        config.timeouts.idle = millis(SHORT);
        config.timeouts.handshake = millis(SHORT);
    });
    let mut siege = field.besiege(BOTH).await;
    let strict = pair_with(
        app,
        outrigger_core::model::Protocol::Detect,
        |_| {},
        |config| {
            config.timeouts.handshake = millis(SHORT);
            config.timeouts.headers = millis(SHORT);
        },
    );
    for (what, bytes) in [
        ("nothing", &b""[..]),
        ("a part of the preface", &PREFACE[..10]),
        ("a part of a request line", b"GET /never"),
        ("a part of a ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("a preface without SETTINGS", PREFACE),
    ] {
        // In `Permissive` what is no HTTP may be the application's own protocol; the application closes it then.
        for (door, address) in
            [("strict", strict.inbound), ("outbound", field.pair.address), ("plain", field.pair.inbound)]
        {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let begun = Instant::now();
            let mut seen = Vec::new();
            let ended = tokio::time::timeout(GONE_WITHIN, stream.read_to_end(&mut seen)).await.is_ok();
            siege.check(ended, || format!("{door} {what}: still open after {:?}", begun.elapsed()));
        }
    }
    tally.assert_never(&"a part of a request");
    siege.lift().await;
}

// A10
#[tokio::test]
async fn a_client_hello_that_trickles_is_cut() {
    let (app, _) = application().await;
    let field = field_with(app, |config| config.timeouts.handshake = millis(SHORT));
    let siege = field.besiege(BOTH).await;
    let strict = pair_with(
        app,
        outrigger_core::model::Protocol::Detect,
        |_| {},
        |config| {
            config.timeouts.handshake = millis(SHORT);
        },
    );
    let mut hello = b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03".to_vec();
    hello.extend([7; 64]);
    let mut clients = JoinSet::new();
    for _ in 0..50 {
        let (address, hello) = (strict.inbound, hello.clone());
        clients.spawn(async move { trickle(address, &hello).await });
    }
    while let Some(after) = clients.join_next().await {
        let after = after.unwrap();
        assert!(after < GONE_WITHIN, "{after:?}");
    }
    siege.lift().await;
}

// A10
#[tokio::test]
async fn silent_connections_count_and_leave_room_again() {
    let (app, _) = application().await;
    let strict = pair_with(
        app,
        outrigger_core::model::Protocol::Detect,
        |_| {},
        |config| {
            config.timeouts.handshake = millis(SHORT);
            config.limits.connections = 20;
        },
    );
    let siege = Siege::begin([&strict.client, &strict.server], strict.address, BOTH).await;
    // The mesh's own connection is one of the twenty.
    let mut silent = Vec::new();
    for _ in 0..40 {
        // A refusal may come as early as in `connect`.
        silent.extend(TcpStream::connect(strict.inbound).await);
    }
    eventually("refusals", || {
        strict
            .server
            .metrics()
            .contains(r#"outrigger_refused_total{direction="inbound",outcome="overloaded"}"#)
    })
    .await;
    for mut stream in silent {
        let _ = soon("the end", stream.read(&mut [0; 8])).await;
    }
    eventually("room", || {
        let metrics = strict.server.metrics();
        let open = metrics.lines().find_map(|line| {
            line.strip_prefix(r#"outrigger_open_connections{direction="inbound",kind="accepted"} "#)
        });
        open.is_some_and(|open| open.parse::<u32>().unwrap() < 20)
    })
    .await;
    let mut peer = Peer::dial(mesh_tls(&strict).await, &[]).await;
    peer.send(&ask(1, END_STREAM, "GET", "/good")).await;
    assert_eq!(peer.refused(1).await, Refused::Status(200));
    siege.lift().await;
}

// A10, from the other side: a request that waits for its answer is no idle connection.
#[tokio::test]
async fn an_application_that_stops_within_its_answer_is_timed_out() {
    let app = tcp_app(|mut stream| async move {
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            let good = buffer[..read].starts_with(b"GET /good ");
            let answer: &[u8] = if good {
                b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngood"
            } else {
                b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhello"
            };
            stream.write_all(answer).await.unwrap();
        }
    })
    .await;
    let field = field_with(app, |config| config.timeouts.idle = millis(SHORT));
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in H1_DOORS {
        let begun = Instant::now();
        let answer = exchange(field.address(door), b"GET /stop HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert_cut(&door, begun.elapsed());
        assert!(answer.ends_with("\r\n\r\nhello"), "{door:?}: {answer:?}");
    }
    siege.lift().await;
}
