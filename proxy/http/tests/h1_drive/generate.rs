//! Makes up messages: mostly right, each part wrong now and then.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// Several requests on one connection.
pub(crate) fn requests() -> impl Strategy<Value = Vec<u8>> {
    messages(request_line())
}

/// Several responses on one connection.
pub(crate) fn responses() -> impl Strategy<Value = Vec<u8>> {
    messages(status_line())
}

fn messages(start: impl Strategy<Value = Vec<u8>> + 'static) -> impl Strategy<Value = Vec<u8>> {
    (vec(message(start.boxed()), 1..4), mutations()).prop_map(|(messages, mutations)| {
        let mut bytes = messages.concat();
        for (at, kind, byte) in mutations {
            let at = at % bytes.len();
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        bytes
    })
}

/// One message in four has a byte changed, inserted or removed.
fn mutations() -> impl Strategy<Value = Vec<(usize, u8, u8)>> {
    let byte = prop_oneof![3 => select(&b"\r\n \t:;,0\0x\x7f\xff"[..]), 1 => any::<u8>()];
    let one = (any::<usize>(), 0..3_u8, byte);
    prop_oneof![3 => Just(Vec::new()), 1 => vec(one, 1..3)]
}

fn message(start: BoxedStrategy<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    (start, vec(field_line(), 0..4), framed(), vec(field_line(), 0..2), line_end()).prop_map(
        |(start, before, (framing, body), after, end)| {
            let mut bytes = start;
            for line in before.into_iter().chain([framing]).chain(after) {
                bytes.extend_from_slice(&line);
            }
            bytes.extend_from_slice(end);
            bytes.extend_from_slice(&body);
            bytes
        },
    )
}

fn line_end() -> impl Strategy<Value = &'static [u8]> {
    prop_oneof![60 => Just(&b"\r\n"[..]), 1 => Just(&b"\n"[..]), 1 => Just(&b"\r"[..])]
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn request_line() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![
        20 => select(vec!["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "purge", "M-SEARCH"]),
        1 => select(vec!["", "G T", "GET\t", "\u{e4}", "G:T", " GET", "\r\nGET", "CONNECT"]),
    ];
    let target = prop_oneof![
        20 => select(vec!["/", "/a/b?c=d", "/%2e%2e/x", "//x", "/a;b=c", "/?", "http://a.example/x", "http://a.example:80"]),
        2 => select(vec!["*", "/\u{e4}", "/a#b", "http://a.example?q", "HTTP://A.example/", "/\"<>^`{|}\\", "/[x]"]),
        1 => select(vec!["", "a", "a.example:443", "http://u@a.example/", "ftp://a/", "http:///", "/a b", "/\u{1}", "/\t", "http://"]),
    ];
    let version = prop_oneof![
        20 => Just("HTTP/1.1"),
        3 => Just("HTTP/1.0"),
        1 => select(vec!["HTTP/1.2", "HTTP/2.0", "http/1.1", "HTTP/1.1 ", "HTTP/1.", ""]),
    ];
    let words = prop_oneof![40 => (method, target).boxed(), 1 => Just(("CONNECT", "a.example:443")).boxed()];
    (words, version, line_end()).prop_map(|((method, target), version, end)| {
        joined(&[method.as_bytes(), b" ", target.as_bytes(), b" ", version.as_bytes(), end])
    })
}

fn status_line() -> impl Strategy<Value = Vec<u8>> {
    let version = prop_oneof![20 => Just("HTTP/1.1"), 3 => Just("HTTP/1.0"), 1 => select(vec!["HTTP/1.2", "http/1.1", "ICY"])];
    let status = prop_oneof![
        20 => select(vec!["200", "201", "206", "302", "404", "500", "503"]),
        4 => select(vec!["204", "304", "100", "103", "299", "999", "600"]),
        1 => select(vec!["101", "099", "20", "2000", "+20", "", "abc"]),
    ];
    let reason = prop_oneof![
        10 => select(vec![" OK", " ", "", " Not  found", " a\tb"]),
        1 => select(vec!["\tOK", " a\0", " \u{e4}", "x"]),
    ];
    (version, status, reason, line_end()).prop_map(|(version, status, reason, end)| {
        joined(&[version.as_bytes(), b" ", status.as_bytes(), reason.as_bytes(), end])
    })
}

fn field_line() -> impl Strategy<Value = Vec<u8>> {
    let good: &[&[u8]] = &[
        b"Host: a.example",
        b"host: a.example:80",
        b"Accept: */*",
        b"X-Case:Abc  def",
        b"empty:",
        b"blank: \t ",
        b"obs: \xe9\xff",
        b"Cookie: a=b; c=d",
        b"cookie: e=f",
        b"tab: a\tb",
        b"!#$%&'*+-.^_`|~: token",
        b"quote: \"a, b\"",
        b"x-under_score: 1",
    ];
    let connection: &[&[u8]] = &[
        b"Connection: close",
        b"Connection: keep-alive",
        b"Connection: x, Close",
        b"connection: Keep-Alive, x",
        b"Connection:",
    ];
    let bad: &[&[u8]] = &[
        b" folded",
        b"\tfolded: a",
        b"a : b",
        b": b",
        b"a",
        b"",
        b"a\0: b",
        b"a: \0",
        b"a: b\rc",
        b"a: \x7f",
        b"a: \x01",
        b"\xe4: b",
        b"a(b): c",
        b"a: b\r",
        b"a\t: b",
    ];
    let line = prop_oneof![30 => select(good), 4 => select(connection), 1 => select(bad)];
    (line, line_end()).prop_map(|(line, end)| joined(&[line, end]))
}

/// The field lines that frame, and a body to go with them, more or less.
fn framed() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    prop_oneof![
        3 => Just((Vec::new(), Vec::new())),
        3 => (body(), length_lines()).prop_map(|(body, lines)| {
            (lines.replace('N', &body.len().to_string()).into_bytes(), body)
        }),
        3 => (chunks(), coding_lines()).prop_map(|(body, lines)| (lines.into(), body)),
        1 => (chunks(), select(vec![
            "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
            "Content-Length: 3\r\nTransfer-Encoding: identity\r\n",
        ])).prop_map(|(body, lines)| (lines.into(), body)),
    ]
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => select(vec![&b""[..], b"x", b"hello", b"0\r\n\r\n", b"GET /smuggled HTTP/1.1\r\n\r\n"]).prop_map(<[u8]>::to_vec),
        1 => vec(any::<u8>(), 0..40),
    ]
}

