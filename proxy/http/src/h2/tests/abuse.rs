//! What a hostile peer may do, and where it ends: RFC 9113, 10.5.

use super::*;

/// Repeats `bytes` until the connection ends, which must be before the `most`-th time. What is sent meanwhile is
/// bounded by what came.
fn ends_within(most: usize, end: &mut End, mut bytes: impl FnMut(u32) -> Vec<u8>) {
    let mut came = 0;
    let mut sent = 0;
    for round in 0..most {
        let bytes = bytes(round as u32);
        came += bytes.len();
        let told = end.feed(&bytes);
        sent += end.out.len();
        end.out.clear();
        if let Err(fatal) = told {
            assert_eq!(fatal.code, Code::ENHANCE_YOUR_CALM);
            assert!(sent <= 2 * came + 100, "{sent} for {came}");
            return;
        }
    }
    panic!("the connection goes on");
}

fn id(round: u32) -> StreamId {
    2 * round + 1
}

#[test]
fn rapid_resets_end_the_connection() {
    ends_within(60, &mut server(), |round| [get(id(round)), number(kind::RST_STREAM, id(round), 8)].concat());
}

#[test]
fn resets_of_answered_streams_are_no_abuse() {
    let mut server = server();
    for round in 0..1000 {
        let id = id(round);
        server.feed(&post(id)).unwrap();
        server.connection.response(id, &response_head(413), true, &mut server.out);
        server.feed(&number(kind::RST_STREAM, id, 8)).unwrap();
    }
}

#[test]
fn a_busy_connection_may_cancel_now_and_then() {
    let mut server = server();
    for round in 0..1000 {
        let id = id(round);
        server.feed(&get(id)).unwrap();
        if round % 3 == 0 {
            server.feed(&number(kind::RST_STREAM, id, 8)).unwrap();
        } else {
            server.connection.response(id, &response_head(200), true, &mut server.out);
        }
    }
}

#[test]
fn time_refills_the_budgets() {
    let mut server = server();
    for round in 0..1000 {
        if round % 50 == 0 {
            server.connection.tick();
        }
        server.feed(&[get(id(round)), number(kind::RST_STREAM, id(round), 8)].concat()).unwrap();
    }
}

#[test]
fn resets_that_the_peer_provokes_end_the_connection() {
    let window = |round| [post(id(round)), number(kind::WINDOW_UPDATE, id(round), 0)].concat();
    ends_within(60, &mut server(), window);
    let overflow = |round| [post(id(round)), number(kind::WINDOW_UPDATE, id(round), (1 << 31) - 1)].concat();
    ends_within(60, &mut server(), overflow);
    let after_end = |round| [get(id(round)), data(id(round), false, b"a")].concat();
    ends_within(60, &mut server(), after_end);
    let second_head = |round| [post(id(round)), headers(id(round), false, &[("a", "b")])].concat();
    ends_within(60, &mut server(), second_head);
    let malformed = |round| headers(id(round), false, &[("a", "b")]);
    ends_within(60, &mut server(), malformed);
}

#[test]
fn a_server_that_breaks_rules_in_its_answers_ends_the_connection() {
    let mut client = client();
    for round in 0..60 {
        let id = client.connection.request(&request_head("GET", "/"), true, 0, &mut client.out).unwrap();
        match client.feed(&headers(id, true, &[("a", "b")])) {
            Ok(told) => assert!(matches!(told[..], [Told::Reset { by_peer: false, .. }])),
            Err(fatal) => {
                assert_eq!((fatal.code, round), (Code::ENHANCE_YOUR_CALM, 50));
                return;
            }
        }
    }
    panic!("the connection goes on");
}

#[test]
fn streams_beyond_the_limit_end_the_connection_at_last() {
    ends_within(160, &mut server(), |round| post(id(round)));
}

#[test]
fn a_flood_of_continuations_ends_the_connection() {
    for size in [0, 1, 100] {
        let mut server = server();
        server.quiet(&frame(kind::HEADERS, 0, 1, &block(GET)));
        ends_within(150, &mut server, |_| frame(kind::CONTINUATION, 0, 1, &vec![b'a'; size]));
        assert!(server.connection.memory_of_block() == 0);
    }
}

#[test]
fn a_block_that_never_ends_is_cut_at_twice_the_limit() {
    let mut server = server();
    server.quiet(&frame(kind::HEADERS, 0, 1, &block(GET)));
    server.quiet(&frame(kind::CONTINUATION, 0, 1, &[0; 16_000]));
    server.quiet(&frame(kind::CONTINUATION, 0, 1, &[0; 16_000]));
    assert_eq!(server.fails(&frame(kind::CONTINUATION, 0, 1, &[0; 1000])), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn a_head_that_is_too_large_can_be_answered() {
    let mut server = server();
    // One entry of 3,000 bytes in the table, referred to ten times.
    let mut bomb = block(GET);
    bomb.extend([0x40, 1, b'x', 127, 0xb9, 0x16]);
    bomb.extend([b'v'; 3000]);
    bomb.extend([0x80 | 62; 10]);
    let bomb = |id| frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, id, &bomb);
    assert_eq!(server.feed(&bomb(1)), Ok(vec![Told::TooLarge { id: 1, end: true }]));
    server.connection.response(1, &response_head(431), true, &mut server.out);
    assert_eq!(server.connection.open_streams(), 0);
    // The table has followed.
    let block = [block(GET), vec![0x80 | 62]].concat();
    let told = server.feed(&frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 3, &block)).unwrap();
    assert!(matches!(&told[..], [Told::Request { head, .. }] if head.last().unwrap().len() == 3003));
}

