//! Bodies and trailers.

use super::*;

/// The body of a chunked request, its trailers, and the bytes that they took.
fn chunked(input: &[u8]) -> Result<(Vec<u8>, Fields, usize), Error> {
    let (_, mut decoder, _) = request(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    body(&mut decoder, input)
}

#[test]
fn chunks_and_trailers_are_taken_apart() {
    let input = b"3;x=\"y\"\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: u\r\n\r\nrest";
    let (data, trailers, length) = chunked(input).unwrap();
    assert_eq!(data, b"abc0123456789");
    assert_eq!(lines(&trailers), [("T", "u")]);
    assert_eq!(&input[length..], b"rest");
}

#[test]
fn data_is_a_slice_of_the_input() {
    let (_, mut decoder, _) = request(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let (input, mut trailers) = (b"5\r\nhello\r\n0\r\n\r\n", Fields::default());
    let (consumed, piece) = decoder.body(input, &mut trailers).unwrap();
    assert_eq!((consumed, &piece), (8, &Piece::Data(b"hello")));
    let Piece::Data(data) = piece else { unreachable!() };
    assert!(std::ptr::eq(data.as_ptr(), &raw const input[3]));
    assert_eq!(decoder.body(&input[8..], &mut trailers), Ok((7, Piece::End)));
}

#[test]
fn chunk_sizes_are_read_in_every_spelling_that_has_one_reading() {
    for input in [
        "a\r\n0123456789\r\n0\r\n\r\n",
        "A\r\n0123456789\r\n0\r\n\r\n",
        "000000000000000a\r\n0123456789\r\n0000000000000000\r\n\r\n",
        "a;\r\n0123456789\r\n0;\r\n\r\n",
        "a ;x\r\n0123456789\r\n0\t; x=y\r\n\r\n",
        "a;x=\"\u{e4}; 5\"\r\n0123456789\r\n0\r\n\r\n",
        "5;a\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n",
    ] {
        let (data, _, length) = chunked(input.as_bytes()).expect(input);
        assert_eq!((&data[..], length), (&b"0123456789"[..], input.len()), "{input}");
    }
}

/// [A5], [A6]
#[test]
fn a_chunk_that_could_be_read_in_two_ways_is_refused() {
    for input in [
        &b"\r\n"[..],
        b"g\r\n",
        b"+5\r\nabcde\r\n",
        b"-5\r\nabcde\r\n",
        b"0x5\r\nabcde\r\n",
        b" 5\r\nabcde\r\n",
        b"5 \r\nabcde\r\n",
        b"5 5\r\n",
        b"5\t\r\nabcde\r\n",
        b"5,\r\n",
        b";x\r\n",
        b"5_\r\n",
        b"5\0\r\n",
        b"5\x0b\r\n",
        // 2^64, a long one, and zeros without end.
        b"10000000000000000\r\n",
        b"ffffffffffffffffffffffffffffffff\r\n",
        b"00000000000000005\r\nabcde\r\n",
        // Line ends.
        b"5\nabcde\r\n",
        b"5\rabcde\r\n",
        b"5\r\rabcde\r\n",
        b"5;x\nabcde\r\n",
        b"5;x\ry\r\nabcde\r\n",
        b"5;x\0\r\nabcde\r\n",
        b"5\r\nabcde\n0\r\n\r\n",
        b"5\r\nabcde\r0\r\n\r\n",
        b"5\r\nabcde0\r\n\r\n",
        b"5\r\nabcdef\r\n0\r\n\r\n",
        b"5\r\nabcd\r\n0\r\n\r\n",
        b"0\n\r\n",
        b"0\r\n\n",
        b"0\r\nx",
    ] {
        let (_, mut decoder, _) = request(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
        let result = body(&mut decoder, input);
        if input == b"0\r\nx" {
            assert_eq!(result.err(), Some(Error::Truncated), "a trailer may begin here");
        } else {
            assert_malformed(result, input);
        }
    }
}

/// [A6]
#[test]
fn the_largest_chunk_is_what_63_bits_hold() {
    let (_, mut decoder, _) = request(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let mut trailers = Fields::default();
    for too_large in [b"8000000000000000\r\n", b"ffffffffffffffff\r\n"] {
        let (_, mut decoder, _) = request(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
        assert!(matches!(decoder.body(too_large, &mut trailers), Err(Error::Malformed(_))));
    }
    let input = b"7fffffffffffffff\r\nabc";
    assert_eq!(decoder.body(input, &mut trailers), Ok((21, Piece::Data(b"abc"))));
    assert_eq!(decoder.body(b"\r\n0\r\n", &mut trailers), Ok((5, Piece::Data(b"\r\n0\r\n"))));
}

/// [A6]
#[test]
fn chunk_extensions_are_bounded_over_the_whole_body() {
    let one = |length: usize| format!("1;{}\r\nx\r\n", "e".repeat(length - 1));
    assert!(chunked((one(16 * 1024) + "0\r\n\r\n").as_bytes()).is_ok());
    let input = one(16 * 1024 + 1);
    assert_malformed(chunked(input.as_bytes()), b"one long extension");
    let input = one(16).repeat(1025);
    assert_malformed(chunked(input.as_bytes()), b"many short extensions");
    let input = "1".to_owned() + &" ".repeat(16 * 1024 + 1);
    assert_malformed(chunked(input.as_bytes()), b"whitespace");
}

/// [A6]
#[test]
fn trailers_that_frame_or_route_a_message_are_left_out() {
    let input = b"0\r\nContent-Length: 5\r\na: 1\r\ntransfer-encoding: chunked\r\nHOST: b\r\nConnection: a\r\nTrailer: x\r\n\
                  TE: x\r\nupgrade: x\r\nkeep-alive: x\r\nproxy-connection: x\r\ncontent-encoding: x\r\ngrpc-status: 0\r\n\r\n";
    let (_, trailers, length) = chunked(input).unwrap();
    assert_eq!(lines(&trailers), [("a", "1"), ("grpc-status", "0")]);
    assert_eq!(length, input.len());
}

/// [A6]
#[test]
fn trailers_are_as_strict_as_a_head() {
    for trailer in [
        &b" a: b"[..],
        b"a: b\r\n c",
        b"\ta: b",
        b"a : b",
        b": b",
        b"a",
        b"a: b\0",
        b"a: b\rc",
        b"a: b\nc: d",
        b"a b: c",
    ] {
        let input = [b"0\r\n", trailer, b"\r\n\r\n"].concat();
        assert_malformed(chunked(&input), &input);
    }
    let many = "0\r\n".to_owned() + &"a: b\r\n".repeat(101) + "\r\n";
    assert_eq!(chunked(many.as_bytes()).err(), Some(Error::HeadTooLarge));
    let long = "0\r\na: ".to_owned() + &"x".repeat(LIMITS.head_bytes);
    assert_eq!(chunked(long.as_bytes()).err(), Some(Error::HeadTooLarge));
    let most = "0\r\n".to_owned() + &"a: b\r\n".repeat(100) + "\r\n";
    assert_eq!(chunked(most.as_bytes()).unwrap().1.len(), 100);
}

/// [A7]
#[test]
fn a_body_that_is_cut_short_is_truncated() {
    let whole = b"5\r\nabcde\r\n0\r\na: b\r\n\r\n";
    for end in 0..whole.len() {
        assert_eq!(chunked(&whole[..end]).err(), Some(Error::Truncated), "{end}");
    }
    assert!(chunked(whole).is_ok());
    for end in 0..5 {
        let (_, mut decoder, _) = request(b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\n").unwrap();
        assert_eq!(body(&mut decoder, &b"abcde"[..end]).err(), Some(Error::Truncated));
        let (_, mut decoder, _) =
            response(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", Asked::default()).unwrap();
        assert_eq!(body(&mut decoder, &b"abcde"[..end]).err(), Some(Error::Truncated));
    }
}

/// [A7]
#[test]
fn a_body_of_a_length_takes_no_byte_more() {
    let (_, mut decoder, _) =
        response(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", Asked::default()).unwrap();
    let mut trailers = Fields::default();
    assert_eq!(decoder.body(b"ab", &mut trailers), Ok((2, Piece::Data(b"ab"))));
    assert_eq!(decoder.end(), Err(Error::Truncated));
    assert_eq!(decoder.body(b"", &mut trailers), Ok((0, Piece::More)));
    assert_eq!(decoder.body(b"cdefg", &mut trailers), Ok((3, Piece::Data(b"cde"))));
    assert_eq!(decoder.body(b"fg", &mut trailers), Ok((0, Piece::End)));
    assert_eq!(decoder.body(b"fg", &mut trailers), Ok((0, Piece::End)));
    assert_eq!(decoder.end(), Ok(()));
}
