//! The application beside a sidecar in the suites: an independent peer, on hyper and on plain sockets, that knows
//! nothing of the mesh. One process serves as many ports as it is told to.
//!
//! On SIGTERM it serves `--linger-ms` longer, as an application does that drains properly, then ends; with 0 it ends
//! at once.
#![forbid(unsafe_code)]

mod http;
mod raw;
mod tcp;
mod work;

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::work::Work;

#[derive(Debug, Parser)]
#[command(version, about = "Test application of the end-to-end suites")]
struct Arguments {
    /// Ports with HTTP/1.1 and HTTP/2 in clear text (prior knowledge).
    #[arg(long)]
    http: Vec<u16>,
    /// Ports with the same in HTTP/2 alone, whatever the first bytes are.
    #[arg(long)]
    http2: Vec<u16>,
    /// Ports with HTTP/1.1 by hand: answers with the request head exactly as it came.
    #[arg(long)]
    raw: Vec<u16>,
    /// Ports that echo bytes, and close their side when the peer has closed its own.
    #[arg(long)]
    echo: Vec<u16>,
    /// Ports that speak first, then echo.
    #[arg(long)]
    banner: Vec<u16>,
    /// Ports that answer a few bytes and close their side first, then read on until the peer closes too.
    #[arg(long)]
    close_first: Vec<u16>,
    /// Ports that read one byte and reset the connection.
    #[arg(long)]
    reset: Vec<u16>,
    /// Ports with HTTP/1.1 and HTTP/2 where every path is answered with what was seen of the request.
    #[arg(long)]
    reflect: Vec<u16>,
    /// Ports, on loopback by custom, at which a suite says what goes wrong and reads what arrived.
    #[arg(long)]
    control: Vec<u16>,
    /// The service, `host:port`, that this one hands its work to.
    #[arg(long)]
    next: Option<String>,
    /// What `/whoami` answers: which of several replicas this is.
    #[arg(long, default_value = "app")]
    name: String,
    /// How long to serve after SIGTERM, in milliseconds.
    #[arg(long, default_value_t = 0)]
    linger_ms: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let name: &'static str = arguments.name.leak();
    let work = Arc::new(Work::new(name, arguments.next));
    for port in arguments.http {
        let (listener, work) = (listen(port).await?, Arc::clone(&work));
        tokio::spawn(accept(listener, move |stream| http::serve(stream, Arc::clone(&work))));
    }
    for port in arguments.http2 {
        let (listener, work) = (listen(port).await?, Arc::clone(&work));
        tokio::spawn(accept(listener, move |stream| http::serve_http2(stream, Arc::clone(&work))));
    }
    for port in arguments.reflect {
        let (listener, work) = (listen(port).await?, Arc::clone(&work));
        tokio::spawn(accept(listener, move |stream| http::reflect(stream, Arc::clone(&work))));
    }
    for port in arguments.control {
        let (listener, work) = (listen(port).await?, Arc::clone(&work));
        tokio::spawn(accept(listener, move |stream| Arc::clone(&work).control(stream)));
    }
    for port in arguments.raw {
        tokio::spawn(accept(listen(port).await?, raw::serve));
    }
    for port in arguments.echo {
        tokio::spawn(accept(listen(port).await?, tcp::echo));
    }
    for port in arguments.banner {
        tokio::spawn(accept(listen(port).await?, tcp::banner));
    }
    for port in arguments.close_first {
        tokio::spawn(accept(listen(port).await?, tcp::close_first));
    }
    for port in arguments.reset {
        tokio::spawn(accept(listen(port).await?, tcp::reset));
    }
    println!("serving as {name}");
    terminate.recv().await;
    println!("SIGTERM: serving {} ms longer", arguments.linger_ms);
    tokio::time::sleep(Duration::from_millis(arguments.linger_ms)).await;
    Ok(())
}

/// Listens on every address of both families.
async fn listen(port: u16) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
}

async fn accept<F, Fut>(listener: TcpListener, serve: F)
where
    F: Fn(tokio::net::TcpStream) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                let served = serve(stream);
                tokio::spawn(async move {
                    if let Err(error) = served.await {
                        println!("connection from {peer}: {error:#}");
                    }
                });
            }
            Err(error) => println!("accepting: {error}"),
        }
    }
}
