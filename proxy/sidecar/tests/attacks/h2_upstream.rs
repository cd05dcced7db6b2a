//! HTTP/2 applications that leave, push, or answer what is no answer.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::{
    evil::{Act, Evil, http2_server, ok},
    frames::*,
    support::*,
};

/// Ways to an application in HTTP/2: through two sidecars, and through one.
const DOORS: [Door; 2] = [Door::Outbound, Door::InClear];

fn id(at: usize) -> u32 {
    u32::try_from(2 * at + 1).unwrap()
}

// C11
#[tokio::test]
async fn streams_that_a_goaway_leaves_out_go_elsewhere_once() {
    let (served, leave) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let shared = (served.clone(), leave.clone());
    let app = http2_server(&[], move |mut peer, _| {
        let (served, leave) = shared.clone();
        async move {
            // The first connection of each door leaves with its second request unread.
            let leaves = leave.swap(false, Ordering::SeqCst);
            for at in 0.. {
                let Some(stream) = peer.request(at).await else { return };
                if leaves {
                    let Some(_) = peer.request(1).await else { return };
                    peer.send(&goaway(stream, NO_ERROR)).await;
                }
                served.fetch_add(1, Ordering::SeqCst);
                peer.send(&ok(stream)).await;
                if leaves {
                    peer.round_trip().await;
                    return;
                }
            }
        }
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        leave.store(true, Ordering::SeqCst);
        let before = served.load(Ordering::SeqCst);
        let mut peer = field.peer(door, &[]).await;
        peer.send(&[ask(1, END_STREAM, "GET", "/a"), ask(3, END_STREAM, "POST", "/b")].concat()).await;
        for stream in [1, 3] {
            let status = peer.wait("an answer", |log| log.refusal(stream)).await;
            assert_eq!(status, Refused::Status(200), "{door:?} {stream}");
        }
        assert_eq!(served.load(Ordering::SeqCst) - before, 2, "{door:?}: each once");
    }
    siege.lift().await;
}

// C11
#[tokio::test]
async fn a_stream_that_a_goaway_includes_is_not_sent_again() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = http2_server(&[], move |mut peer, _| {
        let asked = count.clone();
        async move {
            let Some(stream) = peer.request(0).await else { return };
            asked.fetch_add(1, Ordering::SeqCst);
            peer.send(&goaway(stream, NO_ERROR)).await;
            peer.round_trip().await;
        }
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let before = asked.load(Ordering::SeqCst);
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, END_STREAM, "POST", "/a")).await;
        let refused = peer.refused(1).await;
        assert!(matches!(refused, Refused::Status(502) | Refused::Reset(_)), "{door:?}: {refused:?}");
        assert_eq!(asked.load(Ordering::SeqCst) - before, 1, "{door:?}");
    }
    siege.lift().await;
}

// C11
#[tokio::test]
async fn who_always_leaves_is_not_asked_for_ever() {
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    let app = http2_server(&[], move |mut peer, _| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            if peer.request(0).await.is_some() {
                peer.send(&goaway(0, NO_ERROR)).await;
                peer.round_trip().await;
            }
        }
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let before = connections.load(Ordering::SeqCst);
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
        let refused = peer.refused(1).await;
        assert!(matches!(refused, Refused::Status(502 | 503) | Refused::Reset(_)), "{door:?}: {refused:?}");
        let tries = connections.load(Ordering::SeqCst) - before;
        assert!(tries <= 16, "{door:?}: {tries} connections");
    }
    siege.lift().await;
}

