//! What may stand in heads and bodies: RFC 9113, 8; RFC 8441.

use super::*;

/// Feeds one request and expects that it is refused.
fn is_malformed(lines: &[(&str, &str)]) {
    let mut server = server();
    assert_eq!(server.feed(&headers(1, true, lines)), Ok(vec![]), "{lines:?}");
    assert_eq!(server.resets(), [(1, Code::PROTOCOL_ERROR)], "{lines:?}");
    assert_eq!(server.connection.open_streams(), 0);
    // The connection goes on.
    assert_eq!(server.feed(&get(3)).unwrap().len(), 1);
}

fn is_fine(lines: &[(&str, &str)]) {
    let told = server().feed(&headers(1, true, lines)).unwrap();
    assert!(matches!(told[..], [Told::Request { .. }]), "{lines:?}");
}

/// A good request with one more line.
fn with(name: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
    [GET, &[(name, value)]].concat()
}

/// A good request in which a pseudo-field has another value, or is missing.
fn but(name: &str, value: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
    let change =
        |&(other, old)| (other != name).then_some((other, old)).or(value.map(|value| (other, value)));
    GET.iter().filter_map(change).collect()
}

#[test]
fn each_pseudo_field_comes_once_before_all_others() {
    is_fine(GET);
    for &(name, value) in GET {
        is_malformed(&with(name, value));
        let late = [but(name, None), vec![("a", "b"), (name, value)]].concat();
        is_malformed(&late);
    }
    is_malformed(&with(":status", "200"));
    is_malformed(&with(":unknown", "x"));
    is_malformed(&with(":", "x"));
    is_malformed(&with("", "x"));
}

#[test]
fn method_scheme_and_path_are_needed() {
    for name in [":method", ":scheme", ":path"] {
        is_malformed(&but(name, None));
        is_malformed(&but(name, Some("")));
    }
    is_fine(&but(":authority", None));
    is_malformed(&[]);
}

#[test]
fn methods_are_tokens() {
    is_fine(&but(":method", Some("PROPFIND")));
    for method in ["GET ", "G\rET", "GET / HTTP/1.1\r\na: b", "G@"] {
        is_malformed(&but(":method", Some(method)));
    }
}

#[test]
fn schemes_are_schemes() {
    is_fine(&but(":scheme", Some("coap+tcp")));
    for scheme in ["1http", "ht tp", "http://", "http\n", "://"] {
        is_malformed(&but(":scheme", Some(scheme)));
    }
}

#[test]
fn paths_begin_with_a_slash_and_hold_no_blanks() {
    for path in ["/a?b=c#d", "//", "/\u{e9}"] {
        is_fine(&but(":path", Some(path)));
    }
    for path in ["a", "?a", "http://a/", "/ ", "/\t", "/a HTTP/1.1", "/\r\na: b", "/\0", "/\x7f", "*"] {
        is_malformed(&but(":path", Some(path)));
    }
    is_fine(&[(":method", "OPTIONS"), (":scheme", "http"), (":path", "*"), (":authority", "a")]);
}

#[test]
fn authorities_hold_nothing_but_an_authority() {
    for authority in ["a:80", "[::1]:80", "a_b", ""] {
        is_fine(&but(":authority", Some(authority)));
    }
    for authority in ["user@a", "a/b", "a?b", "a#b", "a b", "a\r\nb", "a\\b", "\0"] {
        is_malformed(&but(":authority", Some(authority)));
    }
}

#[test]
fn connect_has_an_authority_and_nothing_else() {
    is_fine(&[(":method", "CONNECT"), (":authority", "a:1")]);
    is_malformed(&[(":method", "CONNECT")]);
    is_malformed(&[(":method", "CONNECT"), (":authority", "")]);
    is_malformed(&[(":method", "CONNECT"), (":authority", "a:1"), (":path", "/")]);
    is_malformed(&[(":method", "CONNECT"), (":authority", "a:1"), (":scheme", "http")]);
}

