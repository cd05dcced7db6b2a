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
        [b'\r'] if is_request_line && bytes.len() < MAX_REQUEST_LINE => Detection::NeedMore,
        _ => Detection::Opaque,
    }
}
