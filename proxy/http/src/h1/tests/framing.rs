//! Where a body ends, for both directions.

use super::*;

/// What a request and a response with these field lines say about their body.
fn framings(fields: &str) -> [Result<Framing, Error>; 2] {
    let post = format!("POST / HTTP/1.1\r\nhost: a\r\n{fields}x: y\r\n\r\n");
    let ok = format!("HTTP/1.1 200 OK\r\n{fields}x: y\r\n\r\n");
    [
        request(post.as_bytes()).map(|(_, decoder, _)| decoder.framing()),
        response(ok.as_bytes(), Asked::default()).map(|(_, decoder, _)| decoder.framing()),
    ]
}

#[test]
fn a_length_or_chunks_say_where_the_body_ends() {
    for (fields, framing) in [
        ("Content-Length: 0\r\n", Framing::Length(0)),
        ("CONTENT-LENGTH:5\r\n", Framing::Length(5)),
        ("content-length: 18446744073709551615\r\n", Framing::Length(u64::MAX)),
        ("Transfer-Encoding: chunked\r\n", Framing::Chunked),
        ("TRANSFER-ENCODING:  CHUNKED \r\n", Framing::Chunked),
    ] {
        assert_eq!(framings(fields), [Ok(framing), Ok(framing)], "{fields}");
    }
}

#[test]
fn without_either_a_request_is_empty_and_a_response_lasts_until_the_connection_ends() {
    assert_eq!(framings(""), [Ok(Framing::Empty), Ok(Framing::UntilClose)]);
    // Names that only look like the ones that count.
    assert_eq!(framings("content_length: 5\r\n"), [Ok(Framing::Empty), Ok(Framing::UntilClose)]);
    assert_eq!(framings("x-content-length: 5\r\n"), [Ok(Framing::Empty), Ok(Framing::UntilClose)]);
    assert_eq!(framings("transfer_encoding: chunked\r\n"), [Ok(Framing::Empty), Ok(Framing::UntilClose)]);
}

/// [A1], [A2], [A3]
#[test]
fn a_framing_that_could_be_read_in_two_ways_is_refused() {
    for fields in [
        // A length and a coding, in both orders.
        "content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 5\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 0\r\n",
        // A coding that is not chunked, once.
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding: identity\r\n",
        "transfer-encoding: gzip\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding: chunkedx\r\n",
        "transfer-encoding: chunked,chunked\r\n",
        "transfer-encoding: chunked,\r\n",
        "transfer-encoding: ,chunked\r\n",
        "transfer-encoding: chunked;q=1\r\n",
        "transfer-encoding: \"chunked\"\r\n",
        "transfer-encoding:\r\n",
        "transfer-encoding: \x0bchunked\r\n",
        "transfer-encoding: chunked\x0c\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chun\u{212a}ed\r\n",
        // Lengths that differ or are none.
        "content-length: 5\r\ncontent-length: 6\r\n",
        "content-length: 5, 6\r\n",
        "content-length: 5\r\ncontent-length: 5, 6\r\n",
        "content-length: +5\r\n",
        "content-length: -1\r\n",
        "content-length: - 1\r\n",
        "content-length: 0x5\r\n",
        "content-length: 5 5\r\n",
        "content-length: 5;\r\n",
        "content-length: 5.0\r\n",
        "content-length: 5e0\r\n",
        "content-length: 5_0\r\n",
        "content-length: five\r\n",
        "content-length: \u{665}\r\n",
        "content-length:\r\n",
        "content-length: ,\r\n",
        "content-length: 5,\r\n",
        "content-length: ,5\r\n",
        "content-length: 5,,5\r\n",
        "content-length: \x0b5\r\n",
        "content-length: 18446744073709551616\r\n",
        "content-length: 18446744073709551615, 18446744073709551616\r\n",
        "content-length: 99999999999999999999999999\r\n",
    ] {
        for result in framings(fields) {
            assert_malformed(result, fields.as_bytes());
        }
    }
}

/// [A2]
#[test]
fn a_transfer_coding_in_http_1_0_is_refused() {
    let input = b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_malformed(request(input), input);
    let input = b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_malformed(response(input, Asked::default()), input);
}

/// [A3]
#[test]
fn equal_lengths_become_one_line_of_plain_digits() {
    for fields in [
        "Content-Length: 5\r\ncontent-length: 5\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: 5 ,\t5,5\r\n",
        "Content-Length: 005\r\n",
        "Content-Length: 5\r\nx: y\r\ncontent-length: 05,5\r\n",
    ] {
        let input = format!("POST / HTTP/1.1\r\n{fields}a: b\r\n\r\n");
        let (mut head, decoder, _) = request(input.as_bytes()).unwrap();
        assert_eq!(decoder.framing(), Framing::Length(5), "{fields}");
        head.fields.remove("x");
        assert_eq!(lines(&head.fields), [("Content-Length", "5"), ("a", "b")], "{fields}");
    }
    // One plain line is not touched, and neither is a plain zero.
    let (head, ..) = request(b"POST / HTTP/1.1\r\na: b\r\ncontent-length: 0\r\n\r\n").unwrap();
    assert_eq!(lines(&head.fields), [("a", "b"), ("content-length", "0")]);
}

/// [A7]
#[test]
fn a_get_with_a_body_is_framed_like_any_other() {
    for method in ["GET", "HEAD", "DELETE", "OPTIONS", "TRACE"] {
        let input = format!("{method} / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcGET");
        let (_, mut decoder, consumed) = request(input.as_bytes()).unwrap();
        let (data, _, length) = body(&mut decoder, &input.as_bytes()[consumed..]).unwrap();
        assert_eq!((&data[..], length), (&b"abc"[..], 3));
    }
}

/// [A8]
#[test]
fn a_connect_has_no_body() {
    for fields in ["content-length: 1\r\n", "transfer-encoding: chunked\r\n"] {
        let input = format!("CONNECT a:1 HTTP/1.1\r\n{fields}\r\n");
        assert_malformed(request(input.as_bytes()), input.as_bytes());
    }
    for fields in ["", "content-length: 0\r\n"] {
        assert!(request(format!("CONNECT a:1 HTTP/1.1\r\n{fields}\r\n").as_bytes()).is_ok());
    }
}
