//! Ports that nobody listens on.
//!
//! Proxies that listen with `SO_REUSEPORT` share a port in silence, and two peers on one port would measure each other.
//! So each port is bound once without it, which fails if anybody has it; and all lie below the range from which the
//! kernel takes ports for outgoing connections (32768 on, by default), so that none is taken before it is used.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result};

/// Where the search begins.
const FIRST: u16 = 21_000;
/// Where it ends.
const LAST: u16 = 31_999;

/// Hands out ports, each once.
pub(crate) struct Ports {
    next: u16,
}

impl Ports {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// A port on loopback that was free a moment ago.
    pub(crate) fn take(&mut self) -> Result<SocketAddr> {
        while self.next <= LAST {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.next));
            self.next += 1;
            if TcpListener::bind(address).is_ok() {
                return Ok(address);
            }
        }
        None.with_context(|| format!("no port from {FIRST} to {LAST} is free: end what listens there"))
    }

    /// Several.
    pub(crate) fn several<const N: usize>(&mut self) -> Result<[SocketAddr; N]> {
        let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
        for address in &mut addresses {
            *address = self.take()?;
        }
        Ok(addresses)
    }
}
