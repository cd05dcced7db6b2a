//! The demo's application: an ordinary HTTP/1.1 server that knows nothing of the mesh. It calls the next
//! service, if it has one, by a plain `http://` address, and answers with what it heard.
//!
//! `GET /health` is answered without the next service: it is for probes, and one service that is down must not take down
//! its callers. `POST /fail` makes it answer 500 and `POST /heal` ends that; both are called past the mesh, by the demo itself.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1::SendRequest, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

/// Idle connections to the next service that are kept; beyond these a connection is used once.
const KEPT_CONNECTIONS: usize = 32;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What it calls itself, e.g. `orders-2`
    #[arg(long)]
    name: String,
    #[arg(long)]
    listen: SocketAddr,
    /// Where the next service is dialled: `host:port`
    #[arg(long)]
    next: Option<String>,
    /// Serve on for so long after SIGTERM: callers must first learn that it goes
    #[arg(long, default_value_t = 0)]
    linger_seconds: u64,
}

struct App {
    name: String,
    failing: AtomicBool,
    next: Option<Next>,
}

/// Serves until the process is told to end. In a container it is the first process, which no signal ends by itself.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let linger = Duration::from_secs(arguments.linger_seconds);
    tokio::select! {
        served = serve(arguments) => served,
        () = async {
            terminate.recv().await;
            tokio::time::sleep(linger).await;
        } => Ok(()),
    }
}

async fn serve(arguments: Arguments) -> Result<()> {
    let app = Arc::new(App {
        name: arguments.name,
        failing: AtomicBool::new(false),
        next: arguments.next.map(Next::new),
    });
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("listening on {}", arguments.listen))?;
    loop {
        let (stream, _) = listener.accept().await.context("accepting a connection")?;
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let app = app.clone();
                async move { Ok::<_, Infallible>(app.answer(request).await) }
            });
            // A connection that breaks is its client's business; the demo counts failures there.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

impl App {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/health") => return reply(StatusCode::OK, "ok\n".to_owned()),
            (&Method::POST, "/fail") => self.failing.store(true, Ordering::Relaxed),
            (&Method::POST, "/heal") => self.failing.store(false, Ordering::Relaxed),
            _ if self.failing.load(Ordering::Relaxed) => {
                return reply(StatusCode::INTERNAL_SERVER_ERROR, format!("{} is failing\n", self.name));
            }
            _ => {}
        }
        let Some(next) = &self.next else {
            return reply(StatusCode::OK, format!("{}\n", self.name));
        };
        match next.get(request.uri().path()).await {
            Ok((status, heard)) => {
                let mut response =
                    reply(status, format!("{} <- {}", self.name, String::from_utf8_lossy(&heard.1)));
                if let Some(reason) = heard.0 {
                    response.headers_mut().insert("outrigger-reason", reason);
                }
                response
            }
            Err(error) => reply(StatusCode::BAD_GATEWAY, format!("{}: {error:#}\n", self.name)),
        }
    }
}

fn reply(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
}

/// The client of the next service, with keep-alive, as any HTTP library would have it.
pub(crate) struct Next {
    /// `host:port`.
    address: String,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// A reason header, if the mesh answered, and the body.
pub(crate) type Heard = (Option<http::HeaderValue>, Bytes);

impl Next {
    pub(crate) fn new(address: impl Into<String>) -> Self {
        Self { address: address.into(), idle: Mutex::new(Vec::new()) }
    }

    pub(crate) async fn get(&self, path: &str) -> Result<(StatusCode, Heard)> {
        self.call(Method::GET, path).await
    }

    pub(crate) async fn post(&self, path: &str) -> Result<(StatusCode, Heard)> {
        self.call(Method::POST, path).await
    }

    async fn call(&self, method: Method, path: &str) -> Result<(StatusCode, Heard)> {
        let mut sender = match self.take_idle() {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, &self.address)
            .body(Full::default())?;
        let response = sender.send_request(request).await.context("waiting for the answer")?;
        let status = response.status();
        let reason = response.headers().get("outrigger-reason").cloned();
        let body = response.into_body().collect().await.context("reading the answer")?.to_bytes();
        self.keep(sender);
        Ok((status, (reason, body)))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(&self.address)
            .await
            .with_context(|| format!("connecting to {}", self.address))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().expect("no holder of this lock can panic");
        while let Some(sender) = idle.pop() {
            if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock().expect("no holder of this lock can panic");
        if idle.len() < KEPT_CONNECTIONS {
            idle.push(sender);
        }
    }
}
