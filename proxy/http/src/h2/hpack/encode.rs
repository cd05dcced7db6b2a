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

/// The longest name in the static table, in bytes.
const LONGEST: usize = 27;

/// Appends a field line; the name is lower-cased (RFC 9113, 8.2.1). Not for pseudo-fields.
pub(crate) fn encode_line(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    let mut lower = [0; LONGEST];
    let index = match lower.get_mut(..name.len()) {
        Some(lower) => {
            lower.copy_from_slice(name);
            lower.make_ascii_lowercase();
            static_name(lower)
        }
        None => 0,
    };
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
fn string(text: &[u8], out: &mut Vec<u8>) {
    length(text.len(), out);
    out.extend_from_slice(text);
}

/// 5.1 with a prefix of 7 bits.
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

/// The index of a lower-case name in the static table; 0 if it is not there.
fn static_name(name: &[u8]) -> u8 {
    match name {
        b"accept-charset" => 15,
        b"accept-encoding" => 16,
        b"accept-language" => 17,
        b"accept-ranges" => 18,
        b"accept" => 19,
        b"access-control-allow-origin" => 20,
        b"age" => 21,
        b"allow" => 22,
        b"authorization" => 23,
        b"cache-control" => 24,
        b"content-disposition" => 25,
        b"content-encoding" => 26,
        b"content-language" => 27,
        b"content-length" => 28,
        b"content-location" => 29,
        b"content-range" => 30,
        b"content-type" => 31,
        b"cookie" => 32,
        b"date" => 33,
        b"etag" => 34,
        b"expect" => 35,
        b"expires" => 36,
        b"from" => 37,
        b"host" => 38,
        b"if-match" => 39,
        b"if-modified-since" => 40,
        b"if-none-match" => 41,
        b"if-range" => 42,
        b"if-unmodified-since" => 43,
        b"last-modified" => 44,
        b"link" => 45,
        b"location" => 46,
        b"max-forwards" => 47,
        b"proxy-authenticate" => 48,
        b"proxy-authorization" => 49,
        b"range" => 50,
        b"referer" => 51,
        b"refresh" => 52,
        b"retry-after" => 53,
        b"server" => 54,
        b"set-cookie" => 55,
        b"strict-transport-security" => 56,
        b"transfer-encoding" => 57,
        b"user-agent" => 58,
        b"vary" => 59,
        b"via" => 60,
        b"www-authenticate" => 61,
        _ => 0,
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
            assert_eq!(line(name, value), [INDEXED | (index + 1) as u8]);
            assert!(name.len() <= LONGEST);
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
