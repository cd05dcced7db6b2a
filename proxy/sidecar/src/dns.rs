//! The proxy's DNS: names of the mesh are answered here, all others are passed on untouched.
//!
//! What is passed on is the question's bytes, to the name server that would have been asked, over the protocol in
//! which it came: EDNS options, DNSSEC bits, truncation and the retry over TCP stay between the application and its
//! name server. Parsing happens only to learn whose name it is.
//!
//! Names of the mesh: `*.mesh`, and, unless Consul's DNS is configured, `*.consul`. The answer is a virtual address,
//! which leads back into this proxy. Silence of discovery is SERVFAIL, which resolvers retry; NXDOMAIN is kept for what
//! a synced source says.
//!
//! The hosts of external services are names of others that lead to services of the mesh. What is asked in order to connect to
//! one is answered as for names of the mesh; everything else about it (mail, text, delegation) is its owner's, and is
//! passed on. Where a synced source does not know the service (any more), the name is as any other.
//!
//! A name server on this very host asks in its turn, and with redirection would ask us: its user must be exempt
//! (`outrigger-proxy redirect --exempt-uid`). What the bound on queries cuts off otherwise is a loop.

mod answer;
mod forward;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};

use crate::{
    config::Config,
    context::Context,
    workers::{bind_all, lacks_ipv6},
};
use answer::{Verdict, judge};
use forward::Forwarder;
use outrigger_core::resolve::Knowledge;

/// Bytes of a UDP message that we take (RFC 6891, section 6.2.5 recommends 4096 as a maximum).
const MAX_UDP_BYTES: usize = 4096;
/// TCP connections at once.
const MAX_TCP: usize = 64;
/// RFC 7766, section 6.2.3: a few seconds without a question.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// After an error of `accept` or `recv` that may last, such as a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// How a question came, and how it is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// The DNS listeners.
#[derive(Debug, Default)]
pub struct Sockets {
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

impl Sockets {
    /// Opens the configured port, if any.
    ///
    /// # Errors
    /// If it is taken.
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let port = config.ports.dns;
        let mut sockets = Self::default();
        for listener in bind_all(&config.bind.dns, port, "ports.dns")? {
            sockets.tcp.push(TcpListener::from_std(listener)?);
        }
        for ip in config.bind.dns.iter().filter(|_| port != 0) {
            match UdpSocket::bind(SocketAddr::new(*ip, port)).await {
                Ok(socket) => sockets.udp.push(socket),
                Err(error) if lacks_ipv6(*ip, &error) && config.bind.dns.len() > 1 => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot listen on {ip}:{port} (ports.dns, UDP)"));
                }
            }
        }
        Ok(sockets)
    }

    /// Answers for as long as the runtime lives.
    pub fn serve(self, ctx: &Arc<Context>) {
        let own = self.udp.iter().filter_map(|socket| socket.local_addr().ok()).collect();
        let server = Arc::new(Server {
            forwarder: Forwarder::new(ctx.config.mark, ctx.config.dns.upstreams.clone(), own),
            ipv6: ctx.config.dns.ipv6.unwrap_or_else(has_ipv6),
            queries: Arc::new(Semaphore::new(ctx.config.limits.dns_queries.into())),
            connections: Arc::new(Semaphore::new(MAX_TCP)),
            ctx: ctx.clone(),
        });
        for socket in self.udp {
            tokio::spawn(server.clone().serve_udp(Arc::new(socket)));
        }
        for listener in self.tcp {
            tokio::spawn(server.clone().serve_tcp(listener));
        }
    }
}

struct Server {
    ctx: Arc<Context>,
    forwarder: Forwarder,
    /// Whether names of the mesh have AAAA records.
    ipv6: bool,
    queries: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = [0; MAX_UDP_BYTES];
        loop {
            // An error is, as a rule, an ICMP message about an answer that nobody waits for any more.
            let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
                sleep(PAUSE).await;
                continue;
            };
            let Some(permit) = self.permit() else { continue };
            let (server, socket, query) = (self.clone(), socket.clone(), buffer[..length].to_vec());
            tokio::spawn(async move {
                if let Some(reply) = server.answer(&query, Transport::Udp).await {
                    // The asker has a time-out and will ask again.
                    let _ = socket.send_to(&reply, from).await;
                }
                drop(permit);
            });
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        // The asker closed, or stopped in the middle: either way it is over.
                        let _ = server.tcp_connection(stream).await;
                        drop(permit);
                    });
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    async fn tcp_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let query = timeout(TCP_IDLE, read_message(&mut stream)).await??;
            let Some(_permit) = self.permit() else { return Ok(()) };
            let Some(reply) = self.answer(&query, Transport::Tcp).await else { return Ok(()) };
            timeout(TCP_IDLE, write_message(&mut stream, &reply)).await??;
        }
    }

    fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = self.queries.clone().try_acquire_owned().ok();
        if permit.is_none() {
            self.ctx.control.dns("any", "overloaded");
        }
        permit
    }

    async fn answer(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let consul = self.ctx.config.dns.consul;
        let verdict = {
            let hosts = self.ctx.directory.external_hosts();
            judge(query, consul.is_some(), &self.forwarder.search(), &hosts)
        };
        let (kind, reply) = match verdict {
            Verdict::Ignore => return None,
            Verdict::Malformed(reply) => ("any", Some(reply)),
            Verdict::NoSuchName(question) => ("search", question.no_such_name()),
            Verdict::Mesh(question) => {
                let known = self.ctx.directory.addresses(question.host()).await;
                ("mesh", question.reply(known, self.ipv6))
            }
            Verdict::External(question) => match self.ctx.directory.addresses(question.host()).await {
                Knowledge::NotFound => ("forward", self.forward(query, transport).await),
                Knowledge::Found(addresses) if addresses.is_empty() => {
                    ("forward", self.forward(query, transport).await)
                }
                // Not passed on: it would lead around the service's policies and identity.
                known => ("external", question.reply(known, self.ipv6)),
            },
            Verdict::Consul => {
                let server = consul.into_iter().collect::<Vec<_>>();
                ("consul", self.forwarder.forward(query, &server, transport).await)
            }
            Verdict::Forward => ("forward", self.forward(query, transport).await),
        };
        self.ctx.control.dns(kind, if reply.is_some() { "answered" } else { "failed" });
        reply.or_else(|| answer::server_failure(query))
    }

    async fn forward(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        self.forwarder.forward(query, &self.forwarder.servers(), transport).await
    }
}

/// A message with its length before it (RFC 1035, section 4.2.2).
async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // One write: two segments would wait for an acknowledgement in between.
    stream.write_all(&[&length.to_be_bytes()[..], message].concat()).await
}

/// Whether this host has an IPv6 address that leads beyond it. Connecting a UDP socket sends nothing.
fn has_ipv6() -> bool {
    let route = std::net::UdpSocket::bind("[::]:0").and_then(|socket| {
        socket.connect("[2001:db8::1]:53")?;
        socket.local_addr()
    });
    route.is_ok_and(|address| !address.ip().is_loopback() && !address.ip().is_unspecified())
}
