//! gRPC servers and clients that say odd things (gRPC over HTTP/2). The proxy understands statuses for its metrics, and
//! passes the rest.

use crate::{
    evil::{Act, Evil},
    frames::*,
    support::*,
};

const DOORS: [Door; 2] = [Door::Outbound, Door::InClear];

/// A call with one message of five bytes.
fn call(stream: u32, more: &[(&str, &str)]) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/svc/Unary"),
        (":authority", "app.example"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let message = frame(DATA, END_STREAM, stream, b"\0\0\0\0\x05hello");
    [headers(stream, 0, &[&fields, more].concat()), message].concat()
}

fn head(stream: u32, more: &[(&str, &str)]) -> Vec<u8> {
    let fields = [(":status", "200"), ("content-type", "application/grpc")];
    headers(stream, 0, &[&fields, more].concat())
}

fn trailers(stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    headers(stream, END_STREAM, fields)
}

fn message(stream: u32, bytes: &[u8]) -> Vec<u8> {
    frame(DATA, 0, stream, bytes)
}

/// How a call has ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Whole { status: Option<u16>, bytes: usize },
    Reset(u32),
    Lost,
}

async fn ended(peer: &Peer, stream: u32) -> End {
    peer.wait("the end of a call", |log| {
        let whole = || End::Whole { status: log.status(stream), bytes: log.bytes(stream) };
        let reset = log.reset(stream).map(End::Reset);
        reset.or_else(|| log.finished(stream).then(whole)).or_else(|| log.is_over().then_some(End::Lost))
    })
    .await
}

/// What is odd, what it is counted as, bytes of body, and the answer.
type Odd = (&'static str, &'static [&'static str], usize, fn(u32) -> Vec<u8>);

// C10
#[tokio::test]
async fn odd_answers_pass_and_are_counted_under_few_names() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let siege = field.besiege(&[Speaks::Http1]).await;
    let cases: Vec<Odd> = vec![
        ("trailers only", &["5"], 0, |id| {
            let fields = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "5")];
            headers(id, END_STREAM, &fields)
        }),
        ("no status, no trailers", &["none", "2", "13"], 7, |id| {
            [head(id, &[]), message(id, b"\0\0\0\0\x02ok"), frame(DATA, END_STREAM, id, &[])].concat()
        }),
        ("trailers without a status", &["none", "2", "13"], 7, |id| {
            [head(id, &[]), message(id, b"\0\0\0\0\x02ok"), trailers(id, &[("x", "y")])].concat()
        }),
        ("a status of 999", &["other", "2"], 7, |id| {
            [head(id, &[]), message(id, b"\0\0\0\0\x02ok"), trailers(id, &[("grpc-status", "999")])].concat()
        }),
        ("a status of words", &["other", "2"], 7, |id| {
            [head(id, &[]), message(id, b"\0\0\0\0\x02ok"), trailers(id, &[("grpc-status", "it failed")])]
                .concat()
        }),
        ("two statuses in trailers", &["3", "4", "other", "2"], 0, |id| {
            [head(id, &[]), trailers(id, &[("grpc-status", "3"), ("grpc-status", "4")])].concat()
        }),
        ("a status in the head and another in trailers", &["3", "4", "other", "2"], 7, |id| {
            let trailers = trailers(id, &[("grpc-status", "4")]);
            [head(id, &[("grpc-status", "3")]), message(id, b"\0\0\0\0\x02ok"), trailers].concat()
        }),
        ("a length of 4 GiB", &["0"], 7, |id| {
            [head(id, &[]), message(id, b"\0\xff\xff\xff\xffok"), trailers(id, &[("grpc-status", "0")])]
                .concat()
        }),
        ("a compression flag that is none", &["0"], 7, |id| {
            [head(id, &[]), message(id, b"\x7f\0\0\0\x02ok"), trailers(id, &[("grpc-status", "0")])].concat()
        }),
        ("half a message", &["0"], 3, |id| {
            [head(id, &[]), message(id, b"\0\0\0"), trailers(id, &[("grpc-status", "0")])].concat()
        }),
    ];
    for door in DOORS {
        for (what, counted, bytes, answer) in &cases {
            let answer = *answer;
            evil.plans(move |stream| Act::Say(answer(stream)));
            let before = field.metrics();
            let mut peer = field.peer(door, &[]).await;
            peer.send(&call(1, &[])).await;
            assert_eq!(
                ended(&peer, 1).await,
                End::Whole { status: Some(200), bytes: *bytes },
                "{door:?} {what}"
            );
            eventually(what, || {
                let now = field.metrics();
                let new =
                    |line: &&str| line.starts_with("outrigger_requests_total") && !before.contains(*line);
                let counts = |line: &str| {
                    counted.iter().any(|status| line.contains(&format!("grpc_status=\"{status}\"")))
                };
                now.lines().filter(new).any(counts)
            })
            .await;
        }
    }
    siege.lift().await;
}

