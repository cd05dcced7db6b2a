//! One spelling for each path, so that a rule and the application cannot read the same request differently.
//!
//! Rules that look at paths are worth what the agreement between this proxy and the application is worth. So the path
//! is brought into one form, that form is decided on, and **that form is forwarded**, byte for byte. What cannot be
//! brought into one form without guessing is refused.
//!
//! - Escapes of unreserved characters are decoded, others are written in upper case (RFC 3986, 6.2.2). What must not
//!   stand in a path unescaped (`"<>^|{}` and non-ASCII) is escaped. Nothing is decoded twice: `%252f` stays.
//! - `//` becomes `/`, and then `.` and `..` are resolved (RFC 3986, 5.2.4). A path that climbs above the root is
//!   refused.
//! - `%2f` and `%5c` are what [`EscapedSlashes`] says. A bare `\` is no character of a URI and is a separator to some
//!   servers: it counts as `%5c`, whatever becomes of that.
//! - `;` and what follows it in a segment are parameters to some servers and text to others; they stay. But `..;a` is
//!   `..` to those servers, so it is refused. Rules look at a path without parameters, too: see [`read`].
//! - NUL, other control characters, spaces, `#`, broken escapes, and bytes that are no UTF-8 once decoded (which
//!   overlong forms are not) are refused.
//! - Letters keep their case: where the application folds it, rules must say so.
//!
//! The query is not touched.

use std::borrow::Cow;

use outrigger_api::v1;
use thiserror::Error;

/// What becomes of `%2f` and `%5c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// The request is refused.
    #[default]
    Reject,
    /// They stay, and separate nothing.
    Keep,
    /// Both become `/`.
    Decode,
}

impl EscapedSlashes {
    /// As pushed; what is not set is refused, as is any value that this version does not know.
    pub fn from_wire(wire: v1::access::EscapedSlashes) -> Self {
        match wire {
            v1::access::EscapedSlashes::Unspecified | v1::access::EscapedSlashes::Reject => Self::Reject,
            v1::access::EscapedSlashes::Keep => Self::Keep,
            v1::access::EscapedSlashes::Decode => Self::Decode,
        }
    }
}

/// Why a path has no form that everybody reads alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Fault {
    /// It does not begin with `/`.
    #[error("the path does not begin with /")]
    NotAbsolute,
    /// A control character or a space, escaped or not (a space only bare).
    #[error("the path holds a control character or a space")]
    Control,
    /// `#` is never sent.
    #[error("the path holds a fragment")]
    Fragment,
    /// `%` without two hexadecimal digits.
    #[error("the path holds a % that begins no escape")]
    Escape,
    /// `%2f`, `%5c` or `\`.
    #[error("the path holds an escaped slash or a backslash")]
    Slash,
    /// What is decoded is no UTF-8.
    #[error("the path is no UTF-8")]
    NotUtf8,
    /// More `..` than there are segments.
    #[error("the path leads above the root")]
    AboveRoot,
    /// `.` or `..` with parameters.
    #[error("the path holds a dot segment with parameters")]
    DotParameters,
}

/// Brings a request's target, with or without a query, into the one form. Bringing it there twice changes nothing more.
/// `*` and the empty target of CONNECT are such forms.
pub fn normalise(target: &[u8], slashes: EscapedSlashes) -> Result<Cow<'_, [u8]>, Fault> {
    if target.is_empty() || target == b"*" {
        return Ok(Cow::Borrowed(target));
    }
    let (path, query) = target.split_at(memchr::memchr(b'?', target).unwrap_or(target.len()));
    if path.first() != Some(&b'/') {
        return Err(Fault::NotAbsolute);
    }
    if !is_plain_query(query) {
        for byte in query {
            check(*byte)?;
        }
    }
    if is_plain(path) {
        return Ok(Cow::Borrowed(target));
    }
    let mut normal = resolve(&decode(path, slashes)?)?;
    normal.extend_from_slice(query);
    Ok(if normal == target { Cow::Borrowed(target) } else { Cow::Owned(normal) })
}

