//! Where a dialled address leads: the table in ARCHITECTURE.md, "Resolution".
//!
//! The order of the questions is the safety argument. What discovery knows is used wherever the address lies. What
//! it does not know is refused inside the mesh's ranges, because the alternative is to send in clear what its owner
//! believes to be encrypted. Until the ranges are known, everything but loopback counts as inside.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::reason::Reason;

/// IPv4 range of virtual addresses: reserved class E, so that it collides with nobody's network.
pub const VIRTUAL_IPV4: &str = "253.0.0.0/8";
/// IPv6 range of virtual addresses, in the unique local space.
pub const VIRTUAL_IPV6: &str = "fd00:240::/32";

/// What discovery says of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knowledge<T> {
    /// It leads here.
    Found(T),
    /// A synced source has no such address.
    NotFound,
    /// No answer came in time.
    Silent,
}

/// What to do with a connection to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution<T> {
    /// Carry it there.
    Mesh(T),
    /// Connect to the original address, unchanged and unauthenticated. `audit`: the default is `Audit`, say so.
    PassThrough {
        /// Record it as something that a `Deny` default would refuse.
        audit: bool,
    },
    /// Refuse it.
    Refuse(Reason),
}

/// What happens to destinations outside the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutboundDefault {
    /// They pass.
    #[default]
    Allow,
    /// They pass and are recorded.
    Audit,
    /// They are refused.
    Deny,
}

/// The mesh's ranges and its outbound default, as pushed or configured.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ranges {
    /// `None`: nobody has said yet.
    pub mesh: Option<Vec<IpNet>>,
    /// What passes outside them.
    pub outbound: OutboundDefault,
}

impl Ranges {
    /// Whether an address that cannot be resolved must be refused.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if is_virtual(address) {
            return true;
        }
        match &self.mesh {
            Some(ranges) => ranges.iter().any(|range| range.contains(&address)),
            None => !address.is_loopback(),
        }
    }
}

/// Whether an address lies in the ranges from which the mesh gives virtual addresses.
pub fn is_virtual(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.octets()[0] == 253,
        IpAddr::V6(v6) => v6.segments()[..2] == [0xfd00, 0x0240],
    }
}

/// Decides what to do with a connection to `address`.
pub fn resolve<T>(address: IpAddr, knowledge: Knowledge<T>, ranges: &Ranges) -> Resolution<T> {
    let inside = ranges.contains(address);
    match knowledge {
        Knowledge::Found(target) => Resolution::Mesh(target),
        Knowledge::NotFound if inside => Resolution::Refuse(Reason::NoSuchDestination),
        Knowledge::Silent if inside => Resolution::Refuse(Reason::DiscoveryUnavailable),
        Knowledge::NotFound | Knowledge::Silent => match ranges.outbound {
            OutboundDefault::Allow => Resolution::PassThrough { audit: false },
            OutboundDefault::Audit => Resolution::PassThrough { audit: true },
            OutboundDefault::Deny => Resolution::Refuse(Reason::OutboundDenied),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(text: &[&str]) -> Ranges {
        Ranges {
            mesh: Some(text.iter().map(|t| t.parse().unwrap()).collect()),
            outbound: OutboundDefault::Allow,
        }
    }

    #[test]
    fn the_virtual_ranges_are_what_the_constants_say() {
        let v4: IpNet = VIRTUAL_IPV4.parse().unwrap();
        let v6: IpNet = VIRTUAL_IPV6.parse().unwrap();
        for text in
            ["253.0.0.1", "252.255.255.255", "254.0.0.0", "fd00:240::1", "fd00:241::", "fd00:23f:ffff::"]
        {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(is_virtual(address), v4.contains(&address) || v6.contains(&address), "{text}");
        }
    }

    #[test]
    fn an_unknown_mesh_passes_nothing_but_loopback() {
        let unknown = Ranges::default();
        let out = resolve::<()>("192.0.2.1".parse().unwrap(), Knowledge::Silent, &unknown);
        assert_eq!(out, Resolution::Refuse(Reason::DiscoveryUnavailable));
        let loopback = resolve::<()>("127.0.0.1".parse().unwrap(), Knowledge::Silent, &unknown);
        assert_eq!(loopback, Resolution::PassThrough { audit: false });
    }

    #[test]
    fn a_mapped_address_is_judged_as_the_ipv4_address_it_is() {
        let mesh = ranges(&["10.0.0.0/8"]);
        assert!(mesh.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(mesh.contains("::ffff:253.0.0.1".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn nothing_inside_the_mesh_passes_in_clear(octets: [u8; 4], silent: bool, deny: bool) {
            let mut mesh = ranges(&["10.0.0.0/8", "192.168.0.0/16"]);
            if deny { mesh.outbound = OutboundDefault::Deny; }
            let address = IpAddr::from(octets);
            let knowledge = if silent { Knowledge::Silent } else { Knowledge::NotFound };
            let out = resolve::<()>(address, knowledge, &mesh);
            if mesh.contains(address) || deny {
                prop_assert!(matches!(out, Resolution::Refuse(_)));
            } else {
                prop_assert_eq!(out, Resolution::PassThrough { audit: false });
            }
        }
    }
}
