//! What to redirect, in the words of a configuration.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;

use crate::{Error, compile};

/// The name of the table, of [`Rules::table`] unless several sidecars share a network namespace.
const DEFAULT_TABLE: &str = "outrigger";

/// The ports on which the proxy of these rules listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyPorts {
    /// Takes the workload's outbound TCP; on loopback.
    pub outbound: u16,
    /// Takes TCP that arrives for the workload; on the wildcard address.
    pub inbound: u16,
    /// Takes the workload's DNS questions, UDP and TCP; on loopback.
    pub dns: u16,
    /// Admin and metrics: never redirected, in either direction.
    pub admin: u16,
}

impl Default for ProxyPorts {
    fn default() -> Self {
        Self { outbound: 15401, inbound: 15406, dns: 15453, admin: 15490 }
    }
}

impl ProxyPorts {
    pub(crate) fn all(&self) -> [u16; 4] {
        [self.outbound, self.inbound, self.dns, self.admin]
    }
}

/// How the kernel recognises sockets whose traffic is never taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exempt {
    /// Sockets that belong to this user.
    Uid(u32),
    /// Sockets that carry this mark ([`crate::sockets::set_mark`]; needs a capability, and a workload that has
    /// `CAP_NET_RAW` can set it as well). Never 0, which every unmarked socket carries.
    Mark(u32),
}

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl FromStr for PortRange {
    type Err = Error;

    /// Reads `8080` or `9000-9010`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(Self { first, last }),
            _ => Err(Error::Invalid(format!(
                "`{text}` is neither a port from 1 to 65535 nor a range of them such as 9000-9010"
            ))),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// Narrows a direction. Empty includes mean everything; an exclude beats an include.
///
/// Ports are the dialled ports. CIDRs are the dialled addresses, but for inbound the callers' addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    /// Only these ports, if any are named.
    pub include_ports: Vec<PortRange>,
    /// Never these ports.
    pub exclude_ports: Vec<PortRange>,
    /// Only these addresses, if any are named.
    pub include_cidrs: Vec<IpNet>,
    /// Never these addresses.
    pub exclude_cidrs: Vec<IpNet>,
}

/// Whose outbound traffic is taken on a host with several workloads. Inbound traffic has no sender here: give
/// each workload's rules its ports in [`Rules::inbound`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Select {
    /// Processes of these users, both ends included.
    Uid {
        /// The lowest user id.
        first: u32,
        /// The highest user id.
        last: u32,
    },
    /// Processes in this cgroup (version 2) or below it, as a path under the cgroup mount:
    /// `system.slice/orders.service`. The cgroup must exist when the rules are applied, and a cgroup that was
    /// removed and made again needs them applied again.
    Cgroup(PathBuf),
}

/// All of one sidecar's redirection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The nftables table (family `inet`) that holds the rules: `outrigger`, or `outrigger-` and a name per
    /// sidecar where several share a network namespace.
    pub table: String,
    /// Where the proxy listens.
    pub ports: ProxyPorts,
    /// The proxy first; then whoever else must reach the network untouched, as a local DNS resolver that would
    /// otherwise be asked by the proxy and ask the proxy in turn.
    pub exempt: Vec<Exempt>,
    /// What arrives for the workload; `None` leaves it alone.
    pub inbound: Option<Selector>,
    /// Refuse what arrives for a port on which nothing listens in this network namespace, as the kernel does without a
    /// proxy. Else the proxy takes it, and whoever only looks whether a port is open (a `tcpSocket` probe, a health check)
    /// sees it open. Ports that are published by translation alone, without a listener, need the latter.
    pub refuse_closed: bool,
    /// TCP that the workload sends; `None` leaves it alone.
    pub outbound: Option<Selector>,
    /// DNS questions that the workload sends, to whatever server, also on loopback; `None` leaves them alone.
    /// Without included ports it means port 53.
    pub dns: Option<Selector>,
    /// Whether IPv6 is taken too.
    pub ipv6: bool,
    /// Whose traffic; `None` means everyone's but the exempt.
    pub select: Option<Select>,
    /// Refuse UDP other than DNS, sent (the sender sees EPERM) and, unless `select` is set, arriving. Traffic
    /// inside the host passes. DHCP renewals and NTP are UDP too.
    pub drop_udp: bool,
    /// Addresses that exist in the mesh only. A connect needs a route before any rule sees it, so each gets one
    /// to `lo` that is tried after nothing more specific is known.
    pub virtual_ranges: Vec<IpNet>,
}

impl Default for Rules {
    /// Everything is redirected and nobody exempt: name the proxy in `exempt` before applying.
    fn default() -> Self {
        Self {
            table: DEFAULT_TABLE.to_owned(),
            ports: ProxyPorts::default(),
            exempt: Vec::new(),
            inbound: Some(Selector::default()),
            refuse_closed: true,
            outbound: Some(Selector::default()),
            dns: Some(Selector::default()),
            ipv6: true,
            select: None,
            drop_udp: false,
            virtual_ranges: default_virtual_ranges().to_vec(),
        }
    }
}

/// The ranges from which the controller gives names an address: `253.0.0.0/8` and `fd00:240::/32`.
pub fn default_virtual_ranges() -> [IpNet; 2] {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    [
        IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(253, 0, 0, 0)), 8),
        IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfd00, 0x240, 0, 0, 0, 0, 0, 0)), 32),
    ]
}

/// The rules as nftables would print them, and the routes as `ip route` would, for people to read.
///
/// # Errors
/// [`Error::Invalid`], as [`crate::apply`].
pub fn render(rules: &Rules) -> Result<String, Error> {
    use fmt::Write as _;
    let mut text = compile::compile(rules)?.to_string();
    for range in compile::routed(rules) {
        let _ = writeln!(text, "# ip route add {range} dev lo");
    }
    Ok(text)
}
