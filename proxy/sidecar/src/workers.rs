//! The worker threads: how many, their listeners, their runtimes.

use std::net::SocketAddr;

use tokio::net::TcpListener;

use crate::config::{Inbound, Upstream};

/// One worker's listeners. Every worker has its own on the same addresses (`SO_REUSEPORT`).
#[derive(Debug, Default)]
pub struct Listeners {
    /// Redirected outbound connections: the original destination says where to.
    pub outbound: Vec<TcpListener>,
    /// Redirected inbound connections: the original destination's port is the workload's.
    pub inbound: Vec<TcpListener>,
    /// Explicit upstreams.
    pub upstreams: Vec<(Upstream, TcpListener)>,
    /// Explicit inbounds.
    pub inbounds: Vec<(Inbound, TcpListener)>,
}

impl Listeners {
    /// Whether `address` is one of this proxy's own listeners: a connection to it would be a loop.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let upstreams = self.upstreams.iter().map(|(_, listener)| listener);
        let inbounds = self.inbounds.iter().map(|(_, listener)| listener);
        self.outbound
            .iter()
            .chain(&self.inbound)
            .chain(upstreams)
            .chain(inbounds)
            .filter_map(|listener| listener.local_addr().ok())
            .any(|own| own == address || (own.ip().is_unspecified() && own.port() == address.port()))
    }
}
