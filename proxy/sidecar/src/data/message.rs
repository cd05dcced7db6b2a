//! Heads between their two codecs: what came in is cleaned once, and goes out as HTTP/2 between sidecars or as the
//! version that the application spoke.
//!
//! A message of HTTP/1.x travels with the mark `outrigger-h1`, so that the other sidecar can give it out as it came
//! (`outrigger_core::mark`; ARCHITECTURE, "The wire"). `host` travels beside `:authority` because its place among the
//! headers is part of what the application sees; that the two agree is checked on both sides.

use outrigger_certs::SpiffeId;
use outrigger_core::{
    authority::request_authority,
    case::{CaseReader, write_case},
    headers::{
        CLIENT_ID_HEADER, H1_HEADER, REASON_HEADER, claims_identity, connection_tokens, is_hop_by_hop,
        is_mesh_internal, is_upgrade_protocol, misspells_framing, te_has_trailers, upgrade_protocol,
    },
    mark::{H1Mark, MAX_REASON_PHRASE, read_reason, write_reason},
    reason::Reason,
};
use outrigger_http::{
    fields::Fields,
    h1::{Framing, reason_phrase},
    head::{RequestHead, ResponseHead, Version},
};

use super::reasons::Refusal;

/// The status on the wire of an application that answered 2xx to an upgrade without switching, since 2xx to CONNECT
/// means that it did. The real one is in `outrigger-h1`.
const NOT_SWITCHED: u16 = 426;

/// What the proxy has to remember of a request beside its head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Message {
    /// What the application wrote it in.
    pub(crate) version: Version,
    pub(crate) is_head: bool,
    /// CONNECT without a protocol.
    pub(crate) is_connect: bool,
    /// An upgrade of HTTP/1.1, or an extended CONNECT: the head's protocol says to what.
    pub(crate) is_upgrade: bool,
}

impl Message {
    /// Whether the application spoke HTTP/1.x.
    pub(crate) fn is_h1(self) -> bool {
        self.version < Version::Http2
    }

    /// Whether bytes are to follow instead of a body.
    pub(crate) fn switches(self) -> bool {
        self.is_connect || self.is_upgrade
    }

    /// A request from an application, or in clear. Cleans `head`; `framing` is where its body ends, as far as that is
    /// known.
    pub(crate) fn from_application(head: &mut RequestHead, framing: Framing) -> Result<Self, Refusal> {
        receive(head, None, framing)
    }

    /// A request from a peer's sidecar.
    pub(crate) fn from_sidecar(head: &mut RequestHead, framing: Framing) -> Result<Self, Refusal> {
        let Some(value) = head.fields.get(H1_HEADER) else { return receive(head, None, framing) };
        // The text is needed while the head changes.
        let value = value.to_vec();
        let mark = H1Mark::request(&value).ok_or_else(|| bad("the mark outrigger-h1 is malformed"))?;
        if let Some(case) = mark.case.and_then(CaseReader::new) {
            restore_case(&mut head.fields, case);
        }
        receive(head, Some(mark), framing)
    }

    /// Whether a response from the application or a peer says that bytes follow.
    pub(crate) fn has_switched(self, answer: &ResponseHead) -> bool {
        if self.is_upgrade && self.is_h1() && answer.version < Version::Http2 {
            answer.status == 101
        } else {
            self.switches() && (200..300).contains(&answer.status)
        }
    }
}

fn receive(head: &mut RequestHead, mark: Option<H1Mark<'_>>, framing: Framing) -> Result<Message, Refusal> {
    let tokens = connection_tokens(head.fields.get_all("connection"))
        .ok_or_else(|| bad("the Connection header is malformed"))?;
    let is_connect = head.method() == b"CONNECT";
    let mut message = Message {
        version: head.version,
        is_head: head.method() == b"HEAD",
        is_connect: is_connect && head.protocol().is_none(),
        is_upgrade: head.protocol().is_some(),
    };
    check_target(head, message.is_connect).map_err(bad)?;
    if let Some(protocol) = head.protocol()
        && !str::from_utf8(protocol).is_ok_and(is_upgrade_protocol)
    {
        return Err(bad("the extended CONNECT names no protocol that can be carried"));
    }
    match mark {
        None => {}
        Some(H1Mark { method: Some(method), is_http10: false, .. }) => {
            if !message.is_upgrade {
                return Err(bad("the mark outrigger-h1 names an upgrade, but the request is none"));
            }
            message.version = Version::Http11;
            head.set_method(method);
        }
        Some(_) if message.is_upgrade => return Err(bad("an extended CONNECT is no HTTP/1.x request")),
        // HTTP/1.0 has no chunks: its requests have a length, or no body.
        Some(H1Mark { is_http10: true, .. })
            if framing != Framing::Empty && !head.fields.contains("content-length") =>
        {
            return Err(bad("a request of HTTP/1.0 has a body of unknown length"));
        }
        Some(mark) => {
            message.version = if mark.is_http10 { Version::Http10 } else { Version::Http11 };
        }
    }
    if head.version == Version::Http11 && !is_connect && framing == Framing::Empty && !tokens.is_empty() {
        let upgrade: Vec<&[u8]> = head.fields.get_all("upgrade").collect();
        let protocol = upgrade_protocol(&tokens, &upgrade).map(|protocol| protocol.as_bytes().to_vec());
        message.is_upgrade = protocol.is_some();
        head.set_protocol(protocol.as_deref());
    }
    settle_authority(head, message)?;
    let te = head.fields.get_all("te").any(te_has_trailers);
    strip(&mut head.fields, |name| {
        is_hop_by_hop(name, &tokens) || is_mesh_internal(name) || misspells_framing(name)
    });
    if te {
        head.fields.push(b"te", b"trailers");
    }
    Ok(message)
}

