//! HTTP/2 clients that give work and take none: floods of frames, of resets, and of header blocks.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::{frames::*, support::*};

/// How soon an abusive connection is told to go. For one attacker on a machine without other work.
const CALM_WITHIN: Duration = Duration::from_secs(1);

/// Resets that one connection may cost before it must be over, whoever makes them.
const MOST_RESETS: usize = 20_000;

fn id(at: usize) -> u32 {
    u32::try_from(2 * at + 1).unwrap()
}

// C1
#[tokio::test]
async fn a_rapid_reset_ends_its_connection_and_all_its_work() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege_heavily(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        let begun = Instant::now();
        peer.flood(MOST_RESETS / 50, |round| {
            let pairs = (0..50).map(|at| id(50 * round + at));
            pairs.flat_map(|id| [ask(id, END_STREAM, "GET", "/slow"), reset(id, CANCEL)].concat()).collect()
        })
        .await;
        let code = peer.given_up().await;
        println!("{door:?}: over after {:?}", begun.elapsed());
        assert_eq!(code, Over::Goaway(ENHANCE_YOUR_CALM), "{door:?}");
        assert!(begun.elapsed() < CALM_WITHIN, "{door:?}: {:?}", begun.elapsed());
        tally.idle().await;
    }
    siege.lift().await;
}

// C1
#[tokio::test]
async fn fifty_connections_that_reset_rapidly_are_fifty_that_end() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege_heavily(BOTH).await;
    let mut attackers = Vec::new();
    for at in 0..50 {
        let mut peer = field.peer(H2_DOORS[at % 3], &[]).await;
        attackers.push(tokio::spawn(async move {
            peer.flood(MOST_RESETS / 50, |round| {
                if at % 2 == 0 {
                    let pairs = (0..50).map(|at| id(50 * round + at));
                    return pairs
                        .flat_map(|id| [ask(id, END_STREAM, "GET", "/slow"), reset(id, CANCEL)].concat())
                        .collect();
                }
                // Half of them let the requests travel first.
                let streams = (0..50).map(|at| id(50 * (round / 2) + at));
                if round.is_multiple_of(2) {
                    streams.flat_map(|id| ask(id, END_STREAM, "GET", "/slow")).collect()
                } else {
                    streams.flat_map(|id| reset(id, CANCEL)).collect()
                }
            })
            .await;
            (H2_DOORS[at % 3], peer.given_up().await)
        }));
    }
    for attacker in attackers {
        let (door, over) = attacker.await.unwrap();
        siege.check(over == Over::Goaway(ENHANCE_YOUR_CALM), || format!("{door:?}: {over:?}"));
    }
    tally.idle().await;
    siege.lift().await;
}

/// What it is, and the frame that does it to a stream.
type Trick = (&'static str, fn(u32) -> Vec<u8>);

// C2
#[tokio::test]
async fn a_peer_that_makes_us_reset_is_told_to_go() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege_heavily(BOTH).await;
    let tricks: [Trick; 4] = [
        ("an increment of zero", |id| window_update(id, 0)),
        ("DATA after the end", |id| frame(DATA, 0, id, b"x")),
        ("a window beyond the largest", |id| window_update(id, MAX_WINDOW)),
        ("a length that is not kept", |_| Vec::new()),
    ];
    for door in H2_DOORS {
        for (what, trick) in tricks {
            let begun = Instant::now();
            let mut peer = field.peer(door, &[]).await;
            peer.flood(3_000 / 10, |round| {
                let streams = (0..10).map(|at| id(10 * round + at));
                streams
                    .flat_map(|id| {
                        if what == "a length that is not kept" {
                            let fields = [
                                (":method", "POST"),
                                (":scheme", "http"),
                                (":path", "/slow"),
                                (":authority", "app.example"),
                                ("content-length", "1"),
                            ];
                            return [headers(id, 0, &fields), frame(DATA, 0, id, b"xx")].concat();
                        }
                        [ask(id, END_STREAM, "GET", "/slow"), trick(id)].concat()
                    })
                    .collect()
            })
            .await;
            let over = peer.given_up().await;
            siege.check(matches!(over, Over::Goaway(1..)), || format!("{door:?} {what}: {over:?}"));
            println!("{door:?} {what}: after {:?}", begun.elapsed());
        }
        tally.idle().await;
    }
    siege.lift().await;
}