fn length_lines() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        12 => select(vec!["Content-Length: N\r\n", "content-length:N\r\n", "CONTENT-LENGTH:  N \r\n"]),
        2 => select(vec!["Content-Length: N\r\ncontent-length: N\r\n", "Content-Length: 0N\r\n", "Content-Length: N, N\r\n"]),
        2 => select(vec![
            "Content-Length: 1N\r\n", "Content-Length: +N\r\n", "Content-Length: -N\r\n", "Content-Length: 0xN\r\n", "Content-Length:\r\n",
            "Content-Length: N,\r\n", "Content-Length: N\r\nContent-Length: 1N\r\n", "Content-Length: N1N\r\n",
            "Content-Length: 18446744073709551616\r\n", "Content-Length: N N\r\n", "Content-Length : N\r\n", "Content-Length: N;\r\n",
        ]),
    ]
}

fn coding_lines() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        12 => select(vec!["Transfer-Encoding: chunked\r\n", "transfer-encoding:Chunked \r\n", "TRANSFER-ENCODING:\tCHUNKED\r\n"]),
        2 => select(vec![
            "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: chunked, identity\r\n", "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: chunked,chunked\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: identity\r\n", "Transfer-Encoding:\r\n", "Transfer-Encoding: \x0bchunked\r\n",
            "Transfer-Encoding : chunked\r\n", "Transfer-Encoding: chunked;x\r\n", "Transfer_Encoding: chunked\r\n",
        ]),
    ]
}

fn chunks() -> impl Strategy<Value = Vec<u8>> {
    let good = select(vec!["", ";a", ";a=\"b\"", " ;a"]);
    let bad = select(vec![" ", "\t", "g", "\0", ";\0", ";a\n", "x", ",", " 5"]);
    let after_size = prop_oneof![40 => good.boxed(), 1 => bad.boxed()];
    let prefix = prop_oneof![40 => select(vec!["", "", "0", "000"]), 1 => select(vec!["0x", "+", "-", " ", "f", "00000000000000000"])];
    let chunk = (prefix, vec(any::<u8>(), 1..20), any::<bool>(), after_size, line_end(), line_end())
        .prop_map(|(prefix, data, upper, after, end, last)| {
            let size = if upper { format!("{:X}", data.len()) } else { format!("{:x}", data.len()) };
            joined(&[prefix.as_bytes(), size.as_bytes(), after.as_bytes(), end, &data, last])
        });
    let trailers = prop_oneof![3 => Just(Vec::new()), 1 => vec(field_line(), 0..3)];
    (vec(chunk, 0..4), line_end(), trailers, line_end()).prop_map(|(chunks, end, trailers, last)| {
        joined(&[&chunks.concat(), b"0", end, &trailers.concat(), last])
    })
}
