//! Which headers pass from one side to the other, and the ones that the mesh adds.
//!
//! Names are compared the way the most careless reader would: CGI, WSGI and their heirs turn a name into a variable,
//! where `-` and `_` are the same, and older servers so treat every other mark. A name that such a reader could take
//! for a protected one is protected. The rules hold for trailers as for headers.

use crate::reason::Reason;

pub use crate::reason::REASON_HEADER;

/// The caller's SPIFFE id, set by the sidecar beside the server from the verified peer; absent if there is none.
pub const CLIENT_ID_HEADER: &str = "outrigger-client-id";

/// Marks a message between sidecars as HTTP/1.x: [`H1Mark`](crate::mark::H1Mark).
pub const H1_HEADER: &str = "outrigger-h1";

/// Bytes of a reason's text in the header, at most.
pub const MAX_REASON_TEXT: usize = 256;

/// Names that a `Connection` header may list, at most; a request with more is malformed on purpose.
pub const MAX_CONNECTION_TOKENS: usize = 32;

/// Whether `byte` may occur in a method or a field name (RFC 9110, 5.6.2).
pub fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

pub(crate) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|byte| is_token_byte(*byte))
}

/// The names and options that `Connection` header values list, in lower case; `None` if they are no lists of tokens
/// or more than [`MAX_CONNECTION_TOKENS`]: answer 400.
pub fn connection_tokens<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Option<Vec<String>> {
    let mut tokens = Vec::new();
    for token in values.into_iter().flat_map(|value| value.split(|byte| *byte == b',')) {
        let token = token.trim_ascii();
        // RFC 9110, 5.6.1.2: empty elements are to be ignored.
        if token.is_empty() {
            continue;
        }
        if !is_token(token) || tokens.len() == MAX_CONNECTION_TOKENS {
            return None;
        }
        tokens.push(String::from_utf8_lossy(token).to_ascii_lowercase());
    }
    Some(tokens)
}

/// Whether a header is meant for the next hop only (RFC 9110, 7.6.1), so that it must not be forwarded as it is.
/// `connection` is what [`connection_tokens`] returned.
///
/// `te` is one; if [`te_has_trailers`], send `te: trailers` on, for gRPC depends on it. `trailer`,
/// `proxy-authorization` and `proxy-authenticate` pass: a sidecar is not the proxy that they are addressed to.
///
/// Names that `connection` lists are such headers too, but for those that frame a message or say where it came from:
/// a client must not be able to make the proxy drop these.
pub fn is_hop_by_hop(name: &[u8], connection: &[String]) -> bool {
    const ALWAYS: [&str; 6] =
        ["connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];
    const NEVER: [&str; 4] = ["host", "content-length", "content-type", "forwarded"];
    if ALWAYS.iter().any(|always| name.eq_ignore_ascii_case(always.as_bytes())) {
        return true;
    }
    connection.iter().any(|token| name.eq_ignore_ascii_case(token.as_bytes()))
        && !NEVER.iter().any(|never| name.eq_ignore_ascii_case(never.as_bytes()))
        && !reads_as_prefix(name, "x-forwarded-")
}

/// Whether a `te` value accepts trailers: the one thing in it that may be sent on, and all that HTTP/2 allows
/// (RFC 9113, 8.2.2).
pub fn te_has_trailers(value: &[u8]) -> bool {
    value.split(|byte| *byte == b',').any(|option| option.trim_ascii().eq_ignore_ascii_case(b"trailers"))
}

/// The protocol that an HTTP/1.1 request asks to upgrade to, if it asks for one that can be carried.
///
/// `None` without `upgrade` in `connection`, for more than one protocol (the mesh carries one), and for what
/// [`is_upgrade_protocol`] refuses: the request is served without the upgrade, as RFC 9110, 7.8 allows.
pub fn upgrade_protocol<'a>(connection: &[String], upgrade: &[&'a [u8]]) -> Option<&'a str> {
    let [value] = upgrade else { return None };
    let value = std::str::from_utf8(value).ok()?.trim_ascii();
    (connection.iter().any(|token| token == "upgrade") && is_upgrade_protocol(value)).then_some(value)
}

