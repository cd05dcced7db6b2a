//! Heads of responses.

use super::*;
use crate::head::Version;

#[test]
fn a_response_comes_out_as_it_was_written() {
    let input = b"HTTP/1.1 299 All  is \t well\xe9 \r\nA: b\r\nContent-Length: 3\r\n\r\nabc";
    let (head, mut decoder, consumed) = response(input, Asked::default()).unwrap();
    assert_eq!((head.version, head.status), (Version::Http11, 299));
    assert_eq!(head.reason(), Some(&b"All  is \t well\xe9 "[..]));
    assert_eq!(lines(&head.fields), [("A", "b"), ("Content-Length", "3")]);
    assert_eq!((decoder.framing(), decoder.keeps_alive()), (Framing::Length(3), true));
    assert_eq!(body(&mut decoder, &input[consumed..]).unwrap().0, b"abc");
}

#[test]
fn a_status_is_three_digits_and_the_reason_may_be_missing() {
    for (line, status, reason) in [
        ("HTTP/1.0 200 OK", 200, "OK"),
        ("HTTP/1.1 200 ", 200, ""),
        ("HTTP/1.1 200", 200, ""),
        ("HTTP/1.1 100 Continue", 100, "Continue"),
        ("HTTP/1.1 999 ?", 999, "?"),
    ] {
        let (head, ..) = response(format!("{line}\r\n\r\n").as_bytes(), Asked::default()).unwrap();
        assert_eq!((head.status, head.reason()), (status, Some(reason.as_bytes())), "{line}");
    }
}

#[test]
fn a_status_line_of_another_shape_is_refused() {
    for line in [
        "HTTP/1.1",
        "HTTP/1.1 ",
        "HTTP/1.1 OK",
        "HTTP/1.1 20 OK",
        "HTTP/1.1 099 OK",
        "HTTP/1.1 000 OK",
        "HTTP/1.1 1000 OK",
        "HTTP/1.1 +20 OK",
        "HTTP/1.1 2 0 OK",
        "HTTP/1.1  200 OK",
        "HTTP/1.1\t200 OK",
        " HTTP/1.1 200 OK",
        "HTTP/2.0 200 OK",
        "HTTP/1.2 200 OK",
        "http/1.1 200 OK",
        "ICY 200 OK",
        "200 OK",
        "HTTP/1.1 200\tOK",
        "HTTP/1.1 200 O\0K",
        "HTTP/1.1 200 O\rK",
        "HTTP/1.1 200 \u{7f}",
        "HTTP/1.1 200 \u{b}",
        "HTTP/1.1 200OK",
        "GET / HTTP/1.1",
    ] {
        let input = format!("{line}\r\na: b\r\n\r\n");
        assert_malformed(response(input.as_bytes(), Asked::default()), input.as_bytes());
    }
}

#[test]
fn a_response_is_as_strict_about_lines_as_a_request() {
    for input in [
        &b"\r\nHTTP/1.1 200 OK\r\n\r\n"[..],
        b"HTTP/1.1 200 OK\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n a: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\rc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nnot a field\r\n\r\n",
    ] {
        assert_malformed(response(input, Asked::default()), input);
    }
    let endless = vec![b'a'; LIMITS.head_bytes];
    assert_eq!(response(&endless, Asked::default()).err(), Some(Error::HeadTooLarge));
    let many = "HTTP/1.1 200 OK\r\n".to_owned() + &"a: b\r\n".repeat(101) + "\r\n";
    assert_eq!(response(many.as_bytes(), Asked::default()).err(), Some(Error::HeadTooLarge));
}

/// [A7]
#[test]
fn where_no_body_can_be_none_is_read() {
    const NONE: Asked = Asked { head: false, connect: false, upgrade: false };
    for (status, asked, fields, stays) in [
        ("204 No Content", NONE, "", true),
        ("204 No Content", NONE, "content-length: 0\r\n", true),
        ("304 Not Modified", NONE, "", true),
        ("304 Not Modified", NONE, "content-length: 5\r\n", true),
        ("304 Not Modified", NONE, "transfer-encoding: chunked\r\n", true),
        ("200 OK", HEAD, "", true),
        ("200 OK", HEAD, "content-length: 5\r\n", true),
        ("200 OK", HEAD, "transfer-encoding: chunked\r\n", true),
        ("200 OK", HEAD, "connection: close\r\n", false),
        ("404 Not Found", HEAD, "content-length: 5\r\n", true),
        ("100 Continue", NONE, "", true),
        ("103 Early Hints", HEAD, "link: x\r\n", true),
        ("102 Processing", CONNECT, "", true),
        // A body that cannot be and is announced may come all the same.
        ("204 No Content", NONE, "content-length: 5\r\n", false),
        ("204 No Content", NONE, "transfer-encoding: chunked\r\n", false),
        ("100 Continue", NONE, "content-length: 5\r\n", false),
    ] {
        let input = format!("HTTP/1.1 {status}\r\n{fields}\r\nHTTP/1.1 200 OK\r\n\r\n");
        let (mut head, mut decoder, consumed) = response(input.as_bytes(), asked).unwrap();
        assert_eq!((decoder.framing(), decoder.keeps_alive()), (Framing::Empty, stays), "{status} {fields}");
        let rest = &input.as_bytes()[consumed..];
        assert_eq!(body(&mut decoder, rest).unwrap().2, 0);
        assert_eq!(decoder.response(rest, Asked::default(), &mut head), Ok(Some(rest.len())));
        assert!(stays || !decoder.keeps_alive(), "a later head does not make the connection good again");
    }
}

