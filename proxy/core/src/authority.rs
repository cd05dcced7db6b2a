//! Which authority a request names, if it names one.
//!
//! A request that names two lets two readers see two requests: the proxy authorizes for one, the application serves
//! the other. RFC 9112, 3.2 lets a proxy prefer the target over Host; we refuse where they differ.

/// Why a request's authority cannot be told. The answer is 400, [`Reason::BadRequest`](crate::reason::Reason).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguous {
    /// HTTP/1.1 without a Host line.
    #[error("the request has no Host")]
    Missing,
    /// More than one Host line.
    #[error("the request has more than one Host")]
    TwoHosts,
    /// The target's authority and Host differ.
    #[error("the request's target and its Host name different authorities")]
    Differ,
    /// Not `host [":" port]`.
    #[error("the request's authority is malformed")]
    Malformed,
}

/// Bytes of an authority: a DNS name has at most 253, and a port adds six.
const MAX_AUTHORITY: usize = 260;

/// The authority of a request, `None` if it names none.
///
/// `target` is the authority of an absolute-form or authority-form target or HTTP/2's `:authority` (RFC 9113, 8.3.1:
/// it and `host` must agree), `hosts` the values of all Host lines, `host_required` is true for HTTP/1.1.
///
/// # Errors
/// Where two readers could disagree: see [`Ambiguous`].
pub fn request_authority<'a>(
    target: Option<&'a str>,
    hosts: &[&'a [u8]],
    host_required: bool,
) -> Result<Option<&'a str>, Ambiguous> {
    let host = match hosts {
        [] if host_required => return Err(Ambiguous::Missing),
        [] => None,
        [host] => Some(std::str::from_utf8(host).map_err(|_| Ambiguous::Malformed)?),
        _ => return Err(Ambiguous::TwoHosts),
    };
    // "Host:" with nothing behind it is how a request says that its target has no authority.
    for authority in [target, host.filter(|host| !host.is_empty())].into_iter().flatten() {
        if !is_authority(authority) {
            return Err(Ambiguous::Malformed);
        }
    }
    match (target, host) {
        (Some(target), Some(host)) if !agree(target, host) => Err(Ambiguous::Differ),
        (Some(authority), _) => Ok(Some(authority)),
        (None, host) => Ok(host.filter(|host| !host.is_empty())),
    }
}

/// Equal but for case and a spelled-out port 80 (an absolute-form target that a proxy sees in clear is `http`).
fn agree(a: &str, b: &str) -> bool {
    let without_default = |authority: &str| authority.strip_suffix(":80").map_or(authority.len(), str::len);
    a[..without_default(a)].eq_ignore_ascii_case(&b[..without_default(b)])
}

/// `uri-host [":" port]` (RFC 3986, 3.2) without userinfo, and without the comma that joins two Host lines.
fn is_authority(text: &str) -> bool {
    if text.len() > MAX_AUTHORITY {
        return false;
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return false };
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match port.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if port.is_empty() => (None, None),
                None => return false,
            }
        }
        // `split_once` sets up a search that costs more than so short a text.
        None => match text.bytes().position(|byte| byte == b':') {
            Some(colon) => (Some(&text[..colon]), Some(&text[colon + 1..])),
            None => (Some(text), None),
        },
    };
    host.is_none_or(|host| !host.is_empty() && is_reg_name(host.as_bytes()))
        && port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

fn is_reg_name(name: &[u8]) -> bool {
    let mut at = 0;
    while let Some(&byte) = name.get(at) {
        at += match byte {
            _ if PLAIN[usize::from(byte)] => 1,
            b'%' if matches!(name[at..], [_, a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()) => {
                3
            }
            _ => return false,
        };
    }
    true
}

/// Bytes of a `reg-name` that stand for themselves (RFC 3986, 3.2.2): unreserved ones, and sub-delims without the comma.
const PLAIN: [bool; 256] = {
    let mut plain = [false; 256];
    let mut byte = 0;
    while byte < 128_u8 {
        plain[byte as usize] = byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b';'
                    | b'='
            );
        byte += 1;
    }
    plain
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_authority_is_told() {
        assert_eq!(request_authority(None, &[b"a.example:8080"], true), Ok(Some("a.example:8080")));
        assert_eq!(request_authority(Some("a.example"), &[b"A.Example"], true), Ok(Some("a.example")));
        assert_eq!(request_authority(Some("a.example"), &[b"a.example:80"], true), Ok(Some("a.example")));
        assert_eq!(request_authority(Some("[::1]:80"), &[b"[::1]"], true), Ok(Some("[::1]:80")));
        assert_eq!(request_authority(Some("a.example"), &[], false), Ok(Some("a.example")));
        assert_eq!(request_authority(None, &[b""], true), Ok(None));
        assert_eq!(request_authority(None, &[], false), Ok(None));
        assert_eq!(request_authority(None, &[b"my_service"], true), Ok(Some("my_service")));
    }

    #[test]
    fn two_authorities_are_none() {
        assert_eq!(request_authority(None, &[], true), Err(Ambiguous::Missing));
        assert_eq!(request_authority(None, &[b"a", b"a"], true), Err(Ambiguous::TwoHosts));
        assert_eq!(request_authority(Some("a"), &[b"b"], true), Err(Ambiguous::Differ));
        assert_eq!(request_authority(Some("a"), &[b""], true), Err(Ambiguous::Differ));
        assert_eq!(request_authority(Some("a:80"), &[b"a:8080"], true), Err(Ambiguous::Differ));
        assert_eq!(request_authority(Some("a"), &[b"a@b"], true), Err(Ambiguous::Malformed));
    }

    #[test]
    fn what_is_no_host_and_port_is_malformed() {
        let long = "a".repeat(MAX_AUTHORITY + 1);
        for text in [
            "a,b", "a b", " a", "a/", "a?b", "a#b", "u@a", "a:b", "a:70000", "a:+1", "a:1:2", ":80", "[::1",
            "[a]", "[::1]x", "a%2", "a%zz", "a\\b", "\u{e4}", "a\t", &long,
        ] {
            assert_eq!(
                request_authority(None, &[text.as_bytes()], true),
                Err(Ambiguous::Malformed),
                "{text:?}"
            );
        }
        assert_eq!(request_authority(None, &[b"\xff"], true), Err(Ambiguous::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_passes_is_plain(target in prop::option::of(".{0,12}"), host: Vec<u8>) {
            if let Ok(Some(authority)) = request_authority(target.as_deref(), &[&host], true) {
                prop_assert!(!authority.is_empty());
                prop_assert!(authority.bytes().all(|b| b.is_ascii_graphic() && !b"/?#@,\\".contains(&b)));
            }
        }
    }
}
