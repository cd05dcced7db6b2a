//! Clients that know nothing of the mesh: hyper for ordinary requests, plain sockets where a library would tidy.
//!
//! Called inside [`Host::run`](crate::network::Host::run), so that their sockets belong to a host.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Nothing that a client does may hang longer than this.
pub const CLIENT_LIMIT: Duration = Duration::from_secs(30);

/// A whole response.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Status code.
    pub status: StatusCode,
    /// The response's version.
    pub version: Version,
    /// Header fields.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// Trailers, where there were any.
    pub trailers: Option<HeaderMap>,
}

impl Reply {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Why the mesh itself answered, if it did: `outrigger-reason`.
    pub fn reason(&self) -> Option<String> {
        let value = self.headers.get("outrigger-reason")?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    }

    /// Fails unless the status is `expected`.
    pub fn expect(self, expected: u16) -> anyhow::Result<Self> {
        if self.status.as_u16() == expected {
            return Ok(self);
        }
        bail!(
            "status {} instead of {expected}; reason {:?}; body {:?}",
            self.status,
            self.reason(),
            self.text()
        )
    }
}

/// Connects, without delay for small writes.
pub async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = tokio::time::timeout(CLIENT_LIMIT, TcpStream::connect(address)).await;
    let stream = stream.map_err(anyhow::Error::from).and_then(|dialled| dialled.map_err(anyhow::Error::from));
    let stream = stream.with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    Ok(stream)
}

/// An HTTP/1.1 connection that carries one request after the other.
pub async fn http1<B>(address: SocketAddr) -> anyhow::Result<http1::SendRequest<B>>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let io = TokioIo::new(connect(address).await?);
    let mut builder = http1::Builder::new();
    // Room for the large headers of the transparency suite.
    let (sender, connection) =
        builder.max_buf_size(256 * 1024).handshake(io).await.context("opening HTTP/1.1")?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

/// An HTTP/2 connection by prior knowledge.
pub async fn http2<B>(address: SocketAddr) -> anyhow::Result<http2::SendRequest<B>>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let io = TokioIo::new(connect(address).await?);
    let mut builder = http2::Builder::new(TokioExecutor::new());
    let (sender, connection) =
        builder.max_header_list_size(256 * 1024).handshake(io).await.context("opening HTTP/2")?;
    tokio::spawn(connection);
    Ok(sender)
}

/// One HTTP/1.1 request on a connection of its own.
pub async fn request(address: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Reply> {
    let exchange = async {
        let mut sender = http1(address).await?;
        let response = sender.send_request(request).await.context("sending a request")?;
        read(response).await
    };
    tokio::time::timeout(CLIENT_LIMIT, exchange)
        .await
        .map_err(|_| anyhow!("no answer in {CLIENT_LIMIT:?}"))?
}

/// `GET path` on a connection of its own.
pub async fn get(address: SocketAddr, host: &str, path: &str) -> anyhow::Result<Reply> {
    let message = Request::get(path).header(http::header::HOST, host).body(Full::default())?;
    request(address, message).await.with_context(|| format!("GET http://{host}{path} at {address}"))
}

/// Reads a response to its end.
pub async fn read(response: http::Response<Incoming>) -> anyhow::Result<Reply> {
    let (head, body) = response.into_parts();
    let collected = body.collect().await.context("reading a response body")?;
    let trailers = collected.trailers().cloned();
    let body = collected.to_bytes();
    Ok(Reply { status: head.status, version: head.version, headers: head.headers, body, trailers })
}

/// Looks a name up as programs do: by the C library, with `/etc/resolv.conf` as it is.
pub async fn look_up(name: &str, port: u16) -> anyhow::Result<Vec<SocketAddr>> {
    // On a thread of its own, which inherits the namespace of this one.
    let found = tokio::time::timeout(CLIENT_LIMIT, tokio::net::lookup_host((name, port))).await;
    let found = found.map_err(|_| anyhow!("no answer in {CLIENT_LIMIT:?}"))?;
    Ok(found.with_context(|| format!("looking up {name}"))?.collect())
}

/// Bytes by hand, over TCP.
#[derive(Debug)]
pub struct Raw {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Raw {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { stream: connect(address).await?, received: Vec::new() })
    }

    /// Sends bytes.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
        self.stream.write_all(bytes.as_ref()).await.context("sending bytes")
    }

    /// Closes our side; the peer's stays open.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        self.stream.shutdown().await.context("closing our side")
    }

    /// Reads up to and with `mark`, and returns it all; what follows stays for the next call.
    pub async fn read_until(&mut self, mark: &[u8]) -> anyhow::Result<Vec<u8>> {
        loop {
            if let Some(at) = self.received.windows(mark.len()).position(|window| window == mark) {
                return Ok(self.received.drain(..at + mark.len()).collect());
            }
            if self.more().await? == 0 {
                let (mark, got) = (String::from_utf8_lossy(mark), String::from_utf8_lossy(&self.received));
                bail!("the peer closed before {mark:?}; it had sent {got:?}");
            }
        }
    }

    /// Reads exactly `count` bytes.
    pub async fn read_exact(&mut self, count: usize) -> anyhow::Result<Vec<u8>> {
        while self.received.len() < count {
            if self.more().await? == 0 {
                bail!("the peer closed after {} of {count} bytes", self.received.len());
            }
        }
        Ok(self.received.drain(..count).collect())
    }

    /// Reads until the peer closes its side.
    pub async fn read_to_end(&mut self) -> anyhow::Result<Vec<u8>> {
        while self.more().await? > 0 {}
        Ok(std::mem::take(&mut self.received))
    }

    /// Reads an HTTP/1.1 head, and a body as its Content-Length says.
    pub async fn read_response(&mut self) -> anyhow::Result<(String, Vec<u8>)> {
        let head = String::from_utf8_lossy(&self.read_until(b"\r\n\r\n").await?).into_owned();
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let body = self.read_exact(length.unwrap_or(0)).await?;
        Ok((head, body))
    }

    async fn more(&mut self) -> anyhow::Result<usize> {
        let read = self.stream.read_buf(&mut self.received);
        let read = tokio::time::timeout(CLIENT_LIMIT, read).await;
        read.map_err(|_| anyhow!("no byte in {CLIENT_LIMIT:?}"))?.context("reading bytes")
    }
}
