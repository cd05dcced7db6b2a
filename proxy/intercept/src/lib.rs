//! Bringing a workload's traffic into its proxy: redirection rules, the address that was dialled before
//! them, and the socket options that a transparent proxy needs.
//!
//! Rules are nftables rules in one table of our own, written over netlink. No `nft`, `iptables` or shell is
//! called, so an image needs none, and one atomic batch replaces the whole table: other people's rules stay
//! untouched and there is no moment without rules. [`render`] prints what [`apply`] would send, from the same
//! list.
//!
//! Everything here turned out possible without `unsafe`: socket2, netlink-sys and std hold what is needed.
//!
//! What the listeners must know:
//! - In the output hook the kernel redirects to `127.0.0.1` and `::1`, so the outbound and the DNS listener
//!   bind to loopback ([`sockets::bind_loopback`]); a UDP DNS socket must, or its answers leave from another
//!   address than the one asked. Arriving traffic is redirected to the address of its interface, so the
//!   inbound listener binds to the wildcard ([`sockets::bind_wildcard`]).
//! - A connection that was not redirected has no [`original_destination`]; refuse it, or it leads in circles.
//! - A sidecar's dial to an endpoint is given to [`sockets::allow_hairpin`], a dial to its own workload is not.
#![forbid(unsafe_code)]

mod compile;
mod encode;
mod kernel;
mod lock;
mod original;
mod program;
mod routes;
mod rules;
pub mod sockets;

pub use kernel::{Applied, apply, installed, remove};
pub use lock::PortLock;
pub use original::original_destination;
pub use rules::{Exempt, PortRange, ProxyPorts, Rules, Select, Selector, default_virtual_ranges, render};

use std::io;
use std::path::PathBuf;

/// Why rules could not be made, written or removed, or a port could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules contradict themselves or are too many.
    #[error("redirection rules are invalid: {0}")]
    Invalid(String),
    /// The cgroup that selects the workload cannot be read.
    #[error("cannot read the cgroup {path}: {source}; it must exist in a cgroup2 hierarchy before the rules are written", path = path.display())]
    Cgroup {
        /// The path that was tried.
        path: PathBuf,
        /// What the file system answered.
        source: io::Error,
    },
    /// The kernel or the netlink socket refused.
    #[error("cannot {action}: {source}{hint}", hint = hint(source))]
    Netlink {
        /// What was tried, as in "write the nftables table `outrigger`".
        action: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Another proxy in this network namespace serves the port.
    #[error(
        "port {port} belongs to another outrigger-proxy in this network namespace; stop that one or configure another port"
    )]
    PortHeld {
        /// The TCP or UDP port.
        port: u16,
    },
    /// The lock of a port could not be taken for another reason.
    #[error("cannot take the lock of port {port}: {source}")]
    PortLock {
        /// The TCP or UDP port.
        port: u16,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// What to do about the refusals that people meet.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; this needs CAP_NET_ADMIN in the network namespace",
        io::ErrorKind::NotFound | io::ErrorKind::Unsupported => {
            "; the kernel needs nf_tables with inet NAT, fib and redir (Linux 5.2 or newer; a rule's cgroup match 5.13)"
        }
        _ => "",
    }
}