/// Leaves one authority in the head, that of the target or of Host, if there is any.
fn settle_authority(head: &mut RequestHead, message: Message) -> Result<(), Refusal> {
    let lines = {
        let mut lines = head.fields.get_all("host");
        [lines.next(), lines.next()]
    };
    let both;
    let hosts: &[&[u8]] = match &lines {
        [Some(one), Some(other)] => {
            both = [*one, *other];
            &both
        }
        [one, _] => one.as_slice(),
    };
    let target = match head.authority().map(str::from_utf8) {
        None => None,
        Some(Ok(target)) => Some(target),
        Some(Err(_)) => return Err(bad("the request's authority is malformed")),
    };
    let required = message.version == Version::Http11 && !message.is_connect && target.is_none();
    let authority = request_authority(target, hosts, required).map_err(|error| bad(&error.to_string()))?;
    let from_host = authority.filter(|_| target.is_none()).map(|authority| authority.as_bytes().to_vec());
    if from_host.is_some() {
        head.set_authority(from_host.as_deref());
    }
    Ok(())
}

/// Whether a request's target has the form of its method: authority form is CONNECT's, and CONNECT has no other
/// (RFC 9112, 3.2.3) but for RFC 8441's.
fn check_target(head: &RequestHead, is_connect: bool) -> Result<(), &'static str> {
    if is_connect && (head.authority().is_none() || head.path().is_some()) {
        return Err("the target of CONNECT is no authority");
    }
    if !is_connect && head.path().is_none() {
        return Err("the request's target has no path");
    }
    Ok(())
}

/// Replaces whatever claims to say who the caller is.
pub(crate) fn identify(fields: &mut Fields, peer: Option<&SpiffeId>) {
    strip(fields, claims_identity);
    if let Some(peer) = peer {
        fields.push(CLIENT_ID_HEADER.as_bytes(), peer.as_str().as_bytes());
    }
}

/// Hands `write` the head as it goes to a peer's sidecar.
pub(crate) fn to_sidecar<T>(
    message: Message,
    head: &mut RequestHead,
    write: impl FnOnce(&RequestHead) -> T,
) -> T {
    let lines = head.fields.len();
    if message.is_h1() {
        let mut mark = Vec::with_capacity(32);
        mark.extend_from_slice(if message.version == Version::Http10 { b"1.0" } else { b"1.1" });
        if message.is_upgrade {
            mark.extend_from_slice(b"; method=");
            mark.extend_from_slice(head.method());
        }
        mark_case(&head.fields, &mut mark);
        head.fields.push(H1_HEADER.as_bytes(), &mark);
    }
    let written = to_h2(message, head, write);
    head.fields.truncate(lines);
    written
}

/// Hands `write` the head as it goes to an application or endpoint of HTTP/2.
pub(crate) fn to_h2<T>(message: Message, head: &mut RequestHead, write: impl FnOnce(&RequestHead) -> T) -> T {
    if !message.is_upgrade {
        return write(head);
    }
    let method = head.method().to_vec();
    head.set_method(b"CONNECT");
    let written = write(head);
    head.set_method(&method);
    written
}

/// Hands `write` the head as it goes to an application or endpoint of HTTP/1.x.
pub(crate) fn to_h1<T>(message: Message, head: &mut RequestHead, write: impl FnOnce(&RequestHead) -> T) -> T {
    if let Some(authority) = head.authority()
        && !head.fields.contains("host")
    {
        // First, as RFC 9110, 7.2 recommends. It may stay: it says what the authority says.
        let authority = authority.to_vec();
        head.fields.insert(0, b"Host", &authority);
    }
    let lines = head.fields.len();
    if message.is_upgrade
        && let Some(protocol) = head.protocol()
    {
        let protocol = protocol.to_vec();
        head.fields.push(b"Connection", b"upgrade");
        head.fields.push(b"Upgrade", &protocol);
    }
    let version = std::mem::replace(&mut head.version, message.version.min(Version::Http11));
    let written = write(head);
    head.version = version;
    head.fields.truncate(lines);
    written
}

