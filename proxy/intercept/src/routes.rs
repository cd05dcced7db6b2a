//! Routes for the virtual ranges.
//!
//! A connect looks its route up before the output hook sees a packet; without a default route an address of the
//! mesh would be unreachable at once. So each range gets a route to `lo`, which the redirection then replaces.
//! Scope `link` lets the kernel choose the host's own address as source, as for any other destination; scope
//! `host` would make every such connection seem to come from 127.0.0.1. The type stays unicast, for the rules
//! leave addresses of type local alone. Without rules (removed by someone else) packets circle once and end.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::Error;
use crate::kernel::{append, exchange, netlink};

/// Who made the route (`rtm_protocol`): a number that no routing daemon has, so that we delete only our own.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(154);
/// The loopback device has this index in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK_INDEX: u32 = 1;

/// Adds a route for each range. One that somebody else made already is good enough.
pub(crate) fn add(ranges: &[IpNet]) -> Result<(), Error> {
    for range in ranges {
        let route = route(range);
        let result =
            request(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK, |_| ());
        match result {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if range.addr().is_ipv6() && no_ipv6() => drop(error),
            result => result.map_err(netlink(format!("add a route to {range} by lo")))?,
        }
    }
    Ok(())
}

/// Deletes the routes that [`add`] made, whatever their ranges were.
pub(crate) fn remove() -> Result<(), Error> {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        let mut ours = Vec::new();
        request(RouteNetlinkMessage::GetRoute(question), NLM_F_DUMP, |message| {
            if let RouteNetlinkMessage::NewRoute(route) = message
                && route.header.protocol == PROTOCOL
                && route.header.address_family == family
            {
                ours.push(route);
            }
        })
        .map_err(netlink("list routes".to_owned()))?;
        for mut route in ours {
            // The kernel adds what it keeps about a route (cache figures), which a request may not hold.
            route.attributes.retain(|attribute| {
                matches!(
                    attribute,
                    RouteAttribute::Destination(_) | RouteAttribute::Oif(_) | RouteAttribute::Priority(_)
                )
            });
            route.header.flags = netlink_packet_route::route::RouteFlags::empty();
            match request(RouteNetlinkMessage::DelRoute(route), NLM_F_ACK, |_| ()) {
                // ESRCH: another removal was faster.
                Err(error) if error.raw_os_error() == Some(3) => {}
                result => result.map_err(netlink("delete a route to a virtual range".to_owned()))?,
            }
        }
    }
    Ok(())
}

/// Whether this namespace has IPv6 switched off, in the kernel or for `lo`.
fn no_ipv6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").map_or(true, |text| text.trim() == "1")
}

fn route(range: &IpNet) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (family, address) = match range.network() {
        IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::from(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::from(address)),
    };
    message.header = RouteHeader {
        address_family: family,
        destination_prefix_length: range.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: PROTOCOL,
        scope: RouteScope::Link,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Destination(address), RouteAttribute::Oif(LOOPBACK_INDEX)];
    message
}

fn request(
    inner: RouteNetlinkMessage,
    flags: u16,
    mut each: impl FnMut(RouteNetlinkMessage),
) -> io::Result<()> {
    let mut message = NetlinkMessage::from(inner);
    message.header.flags = NLM_F_REQUEST | flags;
    message.header.sequence_number = 1;
    let mut bytes = Vec::new();
    append(&mut bytes, message);
    exchange(NETLINK_ROUTE, &bytes, &mut each)
}