/// Whether a tunnel of this protocol can be carried: one `name ["/" version]` (RFC 9110, 7.8), of a protocol that is
/// not HTTP in another dress.
///
/// What follows a switch is passed on unread. Requests inside of it would reach the application with whatever
/// identity their sender writes: `h2c` (withdrawn by RFC 9113), `HTTP/2.0`, and HTTP inside of `TLS/1.0` (RFC 2817).
pub fn is_upgrade_protocol(value: &str) -> bool {
    const HTTP: [&str; 4] = ["h2c", "h2", "http", "tls"];
    let mut parts = value.splitn(2, '/');
    let name = parts.clone().next().unwrap_or_default();
    parts.all(|part| is_token(part.as_bytes())) && !HTTP.iter().any(|http| name.eq_ignore_ascii_case(http))
}

/// Whether a careless reader takes the name of a field for one that frames a message, which it is not:
/// `Transfer_Encoding`, `content.length`. Stripped from requests, like the spellings of identity.
pub fn misspells_framing(name: &[u8]) -> bool {
    ["transfer-encoding", "content-length"]
        .iter()
        .any(|field| reads_as(name, field) && !name.eq_ignore_ascii_case(field.as_bytes()))
}

/// Whether a header claims to say who the caller is. Stripped from every inbound request, headers and trailers,
/// before ours is set; whoever sent it, the application must never see it.
///
/// - ours;
/// - `x-forwarded-client-cert` and `l5d-client-id`: other meshes' words for the same, which an application or a
///   library may still read after a migration;
/// - `x-envoy-*`, all of it: an Envoy behind this sidecar sees its peer on loopback, takes the request for an internal
///   one and believes every one of these (CVE-2024-45806); several name the caller (`x-envoy-peer-metadata`,
///   `x-envoy-downstream-service-cluster`, `x-envoy-internal`, `x-envoy-external-address`), the others are orders.
///
/// Not stripped, because they speak of somebody outside the mesh and gateways set them for the application:
/// `forwarded`, `x-forwarded-for`, `x-real-ip`, `client-cert` (RFC 9440), `authorization`.
pub fn claims_identity(name: &[u8]) -> bool {
    [CLIENT_ID_HEADER, "x-forwarded-client-cert", "l5d-client-id"].iter().any(|claim| reads_as(name, claim))
        || reads_as_prefix(name, "x-envoy-")
}

/// Whether a header is the mesh's own: all of `outrigger-`. Stripped from what applications send, requests and
/// responses, and, once read, from what a peer's sidecar sends; only the mesh may set one.
pub fn is_mesh_internal(name: &[u8]) -> bool {
    reads_as_prefix(name, "outrigger-")
}

/// Whether a careless reader takes `name` for `canonical`, which is lower case with `-`.
fn reads_as(name: &[u8], canonical: &str) -> bool {
    name.len() == canonical.len() && reads_as_prefix(name, canonical)
}

fn reads_as_prefix(name: &[u8], canonical: &str) -> bool {
    name.len() >= canonical.len()
        && name.iter().zip(canonical.bytes()).all(|(byte, expected)| {
            if byte.is_ascii_alphanumeric() {
                byte.to_ascii_lowercase() == expected
            } else {
                expected == b'-'
            }
        })
}

