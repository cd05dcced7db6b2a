//! What may stand in a head (RFC 9113, 8.2, 8.3 and 8.5; RFC 8441, 4), read line by line as HPACK decodes it.
//!
//! All of it is checked here, before anyone acts: what leaves for an HTTP/1.1 application must not be able to contain
//! another line or another request. Offenders are *malformed* (8.1.1): a stream error.
#![allow(clippy::cast_possible_truncation, reason = "a table of all bytes")]

use super::stream::Asked;
use crate::fields::Fields;
use crate::head::{RequestHead, ResponseHead, Version};

/// A head or trailer section that breaks a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What all sections have in common: ordinary field lines.
struct Section {
    /// Lines that may still come.
    lines: usize,
    /// A line came for which there was no room.
    too_many: bool,
    malformed: bool,
    /// An ordinary line came: pseudo-fields may not follow (8.3).
    ordinary: bool,
    content_length: Option<u64>,
}

impl Section {
    fn new(lines: usize) -> Self {
        Self { lines, too_many: false, malformed: false, ordinary: false, content_length: None }
    }

    fn field(&mut self, fields: &mut Fields, name: &[u8], value: &[u8]) {
        self.ordinary = true;
        if !is_name(name) || !is_value(value) {
            self.malformed = true;
            return;
        }
        match name {
            // 8.2.2: what speaks of the connection has no place here, but TE with the one thing that it can still say.
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
                self.malformed = true;
            }
            b"te" if !value.eq_ignore_ascii_case(b"trailers") => self.malformed = true,
            // Two of them, equal or not, may be refused (RFC 9110, 8.6). One number leaves nothing to disagree about.
            b"content-length" => match (self.content_length, decimal(value)) {
                (None, Some(length)) => self.content_length = Some(length),
                _ => self.malformed = true,
            },
            _ => {}
        }
        match self.lines.checked_sub(1) {
            Some(left) => {
                self.lines = left;
                fields.push(name, value);
            }
            None => self.too_many = true,
        }
    }
}

/// Reads a request's head (8.3.1).
pub(super) struct Request<'a> {
    head: &'a mut RequestHead,
    section: Section,
}

impl<'a> Request<'a> {
    /// Of at most `lines` ordinary lines, into `head`.
    pub(super) fn new(head: &'a mut RequestHead, lines: usize) -> Self {
        head.clear();
        head.version = Version::Http2;
        Self { head, section: Section::new(lines) }
    }

    pub(super) fn line(&mut self, name: &[u8], value: &[u8]) {
        if name.first() != Some(&b':') {
            return self.section.field(&mut self.head.fields, name, value);
        }
        let head = &mut *self.head;
        // Behind an ordinary line, twice, or unknown: all the same.
        let fits = !self.section.ordinary
            && match name {
                b":method" => head.method().is_empty() && is_token(value),
                b":scheme" => head.scheme().is_none() && is_scheme(value),
                b":authority" => head.authority().is_none() && is_authority(value),
                b":path" => head.path().is_none() && is_path(value),
                b":protocol" => head.protocol().is_none() && is_upgrade_token(value),
                _ => false,
            };
        match name {
            _ if !fits => self.section.malformed = true,
            b":method" => head.set_method(value),
            b":scheme" => head.set_scheme(Some(value)),
            b":authority" => head.set_authority(Some(value)),
            b":path" => head.set_path(Some(value)),
            _ => head.set_protocol(Some(value)),
        }
    }

    /// Whether there were more lines than allowed. The rest of the head was not looked at then.
    pub(super) fn is_too_long(&self) -> bool {
        self.section.too_many
    }