// C10
#[tokio::test]
async fn a_message_for_people_of_1_mib_is_not_passed() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        evil.plans(|id| {
            let trailers = block(&[("grpc-status", "13"), ("grpc-message", &"x".repeat(1 << 20))]);
            Act::Say([head(id, &[]), long_headers(id, END_STREAM, &trailers)].concat())
        });
        let mut peer = field.peer(door, &[]).await;
        peer.send(&call(1, &[])).await;
        let end = ended(&peer, 1).await;
        assert!(matches!(end, End::Reset(_) | End::Whole { .. }), "{door:?}: {end:?}");
        evil.behaves();
        peer.send(&call(3, &[])).await;
        assert_eq!(ended(&peer, 3).await, End::Whole { status: Some(200), bytes: 2 }, "{door:?}");
    }
    siege.lift().await;
}

// C10
#[tokio::test]
async fn deadlines_that_are_none_break_nothing() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let mut peer = field.peer(door, &[]).await;
        let mut stream = 1;
        for deadline in [
            "0n",
            "0H",
            "99999999H",
            "999999999999999999999H",
            "-1S",
            "1",
            "S",
            "",
            "1X",
            "1 S",
            "18446744073709551615n",
        ] {
            peer.send(&call(stream, &[("grpc-timeout", deadline)])).await;
            let end = ended(&peer, stream).await;
            // A deadline that has passed may be told at once.
            assert!(matches!(end, End::Whole { .. } | End::Reset(_)), "{door:?} {deadline:?}: {end:?}");
            stream += 2;
        }
    }
    siege.lift().await;
}

// C10
#[tokio::test]
async fn a_reset_within_a_message_is_no_end() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        evil.plans(|id| Act::Say([head(id, &[]), message(id, b"\0\0\0\0\x09half"), reset(id, 2)].concat()));
        let mut peer = field.peer(door, &[]).await;
        peer.send(&call(1, &[])).await;
        let end = ended(&peer, 1).await;
        assert!(matches!(end, End::Reset(_) | End::Whole { status: Some(400..), .. }), "{door:?}: {end:?}");
    }
    siege.lift().await;
}

// C10
#[tokio::test]
async fn a_client_that_resets_within_a_message_ends_its_call() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        let head = headers(
            1,
            0,
            &[
                (":method", "POST"),
                (":scheme", "http"),
                (":path", "/slow"),
                (":authority", "a"),
                ("te", "trailers"),
            ],
        );
        peer.send(&[head, message(1, b"\0\0\0\0\x09half")].concat()).await;
        let before = tally.asked();
        eventually("the call", || tally.asked() >= before.max(1)).await;
        peer.send(&reset(1, CANCEL)).await;
        tally.idle().await;
        assert!(!peer.look(Log::is_over), "{door:?}");
    }
    siege.lift().await;
}

// C10
#[tokio::test]
async fn a_large_message_is_never_held_whole() {
    let (app, _) = application().await;
    let field = field(app);
    let siege = field.besiege_heavily(BOTH).await;
    for door in H2_DOORS {
        // More than memory may grow by.
        let mut peer = field.peer(door, &[(INITIAL_WINDOW_SIZE, 1 << 20)]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/big/81920")).await;
        let mut given = 65_535;
        while !peer.look(|log| log.finished(1)) {
            let seen = peer.wait("more", |log| {
                let more = log.bytes(1) + (1 << 19) >= given || log.finished(1) || log.is_over();
                more.then(|| log.bytes(1))
            });
            let seen = seen.await;
            assert!(!peer.look(Log::is_over), "{door:?}");
            let grant = seen + (1 << 20) - given;
            given += grant;
            let grant = u32::try_from(grant).unwrap();
            peer.send(&[window_update(0, grant), window_update(1, grant)].concat()).await;
        }
        assert_eq!(peer.look(|log| log.bytes(1)), 80 << 20, "{door:?}");
    }
    siege.lift().await;
}
