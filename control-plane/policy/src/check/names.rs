//! The spellings of names, identities, networks, paths and expressions.

use std::net::IpAddr;

use ipnet::IpNet;
use outrigger_core::headers::is_token_byte;
use outrigger_core::matching::Pattern;

use crate::bounds::{
    MAX_HEADER_NAME, MAX_HEADER_VALUE, MAX_IDENTITY, MAX_LABEL, MAX_METHOD, MAX_PATH, MAX_SERVICE,
    MAX_SUBDOMAIN,
};
use crate::tree::shown;

pub(crate) const LABEL: &str =
    "1 to 63 lower-case letters, digits and `-`, with a letter or digit at both ends";
pub(crate) const SUBDOMAIN: &str =
    "lower-case letters, digits, `-` and `.`, with a letter or digit at both ends of each part, at most 253";
pub(crate) const QUALIFIED: &str =
    "a name of 1 to 63 letters, digits, `-`, `_` and `.`, with a DNS name and `/` before it or not";
pub(crate) const LABEL_VALUE: &str =
    "at most 63 letters, digits, `-`, `_` and `.`, with a letter or digit at both ends";
const SERVICE: &str = "lower-case letters, digits, `-`, `_` and `.`, at most 200";

/// The text of a fault: what it is, and what it should be.
pub(crate) fn not_a(text: &str, what: &str, rule: &str) -> String {
    if text.is_empty() {
        format!("is empty: a {what} is {rule}")
    } else {
        format!("`{}` is no {what}: it is {rule}", shown(text))
    }
}

fn bounded_by_alphanumeric(
    text: &str,
    inner: impl Fn(u8) -> bool,
    alphanumeric: impl Fn(u8) -> bool,
) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(|byte| alphanumeric(*byte))
        && bytes.last().is_some_and(|byte| alphanumeric(*byte))
        && bytes.iter().all(|byte| alphanumeric(*byte) || inner(*byte))
}

/// RFC 9110, 5.6.2.
pub(crate) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(is_token_byte)
}

fn lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// RFC 1123, as Kubernetes has it.
pub(crate) fn is_label(text: &str) -> bool {
    text.len() <= MAX_LABEL && bounded_by_alphanumeric(text, |byte| byte == b'-', lower)
}

/// RFC 1123, as Kubernetes has it.
pub(crate) fn is_subdomain(text: &str) -> bool {
    text.len() <= MAX_SUBDOMAIN
        && text.split('.').all(|part| bounded_by_alphanumeric(part, |byte| byte == b'-', lower))
}

/// A DNS name, whose labels are bounded.
pub(crate) fn is_dns_name(text: &str) -> bool {
    text.len() <= MAX_SUBDOMAIN && text.split('.').all(is_label)
}

/// The name of a label or an annotation.
pub(crate) fn is_qualified(text: &str) -> bool {
    let name = match text.split_once('/') {
        Some((prefix, name)) if is_subdomain(prefix) => name,
        Some(_) => return false,
        None => text,
    };
    !name.is_empty() && is_label_value(name)
}

/// The value of a label.
pub(crate) fn is_label_value(text: &str) -> bool {
    text.is_empty()
        || text.len() <= 63
            && bounded_by_alphanumeric(
                text,
                |byte| b"-_.".contains(&byte),
                |byte| byte.is_ascii_alphanumeric(),
            )
}

pub(crate) fn namespace(text: &str) -> Result<(), String> {
    if is_label(text) { Ok(()) } else { Err(not_a(text, "namespace", LABEL)) }
}

/// A service's name, as catalogs hold it.
pub(crate) fn service(text: &str) -> Result<(), String> {
    let good = |byte: u8| lower(byte) || byte == b'-' || byte == b'_';
    let whole =
        text.len() <= MAX_SERVICE && text.split('.').all(|part| !part.is_empty() && part.bytes().all(good));
    if whole { Ok(()) } else { Err(not_a(text, "service's name", SERVICE)) }
}

/// `<name>.<namespace>`.
pub(crate) fn full_service(text: &str) -> Result<(), String> {
    let Some((name, space)) = text.rsplit_once('.') else {
        return Err(format!("`{}` names no namespace: write <service>.<namespace>", shown(text)));
    };
    service(name)?;
    namespace(space)
}

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
pub(crate) fn identity(text: &str) -> Result<(), String> {
    let parts = || {
        let (domain, rest) = text.strip_prefix("spiffe://")?.split_once("/ns/")?;
        let (namespace, account) = rest.split_once("/sa/")?;
        (is_dns_name(domain) && is_label(namespace) && is_dns_name(account)).then_some(())
    };
    let form = "spiffe://<trust domain>/ns/<namespace>/sa/<service account>, in lower case";
    parts().ok_or_else(|| not_a(text, "identity", form))
}

/// An identity, or the beginning of one and `*`.
pub(crate) fn identity_pattern(text: &str) -> Result<(), String> {
    let Some(start) = text.strip_suffix('*') else { return identity(text) };
    let good = |byte: u8| lower(byte) || b"-./".contains(&byte);
    let begins = start.strip_prefix("spiffe://").is_some_and(|rest| rest.bytes().all(good));
    if text == "*" || begins && text.len() <= MAX_IDENTITY {
        Ok(())
    } else {
        Err(not_a(
            text,
            "beginning of an identity",
            "spiffe://<trust domain>/ns/<namespace>/sa/*, as far as it goes, and one `*` at the end",
        ))
    }
}

