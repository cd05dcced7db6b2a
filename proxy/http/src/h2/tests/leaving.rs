//! GOAWAY, refusals and limits of streams: RFC 9113, 5.1.2, 6.8 and 8.7.

use super::*;

fn goaway(last: StreamId, code: Code) -> Vec<u8> {
    frame(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), code.0.to_be_bytes()].concat())
}

#[test]
fn draining_takes_two_steps() {
    let (mut client, mut server) = pair(&config(Role::Client), &config(Role::Server));
    let head = request_head("GET", "/");
    let first = client.connection.request(&head, true, 1, &mut client.out).unwrap();
    pump(&mut client, &mut server);

    server.connection.drain(&mut server.out);
    server.connection.drain(&mut server.out);
    assert!(server.connection.is_leaving());
    // A request that crosses GOAWAY is still taken.
    let second = client.connection.request(&head, true, 2, &mut client.out).unwrap();
    let bytes = std::mem::take(&mut client.out);
    assert!(matches!(server.feed(&bytes).unwrap()[..], [Told::Request { .. }]));

    let bytes = std::mem::take(&mut server.out);
    assert_eq!(client.feed(&bytes), Ok(vec![Told::GoAway { code: Code::NO_ERROR }]));
    assert_eq!(client.connection.available(), 0);
    let refused = client.connection.request(&head, true, 3, &mut client.out);
    assert_eq!(refused, Err(NotOpened::Leaving));

    let bytes = std::mem::take(&mut client.out);
    server.quiet(&bytes);
    let bytes = server.out.clone();
    let sent = server.sent();
    assert_eq!(super::super::frame::goaway(&sent[0].1), Some((second, Code::NO_ERROR)));
    assert_eq!(client.feed(&bytes), Ok(vec![Told::GoAway { code: Code::NO_ERROR }]));

    // What is open goes on to its end.
    for id in [first, second] {
        server.connection.response(id, &response_head(200), true, &mut server.out);
    }
    assert_eq!(pump(&mut client, &mut server).0.len(), 2);
    assert_eq!((client.connection.open_streams(), server.connection.open_streams()), (0, 0));
}

#[test]
fn streams_that_a_goaway_left_out_are_told_as_unprocessed() {
    let mut client = client();
    for key in 0..4 {
        client.connection.request(&request_head("GET", "/"), true, key, &mut client.out).unwrap();
    }
    let told = client.feed(&goaway(3, Code::ENHANCE_YOUR_CALM)).unwrap();
    let left_out =
        |id, key| Told::Reset { id, key, code: Code::REFUSED_STREAM, by_peer: true, unprocessed: true };
    assert_eq!(told, [Told::GoAway { code: Code::ENHANCE_YOUR_CALM }, left_out(5, 2), left_out(7, 3)]);
    assert_eq!(client.connection.open_streams(), 2);
    let told = client.feed(&headers(1, true, &[(":status", "200")])).unwrap();
    assert!(matches!(told[..], [Told::Response { key: 0, .. }]));
}

#[test]
fn a_refused_stream_is_told_as_unprocessed() {
    let mut client = client();
    let id = client.connection.request(&request_head("GET", "/"), true, 1, &mut client.out).unwrap();
    let told = client.feed(&number(kind::RST_STREAM, id, Code::REFUSED_STREAM.0)).unwrap();
    assert_eq!(
        told,
        [Told::Reset { id, key: 1, code: Code::REFUSED_STREAM, by_peer: true, unprocessed: true }]
    );
}

#[test]
fn after_the_last_goaway_new_streams_are_ignored() {
    let mut server = server();
    server.feed(&get(1)).unwrap();
    server.connection.close(Code::NO_ERROR, &mut server.out);
    server.sent();
    server.quiet(&post(3));
    server.quiet(&data(3, false, b"late"));
    server.quiet(&number(kind::WINDOW_UPDATE, 3, 1));
    server.quiet(&data(3, true, b"late"));
    server.quiet(&post(5));
    server.quiet(&number(kind::RST_STREAM, 5, 8));
    assert!(server.out.is_empty());
    // A later GOAWAY does not claim more than the first (6.8).
    server.connection.close(Code::INTERNAL_ERROR, &mut server.out);
    assert_eq!(super::super::frame::goaway(&server.sent()[0].1), Some((1, Code::INTERNAL_ERROR)));
}

