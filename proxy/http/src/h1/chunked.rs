//! Takes the chunked coding apart (RFC 9112, 7.1).
//!
//! A line of a chunk is read byte by byte and each byte is consumed at once, so nothing is read twice and nothing is kept.
//! Only the trailer section waits until it is whole, like a head.

use super::lines::{Lines, read_fields};
use super::{Error, Limits, Piece, take};
use crate::fields::Fields;

/// Hexadecimal digits of a size: 16 are 64 bits. Zeros in front count, for nobody needs them.
const SIZE_DIGITS: u8 = 16;

/// Bytes that chunk extensions may take over a whole body. They are ignored, so more of them is only work.
const EXTENSION_BYTES: u16 = 16 * 1024;

/// Names that must not come as trailers, because they frame, route or describe the hop (RFC 9110, 6.5.1 and 7.6.1).
const NOT_IN_TRAILERS: [&[u8]; 10] = [
    b"connection",
    b"content-length",
    b"host",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"content-encoding",
];

/// Where in the chunks the input stands.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    at: At,
    /// While a size is read, the size so far; within the data, the bytes left.
    left: u64,
    digits: u8,
    /// Bytes of extensions so far.
    extensions: u16,
}

#[derive(Debug, Default, Clone, Copy)]
enum At {
    #[default]
    Size,
    /// Whitespace between the size and the semicolon, which must follow (RFC 9112, 7.1.1).
    Space,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailers,
}

impl Chunks {
    /// The next piece, and the bytes consumed for it.
    pub(super) fn next<'a>(
        &mut self,
        input: &'a [u8],
        lines: &mut Lines,
        limits: Limits,
        trailers: &mut Fields,
    ) -> Result<(usize, Piece<'a>), Error> {
        for (at, &byte) in input.iter().enumerate() {
            match self.at {
                At::Data => {
                    let (data, left) = take(&input[at..], self.left);
                    self.left = left;
                    if left == 0 {
                        self.at = At::DataCr;
                    }
                    return Ok((at + data.len(), Piece::Data(data)));
                }
                At::Trailers => {
                    let (consumed, piece) = read_trailers(&input[at..], lines, limits, trailers)?;
                    return Ok((at + consumed, piece));
                }
                _ => self.at = self.step(byte)?,
            }
        }
        Ok((input.len(), Piece::More))
    }

    /// One byte of what stands between the data.
    fn step(&mut self, byte: u8) -> Result<At, Error> {
        match (self.at, byte) {
            (At::Size, _) if byte.is_ascii_hexdigit() => self.add_digit(byte),
            (At::Size, b'\r') if self.digits > 0 => Ok(At::SizeLf),
            (At::Size | At::Space, b';') if self.digits > 0 => self.count_extension(At::Extension),
            (At::Size | At::Space, b' ' | b'\t') if self.digits > 0 => self.count_extension(At::Space),
            (At::Extension, b'\r') => Ok(At::SizeLf),
            (At::Extension, _) if byte == b'\t' || !byte.is_ascii_control() => {
                self.count_extension(At::Extension)
            }
            (At::SizeLf, b'\n') => {
                self.digits = 0;
                Ok(if self.left == 0 { At::Trailers } else { At::Data })
            }
            (At::DataCr, b'\r') => Ok(At::DataLf),
            (At::DataLf, b'\n') => Ok(At::Size),
            (At::DataCr | At::DataLf, _) => Err(Error::Malformed("a chunk is not as long as it says")),
            _ => Err(Error::Malformed("the size of a chunk is malformed")),
        }
    }

    fn add_digit(&mut self, digit: u8) -> Result<At, Error> {
        if self.digits == SIZE_DIGITS {
            return Err(Error::Malformed("the size of a chunk is too long"));
        }
        self.digits += 1;
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            _ => (digit | 0x20) - b'a' + 10,
        };
        // Readers that count with signs see another size from 2^63 on.
        if self.left >= 1 << 59 {
            return Err(Error::Malformed("the size of a chunk is too long"));
        }
        self.left = self.left << 4 | u64::from(value);
        Ok(At::Size)
    }

    fn count_extension(&mut self, at: At) -> Result<At, Error> {
        if self.extensions == EXTENSION_BYTES {
            return Err(Error::Malformed("the extensions of the chunks are too long"));
        }
        self.extensions += 1;
        Ok(at)
    }
}

/// The trailer section, once all of it is there (RFC 9112, 7.1.2).
fn read_trailers<'a>(
    input: &[u8],
    lines: &mut Lines,
    limits: Limits,
    trailers: &mut Fields,
) -> Result<(usize, Piece<'a>), Error> {
    let Some(section) = lines.trailers(input, limits)? else { return Ok((0, Piece::More)) };
    *lines = Lines::default();
    if section.lines > 0 {
        read_fields(&input[..section.end], section.lines, trailers)?;
        trailers.retain(|name, _| !NOT_IN_TRAILERS.iter().any(|other| name.eq_ignore_ascii_case(other)));
    }
    Ok((section.end, Piece::End))
}
