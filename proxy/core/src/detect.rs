//! What a connection speaks, by its first bytes.
//!
//! `Opaque` is always a safe answer: the bytes pass unchanged, in order. So every doubt ends there, and it ends at the
//! first byte that proves it, because a client that waits for an answer to what it sent would otherwise wait for us.
//! An answer other than `NeedMore` never changes when more bytes come.
//!
//! HTTP/1 is recognised by its whole request line, not by its method: "OPTIONS " opens HTTP, RTSP, SIP and ICAP
//! alike, "CONNECT " opens NATS, and `GET /` with no version is HTTP/0.9, which no HTTP/1 codec serves. A client
//! cannot be answered before its line is complete, so waiting for the line costs nothing.
//!
//! This is no security boundary: who wants to be taken for opaque can be. What must not pass as opaque is for
//! authorization to refuse.

use crate::headers::is_token_byte;

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detection {
    /// Not decided; ask again with more bytes. If no more come (end of stream, [`INCOMPLETE_TIMEOUT`]): opaque.
    ///
    /// [`INCOMPLETE_TIMEOUT`]: crate::speaks_first::INCOMPLETE_TIMEOUT
    NeedMore,
    /// An HTTP/1.x request line.
    Http1,
    /// The HTTP/2 connection preface.
    Http2,
    /// A TLS record that begins a `ClientHello`.
    Tls,
    /// Anything else.
    Opaque,
}

/// The client's connection preface (RFC 9113, 3.4).
pub const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of a request line that are looked at; from here on only a known method decides. RFC 9112, 3 recommends that
/// at least 8,000 be supported. `detect` never answers `NeedMore` for this many bytes or more.
pub const MAX_REQUEST_LINE: usize = 8 * 1024;

/// Bytes of a method; the longest that IANA lists (UPDATEREDIRECTREF) has 17.
pub const MAX_METHOD: usize = 32;

/// Methods that open no other protocol that we know of: with these even a line beyond [`MAX_REQUEST_LINE`] is HTTP,
/// and the HTTP codec can say that it is too long.
const KNOWN_METHODS: [&[u8]; 7] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"TRACE"];

/// Decides what `bytes`, all that the client has sent so far, begin.
pub fn detect(bytes: &[u8]) -> Detection {
    match bytes.first() {
        None => Detection::NeedMore,
        Some(0x16) => detect_tls(bytes),
        Some(_) if bytes.starts_with(HTTP2_PREFACE) => Detection::Http2,
        Some(_) if HTTP2_PREFACE.starts_with(bytes) => Detection::NeedMore,
        Some(_) => detect_http1(bytes),
    }
}

/// A record header (RFC 8446, 5.1) of type handshake, then the handshake type `client_hello`.
fn detect_tls(bytes: &[u8]) -> Detection {
    let tests: [fn(u8) -> bool; 6] = [
        |kind| kind == 0x16,
        |major| major == 3,
        |minor| minor <= 4,
        // At most 2^14 bytes of plaintext.
        |length_high| length_high <= 0x40,
        |_length_low| true,
        |handshake| handshake == 1,
    ];
    if bytes.iter().zip(tests).any(|(byte, test)| !test(*byte)) {
        Detection::Opaque
    } else if bytes.len() < tests.len() {
        Detection::NeedMore
    } else {
        Detection::Tls
    }
}

