//! The controller's API, as the commands see it: JSON over HTTP/1.1 with a bearer token.
//!
//! The API listens on loopback; a controller elsewhere is reached through a tunnel, so there is no TLS here yet.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::TcpStream;

/// How long one call may take: the API answers from memory, so more than this is a controller in trouble.
const DEADLINE: Duration = Duration::from_secs(10);
/// Larger answers than this are not the API's.
const MAX_ANSWER: usize = 64 << 20;

/// Where the controller's API is and what opens it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Server {
    /// Address of the controller's API
    #[arg(long, env = "OUTRIGGER_SERVER", default_value = "127.0.0.1:15480", value_name = "HOST:PORT")]
    pub(crate) server: String,
    /// File that holds the bearer token; the controller writes it to `<data-dir>/admin-token`
    #[arg(
        long,
        env = "OUTRIGGER_TOKEN_FILE",
        default_value = "/var/lib/outrigger/admin-token",
        value_name = "FILE"
    )]
    pub(crate) token_file: PathBuf,
}

impl Server {
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).context("encoding the request")?;
        self.call(Method::POST, path, body.into()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        let _: serde_json::Value = self.call(Method::DELETE, path, Bytes::new()).await?;
        Ok(())
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let what = format!("{method} http://{}{path}", self.server);
        let answer = tokio::time::timeout(DEADLINE, self.exchange(method, path, body))
            .await
            .with_context(|| format!("{what}: no answer within {} s", DEADLINE.as_secs()))?
            .with_context(|| what.clone())?;
        serde_json::from_slice(&answer)
            .with_context(|| format!("{what}: the answer is not what was expected"))
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let token = std::fs::read_to_string(&self.token_file).with_context(|| {
            format!(
                "reading the API's token from {} (name another with --token-file)",
                self.token_file.display()
            )
        })?;
        let stream = TcpStream::connect(&self.server)
            .await
            .context("connecting to the controller (is it running, and is --server right?)")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.server)
            .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
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
            StatusCode::UNAUTHORIZED => bail!("the controller does not accept this token (see --token-file)"),
            status => bail!("{status}: {}", error_text(&answer)),
        }
    }
}

/// The API's errors are `{"error": "..."}`; anything else is shown as it came.
fn error_text(answer: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct ApiError {
        error: String,
    }
    serde_json::from_slice::<ApiError>(answer)
        .map_or_else(|_| String::from_utf8_lossy(answer).trim().to_owned(), |e| e.error)
}
