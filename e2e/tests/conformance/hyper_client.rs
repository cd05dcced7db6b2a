//! hyper as a client of the matrix: one connection, and what the library lets a program see.

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::{http1, http2};
use outrigger_e2e::client::{self, Reply};
use tokio::task::JoinSet;

use crate::matrix::{Exercise, MANY, MEBIBYTE, Pair, Version, pattern, same, says};

type Body = BoxBody<Bytes, std::io::Error>;

/// A connection of either version.
enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// A connection and what it leads to.
struct Client {
    pair: Pair,
    sender: Sender,
}

pub(crate) async fn run(pair: Pair, address: SocketAddr, exercise: Exercise) -> anyhow::Result<()> {
    let sender = match pair.version {
        Version::Http1 => Sender::Http1(client::http1(address).await?),
        Version::Http2 => Sender::Http2(client::http2(address).await?),
    };
    let mut client = Client { pair, sender };
    match exercise {
        Exercise::Get => {
            for length in [0, 1000, MEBIBYTE] {
                let path = format!("/bytes/{length}");
                let reply = client.send(Method::GET, &path, &[], full("")).await?;
                same(&path, &reply.body, &pattern(length))?;
            }
            Ok(())
        }
        Exercise::Post => {
            let reply = client.send(Method::POST, "/echo", &[], full(pattern(MEBIBYTE))).await?;
            same("with its length", &reply.body, &pattern(MEBIBYTE))?;
            let pieces: Vec<_> = pattern(MEBIBYTE).chunks(10_000).map(Bytes::copy_from_slice).collect();
            let body = frames(pieces.into_iter().map(Frame::data).collect());
            let reply = client.send(Method::POST, "/echo", &[], body).await?;
            same("without its length", &reply.body, &pattern(MEBIBYTE))
        }
        Exercise::TrailersUp => {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("42"));
            let body = frames(vec![Frame::data("body".into()), Frame::trailers(trailers)]);
            // In HTTP/1.1 hyper sends those that a field announces.
            let reply = client.send(Method::POST, "/describe", &[("trailer", "x-sum")], body).await?;
            says(&reply.body, "[\"x-sum\",\"42\"]")
        }
        Exercise::TrailersDown => {
            let reply = client.send(Method::GET, "/trailers", &[("te", "trailers")], full("")).await?;
            let trailers = reply.trailers.context("no trailers came")?;
            ensure!(trailers.get("x-checksum").is_some_and(|value| value == "0011"), "{trailers:?} came");
            Ok(())
        }
        Exercise::Many => client.many().await,
        Exercise::Continue | Exercise::Interim => bail!("hyper's client does not show interim responses"),
    }
}

fn full(content: impl Into<Bytes>) -> Body {
    Full::new(content.into()).map_err(|never| match never {}).boxed()
}

/// A body of unknown length.
fn frames(frames: Vec<Frame<Bytes>>) -> Body {
    BodyExt::boxed(StreamBody::new(stream::iter(frames.into_iter().map(Ok))))
}

impl Client {
    async fn send(
        &mut self,
        method: Method,
        path: &str,
        fields: &[(&str, &str)],
        body: Body,
    ) -> anyhow::Result<Reply> {
        let request = Request::builder().method(method);
        let request = fields.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let response = match &mut self.sender {
            Sender::Http1(sender) => {
                sender.ready().await.context("the connection was not kept")?;
                let request = request.uri(path).header("host", self.pair.service().authority());
                sender.send_request(request.body(body)?).await
            }
            Sender::Http2(sender) => sender.send_request(request.uri(self.pair.url(path)).body(body)?).await,
        };
        client::read(response.context("sending a request")?).await?.expect(200)
    }

    /// In HTTP/2 all at once.
    async fn many(mut self) -> anyhow::Result<()> {
        let Sender::Http2(sender) = &self.sender else {
            for i in 0..MANY {
                self.one_of_many(i).await?;
            }
            return Ok(());
        };
        let mut running = JoinSet::new();
        for i in 0..MANY {
            let mut one = Self { pair: self.pair, sender: Sender::Http2(sender.clone()) };
            running.spawn_local(async move { one.one_of_many(i).await });
        }
        while let Some(done) = running.join_next().await {
            done??;
        }
        Ok(())
    }

    async fn one_of_many(&mut self, i: usize) -> anyhow::Result<()> {
        let content = format!("request {i} ").repeat(i + 1);
        let reply = self.send(Method::POST, "/echo", &[], full(content.clone())).await?;
        same(&format!("request {i}"), &reply.body, content.as_bytes())
    }
}
