//! HPACK (RFC 7541): how HTTP/2 writes field lines.
//!
//! Decoding is complete, for a peer may use all of it: static and dynamic table, Huffman code, table size updates.
//! Encoding holds no state: a line that the static table has leaves as one byte, every other as a literal whose name
//! is an index where the static table has the name. A dynamic table of our own would save bytes on the wire, but would
//! cost each connection its memory and each line a look-up; the Huffman code would cost each byte. Between two proxies
//! in one data centre bytes are the cheaper good.
//!
//! - [`huffman`]: section 5.2 and appendix B
//! - [`table`]: sections 2.3 and 4, appendix A
//! - [`decode`]: section 6, read
//! - [`encode`]: section 6, written
#![allow(
    clippy::cast_possible_truncation,
    reason = "bits of a window, and lengths within a block, which is bounded"
)]

mod decode;
mod encode;
mod huffman;
mod table;

pub(crate) use decode::{Decoded, Decoder};
pub(crate) use encode::{
    encode_authority, encode_line, encode_method, encode_path, encode_protocol, encode_scheme, encode_status,
};

/// Why a block cannot be decoded. After one the tables of the two sides differ for good: the connection ends with
/// `COMPRESSION_ERROR` (RFC 9113, 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub(crate) enum HpackError {
    /// The block ends within a representation.
    Truncated,
    /// 5.1: an integer above 2^28, or written with more bytes than such a one needs.
    Integer,
    /// 2.3.3: index 0, or one behind the end of the dynamic table.
    Index,
    /// 5.2: the code of the end of the string, or padding that is not the beginning of that code, or is 8 bits long.
    Huffman,
    /// 4.2: a table size update that is not at the beginning of its block.
    LateUpdate,
    /// 6.3: a table size update above what we allow.
    LargeUpdate,
    /// The block goes on far beyond its budget: see [`Decoder::decode`].
    Excess,
}

impl HpackError {
    /// For the debug data of a GOAWAY.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Truncated => "the field block ends within a line",
            Self::Integer => "an integer of the field block is too large",
            Self::Index => "the field block refers to a table entry that does not exist",
            Self::Huffman => "the field block has a string that is no Huffman code",
            Self::LateUpdate => "the field block has a table size update behind a line",
            Self::LargeUpdate => "the field block has a table size update above the limit",
            Self::Excess => "the field block decodes to far more than is allowed",
        }
    }
}