/// Cleans the head of a response from an application, or from an endpoint without a sidecar.
pub(crate) fn clean_response(head: &mut ResponseHead) -> Result<(), Refusal> {
    clean(head, false)
}

/// Cleans the head of a response from a peer's sidecar: its reason passes, and the mark is obeyed.
pub(crate) fn clean_sidecar_response(head: &mut ResponseHead) -> Result<(), Refusal> {
    if let Some(value) = head.fields.get(H1_HEADER) {
        let value = value.to_vec();
        let mark = H1Mark::response(&value).ok_or_else(|| {
            Refusal::new(Reason::UpstreamProtocol, "the peer's mark outrigger-h1 is malformed")
        })?;
        if let Some(status) = mark.status.filter(|_| head.status == NOT_SWITCHED) {
            head.status = status;
        }
        if let Some(case) = mark.case.and_then(CaseReader::new) {
            restore_case(&mut head.fields, case);
        }
        if let Some(reason) = mark.reason {
            head.set_reason(Some(&read_reason(reason)));
        }
    }
    clean(head, true)
}

fn clean(head: &mut ResponseHead, keep_reason: bool) -> Result<(), Refusal> {
    let tokens = connection_tokens(head.fields.get_all("connection")).ok_or_else(|| {
        Refusal::new(Reason::UpstreamProtocol, "the response's Connection header is malformed")
    })?;
    strip(&mut head.fields, |name| {
        is_hop_by_hop(name, &tokens)
            || (is_mesh_internal(name)
                && !(keep_reason && name.eq_ignore_ascii_case(REASON_HEADER.as_bytes())))
    });
    Ok(())
}

/// Hands `write` a response as it goes to a peer's sidecar whose request had the mark.
pub(crate) fn response_to_sidecar(
    message: Message,
    switched: bool,
    head: &mut ResponseHead,
    write: impl FnOnce(&ResponseHead),
) {
    if !message.is_h1() {
        return write(head);
    }
    let mut mark = b"1.1".to_vec();
    let status = head.status;
    if message.is_upgrade && switched {
        head.status = 200;
    } else if message.is_upgrade && (200..300).contains(&status) {
        mark.extend_from_slice(b"; status=");
        mark.extend_from_slice(status.to_string().as_bytes());
        head.status = NOT_SWITCHED;
    }
    mark_case(&head.fields, &mut mark);
    if let Some(reason) = head.reason()
        && reason != reason_phrase(status).as_bytes()
        && reason.len() <= MAX_REASON_PHRASE
    {
        mark.extend_from_slice(b"; reason=");
        write_reason(reason, &mut mark);
    }
    let lines = head.fields.len();
    head.fields.push(H1_HEADER.as_bytes(), &mark);
    write(head);
    head.fields.truncate(lines);
    head.status = status;
}

/// Fields that frame a message, name who it is for, or say who sent it are no trailers (RFC 9110, 6.5.1).
/// `inbound`: to an application that trusts what the proxy says of its caller.
pub(crate) fn clean_trailers(trailers: &mut Fields, inbound: bool) {
    strip(trailers, |name| {
        is_hop_by_hop(name, &[])
            || is_mesh_internal(name)
            || misspells_framing(name)
            || name.eq_ignore_ascii_case(b"content-length")
            || name.eq_ignore_ascii_case(b"host")
            || (inbound && claims_identity(name))
    });
}

fn mark_case(fields: &Fields, mark: &mut Vec<u8>) {
    let before = mark.len();
    mark.extend_from_slice(b"; case=");
    let begin = mark.len();
    write_case(fields.iter().map(|(name, _)| name), mark);
    // Nothing to say: lower case is what HTTP/2 has.
    if mark.len() == begin || mark[begin..] == *b"l" {
        mark.truncate(before);
    }
}

fn restore_case(fields: &mut Fields, mut case: CaseReader<'_>) {
    for at in 0..fields.len() {
        // The mark itself was not there when the case was written.
        if fields.name_mut(at) != H1_HEADER.as_bytes() {
            case.apply(fields.name_mut(at));
        }
    }
}

fn strip(fields: &mut Fields, unwanted: impl Fn(&[u8]) -> bool) {
    fields.retain(|name, _| !unwanted(name));
}

pub(crate) fn bad(text: &str) -> Refusal {
    Refusal::new(Reason::BadRequest, text)
}

/// The answer to a request whose body could not be read, which is nobody's fault but its sender's.
pub(crate) fn broken_body() -> Refusal {
    bad("the request's body is malformed or broke off")
}
