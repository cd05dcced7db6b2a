//! Bodies and trailers.

use super::*;

#[test]
fn chunks_and_trailers_are_taken_apart() {
    let input = b"GET / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\n3;x=\"y\"\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: u\r\nhost: x\r\n\r\nrest";
    let (_, mut decoder, consumed) = request(input).unwrap();
    let (data, trailers, length) = body(&mut decoder, &input[consumed..]).unwrap();
    assert_eq!(data, b"abc0123456789");
    assert_eq!(text(&trailers), [("T".to_owned(), "u".to_owned())]);
    assert_eq!(&input[consumed + length..], b"rest");
}