#[test]
fn extended_connect_has_everything_and_must_have_been_offered() {
    let lines = [("a", "b")];
    let extended = [&but(":method", Some("CONNECT")), &[(":protocol", "websocket")][..], &lines].concat();
    is_fine(&extended);
    for name in [":scheme", ":path", ":authority"] {
        let less: Vec<_> = extended.iter().copied().filter(|line| line.0 != name).collect();
        is_malformed(&less);
    }
    is_malformed(&[GET, &[(":protocol", "websocket")]].concat());
    is_malformed(&[&but(":method", Some("CONNECT")), &[(":protocol", "")][..]].concat());

    let mut config = config(Role::Server);
    config.extended_connect = false;
    let mut server = server_with(&config);
    server.quiet(&headers(1, false, &extended));
    assert_eq!(server.resets(), [(1, Code::PROTOCOL_ERROR)]);
}

#[test]
fn names_are_lower_case_tokens() {
    is_fine(&with("x-!#$%&'*+.^_`|~9", "v"));
    for name in ["X-a", "a b", "a:", "a\r\n", "a\0", "\u{e9}", " a", "(", "a\x7f"] {
        is_malformed(&with(name, "v"));
    }
}

#[test]
fn values_cannot_end_a_line() {
    for value in ["", "a b", "a\tb", "\u{e9}", "\x01"] {
        is_fine(&with("a", value));
    }
    for value in ["a\r", "\na", "a\r\nb: c", "a\0b", " a", "a ", "\ta", "a\t", " "] {
        is_malformed(&with("a", value));
    }
}

#[test]
fn fields_of_a_connection_are_refused() {
    for name in ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"] {
        is_malformed(&with(name, "x"));
    }
    is_malformed(&with("te", "gzip"));
    is_malformed(&with("te", "trailers, gzip"));
    is_fine(&with("te", "trailers"));
}

#[test]
fn a_content_length_is_one_number() {
    is_fine(&with("content-length", "0"));
    for value in ["", "+1", "-1", "0x1", "1,1", "1 1", "18446744073709551616", "a"] {
        is_malformed(&with("content-length", value));
    }
    is_malformed(&[&with("content-length", "0")[..], &[("content-length", "0")]].concat());
    // No body, but a length.
    is_malformed(&with("content-length", "1"));
}

