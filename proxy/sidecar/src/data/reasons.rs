//! Answers that the mesh gives in the application's stead: a status, a reason header, and for gRPC a trailers-only
//! response, which is how its clients learn of errors (gRPC over HTTP/2, "Responses").

use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use outrigger_core::{
    headers::reason_value,
    reason::{REASON_HEADER, Reason},
};

use super::body::Body;

/// Who answers, in `outrigger-reason: <component>; <code>; <text>`.
const COMPONENT: &str = "proxy";

/// A refusal with the text that explains it to people.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) text: String,
    /// Set where a reset is what the other side said: an HTTP/2 caller gets it as it came, no answer in its stead.
    pub(crate) reset: Option<h2::Reason>,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into(), reset: None }
    }

    /// Passes a reset on.
    pub(crate) fn resetting(self, reset: Option<h2::Reason>) -> Self {
        Self { reset, ..self }
    }

    /// The response to a request; `grpc`: its caller speaks gRPC.
    pub(crate) fn response(&self, grpc: bool) -> Response<Body> {
        let mut response = if grpc { self.grpc() } else { self.http() };
        response.extensions_mut().insert(self.reason);
        response.headers_mut().insert(REASON_HEADER, self.header());
        response
    }

    fn http(&self) -> Response<Body> {
        let text = format!("outrigger: {}: {}\n", self.reason, printable(&self.text));
        let mut response = Response::new(Body::empty());
        *response.status_mut() =
            StatusCode::from_u16(self.reason.http_status()).expect("reasons have valid statuses");
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CONTENT_LENGTH, text.len().into());
        *response.body_mut() = Body::full(text);
        response
    }

    fn grpc(&self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", u16::from(self.reason.grpc_status()).into());
        headers.insert("grpc-message", grpc_message(&format!("{}: {}", self.reason, self.text)));
        response
    }

    fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&reason_value(COMPONENT, self.reason, &self.text))
            .expect("only printable ASCII is left")
    }
}

/// The reason that a peer's sidecar gave for answering in its application's stead.
pub(crate) fn reason_of(headers: &HeaderMap) -> Option<Reason> {
    let value = headers.get(REASON_HEADER)?.to_str().ok()?;
    let code = value.split(';').nth(1)?.trim();
    Reason::ALL.iter().copied().find(|reason| reason.code() == code)
}

pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// An error with its causes, which libraries leave out of their own texts.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Texts may quote what a peer said; a header holds printable ASCII only.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// Percent-encoded, as gRPC wants it.
fn grpc_message(text: &str) -> HeaderValue {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.extend(['%', hex(byte >> 4), hex(byte & 15)]);
        }
    }
    HeaderValue::from_str(&out).expect("only printable ASCII is left")
}

fn hex(digit: u8) -> char {
    char::from(b"0123456789ABCDEF"[usize::from(digit)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_callers_get_a_grpc_status() {
        let response = Refusal::new(Reason::NoEndpoints, "caf\u{e9} 100%\r\n").response(true);
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(response.headers()["grpc-message"], "no_endpoints: caf%C3%A9 100%25%0D%0A");
        assert_eq!(reason_of(response.headers()), Some(Reason::NoEndpoints));
    }

    #[test]
    fn others_get_a_status_and_the_reason() {
        let response = Refusal::new(Reason::OutboundDenied, "example.org").response(false);
        assert_eq!(response.status(), 403);
        assert_eq!(response.headers()[REASON_HEADER], "proxy; outbound_denied; example.org");
    }
}
