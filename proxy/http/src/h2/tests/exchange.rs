//! Our client against our server: whole exchanges.

use super::*;

#[test]
fn a_request_and_its_response_arrive_whole() {
    let (mut client, mut server) = pair(&config(Role::Client), &config(Role::Server));
    let mut head = request_head("POST", "/path?query");
    head.fields.push(b"Content-Type", b"text/plain");
    head.fields.push(b"x-empty", b"");
    head.fields.push(b"cookie", b"a");
    head.fields.push(b"cookie", b"b");
    let id = client.connection.request(&head, false, 7, &mut client.out).unwrap();
    assert_eq!(client.connection.data(id, b"hello", false, &mut client.out), 5);
    assert_eq!(client.connection.data(id, b" world", true, &mut client.out), 6);

    let (_, told) = pump(&mut client, &mut server);
    let head = ["POST", ":scheme: http", ":authority: a", ":path: /path?query"];
    let fields = ["content-type: text/plain", "x-empty: ", "cookie: a", "cookie: b"];
    assert_eq!(
        told,
        [
            Told::Request { id, head: [head, fields].concat().map_to_strings(), end: false },
            Told::Data { id, key: 0, data: b"hello world".to_vec(), end: true },
        ]
    );

    server.connection.attach(id, 9);
    assert_eq!(server.connection.keys().collect::<Vec<_>>(), [(id, 9)]);
    server.connection.response(id, &response_head(100), true, &mut server.out);
    server.connection.response(id, &response_head(201), false, &mut server.out);
    assert_eq!(server.connection.data(id, b"made", false, &mut server.out), 4);
    let mut trailers = Fields::default();
    trailers.push(b"Grpc-Status", b"0");
    server.connection.trailers(id, &trailers, &mut server.out);
    let (told, _) = pump(&mut client, &mut server);
    assert_eq!(
        told,
        [
            Told::Response { id, key: 7, head: vec!["100".into()], end: false },
            Told::Response { id, key: 7, head: vec!["201".into()], end: false },
            Told::Data { id, key: 7, data: b"made".to_vec(), end: false },
            Told::Trailers { id, key: 7, fields: vec!["grpc-status: 0".into()] },
        ]
    );
    assert_eq!(client.connection.open_streams(), 0);
    assert_eq!(server.connection.open_streams(), 0);
}

trait MapToStrings {
    fn map_to_strings(&self) -> Vec<String>;
}

impl MapToStrings for Vec<&str> {
    fn map_to_strings(&self) -> Vec<String> {
        self.iter().map(ToString::to_string).collect()
    }
}

#[test]
fn connect_and_extended_connect_carry_their_own_pseudo_fields() {
    let (mut client, mut server) = pair(&config(Role::Client), &config(Role::Server));
    assert_eq!(client.connection.peer_extended_connect(), Some(true));
    let mut head = RequestHead::default();
    head.set_method(b"CONNECT");
    head.set_authority(Some(b"a:1"));
    let id = client.connection.request(&head, false, 0, &mut client.out).unwrap();
    let (_, told) = pump(&mut client, &mut server);
    let lines = vec!["CONNECT".into(), ":authority: a:1".into()];
    assert_eq!(told, [Told::Request { id, head: lines, end: false }]);

    let mut head = request_head("CONNECT", "/chat");
    head.set_protocol(Some(b"websocket"));
    let id = client.connection.request(&head, false, 0, &mut client.out).unwrap();
    let (_, told) = pump(&mut client, &mut server);
    let lines = ["CONNECT", ":scheme: http", ":authority: a", ":path: /chat", ":protocol: websocket"];
    assert_eq!(told, [Told::Request { id, head: lines.map(String::from).to_vec(), end: false }]);
}

#[test]
fn a_head_larger_than_a_frame_goes_on_in_continuations() {
    let mut large = config(Role::Server);
    large.head_bytes = 200_000;
    let (mut client, mut server) = pair(&config(Role::Client), &large);
    let mut head = request_head("GET", "/");
    for line in 0..40 {
        head.fields.push(format!("x-{line}").as_bytes(), &[b'v'; 1000]);
    }
    client.connection.request(&head, true, 0, &mut client.out).unwrap();
    let bytes = client.out.clone();
    let kinds: Vec<_> = client.sent().iter().map(|(header, _)| (header.kind, header.flags)).collect();
    assert_eq!(
        kinds,
        [
            (kind::HEADERS, flag::END_STREAM),
            (kind::CONTINUATION, flag::NONE),
            (kind::CONTINUATION, flag::END_HEADERS)
        ]
    );
    let told = server.feed(&bytes).unwrap();
    assert!(matches!(&told[..], [Told::Request { head, end: true, .. }] if head.len() == 44));
}