// C11
#[tokio::test]
async fn an_application_with_one_stream_is_given_one_or_refuses_the_others() {
    let app = http2_server(&[(MAX_CONCURRENT_STREAMS, 1)], |mut peer, _| async move {
        let mut answered = 0;
        loop {
            let Some(stream) = peer.request(answered).await else { return };
            // What was sent beside it has arrived after this.
            peer.round_trip().await;
            let at_once = peer.look(|log| log.counts[usize::from(HEADERS)]) - answered;
            for surplus in answered + 1..answered + at_once {
                let Some(surplus) = peer.request(surplus).await else { return };
                peer.send(&reset(surplus, REFUSED_STREAM)).await;
            }
            answered += at_once;
            peer.send(&ok(stream)).await;
        }
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
        assert_eq!(peer.refused(1).await, Refused::Status(200), "{door:?}");
        let requests: Vec<u8> = (1..9).flat_map(|at| ask(id(at), END_STREAM, "GET", "/a")).collect();
        peer.send(&requests).await;
        let mut served = 0;
        for at in 1..9 {
            let refused = peer.refused(id(at)).await;
            served += usize::from(refused == Refused::Status(200));
            // A stream that was refused twice is given up, and says so.
            let told = matches!(refused, Refused::Status(200 | 502 | 503) | Refused::Reset(REFUSED_STREAM));
            assert!(told, "{door:?} {at}: {refused:?}");
        }
        println!("{door:?}: {served} of 8 served");
        assert!(served > 0, "{door:?}");
        peer.send(&ask(id(9), END_STREAM, "GET", "/a")).await;
        assert_eq!(peer.refused(id(9)).await, Refused::Status(200), "{door:?}");
    }
    siege.lift().await;
}

// C11
#[tokio::test]
async fn an_application_without_streams_is_a_time_out_or_a_refusal() {
    let app = http2_server(&[(MAX_CONCURRENT_STREAMS, 0)], |peer, _| async move {
        while peer.request(0).await.is_some() {
            peer.end().await;
        }
    })
    .await;
    let field = field_with(app, |config| config.timeouts.request = millis(300));
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
        let refused = peer.refused(1).await;
        assert!(matches!(refused, Refused::Status(502..=504) | Refused::Reset(_)), "{door:?}: {refused:?}");
    }
    siege.lift().await;
}

// C11
#[tokio::test]
async fn a_push_is_refused_and_reaches_nobody() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let promise =
            [&[0, 0, 0, 2][..], &block(&[(":method", "GET"), (":path", "/x"), (":scheme", "http")])].concat();
        evil.plans(move |stream| {
            let pushed = [headers(2, 0, &[(":status", "200")]), frame(DATA, END_STREAM, 2, b"POISON")];
            Act::Say(
                [frame(PUSH_PROMISE, END_HEADERS, stream, &promise), pushed.concat(), ok(stream)].concat(),
            )
        });
        let before = evil.told.lock().unwrap().len();
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
        let refused = peer.refused(1).await;
        assert!(refused.is_one(), "{door:?}: {refused:?}");
        eventually("the GOAWAY", || evil.told.lock().unwrap().len() > before).await;
        assert_eq!(evil.told.lock().unwrap().last(), Some(&PROTOCOL_ERROR), "{door:?}");
        assert!(peer.look(|log| log.bytes(2) == 0 && !log.is_over()), "{door:?}");
        evil.behaves();
        peer.send(&ask(3, END_STREAM, "GET", "/a")).await;
        assert_eq!(peer.refused(3).await, Refused::Status(200), "{door:?}");
    }
    siege.lift().await;
}

#[tokio::test]
async fn our_settings_allow_no_push() {
    let (told, settings) = tokio::sync::watch::channel(None);
    let app = http2_server(&[], move |mut peer, _| {
        let push = peer.look(|log| {
            log.frames[0]
                .payload
                .chunks(6)
                .find(|entry| entry[..2] == ENABLE_PUSH.to_be_bytes())
                .map(|entry| entry[5])
        });
        told.send_replace(Some(push));
        async move {
            if let Some(stream) = peer.request(0).await {
                peer.send(&ok(stream)).await;
                peer.end().await;
            }
        }
    })
    .await;
    let field = field(app);
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
        assert_eq!(peer.refused(1).await, Refused::Status(200), "{door:?}");
        assert_eq!(*settings.borrow(), Some(Some(0)), "{door:?}");
    }
    siege.lift().await;
}

fn status(stream: u32, flags: u8, status: &str) -> Vec<u8> {
    headers(stream, flags, &[(":status", status)])
}