#[test]
fn the_length_that_a_head_request_asks_for_is_kept_as_a_field() {
    let (head, ..) = response(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", HEAD).unwrap();
    assert_eq!(head.fields.get("content-length"), Some(&b"5"[..]));
    let (head, ..) = response(b"HTTP/1.1 304 x\r\nContent-Length: 5\r\n\r\n", Asked::default()).unwrap();
    assert_eq!(head.fields.get("content-length"), Some(&b"5"[..]));
    // RFC 9110, 8.6: no length in 1xx and 204, where the next reader might believe it.
    let (head, ..) = response(b"HTTP/1.1 204 x\r\nContent-Length: 5\r\n\r\n", Asked::default()).unwrap();
    assert!(!head.fields.contains("content-length"));
}

#[test]
fn a_malformed_length_is_refused_even_where_it_does_not_count() {
    for (input, asked) in [
        (&b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"[..], HEAD),
        (b"HTTP/1.1 304 x\r\ncontent-length: 1, 2\r\n\r\n", Asked::default()),
        (b"HTTP/1.1 204 x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", Asked::default()),
        (b"HTTP/1.1 200 x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", CONNECT),
    ] {
        assert_malformed(response(input, asked), input);
    }
}

/// [A8]
#[test]
fn a_tunnel_opens_only_where_it_was_asked_for() {
    for (status, asked, framing) in [
        ("101 Switching Protocols", UPGRADE, Some(Framing::Tunnel)),
        ("101 Switching Protocols", Asked::default(), None),
        ("101 Switching Protocols", CONNECT, None),
        ("200 OK", CONNECT, Some(Framing::Tunnel)),
        ("204 No Content", CONNECT, Some(Framing::Tunnel)),
        ("299 OK", CONNECT, Some(Framing::Tunnel)),
        ("300 No", CONNECT, Some(Framing::Length(1))),
        ("407 No", CONNECT, Some(Framing::Length(1))),
        ("200 OK", UPGRADE, Some(Framing::Length(1))),
        ("426 Upgrade Required", UPGRADE, Some(Framing::Length(1))),
    ] {
        let input = format!("HTTP/1.1 {status}\r\ncontent-length: 1\r\n\r\n");
        let result = response(input.as_bytes(), asked);
        let Some(framing) = framing else {
            assert_malformed(result, input.as_bytes());
            continue;
        };
        let (_, mut decoder, _) = result.unwrap();
        assert_eq!(decoder.framing(), framing, "{status}");
        assert_eq!(decoder.keeps_alive(), framing != Framing::Tunnel, "{status}");
        if framing == Framing::Tunnel {
            assert_eq!(body(&mut decoder, b"any\0thing").unwrap().0, b"any\0thing");
        }
    }
}

/// [A7]
#[test]
fn interim_responses_are_followed_by_another_head() {
    let input =
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
    let (mut decoder, mut head, mut at) = (Decoder::new(LIMITS), ResponseHead::default(), 0);
    for status in [100, 103, 200] {
        at += decoder.response(&input[at..], Asked::default(), &mut head).unwrap().unwrap();
        assert_eq!(head.status, status);
        assert_eq!(head.is_interim(), status < 200);
    }
    assert_eq!(body(&mut decoder, &input[at..]).unwrap().0, b"hi");
    assert!(decoder.keeps_alive());
}

#[test]
fn a_body_until_the_connection_ends_ends_with_it() {
    let (_, mut decoder, _) = response(b"HTTP/1.1 200 OK\r\n\r\n", Asked::default()).unwrap();
    assert_eq!((decoder.framing(), decoder.keeps_alive()), (Framing::UntilClose, false));
    assert_eq!(decoder.end(), Ok(()));
    assert_eq!(body(&mut decoder, b"HTTP/1.1 200 OK\r\n\r\n").unwrap().0, b"HTTP/1.1 200 OK\r\n\r\n");
}

#[test]
fn a_response_says_whether_the_connection_stays() {
    for (input, stays) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", false),
        ("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", false),
        ("HTTP/1.0 200 OK\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n", true),
        ("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\n", false),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", true),
    ] {
        assert_eq!(response(input.as_bytes(), Asked::default()).unwrap().1.keeps_alive(), stays, "{input}");
    }
}
