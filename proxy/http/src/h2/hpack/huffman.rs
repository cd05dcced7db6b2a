//! The Huffman code of strings (RFC 7541, 5.2 and appendix B).
//!
//! The code of appendix B is canonical: the codes of one length are consecutive numbers in the order of their symbols,
//! and each length goes on where the one before it ended. So the lengths alone say it all, and every table here is
//! computed from them at compile time. Codes of up to eight bits, which is what almost all text consists of, are found
//! by one look at the next byte; longer ones by comparing with where each length begins. A table of states by bytes
//! would be 256 KiB, one by half bytes would take two dependent loads for most symbols.

use super::HpackError;

/// The symbol that ends a string; it never stands in one.
const END: u16 = 256;

/// The longest code, in bits.
const LONGEST: usize = 30;

/// Bits of each symbol's code, the last one being [`END`]'s.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// The codes of one length.
#[derive(Clone, Copy)]
struct Level {
    /// The first of them.
    first: u32,
    /// Where its symbol stands in [`Code::symbols`].
    at: u16,
    count: u16,
}

struct Code {
    /// By length in bits.
    levels: [Level; LONGEST + 1],
    /// All symbols in the order of their codes.
    symbols: [u16; 257],
}

static CODE: Code = code();

const fn code() -> Code {
    let mut levels = [Level { first: 0, at: 0, count: 0 }; LONGEST + 1];
    let mut symbols = [0; 257];
    let (mut next, mut at, mut length) = (0, 0, 1);
    while length <= LONGEST {
        next <<= 1;
        levels[length] = Level { first: next, at, count: 0 };
        let mut symbol = 0;
        while symbol <= END {
            if LENGTHS[symbol as usize] as usize == length {
                symbols[at as usize] = symbol;
                levels[length].count += 1;
                at += 1;
                next += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    Code { levels, symbols }
}

/// A symbol and the bits of its code; 0 bits where the byte does not begin with a whole code.
#[derive(Clone, Copy)]
struct Short {
    symbol: u8,
    bits: u8,
}

/// What a byte begins with.
static SHORT: [Short; 256] = short();

const fn short() -> [Short; 256] {
    let code = code();
    let mut table = [Short { symbol: 0, bits: 0 }; 256];
    let mut bits = 1;
    while bits <= 8 {
        let level = code.levels[bits];
        let mut index = 0;
        while index < level.count {
            let symbol = code.symbols[(level.at + index) as usize];
            let first = ((level.first + index as u32) << (8 - bits)) as usize;
            let mut fill = 0;
            while fill < 1 << (8 - bits) {
                // Symbols with so short a code are bytes: END has the longest.
                table[first + fill] = Short { symbol: symbol as u8, bits: bits as u8 };
                fill += 1;
            }
            index += 1;
        }
        bits += 1;
    }
    table
}

/// Appends what `coded` says to `out`: at most 8/5 of its length.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    out.reserve(coded.len() / 5 * 8 + 8);
    let mut rest = coded;
    // The next bits are the high ones of the window, and it has so many of them.
    let (mut window, mut have) = (0_u64, 0_u32);
    loop {
        if have < 32 {
            let Some((bytes, tail)) = rest.split_first_chunk::<4>() else { break };
            window |= u64::from(u32::from_be_bytes(*bytes)) << (32 - have);
            have += 32;
            rest = tail;
        }
        let (symbol, bits) = next(window)?;
        out.push(symbol);
        window <<= bits;
        have -= bits;
    }
    for &byte in rest {
        window |= u64::from(byte) << (56 - have);
        have += 8;
    }
    // Ones behind the end: the padding is then a run of ones, and whatever needs more bits than there are shows.
    window |= u64::MAX.checked_shr(have).unwrap_or(0);
    while have >= 8 || window != u64::MAX {
        let (symbol, bits) = next(window)?;
        if bits > have {
            return Err(HpackError::Huffman);
        }
        out.push(symbol);
        window = !(!window << bits);
        have -= bits;
    }
    Ok(())
}

/// The symbol that the window begins with, and the bits of its code. Only the high 32 bits are looked at.
#[inline]
fn next(window: u64) -> Result<(u8, u32), HpackError> {
    let short = SHORT[(window >> 56) as usize];
    if short.bits == 0 { long(window) } else { Ok((short.symbol, u32::from(short.bits))) }
}

fn long(window: u64) -> Result<(u8, u32), HpackError> {
    for bits in 9..=LONGEST {
        let level = CODE.levels[bits];
        // Codes of this length are at least `first`, for all shorter ones were tried.
        let index = (window >> (64 - bits)) - u64::from(level.first);
        if index < u64::from(level.count) {
            let symbol = CODE.symbols[usize::from(level.at) + index as usize];
            // END is the one symbol that is no byte.
            let symbol = u8::try_from(symbol).map_err(|_| HpackError::Huffman)?;
            return Ok((symbol, bits as u32));
        }
    }
    // Not reached: the code is complete, every sequence of 30 bits begins with a code.
    Err(HpackError::Huffman)
}

/// What the tests write, for the encoder of this crate uses no Huffman code.
#[cfg(test)]
pub(super) fn encode(text: &[u8], out: &mut Vec<u8>) {
    let (mut window, mut have) = (0_u64, 0);
    for &symbol in text {
        let bits = usize::from(LENGTHS[usize::from(symbol)]);
        let level = CODE.levels[bits];
        let index = (0..level.count)
            .find(|index| CODE.symbols[usize::from(level.at + index)] == u16::from(symbol))
            .expect("every symbol has a code");
        window = (window << bits) | u64::from(level.first + u32::from(index));
        have += bits;
        while have >= 8 {
            have -= 8;
            out.push((window >> have) as u8);
        }
    }
    if have > 0 {
        out.push((window << (8 - have)) as u8 | (0xff >> have));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(coded: &[u8]) -> Result<Vec<u8>, HpackError> {
        let mut out = Vec::new();
        decode(coded, &mut out).map(|()| out)
    }

    #[test]
    fn the_code_is_complete_and_its_last_one_ends_strings() {
        let kraft: u64 = LENGTHS.iter().map(|&bits| 1 << (LONGEST - usize::from(bits))).sum();
        assert_eq!(kraft, 1 << LONGEST);
        assert_eq!(CODE.symbols[256], END);
    }

    #[test]
    fn codes_are_those_of_appendix_b() {
        // One of each length: (symbol, code).
        let codes: [(u8, u32, usize); 12] = [
            (b'0', 0x0, 5),
            (b't', 0x9, 5),
            (b' ', 0x14, 6),
            (b':', 0x5c, 7),
            (b'&', 0xf8, 8),
            (b'!', 0x3f8, 10),
            (b'\'', 0x7fa, 11),
            (0, 0x1ff8, 13),
            (b'<', 0x7ffc, 15),
            (b'\\', 0x7fff0, 19),
            (255, 0x3ff_ffee, 26),
            (22, 0x3fff_fffe, 30),
        ];
        for (symbol, code, bits) in codes {
            let mut written = Vec::new();
            encode(&[symbol], &mut written);
            let padded = (u64::from(code) << (40 - bits)) | ((1 << (40 - bits)) - 1);
            assert_eq!(written, padded.to_be_bytes()[3..3 + bits.div_ceil(8)], "{symbol}");
        }
    }

    #[test]
    fn padding_is_ones_and_shorter_than_a_byte() {
        assert_eq!(decoded(b""), Ok(vec![]));
        // "0" is 00000.
        assert_eq!(decoded(&[0b0000_0111]), Ok(b"0".to_vec()));
        assert_eq!(decoded(&[0b0000_0110]), Err(HpackError::Huffman));
        assert_eq!(decoded(&[0b0000_0000]), Err(HpackError::Huffman));
        assert_eq!(decoded(&[0b0000_0111, 0xff]), Err(HpackError::Huffman));
        assert_eq!(decoded(&[0xff]), Err(HpackError::Huffman));
        for length in 1..40 {
            assert_eq!(decoded(&vec![0xff; length]), Err(HpackError::Huffman), "{length}");
        }
    }

    #[test]
    fn the_end_of_the_string_is_no_symbol() {
        // "00", then thirty ones, then padding.
        assert_eq!(decoded(&[0x00, 0x3f, 0xff, 0xff, 0xff, 0xff]), Err(HpackError::Huffman));
        // The same in the middle, with "0"s behind it.
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xfc, 0, 0, 0, 0, 0, 0x07]), Err(HpackError::Huffman));
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut coded = Vec::new();
            encode(&text, &mut coded);
            prop_assert_eq!(decoded(&coded), Ok(text));
        }

        #[test]
        fn what_can_be_decoded_is_the_encoding_of_what_it_says(coded in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(text) = decoded(&coded) {
                let mut again = Vec::new();
                encode(&text, &mut again);
                prop_assert_eq!(again, coded);
            }
        }
    }
}
