//! A request between its two codecs: what came in is cleaned once, and goes out as HTTP/2 between sidecars or as the
//! version that the application spoke.
//!
//! An HTTP/1.x request travels with the mark `outrigger-h1`, so that the other sidecar can give it out as HTTP/1.x again
//! (ARCHITECTURE, "The wire"). `host` travels beside `:authority` because its place among the headers is part of what
//! the application sees; that the two agree is checked on both sides.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::Body as _;
use hyper::{body::Incoming, ext::Protocol, upgrade::OnUpgrade};
use outrigger_certs::SpiffeId;
use outrigger_core::{
    authority::request_authority,
    headers::{
        CLIENT_ID_HEADER, H1_HEADER, H1Mark, REASON_HEADER, claims_identity, connection_tokens,
        is_hop_by_hop, is_mesh_internal, is_upgrade_protocol, misspells_framing, te_has_trailers,
        upgrade_protocol,
    },
    reason::Reason,
};

use super::{body::Body, reasons::Refusal};

/// The status on the wire of an application that answered 2xx to an upgrade without switching, since 2xx to CONNECT
/// means that it did. The real one is in `outrigger-h1`.
const NOT_SWITCHED: StatusCode = StatusCode::UPGRADE_REQUIRED;

/// Introduces the real status of a [`NOT_SWITCHED`] response.
const STATUS_MARK: &str = "1.1; status=";

const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");

/// A request without what was meant for the last hop only.
pub(crate) struct Message {
    pub(crate) method: Method,
    pub(crate) version: Version,
    authority: Option<Authority>,
    scheme: Scheme,
    path: Option<PathAndQuery>,
    pub(crate) headers: HeaderMap,
    /// The protocol of an upgrade or of an extended CONNECT.
    protocol: Option<String>,
    pub(crate) body: Body,
    /// Set where bytes follow instead of a body.
    pub(crate) on_upgrade: Option<OnUpgrade>,
}

impl Message {
    /// From an application, or in clear.
    pub(crate) fn from_application(request: Request<Incoming>) -> Result<Self, Refusal> {
        Self::new(request, None)
    }

    /// From a peer's sidecar.
    pub(crate) fn from_sidecar(request: Request<Incoming>) -> Result<Self, Refusal> {
        let mark = match request.headers().get(H1_HEADER) {
            None => None,
            Some(value) => Some(
                H1Mark::parse(value.as_bytes()).ok_or_else(|| bad("the mark outrigger-h1 is malformed"))?,
            ),
        };
        Self::new(request, mark)
    }

