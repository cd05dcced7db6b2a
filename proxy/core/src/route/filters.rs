//! What a rule changes: headers, where the request is sent on to, who gets a copy.
//!
//! Everything is checked when it arrives. What would let a policy frame a message, name a caller or speak as the mesh
//! is refused, not skipped: the Gateway API wants no request served without its filter.

use std::sync::Arc;

use outrigger_api::v1;

use super::{Backend, Matched};
use crate::{
    headers::{is_hop_by_hop, is_mesh_internal, is_token, misspells_framing},
    request::View,
};

/// Copies of one request; each costs its target a whole request.
const MAX_MIRRORS: usize = 16;

/// Bytes of a DNS name.
const MAX_HOSTNAME: usize = 253;

/// What a rule, or one of its backends, does to what passes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters {
    /// Of the request.
    pub request_headers: Option<HeaderChange>,
    /// Of the response.
    pub response_headers: Option<HeaderChange>,
    /// The request is answered with this; nothing is asked. Never of a backend, never beside `rewrite`.
    pub redirect: Option<Redirect>,
    /// Of the request.
    pub rewrite: Option<Rewrite>,
    /// Who gets a copy of the request.
    pub mirrors: Vec<Mirror>,
}

/// A header's name, in lower case, and its value.
pub type Field = (Box<str>, Box<[u8]>);

/// A change of headers, to be made in this order. Names are lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderChange {
    /// Replaces all values of the name.
    pub set: Vec<Field>,
    /// One value more.
    pub add: Vec<Field>,
    /// All values go.
    pub remove: Vec<Box<str>>,
}

/// An answer that sends the client elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    scheme: Option<Scheme>,
    hostname: Option<Box<str>>,
    path: Option<PathChange>,
    port: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

/// A change of where a request is addressed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// The new authority.
    pub hostname: Option<Box<str>>,
    path: Option<PathChange>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum PathChange {
    /// Begins with `/`.
    Full(Box<[u8]>),
    /// Empty, or begins with `/`; without one at its end.
    Prefix(Box<[u8]>),
}

/// A copy of some requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Who gets it.
    pub backend: Backend,
    /// Of a million requests.
    pub per_million: u32,
}

impl Filters {
    pub(super) fn from_wire(wire: &v1::Filters) -> Result<Self, String> {
        if wire.redirect.is_some() && wire.rewrite.is_some() {
            return Err("a redirect and a rewrite exclude each other".to_owned());
        }
        if wire.mirrors.len() > MAX_MIRRORS {
            return Err(format!("{} mirrors; at most {MAX_MIRRORS} are taken", wire.mirrors.len()));
        }
        let headers =
            |change: &Option<v1::HeaderChange>| change.as_ref().map(HeaderChange::from_wire).transpose();
        Ok(Self {
            request_headers: headers(&wire.request_headers)?,
            response_headers: headers(&wire.response_headers)?,
            redirect: wire.redirect.as_ref().map(Redirect::from_wire).transpose()?,
            rewrite: wire.rewrite.as_ref().map(Rewrite::from_wire).transpose()?,
            mirrors: wire.mirrors.iter().map(Mirror::from_wire).collect::<Result<_, _>>()?,
        })
    }

    /// Whether they make sense only where a prefix was matched.
    pub(super) fn replace_a_prefix(&self) -> bool {
        let redirect = self.redirect.as_ref().and_then(|redirect| redirect.path.as_ref());
        let rewrite = self.rewrite.as_ref().and_then(|rewrite| rewrite.path.as_ref());
        redirect.into_iter().chain(rewrite).any(|change| matches!(change, PathChange::Prefix(_)))
    }
}

impl HeaderChange {
    fn from_wire(wire: &v1::HeaderChange) -> Result<Self, String> {
        Ok(Self {
            set: fields(&wire.set)?,
            add: fields(&wire.add)?,
            remove: wire.remove.iter().map(|name| changeable(name)).collect::<Result<_, _>>()?,
        })
    }
}

/// Of entries with one name the first counts (Gateway API, `HTTPHeader.name`).
fn fields(wire: &[v1::HeaderField]) -> Result<Vec<Field>, String> {
    let mut fields: Vec<Field> = Vec::with_capacity(wire.len());
    for field in wire {
        let name = changeable(&field.name)?;
        let value = field.value.as_bytes().trim_ascii();
        // RFC 9110, 5.5.
        if !value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)) {
            return Err(format!("the value {:?} of header {name} holds what no header can", field.value));
        }
        if fields.iter().all(|(other, _)| *other != name) {
            fields.push((name, value.into()));
        }
    }
    Ok(fields)
}

