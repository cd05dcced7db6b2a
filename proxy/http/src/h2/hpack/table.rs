//! The static and the dynamic table (RFC 7541, 2.3 and 4, appendix A).
//!
//! The text of all dynamic entries lies in one buffer, in the order in which they came, so that an entry costs no
//! allocation and a name and its value are slices. Evicted entries leave a gap at the front; the rest moves over it
//! when that is at least half of the buffer, so that a byte moves at most once for each byte that was evicted.

use std::collections::VecDeque;

/// What an entry counts beside its text (4.1).
pub(super) const OVERHEAD: usize = 32;

/// The size of a dynamic table until somebody says otherwise, in bytes (RFC 9113, 6.5.2).
pub(super) const INITIAL: usize = 4096;

/// The least that the buffer of text is given, in bytes: a handful of lines.
const SMALLEST: usize = 256;

/// Appendix A; its first index is 1.
#[rustfmt::skip]
pub(super) static STATIC: [(&[u8], &[u8]); 61] = [
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    (b":status", b"200"),
    (b":status", b"204"),
    (b":status", b"206"),
    (b":status", b"304"),
    (b":status", b"400"),
    (b":status", b"404"),
    (b":status", b"500"),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"accept-language", b""),
    (b"accept-ranges", b""),
    (b"accept", b""),
    (b"access-control-allow-origin", b""),
    (b"age", b""),
    (b"allow", b""),
    (b"authorization", b""),
    (b"cache-control", b""),
    (b"content-disposition", b""),
    (b"content-encoding", b""),
    (b"content-language", b""),
    (b"content-length", b""),
    (b"content-location", b""),
    (b"content-range", b""),
    (b"content-type", b""),
    (b"cookie", b""),
    (b"date", b""),
    (b"etag", b""),
    (b"expect", b""),
    (b"expires", b""),
    (b"from", b""),
    (b"host", b""),
    (b"if-match", b""),
    (b"if-modified-since", b""),
    (b"if-none-match", b""),
    (b"if-range", b""),
    (b"if-unmodified-since", b""),
    (b"last-modified", b""),
    (b"link", b""),
    (b"location", b""),
    (b"max-forwards", b""),
    (b"proxy-authenticate", b""),
    (b"proxy-authorization", b""),
    (b"range", b""),
    (b"referer", b""),
    (b"refresh", b""),
    (b"retry-after", b""),
    (b"server", b""),
    (b"set-cookie", b""),
    (b"strict-transport-security", b""),
    (b"transfer-encoding", b""),
    (b"user-agent", b""),
    (b"vary", b""),
    (b"via", b""),
    (b"www-authenticate", b""),
];

#[derive(Clone, Copy)]
struct Entry {
    /// Where the text begins, counted from the first byte that ever was in the buffer, modulo 2^32.
    start: u32,
    name: u32,
    value: u32,
}

impl Entry {
    fn text(self) -> usize {
        (self.name + self.value) as usize
    }
}

/// The entries that the peer's encoder had us keep.
pub(super) struct DynamicTable {
    /// The oldest first.
    entries: VecDeque<Entry>,
    text: Vec<u8>,
    /// How much of `text` belonged to entries that were evicted.
    gap: usize,
    /// The count, as in [`Entry::start`], of the first byte of `text`.
    base: u32,
    /// Text and overhead of the entries: at most `max`.
    size: usize,
    /// Far below 2^32.
    max: usize,
}

impl DynamicTable {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), text: Vec::new(), gap: 0, base: 0, size: 0, max: INITIAL }
    }

    /// Changes how large it may be (4.3).
    pub(super) fn resize(&mut self, max: usize) {
        self.max = max;
        self.evict(max);
    }

    /// Name and value at an index of both tables (2.3.3).
    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let index = index.checked_sub(1)?;
        if let Some(&line) = STATIC.get(index) {
            return Some(line);
        }
        let age = index - STATIC.len();
        let entry = *self.entries.get(self.entries.len().checked_sub(age + 1)?)?;
        let start = entry.start.wrapping_sub(self.base) as usize;
        Some(self.text[start..start + entry.text()].split_at(entry.name as usize))
    }

    /// Adds an entry in front of the others (4.4). One that is too large empties the table and is not kept.
    pub(super) fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + OVERHEAD;
        let Some(rest) = self.max.checked_sub(size) else { return self.evict(0) };
        self.evict(rest);
        self.reserve(name.len() + value.len());
        let start = self.base.wrapping_add(self.text.len() as u32);
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(value);
        self.entries.push_back(Entry { start, name: name.len() as u32, value: value.len() as u32 });
        self.size += size;
    }

    /// Gives memory back that nothing is in: all of it, if there are no entries.
    pub(super) fn rest(&mut self) {
        self.close_gap();
        self.text.shrink_to_fit();
        self.entries.shrink_to_fit();
    }

    /// Removes the oldest until the size is at most `size`.
    fn evict(&mut self, size: usize) {
        while self.size > size {
            let Some(entry) = self.entries.pop_front() else { return };
            self.size -= entry.text() + OVERHEAD;
            self.gap += entry.text();
        }
    }

    fn close_gap(&mut self) {
        self.text.copy_within(self.gap.., 0);
        self.text.truncate(self.text.len() - self.gap);
        self.base = self.base.wrapping_add(self.gap as u32);
        self.gap = 0;
    }

    /// Makes room for `more` bytes behind the text; the table may then hold as much.
    ///
    /// The buffer never exceeds twice the largest `max`: it grows only while the gap is smaller than the text of the entries, which
    /// together with `more` is at most `max`.
    fn reserve(&mut self, more: usize) {
        if self.text.len() + more <= self.text.capacity() {
            return;
        }
        if self.gap >= self.text.len() / 2 {
            self.close_gap();
        }
        let need = self.text.len() + more;
        if need > self.text.capacity() {
            let target = need.max(self.text.capacity() * 2).max(SMALLEST).min((2 * self.max).max(need));
            self.text.reserve_exact(target - self.text.len());
        }
    }
}

#[cfg(test)]
impl DynamicTable {
    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn memory(&self) -> usize {
        self.text.capacity() + self.entries.capacity() * size_of::<Entry>()
    }
}
