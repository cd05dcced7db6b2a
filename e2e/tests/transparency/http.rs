//! HTTP cases by hyper, an ordinary client library.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, Request, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use outrigger_e2e::client::{self, Reply};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::{AUTHORITY, HTTP, Observed, Target};

/// 100 MB, in pieces as a library would send them.
const LARGE: usize = 100_000_000;
const PIECE: usize = 64 * 1024;

type Body = BoxBody<Bytes, std::io::Error>;

fn full(content: impl Into<Bytes>) -> Body {
    Full::new(content.into()).map_err(|never| match never {}).boxed()
}

/// A body of unknown length.
fn pieces(pieces: Vec<Result<Frame<Bytes>, std::io::Error>>) -> Body {
    http_body_util::BodyExt::boxed(StreamBody::new(stream::iter(pieces)))
}

/// What of a response must be the same with and without the mesh.
fn observe(seen: &mut Observed, what: &str, reply: &Reply) {
    seen.note(format!("{what}: {:?} {}", reply.version, reply.status));
    seen.headers(what, &reply.headers);
    seen.body(what, &reply.body);
    if let Some(trailers) = &reply.trailers {
        seen.headers(&format!("{what} trailers"), trailers);
    }
}

fn request(method: Method, path: &str, body: Body) -> anyhow::Result<Request<Body>> {
    Ok(Request::builder().method(method).uri(path).header(header::HOST, AUTHORITY).body(body)?)
}

async fn http1(target: &Target, request: Request<Body>) -> anyhow::Result<Reply> {
    let mut sender = client::http1(target.at(HTTP)).await?;
    client::read(sender.send_request(request).await.context("sending a request")?).await
}

pub(crate) async fn methods(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PURGE", "M-SEARCH"] {
        let body = if ["POST", "PUT", "PATCH"].contains(&method) { "some body" } else { "" };
        let mut message = request(Method::from_bytes(method.as_bytes())?, "/describe", full(body))?;
        message.headers_mut().insert("x-first", HeaderValue::from_static("1"));
        message.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static("e2e/1"));
        message.headers_mut().insert("x-latin", HeaderValue::from_bytes(b"caf\xe9")?);
        message.headers_mut().append("x-list", HeaderValue::from_static("a"));
        message.headers_mut().append("x-list", HeaderValue::from_static("b, c"));
        let reply = http1(&target, message).await?.expect(200)?;
        observe(&mut seen, method, &reply);
    }
    Ok(seen)
}

pub(crate) async fn targets(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    for path in [
        "/describe?",
        "/describe?a=1&a=2&b=%2F%2e%00&c=+",
        "/describe/%2e%2e/x%20y;v=1//z",
        "/describe?q=%E2%9C%93&empty=",
        "/describe?brackets[]={}|",
    ] {
        let Ok(message) = request(Method::GET, path, full("")) else {
            // The `http` crate refuses the braces on some versions: the raw cases send them.
            continue;
        };
        let reply = http1(&target, message).await?.expect(200)?;
        observe(&mut seen, path, &reply);
    }
    Ok(seen)
}

pub(crate) async fn empty_bodies(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    for (what, length) in [("no length", None), ("length 0", Some("0"))] {
        let mut message = request(Method::POST, "/describe", full(""))?;
        if let Some(length) = length {
            message.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static(length));
        }
        observe(&mut seen, what, &http1(&target, message).await?.expect(200)?);
    }
    let reply = http1(&target, request(Method::GET, "/bytes/0", full(""))?).await?.expect(200)?;
    observe(&mut seen, "empty answer", &reply);
    let reply = http1(&target, request(Method::POST, "/echo", pieces(vec![]))?).await?.expect(200)?;
    observe(&mut seen, "empty chunked", &reply);
    Ok(seen)
}

pub(crate) async fn large_upload(target: Target) -> anyhow::Result<Observed> {
    let mut message = request(Method::POST, "/describe", large())?;
    message.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(LARGE));
    let reply = http1(&target, message).await?.expect(200)?;
    let mut seen = Observed::default();
    observe(&mut seen, "upload", &reply);
    ensure!(reply.text().contains("100000000"), "the application counted {}", reply.text());
    Ok(seen)
}

