//! Flow control: RFC 9113, 5.2 and 6.9.

use super::*;

/// A server that has a body to send on stream 1.
fn answering(window: u32) -> End {
    let mut server = server();
    server.quiet(&setting(4, window));
    server.feed(&get(1)).unwrap();
    server.connection.response(1, &response_head(200), false, &mut server.out);
    server.connection.attach(1, 1);
    server.sent();
    server
}

fn body(end: &mut End) -> usize {
    end.sent().iter().filter(|(header, _)| header.kind == kind::DATA).map(|(_, data)| data.len()).sum()
}

#[test]
fn no_more_is_sent_than_the_stream_window_allows() {
    let mut server = answering(10);
    assert_eq!(server.connection.capacity(1), 10);
    assert_eq!(server.connection.data(1, &[0; 25], true, &mut server.out), 10);
    assert_eq!(server.connection.data(1, &[0; 15], true, &mut server.out), 0);
    assert_eq!(body(&mut server), 10);
    let writable = Ok(vec![Told::Writable { id: 1, key: 1 }]);
    assert_eq!(server.feed(&number(kind::WINDOW_UPDATE, 1, 5)), writable);
    // Told once.
    server.quiet(&number(kind::WINDOW_UPDATE, 1, 5));
    assert_eq!(server.connection.data(1, &[0; 10], true, &mut server.out), 10);
    let sent = server.sent();
    assert_eq!(sent.last().unwrap().0.flags, flag::END_STREAM);
    assert_eq!(server.connection.open_streams(), 0);
}

#[test]
fn an_end_without_data_needs_no_window() {
    let mut server = answering(0);
    assert_eq!(server.connection.data(1, b"", true, &mut server.out), 0);
    let sent = server.sent();
    assert!(matches!(sent[..], [(Header { flags: flag::END_STREAM, len: 0, .. }, _)]));
}

#[test]
fn frames_are_no_larger_than_the_peer_takes() {
    let mut server = answering(65_535);
    assert_eq!(server.connection.data(1, &[0; 40_000], true, &mut server.out), 40_000);
    let lengths: Vec<_> = server.sent().iter().map(|(header, _)| (header.len, header.flags)).collect();
    assert_eq!(lengths, [(16_384, 0), (16_384, 0), (7_232, flag::END_STREAM)]);
}

#[test]
fn a_window_that_shrinks_below_zero_has_to_come_up_again() {
    let mut server = answering(100);
    assert_eq!(server.connection.data(1, &[0; 100], false, &mut server.out), 100);
    assert_eq!(server.connection.capacity(1), 0);
    // To -60.
    server.quiet(&setting(4, 40));
    server.quiet(&number(kind::WINDOW_UPDATE, 1, 60));
    assert_eq!(server.connection.capacity(1), 0);
    let writable = Ok(vec![Told::Writable { id: 1, key: 1 }]);
    assert_eq!(server.feed(&number(kind::WINDOW_UPDATE, 1, 1)), writable);
    assert_eq!(server.connection.capacity(1), 1);
    assert_eq!(server.connection.data(1, &[0; 2], false, &mut server.out), 1);
    assert_eq!(server.feed(&setting(4, 50)), writable);
    assert_eq!(server.connection.capacity(1), 10);
}

#[test]
fn windows_cannot_overflow() {
    let mut server = answering(65_535);
    let most = (1 << 31) - 1;
    assert_eq!(server.fails(&number(kind::WINDOW_UPDATE, 0, most)), Code::FLOW_CONTROL_ERROR);

    let mut server = answering(65_535);
    let told = server.feed(&number(kind::WINDOW_UPDATE, 1, most)).unwrap();
    let code = Code::FLOW_CONTROL_ERROR;
    assert_eq!(told, [Told::Reset { id: 1, key: 1, code, by_peer: false, unprocessed: false }]);
    assert_eq!(server.resets(), [(1, code)]);

    let mut server = answering(10);
    server.quiet(&number(kind::WINDOW_UPDATE, 1, most - 10));
    assert_eq!(server.fails(&setting(4, 11)), Code::FLOW_CONTROL_ERROR);
}