#[test]
fn a_head_with_too_many_lines_can_be_answered() {
    let mut server = server();
    let lines: Vec<_> = GET.iter().copied().chain(std::iter::repeat_n(("a", "b"), 101)).collect();
    assert_eq!(server.feed(&headers(1, false, &lines[..104])).unwrap().len(), 1);
    assert_eq!(server.feed(&headers(3, false, &lines)), Ok(vec![Told::TooLarge { id: 3, end: false }]));
}

#[test]
fn an_hpack_bomb_without_end_ends_the_connection() {
    let mut server = server();
    let mut bomb = vec![0x40, 1, b'x', 127, 0xb9, 0x16];
    bomb.extend([b'v'; 3000]);
    bomb.extend([0x80 | 62; 10_000]);
    let bomb = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &bomb);
    assert_eq!(server.fails(&bomb), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn a_response_or_trailers_that_are_too_large_end_their_stream() {
    let many: Vec<_> = std::iter::repeat_n(("a", "b"), 101).collect();
    let mut client = client();
    let id = client.connection.request(&request_head("GET", "/"), true, 0, &mut client.out).unwrap();
    let told = client.feed(&headers(id, true, &[&[(":status", "200")][..], &many].concat())).unwrap();
    assert!(matches!(told[..], [Told::Reset { code: Code::ENHANCE_YOUR_CALM, .. }]));
    let mut server = server();
    server.feed(&post(1)).unwrap();
    let told = server.feed(&headers(1, true, &many)).unwrap();
    assert!(matches!(told[..], [Told::Reset { code: Code::ENHANCE_YOUR_CALM, .. }]));
}

#[test]
fn floods_of_frames_without_use_end_the_connection() {
    for bytes in [
        setting(4, 1),
        frame(kind::SETTINGS, 0, 0, &[]),
        frame(kind::SETTINGS, flag::ACK, 0, &[]),
        frame(kind::PING, 0, 0, &[0; 8]),
        frame(kind::PING, flag::ACK, 0, &[0; 8]),
        frame(kind::PRIORITY, 0, 1, &[0; 5]),
        frame(kind::GOAWAY, 0, 0, &[0; 8]),
        frame(0x42, 0, 0, &[]),
        data(1, false, b""),
        frame(kind::DATA, flag::PADDED, 1, &[1, 0]),
        number(kind::WINDOW_UPDATE, 3, 1),
        number(kind::RST_STREAM, 3, 0),
    ] {
        let mut server = server();
        server.feed(&[post(1), get(3)].concat()).unwrap();
        server.connection.response(3, &response_head(200), true, &mut server.out);
        server.out.clear();
        ends_within(120, &mut server, |_| bytes.clone());
    }
}

#[test]
fn interim_responses_without_end_end_the_connection() {
    let mut client = client();
    client.connection.request(&request_head("GET", "/"), true, 0, &mut client.out).unwrap();
    ends_within(120, &mut client, |_| headers(1, false, &[(":status", "103")]));
}

#[test]
fn late_frames_without_end_end_the_connection() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    server.connection.reset(1, Code::CANCEL, &mut server.out);
    server.out.clear();
    // The window that the peer had, which is no abuse, and the budget.
    ends_within(4 + 101, &mut server, |_| data(1, false, &[0; 16_000]));
}

#[test]
fn small_frames_that_cross_a_reset_are_no_abuse() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    server.connection.reset(1, Code::CANCEL, &mut server.out);
    for _ in 0..10_000 {
        server.quiet(&data(1, false, b"tiny"));
    }
}

#[test]
fn useful_frames_pay_for_pings() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    for _ in 0..1000 {
        server.feed(&[data(1, false, b"message"), frame(kind::PING, 0, 0, &[0; 8])].concat()).unwrap();
    }
}

#[test]
fn opening_and_closing_many_streams_is_linear() {
    let mut config = config(Role::Server);
    config.streams = 200_000;
    let mut server = server_with(&config);
    server.connection.tick();
    for round in 0..100_000 {
        assert_eq!(server.feed(&get(id(round))).unwrap().len(), 1);
    }
    for round in 0..100_000 {
        server.connection.response(id(round), &response_head(204), true, &mut server.out);
    }
    assert_eq!(server.connection.open_streams(), 0);
}
