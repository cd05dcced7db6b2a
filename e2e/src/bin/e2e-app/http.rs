//! The HTTP application, on hyper: HTTP/1.1, and HTTP/2 by prior knowledge, on one port.

use std::hash::{DefaultHasher, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::work::Work;

pub(crate) type Body = BoxBody<Bytes, anyhow::Error>;

/// The first bytes of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Largest header block: the suites send 60 KiB.
const HEADERS_LIMIT: usize = 256 * 1024;

pub(crate) async fn serve(stream: TcpStream, work: Arc<Work>) -> anyhow::Result<()> {
    if is_http2(&stream).await? {
        return serve_http2(stream, work).await;
    }
    let service = service_fn(move |request| answer(request, Arc::clone(&work)));
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).max_buf_size(HEADERS_LIMIT).half_close(true);
    let served = server.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
    served.context("serving HTTP/1.1")
}

/// Whatever the path, the answer is what the application saw of the request, and in `x-app` which one it is.
pub(crate) async fn reflect(stream: TcpStream, work: Arc<Work>) -> anyhow::Result<()> {
    let is_http2 = is_http2(&stream).await?;
    let service = service_fn(move |request: Request<Incoming>| {
        let work = Arc::clone(&work);
        async move {
            if is_grpc(&request) {
                return work.call(request).await;
            }
            let mut response = describe(request).await?;
            response.headers_mut().insert("x-app", HeaderValue::from_static(work.name()));
            Ok(response)
        }
    });
    let stream = TokioIo::new(stream);
    if is_http2 {
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        return server.serve_connection(stream, service).await.context("reflecting HTTP/2");
    }
    let server = hyper::server::conn::http1::Builder::new();
    server.serve_connection(stream, service).await.context("reflecting HTTP/1.1")
}

fn is_grpc(request: &Request<Incoming>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

pub(crate) async fn serve_http2(stream: TcpStream, work: Arc<Work>) -> anyhow::Result<()> {
    let service = service_fn(move |request| answer(request, Arc::clone(&work)));
    let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(HEADERS_LIMIT)?)
        .enable_connect_protocol();
    server.serve_connection(TokioIo::new(stream), service).await.context("serving HTTP/2")
}

/// Looks at the first bytes without taking them.
async fn is_http2(stream: &TcpStream) -> anyhow::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let count = stream.peek(&mut seen).await.context("looking at the first bytes")?;
        if count == 0 || !PREFACE.starts_with(&seen[..count]) {
            return Ok(false);
        }
        if count == PREFACE.len() {
            return Ok(true);
        }
        // Part of the preface: the rest is on its way. `peek` would return the same bytes at once.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// An error resets the stream, or the connection where there are no streams.
