//! Writing field lines (RFC 7541, 6), each by itself: there is no state, so a block can be put together anywhere.
//!
//! The pseudo-fields (RFC 9113, 8.3) have functions of their own, for they know their index without a look-up.

use super::table::STATIC;

/// 6.1: both name and value are the static table's.
const INDEXED: u8 = 0x80;

/// 6.2.2: the next one that encodes may put it into its table.
const LITERAL: u8 = 0x00;

/// 6.2.3: nobody on the way may put it into a table, where others could guess at it by the size of what they send.
const NEVER_INDEXED: u8 = 0x10;

/// Appends a field line; the name, a token, is lower-cased (RFC 9113, 8.2.1). Not for pseudo-fields.
pub(crate) fn encode_line(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    let index = static_name(name);
    if index == 0 {
        out.push(LITERAL);
        length(name.len(), out);
        let start = out.len();
        out.extend_from_slice(name);
        out[start..].make_ascii_lowercase();
        return string(value, out);
    }
    if STATIC[usize::from(index) - 1].1 == value {
        return out.push(INDEXED | index);
    }
    literal(if is_secret(index) { NEVER_INDEXED } else { LITERAL }, index, value, out);
}

/// Appends `:status`; 100 to 999.
pub(crate) fn encode_status(status: u16, out: &mut Vec<u8>) {
    let index = match status {
        200 => 8,
        204 => 9,
        206 => 10,
        304 => 11,
        400 => 12,
        404 => 13,
        500 => 14,
        _ => {
            let digit = |unit| b'0' + (status / unit % 10) as u8;
            return literal(LITERAL, 8, &[digit(100), digit(10), digit(1)], out);
        }
    };
    out.push(INDEXED | index);
}

/// Appends `:method`.
pub(crate) fn encode_method(method: &[u8], out: &mut Vec<u8>) {
    match method {
        b"GET" => out.push(INDEXED | 2),
        b"POST" => out.push(INDEXED | 3),
        _ => literal(LITERAL, 2, method, out),
    }
}

/// Appends `:scheme`.
pub(crate) fn encode_scheme(scheme: &[u8], out: &mut Vec<u8>) {
    match scheme {
        b"http" => out.push(INDEXED | 6),
        b"https" => out.push(INDEXED | 7),
        _ => literal(LITERAL, 6, scheme, out),
    }
}

/// Appends `:authority`.
pub(crate) fn encode_authority(authority: &[u8], out: &mut Vec<u8>) {
    literal(LITERAL, 1, authority, out);
}

/// Appends `:path`, the query included.
pub(crate) fn encode_path(path: &[u8], out: &mut Vec<u8>) {
    match path {
        b"/" => out.push(INDEXED | 4),
        _ => literal(LITERAL, 4, path, out),
    }
}

/// Appends `:protocol` (RFC 8441).
pub(crate) fn encode_protocol(protocol: &[u8], out: &mut Vec<u8>) {
    out.push(LITERAL);
    string(b":protocol", out);
    string(protocol, out);
}

/// 6.2: a literal whose name is the static table's.
fn literal(kind: u8, index: u8, value: &[u8], out: &mut Vec<u8>) {
    // 5.1 with a prefix of 4 bits; the largest index is 61.
    match index.checked_sub(15) {
        None => out.push(kind | index),
        Some(rest) => out.extend_from_slice(&[kind | 15, rest]),
    }
    string(value, out);
}

/// 5.2, not Huffman-coded.
#[inline]
fn string(text: &[u8], out: &mut Vec<u8>) {
    length(text.len(), out);
    out.extend_from_slice(text);
}

