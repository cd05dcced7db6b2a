//! Finds the end of a head or of a trailer section (RFC 9112, 2.2 and 5), and reads its field lines.
//!
//! Looking for the end is the only work that is done on an incomplete head, and it goes on where it stopped: a client that
//! sends a byte at a time costs as much as one that sends all at once. On the way everything is refused that would make
//! the extent of a line a matter of opinion: an LF without its CR, and a line that continues the one before it.

use super::{Error, Limits};
use crate::fields::{Fields, Span};

/// Empty lines skipped before a request line. RFC 9112, 2.2 asks for at least one, for old clients that sent one after
/// a body; more than a few is no client but a probe.
const EMPTY_LINES: u8 = 4;

/// Field lines for which the slots are on the stack: 1 KiB, enough for nearly all messages.
const SLOTS: usize = 32;

/// How far a section at the start of the input was looked at. Positions are bytes of the input.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// Where the first line that is not empty starts.
    start: u32,
    /// Where the line starts whose end is not found yet.
    line: u32,
    /// Everything before it was looked at.
    seen: u32,
    /// Lines found, the start line included.
    count: u32,
    /// Empty lines skipped.
    skipped: u8,
}

/// A whole section.
#[derive(Debug, Clone, Copy)]
pub(super) struct Section {
    /// Where its first line starts.
    pub(super) start: usize,
    /// Behind the empty line that ends it.
    pub(super) end: usize,
    /// Its lines, the start line included.
    pub(super) lines: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Response,
    Trailers,
}

impl Lines {
    pub(super) fn request(&mut self, input: &[u8], limits: Limits) -> Result<Option<Section>, Error> {
        self.find_end(input, limits, Kind::Request)
    }

    pub(super) fn response(&mut self, input: &[u8], limits: Limits) -> Result<Option<Section>, Error> {
        self.find_end(input, limits, Kind::Response)
    }

    pub(super) fn trailers(&mut self, input: &[u8], limits: Limits) -> Result<Option<Section>, Error> {
        self.find_end(input, limits, Kind::Trailers)
    }

    /// Whether anything but empty lines was seen.
    pub(super) fn has_begun(&self) -> bool {
        self.seen > self.start
    }

    fn find_end(&mut self, input: &[u8], limits: Limits, kind: Kind) -> Result<Option<Section>, Error> {
        let most = limits.fields.saturating_add(usize::from(kind != Kind::Trailers));
        let bound = input.len().min(limits.head_bytes);
        while let Some(found) =
            memchr::memchr(b'\n', input.get(self.seen as usize..bound).unwrap_or_default())
        {
            let line = self.line as usize;
            let end = self.seen as usize + found + 1;
            if end < 2 || input[end - 2] != b'\r' {
                return Err(Error::Malformed("a line ends without a carriage return"));
            }
            (self.line, self.seen) = (position(end), position(end));
            let is_empty = end - line == 2;
            if is_empty && self.count == 0 && kind != Kind::Trailers {
                self.skip_empty_line(kind)?;
            } else if is_empty {
                return Ok(Some(Section { start: self.start as usize, end, lines: self.count as usize }));
            } else {
                // A continuation of the line before it (obs-fold), or whitespace before the first field: RFC 9112, 2.2, 5.2.
                if matches!(input[line], b' ' | b'\t') {
                    return Err(Error::Malformed("a line begins with whitespace"));
                }
                self.count += 1;
                if self.count as usize > most {
                    return Err(Error::HeadTooLarge);
                }
            }
        }
        self.seen = position(bound);
        if bound < limits.head_bytes {
            return Ok(None);
        }
        Err(match kind {
            Kind::Request if self.count == 0 => Error::TargetTooLong,
            _ => Error::HeadTooLarge,
        })
    }

    fn skip_empty_line(&mut self, kind: Kind) -> Result<(), Error> {
        self.skipped += 1;
        self.start = self.line;
        if kind == Kind::Response || self.skipped > EMPTY_LINES {
            return Err(Error::Malformed("an empty line stands where a start line is due"));
        }
        Ok(())
    }
}

/// Appends the field lines in `section` to `fields`. The text is copied once, as a whole.
///
/// `section` ends with its empty line; it has passed [`Lines`], and so has no bare LF and no folded line.
pub(super) fn read_fields(section: &[u8], lines: usize, fields: &mut Fields) -> Result<(), Error> {
    let text = fields.store(section).start;
    read_stored_fields(section, lines, text, fields)
}

/// The same for a section whose text already lies in `fields`, from `text` on.
pub(super) fn read_stored_fields(
    section: &[u8],
    lines: usize,
    text: u32,
    fields: &mut Fields,
) -> Result<(), Error> {
    let mut few = [httparse::EMPTY_HEADER; SLOTS];
    let mut many = Vec::new();
    let slots = if lines <= SLOTS {
        &mut few[..]
    } else {
        many.resize(lines, httparse::EMPTY_HEADER);
        &mut many[..]
    };
    let parsed = match httparse::parse_headers(section, slots) {
        Ok(httparse::Status::Complete((end, parsed))) if end == section.len() => parsed,
        Err(httparse::Error::HeaderName) => return Err(Error::Malformed("a field name is malformed")),
        Err(httparse::Error::HeaderValue) => return Err(Error::Malformed("a field value is malformed")),
        _ => return Err(Error::Malformed("a field line is malformed")),
    };
    let span = |part: &[u8]| Span {
        start: text + position(part.as_ptr().addr() - section.as_ptr().addr()),
        len: position(part.len()),
    };
    for line in parsed {
        fields.push_spans(span(line.name.as_bytes()), span(line.value));
    }
    Ok(())
}

/// A position in a section, which is bounded by [`Limits`].
pub(super) fn position(at: usize) -> u32 {
    u32::try_from(at).expect("a head is bounded to 1 GiB")
}
