//! Frames and states: RFC 9113, 3.4, 4, 5.1 and 6.

use super::*;

#[test]
fn the_preface_may_come_byte_by_byte() {
    let mut server = End::new(&config(Role::Server));
    let begin = [PREFACE, &frame(kind::SETTINGS, 0, 0, &[])].concat();
    let told: Vec<_> = begin.iter().flat_map(|byte| server.feed(&[*byte]).unwrap()).collect();
    assert_eq!(told, [Told::Settings]);
}

#[test]
fn a_wrong_preface_is_refused_at_its_first_wrong_byte() {
    let mut server = End::new(&config(Role::Server));
    assert_eq!(server.fails(b"PRI * HTTP/2.0\r\n\r\nX"), Code::PROTOCOL_ERROR);
}

#[test]
fn the_first_frame_must_be_settings() {
    for first in [frame(kind::PING, 0, 0, &[0; 8]), frame(kind::SETTINGS, flag::ACK, 0, &[]), get(1)] {
        let mut server = End::new(&config(Role::Server));
        assert_eq!(server.fails(&[PREFACE, &first].concat()), Code::PROTOCOL_ERROR);
    }
    let mut client = End::new(&config(Role::Client));
    assert_eq!(client.fails(&number(kind::WINDOW_UPDATE, 0, 1)), Code::PROTOCOL_ERROR);
}

#[test]
fn a_client_begins_with_preface_settings_and_window() {
    let mut client = End::new(&config(Role::Client));
    assert!(client.out.starts_with(PREFACE));
    let kinds: Vec<_> = client.sent().iter().map(|(header, _)| header.kind).collect();
    assert_eq!(kinds, [kind::SETTINGS, kind::WINDOW_UPDATE]);
}

#[test]
fn a_frame_that_exceeds_what_we_allow_is_refused_before_its_payload_comes() {
    for kind in [kind::DATA, kind::HEADERS, kind::SETTINGS, kind::PING, 0xfe] {
        let header = Header { len: (1 << 14) + 1, kind, flags: 0, stream: 1 };
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        assert_eq!(server().fails(&bytes), Code::FRAME_SIZE_ERROR);
    }
    let mut server = server();
    server.feed(&post(1)).unwrap();
    assert_eq!(server.feed(&data(1, false, &[7; 1 << 14])).unwrap().len(), 1);
}

#[test]
fn frames_of_unknown_types_are_skipped() {
    let mut server = server();
    server.quiet(&frame(0x16, 0xff, 77, b"whatever"));
    server.quiet(&frame(0xff, 0, 0, &[]));
    assert_eq!(server.feed(&get(1)).unwrap().len(), 1);
    let mut server = super::server();
    let open = frame(kind::HEADERS, flag::END_STREAM, 1, &block(GET));
    server.quiet(&open);
    assert_eq!(server.fails(&frame(0x16, 0, 1, &[])), Code::PROTOCOL_ERROR);
}

#[test]
fn frames_of_a_wrong_length_end_the_connection() {
    for bytes in [
        frame(kind::PRIORITY, 0, 1, &[0; 4]),
        frame(kind::PRIORITY, 0, 1, &[0; 6]),
        frame(kind::RST_STREAM, 0, 1, &[0; 3]),
        frame(kind::SETTINGS, 0, 0, &[0; 5]),
        frame(kind::SETTINGS, flag::ACK, 0, &[0; 6]),
        frame(kind::PING, 0, 0, &[0; 7]),
        frame(kind::GOAWAY, 0, 0, &[0; 7]),
        frame(kind::WINDOW_UPDATE, 0, 0, &[0; 5]),
        frame(kind::HEADERS, flag::END_HEADERS | flag::PRIORITY, 1, &[0; 4]),
    ] {
        let mut server = server();
        assert_eq!(server.fails(&bytes), Code::FRAME_SIZE_ERROR, "{bytes:?}");
    }
}