pub(crate) async fn large_download(target: Target) -> anyhow::Result<Observed> {
    let reply = http1(&target, request(Method::GET, "/bytes/100000000", full(""))?).await?.expect(200)?;
    ensure!(reply.body.len() == LARGE, "{} bytes arrived", reply.body.len());
    let mut seen = Observed::default();
    observe(&mut seen, "download", &reply);
    Ok(seen)
}

/// Both directions at once, length unknown to either side.
pub(crate) async fn large_echo(target: Target) -> anyhow::Result<Observed> {
    let reply = http1(&target, request(Method::POST, "/echo", large())?).await?.expect(200)?;
    ensure!(reply.body.len() == LARGE, "{} bytes came back", reply.body.len());
    let mut seen = Observed::default();
    observe(&mut seen, "echo", &reply);
    Ok(seen)
}

fn large() -> Body {
    let piece = |at: usize| {
        let length = PIECE.min(LARGE - at);
        let bytes: Bytes = (at..at + length).map(|i| u8::try_from(i % 253).unwrap_or_default()).collect();
        Ok(Frame::data(bytes))
    };
    http_body_util::BodyExt::boxed(StreamBody::new(stream::iter((0..LARGE).step_by(PIECE).map(piece))))
}

pub(crate) async fn chunked(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let body = pieces(vec![Ok(Frame::data("one ".into())), Ok(Frame::data("two".into()))]);
    observe(&mut seen, "up", &http1(&target, request(Method::POST, "/describe", body)?).await?.expect(200)?);
    let reply = http1(&target, request(Method::GET, "/chunked/1000", full(""))?).await?.expect(200)?;
    observe(&mut seen, "down", &reply);
    Ok(seen)
}

fn trailing_body() -> Body {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("42"));
    pieces(vec![Ok(Frame::data("body".into())), Ok(Frame::trailers(trailers))])
}

pub(crate) async fn trailers(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut message = request(Method::POST, "/describe", trailing_body())?;
    message.headers_mut().insert(header::TRAILER, HeaderValue::from_static("x-sum"));
    let reply = http1(&target, message).await?.expect(200)?;
    ensure!(reply.text().contains("x-sum"), "the application saw no trailers: {}", reply.text());
    observe(&mut seen, "up", &reply);
    let mut message = request(Method::GET, "/trailers", full(""))?;
    message.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    let reply = http1(&target, message).await?.expect(200)?;
    ensure!(reply.trailers.is_some(), "no trailers came back");
    observe(&mut seen, "down", &reply);
    Ok(seen)
}

pub(crate) async fn statuses(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    // One connection for all: a body that is wrongly there or wrongly missing would derail the next response.
    let mut sender = client::http1::<Body>(target.at(HTTP)).await?;
    for status in [
        200, 201, 202, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 409, 418, 429, 499, 500, 502, 503,
        504, 599,
    ] {
        for method in [Method::GET, Method::HEAD] {
            let message = request(method.clone(), &format!("/status/{status}"), full(""))?;
            let response =
                sender.send_request(message).await.with_context(|| format!("{method} {status}"))?;
            let reply = client::read(response).await?.expect(status)?;
            observe(&mut seen, &format!("{method} {status}"), &reply);
            sender
                .ready()
                .await
                .with_context(|| format!("keeping the connection after {method} {status}"))?;
        }
    }
    let response = sender.send_request(request(Method::HEAD, "/bytes/5000", full(""))?).await?;
    let reply = client::read(response).await?;
    let length = reply.headers.get(header::CONTENT_LENGTH).map(HeaderValue::as_bytes);
    ensure!(length == Some(b"5000"), "HEAD lost the length: {:?}", reply.headers);
    observe(&mut seen, "HEAD with a length", &reply);
    Ok(seen)
}

pub(crate) async fn large_headers(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut message = request(Method::GET, "/describe", full(""))?;
    for i in 0..60 {
        let name = http::HeaderName::try_from(format!("x-large-{i}"))?;
        message.headers_mut().insert(name, HeaderValue::try_from("v".repeat(1000))?);
    }
    observe(&mut seen, "many up", &http1(&target, message).await?.expect(200)?);
    let mut message = request(Method::GET, "/describe", full(""))?;
    message.headers_mut().insert("x-huge", HeaderValue::try_from("h".repeat(60 * 1024))?);
    observe(&mut seen, "one up", &http1(&target, message).await?.expect(200)?);
    let reply = http1(&target, request(Method::GET, "/headers/60000", full(""))?).await?.expect(200)?;
    observe(&mut seen, "down", &reply);
    Ok(seen)
}