// C3
#[tokio::test]
async fn a_header_block_without_end_ends_its_connection() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege_heavily(BOTH).await;
    let start = block(&[(":method", "GET"), (":scheme", "http"), (":path", "/never"), (":authority", "a")]);
    let kinds: [(&str, usize, Vec<u8>); 4] = [
        ("nothing", 100_000, Vec::new()),
        ("one byte of padding", 100_000, vec![0x20]),
        ("small fields", 100_000, block(&[("x", "y")])),
        ("large fields", 4_000, block(&[("x", &"y".repeat(16_000))])),
    ];
    for door in H2_DOORS {
        for (what, times, piece) in &kinds {
            let mut peer = field.peer(door, &[]).await;
            peer.send(&frame(HEADERS, END_STREAM, 1, &start)).await;
            let step = if piece.len() > 1000 { 1 } else { 50 };
            peer.flood(times / step, |_| frame(CONTINUATION, 0, 1, piece).repeat(step)).await;
            let over = peer.given_up().await;
            siege.check(matches!(over, Over::Goaway(1..)), || format!("{door:?} {what}: {over:?}"));
            tally.assert_never(what);
        }
    }
    siege.lift().await;
}

// C3, C5: what RFC 9113 lets nobody send.
#[tokio::test]
async fn frames_out_of_place_end_their_connection() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege(BOTH).await;
    let open = || frame(HEADERS, 0, 1, &block(&[(":method", "GET")]));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("another frame within a header block", [open(), frame(PING, 0, 0, &[0; 8])].concat()),
        ("another stream within a header block", [open(), frame(CONTINUATION, END_HEADERS, 3, &[])].concat()),
        ("CONTINUATION of nothing", frame(CONTINUATION, END_HEADERS, 1, &[])),
        ("DATA on stream 0", frame(DATA, 0, 0, b"x")),
        ("DATA on an idle stream", frame(DATA, 0, 1, b"x")),
        ("HEADERS on stream 0", ask(0, END_STREAM, "GET", "/never")),
        ("HEADERS on an even stream", ask(2, END_STREAM, "GET", "/never")),
        (
            "a stream below the last",
            [ask(5, END_STREAM, "GET", "/big/1"), ask(3, END_STREAM, "GET", "/never")].concat(),
        ),
        ("RST_STREAM of an idle stream", reset(1, CANCEL)),
        ("RST_STREAM of stream 0", reset(0, CANCEL)),
        ("RST_STREAM of three bytes", frame(RST_STREAM, 0, 1, &[0; 3])),
        ("SETTINGS on a stream", frame(SETTINGS, 0, 1, &[])),
        ("SETTINGS of five bytes", frame(SETTINGS, 0, 0, &[0; 5])),
        ("an acknowledgement with a payload", frame(SETTINGS, ACK, 0, &[0; 6])),
        ("a push from a client", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2, 0x82])),
        ("ENABLE_PUSH of 2", settings(&[(ENABLE_PUSH, 2)])),
        ("a window beyond the largest", settings(&[(INITIAL_WINDOW_SIZE, 0x8000_0000)])),
        ("a frame size below the least", settings(&[(5, 16_383)])),
        ("PING on a stream", frame(PING, 0, 1, &[0; 8])),
        ("PING of seven bytes", frame(PING, 0, 0, &[0; 7])),
        ("GOAWAY on a stream", frame(GOAWAY, 0, 1, &[0; 8])),
        ("WINDOW_UPDATE of zero for the connection", window_update(0, 0)),
        ("WINDOW_UPDATE of an idle stream", window_update(1, 1)),
        ("a connection's window beyond the largest", window_update(0, MAX_WINDOW).repeat(2)),
        ("PRIORITY of four bytes", frame(PRIORITY, 0, 1, &[0; 4])),
        ("padding longer than the frame", [ask(1, 0, "POST", "/slow"), frame(DATA, 8, 1, &[9, 0])].concat()),
        ("a frame of 16 MiB", vec![0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]),
    ];
    for door in H2_DOORS {
        for (what, bytes) in &cases {
            let mut peer = field.peer(door, &[]).await;
            peer.send(bytes).await;
            // Some of these are errors of the stream in one reading of the RFC, and of the connection in another.
            let ended = peer.within(|log| {
                let reset = log.frames.iter().any(|frame| frame.kind == RST_STREAM);
                (log.is_over() || reset).then(|| log.goaway())
            });
            let ended = ended.await;
            siege.check(!matches!(ended, None | Some(Some(NO_ERROR))), || {
                format!("{door:?} {what}: {ended:?}")
            });
            tally.assert_never(what);
        }
    }
    siege.lift().await;
}

