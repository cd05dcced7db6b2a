//! HTTP/2 streams that stall, and requests that are none.

use std::time::Duration;

use crate::{frames::*, scripted::recorder, support::*};

fn id(at: usize) -> u32 {
    u32::try_from(2 * at + 1).unwrap()
}

// C6
#[tokio::test]
async fn a_stream_whose_window_stays_shut_is_reset() {
    let (app, tally) = application().await;
    let field = field_with(app, |config| config.timeouts.idle = millis(400));
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[(INITIAL_WINDOW_SIZE, 0)]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/big/4096")).await;
        peer.wait("the head", |log| log.status(1)).await;
        peer.wait("the cut", |log| (log.reset(1).is_some() || log.is_over()).then_some(())).await;
        assert_eq!(peer.look(|log| log.bytes(1)), 0, "{door:?}");
        tally.idle().await;
    }
    siege.lift().await;
}

// C6
#[tokio::test]
async fn streams_that_nobody_reads_hold_little() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege_heavily(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[(INITIAL_WINDOW_SIZE, 0)]).await;
        for at in 0..100 {
            peer.send(&ask(id(at), END_STREAM, "GET", "/endless")).await;
        }
        peer.wait("the heads", |log| {
            let heads = (0..100).filter(|at| log.status(id(*at)).is_some()).count();
            (heads == 100 || log.is_over()).then_some(())
        })
        .await;
        // Some more seconds of the same would show nothing new: what may be buffered fills at once.
        tokio::time::timeout(Duration::from_millis(500), std::future::pending::<()>()).await.unwrap_err();
        drop(peer);
        tally.idle().await;
    }
    siege.lift().await;
}

// C6
#[tokio::test]
async fn a_window_of_one_byte_costs_its_owner_only() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[(INITIAL_WINDOW_SIZE, 0)]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/big/64")).await;
        let bytes = window_update(1, 1).repeat(20);
        peer.flood(100, |_| bytes.clone()).await;
        peer.wait("2,000 bytes, or the end", |log| (log.bytes(1) == 2000 || log.is_over()).then_some(()))
            .await;
        drop(peer);
        tally.idle().await;
    }
    siege.lift().await;
}

// C6
#[tokio::test]
async fn windows_overflow_nowhere() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        peer.send(&[ask(1, END_STREAM, "GET", "/slow"), window_update(1, MAX_WINDOW)].concat()).await;
        let code = peer.wait("the reset", |log| log.reset(1).or(log.goaway())).await;
        assert_eq!(code, FLOW_CONTROL_ERROR, "{door:?}");

        let mut peer = field.peer(door, &[]).await;
        peer.send(&[ask(1, END_STREAM, "GET", "/slow"), window_update(0, MAX_WINDOW)].concat()).await;
        assert_eq!(peer.given_up().await, Over::Goaway(FLOW_CONTROL_ERROR), "{door:?}");

        // SETTINGS that take a window beyond the largest, after the stream's own update.
        let mut peer = field.peer(door, &[]).await;
        let bytes = [
            ask(1, END_STREAM, "GET", "/slow"),
            window_update(1, MAX_WINDOW - 65_535),
            settings(&[(INITIAL_WINDOW_SIZE, 65_536)]),
        ];
        peer.send(&bytes.concat()).await;
        assert_eq!(peer.given_up().await, Over::Goaway(FLOW_CONTROL_ERROR), "{door:?}");
        tally.idle().await;
    }
    siege.lift().await;
}

// C6
#[tokio::test]
async fn a_window_below_zero_is_paid_back_before_more_comes() {
    let (app, _) = application().await;
    let field = field(app);
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        // 65,535 bytes come, then the window is 65,535 below what it was.
        peer.send(&ask(1, END_STREAM, "GET", "/big/256")).await;
        peer.wait("a full window", |log| (log.bytes(1) == 65_535).then_some(())).await;
        peer.send(&[settings(&[(INITIAL_WINDOW_SIZE, 0)]), window_update(0, 1 << 20)].concat()).await;
        peer.send(&window_update(1, 65_535)).await;
        peer.round_trip().await;
        assert_eq!(peer.look(|log| log.bytes(1)), 65_535, "{door:?}: the window is zero, not more");
        peer.send(&window_update(1, 1)).await;
        peer.wait("one byte", |log| (log.bytes(1) == 65_536).then_some(())).await;
        peer.send(&settings(&[(INITIAL_WINDOW_SIZE, 1 << 20)])).await;
        peer.wait("the rest", |log| (log.bytes(1) == 256 * 1024 && log.finished(1)).then_some(())).await;
    }
    siege.lift().await;
}

// C6
#[tokio::test]
async fn more_than_the_window_is_an_error() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege_heavily(BOTH).await;
    for door in H2_DOORS {
        // The application reads nothing of it, so that nothing is given back.
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, 0, "POST", "/slow")).await;
        let data = frame(DATA, 0, 1, &[b'x'; 16_384]);
        let sent = peer.flood(64 * 1024 * 1024 / 16_384, |_| data.clone()).await;
        let code = peer.look(|log| log.reset(1).or(log.goaway()));
        println!("{door:?}: {sent:?}, {code:?}");
        if sent != Sent::Stalled {
            let code = peer.wait("the error", |log| log.reset(1).or(log.goaway())).await;
            assert!(matches!(code, FLOW_CONTROL_ERROR | ENHANCE_YOUR_CALM), "{door:?}: {code}");
        }
        drop(peer);
        tally.idle().await;
    }
    siege.lift().await;
}

