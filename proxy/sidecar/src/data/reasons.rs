//! Answers that the mesh gives in the application's stead: a status, a reason header, and for gRPC a trailers-only
//! response, which is how its clients learn of errors (gRPC over HTTP/2, "Responses").

use outrigger_core::{
    headers::reason_value,
    limit::{Refused, Standing},
    reason::{REASON_HEADER, Reason},
    request::View,
};
use outrigger_http::{
    fields::Fields,
    h2::Code,
    head::{RequestHead, ResponseHead, Version},
};

use super::view::Seen;

/// Who answers, in `outrigger-reason: <component>; <code>; <text>`.
const COMPONENT: &str = "proxy";

/// A refusal with the text that explains it to people.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) text: String,
    /// Set where a reset is what the other side said: an HTTP/2 caller gets it as it came, no answer in its stead.
    pub(crate) reset: Option<Code>,
    /// Where a policy says with which status it is refused: for HTTP, and for gRPC.
    status: (Option<u16>, Option<u8>),
    /// The limit that refused it, which says when to come back.
    limited: Option<Box<Refused>>,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into(), reset: None, status: (None, None), limited: None }
    }

    /// Passes a reset on.
    pub(crate) fn resetting(self, reset: Option<Code>) -> Self {
        Self { reset, ..self }
    }

    /// Refuses with these statuses, where they are given.
    pub(crate) fn saying(self, http: Option<u16>, grpc: Option<u8>) -> Self {
        Self { status: (http, grpc), ..self }
    }

    /// Tells when to come back.
    pub(crate) fn limited(self, limited: Refused) -> Self {
        Self { limited: Some(Box::new(limited)), ..self }
    }

    /// Whether it says something of whom it was asked of: it is no bound and no trouble of our own.
    pub(crate) fn is_not_ours(&self) -> bool {
        !matches!(self.reason, Reason::LimitReached | Reason::Overloaded | Reason::NoCertificate)
    }

    /// The head of the response to a request, and its body. `grpc`: its caller speaks gRPC.
    pub(crate) fn response(&self, grpc: bool, head: &mut ResponseHead) -> String {
        head.clear();
        head.version = Version::Http11;
        let text = if grpc { self.grpc(head) } else { self.http(head) };
        let reason = reason_value(COMPONENT, self.reason, &self.text);
        head.fields.push(REASON_HEADER.as_bytes(), reason.as_bytes());
        if let Some(limited) = &self.limited {
            head.fields.push(b"retry-after", limited.retry_after_seconds().to_string().as_bytes());
            if let Some(standing) = &limited.standing {
                tell(standing, &mut head.fields);
            }
        }
        text
    }

    fn http(&self, head: &mut ResponseHead) -> String {
        let text = format!("outrigger: {}: {}\n", self.reason, printable(&self.text));
        head.status = self.status.0.unwrap_or_else(|| self.reason.http_status());
        head.fields.push(b"content-type", b"text/plain; charset=utf-8");
        head.fields.push(b"content-length", text.len().to_string().as_bytes());
        text
    }

    fn grpc(&self, head: &mut ResponseHead) -> String {
        head.status = 200;
        head.fields.push(b"content-type", b"application/grpc");
        head.fields.push(
            b"grpc-status",
            self.status.1.unwrap_or_else(|| self.reason.grpc_status()).to_string().as_bytes(),
        );
        let message = grpc_message(&format!("{}: {}", self.reason, self.text));
        head.fields.push(b"grpc-message", message.as_bytes());
        String::new()
    }
}

/// The longest path, or list, that a text quotes.
const MAX_QUOTED: usize = 100;

/// What a request asks for, as refusals quote it: without the query, which may hold what is nobody else's business.
pub(crate) fn asked_for(head: &RequestHead) -> String {
    let path = String::from_utf8_lossy(Seen(head).path()).into_owned();
    format!("{} {}", String::from_utf8_lossy(head.method()), cut(path))
}

/// Cut to what is worth reading.
pub(crate) fn cut(mut text: String) -> String {
    if text.len() > MAX_QUOTED {
        text.truncate(text.floor_char_boundary(MAX_QUOTED));
        text.push_str("...");
    }
    text
}

/// The reason that a peer's sidecar gave for answering in its application's stead.
pub(crate) fn reason_of(fields: &Fields) -> Option<Reason> {
    let value = str::from_utf8(fields.get(REASON_HEADER)?).ok()?;
    let code = value.split(';').nth(1)?.trim();
    Reason::ALL.iter().copied().find(|reason| reason.code() == code)
}

pub(crate) fn is_grpc(fields: &Fields) -> bool {
    fields.get("content-type").is_some_and(|value| value.starts_with(b"application/grpc"))
}

/// Texts may quote what a peer said; a header holds printable ASCII only.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// Percent-encoded, as gRPC wants it.
fn grpc_message(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.extend(['%', hex(byte >> 4), hex(byte & 15)]);
        }
    }
    out
}

fn hex(digit: u8) -> char {
    char::from(b"0123456789ABCDEF"[usize::from(digit)])
}

/// Tells a caller where it stands.
pub(super) fn tell(standing: &Standing, fields: &mut Fields) {
    fields.push(b"ratelimit-policy", standing.rate_limit_policy().as_bytes());
    fields.push(b"ratelimit", standing.rate_limit().as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_callers_get_a_grpc_status() {
        let mut head = ResponseHead::default();
        Refusal::new(Reason::NoEndpoints, "caf\u{e9} 100%\r\n").response(true, &mut head);
        assert_eq!(head.status, 200);
        assert_eq!(head.fields.get("grpc-status"), Some(&b"14"[..]));
        assert_eq!(head.fields.get("grpc-message"), Some(&b"no_endpoints: caf%C3%A9 100%25%0D%0A"[..]));
        assert_eq!(reason_of(&head.fields), Some(Reason::NoEndpoints));
    }

    #[test]
    fn a_request_is_quoted_without_its_query_and_not_for_ever() {
        let mut head = RequestHead::default();
        head.set_method(b"GET");
        head.set_path(Some(b"/orders?token=secret"));
        assert_eq!(asked_for(&head), "GET /orders");
        head.set_path(Some(format!("/{}", "\u{e9}".repeat(500)).as_bytes()));
        let quoted = asked_for(&head);
        assert!(quoted.len() < 120 && quoted.ends_with("..."), "{quoted}");
    }

    #[test]
    fn others_get_a_status_and_the_reason() {
        let mut head = ResponseHead::default();
        let text = Refusal::new(Reason::OutboundDenied, "example.org").response(false, &mut head);
        assert_eq!(head.status, 403);
        assert_eq!(head.fields.get(REASON_HEADER), Some(&b"proxy; outbound_denied; example.org"[..]));
        assert_eq!(head.fields.get("content-length"), Some(text.len().to_string().as_bytes()));
    }
}