// C4
#[tokio::test]
async fn a_small_block_that_unfolds_into_much_is_refused() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege_heavily(BOTH).await;
    let start =
        block(&[(":method", "GET"), (":scheme", "http"), (":path", "/never"), (":authority", "app.example")]);
    let again = [YOUNGEST];
    let bombs = [
        (
            "4 KiB, 100,000 times",
            [start.clone(), indexed_literal("x", &"y".repeat(4000)), again.repeat(100_000)].concat(),
        ),
        (
            "a short field, 100,000 times",
            [start.clone(), indexed_literal("x", "y"), again.repeat(100_000)].concat(),
        ),
        ("cookies", [start.clone(), indexed_literal("cookie", "a=b"), again.repeat(100_000)].concat()),
        ("hosts", [start.clone(), indexed_literal("host", "app.example"), again.repeat(100_000)].concat()),
        (
            "a field that is stripped",
            [start.clone(), indexed_literal("outrigger-h1", "1.1"), again.repeat(100_000)].concat(),
        ),
        ("empty fields", [start.clone(), block(&[("x", "")]).repeat(20_000)].concat()),
        ("513 fields", [start.clone(), block(&[("x", "y")]).repeat(513)].concat()),
        ("a field of 200 KiB", [start.clone(), block(&[("x", &"y".repeat(200 * 1024))])].concat()),
    ];
    for door in H2_DOORS {
        for (what, bomb) in &bombs {
            let mut peer = field.peer(door, &[]).await;
            peer.send(&long_headers(1, END_STREAM, bomb)).await;
            let refused = peer.refused(1).await;
            let in_size = matches!(
                refused,
                Refused::Status(400 | 431) | Refused::Reset(_) | Refused::Connection(Some(_))
            );
            siege.check(in_size, || format!("{door:?} {what}: {refused:?}"));
            tally.assert_never(what);
        }
    }
    siege.lift().await;
}

// C4
#[tokio::test]
async fn what_is_no_hpack_is_a_compression_error() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege(BOTH).await;
    let mut size = Vec::new();
    integer(&mut size, 0x20, 5, 1 << 30);
    let mut long = vec![0];
    integer(&mut long, 0, 7, 1 << 30);
    let cases: [(&str, Vec<u8>); 9] = [
        ("index 0", vec![0x80]),
        ("an index beyond the table", vec![0xff, 0x80, 0x01]),
        ("an index without end", [&[0xff][..], &[0x80; 32], &[1]].concat()),
        ("an integer beyond 64 bits", [&[0xff][..], &[0xff; 16], &[1]].concat()),
        ("a table of 1 GiB", size),
        ("a table size that comes late", vec![0x82, 0x20]),
        ("a string longer than its block", long),
        ("Huffman with a whole byte of padding", vec![0, 0x82, 0x1f, 0xff, 0x00]),
        ("Huffman's end of string", vec![0, 0x84, 0xff, 0xff, 0xff, 0xff, 0x00]),
    ];
    for door in H2_DOORS {
        for (what, bytes) in &cases {
            let mut peer = field.peer(door, &[]).await;
            peer.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, bytes)).await;
            let over = peer.given_up().await;
            siege.check(over == Over::Goaway(COMPRESSION_ERROR), || format!("{door:?} {what}: {over:?}"));
            tally.assert_never(what);
        }
    }
    siege.lift().await;
}

/// Frames that cost their sender nothing.
fn cheap() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("SETTINGS", settings(&[(INITIAL_WINDOW_SIZE, 65_535)])),
        ("empty SETTINGS", settings(&[])),
        ("PING", frame(PING, 0, 0, b"are you?")),
        ("PRIORITY", frame(PRIORITY, 0, 101, &[0, 0, 0, 0, 16])),
        ("empty DATA", frame(DATA, 0, 1, &[])),
        ("padded empty DATA", frame(DATA, 8, 1, &[0])),
        ("WINDOW_UPDATE", window_update(1, 1)),
        ("unknown frames", frame(0xfa, 0, 0, &[])),
        ("PING acknowledgements", frame(PING, ACK, 0, b"are you?")),
    ]
}

// C5
#[tokio::test]
async fn floods_of_cheap_frames_are_bounded_or_ended() {
    let (app, tally) = application().await;
    let field = field(app);
    let mut siege = field.besiege_heavily(BOTH).await;
    for door in H2_DOORS {
        for (what, frame) in cheap() {
            let mut peer = field.peer(door, &[]).await;
            peer.send(&ask(1, 0, "POST", "/slow")).await;
            let frames = frame.repeat(500);
            let sent = peer.flood(100_000 / 500, |_| frames.clone()).await;
            let over = peer.look(Log::is_over);
            println!("{door:?} {what}: {sent:?}, over: {over}");
            // Who takes all of them must still be there, and answer.
            if !over && sent == Sent::Yes {
                peer.round_trip().await;
            }
            if what.contains("empty DATA") {
                let over = peer.given_up().await;
                siege.check(over == Over::Goaway(ENHANCE_YOUR_CALM), || format!("{door:?} {what}: {over:?}"));
            }
        }
        tally.idle().await;
    }
    siege.lift().await;
}