#[test]
fn frames_of_the_wrong_stream_end_the_connection() {
    for bytes in [
        // Streams that nobody opened.
        data(1, false, b"a"),
        number(kind::RST_STREAM, 1, 0),
        number(kind::WINDOW_UPDATE, 1, 1),
        number(kind::WINDOW_UPDATE, 2, 1),
        headers(2, true, GET),
        // The connection.
        data(0, false, b"a"),
        headers(0, true, GET),
        frame(kind::PRIORITY, 0, 0, &[0; 5]),
        number(kind::RST_STREAM, 0, 0),
        // A stream, where only the connection can be meant.
        frame(kind::SETTINGS, 0, 1, &[]),
        frame(kind::SETTINGS, flag::ACK, 1, &[]),
        frame(kind::PING, 0, 1, &[0; 8]),
        frame(kind::GOAWAY, 0, 1, &[0; 8]),
        // Never.
        frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, &[0, 0, 0, 2]),
        frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[]),
    ] {
        let mut server = server();
        assert_eq!(server.fails(&bytes), Code::PROTOCOL_ERROR, "{bytes:?}");
    }
}

#[test]
fn a_server_that_pushes_or_opens_streams_is_refused() {
    for bytes in [
        frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, &[0, 0, 0, 2]),
        headers(2, true, &[(":status", "200")]),
        headers(3, true, &[(":status", "200")]),
        setting(2, 1),
    ] {
        let mut client = client();
        client.connection.request(&request_head("GET", "/"), true, 0, &mut client.out).unwrap();
        assert_eq!(client.fails(&bytes), Code::PROTOCOL_ERROR, "{bytes:?}");
    }
}

#[test]
fn a_field_block_is_not_interrupted() {
    for bytes in [
        data(1, false, b"a"),
        frame(kind::PRIORITY, 0, 1, &[0; 5]),
        frame(kind::CONTINUATION, flag::END_HEADERS, 3, &[]),
        frame(kind::HEADERS, flag::END_HEADERS, 1, &[]),
        frame(kind::SETTINGS, 0, 0, &[]),
    ] {
        let mut server = server();
        server.quiet(&frame(kind::HEADERS, 0, 1, &block(GET)));
        assert_eq!(server.fails(&bytes), Code::PROTOCOL_ERROR, "{bytes:?}");
    }
}

#[test]
fn a_field_block_may_come_in_many_frames() {
    let mut server = server();
    let lines = block(GET);
    server.quiet(&frame(kind::HEADERS, flag::END_STREAM, 1, &[]));
    for byte in &lines {
        server.quiet(&frame(kind::CONTINUATION, 0, 1, &[*byte]));
    }
    let told = server.feed(&frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[])).unwrap();
    assert!(matches!(told[..], [Told::Request { id: 1, end: true, .. }]));
}

/// Whoever times a peer knows by this that it owes something.
#[test]
fn a_connection_and_a_block_that_have_begun_await_their_rest() {
    let mut server = End::new(&config(Role::Server));
    assert!(server.connection.awaits_rest());
    server.quiet(&PREFACE[..10]);
    server.quiet(&PREFACE[10..]);
    assert!(server.connection.awaits_rest());
    assert_eq!(server.feed(&frame(kind::SETTINGS, 0, 0, &[])), Ok(vec![Told::Settings]));
    assert!(!server.connection.awaits_rest());
    server.quiet(&frame(kind::HEADERS, flag::END_STREAM, 1, &block(GET)));
    assert!(server.connection.awaits_rest());
    server.feed(&frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[])).unwrap();
    assert!(!server.connection.awaits_rest());
}

#[test]
fn padding_and_priority_are_taken_off() {
    let mut server = server();
    let mut payload = vec![3, 0x80, 0, 0, 0, 16];
    payload.extend(block(&[(":method", "POST"), (":scheme", "http"), (":path", "/")]));
    payload.extend([0; 3]);
    let flags = flag::END_HEADERS | flag::PADDED | flag::PRIORITY;
    assert!(matches!(
        server.feed(&frame(kind::HEADERS, flags, 1, &payload)).unwrap()[..],
        [Told::Request { .. }]
    ));

    let padded = frame(kind::DATA, flag::PADDED, 1, &[&[2][..], b"body", &[0; 2]].concat());
    let told = vec![Told::Data { id: 1, key: 0, data: b"body".to_vec(), end: false }];
    assert_eq!(server.feed(&padded), Ok(told));
    let only_padding = frame(kind::DATA, flag::PADDED | flag::END_STREAM, 1, &[2, 0, 0]);
    let told = vec![Told::Data { id: 1, key: 0, data: vec![], end: true }];
    assert_eq!(server.feed(&only_padding), Ok(told));
}

