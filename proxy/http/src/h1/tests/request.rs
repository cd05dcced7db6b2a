//! Heads of requests.

use super::*;
use crate::head::Version;

#[test]
fn a_head_comes_out_as_it_was_written() {
    let input = b"POST /a?b=c HTTP/1.1\r\nHOST: a.example\r\nX-a:1\r\nx-A: \t2 3\t \r\nempty:\r\nblank: \t\r\n\r\nrest";
    let (head, decoder, consumed) = request(input).unwrap();
    assert_eq!(consumed, input.len() - "rest".len());
    assert_eq!((head.version, head.method()), (Version::Http11, &b"POST"[..]));
    assert_eq!(head.path(), Some(&b"/a?b=c"[..]));
    assert_eq!((head.scheme(), head.authority(), head.protocol()), (None, None, None));
    let expected = [("HOST", "a.example"), ("X-a", "1"), ("x-A", "2 3"), ("empty", ""), ("blank", "")];
    assert_eq!(lines(&head.fields), expected);
    assert_eq!(decoder.framing(), Framing::Empty);
    assert!(decoder.keeps_alive());
    assert_eq!(decoder.end(), Ok(()));
}

#[test]
fn bytes_beyond_ascii_pass_in_targets_and_values() {
    let (head, ..) = request(b"GET /\xff\xc3\xa4?\"<>^`{|}\\#x HTTP/1.1\r\nA: \xe9\xff\x80\r\n\r\n").unwrap();
    assert_eq!(head.path(), Some(&b"/\xff\xc3\xa4?\"<>^`{|}\\#x"[..]));
    assert_eq!(head.fields.get("a"), Some(&b"\xe9\xff\x80"[..]));
}

#[test]
fn a_head_without_fields_is_a_head() {
    let (head, ..) = request(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(head.fields.is_empty());
    assert_eq!(head.version, Version::Http10);
}

#[test]
fn the_head_that_was_there_before_is_forgotten() {
    let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
    decoder.request(b"GET http://a.example/x HTTP/1.0\r\na: 1\r\n\r\n", &mut head).unwrap();
    decoder.request(b"PUT /y HTTP/1.1\r\nb: 2\r\n\r\n", &mut head).unwrap();
    assert_eq!((head.method(), head.path(), head.authority()), (&b"PUT"[..], Some(&b"/y"[..]), None));
    assert_eq!(lines(&head.fields), [("b", "2")]);
}

#[test]
fn pipelined_requests_are_read_one_by_one() {
    let input = b"POST /1 HTTP/1.1\r\ncontent-length: 2\r\n\r\nhiGET /2 HTTP/1.1\r\n\r\n";
    let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
    let first = decoder.request(input, &mut head).unwrap().unwrap();
    let (data, _, length) = body(&mut decoder, &input[first..]).unwrap();
    assert_eq!(data, b"hi");
    let second = decoder.request(&input[first + length..], &mut head).unwrap().unwrap();
    assert_eq!(head.path(), Some(&b"/2"[..]));
    assert_eq!(first + length + second, input.len());
}

#[test]
fn a_head_is_not_read_out_of_a_body() {
    let input = b"POST /1 HTTP/1.1\r\ncontent-length: 30\r\n\r\nGET /2 HTTP/1.1\r\n\r\n";
    let (mut head, mut decoder, first) = request(input).unwrap();
    assert_malformed(decoder.request(&input[first..], &mut head), input);
}

#[test]
fn each_form_of_a_target_is_taken_apart() {
    type Parts<'a> = (Option<&'a str>, Option<&'a str>, Option<&'a str>);
    let cases: [(&str, Parts); 15] = [
        ("GET /", (None, None, Some("/"))),
        ("GET //a/../b", (None, None, Some("//a/../b"))),
        ("GET /http://a", (None, None, Some("/http://a"))),
        ("OPTIONS *", (None, None, Some("*"))),
        ("OPTIONS /*", (None, None, Some("/*"))),
        ("GET http://a.example/x?y", (Some("http"), Some("a.example"), Some("/x?y"))),
        ("GET HTTPS://a.example:8443/", (Some("HTTPS"), Some("a.example:8443"), Some("/"))),
        ("GET http://[::1]:80/x", (Some("http"), Some("[::1]:80"), Some("/x"))),
        ("GET http://a.example", (Some("http"), Some("a.example"), None)),
        ("GET http://a.example?q", (Some("http"), Some("a.example"), Some("/?q"))),
        ("GET http://a/@b", (Some("http"), Some("a"), Some("/@b"))),
        ("OPTIONS http://a.example", (Some("http"), Some("a.example"), None)),
        ("CONNECT a.example:443", (None, Some("a.example:443"), None)),
        ("CONNECT [::1]:1", (None, Some("[::1]:1"), None)),
        ("connect /", (None, None, Some("/"))),
    ];
    for (line, expected) in cases {
        let (head, ..) = request(format!("{line} HTTP/1.1\r\n\r\n").as_bytes()).expect(line);
        let text = |part: Option<&[u8]>| part.map(|part| String::from_utf8(part.to_vec()).unwrap());
        let parts = (text(head.scheme()), text(head.authority()), text(head.path()));
        let parts = (parts.0.as_deref(), parts.1.as_deref(), parts.2.as_deref());
        assert_eq!(parts, expected, "{line}");
    }
}