#[test]
fn a_body_is_as_long_as_its_content_length() {
    let open = headers(
        1,
        false,
        &[(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-length", "4")],
    );
    let trailers = headers(1, true, &[("a", "b")]);
    for (frames, fine) in [
        (vec![data(1, true, b"1234")], true),
        (vec![data(1, false, b"12"), data(1, false, b"34"), data(1, true, b"")], true),
        (vec![data(1, false, b"1234"), trailers.clone()], true),
        (vec![frame(kind::DATA, flag::PADDED | flag::END_STREAM, 1, b"\x021234\0\0")], true),
        (vec![data(1, true, b"123")], false),
        (vec![data(1, false, b"12345")], false),
        (vec![data(1, false, b"1234"), data(1, true, b"5")], false),
        (vec![data(1, false, b"123"), trailers], false),
    ] {
        let mut server = server();
        server.feed(&open).unwrap();
        let told = server.feed(&frames.concat()).unwrap();
        let reset =
            Told::Reset { id: 1, key: 0, code: Code::PROTOCOL_ERROR, by_peer: false, unprocessed: false };
        assert_eq!(told.last() != Some(&reset), fine, "{frames:?}");
        assert_eq!(server.resets().is_empty(), fine);
    }
}

#[test]
fn a_second_head_must_be_trailers() {
    let mut server = server();
    server.feed(&post(1)).unwrap();
    let told = server.feed(&headers(1, false, &[("a", "b")])).unwrap();
    assert!(matches!(told[..], [Told::Reset { code: Code::PROTOCOL_ERROR, .. }]));
}

#[test]
fn trailers_have_no_pseudo_fields() {
    for (name, fine) in [("grpc-status", true), (":path", false), (":status", false), ("connection", false)] {
        let mut server = server();
        server.feed(&post(1)).unwrap();
        let told = server.feed(&headers(1, true, &[(name, "0")])).unwrap();
        assert_eq!(matches!(told[..], [Told::Trailers { .. }]), fine, "{name}");
    }
}

/// What the client tells of a response to a request with this method.
fn answer(method: &str, frames: &[Vec<u8>]) -> Vec<Told> {
    let mut client = client();
    client.connection.request(&request_head(method, "/"), true, 5, &mut client.out).unwrap();
    client.feed(&frames.concat()).unwrap()
}

fn is_refused(told: &[Told]) -> bool {
    let code = Code::PROTOCOL_ERROR;
    told.last() == Some(&Told::Reset { id: 1, key: 5, code, by_peer: false, unprocessed: false })
}

#[test]
fn a_response_has_one_status_of_three_digits() {
    for lines in [
        &[][..],
        &[("a", "b")],
        &[(":status", "")],
        &[(":status", "20")],
        &[(":status", "2000")],
        &[(":status", "099")],
        &[(":status", "20x")],
        &[(":status", "+20")],
        &[(":status", "101")],
        &[(":status", "200"), (":status", "200")],
        &[("a", "b"), (":status", "200")],
        &[(":status", "200"), (":path", "/")],
        &[(":status", "200"), ("Upper", "b")],
        &[(":status", "200"), ("transfer-encoding", "chunked")],
    ] {
        assert!(is_refused(&answer("GET", &[headers(1, true, lines)])), "{lines:?}");
    }
    let told = answer("GET", &[headers(1, true, &[(":status", "999")])]);
    assert!(matches!(told[..], [Told::Response { key: 5, end: true, .. }]));
}

#[test]
fn interim_responses_come_before_the_final_one() {
    let early = headers(1, false, &[(":status", "103"), ("link", "x")]);
    let last = headers(1, true, &[(":status", "200")]);
    let told = answer("GET", &[early.clone(), early, last]);
    assert!(matches!(told[..], [Told::Response { end: false, .. }, _, Told::Response { end: true, .. }]));
    assert!(is_refused(&answer("GET", &[headers(1, true, &[(":status", "103")])])));
    assert!(is_refused(&answer("GET", &[data(1, true, b"body before head")])));
    let interim = headers(1, false, &[(":status", "100")]);
    assert!(is_refused(&answer("GET", &[interim, data(1, true, b"body before head")])));
}

#[test]
fn what_has_no_body_may_tell_a_length() {
    let length = ("content-length", "5");
    for (method, status, fine) in
        [("GET", "200", false), ("HEAD", "200", true), ("GET", "304", true), ("CONNECT", "200", true)]
    {
        let told = answer(method, &[headers(1, true, &[(":status", status), length])]);
        assert_eq!(!is_refused(&told), fine, "{method} {status}");
    }
    for (method, status) in [("HEAD", "200"), ("GET", "304"), ("GET", "204")] {
        let told = answer(method, &[headers(1, false, &[(":status", status)]), data(1, true, b"body")]);
        assert!(is_refused(&told), "{method} {status}");
    }
    let told =
        answer("CONNECT", &[headers(1, false, &[(":status", "200"), length]), data(1, false, b"123456")]);
    assert!(!is_refused(&told));
}

#[test]
fn upper_case_names_leave_in_lower_case() {
    let mut client = client();
    let mut head = request_head("GET", "/");
    head.fields.push(b"X-Upper", b"Value");
    head.fields.push(b"Content-Type", b"a");
    client.connection.request(&head, true, 0, &mut client.out).unwrap();
    let told = server().feed(&client.out).unwrap();
    assert!(matches!(&told[..], [Told::Request { head, .. }]
        if head.ends_with(&["x-upper: Value".into(), "content-type: a".into()])));
}
