//! Bytes over TCP: exchanges of 1 KiB, one stream without end, and connections that carry one exchange each.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Result, ensure};

use super::{Load, Stretch, nanoseconds};
use crate::{
    backend::{FLOOD, SMALL},
    poller::{Line, Poller},
};

/// What one read takes at most.
const SCRATCH: usize = 256 * 1024;
/// A request. Its first byte begins no protocol that a proxy could detect, so that none waits for more.
const REQUEST: [u8; SMALL] = [1; SMALL];

struct Client {
    line: Line,
    received: usize,
    begun: Instant,
}

impl Client {
    fn connect(poller: &Poller, address: SocketAddr, key: usize) -> Result<Self> {
        let begun = Instant::now();
        Ok(Self { line: Line::connect(poller, address, key)?, received: 0, begun })
    }

    fn send(&mut self, poller: &Poller) -> Result<()> {
        self.received = 0;
        self.line.out.extend_from_slice(&REQUEST);
        self.line.flush(poller)
    }

    /// Handles an event; `true` when the answer is complete.
    fn turn(&mut self, poller: &Poller, scratch: &mut [u8]) -> Result<bool> {
        self.line.flush(poller)?;
        self.received += self.line.read(scratch)?.unwrap_or(0);
        ensure!(self.received <= SMALL, "the answer is too long");
        Ok(self.received == SMALL)
    }
}

pub(super) struct Exchanges {
    poller: Poller,
    clients: Vec<Client>,
    scratch: Vec<u8>,
}

impl Exchanges {
    pub(super) fn open(address: SocketAddr, connections: usize) -> Result<Self> {
        let poller = Poller::new()?;
        let mut clients = Vec::new();
        for key in 0..connections {
            clients.push(Client::connect(&poller, address, key)?);
        }
        for client in &mut clients {
            client.send(&poller)?;
        }
        Ok(Self { poller, clients, scratch: vec![0; SCRATCH] })
    }
}

impl Load for Exchanges {
    fn run(&mut self, end: Instant) -> Result<Stretch> {
        let begun = Instant::now();
        let mut latencies = Vec::new();
        while let Some(ready) = self.poller.wait_until(end)? {
            for at in 0..ready {
                let client = &mut self.clients[self.poller.key(at)];
                if client.turn(&self.poller, &mut self.scratch)? {
                    let now = Instant::now();
                    latencies.push(nanoseconds(now - client.begun));
                    client.begun = now;
                    client.send(&self.poller)?;
                }
            }
        }
        Ok(Stretch::of(begun, latencies))
    }
}

pub(super) struct Flood {
    poller: Poller,
    line: Line,
    scratch: Vec<u8>,
}

impl Flood {
    pub(super) fn open(address: SocketAddr) -> Result<Self> {
        let poller = Poller::new()?;
        let mut line = Line::connect(&poller, address, 0)?;
        line.out.extend_from_slice(&[FLOOD; SMALL]);
        line.flush(&poller)?;
        Ok(Self { poller, line, scratch: vec![0; SCRATCH] })
    }
}

impl Load for Flood {
    fn run(&mut self, end: Instant) -> Result<Stretch> {
        let begun = Instant::now();
        let mut bytes = 0_u64;
        while self.poller.wait_until(end)?.is_some() {
            bytes += self.line.read(&mut self.scratch)?.unwrap_or(0) as u64;
        }
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
        let operations = bytes as f64 / f64::from(1 << 30);
        Ok(Stretch { operations, elapsed: begun.elapsed(), latencies: Vec::new() })
    }
}

/// Every exchange on a connection of its own: through proxies, a full handshake each.
pub(super) struct Handshakes {
    address: SocketAddr,
    poller: Poller,
    clients: Vec<Client>,
    scratch: Vec<u8>,
}

impl Handshakes {
    pub(super) fn new(address: SocketAddr, connections: usize) -> Result<Self> {
        let poller = Poller::new()?;
        let mut clients = Vec::new();
        for key in 0..connections {
            let mut client = Client::connect(&poller, address, key)?;
            client.send(&poller)?;
            clients.push(client);
        }
        Ok(Self { address, poller, clients, scratch: vec![0; SCRATCH] })
    }
}

impl Load for Handshakes {
    fn run(&mut self, end: Instant) -> Result<Stretch> {
        let begun = Instant::now();
        let mut latencies = Vec::new();
        while let Some(ready) = self.poller.wait_until(end)? {
            for at in 0..ready {
                let key = self.poller.key(at);
                let client = &mut self.clients[key];
                if client.turn(&self.poller, &mut self.scratch)? {
                    latencies.push(nanoseconds(client.begun.elapsed()));
                    // The old connection closes as the new one takes its place.
                    *client = Client::connect(&self.poller, self.address, key)?;
                    client.send(&self.poller)?;
                }
            }
        }
        Ok(Stretch::of(begun, latencies))
    }
}
