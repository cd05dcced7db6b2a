//! What goes out.

use super::*;
use crate::head::Version;

fn written(head: &RequestHead, framing: Framing) -> String {
    let mut out = Vec::new();
    write_request(head, framing, &mut out);
    String::from_utf8(out).unwrap()
}

fn answered(head: &ResponseHead, framing: Framing) -> String {
    let mut out = Vec::new();
    write_response(head, framing, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn a_request_goes_out_as_it_came() {
    for input in [
        "POST /a?b HTTP/1.1\r\nHoST: a\r\nContent-LENGTH: 5\r\nx: 1\r\nX: \r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
        "CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        let (head, decoder, _) = request(input.as_bytes()).unwrap();
        assert_eq!(written(&head, decoder.framing()), input);
    }
}

#[test]
fn an_absolute_target_goes_out_in_origin_form() {
    for (line, expected) in [
        ("GET http://a/x?y", "GET /x?y"),
        ("GET http://a", "GET /"),
        ("GET http://a?q", "GET /?q"),
        ("OPTIONS http://a", "OPTIONS *"),
        ("OPTIONS http://a/", "OPTIONS /"),
    ] {
        let (head, ..) = request(format!("{line} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
        assert_eq!(written(&head, Framing::Empty), format!("{expected} HTTP/1.1\r\n\r\n"));
    }
}

/// [A1]
#[test]
fn the_framing_that_is_named_is_the_only_one_on_the_wire() {
    let mut head = RequestHead::default();
    head.set_method(b"POST");
    head.set_path(Some(b"/"));
    head.fields.push(b"Transfer-Encoding", b"gzip");
    head.fields.push(b"content-length", b"5");
    head.fields.push(b"a", b"b");
    assert_eq!(
        written(&head, Framing::Chunked),
        "POST / HTTP/1.1\r\na: b\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    assert_eq!(written(&head, Framing::Length(5)), "POST / HTTP/1.1\r\ncontent-length: 5\r\na: b\r\n\r\n");
    head.fields.remove("content-length");
    assert_eq!(written(&head, Framing::Length(5)), "POST / HTTP/1.1\r\na: b\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(written(&head, Framing::Empty), "POST / HTTP/1.1\r\na: b\r\n\r\n");
}

#[test]
fn a_length_is_not_written_where_it_does_not_count() {
    let (head, ..) = response(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\na: b\r\n\r\n", HEAD).unwrap();
    assert_eq!(answered(&head, Framing::Empty), "HTTP/1.1 200 OK\r\ncontent-length: 5\r\na: b\r\n\r\n");
    assert_eq!(answered(&head, Framing::UntilClose), "HTTP/1.1 200 OK\r\na: b\r\n\r\n");
    assert_eq!(answered(&head, Framing::Tunnel), "HTTP/1.1 200 OK\r\na: b\r\n\r\n");
}

#[test]
fn the_version_is_the_heads_but_chunks_are_http_1_1() {
    let mut head = ResponseHead { status: 200, version: Version::Http10, ..ResponseHead::default() };
    assert_eq!(answered(&head, Framing::UntilClose), "HTTP/1.0 200 OK\r\n\r\n");
    assert_eq!(answered(&head, Framing::Chunked), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    head.version = Version::Http2;
    assert_eq!(answered(&head, Framing::UntilClose), "HTTP/1.1 200 OK\r\n\r\n");
}

#[test]
fn the_reason_is_the_heads_else_the_registered_one_else_empty() {
    let mut head = ResponseHead { status: 404, ..ResponseHead::default() };
    assert!(answered(&head, Framing::Empty).starts_with("HTTP/1.1 404 Not Found\r\n"));
    head.set_reason(Some(b"Nope"));
    assert!(answered(&head, Framing::Empty).starts_with("HTTP/1.1 404 Nope\r\n"));
    head.set_reason(Some(b""));
    assert!(answered(&head, Framing::Empty).starts_with("HTTP/1.1 404 \r\n"));
    let head = ResponseHead { status: 599, ..ResponseHead::default() };
    assert!(answered(&head, Framing::Empty).starts_with("HTTP/1.1 599 \r\n"));
}

#[test]
fn an_empty_chunk_is_not_written_because_it_would_end_the_body() {
    let (mut out, mut trailers) = (Vec::new(), Fields::default());
    write_chunk(b"", &mut out);
    assert!(out.is_empty());
    write_chunk(&[b'x'; 26], &mut out);
    assert_eq!(out, b"1a\r\nxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n");
    out.clear();
    write_last_chunk(&trailers, &mut out);
    assert_eq!(out, b"0\r\n\r\n");
    out.clear();
    trailers.push(b"A", b"b");
    write_last_chunk(&trailers, &mut out);
    assert_eq!(out, b"0\r\nA: b\r\n\r\n");
}