#[test]
fn a_client_leaves_in_one_step() {
    let mut client = client();
    client.connection.drain(&mut client.out);
    assert_eq!(super::super::frame::goaway(&client.sent()[0].1), Some((0, Code::NO_ERROR)));
    let refused = client.connection.request(&request_head("GET", "/"), true, 3, &mut client.out);
    assert_eq!(refused, Err(NotOpened::Leaving));
}

#[test]
fn streams_over_the_limit_are_refused() {
    let mut config = config(Role::Server);
    config.streams = 2;
    let mut server = server_with(&config);
    assert_eq!(server.feed(&[post(1), post(3), post(5)].concat()).unwrap().len(), 2);
    assert_eq!(server.resets(), [(5, Code::REFUSED_STREAM)]);
    server.quiet(&data(5, true, b"late"));
    server.connection.reset(1, Code::CANCEL, &mut server.out);
    assert_eq!(server.feed(&post(7)).unwrap().len(), 1);
}

#[test]
fn a_client_opens_no_more_streams_than_it_may() {
    let mut client = End::new(&config(Role::Client));
    assert_eq!(client.connection.available(), 100);
    assert_eq!(client.connection.peer_extended_connect(), None);
    client.feed(&setting(3, 1)).unwrap();
    assert_eq!(client.connection.peer_extended_connect(), Some(false));
    assert_eq!(client.connection.available(), 1);
    let head = request_head("GET", "/");
    let id = client.connection.request(&head, true, 0, &mut client.out).unwrap();
    assert_eq!(client.connection.request(&head, true, 0, &mut client.out), Err(NotOpened::Full));
    client.feed(&headers(id, true, &[(":status", "204")])).unwrap();
    assert_eq!(client.connection.available(), 1);
    client.quiet(&setting(3, 0));
    assert_eq!(client.connection.request(&head, true, 0, &mut client.out), Err(NotOpened::Full));
}

#[test]
fn a_client_that_is_told_no_limit_has_none() {
    let mut client = client();
    let head = request_head("GET", "/");
    for key in 0..1000 {
        client.connection.request(&head, true, key, &mut client.out).unwrap();
    }
}

#[test]
fn stream_numbers_end() {
    let mut client = client();
    client.connection.use_up_numbers();
    let head = request_head("GET", "/");
    let id = client.connection.request(&head, true, 0, &mut client.out);
    assert_eq!(id, Ok((1 << 31) - 1));
    assert_eq!(client.connection.request(&head, true, 0, &mut client.out), Err(NotOpened::Exhausted));
    assert_eq!(client.connection.available(), 0);
}

#[test]
fn a_reset_by_a_server_that_needs_no_body_has_its_code() {
    let mut client = client();
    let id = client.connection.request(&request_head("POST", "/"), false, 1, &mut client.out).unwrap();
    let told = client
        .feed(&[headers(id, true, &[(":status", "200")]), number(kind::RST_STREAM, id, 0)].concat())
        .unwrap();
    let reset = Told::Reset { id, key: 1, code: Code::NO_ERROR, by_peer: true, unprocessed: false };
    assert_eq!(told[1..], [reset]);
}

#[test]
fn an_idle_connection_owns_little() {
    let (mut client, mut server) = pair(&config(Role::Client), &config(Role::Server));
    for _ in 0..50 {
        let id = client.connection.request(&request_head("POST", "/"), false, 1, &mut client.out).unwrap();
        pump(&mut client, &mut server);
        server.connection.reset(id, Code::CANCEL, &mut server.out);
        pump(&mut client, &mut server);
    }
    for end in [&mut client, &mut server] {
        end.connection.tick();
        assert_eq!(end.connection.memory_of_waiting(), 0);
    }
    assert!(size_of::<Connection>() <= 600, "{}", size_of::<Connection>());
}
