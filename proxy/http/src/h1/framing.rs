//! Decides where the body of a message ends (RFC 9112, 6) and whether the connection stays (RFC 9112, 9.3).
//!
//! The fields that decide are read in one walk. Whatever is left of them afterwards says what was decided: several equal
//! lengths become one line, and a length that counts for nothing where a body cannot be leaves.

use super::{Asked, Error, Framing};
use crate::fields::Fields;
use crate::head::{RequestHead, ResponseHead, Version};

/// What the fields of a message say about its extent.
#[derive(Default)]
struct Told {
    length: Option<u64>,
    /// The length is not written as one line of plain digits.
    is_odd: bool,
    chunked: bool,
    close: bool,
    keep_alive: bool,
}

/// Where the body of a request ends, and whether the connection stays.
pub(super) fn of_request(head: &mut RequestHead) -> Result<(Framing, bool), Error> {
    let told = read(&mut head.fields, head.version)?;
    if head.method() == b"CONNECT" && (told.chunked || told.length.is_some_and(|length| length > 0)) {
        // What follows is the tunnel's or the body's, and only the answer tells (RFC 9110, 9.3.6).
        return Err(Error::Malformed("a CONNECT has a body"));
    }
    let framing = match told.length {
        _ if told.chunked => Framing::Chunked,
        Some(length) => Framing::Length(length),
        None => Framing::Empty,
    };
    Ok((framing, told.stays(head.version)))
}

/// Where the body of a response ends (the cases in the order of RFC 9112, 6.3), and whether the connection stays.
pub(super) fn of_response(head: &mut ResponseHead, asked: Asked) -> Result<(Framing, bool), Error> {
    let told = read(&mut head.fields, head.version)?;
    let stays = told.stays(head.version);
    match head.status {
        101 if !asked.upgrade => {
            return Err(Error::Malformed("the protocol is switched though nobody asked"));
        }
        101 => return Ok((Framing::Tunnel, false)),
        200..300 if asked.connect => return Ok((Framing::Tunnel, false)),
        100..200 | 204 => {
            // A sender that frames a body where none can be may send it, too: nothing behind it can be trusted.
            let has_body = told.chunked || told.length.is_some_and(|length| length > 0);
            if has_body {
                head.fields.remove("content-length");
            }
            return Ok((Framing::Empty, stays && !has_body));
        }
        304 => return Ok((Framing::Empty, stays)),
        _ if asked.head => return Ok((Framing::Empty, stays)),
        _ => {}
    }
    Ok(match told.length {
        _ if told.chunked => (Framing::Chunked, stays),
        Some(length) => (Framing::Length(length), stays),
        None => (Framing::UntilClose, false),
    })
}

impl Told {
    fn stays(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep_alive)
    }
}

fn read(fields: &mut Fields, version: Version) -> Result<Told, Error> {
    let mut told = Told::default();
    for (name, value) in fields.iter() {
        // Most names are not of these lengths: this is cheaper than three comparisons for each line.
        match name.len() {
            10 if name.eq_ignore_ascii_case(b"connection") => told.read_connection(value),
            14 if name.eq_ignore_ascii_case(b"content-length") => told.read_length(value)?,
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => told.read_coding(value, version)?,
            _ => {}
        }
    }
    if let Some(length) = told.length {
        if told.chunked {
            return Err(Error::Malformed("there is both a content length and a transfer coding"));
        }
        if told.is_odd {
            fields.set("content-length", length.to_string().as_bytes());
        }
    }
    Ok(told)
}

impl Told {
    fn read_connection(&mut self, value: &[u8]) {
        for option in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
            self.close |= option.eq_ignore_ascii_case(b"close");
            self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }

    /// RFC 9110, 8.6: a list of equal lengths may be read as one. RFC 9112, 6.3: anything else is an attack.
    fn read_length(&mut self, value: &[u8]) -> Result<(), Error> {
        for element in value.split(|&byte| byte == b',') {
            let digits = trim(element);
            let length = read_decimal(digits).ok_or(Error::Malformed("the content length is malformed"))?;
            self.is_odd |= self.length.is_some() || (digits[0] == b'0' && digits.len() > 1);
            if self.length.is_some_and(|other| other != length) {
                return Err(Error::Malformed("there are two content lengths"));
            }
            self.length = Some(length);
        }
        Ok(())
    }

    /// RFC 9112, 6.1 and 7 know more codings than `chunked`. Nobody uses them, and each is a way to disagree.
    fn read_coding(&mut self, value: &[u8], version: Version) -> Result<(), Error> {
        if version == Version::Http10 {
            return Err(Error::Malformed("a transfer coding in HTTP/1.0"));
        }
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Error::Malformed("the transfer coding is not chunked, once"));
        }
        self.chunked = true;
        Ok(())
    }
}

/// Without optional whitespace, which is spaces and tabs only.
fn trim(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}

/// Digits only, at least one, and no overflow.
fn read_decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |sum, digit| match digit {
        b'0'..=b'9' => sum.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}
