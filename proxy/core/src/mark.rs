//! The field `outrigger-h1`: what HTTP/2 has no place for in a head of HTTP/1.x.
//!
//! Between sidecars HTTP/1.x travels as HTTP/2. A request with the mark must leave as HTTP/1.x, with its names in the case in which
//! they were written; a response has it where the request had. On the wire:
//!
//! ```text
//! request   = version [ "; method=" token ] [ "; case=" case ]
//! response  = version [ "; status=" 3DIGIT ] [ "; case=" case ] [ "; reason=" phrase ]
//! version   = "1.0" / "1.1"
//! ```
//!
//! `method` is that of a request to upgrade, which travels as extended CONNECT; `status` the real one of an answer whose
//! own would read as a switch; `case` as [`crate::case`] has it, for all lines but this one; `phrase` the reason phrase where
//! it is not the registered one, with `%XX` for all but visible ASCII without `%`, and for spaces.
//! Nothing else is accepted: the field comes from a sidecar or from an attacker.

use crate::{case::CaseReader, detect::MAX_METHOD, headers::is_token};

/// Bytes of a reason phrase that are carried; nobody reads more.
pub const MAX_REASON_PHRASE: usize = 256;

/// A field `outrigger-h1`, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct H1Mark<'a> {
    /// HTTP/1.0, not 1.1.
    pub is_http10: bool,
    /// The method of a request to upgrade: a token, not CONNECT.
    pub method: Option<&'a [u8]>,
    /// The real status of a response.
    pub status: Option<u16>,
    /// The case of the names.
    pub case: Option<&'a [u8]>,
    /// The reason phrase, as it is carried.
    pub reason: Option<&'a [u8]>,
}

impl<'a> H1Mark<'a> {
    /// Reads a request's; `None`: malformed.
    pub fn request(value: &'a [u8]) -> Option<Self> {
        Self::parse(value).filter(|mark| mark.status.is_none() && mark.reason.is_none())
    }

    /// Reads a response's; `None`: malformed.
    pub fn response(value: &'a [u8]) -> Option<Self> {
        Self::parse(value).filter(|mark| mark.method.is_none())
    }

    fn parse(value: &'a [u8]) -> Option<Self> {
        let (version, mut rest) = value.split_at_checked(3)?;
        let mut mark = Self { is_http10: version == b"1.0", ..Self::default() };
        if !mark.is_http10 && version != b"1.1" {
            return None;
        }
        // Each at most once, in this order.
        for (name, at) in [("; method=", 0), ("; status=", 1), ("; case=", 2), ("; reason=", 3)] {
            let Some(text) = rest.strip_prefix(name.as_bytes()) else { continue };
            let end = text.iter().position(|byte| *byte == b';').unwrap_or(text.len());
            let (text, after) = text.split_at(end);
            rest = after;
            match at {
                // CONNECT opens a tunnel of its own and has no use for an upgrade.
                0 if is_token(text) && text.len() <= MAX_METHOD && text != b"CONNECT" => {
                    mark.method = Some(text);
                }
                1 => {
                    let [a @ b'2'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9'] = text else { return None };
                    let digit = |byte: &u8| u16::from(byte - b'0');
                    mark.status = Some(digit(a) * 100 + digit(b) * 10 + digit(c));
                }
                2 if CaseReader::new(text).is_some() => mark.case = Some(text),
                3 if is_phrase(text) => mark.reason = Some(text),
                _ => return None,
            }
        }
        rest.is_empty().then_some(mark)
    }
}

/// Whether this is a phrase as it is carried.
fn is_phrase(text: &[u8]) -> bool {
    text.len() <= 3 * MAX_REASON_PHRASE && text.iter().all(u8::is_ascii_graphic) && unescape(text).is_some()
}

/// Appends a reason phrase as it is carried; `false` if it is too long, and nothing is appended.
pub fn write_reason(phrase: &[u8], out: &mut Vec<u8>) -> bool {
    if phrase.len() > MAX_REASON_PHRASE {
        return false;
    }
    for byte in phrase {
        if byte.is_ascii_graphic() && !matches!(byte, b'%' | b';') {
            out.push(*byte);
        } else {
            let digit = |four: u8| b"0123456789ABCDEF"[usize::from(four)];
            out.extend([b'%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    true
}

/// The reason phrase of a mark. What no head of HTTP/1.1 can hold (RFC 9112, 4) is left out.
pub fn read_reason(text: &[u8]) -> Vec<u8> {
    let mut phrase = unescape(text).unwrap_or_default();
    phrase.retain(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..));
    phrase
}

fn unescape(mut text: &[u8]) -> Option<Vec<u8>> {
    let mut phrase = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        text = match (first, rest) {
            (b'%', [high, low, rest @ ..]) => {
                let digit = |digit: u8| char::from(digit).to_digit(16);
                phrase.push(u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()?);
                rest
            }
            (b'%', _) => return None,
            (byte, rest) => {
                phrase.push(*byte);
                rest
            }
        };
    }
    Some(phrase)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mark_is_read_strictly() {
        let plain = H1Mark::default();
        assert_eq!(H1Mark::request(b"1.1"), Some(plain));
        assert_eq!(H1Mark::request(b"1.0"), Some(H1Mark { is_http10: true, ..plain }));
        let upgrade = H1Mark { method: Some(b"GET"), case: Some(b"tl"), ..plain };
        assert_eq!(H1Mark::request(b"1.1; method=GET; case=tl"), Some(upgrade));
        let answer = H1Mark { status: Some(200), reason: Some(b"Fine%20indeed"), ..plain };
        assert_eq!(H1Mark::response(b"1.1; status=200; reason=Fine%20indeed"), Some(answer));
        for value in [
            "",
            "1",
            "1.2",
            "1.1;method=GET",
            "1.1; method=",
            "1.1; method=CONNECT",
            "1.1 ",
            "1.1; method=A B",
            "1.1; case=tl; method=GET",
            "1.1; case=",
            "1.1; case=q",
            "1.1; case=t; case=t",
            "1.1; status=099",
            "1.1; reason=a b",
            "1.1; reason=%2",
            "1.1; other=1",
        ] {
            assert_eq!(H1Mark::parse(value.as_bytes()), None, "{value:?}");
        }
        assert_eq!(H1Mark::request(b"1.1; status=200"), None);
        assert_eq!(H1Mark::response(b"1.1; method=GET"), None);
    }

    proptest! {
        #[test]
        fn a_reason_comes_out_as_it_went_in(phrase in prop::collection::vec(prop_oneof![Just(b'\t'), b' '..=b'~', 0x80_u8..], 0..100)) {
            let mut value = b"1.1; reason=".to_vec();
            prop_assert!(write_reason(&phrase, &mut value));
            let mark = H1Mark::response(&value).unwrap();
            prop_assert_eq!(read_reason(mark.reason.unwrap()), phrase);
        }

        #[test]
        fn any_value_is_read_without_a_panic(value in "1\\.[01](; (method|status|case|reason)=[!-~]{0,6}){0,4}") {
            H1Mark::parse(value.as_bytes());
        }
    }
}