#[test]
fn padding_that_exceeds_its_frame_ends_the_connection() {
    for payload in [&[][..], &[1], &[5, 0, 0, 0, 0]] {
        for kind in [kind::DATA, kind::HEADERS] {
            let mut server = server();
            server.feed(&post(1)).unwrap();
            let flags = flag::PADDED;
            assert_eq!(server.fails(&frame(kind, flags, 1, payload)), Code::PROTOCOL_ERROR);
        }
    }
}

#[test]
fn settings_out_of_range_end_the_connection() {
    for (parameter, value, code) in [
        (2, 2, Code::PROTOCOL_ERROR),
        (4, 1 << 31, Code::FLOW_CONTROL_ERROR),
        (5, (1 << 14) - 1, Code::PROTOCOL_ERROR),
        (5, 1 << 24, Code::PROTOCOL_ERROR),
        (8, 2, Code::PROTOCOL_ERROR),
    ] {
        assert_eq!(server().fails(&setting(parameter, value)), code, "{parameter} {value}");
    }
    let mut server = server();
    for (parameter, value) in [(1, 0), (2, 1), (3, 0), (4, 0), (5, (1 << 24) - 1), (6, 0), (8, 1), (99, 99)] {
        server.quiet(&setting(parameter, value));
    }
    // What was promised cannot be taken back (RFC 8441, 3).
    assert_eq!(server.fails(&setting(8, 0)), Code::PROTOCOL_ERROR);
}

#[test]
fn settings_and_pings_are_acknowledged() {
    let mut server = server();
    server.quiet(&setting(4, 1));
    server.quiet(&frame(kind::PING, 0, 0, b"12345678"));
    let sent = server.sent();
    assert!(matches!(&sent[..], [(settings, _), (ping, payload)]
        if settings.kind == kind::SETTINGS && settings.flags == flag::ACK && settings.len == 0
        && ping.kind == kind::PING && ping.flags == flag::ACK && payload == b"12345678"));
}

#[test]
fn a_ping_of_ours_is_answered_once() {
    let mut server = server();
    server.connection.ping(&mut server.out);
    let sent = server.sent();
    let pong = frame(kind::PING, flag::ACK, 0, &sent[0].1);
    assert_eq!(server.feed(&pong), Ok(vec![Told::Pong]));
    server.quiet(&pong);
    server.quiet(&frame(kind::PING, flag::ACK, 0, &[0; 8]));
    assert!(server.out.is_empty());
}

#[test]
fn a_stream_that_depends_on_itself_is_refused() {
    let mut server = server();
    let payload = [&[0, 0, 0, 1, 0][..], &block(GET)].concat();
    server.quiet(&frame(kind::HEADERS, flag::END_HEADERS | flag::PRIORITY, 1, &payload));
    assert_eq!(server.resets(), [(1, Code::PROTOCOL_ERROR)]);
    assert_eq!(server.fails(&frame(kind::PRIORITY, 0, 3, &[0, 0, 0, 3, 0])), Code::PROTOCOL_ERROR);
}

#[test]
fn streams_are_opened_in_rising_order() {
    let mut server = server();
    server.feed(&get(5)).unwrap();
    // 3 was skipped, and is closed by that (5.1.1).
    assert_eq!(server.fails(&get(3)), Code::STREAM_CLOSED);
}

#[test]
fn nothing_may_follow_the_end_of_a_half() {
    for bytes in [data(1, false, b"a"), headers(1, true, &[("a", "b")])] {
        let mut server = server();
        server.feed(&get(1)).unwrap();
        server.connection.attach(1, 4);
        let code = Code::STREAM_CLOSED;
        let reset = Told::Reset { id: 1, key: 4, code, by_peer: false, unprocessed: false };
        assert_eq!(server.feed(&bytes), Ok(vec![reset]));
        assert_eq!(server.resets(), [(1, Code::STREAM_CLOSED)]);
        // Once is a mistake that a proxy may pass on. Twice is not.
        assert_eq!(server.fails(&bytes), Code::STREAM_CLOSED);
    }
}