/// A path in the one form as an application reads it that decodes every escape and drops parameters: `/a%3Ab;x/c` is
/// `/a:b/c`. A segment of nothing but parameters leaves an empty one, which such applications drop: `/;x/a` is `/a`. Not a
/// form to forward: the difference between a separator and an escaped one stays, others are lost.
pub(crate) fn read(normal: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr2(b'%', b';', normal).is_none() {
        return Cow::Borrowed(normal);
    }
    let mut out = Vec::with_capacity(normal.len());
    let mut in_parameters = false;
    let mut rest = normal;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        let mut text = *first;
        if text == b'%'
            && let Some(escaped) = escaped(after)
            && !matches!(escaped, b'/' | b'\\' | b'%')
        {
            rest = &after[2..];
            text = escaped;
        }
        in_parameters = match text {
            b'/' => false,
            b';' => true,
            _ => in_parameters,
        };
        let is_empty_segment = text == b'/' && out.last() == Some(&b'/');
        if !in_parameters && !is_empty_segment {
            out.push(text);
        }
    }
    Cow::Owned(out)
}

/// RFC 3986, 2.3.
const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// What stands in a path as itself: RFC 3986, 3.3 (`pchar`), and `/`.
const fn is_path(byte: u8) -> bool {
    is_unreserved(byte)
        || matches!(
            byte,
            b'/' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' | b':' | b'@'
        )
}

/// What [`is_plain`] asks of each byte of each request.
const CLASS: [u8; 256] = {
    let mut table = [UNFIT | UNFIT_FOR_PATH; 256];
    let mut byte = 0;
    while byte < 128_u8 {
        table[byte as usize] = match byte {
            b'/' => SLASH | SLASH_OR_DOT,
            b'.' => SLASH_OR_DOT,
            _ if is_path(byte) => 0,
            b'?' | b'%' => UNFIT_FOR_PATH,
            _ => UNFIT | UNFIT_FOR_PATH,
        };
        byte += 1;
    }
    table
};
/// A query may hold it only after a look.
const UNFIT: u8 = 1;
/// A path may.
const UNFIT_FOR_PATH: u8 = 2;
const SLASH: u8 = 4;
/// What makes a segment that is none, after a slash.
const SLASH_OR_DOT: u8 = 8;

fn check(byte: u8) -> Result<(), Fault> {
    match byte {
        b'#' => Err(Fault::Fragment),
        b' ' | 0..=0x1f | 0x7f => Err(Fault::Control),
        _ => Ok(()),
    }
}

/// Whether there is certainly nothing to do: by far the most paths. No branch for a byte, because each request pays for each.
fn is_plain(path: &[u8]) -> bool {
    let (mut seen, mut before) = (0, 0);
    for byte in path {
        let class = CLASS[usize::from(*byte)];
        // A slash before moves to where the slash or dot after it stands.
        seen |= (class & UNFIT_FOR_PATH) | (before << 1 & class & SLASH_OR_DOT);
        before = class & SLASH;
    }
    seen == 0
}

/// The same of a query.
fn is_plain_query(query: &[u8]) -> bool {
    query.iter().fold(0, |seen, byte| seen | CLASS[usize::from(*byte)]) & UNFIT == 0
}

/// The byte that two hexadecimal digits at the beginning of `rest` stand for.
fn escaped(rest: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*rest.get(at)?).to_digit(16);
    u8::try_from(digit(0)? << 4 | digit(1)?).ok()
}

/// The path with each of its characters in its one spelling.
fn decode(path: &[u8], slashes: EscapedSlashes) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::with_capacity(path.len());
    // What it says: text that must be UTF-8.
    let mut text = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        let is_escape = *first == b'%';
        let byte = if is_escape { escaped(after).ok_or(Fault::Escape)? } else { *first };
        rest = if is_escape { &after[2..] } else { after };
        text.push(byte);
        let is_slash = byte == b'\\' || (is_escape && byte == b'/');
        match byte {
            _ if is_slash && slashes == EscapedSlashes::Reject => return Err(Fault::Slash),
            _ if is_slash && slashes == EscapedSlashes::Decode => out.push(b'/'),
            0..=0x1f | 0x7f => return Err(Fault::Control),
            _ if !is_escape && is_path(byte) => out.push(byte),
            _ if is_escape && is_unreserved(byte) => out.push(byte),
            _ => {
                if !is_escape {
                    check(byte)?;
                }
                out.push(b'%');
                out.extend([byte >> 4, byte & 15].map(|digit| b"0123456789ABCDEF"[usize::from(digit)]));
            }
        }
    }
    if std::str::from_utf8(&text).is_err() {
        return Err(Fault::NotUtf8);
    }
    Ok(out)
}

