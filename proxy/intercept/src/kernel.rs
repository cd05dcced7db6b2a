//! Writing, removing and counting our rules in the kernel of the current network namespace.
//!
//! These calls block for as long as the kernel takes (milliseconds); they are made once, before serving.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_netfilter::nftables::{
    NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use crate::rules::Rules;
use crate::{Error, compile, encode, routes};

/// `NFNL_SUBSYS_NFTABLES`, which a batch names as the subsystem it is for.
const SUBSYSTEM_NFTABLES: u16 = 10;
/// What an unprivileged process may have by default (`net.core.wmem_max`); the kernel takes a batch only whole.
const SEND_BUFFER_BYTES: usize = 212_992;

/// Makes the kernel's rules exactly these, in one step and however often, and adds the routes that virtual
/// addresses need. Other tables stay as they are.
///
/// A kernel that cannot look for a listener gets the rules without [`Rules::refuse_closed`], and [`Applied::ClosedPortsTaken`] says so.
///
/// # Errors
/// [`Error::Invalid`] before anything is touched; [`Error::Cgroup`]; [`Error::Netlink`], after which the rules
/// are what they were (a route may have been added).
pub fn apply(rules: &Rules) -> Result<Applied, Error> {
    let table = compile::compile(rules)?;
    let messages = encode::replace(&table, &|path| cgroup_id(path))?;
    // Routes first: a route without rules is a dead end, rules without routes let nothing reach them.
    routes::add(&compile::routed(rules))?;
    match batch(messages) {
        Ok(()) => Ok(Applied::Whole),
        // The kernel does not say which expression it has not. Without this one it says so again, or has them all.
        Err(error) if rules.refuse_closed && unknown(&error) => {
            apply(&Rules { refuse_closed: false, ..rules.clone() })?;
            Ok(Applied::ClosedPortsTaken)
        }
        Err(error) => Err(netlink(format!("write the nftables table `{}`", table.name))(error)),
    }
}

/// What of the rules the kernel took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// All.
    Whole,
    /// All but [`Rules::refuse_closed`]: this kernel has no `socket` expression (`CONFIG_NFT_SOCKET`).
    ClosedPortsTaken,
}

/// Whether the kernel may have met an expression that it does not know.
fn unknown(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported)
}

/// Removes the table and, when no other table of ours is left, our routes. Removing what is not there succeeds.
///
/// # Errors
/// [`Error::Invalid`] if the name is none of ours, [`Error::Netlink`].
pub fn remove(table: &str) -> Result<(), Error> {
    compile::check_table_name(table)?;
    batch(encode::remove(table)).map_err(netlink(format!("remove the nftables table `{table}`")))?;
    let tables =
        dump(NfTablesMessage::GetTable(TableMessage { attributes: vec![] }), NetfilterProtoFamily::Inet)
            .map_err(netlink("list nftables tables".to_owned()))?;
    let ours = tables.iter().filter_map(table_name).any(|name| compile::check_table_name(name).is_ok());
    if ours { Ok(()) } else { routes::remove() }
}

/// How many rules the kernel holds in this table; 0 also when there is no such table.
///
/// # Errors
/// [`Error::Netlink`].
pub fn installed(table: &str) -> Result<usize, Error> {
    let request = RuleMessage { attributes: vec![RuleAttribute::Table(table.to_owned())] };
    match dump(NfTablesMessage::GetRule(request), NetfilterProtoFamily::Inet) {
        Ok(rules) => Ok(rules.iter().filter(|message| rule_table(message) == Some(table)).count()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(netlink(format!("list the nftables table `{table}`"))(error)),
    }
}

pub(crate) fn netlink(action: String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Netlink { action, source }
}

fn table_name(message: &NfTablesMessage) -> Option<&str> {
    let NfTablesMessage::NewTable(table) = message else { return None };
    table.attributes.iter().find_map(|attribute| match attribute {
        TableAttribute::Name(name) => Some(name.as_str()),
        _ => None,
    })
}

fn rule_table(message: &NfTablesMessage) -> Option<&str> {
    let NfTablesMessage::NewRule(rule) = message else { return None };
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(name) => Some(name.as_str()),
        _ => None,
    })
}

/// A cgroup's id is the inode of its directory. Hosts mount the hierarchy in one of two places.
fn cgroup_id(path: &Path) -> Result<u64, Error> {
    let mounts = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
    let mount = mounts.iter().find(|mount| Path::new(mount).join("cgroup.controllers").exists());
    let path = PathBuf::from(mount.unwrap_or(&mounts[1])).join(path);
    std::fs::metadata(&path).map(|metadata| metadata.ino()).map_err(|source| Error::Cgroup { path, source })
}

/// Sends the messages as one transaction and waits for the kernel's word on it.
fn batch(messages: Vec<NfTablesMessage>) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut sequence = 0;
    let mut push = |inner: NetfilterMessageInner, family, resource, flags| {
        sequence += 1;
        let mut message =
            NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, resource), inner));
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = sequence;
        append(&mut bytes, message);
    };
    let unspecified = NetfilterProtoFamily::Unspec;
    push(ControlMessage::BatchBegin.into(), unspecified, SUBSYSTEM_NFTABLES, 0);
    let last = messages.len().saturating_sub(1);
    for (index, message) in messages.into_iter().enumerate() {
        let create = match &message {
            NfTablesMessage::NewTable(_) | NfTablesMessage::NewChain(_) => NLM_F_CREATE,
            NfTablesMessage::NewRule(_) => NLM_F_CREATE | NLM_F_APPEND,
            _ => 0,
        };
        // Errors are told for every message; one acknowledgement of success is enough.
        let acknowledge = if index == last { NLM_F_ACK } else { 0 };
        push(message.into(), NetfilterProtoFamily::Inet, 0, create | acknowledge);
    }
    push(ControlMessage::BatchEnd.into(), unspecified, SUBSYSTEM_NFTABLES, 0);
    exchange::<NetfilterMessage>(NETLINK_NETFILTER, &bytes, |_| ())
}

fn dump(request: NfTablesMessage, family: NetfilterProtoFamily) -> io::Result<Vec<NfTablesMessage>> {
    let mut message =
        NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), request));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.header.sequence_number = 1;
    let mut bytes = Vec::new();
    append(&mut bytes, message);
    let mut found = Vec::new();
    exchange::<NetfilterMessage>(NETLINK_NETFILTER, &bytes, |message| {
        if let NetfilterMessageInner::NfTables(inner) = message.inner {
            found.push(inner);
        }
    })?;
    Ok(found)
}

pub(crate) fn append<T: NetlinkSerializable>(bytes: &mut Vec<u8>, mut message: NetlinkMessage<T>) {
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len(), 0);
    message.serialize(&mut bytes[start..]);
}

/// Sends one datagram and reads until the kernel acknowledges, refuses or ends a listing.
pub(crate) fn exchange<T>(protocol: isize, request: &[u8], mut each: impl FnMut(T)) -> io::Result<()>
where
    T: NetlinkDeserializable,
    T::Error: std::error::Error + Send + Sync + 'static,
{
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket2::SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let sent = socket.send(request, 0)?;
    if sent != request.len() {
        return Err(io::Error::other(format!("netlink took {sent} of {} bytes", request.len())));
    }
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<T>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            // Messages are padded to four bytes (NLMSG_ALIGN), a datagram's last one need not be.
            let length = (message.header.length as usize).next_multiple_of(4).min(rest.len());
            rest = &rest[length..];
            match message.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::InnerMessage(inner) => each(inner),
                _ => {}
            }
        }
    }
}