/// `<namespace>/<service account>`.
pub(crate) fn service_account(text: &str) -> Result<(), String> {
    let parts =
        text.split_once('/').filter(|(namespace, account)| is_label(namespace) && is_dns_name(account));
    match parts {
        Some(_) => Ok(()),
        None => Err(not_a(text, "service account", "<namespace>/<service account>")),
    }
}

/// A network.
pub(crate) fn cidr(text: &str) -> Result<(), String> {
    match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
        (Ok(network), _) if network.trunc() == network => Ok(()),
        (Ok(network), _) => {
            Err(format!("`{text}` has bits set behind its prefix: write {}", network.trunc()))
        }
        (_, Ok(address)) => Err(format!("`{text}` is one address: write {}", IpNet::from(address))),
        _ => Err(not_a(
            text,
            "network",
            "an address and the length of a prefix, as in 10.0.0.0/8 or fd00::/64",
        )),
    }
}

/// A method, as it stands in a request.
pub(crate) fn method(text: &str) -> Result<(), String> {
    let upper = text.to_ascii_uppercase();
    if !is_token(text) || text.len() > MAX_METHOD {
        return Err(not_a(text, "method", "a word, as in GET"));
    }
    let known = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    if upper != text && known.contains(&&*upper) {
        return Err(format!("`{text}` is no method: they are upper case, write {upper}"));
    }
    Ok(())
}

/// A header's name.
pub(crate) fn header(text: &str) -> Result<(), String> {
    if text.starts_with(':') {
        return Err(format!(
            "`{}` is no header's name: use the fields for method, path and service",
            shown(text)
        ));
    }
    if is_token(text) && text.len() <= MAX_HEADER_NAME {
        Ok(())
    } else {
        Err(not_a(text, "header's name", "1 to 256 letters, digits and !#$%&'*+-.^_`|~"))
    }
}

/// A header's value: RFC 9110, 5.5.
pub(crate) fn header_value(text: &str) -> Result<(), String> {
    if text.len() > MAX_HEADER_VALUE {
        return Err(format!("has {} bytes: at most {MAX_HEADER_VALUE} are taken", text.len()));
    }
    if !text.bytes().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)) {
        return Err(format!("`{}` holds what no header's value can", shown(text)));
    }
    if text.trim_ascii() != text {
        return Err(format!("`{}` has blanks at an end, which no header's value has", shown(text)));
    }
    Ok(())
}

/// A path as requests are matched by it (the Gateway API's rules for `HTTPPathMatch.value`).
pub(crate) fn path(text: &str) -> Result<(), String> {
    let fault = |reason: &str| Err(format!("`{}` {reason}", shown(text)));
    if !text.starts_with('/') {
        return fault("does not begin with `/`");
    }
    if text.len() > MAX_PATH {
        return Err(format!("has {} bytes: at most {MAX_PATH} are taken", text.len()));
    }
    if text.contains("//") {
        return fault("has an empty element, which no request has when it is matched");
    }
    if text.split('/').any(|element| element == "." || element == "..") {
        return fault("has an element `.` or `..`, which no request has when it is matched");
    }
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        match byte {
            b'%' => match tail {
                [a, b, tail @ ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => {
                    if (a, b.to_ascii_lowercase()) == (&b'2', b'f') {
                        return fault("has `%2f`: what becomes of it is said by MeshDefaults.escapedSlashes");
                    }
                    rest = tail;
                }
                _ => return fault("has a `%` without two hexadecimal digits"),
            },
            b'?' | b'#' => return fault("has a query or fragment, which is no part of a path"),
            byte if byte.is_ascii_alphanumeric() || b"-/._~!$&'()*+,;=:@".contains(byte) => {}
            _ => return fault("holds a character that must be percent-encoded"),
        }
    }
    Ok(())
}

/// A regular expression, which matches the whole. The proxies' own words decide.
pub(crate) fn expression(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("is empty: write an expression".to_owned());
    }
    if text.len() > MAX_PATH {
        return Err(format!("has {} bytes: at most {MAX_PATH} are taken", text.len()));
    }
    Pattern::new(text).map(|_| ()).map_err(|fault| {
        // The regex crate draws a picture on several lines; the reason is the last one.
        let reason = fault.lines().last().unwrap_or_default();
        let reason = reason.strip_prefix("error: ").unwrap_or(reason);
        let reason = reason.rsplit_once("is taken: ").map_or(reason, |(_, reason)| reason);
        format!("`{}` is no regular expression that is taken: {reason}", shown(text))
    })
}

/// A host's name.
pub(crate) fn host(text: &str) -> Result<(), String> {
    if text.parse::<IpAddr>().is_ok() {
        return Err(format!("`{}` is an address, not a name", shown(text)));
    }
    if is_dns_name(text) { Ok(()) } else { Err(not_a(text, "host", "a DNS name in lower case")) }
}