// C5
#[tokio::test]
async fn who_reads_no_answers_gets_no_more_of_them() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege_heavily(BOTH).await;
    let mut attackers = JoinSet::new();
    for door in H2_DOORS {
        for (what, frame) in cheap().into_iter().take(3) {
            let mut peer = field.deaf_peer(door).await;
            // 600,000 answers are 5 to 10 MB, more than the kernel takes.
            let frames = frame.repeat(4_000);
            attackers.spawn(async move { (door, what, peer.flood(150, |_| frames.clone()).await) });
        }
        // The same with answers that are errors: resets of streams.
        let mut peer = field.deaf_peer(door).await;
        attackers.spawn(async move {
            let sent = peer.flood(300, |round| {
                let streams = (0..500).map(|at| id(500 * round + at));
                streams
                    .flat_map(|id| [ask(id, END_STREAM, "GET", "/slow"), window_update(id, 0)].concat())
                    .collect()
            });
            (door, "errors", sent.await)
        });
    }
    while let Some(attacker) = attackers.join_next().await {
        println!("{:?}", attacker.unwrap());
    }
    tally.idle().await;
    siege.lift().await;
}

// C5
#[tokio::test]
async fn data_byte_by_byte_arrives_or_is_refused() {
    let (app, _) = application().await;
    let field = field(app);
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        peer.send(&ask(1, 0, "POST", "/echo")).await;
        // Within the first window of a stream.
        let bytes = frame(DATA, 0, 1, b"x").repeat(100);
        peer.flood(300, |_| bytes.clone()).await;
        peer.send(&frame(DATA, END_STREAM, 1, &[])).await;
        let refused = peer.wait("an answer or the end", |log| log.refusal(1)).await;
        assert!(
            matches!(
                refused,
                Refused::Status(200 | 502) | Refused::Reset(_) | Refused::Connection(Some(1..))
            ),
            "{door:?}: {refused:?}"
        );
    }
    siege.lift().await;
}

// C8
#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_all_close_together() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege_heavily(BOTH).await;
    for door in H2_DOORS {
        let mut peer = field.peer(door, &[]).await;
        let sent = peer.flood(100_000 / 100, |round| {
            let streams = (0..100).map(|at| id(100 * round + at));
            streams.flat_map(|id| ask(id, END_STREAM, "GET", "/slow")).collect()
        });
        let sent = sent.await;
        let (refused, over) = peer.look(|log| (log.counts[usize::from(RST_STREAM)], log.goaway()));
        println!("{door:?}: {sent:?}, {refused} refused, GOAWAY {over:?}");
        // Who is cut off while it writes may not read the GOAWAY any more.
        let cut = over.is_some() || sent == Sent::Closed;
        assert!(refused > 0 || cut, "{door:?}: all of them were taken");
        let not_refused = peer.look(|log| {
            let codes = (0..100).filter_map(|at| log.reset(id(50_000 + at)));
            codes.filter(|code| *code != REFUSED_STREAM).count()
        });
        assert_eq!(not_refused, 0, "{door:?}: resets that are no refusals");
        let begun = Instant::now();
        drop(peer);
        tally.idle().await;
        println!("{door:?}: closed in {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(5), "{door:?}: {:?}", begun.elapsed());
    }
    siege.lift().await;
}

// C8
#[tokio::test]
async fn who_opens_thousands_of_streams_and_reads_them_is_welcome() {
    let (app, tally) = application().await;
    let field = field(app);
    let siege = field.besiege(BOTH).await;
    for door in H2_DOORS {
        let before = tally.asked();
        let mut peer = field.peer(door, &[(INITIAL_WINDOW_SIZE, 1 << 20)]).await;
        for round in 0..30 {
            let streams = (0..50).map(|at| id(50 * round + at));
            let requests: Vec<u8> = streams.flat_map(|id| ask(id, END_STREAM, "GET", "/big/1")).collect();
            peer.send(&requests).await;
            peer.send(&window_update(0, 100 * 1024)).await;
            peer.wait("fifty answers", |log| {
                let ended = (0..50).all(|at| log.bytes(id(50 * round + at)) == 1024);
                (ended || log.is_over()).then_some(())
            })
            .await;
            assert!(!peer.look(Log::is_over), "{door:?}: {:?}", peer.look(Log::goaway));
        }
        assert_eq!(tally.asked() - before, 1500, "{door:?}");
    }
    siege.lift().await;
}
