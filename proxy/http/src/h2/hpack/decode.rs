//! Reading blocks of field lines (RFC 7541, 6).

use super::HpackError;
use super::huffman;
use super::table::{DynamicTable, INITIAL, OVERHEAD, STATIC};
use std::ops::Range;

/// How far beyond its budget a block is decoded, in bytes: a fraction of a millisecond of copying.
const EXCESS: usize = 1 << 20;

/// The largest scratch buffer that is kept from one block to the next, in bytes.
const SCRATCH_KEPT: usize = 1024;

/// What a block was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Decoded {
    /// Names, values and 32 for each line (RFC 9113, 6.5.2), in bytes; of all lines, told or not.
    pub(crate) size: usize,
    /// Whether that exceeded the budget, so that some lines were not told.
    pub(crate) truncated: bool,
}

/// One direction's decoder: the dynamic table that the peer's encoder fills.
pub(crate) struct Decoder {
    table: DynamicTable,
    /// The largest size of the table that the peer may ask for.
    limit: usize,
    /// Strings that were Huffman-coded, and names that move within the table.
    scratch: Vec<u8>,
}

impl Decoder {
    /// `table_bytes` is the `SETTINGS_HEADER_TABLE_SIZE` that we send. The peer's encoder starts with 4,096 and may go
    /// on with that until it has read our settings, so less than that is not enforced.
    pub(crate) fn new(table_bytes: usize) -> Self {
        Self { table: DynamicTable::new(), limit: table_bytes.max(INITIAL), scratch: Vec::new() }
    }

    /// Decodes one whole block and calls `line` with name and value of each field, in order.
    ///
    /// When names, values and 32 for each line exceed `budget`, `line` is not called any more, but decoding goes on, as
    /// the dynamic table must follow: the caller can answer the one request and keep the connection. As two bytes of a
    /// block can stand for as much as the table holds, that ends with an error one mebibyte later.
    pub(crate) fn decode(
        &mut self,
        block: &[u8],
        budget: usize,
        line: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<Decoded, HpackError> {
        let decoded = self.lines(block, budget, line);
        if self.scratch.capacity() > SCRATCH_KEPT {
            self.scratch = Vec::new();
        }
        decoded
    }

    /// Gives back what is only kept in order to be fast: to be called when the connection has nothing to do.
    pub(crate) fn rest(&mut self) {
        self.scratch = Vec::new();
        self.table.rest();
    }

    fn lines(
        &mut self,
        block: &[u8],
        budget: usize,
        line: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<Decoded, HpackError> {
        let Self { table, limit, scratch } = self;
        let mut input = Input(block);
        while let Some(0x20..=0x3f) = input.peek() {
            let size = input.integer(5)?;
            if size > *limit {
                return Err(HpackError::LargeUpdate);
            }
            table.resize(size);
        }

        let mut decoded = Decoded::default();
        let mut tell = |name: &[u8], value: &[u8]| {
            decoded.size += name.len() + value.len() + OVERHEAD;
            decoded.truncated = decoded.size > budget;
            if !decoded.truncated {
                line(name, value);
            } else if decoded.size - budget > EXCESS {
                return Err(HpackError::Excess);
            }
            Ok(())
        };
        while let Some(first) = input.peek() {
            // "Never indexed" (6.2.3) differs from "without indexing" only for those that encode the line again.
            let (kept, prefix) = match first {
                0x80.. => {
                    let (name, value) = table.get(input.integer(7)?).ok_or(HpackError::Index)?;
                    tell(name, value)?;
                    continue;
                }
                0x40..=0x7f => (true, 6),
                0x20..=0x3f => return Err(HpackError::LateUpdate),
                0x00..=0x1f => (false, 4),
            };
            scratch.clear();
            let name = match input.integer(prefix)? {
                0 => input.string(scratch)?,
                index => {
                    let (name, _) = table.get(index).ok_or(HpackError::Index)?;
                    if index <= STATIC.len() {
                        Text::Plain(STATIC[index - 1].0)
                    } else {
                        // The entry may have to leave the table to make room for the one that takes its name.
                        scratch.extend_from_slice(name);
                        Text::Scratch(0..name.len())
                    }
                }
            };
            let value = input.string(scratch)?;
            let (name, value) = (name.of(scratch), value.of(scratch));
            tell(name, value)?;
            if kept {
                table.insert(name, value);
            }
        }
        Ok(decoded)
    }
}

/// Where a string is.
enum Text<'a> {
    Plain(&'a [u8]),
    Scratch(Range<usize>),
}

impl<'a> Text<'a> {
    fn of(self, scratch: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Plain(text) => text,
            Self::Scratch(range) => &scratch[range],
        }
    }
}

/// What is left of a block.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    fn byte(&mut self) -> Result<u8, HpackError> {
        let (&byte, rest) = self.0.split_first().ok_or(HpackError::Truncated)?;
        self.0 = rest;
        Ok(byte)
    }

    /// 5.1. More than four bytes behind the first, or 28 bits, is more than any length or index within a block.
    #[inline]
    fn integer(&mut self, prefix: u32) -> Result<usize, HpackError> {
        let mask = (1 << prefix) - 1;
        let mut value = u32::from(self.byte()?) & mask;
        if value == mask {
            for shift in [0, 7, 14, 21, 28] {
                if shift == 28 {
                    return Err(HpackError::Integer);
                }
                let byte = self.byte()?;
                value += u32::from(byte & 0x7f) << shift;
                if byte & 0x80 == 0 {
                    break;
                }
            }
        }
        Ok(value as usize)
    }

    /// 5.2. Text that is Huffman-coded goes behind what is in the scratch buffer.
    #[inline]
    fn string(&mut self, scratch: &mut Vec<u8>) -> Result<Text<'a>, HpackError> {
        let coded = self.peek().is_some_and(|byte| byte & 0x80 != 0);
        let length = self.integer(7)?;
        let (text, rest) = self.0.split_at_checked(length).ok_or(HpackError::Truncated)?;
        self.0 = rest;
        if !coded {
            return Ok(Text::Plain(text));
        }
        let start = scratch.len();
        huffman::decode(text, scratch)?;
        Ok(Text::Scratch(start..scratch.len()))
    }
}

#[cfg(test)]
mod tests;