async fn answer(request: Request<Incoming>, work: Arc<Work>) -> anyhow::Result<Response<Body>> {
    if is_grpc(&request) || request.uri().path() == "/work" {
        return work.call(request).await;
    }
    let head_only = request.method() == Method::HEAD && request.version() == Version::HTTP_2;
    let mut response = route(request, work.name()).await.unwrap_or_else(|error| {
        let mut response = Response::new(full(format!("{error:#}\n")));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response
    });
    if head_only {
        // hyper leaves this to the application in HTTP/2, and does it itself in HTTP/1.1.
        if let Some(length) = response.body().size_hint().exact() {
            response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        *response.body_mut() = empty();
    }
    Ok(response)
}

async fn route(request: Request<Incoming>, name: &'static str) -> anyhow::Result<Response<Body>> {
    if request.method() == Method::CONNECT {
        return Ok(tunnel(request, StatusCode::OK));
    }
    let path = request.uri().path().to_owned();
    let mut parts = path.split('/').skip(1);
    let (what, mut numbers) = (parts.next().unwrap_or_default(), parts.map(str::parse::<u64>));
    let mut number =
        || numbers.next().context("the path needs a number")?.context("reading the path's number");
    match what {
        "" | "whoami" => Ok(Response::new(full(name.to_owned()))),
        // What the application saw of the request, body digested.
        "describe" => describe(request).await,
        // The body comes back as it arrives, trailers too.
        "echo" => Ok(Response::new(request.into_body().map_err(anyhow::Error::from).boxed())),
        "bytes" => {
            let content = pattern(usize::try_from(number()?)?);
            // The request first: an answer that overtakes it ends the stream under h2spec, which still sends on it and wants
            // to see that refused.
            request.into_body().collect().await.context("reading the request")?;
            Ok(Response::new(full(content)))
        }
        "chunked" => {
            let chunks =
                stream::iter(0..number()?).map(|i| Ok(Frame::data(Bytes::from(format!("chunk {i}\n")))));
            Ok(Response::new(streamed(chunks)))
        }
        "trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-checksum", HeaderValue::from_static("0011"));
            trailers.insert("x-state", HeaderValue::from_static("complete"));
            let frames =
                [Frame::data(Bytes::from_static(b"body before trailers\n")), Frame::trailers(trailers)];
            let body = streamed(stream::iter(frames.map(Ok)));
            let mut response = Response::new(body);
            response.headers_mut().insert(header::TRAILER, HeaderValue::from_static("x-checksum, x-state"));
            Ok(response)
        }
        "status" => {
            let status = StatusCode::from_u16(u16::try_from(number()?)?)?;
            let mut response = Response::new(full(String::new()));
            if status == StatusCode::NOT_MODIFIED {
                response = Response::new(empty());
                response.headers_mut().insert(header::ETAG, HeaderValue::from_static("\"v1\""));
            }
            *response.status_mut() = status;
            Ok(response)
        }
        "cookies" => {
            let mut response = Response::new(full("cookies set\n".to_owned()));
            for cookie in ["a=1; Path=/; HttpOnly", "b=2; Secure", "a=3"] {
                response.headers_mut().append(header::SET_COOKIE, HeaderValue::from_static(cookie));
            }
            Ok(response)
        }
        "headers" => {
            // So many bytes of response headers, in fields of a kibibyte.
            let mut response = Response::new(full("large headers\n".to_owned()));
            for i in 0..number()?.div_ceil(1024) {
                let field = http::HeaderName::try_from(format!("x-fill-{i}"))?;
                response.headers_mut().insert(field, HeaderValue::try_from("f".repeat(1000))?);
            }
            Ok(response)
        }
        "slow" => {
            tokio::time::sleep(Duration::from_millis(number()?)).await;
            Ok(Response::new(full("at last\n".to_owned())))
        }
        "drip" => {
            // So many lines, one every so many milliseconds.
            let (lines, pause) = (number()?, Duration::from_millis(number()?));
            let drops = stream::iter(0..lines).then(move |i| async move {
                tokio::time::sleep(pause).await;
                Ok(Frame::data(Bytes::from(format!("line {i}\n"))))
            });
            Ok(Response::new(streamed(drops)))
        }
        // Answers without reading the body.
        "early" => {
            let mut response = Response::new(full("no, thank you\n".to_owned()));
            *response.status_mut() = StatusCode::EXPECTATION_FAILED;
            Ok(response)
        }
        // A body that breaks off.
        "break" => {
            let start = stream::iter([Ok(Frame::data(pattern(1000)))]);
            // The pause lets the first bytes out before the failure, as a crash in mid-answer would.
            let end = stream::once(async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(anyhow::anyhow!("broken off on request"))
            });
            Ok(Response::new(streamed(start.chain(end))))
        }
        "upgrade" => {
            let protocol = request.headers().get(header::UPGRADE).cloned().context("no Upgrade field")?;
            let mut response = tunnel(request, StatusCode::SWITCHING_PROTOCOLS);
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            response.headers_mut().insert(header::UPGRADE, protocol);
            Ok(response)
        }
        _ => {
            let mut response = Response::new(full("no such path\n".to_owned()));
            *response.status_mut() = StatusCode::NOT_FOUND;
            Ok(response)
        }
    }
}

/// Bytes are echoed on the connection (HTTP/1.1) or stream (HTTP/2) from here on, until the peer closes its side.
fn tunnel(request: Request<Incoming>, status: StatusCode) -> Response<Body> {
    tokio::spawn(async move {
        let echo = async {
            let upgraded = hyper::upgrade::on(request).await.context("upgrading")?;
            let (mut from, mut to) = tokio::io::split(TokioIo::new(upgraded));
            tokio::io::copy(&mut from, &mut to).await.context("echoing")?;
            to.shutdown().await.context("closing our side")
        };
        if let Err(error) = echo.await {
            let error: anyhow::Error = error;
            println!("tunnel: {error:#}");
        }
    });
    let mut response = Response::new(empty());
    *response.status_mut() = status;
    response
}

async fn describe(request: Request<Incoming>) -> anyhow::Result<Response<Body>> {
    let (head, mut body) = request.into_parts();
    let (mut length, mut hash, mut trailers) = (0_usize, DefaultHasher::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        match frame.context("reading the body")?.into_data() {
            Ok(data) => {
                length += data.len();
                hash.write(&data);
            }
            Err(frame) => trailers = frame.into_trailers().map(|fields| list(&fields)).unwrap_or_default(),
        }
    }
    let description = json!({
        "method": head.method.as_str(),
        "target": head.uri.path_and_query().map(ToString::to_string),
        "authority": head.uri.authority().map(ToString::to_string),
        "http2": head.version == Version::HTTP_2,
        "version": format!("{:?}", head.version),
        "headers": list(&head.headers),
        "body": { "length": length, "hash": format!("{:016x}", hash.finish()) },
        "trailers": trailers,
    });
    let mut response = Response::new(full(description.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// All fields, in the order in which they arrived as far as the header map keeps it.
fn list(fields: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    fields.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

/// Bytes that are not all the same, so that a reordered or repeated piece shows.
fn pattern(length: usize) -> Bytes {
    (0..length).map(|i| u8::try_from(i * 7 % 251).unwrap_or_default()).collect()
}

pub(crate) fn streamed(
    frames: impl Stream<Item = anyhow::Result<Frame<Bytes>>> + Send + Sync + 'static,
) -> Body {
    BodyExt::boxed(StreamBody::new(frames))
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

pub(crate) fn full(content: impl Into<Bytes>) -> Body {
    Full::new(content.into()).map_err(|never| match never {}).boxed()
}