    /// The body's length, if the head says it. `extended_connect`: whether we offered it.
    pub(super) fn finish(self, extended_connect: bool) -> Result<Option<u64>, Malformed> {
        let head = &*self.head;
        let has_target = head.scheme().is_some() && head.path().is_some();
        let complete = match (head.method(), head.protocol()) {
            // 8.5: CONNECT has an authority and no other target.
            (b"CONNECT", None) => {
                head.authority().is_some_and(|authority| !authority.is_empty())
                    && head.scheme().is_none()
                    && head.path().is_none()
            }
            // RFC 8441, 4.
            (b"CONNECT", Some(_)) => {
                extended_connect
                    && has_target
                    && head.authority().is_some_and(|authority| !authority.is_empty())
                    && head.path() != Some(b"*")
            }
            (b"", _) | (_, Some(_)) => false,
            (b"OPTIONS", None) => has_target,
            (_, None) => has_target && head.path() != Some(b"*"),
        };
        if self.section.malformed || !complete {
            return Err(Malformed);
        }
        // What follows a CONNECT is no content, whatever the head says of its length (RFC 9110, 9.3.6).
        Ok(self.section.content_length.filter(|_| head.method() != b"CONNECT"))
    }
}

/// Reads a response's head (8.3.2).
pub(super) struct Response<'a> {
    head: &'a mut ResponseHead,
    section: Section,
}

impl<'a> Response<'a> {
    /// Of at most `lines` ordinary lines, into `head`.
    pub(super) fn new(head: &'a mut ResponseHead, lines: usize) -> Self {
        head.clear();
        head.version = Version::Http2;
        Self { head, section: Section::new(lines) }
    }

    pub(super) fn line(&mut self, name: &[u8], value: &[u8]) {
        if name.first() != Some(&b':') {
            return self.section.field(&mut self.head.fields, name, value);
        }
        let first = !self.section.ordinary && self.head.status == 0;
        match status(value) {
            Some(status) if name == b":status" && first => self.head.status = status,
            _ => self.section.malformed = true,
        }
    }

    /// Whether there were more lines than allowed.
    pub(super) fn is_too_long(&self) -> bool {
        self.section.too_many
    }

    /// The body's length, if it is known; 0 where what was asked or the status allows none (RFC 9110, 6.4.1).
    pub(super) fn finish(self, asked: Asked) -> Result<Option<u64>, Malformed> {
        let status = self.head.status;
        // 8.6: there is no 101 in HTTP/2.
        if self.section.malformed || status == 0 || status == 101 {
            return Err(Malformed);
        }
        Ok(match (asked, status) {
            (Asked::Connect, 200..300) => None,
            (Asked::Head, _) | (_, 204 | 304) => Some(0),
            _ => self.section.content_length,
        })
    }
}

/// Reads trailers (8.1): ordinary lines only.
pub(super) struct Trailers<'a> {
    fields: &'a mut Fields,
    section: Section,
}

impl<'a> Trailers<'a> {
    /// Of at most `lines` lines, into `fields`.
    pub(super) fn new(fields: &'a mut Fields, lines: usize) -> Self {
        fields.clear();
        Self { fields, section: Section::new(lines) }
    }

    pub(super) fn line(&mut self, name: &[u8], value: &[u8]) {
        // No name has a colon in it, so pseudo-fields are refused like any bad name.
        self.section.field(self.fields, name, value);
    }

    /// Whether there were more lines than allowed.
    pub(super) fn is_too_long(&self) -> bool {
        self.section.too_many
    }

    pub(super) fn finish(self) -> Result<(), Malformed> {
        if self.section.malformed { Err(Malformed) } else { Ok(()) }
    }
}

/// What a byte may not be part of. A class instead of a yes or no, so that the bytes of a text can be joined by "or"
/// without a branch for each.
const NO_TOKEN: u8 = 1;
const NO_NAME: u8 = 2;