    fn new(mut request: Request<Incoming>, mark: Option<H1Mark>) -> Result<Self, Refusal> {
        let on_upgrade = request.extensions_mut().remove::<OnUpgrade>();
        let extended = request.extensions_mut().remove::<Protocol>();
        let (parts, body) = request.into_parts();
        let (mut headers, uri) = (parts.headers, parts.uri);
        let tokens = connection_tokens(headers.get_all(CONNECTION).iter().map(HeaderValue::as_bytes))
            .ok_or_else(|| bad("the Connection header is malformed"))?;
        check_framing(&mut headers).map_err(bad)?;
        check_target(&parts.method, &uri, extended.is_some()).map_err(bad)?;

        let (mut method, mut version) = (parts.method, parts.version);
        let mut protocol = extended.as_ref().map(|protocol| protocol.as_str().to_owned());
        if protocol.as_deref().is_some_and(|protocol| !is_upgrade_protocol(protocol)) {
            return Err(bad("the extended CONNECT names no protocol that can be carried"));
        }
        match mark {
            None => {}
            Some(H1Mark::Http10 | H1Mark::Http11) if protocol.is_some() => {
                return Err(bad("an extended CONNECT is no HTTP/1.x request"));
            }
            // HTTP/1.0 has no chunks: its requests have a length, or no body.
            Some(H1Mark::Http10) if !body.is_end_stream() && !headers.contains_key(CONTENT_LENGTH) => {
                return Err(bad("a request of HTTP/1.0 has a body of unknown length"));
            }
            Some(H1Mark::Http10) => version = Version::HTTP_10,
            Some(H1Mark::Http11) => version = Version::HTTP_11,
            Some(H1Mark::Upgrade { method: original }) => {
                if method != Method::CONNECT || protocol.is_none() {
                    return Err(bad("the mark outrigger-h1 names an upgrade, but the request is none"));
                }
                version = Version::HTTP_11;
                method = original.parse().map_err(|_| bad("the mark outrigger-h1 names no method"))?;
            }
        }
        if parts.version == Version::HTTP_11 && method != Method::CONNECT && body.is_end_stream() {
            let upgrade: Vec<&[u8]> = headers.get_all(UPGRADE).iter().map(HeaderValue::as_bytes).collect();
            protocol = upgrade_protocol(&tokens, &upgrade).map(str::to_owned);
        }

        let authority = {
            let hosts: Vec<&[u8]> = headers.get_all(HOST).iter().map(HeaderValue::as_bytes).collect();
            let required = version == Version::HTTP_11 && method != Method::CONNECT;
            let target = uri.authority().map(Authority::as_str);
            let required = required && target.is_none();
            match request_authority(target, &hosts, required).map_err(|error| bad(&error.to_string()))? {
                None => None,
                Some(text) => Some(text.parse().map_err(|_| bad("the request's authority is malformed"))?),
            }
        };

        let te = headers.get_all(TE).iter().any(|value| te_has_trailers(value.as_bytes()));
        strip(&mut headers, |name| {
            is_hop_by_hop(name, &tokens) || is_mesh_internal(name) || misspells_framing(name)
        });
        if te {
            headers.insert(TE, TRAILERS);
        }
        let switches = method == Method::CONNECT || protocol.is_some();
        let mut body = Body::incoming(body, parts.version);
        body.edit_trailers(strip_trailers);
        Ok(Self {
            method,
            version,
            authority,
            scheme: uri.scheme().cloned().unwrap_or(Scheme::HTTP),
            path: uri.path_and_query().cloned(),
            headers,
            protocol,
            body,
            on_upgrade: on_upgrade.filter(|_| switches),
        })
    }

    /// Whether the application spoke HTTP/1.x.
    pub(crate) fn is_h1(&self) -> bool {
        self.version < Version::HTTP_2
    }

    /// Whether bytes are to follow instead of a body.
    pub(crate) fn switches(&self) -> bool {
        self.on_upgrade.is_some()
    }

    /// Whether HTTP/2 carries the request as extended CONNECT (RFC 8441).
    pub(crate) fn needs_extended_connect(&self) -> bool {
        self.switches() && self.protocol.is_some()
    }

    /// Whether the request is an HTTP/1.1 upgrade.
    fn is_upgrade(&self) -> bool {
        self.is_h1() && self.protocol.is_some()
    }

    pub(crate) fn path(&self) -> &str {
        self.path.as_ref().map_or("", PathAndQuery::path)
    }

    /// Replaces whatever claims to say who the caller is.
    pub(crate) fn identify(&mut self, peer: Option<&SpiffeId>) {
        strip(&mut self.headers, claims_identity);
        self.body.edit_trailers(|trailers| {
            strip_trailers(trailers);
            strip(trailers, claims_identity);
        });
        if let Some(peer) = peer {
            let value = HeaderValue::from_str(peer.as_str()).expect("a SPIFFE id is printable ASCII");
            self.headers.insert(CLIENT_ID_HEADER, value);
        }
    }

    /// The request to a peer's sidecar. It can be made again while the body is repeatable.
    pub(crate) fn to_sidecar(&self) -> Request<Body> {
        let mut request = self.to_h2();
        let mark = match (self.version, self.is_upgrade()) {
            (Version::HTTP_10, _) => H1Mark::Http10,
            (_, true) => H1Mark::Upgrade { method: self.method.to_string() },
            (_, false) => H1Mark::Http11,
        };
        if self.is_h1() {
            let mark = HeaderValue::from_str(&mark.to_string()).expect("a method is printable ASCII");
            request.headers_mut().insert(H1_HEADER, mark);
        }
        request
    }