#[test]
fn a_window_that_overflows_leaves_nobody_to_be_told_of_room() {
    let mut server = answering(0);
    for id in [3, 5, 7, 9, 11] {
        server.feed(&get(id)).unwrap();
        server.connection.response(id, &response_head(200), false, &mut server.out);
    }
    for id in [1, 3, 7, 9, 11] {
        assert_eq!(server.connection.capacity(id), 0);
    }
    server.quiet(&number(kind::WINDOW_UPDATE, 5, (1 << 31) - 1));
    // All others get room, 5 gets too much.
    assert_eq!(server.fails(&setting(4, 1)), Code::FLOW_CONTROL_ERROR);
}

#[test]
fn a_window_update_by_nothing_is_an_error() {
    let mut server = answering(1);
    let told = server.feed(&number(kind::WINDOW_UPDATE, 1, 0)).unwrap();
    assert!(matches!(told[..], [Told::Reset { code: Code::PROTOCOL_ERROR, .. }]));
    assert_eq!(server.fails(&number(kind::WINDOW_UPDATE, 0, 0)), Code::PROTOCOL_ERROR);
}

#[test]
fn streams_that_wait_for_the_connection_get_their_turns_in_order() {
    let mut server = server();
    for id in [1, 3, 5] {
        server.feed(&get(id)).unwrap();
        server.connection.response(id, &response_head(200), false, &mut server.out);
        server.connection.attach(id, u64::from(id) * 10);
    }
    // The connection's window is used up.
    assert_eq!(server.connection.data(1, &[0; 65_535], false, &mut server.out), 65_535);
    server.quiet(&number(kind::WINDOW_UPDATE, 1, 1000));
    for id in [5, 1, 3] {
        assert_eq!(server.connection.data(id, b"abc", false, &mut server.out), 0);
        assert_eq!(server.connection.capacity(id), 0);
    }
    // Whoever is gone is left out.
    server.connection.reset(3, Code::CANCEL, &mut server.out);
    let told = server.feed(&number(kind::WINDOW_UPDATE, 0, 2)).unwrap();
    assert_eq!(told, [Told::Writable { id: 5, key: 50 }, Told::Writable { id: 1, key: 10 }]);
}

#[test]
fn a_stream_with_a_shut_window_of_its_own_is_not_in_the_way() {
    let mut server = answering(0);
    assert_eq!(server.connection.capacity(1), 0);
    server.quiet(&number(kind::WINDOW_UPDATE, 0, 10));
    let writable = Ok(vec![Told::Writable { id: 1, key: 1 }]);
    assert_eq!(server.feed(&number(kind::WINDOW_UPDATE, 1, 1)), writable);
}

#[test]
fn the_line_of_waiting_streams_forgets_those_that_are_gone() {
    let mut config = config(Role::Server);
    config.budget.resets = u32::MAX;
    let mut server = server_with(&config);
    server.feed(&get(1)).unwrap();
    server.connection.response(1, &response_head(200), false, &mut server.out);
    server.connection.data(1, &[0; 65_535], false, &mut server.out);
    for id in (3..20_000).step_by(2) {
        server.feed(&get(id)).unwrap();
        server.connection.response(id, &response_head(200), false, &mut server.out);
        assert_eq!(server.connection.data(id, b"a", true, &mut server.out), 0);
        server.feed(&number(kind::RST_STREAM, id, 8)).unwrap();
        server.out.clear();
    }
    assert!(server.connection.memory_of_waiting() < 100);
}

#[test]
fn more_than_the_windows_allow_is_refused() {
    let mut small = config(Role::Server);
    (small.stream_window, small.connection_window) = (70_000, 100_000);
    let mut server = server_with(&small);
    server.releases = false;
    server.feed(&post(1)).unwrap();
    for _ in 0..4 {
        server.feed(&data(1, false, &[0; 16_384])).unwrap();
    }
    server.feed(&data(1, false, &[0; 70_000 - 4 * 16_384])).unwrap();
    let told = server.feed(&data(1, false, b"a")).unwrap();
    let code = Code::FLOW_CONTROL_ERROR;
    assert_eq!(told, [Told::Reset { id: 1, key: 0, code, by_peer: false, unprocessed: false }]);

    server.feed(&post(3)).unwrap();
    server.feed(&data(3, false, &[0; 16_384])).unwrap();
    assert_eq!(server.fails(&data(3, false, &[0; 14_000])), Code::FLOW_CONTROL_ERROR);
}

