//! Something that stands between the controller and Consul and, when told to, behaves as Consul or the network
//! before it do on a bad day.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::client;
use crate::network::Host;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// `403 Permission denied`: the token lost its rights.
    Denied,
    /// `500 No cluster leader`.
    NoLeader,
    /// `429 Too Many Requests`.
    RateLimited,
    /// The JSON ends in the middle, the response is complete: a broken intermediary.
    TruncatedJson,
    /// The response ends in the middle: a connection that broke.
    TruncatedResponse,
    /// The index begins anew, at 1, with an empty answer: a server restored from nothing.
    IndexReset,
    /// No `X-Consul-Index` at all.
    NoIndex,
    /// No answer.
    Stall,
}

/// The port of the front.
pub const PORT: u16 = 8500;

/// A running front.
#[derive(Debug)]
pub struct Front {
    fault: watch::Sender<Fault>,
    host: Host,
}

impl Front {
    /// Listens on `host` and forwards to Consul's HTTP API at `consul`.
    pub async fn start(host: Host, consul: SocketAddr) -> anyhow::Result<Self> {
        let (fault, current) = watch::channel(Fault::None);
        let address = host.at(PORT);
        host.run(move || async move {
            let listener =
                TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
            tokio::task::spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let current = current.clone();
                    let service = service_fn(move |request| answer(request, consul, current.clone()));
                    let serve = hyper::server::conn::http1::Builder::new();
                    tokio::task::spawn_local(serve.serve_connection(TokioIo::new(stream), service));
                }
            });
            Ok(())
        })
        .await?;
        Ok(Self { fault, host })
    }

    /// What the controller is given as Consul's address.
    pub fn url(&self) -> String {
        format!("http://{}", self.host.at(PORT))
    }

    /// From now on this goes wrong, also for questions that are waiting for an answer.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

async fn answer(
    request: Request<Incoming>,
    consul: SocketAddr,
    mut fault: watch::Receiver<Fault>,
) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let broken = || std::io::Error::other("the front breaks the connection");
    let now = *fault.borrow_and_update();
    let forward = async {
        match now {
            Fault::None | Fault::TruncatedJson | Fault::TruncatedResponse | Fault::NoIndex => {
                forward(request, consul).await
            }
            Fault::Denied => Ok(plain(StatusCode::FORBIDDEN, "Permission denied")),
            Fault::NoLeader => Ok(plain(StatusCode::INTERNAL_SERVER_ERROR, "No cluster leader")),
            Fault::RateLimited => Ok(plain(StatusCode::TOO_MANY_REQUESTS, "slow down")),
            Fault::IndexReset => {
                let mut response = plain(StatusCode::OK, "[]");
                response.headers_mut().insert("x-consul-index", HeaderValue::from_static("1"));
                Ok(response)
            }
            Fault::Stall => std::future::pending().await,
        }
    };
    // A question that waits (a blocking query) is hit too when the fault begins.
    let response = tokio::select! {
        response = forward => response,
        _ = fault.changed() => return Err(broken()),
    };
    let mut response = response.unwrap_or_else(|error| plain(StatusCode::BAD_GATEWAY, &format!("{error:#}")));
    match now {
        Fault::TruncatedJson => {
            let body = response.into_body().collect().await.map(http_body_util::Collected::to_bytes);
            let body = body.unwrap_or_else(|never: Infallible| match never {});
            let half = body.slice(..body.len() / 2);
            response = Response::new(Full::new(half));
            response.headers_mut().insert("x-consul-index", HeaderValue::from_static("999999"));
        }
        Fault::TruncatedResponse => return Err(broken()),
        Fault::NoIndex => drop(response.headers_mut().remove("x-consul-index")),
        _ => {}
    }
    Ok(response)
}

async fn forward(request: Request<Incoming>, consul: SocketAddr) -> anyhow::Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.context("reading a request")?.to_bytes();
    let mut sender = client::http1(consul).await?;
    let exchange = async {
        let response = sender.send_request(Request::from_parts(head, Full::new(body))).await?;
        let (mut head, body) = response.into_parts();
        head.headers.remove(http::header::TRANSFER_ENCODING);
        let body = body.collect().await?.to_bytes();
        anyhow::Ok(Response::from_parts(head, Full::new(body)))
    };
    // Longer than any blocking query.
    tokio::time::timeout(Duration::from_mins(11), exchange).await.context("Consul is silent")?
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    response
}