/// The classes of each byte: tokens (RFC 9110, 5.6.2), and names of fields, which are tokens without upper case
/// (8.2.1).
const CLASSES: [u8; 256] = {
    let mut table = [NO_TOKEN | NO_NAME; 256];
    let mut byte = 0;
    // Constant functions know no iterators.
    while byte < 256 {
        if (byte as u8).is_ascii_uppercase() {
            table[byte] = NO_NAME;
        } else if (byte as u8).is_ascii_alphanumeric() {
            table[byte] = 0;
        }
        byte += 1;
    }
    let marks = b"!#$%&'*+-.^_`|~";
    let mut index = 0;
    while index < marks.len() {
        table[marks[index] as usize] = 0;
        index += 1;
    }
    table
};

fn classes(text: &[u8]) -> u8 {
    text.iter().fold(0, |classes, &byte| classes | CLASSES[usize::from(byte)])
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && classes(name) & NO_NAME == 0
}

/// `name ["/" version]`, as the registry of upgrade tokens has it (RFC 9110, 16.7; RFC 8441, 4).
fn is_upgrade_token(value: &[u8]) -> bool {
    value.splitn(2, |&byte| byte == b'/').all(is_token)
}

fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && classes(text) & NO_TOKEN == 0
}

/// 8.2.1: no NUL, CR or LF anywhere, no space or tab at the ends.
fn is_value(value: &[u8]) -> bool {
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let cannot_be = |byte: &u8| matches!(byte, 0 | b'\r' | b'\n');
    if is_blank(value.first()) || is_blank(value.last()) {
        return false;
    }
    // Hardly any value has controls at all, and that is quickly seen.
    !has_control(value) || !value.iter().any(cannot_be)
}

/// Whether a byte is below 0x20; eight bytes at a time.
fn has_control(text: &[u8]) -> bool {
    let (words, rest) = text.as_chunks::<8>();
    // The top bit of a byte is set where subtracting 0x20 borrowed and the byte itself had none. A borrow from a byte
    // below may set it wrongly, but then that byte is one.
    let controls = |bytes: &[u8; 8]| {
        let word = u64::from_ne_bytes(*bytes);
        word.wrapping_sub(0x2020_2020_2020_2020) & !word & 0x8080_8080_8080_8080
    };
    let found = words.iter().fold(0, |found, word| found | controls(word));
    let found = match text.last_chunk::<8>() {
        // The last eight bytes, some of them a second time.
        Some(last) => found | controls(last),
        None => rest.iter().fold(found, |found, &byte| found | u64::from(byte < 0x20)),
    };
    found != 0
}

/// RFC 3986, 3.1. Others than http and https are allowed (8.3.1).
fn is_scheme(scheme: &[u8]) -> bool {
    scheme.first().is_some_and(u8::is_ascii_alphabetic)
        && scheme.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte))
}

/// No user information (8.3.1), and nothing that would end an authority or a line of HTTP/1.1.
fn is_authority(authority: &[u8]) -> bool {
    authority.iter().all(|byte| !matches!(byte, 0..=b' ' | 0x7f | b'@' | b'/' | b'?' | b'#' | b'\\'))
}

/// 8.3.1: a path with its query, or the asterisk of OPTIONS; no blanks or controls, which would end it in HTTP/1.1.
fn is_path(path: &[u8]) -> bool {
    let bad = path.iter().fold(false, |bad, &byte| bad || (byte <= b' ') || (byte == 0x7f));
    !bad && (path.first() == Some(&b'/') || path == b"*")
}

/// Three digits, 100 to 999.
fn status(value: &[u8]) -> Option<u16> {
    let &[a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9'] = value else { return None };
    Some(u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0'))
}

/// Digits only, below 2^64.
fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0_u64, |number, &byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_are_found_wherever_they_stand() {
        for len in 0..40 {
            let mut text = vec![b' '; len];
            assert!(!has_control(&text));
            for at in 0..len {
                for byte in 0..=255 {
                    text[at] = byte;
                    assert_eq!(has_control(&text), byte < 0x20, "{byte} at {at} of {len}");
                }
                text[at] = 0xff;
            }
        }
    }
}