// C7
#[tokio::test]
async fn slow_readers_on_a_shared_connection_slow_nobody_else() {
    let (app, tally) = application().await;
    let field = field(app);
    // The well-behaved client shares the one connection between the sidecars with all of these.
    let siege = field.besiege_heavily(BOTH).await;
    let mut peer = field.peer(Door::Outbound, &[(INITIAL_WINDOW_SIZE, 0)]).await;
    for at in 0..8 {
        peer.send(&ask(id(at), END_STREAM, "GET", "/endless")).await;
    }
    peer.wait("the heads", |log| (0..8).all(|at| log.status(id(at)).is_some()).then_some(())).await;
    let mut others = Vec::new();
    for _ in 0..92 {
        let mut client = http2(field.pair.address).await;
        others.push(tokio::spawn(async move {
            let begun = std::time::Instant::now();
            let response = client.send_request(get("http://app.example/big/64")).await.unwrap();
            let (head, body, _) = whole(response).await;
            assert_eq!((head.status.as_u16(), body.len()), (200, 64 * 1024));
            begun.elapsed()
        }));
    }
    let mut slowest = Duration::ZERO;
    for other in others {
        slowest = slowest.max(soon("another stream", other).await.unwrap());
    }
    println!("the slowest of 92 others: {slowest:?}");
    siege.lift().await;
    drop(peer);
    tally.idle().await;
}

/// The fields of a request for `/never`, with some changed or added.
fn fields<'a>(change: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut fields = vec![(":method", "GET"), (":scheme", "http"), (":path", "/never"), (":authority", "a")];
    for (name, value) in change {
        match fields.iter_mut().find(|field| field.0 == *name) {
            Some(field) => field.1 = value,
            None => fields.push((name, value)),
        }
    }
    fields
}

fn malformed() -> Vec<(&'static str, Vec<(&'static str, &'static str)>)> {
    let without = |name: &str| fields(&[]).into_iter().filter(|field| field.0 != name).collect::<Vec<_>>();
    let with = |name, value| [fields(&[]), vec![(name, value)]].concat();
    let mut cases = vec![
        ("two paths", with(":path", "/other")),
        ("two methods", with(":method", "GET")),
        ("two schemes", with(":scheme", "http")),
        ("two authorities", with(":authority", "b")),
        ("a pseudo-field after a field", [&[("x", "y")][..], &fields(&[])].concat()),
        ("a pseudo-field that is none", with(":foo", "x")),
        ("a status", with(":status", "200")),
        ("no method", without(":method")),
        ("no scheme", without(":scheme")),
        ("no path", without(":path")),
        ("nothing", vec![]),
        ("a path of nothing", fields(&[(":path", "")])),
        ("a path without a slash", fields(&[(":path", "never")])),
        ("a path with a line", fields(&[(":path", "/never HTTP/1.1\r\nhost: b\r\n\r\nGET /never")])),
        ("a path with a space", fields(&[(":path", "/never x")])),
        ("a path with NUL", fields(&[(":path", "/never\0")])),
        ("a method with a line", fields(&[(":method", "GET /never HTTP/1.1\r\nx:")])),
        ("a method with a space", fields(&[(":method", "GET /never")])),
        ("a method of nothing", fields(&[(":method", "")])),
        ("a scheme that is none", fields(&[(":scheme", "ht tp")])),
        ("a scheme with a line", fields(&[(":scheme", "http\r\nx: y")])),
        ("an authority with a line", fields(&[(":authority", "a\r\nx: y")])),
        ("an authority with a user", fields(&[(":authority", "u@a")])),
        ("an authority with a path", fields(&[(":authority", "a/never")])),
        ("an authority with a space", fields(&[(":authority", "a b")])),
        ("another host", fields(&[("host", "b")])),
        ("two hosts", [fields(&[("host", "a")]), vec![("host", "b")]].concat()),
        (
            "an extended CONNECT without a path",
            vec![
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "a"),
            ],
        ),
        ("CONNECT with a path", fields(&[(":method", "CONNECT")])),
        ("CONNECT without an authority", vec![(":method", "CONNECT")]),
        ("a protocol without CONNECT", with(":protocol", "websocket")),
        (
            "an upgrade to HTTP by CONNECT",
            [fields(&[(":method", "CONNECT")]), vec![(":protocol", "h2c")]].concat(),
        ),
    ];
    for (name, value) in [
        ("Upper", "x"),
        ("connection", "close"),
        ("connection", "x"),
        ("keep-alive", "5"),
        ("proxy-connection", "close"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
        ("te", "trailers, deflate"),
        ("x", "a\r\ny: z"),
        ("x", "a\nb"),
        ("x", "a\rb"),
        ("x", "a\0b"),
        ("x", " a"),
        ("x", "a\t"),
        ("", "x"),
        ("x y", "z"),
        ("x:", "z"),
        ("x\r\ny", "z"),
        ("x\0", "z"),
        ("content-length", "1"),
        ("content-length", "+0"),
        ("content-length", "0, 1"),
    ] {
        cases.push((name, with(name, value)));
    }
    cases.push((
        "two lengths",
        fields(&[("content-length", "0")]).into_iter().chain([("content-length", "1")]).collect(),
    ));
    cases
}