pub(crate) async fn cookies(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut message = request(Method::GET, "/describe", full(""))?;
    message.headers_mut().append(header::COOKIE, HeaderValue::from_static("a=1; b=\"two\"; c=3"));
    observe(&mut seen, "up", &http1(&target, message).await?.expect(200)?);
    let reply = http1(&target, request(Method::GET, "/cookies", full(""))?).await?.expect(200)?;
    ensure!(reply.headers.get_all(header::SET_COOKIE).iter().count() == 3, "cookies were merged or lost");
    observe(&mut seen, "down", &reply);
    Ok(seen)
}

/// A streamed answer arrives as it is made, not when it is complete.
pub(crate) async fn streaming(target: Target) -> anyhow::Result<Observed> {
    let mut sender = client::http1::<Body>(target.at(HTTP)).await?;
    let start = Instant::now();
    let response = sender.send_request(request(Method::GET, "/drip/8/150", full(""))?).await?;
    let mut body = response.into_body();
    let first = body.frame().await.context("no first line")??;
    let waited = start.elapsed();
    ensure!(waited < Duration::from_millis(700), "the first line came only after {waited:?}");
    let rest = body.collect().await?.to_bytes();
    let mut seen = Observed::default();
    seen.note(format!("{:?}", first.into_data().ok()));
    seen.body("rest", &rest);
    Ok(seen)
}

pub(crate) async fn slow_answer(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let reply = http1(&target, request(Method::GET, "/slow/1500", full(""))?).await?.expect(200)?;
    observe(&mut seen, "slow", &reply);
    Ok(seen)
}

