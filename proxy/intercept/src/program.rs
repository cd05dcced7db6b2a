//! The rules as data: what [`crate::render`] prints and [`crate::apply`] sends. One list, so that the two
//! cannot differ. It prints as `nft list ruleset` would. Only the matches that our rules use exist here.

use std::fmt;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::rules::PortRange;

pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) chains: Vec<Chain>,
}

pub(crate) struct Chain {
    pub(crate) name: &'static str,
    /// The kernel's entry; `None` for a chain that others jump to.
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Clone, Copy)]
pub(crate) enum Hook {
    /// `type nat hook prerouting priority dstnat`
    NatPrerouting,
    /// `type nat hook output priority dstnat`
    NatOutput,
    /// `type filter hook input priority filter`
    FilterInput,
    /// `type filter hook output priority filter`
    FilterOutput,
}

pub(crate) struct Rule {
    pub(crate) matches: Vec<Match>,
    pub(crate) action: Action,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Match {
    Ipv6,
    Protocol(Protocol),
    DestinationPort(Protocol, PortRange),
    Destination(IpNet),
    Source(IpNet),
    /// Whether the destination is one of this host's own addresses.
    DestinationLocal(bool),
    /// Whether it came in by `lo`.
    FromLoopback(bool),
    SocketUid(u32),
    SocketUidWithin {
        first: u32,
        last: u32,
    },
    Mark(u32),
    Priority(u32),
    WithinCgroup(PathBuf),
    /// The packet belongs to a connection that conntrack knows.
    Established,
    /// Some socket would take the packet; of one that this host sends the sender's own socket counts, so that it always holds.
    Listening,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Return,
    Drop,
    Jump(&'static str),
    /// To this port of this host.
    Redirect(u16),
    /// To port 0, on which nothing can listen, so that the kernel answers with a reset in the name of the port that was dialled.
    Refuse,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for (index, chain) in self.chains.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            writeln!(f, "\tchain {} {{", chain.name)?;
            if let Some(hook) = chain.hook {
                writeln!(f, "\t\t{hook}")?;
            }
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            writeln!(f, "\t}}")?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NatPrerouting => "type nat hook prerouting priority dstnat; policy accept;",
            // nft knows the name `dstnat` for prerouting only.
            Self::NatOutput => "type nat hook output priority -100; policy accept;",
            Self::FilterInput => "type filter hook input priority filter; policy accept;",
            Self::FilterOutput => "type filter hook output priority filter; policy accept;",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for one in &self.matches {
            write!(f, "{one} ")?;
        }
        match self.action {
            Action::Return => f.write_str("return"),
            Action::Drop => f.write_str("drop"),
            Action::Jump(chain) => write!(f, "jump {chain}"),
            Action::Redirect(port) => write!(f, "redirect to :{port}"),
            Action::Refuse => f.write_str("redirect to :0"),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unless = |holds: &bool| if *holds { "" } else { "!= " };
        let family = |net: &IpNet| if net.addr().is_ipv4() { "ip" } else { "ip6" };
        let address = |net: &IpNet| {
            let whole = net.prefix_len() == net.max_prefix_len();
            if whole { net.addr().to_string() } else { net.to_string() }
        };
        match self {
            Self::Ipv6 => f.write_str("meta nfproto ipv6"),
            Self::Protocol(protocol) => write!(f, "meta l4proto {protocol}"),
            Self::DestinationPort(protocol, ports) => write!(f, "{protocol} dport {ports}"),
            Self::Destination(net) => write!(f, "{} daddr {}", family(net), address(net)),
            Self::Source(net) => write!(f, "{} saddr {}", family(net), address(net)),
            Self::DestinationLocal(holds) => write!(f, "fib daddr type {}local", unless(holds)),
            Self::FromLoopback(holds) => write!(f, "iifname {}\"lo\"", unless(holds)),
            Self::SocketUid(uid) => write!(f, "meta skuid {uid}"),
            Self::SocketUidWithin { first, last } => write!(f, "meta skuid {first}-{last}"),
            Self::Mark(mark) => write!(f, "meta mark {mark:#010x}"),
            Self::Priority(priority) => write!(f, "meta priority 0:{priority:x}"),
            Self::WithinCgroup(path) => {
                write!(f, "socket cgroupv2 level {} \"{}\"", cgroup_level(path), path.display())
            }
            Self::Established => f.write_str("ct state established,related"),
            Self::Listening => f.write_str("socket transparent 0-1"),
        }
    }
}

/// How deep the cgroup lies under the root, which is level 0.
pub(crate) fn cgroup_level(path: &std::path::Path) -> u32 {
    u32::try_from(path.components().count()).unwrap_or(u32::MAX)
}