#[test]
fn nothing_may_follow_a_reset_by_the_peer() {
    for bytes in [data(1, false, b"a"), headers(1, true, &[("a", "b")])] {
        let mut server = server();
        server.feed(&post(1)).unwrap();
        let reset = Told::Reset { id: 1, key: 0, code: Code::CANCEL, by_peer: true, unprocessed: false };
        assert_eq!(server.feed(&number(kind::RST_STREAM, 1, Code::CANCEL.0)), Ok(vec![reset]));
        assert_eq!(server.fails(&bytes), Code::STREAM_CLOSED);
    }
}

#[test]
fn a_window_or_a_reset_may_follow_the_end_of_a_stream() {
    let mut server = server();
    server.feed(&get(1)).unwrap();
    server.connection.response(1, &response_head(204), true, &mut server.out);
    assert_eq!(server.connection.open_streams(), 0);
    server.quiet(&number(kind::WINDOW_UPDATE, 1, 10));
    server.quiet(&number(kind::RST_STREAM, 1, 0));
    server.quiet(&frame(kind::PRIORITY, 0, 1, &[0; 5]));
}

#[test]
fn what_is_on_its_way_when_we_reset_is_ignored() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    server.connection.reset(1, Code::CANCEL, &mut server.out);
    server.connection.reset(1, Code::CANCEL, &mut server.out);
    assert_eq!(server.resets(), [(1, Code::CANCEL)]);
    server.quiet(&data(1, false, &[0; 10_000]));
    server.quiet(&number(kind::WINDOW_UPDATE, 1, 10));
    // The decoder's table must follow: an entry that is added here is used below.
    let mut block = vec![0x40, 1, b'x', 1, b'y'];
    server.quiet(&frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &block));
    server.quiet(&number(kind::RST_STREAM, 1, 0));
    block = [super::block(GET), vec![0x80 | 62]].concat();
    let told = server.feed(&frame(kind::HEADERS, flag::END_HEADERS, 3, &block)).unwrap();
    assert!(matches!(&told[..], [Told::Request { head, .. }] if head.last().unwrap() == "x: y"));
}

#[test]
fn a_block_that_cannot_be_decoded_ends_the_connection() {
    let mut server = server();
    let bytes = frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x80 | 70]);
    assert_eq!(server.fails(&bytes), Code::COMPRESSION_ERROR);
}

#[test]
fn a_peer_with_a_smaller_table_is_told_that_we_use_none() {
    let mut client = client();
    client.quiet(&setting(1, 100));
    client.quiet(&setting(1, 0));
    client.sent();
    let head = request_head("GET", "/");
    for first in [0x20, 0x82] {
        client.connection.request(&head, true, 0, &mut client.out).unwrap();
        assert_eq!(client.sent()[0].1[0], first);
    }
}

#[test]
fn methods_on_streams_that_are_gone_do_nothing() {
    let mut server = server();
    let out = &mut server.out;
    let connection = &mut server.connection;
    for id in [0, 1, 2, 99] {
        connection.attach(id, 1);
        connection.response(id, &response_head(200), false, out);
        assert_eq!(connection.capacity(id), 0);
        assert_eq!(connection.data(id, b"abc", true, out), 3);
        connection.trailers(id, &Fields::default(), out);
        connection.reset(id, Code::CANCEL, out);
        connection.release(id, 10, out);
    }
    assert_eq!(connection.keys().count(), 0);
    assert!(out.is_empty());
}

#[test]
fn our_half_ends_once() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    server.connection.response(1, &response_head(200), true, &mut server.out);
    server.connection.response(1, &response_head(200), true, &mut server.out);
    assert_eq!(server.connection.data(1, b"abc", true, &mut server.out), 3);
    server.connection.trailers(1, &Fields::default(), &mut server.out);
    assert_eq!(server.sent().len(), 1);
    assert_eq!(server.connection.open_streams(), 1);
}