/// A name, in lower case, that a policy may change.
fn changeable(name: &str) -> Result<Box<str>, String> {
    let lower = name.to_ascii_lowercase();
    let bytes = lower.as_bytes();
    if !is_token(bytes) {
        return Err(format!("{name:?} is no header's name"));
    }
    if is_hop_by_hop(bytes, &[])
        || misspells_framing(bytes)
        || lower == "content-length"
        || lower == "trailer"
    {
        return Err(format!("header {name} frames the message; it is not a policy's to change"));
    }
    if lower == "host" {
        return Err("header host is changed by a rewrite's hostname".to_owned());
    }
    if is_mesh_internal(bytes) {
        return Err(format!("header {name} is the mesh's own; it is not a policy's to change"));
    }
    Ok(lower.into())
}

impl Redirect {
    fn from_wire(wire: &v1::Redirect) -> Result<Self, String> {
        let status = u16::try_from(wire.status).ok();
        let status = status.filter(|status| matches!(status, 301 | 302 | 303 | 307 | 308));
        let scheme = match &*wire.scheme {
            "" => None,
            "http" => Some(Scheme::Http),
            "https" => Some(Scheme::Https),
            other => return Err(format!("a redirect to the scheme {other:?}; it is http or https")),
        };
        let port = u16::try_from(wire.port).map_err(|_| format!("a redirect to port {}", wire.port))?;
        Ok(Self {
            status: status.ok_or_else(|| format!("{} is no status of a redirect", wire.status))?,
            scheme,
            hostname: hostname(&wire.hostname)?,
            path: PathChange::from_wire(wire.path.as_ref())?,
            port: (port != 0).then_some(port),
        })
    }

    /// Where the client is sent: the value of `Location`. `tls`: the request came over TLS.
    ///
    /// Absolute, unless neither the rule nor the request names a host. The port is left out where it is the scheme's
    /// own. The request's path and query stay as they came, but for bytes that no header can hold, which are escaped.
    pub fn location<V: View>(&self, view: &V, matched: Matched, tls: bool) -> Vec<u8> {
        let scheme = self.scheme.unwrap_or(if tls { Scheme::Https } else { Scheme::Http });
        let (host, port) = split_port(view.authority().unwrap_or_default());
        let host = self.hostname.as_deref().map_or(host, str::as_bytes);
        // A scheme brings its own port with it.
        let port = self.port.or(port.filter(|_| self.scheme.is_none())).filter(|port| *port != scheme.port());
        let target = view.target();
        // `OPTIONS *` has no path.
        let target = if target.starts_with(b"/") { target } else { b"/" };
        let target = self.path.as_ref().map_or(target.into(), |path| path.apply(target, matched));
        if host.is_empty() {
            // `//x/y` alone would lead to the host x (RFC 3986, 4.2).
            let slashes = target.iter().take_while(|byte| **byte == b'/').count();
            return escape(Vec::new(), &target[slashes - 1..]);
        }
        let location = escape(scheme.prefix().to_vec(), host);
        let location = match port {
            Some(port) => escape(location, format!(":{port}").as_bytes()),
            None => location,
        };
        escape(location, &target)
    }
}

impl Scheme {
    fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }

    fn prefix(self) -> &'static [u8] {
        match self {
            Self::Http => b"http://",
            Self::Https => b"https://",
        }
    }
}

/// Host and port of an authority that was found well-formed.
fn split_port(authority: &[u8]) -> (&[u8], Option<u16>) {
    let Some(colon) = authority.iter().rposition(|byte| *byte == b':') else { return (authority, None) };
    let (host, port) = (&authority[..colon], &authority[colon + 1..]);
    if port.contains(&b']') {
        // A colon of an IPv6 address.
        return (authority, None);
    }
    (host, std::str::from_utf8(port).ok().and_then(|port| port.parse().ok()))
}