    /// The request as HTTP/2.
    pub(crate) fn to_h2(&self) -> Request<Body> {
        let mut request = self.request();
        let plain_connect = self.method == Method::CONNECT && self.protocol.is_none();
        let mut parts = http::uri::Parts::default();
        parts.authority.clone_from(&self.authority);
        if !plain_connect {
            parts.path_and_query.clone_from(&self.path);
            parts.scheme = parts.authority.is_some().then(|| self.scheme.clone());
        }
        // Without an authority the target is a path, which h2 takes from HTTP/1.x requests only.
        let relative = parts.authority.is_none();
        *request.version_mut() = if relative { Version::HTTP_11 } else { Version::HTTP_2 };
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        if self.switches()
            && let Some(protocol) = &self.protocol
        {
            *request.method_mut() = Method::CONNECT;
            request.extensions_mut().insert(Protocol::from(protocol.as_str()));
        }
        request
    }

    /// The request as HTTP/1.x.
    pub(crate) fn to_h1(&self) -> Request<Body> {
        let mut request = self.request();
        *request.version_mut() = self.version.min(Version::HTTP_11);
        let mut parts = http::uri::Parts::default();
        if self.method == Method::CONNECT {
            parts.authority.clone_from(&self.authority);
        } else {
            parts.path_and_query.clone_from(&self.path);
        }
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        if let Some(authority) = &self.authority
            && !self.headers.contains_key(HOST)
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            request.headers_mut().insert(HOST, host);
        }
        // hyper takes a GET or HEAD without either for one without a body, and would drop it.
        if !request.body().is_end_stream() && !self.headers.contains_key(CONTENT_LENGTH) && !self.switches() {
            request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        if self.switches()
            && let Some(protocol) = self.protocol.as_deref().filter(|_| self.method != Method::CONNECT)
            && let Ok(protocol) = HeaderValue::from_str(protocol)
        {
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
            request.headers_mut().insert(UPGRADE, protocol);
        }
        request
    }

    fn request(&self) -> Request<Body> {
        let mut request = Request::new(self.body.again());
        *request.method_mut() = self.method.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }

    /// Whether a response from HTTP/1.x or HTTP/2 says that bytes follow.
    pub(crate) fn has_switched(&self, response: &Response<Incoming>) -> bool {
        if !self.switches() {
            return false;
        }
        let upgraded = self.is_upgrade() && response.version() < Version::HTTP_2;
        if upgraded {
            response.status() == StatusCode::SWITCHING_PROTOCOLS
        } else {
            response.status().is_success()
        }
    }

    /// Makes the answer that says to the caller that bytes follow. `to_sidecar`: the caller is one.
    pub(crate) fn switched(&self, head: &mut http::response::Parts, to_sidecar: bool) {
        head.headers.remove(CONTENT_LENGTH);
        if self.is_upgrade() && !to_sidecar {
            head.status = StatusCode::SWITCHING_PROTOCOLS;
            head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            if let Some(Ok(protocol)) = self.protocol.as_deref().map(HeaderValue::from_str) {
                head.headers.insert(UPGRADE, protocol);
            }
        } else if self.is_upgrade() {
            head.status = StatusCode::OK;
        }
    }

    /// An answer without a switch to a peer's sidecar: 2xx would be taken for one.
    pub(crate) fn not_switched(&self, head: &mut http::response::Parts) {
        if self.is_upgrade() && head.status.is_success() {
            let mark = format!("{STATUS_MARK}{}", head.status.as_u16());
            head.headers.insert(H1_HEADER, HeaderValue::from_str(&mark).expect("printable ASCII"));
            head.status = NOT_SWITCHED;
        }
    }
}

