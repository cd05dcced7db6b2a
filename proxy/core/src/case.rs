//! The case of field names of HTTP/1.x, carried over a hop that knows lower case only.
//!
//! HTTP/2 writes names in lower case (RFC 9113, 8.2), and some applications of HTTP/1.x read them as they were written.
//! Nearly all heads need one letter: every name in lower case, or every name with a capital after each hyphen. A head
//! that mixes these needs a letter a line, and only names such as `ETag` need to be spelled out.
//!
//! The text is a code for each line, in their order: `l` lower case, `t` a capital first and after each hyphen, or `x`, hexadecimal
//! digits and `.`: a bit for each byte of the name, lowest first, set where it is a capital. The last code also stands for all
//! lines that follow.

/// Bytes of a text, at most: thousands of lines of `t`, or hundreds that are spelled out.
pub const MAX_CASE: usize = 4096;

/// Appends the text for these names; `false` if it would be longer than [`MAX_CASE`], and nothing is appended.
pub fn write_case<'a>(names: impl Iterator<Item = &'a [u8]>, out: &mut Vec<u8>) -> bool {
    let begin = out.len();
    // The last code, and the end of its first repetition in a row: what follows it is cut off at the end.
    let mut last: (usize, usize) = (begin, begin);
    for name in names {
        let at = out.len();
        match style(name) {
            Some(code) => out.push(code),
            None => spell(name, out),
        }
        if at == begin || out[at..] != out[last.0..last.1] {
            last = (at, out.len());
        }
        if out.len() - begin > MAX_CASE {
            out.truncate(begin);
            return false;
        }
    }
    out.truncate(last.1);
    true
}

/// The code of a name that needs no spelling.
fn style(name: &[u8]) -> Option<u8> {
    if !name.iter().any(u8::is_ascii_uppercase) {
        return Some(b'l');
    }
    let mut first = true;
    for byte in name {
        if byte.is_ascii_alphabetic() && byte.is_ascii_uppercase() != first {
            return None;
        }
        first = *byte == b'-';
    }
    Some(b't')
}

fn spell(name: &[u8], out: &mut Vec<u8>) {
    out.push(b'x');
    for four in name.chunks(4) {
        let bits = four.iter().rev().fold(0, |bits, byte| bits << 1 | usize::from(byte.is_ascii_uppercase()));
        out.push(b"0123456789abcdef"[bits]);
    }
    out.push(b'.');
}

/// Reads a text and changes names, one after the other.
pub struct CaseReader<'a> {
    rest: &'a [u8],
    last: &'a [u8],
}

impl<'a> CaseReader<'a> {
    /// Of the text that [`write_case`] made; `None` if it is none.
    pub fn new(text: &'a [u8]) -> Option<Self> {
        let mut rest = text;
        if text.is_empty() || text.len() > MAX_CASE {
            return None;
        }
        while !rest.is_empty() {
            rest = split(rest)?.1;
        }
        Some(Self { rest: text, last: &[] })
    }

    /// Gives the next line's name the case that it had.
    pub fn apply(&mut self, name: &mut [u8]) {
        if let Some((code, rest)) = split(self.rest) {
            (self.last, self.rest) = (code, rest);
        }
        match self.last {
            [b't'] => {
                let mut first = true;
                for byte in name {
                    if first {
                        byte.make_ascii_uppercase();
                    }
                    first = *byte == b'-';
                }
            }
            [b'x', digits @ .., b'.'] => {
                for (four, digit) in name.chunks_mut(4).zip(digits) {
                    let bits = char::from(*digit).to_digit(16).unwrap_or_default();
                    for (at, byte) in four.iter_mut().enumerate() {
                        if bits >> at & 1 == 1 {
                            byte.make_ascii_uppercase();
                        }
                    }
                }
            }
            _ => {}
        }
    }
}

/// The first code and what follows.
fn split(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = match text.first()? {
        b'l' | b't' => 1,
        b'x' => {
            let end = text.iter().position(|byte| *byte == b'.')?;
            let digits = &text[1..end];
            if !digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
                return None;
            }
            end + 1
        }
        _ => return None,
    };
    Some(text.split_at(len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(names: &[&str]) -> String {
        let mut out = Vec::new();
        assert!(write_case(names.iter().map(|name| name.as_bytes()), &mut out));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn common_heads_need_a_letter() {
        assert_eq!(text(&["Host", "User-Agent", "Accept"]), "t");
        assert_eq!(text(&["host", "user-agent", "accept"]), "l");
        assert_eq!(text(&["Host", "x-request-id", "x-b", "Accept", "Accept-Encoding"]), "tllt");
        assert_eq!(text(&["Host", "ETag", "ETag", "DNT"]), "tx3.x3.x7.");
        assert_eq!(text(&[]), "");
    }

    #[test]
    fn what_is_no_text_is_refused() {
        for text in ["", "a", "tx", "x12", "xg.", "t.", "T"] {
            assert!(CaseReader::new(text.as_bytes()).is_none(), "{text}");
        }
        assert!(CaseReader::new(&[b't'; MAX_CASE + 1]).is_none());
    }

    proptest! {
        #[test]
        fn names_come_out_as_they_went_in(names in prop::collection::vec("[A-Za-z0-9_-]{1,20}|[A-Z][a-z]{2,5}(-[A-Z][a-z]{2,4})?", 0..20)) {
            let mut out = Vec::new();
            prop_assert!(write_case(names.iter().map(String::as_bytes), &mut out));
            prop_assert_eq!(out.is_empty(), names.is_empty());
            if names.is_empty() {
                return Ok(());
            }
            let mut reader = CaseReader::new(&out).unwrap();
            for name in &names {
                let mut lower = name.to_ascii_lowercase().into_bytes();
                reader.apply(&mut lower);
                prop_assert_eq!(name.as_bytes(), &lower[..]);
            }
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in prop::collection::vec(any::<u8>(), 0..40), mut name in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(mut reader) = CaseReader::new(&text) {
                reader.apply(&mut name);
                reader.apply(&mut name);
            }
        }
    }
}
