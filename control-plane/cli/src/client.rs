//! The controller's API, as the commands see it: JSON over HTTP/1.1 with a bearer token.
//!
//! The API listens on loopback; a controller elsewhere is reached through a tunnel, so there is no TLS here yet.

use std::{
    fmt::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use outrigger_policy::Fault;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::net::TcpStream;

/// How long one call may take: the API answers from memory, so more than this is a controller in trouble.
const DEADLINE: Duration = Duration::from_secs(10);
/// Larger answers than this are not the API's.
const MAX_ANSWER: usize = 64 << 20;

/// Says who asks, for the history and the audit log. Nobody believes it more than the token.
const AUTHOR: &str = "outrigger-author";

/// A controller's API and what opens it.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    /// `host:port`.
    address: String,
    token: Token,
}

/// Where the bearer token comes from. A file is read for each call: the controller may have made a new one.
#[derive(Clone)]
pub(crate) enum Token {
    File(PathBuf),
    Text(String),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(_) => f.write_str("Text(..)"),
        }
    }
}

impl Server {
    /// The API at `host:port`, which may be written as `http://host:port`.
    pub(crate) fn new(address: &str, token: Token) -> Result<Self> {
        if address.starts_with("https://") {
            bail!(
                "{address}: the controller's API speaks plain HTTP on its host's loopback address; make a tunnel (ssh -L, \
                 kubectl port-forward) and name its end as HOST:PORT"
            );
        }
        let address = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
        Ok(Self { address: address.to_owned(), token })
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).context("encoding the request")?;
        self.call(Method::POST, path, body.into()).await
    }

    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let what = format!("{method} http://{}{path}", self.address);
        let answer = tokio::time::timeout(DEADLINE, self.exchange(method, path, body))
            .await
            .with_context(|| format!("{what}: no answer within {} s", DEADLINE.as_secs()))?
            .with_context(|| what.clone())?;
        serde_json::from_slice(&answer)
            .with_context(|| format!("{what}: the answer is not what was expected"))
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let token = match &self.token {
            Token::Text(token) => token.clone(),
            Token::File(file) => std::fs::read_to_string(file).with_context(|| {
                format!("reading the API's token from {} (name another with --token-file)", file.display())
            })?,
        };
        let stream = TcpStream::connect(&self.address)
            .await
            .context("connecting to the controller (is it running, and is --server right?)")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.address)
            .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(author) = author() {
            request = request.header(AUTHOR, author);
        }
        let request = request.body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("reading the answer: {error}"))?
            .to_bytes();
        match status {
            StatusCode::NO_CONTENT => Ok(Bytes::from_static(b"null")),
            status if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED => {
                bail!(
                    "the controller does not accept this token (see --token-file and `outrigger context list`)"
                )
            }
            status => Err(Refusal::new(status, &answer).into()),
        }
    }
}

/// `OUTRIGGER_AUTHOR`, for pipelines that act for somebody, or the user.
fn author() -> Option<HeaderValue> {
    let author = std::env::var("OUTRIGGER_AUTHOR").or_else(|_| std::env::var("USER")).ok()?;
    HeaderValue::from_str(&author).ok()
}

/// What the controller answered in place of doing it.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) faults: Vec<Fault>,
}

impl Refusal {
    /// The API's errors are `{"error": {code, message, faults}}` or `{"error": "..."}`; anything else is shown as it came.
    fn new(status: StatusCode, answer: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Answer {
            error: Said,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Said {
            Text(String),
            Full {
                message: String,
                #[serde(default)]
                faults: Vec<Fault>,
            },
        }
        let (message, faults) = match serde_json::from_slice::<Answer>(answer).map(|answer| answer.error) {
            Ok(Said::Text(message)) => (message, Vec::new()),
            Ok(Said::Full { message, faults }) => (message, faults),
            Err(_) => (String::from_utf8_lossy(answer).trim().to_owned(), Vec::new()),
        };
        Self { status, message, faults }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status, self.message)?;
        self.faults.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for Refusal {}

/// `text` as one segment of a path or one value of a query (RFC 3986, 2.3: all but the unreserved is escaped).
pub(crate) fn segment(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            // Writing to a string does not fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_segment() {
        assert_eq!(segment("pay-v2.shop_1~"), "pay-v2.shop_1~");
        assert_eq!(segment("../a?b#c d/é"), "..%2Fa%3Fb%23c%20d%2F%C3%A9");
    }

    #[test]
    fn both_forms_of_an_error_are_understood() {
        let text = |answer: &str| Refusal::new(StatusCode::CONFLICT, answer.as_bytes()).to_string();
        assert_eq!(text(r#"{"error": "no"}"#), "409 Conflict: no");
        assert_eq!(text(r#"{"error": {"code": "conflict", "message": "no"}}"#), "409 Conflict: no");
        assert_eq!(text("plain\n"), "409 Conflict: plain");
    }

    #[test]
    fn an_address_may_be_a_url_but_not_of_https() {
        let token = Token::Text(String::new());
        assert_eq!(Server::new("http://h:1/", token.clone()).unwrap().address, "h:1");
        assert!(Server::new("https://h:1", token).unwrap_err().to_string().contains("tunnel"));
    }
}
