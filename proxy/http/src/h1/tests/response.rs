//! Heads of responses.

use super::*;

#[test]
fn a_response_comes_out_as_it_was_written() {
    let input = b"HTTP/1.1 299 All  is well\xe9\r\nA: b\r\nContent-Length: 3\r\n\r\nabc";
    let (head, mut decoder, consumed) = response(input, Asked::default()).unwrap();
    assert_eq!((head.status, head.reason()), (299, Some(&b"All  is well\xe9"[..])));
    assert_eq!(decoder.framing(), Framing::Length(3));
    assert_eq!(body(&mut decoder, &input[consumed..]).unwrap().0, b"abc");
    assert!(decoder.keeps_alive());
}