/// A reader that takes its time: nothing is lost, nobody gives up.
pub(crate) async fn slow_reader(target: Target) -> anyhow::Result<Observed> {
    let mut sender = client::http1::<Body>(target.at(HTTP)).await?;
    let response = sender.send_request(request(Method::GET, "/bytes/20000000", full(""))?).await?;
    let mut body = response.into_body();
    let (mut received, mut all) = (0, Vec::new());
    while let Some(frame) = body.frame().await {
        let data = frame.context("reading slowly")?.into_data().unwrap_or_default();
        received += data.len();
        all.extend_from_slice(&data);
        if received % (1 << 20) < data.len() {
            // Once a mebibyte: long enough for every buffer on the way to fill up.
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    }
    ensure!(received == 20_000_000, "{received} bytes arrived");
    let mut seen = Observed::default();
    seen.body("slowly", &all);
    Ok(seen)
}

/// The application answers before it has read the request.
pub(crate) async fn early_answer(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let reply =
        http1(&target, request(Method::POST, "/early", full(vec![b'x'; 3000]))?).await?.expect(417)?;
    seen.note(format!("{}", reply.status));
    seen.body("early", &reply.body);
    Ok(seen)
}

/// A body that breaks off must not look complete.
pub(crate) async fn broken_body(target: Target) -> anyhow::Result<Observed> {
    let mut sender = client::http1::<Body>(target.at(HTTP)).await?;
    let response = sender.send_request(request(Method::GET, "/break", full(""))?).await?;
    let status = response.status();
    let end = response.into_body().collect().await;
    ensure!(end.is_err(), "a truncated body was reported as complete");
    let mut seen = Observed::default();
    seen.note(format!("{status}, then an error"));
    Ok(seen)
}

pub(crate) async fn keep_alive(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut sender = client::http1::<Body>(target.at(HTTP)).await?;
    for i in 0..200 {
        let path = format!("/describe?n={i}");
        let body = if i % 3 == 0 { full(vec![b'k'; i * 10]) } else { full("") };
        let method = if i % 3 == 0 { Method::POST } else { Method::GET };
        let reply =
            client::read(sender.send_request(request(method, &path, body)?).await?).await?.expect(200)?;
        seen.body(&path, &reply.body);
        sender.ready().await.context("the connection was not kept")?;
    }
    Ok(seen)
}

pub(crate) async fn many_connections(target: Target) -> anyhow::Result<Observed> {
    let mut running = JoinSet::new();
    for i in 0..60 {
        let target = target.clone();
        running.spawn_local(async move {
            let message = request(Method::POST, "/echo", full(format!("connection {i}")))?;
            let reply = http1(&target, message).await?.expect(200)?;
            ensure!(reply.text() == format!("connection {i}"), "connection {i} got {:?}", reply.text());
            anyhow::Ok(())
        });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    Ok(Observed::default())
}

pub(crate) async fn http2(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut sender = client::http2::<Body>(target.at(HTTP)).await?;
    let uri = |path: &str| format!("http://{AUTHORITY}{path}");
    for (method, path, body) in [
        (Method::GET, "/describe?a=%2F", full("")),
        (Method::POST, "/describe", full("some body")),
        (Method::POST, "/describe", trailing_body()),
        (Method::HEAD, "/bytes/500", full("")),
        (Method::GET, "/bytes/3000000", full("")),
        (Method::GET, "/chunked/50", full("")),
        (Method::GET, "/trailers", full("")),
        (Method::GET, "/status/204", full("")),
        (Method::GET, "/status/304", full("")),
        (Method::GET, "/status/503", full("")),
        (Method::GET, "/cookies", full("")),
        (Method::GET, "/headers/60000", full("")),
    ] {
        let what = format!("{method} {path}");
        let message =
            Request::builder().method(method).uri(uri(path)).header("x-list", "a").header("x-list", "b");
        let message = message
            .header(header::TE, "trailers")
            .header(header::COOKIE, "a=1")
            .header(header::COOKIE, "b=2");
        let response = sender.send_request(message.body(body)?).await.with_context(|| what.clone())?;
        observe(&mut seen, &what, &client::read(response).await.with_context(|| what.clone())?);
    }
    Ok(seen)
}

pub(crate) async fn http2_streams(target: Target) -> anyhow::Result<Observed> {
    let sender = client::http2::<Body>(target.at(HTTP)).await?;
    let mut running = JoinSet::new();
    for i in 0..150 {
        let (mut sender, uri) = (sender.clone(), format!("http://{AUTHORITY}/echo"));
        running.spawn_local(async move {
            let content = format!("stream {i} ").repeat(i + 1);
            let message = Request::post(uri).body(full(content.clone()))?;
            let reply = client::read(sender.send_request(message).await?).await?.expect(200)?;
            ensure!(reply.text() == content, "stream {i} got {} bytes", reply.body.len());
            anyhow::Ok(())
        });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    Ok(Observed::default())
}

/// A request stream that the client gives up leaves the connection and its neighbours alone.
pub(crate) async fn http2_cancel(target: Target) -> anyhow::Result<Observed> {
    let mut sender = client::http2::<Body>(target.at(HTTP)).await?;
    for _ in 0..20 {
        let message = Request::get(format!("http://{AUTHORITY}/drip/1000/50")).body(full(""))?;
        let mut body = sender.send_request(message).await?.into_body();
        body.frame().await.context("no first line")??;
    }
    let message = Request::get(format!("http://{AUTHORITY}/whoami")).body(full(""))?;
    let reply = client::read(sender.send_request(message).await?).await?.expect(200)?;
    let mut seen = Observed::default();
    observe(&mut seen, "after cancelling", &reply);
    Ok(seen)
}

/// Two-way streaming on one HTTP/2 stream: each line is answered before the next is sent.
pub(crate) async fn http2_conversation(target: Target) -> anyhow::Result<Observed> {
    let mut sender = client::http2::<Body>(target.at(HTTP)).await?;
    let (lines, queue) = tokio::sync::mpsc::channel::<Bytes>(1);
    let frames = stream::unfold(queue, |mut queue| async move { Some((queue.recv().await?, queue)) });
    let body = StreamBody::new(frames.map(|line| Ok::<_, std::io::Error>(Frame::data(line))));
    let message =
        Request::post(format!("http://{AUTHORITY}/echo")).body(http_body_util::BodyExt::boxed(body))?;
    // The head goes out with the first line at the latest.
    lines.send("line 0\n".into()).await?;
    let mut answer = sender.send_request(message).await?.into_body();
    for i in 0..10 {
        let expected = format!("line {i}\n");
        let mut heard = Vec::new();
        while heard.len() < expected.len() {
            let frame = answer.frame().await.context("the answer ended")??;
            heard.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
        ensure!(heard == expected.as_bytes(), "heard {:?}", String::from_utf8_lossy(&heard));
        lines.send(format!("line {}\n", i + 1).into()).await?;
    }
    drop(lines);
    answer.collect().await.context("ending the conversation")?;
    Ok(Observed::default())
}
