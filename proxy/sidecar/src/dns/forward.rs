//! Passing a question on, byte for byte.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, timeout};

use super::{MAX_UDP_BYTES, Transport, read_message, write_message};
use crate::controller::{tcp, udp};

/// A name server that does not answer in this time is passed over. Stub resolvers give up after 5 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// Name servers that are asked, one after the other.
const MAX_SERVERS: usize = 3;
/// How long /etc/resolv.conf is believed: DHCP and VPNs rewrite it.
const REREAD: Duration = Duration::from_secs(5);

/// Knows the name servers and asks them.
pub(super) struct Forwarder {
    mark: Option<u32>,
    configured: Vec<SocketAddr>,
    /// Our own listeners, which must not be asked.
    own: Vec<SocketAddr>,
    system: Mutex<Option<(Instant, Arc<System>)>>,
}

#[derive(Default)]
struct System {
    servers: Vec<SocketAddr>,
    /// Lower case, no final dot.
    search: Vec<String>,
}

impl Forwarder {
    pub(super) fn new(mark: Option<u32>, configured: Vec<SocketAddr>, own: Vec<SocketAddr>) -> Self {
        Self { mark, configured, own, system: Mutex::new(None) }
    }

    pub(super) fn servers(&self) -> Vec<SocketAddr> {
        if self.configured.is_empty() { self.system().servers.clone() } else { self.configured.clone() }
    }

    pub(super) fn search(&self) -> Vec<String> {
        self.system().search.clone()
    }

    fn system(&self) -> Arc<System> {
        let mut held = self.system.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some((read, system)) if read.elapsed() < REREAD => system.clone(),
            _ => {
                let system = Arc::new(System::read());
                *held = Some((Instant::now(), system.clone()));
                system
            }
        }
    }

    /// The first answer of `servers`, tried in order.
    pub(super) async fn forward(
        &self,
        query: &[u8],
        servers: &[SocketAddr],
        transport: Transport,
    ) -> Option<Vec<u8>> {
        for server in servers.iter().filter(|server| !self.own.contains(server)).take(MAX_SERVERS) {
            let asked = match transport {
                Transport::Udp => timeout(PATIENCE, self.ask_udp(query, *server)).await,
                Transport::Tcp => timeout(PATIENCE, self.ask_tcp(query, *server)).await,
            };
            match asked {
                Ok(Ok(reply)) => return Some(reply),
                Ok(Err(error)) => tracing::debug!(%server, "cannot ask a name server: {error}"),
                Err(_) => tracing::debug!(%server, "a name server does not answer"),
            }
        }
        None
    }

    // A socket for each question: its random port is what makes an answer hard to forge (RFC 5452, section 9.2).
    async fn ask_udp(&self, query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
        let local = if server.is_ipv4() {
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
        } else {
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
        };
        let socket = udp(self.mark, local).await?;
        socket.connect(server).await?;
        socket.send(query).await?;
        let mut buffer = vec![0; MAX_UDP_BYTES];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if answers(&buffer[..length], query) {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
    }

    async fn ask_tcp(&self, query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
        let mut stream = tcp(self.mark, server, None).await?;
        write_message(&mut stream, query).await?;
        let reply = read_message(&mut stream).await?;
        if answers(&reply, query) { Ok(reply) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

/// A response with the question's id.
fn answers(reply: &[u8], query: &[u8]) -> bool {
    reply.len() >= 12 && query.len() >= 12 && reply[..2] == query[..2] && reply[2] & 0x80 != 0
}

impl System {
    fn read() -> Self {
        let (config, _) = match hickory_resolver::system_conf::read_system_conf() {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!("cannot read the system's name servers: {error}; set `dns.upstreams`");
                return Self::default();
            }
        };
        let servers = config.name_servers().iter().map(|server| SocketAddr::new(server.ip, 53)).collect();
        let mut search: Vec<String> = config.search().iter().chain(config.domain()).map(plain).collect();
        search.dedup();
        search.retain(|domain| !domain.is_empty());
        Self { servers, search }
    }
}

fn plain(name: &hickory_proto::rr::Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}