/// What is wrong with an answer, and the answer.
type Malformed = (&'static str, fn(u32) -> Act);

/// Answers that are none.
fn malformed() -> Vec<Malformed> {
    fn with(stream: u32, fields: &[(&str, &str)]) -> Act {
        let fields = [&[(":status", "200")], fields].concat();
        Act::Say([headers(stream, 0, &fields), frame(DATA, END_STREAM, stream, b"hello")].concat())
    }
    vec![
        ("no status", |id| Act::Say(headers(id, END_STREAM, &[("x", "y")]))),
        ("a status that is no number", |id| Act::Say(status(id, END_STREAM, "abc"))),
        ("a status of two digits", |id| Act::Say(status(id, END_STREAM, "20"))),
        ("a status of four digits", |id| Act::Say(status(id, END_STREAM, "2000"))),
        ("two statuses", |id| with(id, &[(":status", "201")])),
        ("a path", |id| with(id, &[(":path", "/")])),
        ("a pseudo-field behind a field", |id| {
            Act::Say(headers(id, END_STREAM, &[("x", "y"), (":status", "200")]))
        }),
        ("upper case", |id| with(id, &[("X", "y")])),
        ("a connection", |id| with(id, &[("connection", "close")])),
        ("a transfer coding", |id| with(id, &[("transfer-encoding", "chunked")])),
        ("a line in a value", |id| with(id, &[("x", "a\r\nset-cookie: b")])),
        ("NUL in a value", |id| with(id, &[("x", "a\0b")])),
        ("a line in a name", |id| with(id, &[("x\r\ny", "z")])),
        ("two lengths", |id| with(id, &[("content-length", "5"), ("content-length", "6")])),
        ("more than its length", |id| with(id, &[("content-length", "4")])),
        ("less than its length", |id| with(id, &[("content-length", "6")])),
        ("a length that is none", |id| with(id, &[("content-length", "-5")])),
        ("101", |id| Act::Say(status(id, 0, "101"))),
        ("an interim response that ends", |id| Act::Say(status(id, END_STREAM, "103"))),
        ("DATA before the head", |id| Act::Say([frame(DATA, 0, id, b"x"), ok(id)].concat())),
        ("a status in trailers", |id| {
            Act::Say([status(id, 0, "200"), frame(DATA, 0, id, b"x"), status(id, END_STREAM, "200")].concat())
        }),
        ("trailers without an end", |id| {
            Act::Say([status(id, 0, "200"), frame(DATA, 0, id, b"x"), headers(id, 0, &[("x", "y")])].concat())
        }),
        ("a reset", |id| Act::Say(reset(id, 0xdead))),
        ("a reset in a body", |id| {
            Act::Say([status(id, 0, "200"), frame(DATA, 0, id, b"x"), reset(id, CANCEL)].concat())
        }),
        ("a large field", |id| {
            Act::Say(long_headers(id, END_STREAM, &block(&[(":status", "200"), ("x", &"y".repeat(1 << 20))])))
        }),
        ("100,000 references", |id| {
            let bomb = [
                block(&[(":status", "200")]),
                indexed_literal("x", &"y".repeat(4000)),
                vec![YOUNGEST; 100_000],
            ];
            Act::Say(long_headers(id, END_STREAM, &bomb.concat()))
        }),
        ("CONTINUATION without end", |id| {
            let start = frame(HEADERS, 0, id, &block(&[(":status", "200")]));
            Act::Flood(start, frame(CONTINUATION, 0, id, &block(&[("x", "y")])).repeat(50), 2_000)
        }),
        ("interim responses without end", |id| {
            Act::Flood(Vec::new(), status(id, 0, "103").repeat(100), 10_000)
        }),
        ("empty DATA without end", |id| {
            Act::Flood(status(id, 0, "200"), frame(DATA, 0, id, &[]).repeat(500), 1_000)
        }),
        ("no HPACK", |id| Act::Say(frame(HEADERS, END_HEADERS | END_STREAM, id, &[0x80]))),
        ("a stream of its own", |id| Act::Say([status(2, END_STREAM, "200"), status(id, 0, "200")].concat())),
        ("a stream that nobody opened", |id| {
            Act::Say([status(id + 100, END_STREAM, "200"), status(id, 0, "200")].concat())
        }),
        ("an increment of zero", |id| Act::Say([status(id, 0, "200"), window_update(id, 0)].concat())),
        ("a frame of 16 MiB", |_| Act::Say(vec![0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1])),
    ]
}

// A7, C3, C4, C9 from the other side
#[tokio::test]
async fn an_answer_that_is_none_spoils_its_own_stream_only() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        for (what, plan) in malformed() {
            let begun = std::time::Instant::now();
            let mut peer = field.peer(door, &[]).await;
            evil.plans(plan);
            peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
            let ended = |log: &Log| {
                let refused = log.refusal(1).is_some_and(Refused::is_one);
                (refused || log.finished(1) || log.reset(1).is_some())
                    .then(|| (log.finished(1), log.status(1)))
            };
            let (whole, seen) = match peer.within(ended).await {
                Some(ended) => ended,
                None => (true, None),
            };
            let answered = begun.elapsed();
            let spoiled = !whole || seen >= Some(400);
            siege.check(spoiled, || format!("{door:?} {what}: {seen:?}, as if it were whole, or nothing"));
            let over = peer.look(Log::is_over);
            siege.check(!over, || format!("{door:?} {what}: the caller's connection is over"));
            evil.behaves();
            // A connection that breaks at this moment may take this one with it.
            let mut good = false;
            for stream in [3, 5, 7] {
                peer.send(&ask(stream, END_STREAM, "GET", "/a")).await;
                good = good || peer.refused(stream).await == Refused::Status(200);
            }
            println!("{door:?} {what}: answered after {answered:?}, well after {:?}", begun.elapsed());
            siege.check(good, || format!("{door:?}: nothing is well after {what}"));
        }
    }
    println!(
        "{} requests on {} connections",
        evil.requests.load(Ordering::SeqCst),
        evil.connections.load(Ordering::SeqCst)
    );
    siege.lift().await;
}

