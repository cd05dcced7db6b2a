//! Reads the start line (RFC 9112, 3 and 4) and the field lines of a whole head.
//!
//! The whole head becomes the text of the message's fields; everything else is spans into it.

use super::Error;
use super::lines::{Section, position, read_stored_fields};
use crate::fields::Span;
use crate::head::{RequestHead, ResponseHead, Version};

/// Reads the request in `section`; `input` ends with it.
pub(super) fn read_request(input: &[u8], section: Section, head: &mut RequestHead) -> Result<(), Error> {
    let text = &input[section.start..];
    let (line, fields) = split_start_line(text);
    head.fields.store(text);
    read_stored_fields(&text[fields..], section.lines - 1, position(fields), &mut head.fields)?;

    let mut words = line.splitn(3, |&byte| byte == b' ');
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(Error::Malformed("the request line is not a method, a target and a version"));
    };
    if method.is_empty() || !method.iter().all(|&byte| is_token(byte)) {
        return Err(Error::Malformed("the method is malformed"));
    }
    head.version = read_version(version)?;
    head.method = Span { start: 0, len: position(method.len()) };
    read_target(target, position(method.len() + 1), method, head)
}

/// The four forms of a target (RFC 9112, 3.2). `at` is where it lies in the text.
///
/// Bytes of 0x80 and more are no part of a URI but are sent, and pass. Whether the authority is one and agrees with Host
/// is not decided here.
fn read_target(target: &[u8], at: u32, method: &[u8], head: &mut RequestHead) -> Result<(), Error> {
    if target.iter().any(u8::is_ascii_control) {
        return Err(Error::Malformed("the target has a control character"));
    }
    let whole = Span { start: at, len: position(target.len()) };
    if method == b"CONNECT" {
        if !is_host_and_port(target) {
            return Err(Error::Malformed("the target of a CONNECT is not a host and a port"));
        }
        head.authority = Some(whole);
        return Ok(());
    }
    if target.first() == Some(&b'/') || (target == b"*" && method == b"OPTIONS") {
        head.path = Some(whole);
        return Ok(());
    }
    let scheme = ["http", "https"].into_iter().find(|scheme| {
        target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme.as_bytes()))
            && target[scheme.len()..].starts_with(b"://")
    });
    let Some(scheme) = scheme else {
        return Err(Error::Malformed("the target is neither a path nor an http or https URI"));
    };
    let start = scheme.len() + "://".len();
    let end = target[start..]
        .iter()
        .position(|byte| matches!(byte, b'/' | b'?' | b'#'))
        .map_or(target.len(), |length| start + length);
    let authority = &target[start..end];
    if authority.is_empty() || authority.contains(&b'@') {
        return Err(Error::Malformed("the authority of the target is empty or names a user"));
    }
    let span = |start: usize, end: usize| Span { start: at + position(start), len: position(end - start) };
    head.scheme = Some(span(0, scheme.len()));
    head.authority = Some(span(start, end));
    match target.get(end) {
        None => {}
        Some(b'/') => head.path = Some(span(end, target.len())),
        // A query without a path: the origin form of the same target has the path "/" (RFC 9112, 3.2.1).
        Some(_) => head.set_path(Some(&[b"/", &target[end..]].concat())),
    }
    Ok(())
}

/// `uri-host ":" port` as far as it tells authority form from the others (RFC 9112, 3.2.3; RFC 9110, 9.3.6).
fn is_host_and_port(target: &[u8]) -> bool {
    let Some(colon) = target.iter().rposition(|&byte| byte == b':') else { return false };
    let (host, port) = (&target[..colon], &target[colon + 1..]);
    let port = str::from_utf8(port).ok().filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
    !host.is_empty()
        && !host.iter().any(|byte| matches!(byte, b'/' | b'?' | b'#' | b'@'))
        && port.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

/// Reads the response in `section`; `input` ends with it.
pub(super) fn read_response(input: &[u8], section: Section, head: &mut ResponseHead) -> Result<(), Error> {
    let text = &input[section.start..];
    let (line, fields) = split_start_line(text);
    head.fields.store(text);
    read_stored_fields(&text[fields..], section.lines - 1, position(fields), &mut head.fields)?;

    let mut words = line.splitn(3, |&byte| byte == b' ');
    head.version = read_version(words.next().unwrap_or_default())?;
    head.status = match words.next() {
        Some(&[a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9']) => {
            u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
        }
        _ => return Err(Error::Malformed("the status is not a number from 100 to 999")),
    };
    // The space before an empty reason phrase is required, and often left out.
    let reason = words.next().unwrap_or_default();
    if !reason.iter().all(|&byte| byte == b'\t' || !byte.is_ascii_control()) {
        return Err(Error::Malformed("the reason phrase has a control character"));
    }
    let start = line.len() - reason.len();
    head.reason = Some(Span { start: position(start), len: position(reason.len()) });
    Ok(())
}

/// The start line without its CRLF, and where the field lines start.
fn split_start_line(text: &[u8]) -> (&[u8], usize) {
    let end = memchr::memchr(b'\n', text).expect("a section has at least its start line");
    (&text[..end - 1], end + 1)
}

/// RFC 9112, 2.3: case-sensitive. The minor versions above 1 were never given out.
fn read_version(text: &[u8]) -> Result<Version, Error> {
    match text {
        b"HTTP/1.1" => Ok(Version::Http11),
        b"HTTP/1.0" => Ok(Version::Http10),
        _ => Err(Error::Malformed("the version is neither HTTP/1.0 nor HTTP/1.1")),
    }
}

/// `tchar` (RFC 9110, 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