#[test]
fn windows_open_as_data_is_released() {
    let mut server = server();
    server.releases = false;
    server.feed(&post(1)).unwrap();
    server.feed(&data(1, false, &[0; 16_384])).unwrap();
    server.feed(&data(1, false, &[0; 16_384])).unwrap();
    server.connection.release(1, 32_766, &mut server.out);
    assert!(server.out.is_empty());
    server.connection.release(1, 1, &mut server.out);
    let sent = server.sent();
    assert!(matches!(&sent[..], [(Header { stream: 1, kind: kind::WINDOW_UPDATE, .. }, payload)]
        if super::super::frame::number(payload) == Some(32_767)));
}

#[test]
fn data_of_streams_that_are_gone_opens_the_connections_window() {
    let mut server = server();
    server.releases = false;
    server.feed(&post(1)).unwrap();
    let mut sent = 0;
    // Held by the caller when the stream goes.
    server.feed(&data(1, false, &[0; 16_384])).unwrap();
    // Half of a frame, and its other half when the stream is gone.
    let half = data(1, false, &[0; 16_384]);
    server.feed(&half[..5000]).unwrap();
    server.connection.reset(1, Code::CANCEL, &mut server.out);
    server.quiet(&half[5000..]);
    server.quiet(&data(1, false, &[0; 16_384]));
    sent += 3 * 16_384;
    server.connection.release(1, 16_384 + 5000 - HEADER, &mut server.out);
    // As much again until WINDOW_UPDATE is due at half of the window.
    server.feed(&post(3)).unwrap();
    server.out.clear();
    while sent < 1 << 19 {
        server.feed(&data(3, false, &[0; 16_384])).unwrap();
        server.connection.release(3, 16_384, &mut server.out);
        sent += 16_384;
    }
    let updates: Vec<_> = server.sent().into_iter().filter(|(header, _)| header.stream == 0).collect();
    assert!(matches!(&updates[..], [(_, payload)] if super::super::frame::number(payload) == Some(1 << 19)));
}

#[test]
fn padding_is_released_by_itself() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    let frame = frame(kind::DATA, flag::PADDED, 1, &[&[255][..], &[0; 255]].concat());
    for _ in 0..99 {
        server.quiet(&frame);
    }
    server.connection.tick();
    for _ in 0..99 {
        server.quiet(&frame);
    }
    server.connection.tick();
    for _ in 0..99 {
        server.quiet(&frame);
    }
    let updates = server.sent();
    assert!(updates.iter().all(|(header, _)| header.kind == kind::WINDOW_UPDATE) && updates.len() == 2);
}

#[test]
fn a_small_window_binds_the_peer_once_it_has_seen_our_settings() {
    let mut small = config(Role::Server);
    small.stream_window = 1000;
    let mut server = End::new(&small);
    server.releases = false;
    server.feed(&[PREFACE, &frame(kind::SETTINGS, 0, 0, &[]), &post(1)].concat()).unwrap();
    // The peer may not know yet.
    assert!(matches!(server.feed(&data(1, false, &[0; 16_000])).unwrap()[..], [Told::Data { .. }]));
    server.quiet(&frame(kind::SETTINGS, flag::ACK, 0, &[]));
    server.feed(&post(3)).unwrap();
    assert!(matches!(server.feed(&data(3, false, &[0; 1001])).unwrap()[..], [Told::Reset { .. }]));
    // 15,000 bytes below zero: released, the window is its size again.
    server.connection.release(1, 16_000, &mut server.out);
    assert!(matches!(server.feed(&data(1, false, &[0; 1000])).unwrap()[..], [Told::Data { .. }]));
    assert!(matches!(server.feed(&data(1, false, &[0; 1])).unwrap()[..], [Told::Reset { .. }]));
}