/// `method SP target SP HTTP/1.digit [CR] LF` (RFC 9112, 3; the bare LF by 2.2).
fn detect_http1(bytes: &[u8]) -> Detection {
    let bytes = &bytes[..bytes.len().min(MAX_REQUEST_LINE)];
    let Some(method_len) = bytes.iter().position(|byte| !is_token_byte(*byte)) else {
        return if bytes.len() > MAX_METHOD { Detection::Opaque } else { Detection::NeedMore };
    };
    if method_len == 0 || method_len > MAX_METHOD || bytes[method_len] != b' ' {
        return Detection::Opaque;
    }
    let rest = &bytes[method_len + 1..];
    let Some(end) = rest.iter().position(u8::is_ascii_control) else {
        return match bytes.len() {
            MAX_REQUEST_LINE if KNOWN_METHODS.contains(&&bytes[..method_len]) => Detection::Http1,
            MAX_REQUEST_LINE => Detection::Opaque,
            _ => Detection::NeedMore,
        };
    };
    // A target with a space in it is malformed, and yet a request: the HTTP codec refuses it with a reason.
    let is_request_line = match rest[..end].split_last_chunk::<9>() {
        Some((target, [version @ .., minor])) => {
            !target.is_empty() && version == b" HTTP/1." && minor.is_ascii_digit()
        }
        None => false,
    };
    match &rest[end..] {
        [b'\n', ..] | [b'\r', b'\n', ..] if is_request_line => Detection::Http1,
        [b'\r'] if is_request_line && bytes.len() == MAX_REQUEST_LINE => Detection::Http1,
        [b'\r'] if is_request_line => Detection::NeedMore,
        _ => Detection::Opaque,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_complete_is_recognised() {
        let cases: &[(&[u8], Detection)] = &[
            (b"GET / HTTP/1.1\r\n", Detection::Http1),
            (b"GET / HTTP/1.0\n", Detection::Http1),
            (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", Detection::Http1),
            (b"CONNECT a.example:443 HTTP/1.1\r\n", Detection::Http1),
            (b"PROPFIND /dav HTTP/1.1\r\n", Detection::Http1),
            (b"m-search * HTTP/1.1\r\n", Detection::Http1),
            (b"PRINT /x HTTP/1.1\r\n", Detection::Http1),
            (b"GET /a b HTTP/1.1\r\n", Detection::Http1),
            (b"GET /\xc3\xa4 HTTP/1.1\r\n", Detection::Http1),
            (HTTP2_PREFACE, Detection::Http2),
            (b"\x16\x03\x01\x02\x00\x01", Detection::Tls),
            (b"\x16\x03\x03\x02\x00\x01\x00\x01\xfc\x03\x03", Detection::Tls),
            // Other protocols that start like a request.
            (b"OPTIONS rtsp://a/ RTSP/1.0\r\n", Detection::Opaque),
            (b"OPTIONS sip:a@b SIP/2.0\r\n", Detection::Opaque),
            (b"CONNECT {\"verbose\":false}\r\n", Detection::Opaque),
            (b"CONNECT\naccept-version:1.2\n", Detection::Opaque),
            (b"get key\r\n", Detection::Opaque),
            (b"PING\r\n", Detection::Opaque),
            (b"EHLO a\r\n", Detection::Opaque),
            (b"GET /\r\n", Detection::Opaque),
            (b"GET  HTTP/1.1\r\n", Detection::Opaque),
            (b"GET / HTTP/2.0\r\n", Detection::Opaque),
            (b"GET / HTTP/1.1\r\r\n", Detection::Opaque),
            (b"GET /\0 HTTP/1.1\r\n", Detection::Opaque),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Detection::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Detection::Opaque),
            (b"\r\n", Detection::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Detection::Opaque),
            (b"\x16\x03\x01\x02\x00\x02", Detection::Opaque),
            (b"\x16\x04", Detection::Opaque),
            (b"\x80\x2e\x01", Detection::Opaque),
        ];
        for (bytes, expected) in cases {
            assert_eq!(detect(bytes), *expected, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn what_is_incomplete_waits() {
        for bytes in [
            &b""[..],
            b"G",
            b"GET",
            b"GET ",
            b"GET / HTTP/1.1",
            b"GET / HTTP/1.1\r",
            b"PRI",
            b"\x16",
            b"\x16\x03\x01",
        ] {
            assert_eq!(detect(bytes), Detection::NeedMore, "{}", bytes.escape_ascii());
        }
        assert_eq!(detect(&HTTP2_PREFACE[..23]), Detection::NeedMore);
    }

    #[test]
    fn a_line_without_end_is_http_only_by_a_known_method() {
        for (method, expected) in [("GET", Detection::Http1), ("SOURCE", Detection::Opaque)] {
            let line = format!("{method} /{}", "a".repeat(MAX_REQUEST_LINE));
            assert_eq!(detect(&line.as_bytes()[..MAX_REQUEST_LINE - 1]), Detection::NeedMore);
            assert_eq!(detect(&line.as_bytes()[..MAX_REQUEST_LINE]), expected);
            assert_eq!(detect(line.as_bytes()), expected);
        }
        assert_eq!(detect(&[b'a'; MAX_METHOD + 1]), Detection::Opaque);
    }

    /// Bytes that look like something for a while.
    fn plausible() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(&b"GET "[..]),
            Just(&b"PRI * HTTP/2.0\r\n\r\n"[..]),
            Just(&b"SM\r\n\r\n"[..]),
            Just(&b"PURGE "[..]),
            Just(&b"/path"[..]),
            Just(&b" HTTP/1.1"[..]),
            Just(&b"\r"[..]),
            Just(&b"\n"[..]),
            Just(&b"\x16\x03\x01\x01\x00\x01"[..]),
            Just(&[b'x'; 4000][..]),
        ]
        .prop_map(<[u8]>::to_vec);
        let noise = prop::collection::vec(any::<u8>(), 0..4);
        prop::collection::vec(prop_oneof![4 => piece, 1 => noise], 0..8).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn an_answer_never_changes(bytes in plausible()) {
            let whole = detect(&bytes);
            // Around the ends of the pieces and the bound, not all of 30,000 prefixes.
            let lengths = (0..bytes.len()).filter(|len| len % 4000 < 100 || len.abs_diff(MAX_REQUEST_LINE) < 3);
            for len in lengths {
                let early = detect(&bytes[..len]);
                prop_assert!(early == Detection::NeedMore || early == whole, "{len}: {early:?}, then {whole:?}");
            }
            prop_assert!(bytes.len() < MAX_REQUEST_LINE || whole != Detection::NeedMore);
        }

        #[test]
        fn any_method_with_its_line_is_http(method in "[A-Z!#$%&'*+.^_`|~a-z0-9-]{1,32}", target in "[!-~]{1,64}") {
            let line = format!("{method} {target} HTTP/1.1\r\n");
            prop_assert_eq!(detect(line.as_bytes()), Detection::Http1);
        }

        #[test]
        fn noise_is_decided_at_once(first in prop::num::u8::ANY.prop_filter("no token, no TLS", |b| {
            !is_token_byte(*b) && *b != 0x16
        })) {
            prop_assert_eq!(detect(&[first]), Detection::Opaque);
        }
    }
}