#[test]
fn a_target_of_no_form_is_refused() {
    for line in [
        "GET *",
        "GET *a",
        "OPTIONS *a",
        "GET a",
        "GET a.example:80",
        "GET ?",
        "GET #",
        "GET ftp://a/",
        "GET http:/a",
        "GET http://",
        "GET http:///a",
        "GET http://?a",
        "GET http://user@a/",
        "GET http://user:pass@a/",
        "GET https//a",
        "GET file:///etc/passwd",
        "CONNECT /",
        "CONNECT *",
        "CONNECT a.example",
        "CONNECT a.example:",
        "CONNECT :443",
        "CONNECT a.example:0",
        "CONNECT a.example:65536",
        "CONNECT a.example:+1",
        "CONNECT a.example:4a",
        "CONNECT http://a.example:443",
        "CONNECT u@a.example:443",
        "CONNECT a/b:443",
    ] {
        let input = format!("{line} HTTP/1.1\r\n\r\n");
        assert_malformed(request(input.as_bytes()), input.as_bytes());
    }
}

#[test]
fn a_request_line_of_another_shape_is_refused() {
    for line in [
        "GET",
        "GET /",
        "GET  / HTTP/1.1",
        "GET /  HTTP/1.1",
        "GET / HTTP/1.1 ",
        " GET / HTTP/1.1",
        "\tGET / HTTP/1.1",
        "GET\t/\tHTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET / /a HTTP/1.1",
        "/ HTTP/1.1",
        "G(T / HTTP/1.1",
        "G\u{e4}T / HTTP/1.1",
        "GET /\u{1} HTTP/1.1",
        "GET /\u{7f} HTTP/1.1",
        "GET /\t HTTP/1.1",
        "GET /\0 HTTP/1.1",
        "GET /\r HTTP/1.1",
        "GET / HTTP/1.2",
        "GET / HTTP/2.0",
        "GET / HTTP/0.9",
        "GET / HTTP/1.1x",
        "GET / http/1.1",
        "GET / HTTP/01.1",
        "GET / HTTP/1.10",
        "GET / HTTP/11",
        "GET / HTTP/1.",
        "GET / HTTP",
        "PRI * HTTP/2.0",
        "HTTP/1.1 200 OK",
    ] {
        let input = format!("{line}\r\nhost: a\r\n\r\n");
        assert_malformed(request(input.as_bytes()), input.as_bytes());
    }
}

/// [A4]
#[test]
fn a_field_line_that_could_be_read_in_two_ways_is_refused() {
    for line in [
        &b"a: b\r\n c"[..],
        b"a: b\r\n\tc",
        b" a: b",
        b"\ta: b",
        b" ",
        b"a : b",
        b"a\t: b",
        b": b",
        b":",
        b"a",
        b"a b: c",
        b"a\r: b",
        b"a\0: b",
        b"a(: b",
        b"\xe4: b",
        b"a: b\0",
        b"a: \0",
        b"a: b\rc",
        b"a: b\r\r",
        b"a: \rb",
        b"a:\r\r",
        b"a: \x01",
        b"a: \x0b",
        b"a: \x7f",
        b"a: \x1b[0m",
        b"\"a\": b",
        b"a,b: c",
        b"a=b: c",
    ] {
        let input = [b"GET / HTTP/1.1\r\nhost: a\r\n", line, b"\r\n\r\n"].concat();
        assert_malformed(request(&input), &input);
        let first = [b"GET / HTTP/1.1\r\n", line, b"\r\n\r\n"].concat();
        assert_malformed(request(&first), &first);
    }
}

/// [A5]
#[test]
fn a_bare_line_feed_ends_no_line() {
    for input in [
        &b"GET / HTTP/1.1\nhost: a\r\n\r\n"[..],
        b"GET / HTTP/1.1\r\nhost: a\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n\n",
        b"GET / HTTP/1.1\r\nhost: a\n\n",
        b"GET / HTTP/1.1\r\nhost: a\n b: c\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        b"\nGET / HTTP/1.1\r\n\r\n",
        b"\r\n\nGET / HTTP/1.1\r\n\r\n",
        b"\n",
        b"GET / HTTP/1.1\n",
    ] {
        assert_malformed(request(input), input);
    }
}

