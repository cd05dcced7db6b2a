//! Two hosts joined by a cable: network namespaces made by the test, in which the kernel itself judges.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use nix::sched::{CloneFlags, setns, unshare};

pub(crate) const HERE4: &str = "10.77.0.1";
pub(crate) const HERE6: &str = "fd77::1";
pub(crate) const PEER4: &str = "10.77.0.2";
pub(crate) const PEER6: &str = "fd77::2";

/// How long anything that must happen may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

const LOOPBACK: u32 = 1;
/// Above the devices that some kernels put into every new namespace.
const CABLE: u32 = 100;

/// Becomes root of a user namespace, so that no privilege is needed. Before any thread exists.
pub(crate) fn become_root() {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).expect(
        "the kernel must allow user and network namespaces (user.max_user_namespaces, AppArmor, seccomp)",
    );
    std::fs::write("/proc/self/setgroups", "deny").unwrap();
    std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).unwrap();
    std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).unwrap();
}

/// The other end of the cable; the calling thread is this end.
pub(crate) struct Peer {
    namespace: File,
}

impl Peer {
    /// Moves this thread to a fresh network namespace and joins it with another.
    pub(crate) fn new() -> Self {
        fresh_namespace();
        let namespace = std::thread::spawn(|| {
            fresh_namespace();
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        join_by_cable(&namespace);
        set_up(CABLE);
        add_address(HERE4, 24);
        add_address(HERE6, 64);
        let peer = Self { namespace };
        peer.run(|| {
            set_up(CABLE);
            add_address(PEER4, 24);
            add_address(PEER6, 64);
        });
        peer
    }

    /// Runs something on the other host. Sockets made there stay there.
    pub(crate) fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.namespace, CloneFlags::CLONE_NEWNET).unwrap();
                    what()
                })
                .join()
                .unwrap()
        })
    }
}

/// Connects; fails within the deadline, retrying while the cable comes up.
pub(crate) fn dial(address: impl AsRef<str>) -> TcpStream {
    let address: SocketAddr = address.as_ref().parse().unwrap();
    let end = Instant::now() + DEADLINE;
    loop {
        match TcpStream::connect_timeout(&address, DEADLINE) {
            Ok(stream) => return stream,
            Err(error) if error.kind() == io::ErrorKind::HostUnreachable && Instant::now() < end => {}
            Err(error) => panic!("connect to {address}: {error}"),
        }
    }
}

fn fresh_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    set_up(LOOPBACK);
    // Strict, as many distributions set it: redirection must not look like spoofing.
    std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap();
}

fn set_up(index: u32) {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    request(RouteNetlinkMessage::NewLink(link), 0);
}

fn join_by_cable(other: &File) {
    let mut far = LinkMessage::default();
    far.header.index = CABLE;
    far.attributes = vec![LinkAttribute::IfName("cable".into()), LinkAttribute::NetNsFd(other.as_raw_fd())];
    let mut near = LinkMessage::default();
    near.header.index = CABLE;
    near.attributes = vec![
        LinkAttribute::IfName("cable".into()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(far))),
        ]),
    ];
    request(RouteNetlinkMessage::NewLink(near), NLM_F_CREATE | NLM_F_EXCL);
}

fn add_address(address: &str, prefix_len: u8) {
    let address: IpAddr = address.parse().unwrap();
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = prefix_len;
    message.header.index = CABLE;
    // Usable at once: nobody else is on the cable.
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL);
}

fn request(inner: RouteNetlinkMessage, flags: u16) {
    let mut message = NetlinkMessage::from(inner);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_ROUTE).unwrap();
    socket.send_to(&bytes, &NetlinkAddr::new(0, 0), 0).unwrap();
    let (answer, _) = socket.recv_from_full().unwrap();
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).unwrap();
    match answer.payload {
        NetlinkPayload::Error(error) => assert!(error.code.is_none(), "{message:?}: {}", error.to_io()),
        other => panic!("unexpected answer {other:?}"),
    }
}