fn bad(text: &str) -> Refusal {
    Refusal::new(Reason::BadRequest, text)
}

/// Refuses messages whose end two readers could see in two places (RFC 9112, 6.3), and makes several equal lengths
/// one. Transfer codings are stripped on the way; one that is not just the framing would be missing from the body.
pub(crate) fn check_framing(headers: &mut HeaderMap) -> Result<(), &'static str> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let coding = codings.next();
    if coding.is_some_and(|coding| !coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"))
        || codings.next().is_some()
    {
        return Err("the transfer coding is not just chunked");
    }
    let mut length = None;
    for line in headers.get_all(CONTENT_LENGTH) {
        for value in line.as_bytes().split(|byte| *byte == b',') {
            let value = parse_length(value.trim_ascii()).ok_or("the content length is malformed")?;
            if length.is_some_and(|length| length != value) {
                return Err("there are different content lengths");
            }
            length = Some(value);
        }
    }
    if coding.is_some() && length.is_some() {
        return Err("there are a content length and a transfer coding");
    }
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok(())
}

fn parse_length(value: &[u8]) -> Option<u64> {
    // `parse` would take a sign.
    let digits = value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| digits)?.parse().ok()
}

/// Whether a request's target has the form of its method: authority form is CONNECT's, and CONNECT has no other
/// (RFC 9112, 3.2.3) but for RFC 8441's.
fn check_target(method: &Method, uri: &Uri, extended: bool) -> Result<(), &'static str> {
    let plain_connect = *method == Method::CONNECT && !extended;
    if plain_connect && (uri.authority().is_none() || uri.path_and_query().is_some()) {
        return Err("the target of CONNECT is no authority");
    }
    if !plain_connect && uri.path_and_query().is_none() {
        return Err("the request's target has no path");
    }
    Ok(())
}

/// The answer to a request whose body could not be read, which is nobody's fault but its sender's.
pub(crate) fn broken_body() -> Refusal {
    bad("the request's body is malformed or broke off")
}

/// Cleans the head of a response from an application, or from an endpoint without a sidecar.
pub(crate) fn clean_response(head: &mut http::response::Parts) -> Result<(), Refusal> {
    clean(head, false)
}

/// Cleans the head of a response from a peer's sidecar: its reason passes.
pub(crate) fn clean_sidecar_response(head: &mut http::response::Parts) -> Result<(), Refusal> {
    let status = head
        .headers
        .get(H1_HEADER)
        .filter(|_| head.status == NOT_SWITCHED)
        .and_then(|mark| mark.to_str().ok()?.strip_prefix(STATUS_MARK)?.parse().ok());
    if let Some(status) = status {
        head.status = status;
    }
    clean(head, true)
}

fn clean(head: &mut http::response::Parts, keep_reason: bool) -> Result<(), Refusal> {
    check_framing(&mut head.headers).map_err(|error| {
        Refusal::new(Reason::UpstreamProtocol, format!("the application's response is refused: {error}"))
    })?;
    let tokens = connection_tokens(head.headers.get_all(CONNECTION).iter().map(HeaderValue::as_bytes))
        .ok_or_else(|| {
            Refusal::new(Reason::UpstreamProtocol, "the response's Connection header is malformed")
        })?;
    strip(&mut head.headers, |name| {
        is_hop_by_hop(name, &tokens) || (is_mesh_internal(name) && !(keep_reason && name == REASON_HEADER))
    });
    head.version = Version::HTTP_11;
    Ok(())
}

/// Fields that frame a message, name who it is for, or say who sent it are no trailers (RFC 9110, 6.5.1).
pub(crate) fn strip_trailers(trailers: &mut HeaderMap) {
    let framing = [CONTENT_LENGTH, HOST, TRANSFER_ENCODING];
    strip(trailers, |name| {
        is_hop_by_hop(name, &[])
            || is_mesh_internal(name)
            || misspells_framing(name)
            || framing.iter().any(|field| field == name)
    });
}

fn strip(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}
