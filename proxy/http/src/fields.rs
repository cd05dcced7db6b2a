//! Header and trailer fields: one buffer of text and a span for each line.
//!
//! A map would lose what applications can see: the case of names, the order of lines, and which lines of one name were
//! apart. It would also cost an allocation for each line. Fields are looked up by walking the spans, which for the
//! ten or twenty lines of a real message is faster than hashing one name.

use std::fmt;

/// A piece of the text of a [`Fields`]: where it starts and how long it is, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Span {
    pub(crate) start: u32,
    pub(crate) len: u32,
}

#[derive(Clone, Copy, Debug)]
struct Line {
    name: Span,
    value: Span,
}

/// Field lines in the order in which they came.
///
/// A line that is removed leaves its text in the buffer until [`clear`](Self::clear): messages live for milliseconds.
#[derive(Clone, Default)]
pub struct Fields {
    text: Vec<u8>,
    lines: Vec<Line>,
}

/// What RFC 9113, 6.5.2 (and RFC 7541, 4.1) count for a line beside its text.
pub const LINE_OVERHEAD: usize = 32;

impl Fields {
    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.lines.clear();
    }

    /// Lines.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there are no lines.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Bytes that the buffers hold, used or not: what keeping this for later costs.
    pub fn capacity(&self) -> usize {
        self.text.capacity() + self.lines.capacity() * size_of::<Line>()
    }

    /// The size as RFC 9113, 6.5.2 counts it: names, values and 32 for each line.
    pub fn list_size(&self) -> usize {
        self.lines.iter().map(|line| (line.name.len + line.value.len) as usize + LINE_OVERHEAD).sum()
    }

    /// Appends a line.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the end of the text is checked, and all else is before it"
    )]
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        let start = self.text.len();
        self.text.reserve(name.len() + value.len());
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(value);
        // All parts of what fits fit too: one check for the line, not four.
        u32::try_from(self.text.len()).expect("a head is bounded by its codec");
        let name = Span { start: start as u32, len: name.len() as u32 };
        let value = Span { start: name.start + name.len, len: value.len() as u32 };
        self.lines.push(Line { name, value });
    }

    /// Puts a line before line `at`.
    pub fn insert(&mut self, at: usize, name: &[u8], value: &[u8]) {
        let line = Line { name: self.store(name), value: self.store(value) };
        self.lines.insert(at, line);
    }

    /// The lines: name and value.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&[u8], &[u8])> + ExactSizeIterator {
        self.lines.iter().map(|line| (self.text(line.name), self.text(line.value)))
    }

    /// The value of the first line of this name, whatever its case.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.get_all(name).next()
    }

    /// The values of all lines of this name, whatever their case.
    pub fn get_all(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let name = name.as_bytes();
        self.iter().filter(move |(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// Whether there is a line of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Drops all lines from `lines` on.
    pub fn truncate(&mut self, lines: usize) {
        self.lines.truncate(lines);
    }

    /// Keeps the lines for which `keep` says so.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8]) -> bool) {
        let text = &self.text;
        let of = |span: Span| &text[span.start as usize..(span.start + span.len) as usize];
        self.lines.retain(|line| keep(of(line.name), of(line.value)));
    }

    /// Removes all lines of this name.
    pub fn remove(&mut self, name: &str) {
        self.retain(|other, _| !other.eq_ignore_ascii_case(name.as_bytes()));
    }

    /// Sets the value of the first line of this name where it stands, and removes the others; appends if there is none.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        let Some(at) = self.iter().position(|(other, _)| other.eq_ignore_ascii_case(name.as_bytes())) else {
            return self.push(name.as_bytes(), value);
        };
        let value = self.store(value);
        self.lines[at].value = value;
        let mut index = 0;
        self.retain(|other, _| {
            index += 1;
            index - 1 == at || !other.eq_ignore_ascii_case(name.as_bytes())
        });
    }

    /// The name of line `at`, to change its case.
    pub fn name_mut(&mut self, at: usize) -> &mut [u8] {
        let Span { start, len } = self.lines[at].name;
        &mut self.text[start as usize..(start + len) as usize]
    }

    /// Appends text that lines refer to; messages are bounded far below 4 GiB.
    pub(crate) fn store(&mut self, text: &[u8]) -> Span {
        let start = u32::try_from(self.text.len()).expect("a head is bounded by its codec");
        let len = u32::try_from(text.len()).expect("a head is bounded by its codec");
        self.text.extend_from_slice(text);
        Span { start, len }
    }

    /// Appends a line whose text is stored already.
    pub(crate) fn push_spans(&mut self, name: Span, value: Span) {
        self.lines.push(Line { name, value });
    }

    pub(crate) fn text(&self, span: Span) -> &[u8] {
        &self.text[span.start as usize..(span.start + span.len) as usize]
    }
}

impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| {
                (String::from_utf8_lossy(name).into_owned(), String::from_utf8_lossy(value).into_owned())
            }))
            .finish()
    }
}

impl PartialEq for Fields {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().zip(other.iter()).all(|(a, b)| a == b)
    }
}

impl Eq for Fields {}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(fields: &Fields) -> Vec<(&str, &str)> {
        fields
            .iter()
            .map(|(name, value)| (str::from_utf8(name).unwrap(), str::from_utf8(value).unwrap()))
            .collect()
    }

    #[test]
    fn order_and_case_stay() {
        let mut fields = Fields::default();
        fields.push(b"Set-Cookie", b"a");
        fields.push(b"X-other", b"b");
        fields.push(b"set-cookie", b"c");
        fields.insert(1, b"Host", b"d");
        assert_eq!(
            lines(&fields),
            [("Set-Cookie", "a"), ("Host", "d"), ("X-other", "b"), ("set-cookie", "c")]
        );
        assert_eq!(fields.get_all("SET-COOKIE").collect::<Vec<_>>(), [b"a", b"c"]);
        fields.set("set-cookie", b"new");
        assert_eq!(lines(&fields), [("Set-Cookie", "new"), ("Host", "d"), ("X-other", "b")]);
        fields.set("date", b"today");
        fields.remove("x-OTHER");
        fields.name_mut(0).make_ascii_lowercase();
        assert_eq!(lines(&fields), [("set-cookie", "new"), ("Host", "d"), ("date", "today")]);
        assert_eq!(fields.list_size(), 10 + 3 + 4 + 1 + 4 + 5 + 3 * 32);
    }
}
