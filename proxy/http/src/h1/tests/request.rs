//! Heads of requests.

use super::*;
use crate::head::Version;

#[test]
fn a_head_comes_out_as_it_was_written() {
    let input = b"POST /a?b=c HTTP/1.1\r\nHOST: a.example\r\nX-a:1\r\nx-A: \t2 3\t \r\nempty:\r\nblank: \t\r\n\r\nrest";
    let (head, decoder, consumed) = request(input).unwrap();
    assert_eq!(consumed, input.len() - "rest".len());
    assert_eq!(head.version, Version::Http11);
    assert_eq!(head.method(), b"POST");
    assert_eq!(head.path(), Some(&b"/a?b=c"[..]));
    assert_eq!((head.scheme(), head.authority(), head.protocol()), (None, None, None));
    let lines = [("HOST", "a.example"), ("X-a", "1"), ("x-A", "2 3"), ("empty", ""), ("blank", "")];
    assert_eq!(text(&head.fields), lines.map(|(name, value)| (name.to_owned(), value.to_owned())));
    assert_eq!(decoder.framing(), Framing::Empty);
    assert!(decoder.keeps_alive());
    assert_eq!(decoder.end(), Ok(()));
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
    assert_eq!(text(&head.fields), [("b".to_owned(), "2".to_owned())]);
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