fn escape(mut out: Vec<u8>, text: &[u8]) -> Vec<u8> {
    out.reserve(text.len());
    for byte in text {
        if byte.is_ascii_graphic() {
            out.push(*byte);
        } else {
            let digit = |four: u8| b"0123456789ABCDEF"[usize::from(four)];
            out.extend([b'%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    out
}

impl Rewrite {
    fn from_wire(wire: &v1::Rewrite) -> Result<Self, String> {
        Ok(Self { hostname: hostname(&wire.hostname)?, path: PathChange::from_wire(wire.path.as_ref())? })
    }

    /// The new path and query of a request for `target`. The query stays, and so does a target that is no path
    /// (`OPTIONS *`).
    pub fn target(&self, target: &[u8], matched: Matched) -> Vec<u8> {
        match &self.path {
            Some(change) if target.starts_with(b"/") => change.apply(target, matched),
            _ => target.to_vec(),
        }
    }
}

/// Empty: none.
fn hostname(text: &str) -> Result<Option<Box<str>>, String> {
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if text.len() > MAX_HOSTNAME || !text.bytes().all(is_host) {
        return Err(format!("{text:?} is no host's name"));
    }
    Ok((!text.is_empty()).then(|| text.into()))
}

impl PathChange {
    fn from_wire(wire: Option<&v1::PathChange>) -> Result<Option<Self>, String> {
        use v1::path_change::Change;
        let Some(change) = wire.and_then(|wire| wire.change.as_ref()) else { return Ok(None) };
        let (Change::Full(text) | Change::Prefix(text)) = change;
        if !text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#')) {
            return Err(format!("{text:?} is no path that a request can be given"));
        }
        let rooted = format!("/{}", text.strip_prefix('/').unwrap_or(text));
        Ok(Some(match change {
            Change::Full(_) => Self::Full(rooted.into_bytes().into()),
            Change::Prefix(_) => Self::Prefix(rooted.strip_suffix('/').unwrap_or(&rooted).as_bytes().into()),
        }))
    }

    /// As the table of the Gateway API has it (`HTTPPathModifier.replacePrefixMatch`).
    fn apply(&self, target: &[u8], matched: Matched) -> Vec<u8> {
        let path_end = target.iter().position(|byte| *byte == b'?').unwrap_or(target.len());
        let (path, query) = target.split_at(path_end);
        let mut new = match self {
            Self::Full(path) => path.to_vec(),
            Self::Prefix(prefix) => {
                let rest = matched.prefix.and_then(|length| path.get(length..)).unwrap_or(path);
                [prefix, rest].concat()
            }
        };
        if new.is_empty() {
            new.push(b'/');
        }
        new.extend_from_slice(query);
        new
    }
}

impl Mirror {
    fn from_wire(wire: &v1::Mirror) -> Result<Self, String> {
        let Some(backend) = &wire.backend else { return Err("a mirror without a backend".to_owned()) };
        if backend.filters.is_some() {
            return Err(format!("a mirror to {} with filters of its own", backend.service));
        }
        Ok(Self { backend: Backend::from_wire(backend)?, per_million: wire.per_million })
    }
}

impl Backend {
    pub(super) fn from_wire(wire: &v1::Backend) -> Result<Self, String> {
        let invalid: Option<Arc<str>> = (!wire.invalid.is_empty()).then(|| (&*wire.invalid).into());
        if wire.service.is_empty() && invalid.is_none() {
            return Err("a backend without a service".to_owned());
        }
        let filters = wire.filters.as_ref().map(Filters::from_wire).transpose()?;
        if filters.as_ref().is_some_and(|filters| filters.redirect.is_some()) {
            return Err(format!("a redirect at backend {}; it belongs to the rule", wire.service));
        }
        Ok(Self {
            service: (&*wire.service).into(),
            port: u16::try_from(wire.port)
                .map_err(|_| format!("backend {}: no port {}", wire.service, wire.port))?,
            weight: wire.weight,
            filters: filters.map(Box::new),
            invalid,
        })
    }
}

#[cfg(test)]
mod tests {
    use v1::path_change::Change;

    use super::*;
    use crate::request::Request;

    fn path(change: Change) -> v1::PathChange {
        v1::PathChange { change: Some(change) }
    }

    fn rewrite(change: Change) -> Rewrite {
        Rewrite::from_wire(&v1::Rewrite { path: Some(path(change)), ..v1::Rewrite::default() }).unwrap()
    }

    #[test]
    fn a_prefix_is_replaced_as_the_gateway_api_says() {
        // The table of HTTPPathModifier.replacePrefixMatch, then what it leaves open.
        for (request, prefix, replacement, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo/bar?a=/foo", "/foo", "/xyz", "/xyz/bar?a=/foo"),
            ("/foo?a", "/foo", "", "/?a"),
            ("/foo", "/", "/xyz", "/xyz/foo"),
            ("/", "/", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "xyz", "/xyz/bar"),
            ("*", "/", "/xyz", "*"),
        ] {
            let matched = Matched { prefix: Some(prefix.trim_end_matches('/').len()) };
            let rewrite = rewrite(Change::Prefix(replacement.into()));
            let target = rewrite.target(request.as_bytes(), matched);
            assert_eq!(String::from_utf8(target).unwrap(), expected, "{request} {prefix} {replacement:?}");
        }
    }

    #[test]
    fn a_whole_path_is_replaced_and_the_query_stays() {
        for (replacement, request, expected) in [
            ("/one", "/full/one/two", "/one"),
            ("/one/", "/full?a=b?c", "/one/?a=b?c"),
            ("one", "/full", "/one"),
            ("", "/full?x", "/?x"),
            ("/one", "*", "*"),
        ] {
            let rewrite = rewrite(Change::Full(replacement.into()));
            let target = rewrite.target(request.as_bytes(), Matched { prefix: None });
            assert_eq!(String::from_utf8(target).unwrap(), expected, "{request} {replacement:?}");
        }
        let host_only = Rewrite { hostname: Some("x".into()), path: None };
        assert_eq!(host_only.target(b"/a?b", Matched { prefix: Some(2) }), b"/a?b");
    }

    fn location(wire: v1::Redirect, authority: Option<&str>, target: &str, tls: bool) -> String {
        let redirect = Redirect::from_wire(&v1::Redirect { status: 302, ..wire }).unwrap();
        let request = Request { authority: authority.map(Into::into), ..Request::new("GET", target) };
        String::from_utf8(redirect.location(&request, Matched { prefix: Some(4) }, tls)).unwrap()
    }

    #[test]
    fn a_location_keeps_what_the_redirect_does_not_name() {
        let none = v1::Redirect::default;
        let scheme = |scheme: &str| v1::Redirect { scheme: scheme.into(), ..none() };
        let port = |port| v1::Redirect { port, ..none() };
        for (redirect, authority, target, tls, expected) in [
            (none(), Some("a.b:8080"), "/foo?q=1", false, "http://a.b:8080/foo?q=1"),
            (none(), Some("a.b:80"), "/foo", false, "http://a.b/foo"),
            (none(), Some("a.b:80"), "/foo", true, "https://a.b:80/foo"),
            (none(), Some("a.b:443"), "/foo", true, "https://a.b/foo"),
            (none(), Some("a.b"), "/foo", false, "http://a.b/foo"),
            (none(), Some("[fd00::1]:8080"), "/", false, "http://[fd00::1]:8080/"),
            (none(), Some("[fd00::1]"), "/", false, "http://[fd00::1]/"),
            // A scheme brings its own port with it.
            (scheme("https"), Some("a.b:8080"), "/foo", false, "https://a.b/foo"),
            (scheme("http"), Some("a.b:8080"), "/foo", true, "http://a.b/foo"),
            (port(8443), Some("a.b:8080"), "/foo", false, "http://a.b:8443/foo"),
            (port(80), Some("a.b:8080"), "/foo", false, "http://a.b/foo"),
            (port(443), Some("a.b"), "/foo", false, "http://a.b:443/foo"),
            (v1::Redirect { port: 443, ..scheme("https") }, Some("a.b"), "/foo", false, "https://a.b/foo"),
            (
                v1::Redirect { hostname: "c.d".into(), ..none() },
                Some("a.b:81"),
                "/foo",
                false,
                "http://c.d:81/foo",
            ),
            (
                v1::Redirect { path: Some(path(Change::Prefix("/x".into()))), ..none() },
                Some("a"),
                "/foo/bar?q",
                false,
                "http://a/x/bar?q",
            ),
            (
                v1::Redirect { path: Some(path(Change::Full("/x".into()))), ..none() },
                Some("a"),
                "/foo/bar?q",
                false,
                "http://a/x?q",
            ),
            (none(), Some("a"), "*", false, "http://a/"),
            (none(), Some("a"), "/\u{e9}\r\n ", false, "http://a/%C3%A9%0D%0A%20"),
            // Nobody named a host: it must not be one that the path names.
            (none(), None, "/foo?q", false, "/foo?q"),
            (none(), None, "//evil.example/foo", false, "/evil.example/foo"),
            (
                v1::Redirect { path: Some(path(Change::Prefix(String::new()))), ..none() },
                None,
                "/foo//evil.example",
                false,
                "/evil.example",
            ),
        ] {
            assert_eq!(location(redirect, authority, target, tls), expected);
        }
    }

    fn refused(filters: &v1::Filters) -> String {
        Filters::from_wire(filters).unwrap_err()
    }

    #[test]
    fn what_is_no_redirect_or_rewrite_is_refused() {
        let redirect = |redirect| v1::Filters { redirect: Some(redirect), ..v1::Filters::default() };
        let good = v1::Redirect { status: 302, ..v1::Redirect::default() };
        assert!(Filters::from_wire(&redirect(good.clone())).is_ok());
        for bad in [
            v1::Redirect { status: 0, ..good.clone() },
            v1::Redirect { status: 200, ..good.clone() },
            v1::Redirect { status: 65_536 + 302, ..good.clone() },
            v1::Redirect { scheme: "javascript".into(), ..good.clone() },
            v1::Redirect { hostname: "a/b".into(), ..good.clone() },
            v1::Redirect { hostname: "a".repeat(254), ..good.clone() },
            v1::Redirect { port: 65_536, ..good.clone() },
            v1::Redirect { path: Some(path(Change::Full("/a b".into()))), ..good.clone() },
            v1::Redirect { path: Some(path(Change::Full("/a\r\nb".into()))), ..good.clone() },
            v1::Redirect { path: Some(path(Change::Prefix("/a?b".into()))), ..good.clone() },
            v1::Redirect { path: Some(path(Change::Prefix("/a#b".into()))), ..good.clone() },
        ] {
            assert!(Filters::from_wire(&redirect(bad.clone())).is_err(), "{bad:?}");
        }
        let both = v1::Filters { rewrite: Some(v1::Rewrite::default()), ..redirect(good.clone()) };
        assert_eq!(refused(&both), "a redirect and a rewrite exclude each other");
        let backend =
            v1::Backend { service: "a.b".into(), filters: Some(redirect(good)), ..v1::Backend::default() };
        assert!(Backend::from_wire(&backend).is_err());
    }

    #[test]
    fn headers_that_frame_or_speak_for_the_mesh_are_refused() {
        let of = |change| v1::Filters { request_headers: Some(change), ..v1::Filters::default() };
        let field = |name: &str, value: &str| v1::HeaderField { name: name.into(), value: value.into() };
        for name in [
            "",
            ":path",
            "a b",
            "a\r\n",
            "Host",
            "Connection",
            "transfer-encoding",
            "Transfer_Encoding",
            "Content-Length",
            "content_length",
            "TE",
            "Trailer",
            "Upgrade",
            "keep-alive",
            "Outrigger-Client-Id",
            "outrigger_h1",
            "outrigger-anything",
        ] {
            for change in [
                v1::HeaderChange { set: vec![field(name, "x")], ..v1::HeaderChange::default() },
                v1::HeaderChange { add: vec![field(name, "x")], ..v1::HeaderChange::default() },
                v1::HeaderChange { remove: vec![name.into()], ..v1::HeaderChange::default() },
            ] {
                assert!(Filters::from_wire(&of(change)).is_err(), "{name}");
            }
        }
        for value in ["a\r\nb: c", "a\nb", "a\0", "\u{7f}"] {
            let change = v1::HeaderChange { set: vec![field("a", value)], ..v1::HeaderChange::default() };
            assert!(Filters::from_wire(&of(change)).is_err(), "{value:?}");
        }
        let change = v1::HeaderChange {
            set: vec![field("X-A", " 1 "), field("x-a", "2"), field("x-b", "\u{e9}\t3")],
            add: vec![field("X-A", "")],
            remove: vec!["X-C".into()],
        };
        let change = Filters::from_wire(&of(change)).unwrap().request_headers.unwrap();
        let value = |text: &str| Box::from(text.as_bytes());
        // Of entries with one name the first counts.
        assert_eq!(change.set, [("x-a".into(), value("1")), ("x-b".into(), value("\u{e9}\t3"))]);
        assert_eq!(change.add, [("x-a".into(), value(""))]);
        assert_eq!(change.remove, ["x-c".into()]);
    }

    #[test]
    fn mirrors_are_bounded_and_have_a_backend() {
        let backend = v1::Backend { service: "a.b".into(), port: 80, ..v1::Backend::default() };
        let mirrors = |mirrors| v1::Filters { mirrors, ..v1::Filters::default() };
        let good = v1::Mirror { backend: Some(backend.clone()), per_million: 10 };
        assert_eq!(Filters::from_wire(&mirrors(vec![good.clone()])).unwrap().mirrors[0].per_million, 10);
        assert!(Filters::from_wire(&mirrors(vec![good.clone(); MAX_MIRRORS + 1])).is_err());
        let filtered = v1::Backend { filters: Some(v1::Filters::default()), ..backend.clone() };
        for bad in [
            v1::Mirror { backend: None, ..good.clone() },
            v1::Mirror { backend: Some(filtered), ..good.clone() },
            v1::Mirror { backend: Some(v1::Backend { port: 65_536, ..backend.clone() }), ..good.clone() },
            v1::Mirror { backend: Some(v1::Backend { service: String::new(), ..backend }), ..good },
        ] {
            assert!(Filters::from_wire(&mirrors(vec![bad.clone()])).is_err(), "{bad:?}");
        }
    }
}
