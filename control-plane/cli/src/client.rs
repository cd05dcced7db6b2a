//! The controller's API, as the commands see it: JSON over HTTP/1.1 with a bearer token.
//!
//! The API listens on loopback, so there is no TLS here: the controller of a cluster is reached through the API server's
//! port-forward (`cluster`), one on another host through a tunnel of one's own.

use std::{
    fmt::{self, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use outrigger_policy::Fault;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::OnceCell,
};

use crate::{
    cluster::{Cluster, Forward},
    kubeconfig,
};

/// How long one call may take: the API answers from memory, so more than this is a controller in trouble.
const DEADLINE: Duration = Duration::from_secs(10);
/// Larger answers than this are not the API's.
const MAX_ANSWER: usize = 64 << 20;

/// Says who asks, for the history and the audit log. Nobody believes it more than the token.
const AUTHOR: &str = "outrigger-author";

/// How long the other end of a forward may take to say why it failed, once it has.
const REASON: Duration = Duration::from_millis(500);

/// A controller's API and what opens it.
#[derive(Clone, Debug)]
pub(crate) struct Server(Route);

#[derive(Clone, Debug)]
enum Route {
    Address {
        /// `host:port`.
        address: String,
        token: Token,
    },
    /// Connected to when it is needed first.
    Cluster {
        chosen: kubeconfig::Cluster,
        cluster: Arc<OnceCell<Cluster>>,
        /// A certain controller of it; none: whichever is ready.
        pod: Option<String>,
    },
}

/// What carries a request.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// The way of one request.
struct Way {
    stream: Box<dyn Stream>,
    /// What proves who asks.
    authorization: HeaderValue,
    /// Where a forward says why it fails.
    fault: Option<BoxFuture<'static, Option<String>>>,
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
        Ok(Self(Route::Address { address: address.to_owned(), token }))
    }

    /// The API of the controller in a cluster.
    pub(crate) fn of_cluster(chosen: kubeconfig::Cluster) -> Self {
        Self(Route::Cluster { chosen, cluster: Arc::default(), pod: None })
    }

    /// Every controller of the mesh: a sidecar is connected to one of them, and only that one can tell of it.
    pub(crate) async fn replicas(&self) -> Result<Vec<Self>> {
        let Some(connected) = self.cluster().await? else { return Ok(vec![self.clone()]) };
        let Route::Cluster { chosen, cluster, .. } = &self.0 else { return Ok(vec![self.clone()]) };
        let of_pod = |pod| {
            Self(Route::Cluster { chosen: chosen.clone(), cluster: Arc::clone(cluster), pod: Some(pod) })
        };
        Ok(connected.controllers().await?.into_iter().map(of_pod).collect())
    }

    /// The cluster that it is reached through, connected.
    pub(crate) async fn cluster(&self) -> Result<Option<&Cluster>> {
        let Route::Cluster { chosen, cluster, .. } = &self.0 else { return Ok(None) };
        cluster.get_or_try_init(|| Cluster::connect(chosen.clone())).await.map(Some)
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
        let what = match &self.0 {
            Route::Address { address, .. } => format!("{method} http://{address}{path}"),
            Route::Cluster { .. } => format!("{method} {path}"),
        };
        // It has deadlines of its own, and its user may be asked to log in.
        self.cluster().await?;
        let Way { stream, authorization, fault } = self.connect(&method).await?;
        let answer = tokio::time::timeout(DEADLINE, self.exchange(method, path, body, stream, authorization))
            .await
            .with_context(|| format!("{what}: no answer within {} s", DEADLINE.as_secs()))?;
        let answer = match (answer, fault) {
            // Where the other end of a forward knows why, its words say more than that the stream has ended.
            (Err(error), Some(fault)) if !error.is::<Refusal>() => {
                match tokio::time::timeout(REASON, fault).await {
                    Ok(Some(reason)) => {
                        bail!("{what}: the forward to the controller failed: {}", reason.trim())
                    }
                    _ => Err(error),
                }
            }
            (answer, _) => answer,
        };
        let answer = answer.with_context(|| what.clone())?;
        serde_json::from_slice(&answer)
            .with_context(|| format!("{what}: the answer is not what was expected"))
    }

    async fn connect(&self, method: &Method) -> Result<Way> {
        let (address, token) = match &self.0 {
            Route::Address { address, token } => (address, token),
            Route::Cluster { pod, .. } => {
                let cluster = self.cluster().await?.context("the cluster is connected")?;
                let authorization = cluster.authorization(method).await?;
                let Forward { stream, fault } = cluster.controller(pod.as_deref()).await?;
                return Ok(Way { stream: Box::new(stream), authorization, fault: Some(fault) });
            }
        };
        let token = match token {
            Token::Text(token) => token.clone(),
            Token::File(file) => std::fs::read_to_string(file).with_context(|| {
                format!("reading the API's token from {} (name another with --token-file)", file.display())
            })?,
        };
        let connecting = tokio::time::timeout(DEADLINE, TcpStream::connect(address)).await;
        let stream = connecting.map_err(std::io::Error::from).flatten().with_context(|| {
            format!("connecting to the controller at {address} (is it running, and is --server right?)")
        })?;
        let authorization = HeaderValue::try_from(format!("Bearer {}", token.trim()))?;
        Ok(Way { stream: Box::new(stream), authorization, fault: None })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        stream: Box<dyn Stream>,
        authorization: HeaderValue,
    ) -> Result<Bytes> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let host = match &self.0 {
            Route::Address { address, .. } => address,
            Route::Cluster { .. } => "outrigger-controller",
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::AUTHORIZATION, authorization)
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
        match (status, &self.0) {
            (StatusCode::NO_CONTENT, _) => Ok(Bytes::from_static(b"null")),
            (status, _) if status.is_success() => Ok(answer),
            (StatusCode::UNAUTHORIZED, Route::Address { .. }) => {
                bail!(
                    "the controller does not accept this token (see --token-file and `outrigger context list`)"
                )
            }
            (StatusCode::UNAUTHORIZED, Route::Cluster { .. }) => {
                bail!("the API server accepts your token, but does not confirm it to the controller")
            }
            (status, _) => Err(Refusal::new(status, &answer).into()),
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
        let server = Server::new("http://h:1/", token.clone()).unwrap();
        assert!(matches!(server.0, Route::Address { address, .. } if address == "h:1"));
        assert!(Server::new("https://h:1", token).unwrap_err().to_string().contains("tunnel"));
    }
}