/// The path without empty and dot segments.
fn resolve(path: &[u8]) -> Result<Vec<u8>, Fault> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    let mut ends_in_slash = false;
    for segment in path.split(|byte| *byte == b'/') {
        // A segment that is dropped leaves the slash before it: `/a/.` and `/a/b/..` are `/a/`.
        ends_in_slash = true;
        match segment {
            b"" | b"." => {}
            b".." => {
                let parent = out.iter().rposition(|byte| *byte == b'/').ok_or(Fault::AboveRoot)?;
                out.truncate(parent);
            }
            _ if is_dots_with_parameters(segment) => return Err(Fault::DotParameters),
            _ => {
                out.push(b'/');
                out.extend_from_slice(segment);
                ends_in_slash = false;
            }
        }
    }
    if ends_in_slash {
        out.push(b'/');
    }
    Ok(out)
}

/// Some servers decode before they look for parameters.
fn is_dots_with_parameters(segment: &[u8]) -> bool {
    segment.strip_prefix(b".").is_some_and(|rest| {
        let rest = rest.strip_prefix(b".").unwrap_or(rest);
        rest.starts_with(b";") || rest.starts_with(b"%3B")
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REJECT: EscapedSlashes = EscapedSlashes::Reject;
    const KEEP: EscapedSlashes = EscapedSlashes::Keep;
    const DECODE: EscapedSlashes = EscapedSlashes::Decode;

    #[test]
    fn every_spelling_of_a_path_becomes_the_same() {
        for spelling in [
            "/admin",
            "//admin",
            "/./admin",
            "/x/../admin",
            "/%61dmin",
            "/%61%64%6D%69%6e",
            "/x/%2e%2E/admin",
            "/a;/../admin",
            "///x//..//admin",
            "/x/./.././admin",
        ] {
            assert_eq!(&*normalise(spelling.as_bytes(), REJECT).unwrap(), b"/admin", "{spelling}");
        }
        for spelling in ["/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/a%2f%5C..\\b/../b", "/x%2f..%2fa/b"] {
            assert_eq!(normalise(spelling.as_bytes(), REJECT), Err(Fault::Slash), "{spelling}");
            assert_ne!(&*normalise(spelling.as_bytes(), KEEP).unwrap(), b"/a/b", "{spelling}");
        }
        for spelling in ["/a%2fb", "/a%5cb", "/a\\b", "/x%2f..%2fa/b", "\\a"] {
            let decoded = normalise(spelling.as_bytes(), DECODE);
            if spelling.starts_with('/') {
                assert_eq!(&*decoded.unwrap(), b"/a/b", "{spelling}");
            } else {
                assert_eq!(decoded, Err(Fault::NotAbsolute), "{spelling}");
            }
        }
    }

    #[test]
    fn forms_are_these() {
        for (target, form) in [
            ("/", "/"),
            ("*", "*"),
            ("", ""),
            ("/a/", "/a/"),
            ("/a/.", "/a/"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/b/../", "/a/"),
            ("/a//", "/a/"),
            ("/.a/..b/...", "/.a/..b/..."),
            ("/ADMIN", "/ADMIN"),
            ("/admin?", "/admin?"),
            ("/a//b?c=//d/../%2f%zz;\\", "/a/b?c=//d/../%2f%zz;\\"),
            ("/%252f%252e", "/%252f%252e"),
            ("/a%3ab", "/a%3Ab"),
            ("/a%3fb", "/a%3Fb"),
            ("/{a}|\"<>^`", "/%7Ba%7D%7C%22%3C%3E%5E%60"),
            ("/é%c3%a9", "/%C3%A9%C3%A9"),
            ("/a;b=c/d", "/a;b=c/d"),
            ("/a%20b", "/a%20b"),
        ] {
            assert_eq!(normalise(target.as_bytes(), REJECT).as_deref(), Ok(form.as_bytes()), "{target}");
        }
        assert_eq!(&*normalise(b"/a%2fb\\c%5c", KEEP).unwrap(), b"/a%2Fb%5Cc%5C");
        assert!(
            matches!(normalise(b"/a/b.c;d?e", REJECT), Ok(Cow::Borrowed(_))),
            "the common path costs nothing"
        );
    }

    #[test]
    fn what_has_no_one_form_is_refused() {
        for (target, fault) in [
            (&b"admin"[..], Fault::NotAbsolute),
            (b"?a", Fault::NotAbsolute),
            (b"**", Fault::NotAbsolute),
            (b"/admin%00", Fault::Control),
            (b"/admin%0a", Fault::Control),
            (b"/admin%7f", Fault::Control),
            (b"/admin\x00", Fault::Control),
            (b"/ad min", Fault::Control),
            (b"/a?b c", Fault::Control),
            (b"/a?b\r\n", Fault::Control),
            (b"/admin#f", Fault::Fragment),
            (b"/a?b#f", Fault::Fragment),
            (b"/%", Fault::Escape),
            (b"/%4", Fault::Escape),
            (b"/%zz", Fault::Escape),
            (b"/%+1", Fault::Escape),
            (b"/%c0%af", Fault::NotUtf8),
            (b"/%c0%ae%c0%ae/", Fault::NotUtf8),
            (b"/%e9", Fault::NotUtf8),
            (b"/\xff", Fault::NotUtf8),
            (b"/..", Fault::AboveRoot),
            (b"/a/../../b", Fault::AboveRoot),
            (b"/%2e%2e/", Fault::AboveRoot),
            (b"/a/..;/b", Fault::DotParameters),
            (b"/a/.;x=y/b", Fault::DotParameters),
            (b"/a/%2e.;b", Fault::DotParameters),
            (b"/a/..%3bb", Fault::DotParameters),
        ] {
            assert_eq!(normalise(target, REJECT), Err(fault), "{}", String::from_utf8_lossy(target));
            assert!(!fault.to_string().is_empty());
        }
        assert_eq!(normalise(b"/a%2f..%2f..%2f..", DECODE), Err(Fault::AboveRoot));
    }

    #[test]
    fn applications_read_more_into_a_path() {
        for (normal, reading) in [
            ("/a/b", "/a/b"),
            ("/a;x=y/b;", "/a/b"),
            ("/a%3Ab%3Bx/c", "/a:b/c"),
            ("/a%2Fb%5C%252F", "/a%2Fb%5C%252F"),
            ("/;x/a/%3By;z/b/;c", "/a/b/"),
            ("/%C3%A9%20", "/é "),
        ] {
            assert_eq!(&*read(normal.as_bytes()), reading.as_bytes(), "{normal}");
        }
    }

    fn anything() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            8 => prop::sample::select(vec![
                "/", "//", ".", "..", "a", "%2e", "%2F", "%5c", "\\", ";", "%61", "%3b", "%25", "%c3%a9", "é", "%41", "~", "{",
            ]).prop_map(|text: &str| text.as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 1..3),
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| [b"/".to_vec(), pieces.concat()].concat())
    }

    proptest! {
        #[test]
        fn a_form_is_its_own_form(target in anything(), slashes in prop::sample::select(vec![REJECT, KEEP, DECODE])) {
            let Ok(form) = normalise(&target, slashes) else { return Ok(()) };
            let again = normalise(&form, slashes);
            prop_assert_eq!(again.as_deref(), Ok(&*form));
            // No reader finds anything more to resolve in it.
            let path = form.split(|byte| *byte == b'?').next().unwrap_or_default();
            let segments: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
            for (at, segment) in segments.iter().enumerate() {
                let bare = segment.split(|byte| *byte == b';').next().unwrap_or_default();
                prop_assert!(bare != b"." && bare != b"..", "{:?}", String::from_utf8_lossy(&form));
                prop_assert!(!segment.is_empty() || at == 0 || at == segments.len() - 1);
                prop_assert!(!segment.contains(&b'\\'));
            }
            prop_assert!(path.iter().all(|byte| is_path(*byte) || *byte == b'%'));
        }

        #[test]
        fn an_escape_of_any_unreserved_byte_changes_nothing(path in "/[a-z./~_-]{0,12}", at in any::<prop::sample::Index>()) {
            let at = at.index(path.len());
            let byte = path.as_bytes()[at];
            let escaped = [&path.as_bytes()[..at], format!("%{byte:02x}").as_bytes(), &path.as_bytes()[at + 1..]].concat();
            if byte != b'/' {
                prop_assert_eq!(normalise(path.as_bytes(), REJECT), normalise(&escaped, REJECT));
            }
        }

        #[test]
        fn bytes_never_panic(target in prop::collection::vec(any::<u8>(), 0..40)) {
            for slashes in [REJECT, KEEP, DECODE] {
                if let Ok(form) = normalise(&target, slashes) {
                    read(&form);
                }
            }
        }
    }
}
