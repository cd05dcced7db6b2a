//! Puts messages together (RFC 9112, 2.1 and 7.1).
//!
//! Everything is appended to the caller's buffer, which decides when it becomes a write. Whatever framing the caller names
//! is the only one on the wire: a message never leaves with a length and a transfer coding.

use std::io::Write;

use super::Framing;
use crate::fields::Fields;
use crate::head::{RequestHead, ResponseHead, Version};

/// Appends a request.
///
/// The target is the authority for CONNECT, else the path in origin form; a target without a path is `/`, but `*` for
/// OPTIONS (RFC 9112, 3.2.4). The version is the head's, HTTP/1.1 for a head of HTTP/2 or a chunked body.
/// `host` and `content-length` are ordinary fields; a transfer coding in the fields is replaced by what `framing` says.
pub fn write_request(head: &RequestHead, framing: Framing, out: &mut Vec<u8>) {
    let method = head.method();
    out.extend_from_slice(method);
    out.push(b' ');
    match (head.path(), head.authority()) {
        (_, Some(authority)) if method == b"CONNECT" => out.extend_from_slice(authority),
        (Some(path), _) => out.extend_from_slice(path),
        (None, Some(_)) if method == b"OPTIONS" => out.push(b'*'),
        (None, _) => out.push(b'/'),
    }
    out.push(b' ');
    out.extend_from_slice(version(head.version, framing));
    out.extend_from_slice(b"\r\n");
    write_fields(&head.fields, framing, out);
}

/// Appends a response.
///
/// The version is the head's, HTTP/1.1 for a head of HTTP/2 or a chunked body. The reason phrase is the head's, else the
/// registered one, else empty. Fields are written as for a request.
pub fn write_response(head: &ResponseHead, framing: Framing, out: &mut Vec<u8>) {
    out.extend_from_slice(version(head.version, framing));
    out.push(b' ');
    write_number(out, format_args!("{}", head.status));
    out.push(b' ');
    out.extend_from_slice(head.reason().unwrap_or_else(|| reason_phrase(head.status).as_bytes()));
    out.extend_from_slice(b"\r\n");
    write_fields(&head.fields, framing, out);
}

/// Appends a chunk, and nothing if it has no data: an empty chunk would end the body.
pub fn write_chunk(data: &[u8], out: &mut Vec<u8>) {
    if !data.is_empty() {
        write_number(out, format_args!("{:x}\r\n", data.len()));
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends the chunk that ends the body, and the trailers.
pub fn write_last_chunk(trailers: &Fields, out: &mut Vec<u8>) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter() {
        write_line(name, value, out);
    }
    out.extend_from_slice(b"\r\n");
}

/// HTTP/1.0 knows no chunks, so a chunked message is HTTP/1.1 whatever its head was.
fn version(version: Version, framing: Framing) -> &'static [u8] {
    match version {
        Version::Http10 if framing != Framing::Chunked => b"HTTP/1.0",
        _ => b"HTTP/1.1",
    }
}

fn write_fields(fields: &Fields, framing: Framing, out: &mut Vec<u8>) {
    let has_length = matches!(framing, Framing::Length(_) | Framing::Empty);
    let mut is_told = false;
    for (name, value) in fields.iter() {
        let is_length = name.len() == 14 && name.eq_ignore_ascii_case(b"content-length");
        let is_coding = name.len() == 17 && name.eq_ignore_ascii_case(b"transfer-encoding");
        if is_coding || (is_length && !has_length) {
            continue;
        }
        is_told |= is_length;
        write_line(name, value, out);
    }
    match framing {
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        // HTTP/2 need not name the length of a body; without it here the body would be read as the next message.
        Framing::Length(length) if !is_told => {
            write_number(out, format_args!("Content-Length: {length}\r\n"));
        }
        _ => {}
    }
    out.extend_from_slice(b"\r\n");
}

fn write_line(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    // Both codecs refuse these bytes in what they read, so that no value can become a second line.
    debug_assert!(
        !name.is_empty() && !name.iter().chain(value).any(|byte| matches!(byte, b'\r' | b'\n' | 0))
    );
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn write_number(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a vector takes all bytes");
}

/// The phrases that IANA's registry of status codes names.
pub fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        102 => "Processing",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        207 => "Multi-Status",
        208 => "Already Reported",
        226 => "IM Used",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        305 => "Use Proxy",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        423 => "Locked",
        424 => "Failed Dependency",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        451 => "Unavailable For Legal Reasons",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        506 => "Variant Also Negotiates",
        507 => "Insufficient Storage",
        508 => "Loop Detected",
        511 => "Network Authentication Required",
        _ => "",
    }
}