#[test]
fn empty_lines_before_a_request_are_skipped_up_to_a_bound() {
    for count in 0..=4 {
        let input = "\r\n".repeat(count) + "GET /x HTTP/1.1\r\na: b\r\n\r\nrest";
        let (head, decoder, consumed) = request(input.as_bytes()).unwrap();
        assert_eq!((head.path(), head.fields.get("a")), (Some(&b"/x"[..]), Some(&b"b"[..])));
        assert_eq!(consumed, input.len() - "rest".len());
        assert_eq!(decoder.end(), Ok(()));
    }
    let input = "\r\n".repeat(5);
    assert_malformed(request(input.as_bytes()), input.as_bytes());
}

#[test]
fn empty_lines_alone_begin_no_head() {
    let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
    assert!(!decoder.has_begun());
    assert_eq!(decoder.request(b"\r\n", &mut head), Ok(None));
    assert!(!decoder.has_begun());
    assert_eq!(decoder.end(), Ok(()));
    assert_eq!(decoder.request(b"\r\nG", &mut head), Ok(None));
    assert!(decoder.has_begun());
    assert_eq!(decoder.end(), Err(Error::Truncated));
    assert_eq!(decoder.request(b"\r\nGET / HTTP/1.1\r\n\r\n", &mut head), Ok(Some(20)));
    assert!(!decoder.has_begun());
}

/// [A9]
#[test]
fn a_request_line_beyond_the_limit_is_too_long() {
    let line = |length: usize| format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(length));
    let most = LIMITS.head_bytes - line(0).len();
    assert!(request(line(most).as_bytes()).is_ok());
    // The line itself still fits, the head does not.
    assert_eq!(request(line(most + 1).as_bytes()).err(), Some(Error::HeadTooLarge));
    assert_eq!(request(line(65 * 1024).as_bytes()).err(), Some(Error::TargetTooLong));
    let unfinished = "a".repeat(LIMITS.head_bytes);
    assert_eq!(request(unfinished.as_bytes()).err(), Some(Error::TargetTooLong));
}

/// [A9]
#[test]
fn a_head_beyond_the_limits_is_too_large() {
    let head = |fields: usize, value: usize| {
        "GET / HTTP/1.1\r\n".to_owned() + &format!("a: {}\r\n", "x".repeat(value)).repeat(fields) + "\r\n"
    };
    for fields in [0, 1, 31, 32, 33, 100] {
        assert_eq!(request(head(fields, 1).as_bytes()).unwrap().0.fields.len(), fields);
    }
    for (fields, value) in [(101, 1), (100_000, 1), (100, 1024), (1, 64 * 1024), (1, 1024 * 1024)] {
        assert_eq!(request(head(fields, value).as_bytes()).err(), Some(Error::HeadTooLarge));
    }
    // Known as soon as the line is there, not only at the end.
    let endless = head(101, 1);
    assert_eq!(request(&endless.as_bytes()[..endless.len() - 2]).err(), Some(Error::HeadTooLarge));
}

#[test]
fn a_request_says_whether_the_connection_stays() {
    for (version, connection, stays) in [
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "connection: CLOSE\r\n", false),
        ("1.1", "connection: x , close\t,y\r\n", false),
        ("1.1", "connection: x\r\nconnection: close\r\n", false),
        ("1.1", "connection: closed, not-close\r\n", true),
        ("1.1", "connection: keep-alive\r\n", true),
        ("1.1", "connection:\r\n", true),
        ("1.0", "", false),
        ("1.0", "connection: Keep-Alive\r\n", true),
        ("1.0", "connection: keep-alive, close\r\n", false),
        ("1.0", "connection: close\r\nconnection: keep-alive\r\n", false),
    ] {
        let (_, decoder, _) =
            request(format!("GET / HTTP/{version}\r\n{connection}\r\n").as_bytes()).unwrap();
        assert_eq!(decoder.keeps_alive(), stays, "{version} {connection}");
    }
}

/// [A8]
#[test]
fn behind_an_accepted_upgrade_everything_is_raw_bytes() {
    let input = b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nGET / HTTP/1.1\r\n\r\n";
    let (mut head, mut decoder, consumed) = request(input).unwrap();
    assert_eq!((decoder.framing(), decoder.keeps_alive()), (Framing::Empty, true));
    decoder.switch();
    assert_eq!((decoder.framing(), decoder.keeps_alive()), (Framing::Tunnel, false));
    let rest = &input[consumed..];
    assert_malformed(decoder.request(rest, &mut head), rest);
    let mut trailers = Fields::default();
    assert_eq!(decoder.body(rest, &mut trailers), Ok((rest.len(), Piece::Data(rest))));
    assert_eq!(decoder.body(b"", &mut trailers), Ok((0, Piece::More)));
    assert_eq!(decoder.end(), Ok(()));
}