/// The value of [`REASON_HEADER`]: `<component>; <code>; <text>`. Always visible ASCII and spaces: anything else in
/// `text` is escaped as in Rust source, and the text is cut at [`MAX_REASON_TEXT`] bytes.
pub fn reason_value(component: &'static str, reason: Reason, text: &str) -> String {
    const CUT: &str = "...";
    let mut value = format!("{component}; {reason}; ");
    let end = value.len() + MAX_REASON_TEXT;
    for char in text.chars() {
        let before = value.len();
        if char.is_ascii_graphic() || char == ' ' {
            value.push(char);
        } else {
            value.extend(char.escape_default());
        }
        if value.len() > end {
            value.truncate(before.min(end - CUT.len()));
            value.push_str(CUT);
            break;
        }
    }
    value.truncate(value.trim_end().len());
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(value: &str) -> Vec<String> {
        connection_tokens([value.as_bytes()]).unwrap()
    }

    #[test]
    fn headers_for_the_next_hop_stay() {
        let connection = tokens("X-Mine, close, , host, X-Forwarded-For");
        for name in
            ["Connection", "keep-alive", "Proxy-Connection", "TE", "Transfer-Encoding", "upgrade", "x-mine"]
        {
            assert!(is_hop_by_hop(name.as_bytes(), &connection), "{name}");
        }
        for name in ["host", "x-forwarded-for", "trailer", "proxy-authorization", "content-length", "x-other"]
        {
            assert!(!is_hop_by_hop(name.as_bytes(), &connection), "{name}");
        }
    }

    #[test]
    fn connection_values_are_lists_of_tokens() {
        assert_eq!(tokens("Keep-Alive, X-A"), ["keep-alive", "x-a"]);
        assert_eq!(tokens(""), Vec::<String>::new());
        assert_eq!(connection_tokens([&b"a b"[..]]), None);
        let many = "a,".repeat(MAX_CONNECTION_TOKENS);
        assert_eq!(tokens(&many).len(), MAX_CONNECTION_TOKENS);
        assert_eq!(connection_tokens([many.as_bytes(), b"a"]), None);
    }

    #[test]
    fn te_and_upgrade() {
        assert!(te_has_trailers(b"trailers"));
        assert!(te_has_trailers(b"gzip;q=0.5, Trailers"));
        assert!(!te_has_trailers(b"gzip"));
        let asked = tokens("Upgrade");
        assert_eq!(upgrade_protocol(&asked, &[b"websocket"]), Some("websocket"));
        assert_eq!(upgrade_protocol(&asked, &[b"tcp/1"]), Some("tcp/1"));
        for refused in [
            &b"h2c"[..],
            b"H2C",
            b"h2c/1",
            b"HTTP/2.0",
            b"TLS/1.0",
            b"a, b",
            b"foo, h2c",
            b"",
            b"a/",
            b"a\r\nb: c",
            b"\xff",
        ] {
            assert_eq!(upgrade_protocol(&asked, &[refused]), None, "{refused:?}");
        }
        assert_eq!(upgrade_protocol(&asked, &[b"a", b"b"]), None);
        assert_eq!(upgrade_protocol(&tokens("close"), &[b"websocket"]), None);
    }

    #[test]
    fn headers_that_speak_of_others_pass() {
        for name in [
            "x-forwarded-for",
            "forwarded",
            "x-real-ip",
            "client-cert",
            "authorization",
            "x-envoy",
            "outrigger",
            "l5d-client-id-x",
            "x-outrigger-client-id",
        ] {
            assert!(!claims_identity(name.as_bytes()) && !is_mesh_internal(name.as_bytes()), "{name}");
        }
        for name in [H1_HEADER, REASON_HEADER, CLIENT_ID_HEADER, "Outrigger_H1"] {
            assert!(is_mesh_internal(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn framing_is_spelled_in_one_way() {
        for name in ["Transfer_Encoding", "content_length", "CONTENT.LENGTH", "transfer~encoding"] {
            assert!(misspells_framing(name.as_bytes()), "{name}");
        }
        for name in ["Transfer-Encoding", "content-length", "content-type", "x-content_length"] {
            assert!(!misspells_framing(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn a_reason_is_one_line_of_ascii() {
        assert_eq!(
            reason_value("outbound", Reason::ConnectFailed, "10.0.0.1:80: caf\u{e9}\r\nx: y"),
            "outbound; connect_failed; 10.0.0.1:80: caf\\u{e9}\\r\\nx: y"
        );
        assert_eq!(reason_value("outbound", Reason::Loop, ""), "outbound; loop;");
    }

    proptest! {
        #[test]
        fn every_spelling_of_a_claim_is_one(
            base in prop::sample::select(vec![
                "outrigger-client-id", "x-forwarded-client-cert", "l5d-client-id",
                "x-envoy-internal", "x-envoy-peer-metadata", "x-envoy-anything",
            ]),
            changes in prop::collection::vec((any::<bool>(), 0_usize..4), 32),
        ) {
            let spelled: String = base.chars().zip(&changes).map(|(char, (upper, mark))| match char {
                '-' => ['-', '_', '.', '~'][*mark],
                char if *upper => char.to_ascii_uppercase(),
                char => char,
            }).collect();
            prop_assert!(claims_identity(spelled.as_bytes()), "{}", spelled);
        }

        #[test]
        fn a_reason_is_a_valid_field_value(text in "(?s).{0,400}") {
            let value = reason_value("inbound", Reason::AccessDenied, &text);
            let rest = value.strip_prefix("inbound; access_denied;").unwrap();
            prop_assert!(rest.len() <= MAX_REASON_TEXT + 1);
            prop_assert!(value.bytes().all(|b| b.is_ascii_graphic() || b == b' '));
            prop_assert!(!value.ends_with(' '));
        }
    }
}