/// 5.1 with a prefix of 7 bits.
#[inline]
fn length(length: usize, out: &mut Vec<u8>) {
    let Some(mut rest) = length.checked_sub(127) else { return out.push(length as u8) };
    out.push(127);
    while rest >= 128 {
        out.push(rest as u8 | 128);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// 7.1.3 names them: what a peer may not keep in its table. That a line came as never indexed is not remembered, so
/// these always leave as such.
fn is_secret(index: u8) -> bool {
    // authorization, cookie, proxy-authorization, set-cookie
    matches!(index, 23 | 32 | 49 | 55)
}

/// The index of a name in the static table, whatever its case; 0 if it is not there.
fn static_name(name: &[u8]) -> u8 {
    let Some(last) = name.last() else { return 0 };
    // The length and the last letter leave one name that it could be, or two.
    let candidates: &[u8] = match (name.len(), last | UPPER_TO_LOWER) {
        (3, b'a') => &[60],
        (3, b'e') => &[21],
        (4, b'e') => &[33],
        (4, b'g') => &[34],
        (4, b'k') => &[45],
        (4, b'm') => &[37],
        (4, b't') => &[38],
        (4, b'y') => &[59],
        (5, b'e') => &[50],
        (5, b'w') => &[22],
        (6, b'e') => &[32],
        (6, b'r') => &[54],
        (6, b't') => &[19, 35],
        (7, b'h') => &[52],
        (7, b'r') => &[51],
        (7, b's') => &[36],
        (8, b'e') => &[42],
        (8, b'h') => &[39],
        (8, b'n') => &[46],
        (10, b'e') => &[55],
        (10, b't') => &[58],
        (11, b'r') => &[53],
        (12, b'e') => &[31],
        (12, b's') => &[47],
        (13, b'd') => &[44],
        (13, b'e') => &[30],
        (13, b'h') => &[41],
        (13, b'l') => &[24],
        (13, b'n') => &[23],
        (13, b's') => &[18],
        (14, b'h') => &[28],
        (14, b't') => &[15],
        (15, b'e') => &[17],
        (15, b'g') => &[16],
        (16, b'e') => &[27, 61],
        (16, b'g') => &[26],
        (16, b'n') => &[29],
        (17, b'e') => &[40],
        (17, b'g') => &[57],
        (18, b'e') => &[48],
        (19, b'e') => &[43],
        (19, b'n') => &[25, 49],
        (25, b'y') => &[56],
        (27, b'n') => &[20],
        _ => &[],
    };
    candidates.iter().copied().find(|&index| is_same(name, STATIC[usize::from(index) - 1].0)).unwrap_or(0)
}

/// The bit between upper and lower case. To set it makes no other byte of a token a letter or a hyphen.
const UPPER_TO_LOWER: u8 = 0x20;

/// Whether a name is this one of the static table, of the same length, whatever its case; eight bytes at a time.
fn is_same(name: &[u8], lower: &[u8]) -> bool {
    let differ = |name: &[u8; 8], lower: &[u8; 8]| {
        (u64::from_ne_bytes(*name) | u64::from_ne_bytes([UPPER_TO_LOWER; 8])) ^ u64::from_ne_bytes(*lower)
    };
    match (name.last_chunk(), lower.last_chunk()) {
        (Some(last), Some(lower_last)) => {
            let words = name.as_chunks().0.iter().zip(lower.as_chunks().0);
            words.fold(differ(last, lower_last), |found, (name, lower)| found | differ(name, lower)) == 0
        }
        _ => name.eq_ignore_ascii_case(lower),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &[u8], value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode_line(name, value, &mut out);
        out
    }

    #[test]
    fn every_name_of_the_static_table_is_found() {
        for (index, (name, value)) in STATIC.iter().enumerate().filter(|(_, (name, _))| name[0] != b':') {
            assert_eq!(usize::from(static_name(name)), index + 1);
            assert_eq!(usize::from(static_name(&name.to_ascii_uppercase())), index + 1);
            // One letter off, wherever it is.
            for at in 0..name.len() {
                let mut other = name.to_vec();
                other[at] = b'0';
                assert_eq!(static_name(&other), 0);
            }
            assert_eq!(line(name, value), [INDEXED | (index + 1) as u8]);
        }
        assert_eq!(static_name(b"accepts"), 0);
        assert_eq!(static_name(b""), 0);
    }

    #[test]
    fn a_line_is_written_as_shortly_as_the_static_table_allows() {
        assert_eq!(line(b"Accept-Encoding", b"gzip, deflate"), [0x90]);
        assert_eq!(line(b"Accept-Encoding", b""), [0x0f, 1, 0]);
        assert_eq!(line(b"X-A", b"B"), b"\x00\x03x-a\x01B");
        assert_eq!(line(b"DATE", b"today"), b"\x0f\x12\x05today");
        let long = [b'V'; 300];
        assert_eq!(line(b"VIA", &long)[..5], [0x0f, 45, 127, 0xad, 1]);
    }

    #[test]
    fn secrets_are_never_indexed() {
        for name in ["authorization", "Cookie", "Proxy-Authorization", "set-cookie"] {
            assert_eq!(line(name.as_bytes(), b"x")[0], NEVER_INDEXED | 15, "{name}");
        }
    }

    #[test]
    fn pseudo_fields_of_most_messages_take_a_byte() {
        let mut out = Vec::new();
        encode_method(b"GET", &mut out);
        encode_method(b"POST", &mut out);
        encode_path(b"/", &mut out);
        encode_scheme(b"http", &mut out);
        encode_scheme(b"https", &mut out);
        for status in [200, 204, 206, 304, 400, 404, 500] {
            encode_status(status, &mut out);
        }
        let indices = [2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14];
        assert_eq!(out, indices.map(|index| INDEXED | index));
        out.clear();
        encode_status(503, &mut out);
        assert_eq!(out, b"\x08\x03503");
    }
}