/// Sends each malformed request with `more` fields on a connection of its own, for an error of one may end it.
async fn refuses_malformed(
    siege: &mut Siege<'_>,
    field: &Field,
    door: Door,
    more: &[(&'static str, &'static str)],
    reached: impl Fn() -> usize,
) {
    for (what, request) in malformed() {
        let before = reached();
        let mut peer = field.peer(door, &[]).await;
        let request = [&request, more].concat();
        peer.send(&headers(1, END_STREAM, &request)).await;
        let refused = peer.refused(1).await;
        let as_expected = matches!(
            refused,
            Refused::Status(400) | Refused::Reset(PROTOCOL_ERROR) | Refused::Connection(Some(PROTOCOL_ERROR))
        );
        siege.check(as_expected, || format!("{door:?} {what} {request:?}: {refused:?}"));
        siege.check(reached() == before, || format!("{door:?} {what} {request:?}: reached the application"));
    }
}

// C9
#[tokio::test]
async fn malformed_requests_are_protocol_errors() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        refuses_malformed(&mut siege, &field, door, &[], || tally.asked()).await;
    }
    siege.lift().await;
}

// C9
#[tokio::test]
async fn nothing_malformed_is_written_as_http_1() {
    let (app, record) = recorder().await;
    let field = field(app);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for mark in ["1.1", "1.0"] {
        refuses_malformed(&mut siege, &field, Door::Mesh, &[("outrigger-h1", mark)], || record.bytes().len())
            .await;
    }
    // The mark itself.
    record.clear();
    for mark in
        ["", "2", "1.1\r\nx: y", "1.1; method=GET /never", "1.1; method=G\r\nX", "1.1; status=200", "1.1,1.1"]
    {
        let mut peer = field.peer(Door::Mesh, &[]).await;
        peer.send(&headers(1, END_STREAM, &fields(&[("outrigger-h1", mark)]))).await;
        let refused = peer.refused(1).await;
        siege.check(refused.is_one() && record.is_empty(), || format!("mark {mark:?}: {refused:?}"));
        record.clear();
    }
    siege.lift().await;
}

// C9
#[tokio::test]
async fn a_body_that_is_not_its_length_is_no_body() {
    let (app, record) = recorder().await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    let post = fields(&[(":method", "POST"), ("content-length", "5"), ("outrigger-h1", "1.1")]);
    let smuggled = "hello GET /x HTTP/1.1\r\nhost: a\r\n\r\n";
    for (what, body) in [
        ("more", frame(DATA, END_STREAM, 1, smuggled.as_bytes())),
        (
            "more, later",
            [frame(DATA, 0, 1, b"hello"), frame(DATA, END_STREAM, 1, &smuggled.as_bytes()[5..])].concat(),
        ),
        ("less", frame(DATA, END_STREAM, 1, b"hell")),
        ("less, with trailers", [frame(DATA, 0, 1, b"hell"), headers(1, END_STREAM, &[("x", "y")])].concat()),
    ] {
        let mut peer = field.peer(Door::Mesh, &[]).await;
        peer.send(&[headers(1, 0, &post), body].concat()).await;
        let refused = peer.refused(1).await;
        assert!(refused.is_one(), "{what}: {refused:?}");
        assert!(!record.bytes().contains("GET /x"), "{what}: {}", record.bytes());
        if what.starts_with("less") {
            assert!(record.requests().is_empty(), "{what}: {:?}", record.requests());
        }
        record.clear();
    }
    siege.lift().await;
}

// C9
#[tokio::test]
async fn trailers_are_fields_and_the_end() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        for (what, trailers) in [
            ("without an end", headers(1, 0, &[("x", "y")])),
            ("with a path", headers(1, END_STREAM, &[(":path", "/never")])),
            ("with a status", headers(1, END_STREAM, &[(":status", "200")])),
            ("with a connection", headers(1, END_STREAM, &[("connection", "close")])),
            ("in upper case", headers(1, END_STREAM, &[("X", "y")])),
            ("with a line", headers(1, END_STREAM, &[("x", "y\r\nz: a")])),
            ("without limit", long_headers(1, END_STREAM, &block(&[("x", &"y".repeat(8000))]).repeat(40))),
        ] {
            let mut peer = field.peer(door, &[]).await;
            peer.send(&[ask(1, 0, "POST", "/echo"), frame(DATA, 0, 1, b"hello"), trailers].concat()).await;
            let refused = peer.refused(1).await;
            siege.check(refused.is_one(), || format!("{door:?} {what}: {refused:?}"));
        }
        tally.idle().await;
    }
    siege.lift().await;
}