// C5, C6 from the other side
#[tokio::test]
async fn an_application_that_floods_hurts_nobody_else() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let mut siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        for (what, frames) in [
            ("SETTINGS", settings(&[(INITIAL_WINDOW_SIZE, 65_535)])),
            ("PING", frame(PING, 0, 0, b"are you?")),
            ("PRIORITY", frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 16])),
            ("WINDOW_UPDATE", window_update(1, 1)),
            ("unknown frames", frame(0xfa, 0, 0, &[])),
        ] {
            let mut peer = field.peer(door, &[]).await;
            let again = frames.repeat(500);
            evil.plans(move |stream| {
                Act::Flood(headers(stream, 0, &[(":status", "200")]), again.clone(), 200)
            });
            peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
            peer.wait("a head or the end", |log| log.refusal(1)).await;
            evil.behaves();
            let mut good = false;
            for stream in [3, 5, 7] {
                peer.send(&ask(stream, END_STREAM, "GET", "/a")).await;
                good = good || peer.refused(stream).await == Refused::Status(200);
            }
            siege.check(good, || format!("{door:?}: nothing is well after {what}"));
        }
    }
    siege.lift().await;
}

// C6 from the other side
#[tokio::test]
async fn an_application_that_sends_more_than_it_may_is_cut() {
    let evil = Evil::new().await;
    let field = field(evil.address);
    let siege = field.besiege_heavily(&[Speaks::Http1]).await;
    for door in DOORS {
        // Nothing is read, so nothing is given back.
        let mut peer = field.peer(door, &[(INITIAL_WINDOW_SIZE, 0)]).await;
        evil.plans(|stream| {
            let data = frame(DATA, 0, stream, &[b'x'; 16_384]);
            Act::Flood(headers(stream, 0, &[(":status", "200")]), data, 8 * 1024)
        });
        let before = evil.told.lock().unwrap().len();
        peer.send(&ask(1, END_STREAM, "GET", "/a")).await;
        let cut = peer.wait("the cut", |log| log.reset(1).or(log.goaway()));
        // With its window shut, the caller may not be told before the application is.
        let told = eventually("the end of the stream", || evil.told.lock().unwrap().len() > before);
        tokio::select! {
            code = cut => println!("{door:?}: reset with {code}"),
            () = told => println!("{door:?}: told {:?}", evil.told.lock().unwrap().last()),
        }
        assert!(!peer.look(Log::is_over), "{door:?}: the caller's connection is over");
    }
    siege.lift().await;
}

// C6 from the other side
#[tokio::test]
async fn an_application_that_takes_no_body_is_timed_out() {
    let app = http2_server(&[(INITIAL_WINDOW_SIZE, 0)], |peer, _| async move {
        peer.end().await;
    })
    .await;
    let field = field_with(app, |config| config.timeouts.idle = millis(400));
    let siege = field.besiege(&[Speaks::Http1]).await;
    for door in DOORS {
        let mut peer = field.peer(door, &[]).await;
        let upload = [ask(1, 0, "POST", "/a"), frame(DATA, 0, 1, &[b'x'; 16_384])].concat();
        peer.send(&upload).await;
        let refused = peer.refused(1).await;
        assert!(refused.is_one(), "{door:?}: {refused:?}");
    }
    siege.lift().await;
}
