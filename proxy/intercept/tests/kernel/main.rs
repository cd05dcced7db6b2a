//! The rules in a real kernel, judged by real sockets. Each test has two hosts of its own; where the kernel
//! refuses namespaces, this fails.
#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, which clippy cannot see without the usual harness"
)]

mod net;

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use net::{DEADLINE, HERE4, HERE6, PEER4, PEER6, Peer, dial};
use outrigger_intercept::{
    Error, Exempt, PortLock, PortRange, Rules, Select, Selector, apply, installed, original_destination,
    remove, render, sockets,
};
use socket2::{Domain, Protocol, Socket, Type};

const MARK: u32 = 0x0072;
const OUTBOUND: u16 = 15401;
const INBOUND: u16 = 15406;
const DNS: u16 = 15453;
const ADMIN: u16 = 15490;

fn main() {
    let arguments = Arguments::from_args();
    net::become_root();
    let trials = [
        trial("outbound_is_redirected", outbound_is_redirected),
        trial("outbound_mapped_addresses", outbound_mapped_addresses),
        trial("exempt_by_mark", exempt_by_mark),
        trial("exempt_and_selected_by_uid", exempt_and_selected_by_uid),
        trial("selected_by_cgroup", selected_by_cgroup),
        trial("outbound_excludes", outbound_excludes),
        trial("outbound_includes", outbound_includes),
        trial("own_addresses_are_left_alone", own_addresses_are_left_alone),
        trial("ipv6_is_left_alone_when_off", ipv6_is_left_alone_when_off),
        trial("dns_is_redirected", dns_is_redirected),
        trial("dns_excludes", dns_excludes),
        trial("virtual_addresses", virtual_addresses),
        trial("apply_and_remove_repeat", apply_and_remove_repeat),
        trial("replacing_leaves_no_gap", replacing_leaves_no_gap),
        trial("ipv6_may_be_missing", ipv6_may_be_missing),
        trial("two_sidecars_on_a_host", two_sidecars_on_a_host),
        trial("as_many_rules_as_allowed", as_many_rules_as_allowed),
        trial("inbound_is_redirected", inbound_is_redirected),
        trial("inbound_excludes", inbound_excludes),
        trial("inbound_reaches_the_workload_and_loops", inbound_reaches_the_workload_and_loops),
        trial("proxy_ports_are_closed_to_others", proxy_ports_are_closed_to_others),
        trial("udp_passes_by_default", udp_passes_by_default),
        trial("udp_is_dropped_when_asked", udp_is_dropped_when_asked),
        trial("port_locks_are_per_namespace", port_locks_are_per_namespace),
    ];
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// A test with two hosts, on a thread of its own, for the namespace belongs to the thread.
fn trial(name: &str, test: fn(&Peer)) -> Trial {
    Trial::test(name, move || {
        let joined = std::thread::spawn(move || test(&Peer::new())).join();
        joined.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            Failed::from(text.or(panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
        })
    })
}

fn rules() -> Rules {
    Rules { exempt: vec![Exempt::Mark(MARK)], ..Rules::default() }
}

fn outbound_only(selector: Selector) -> Rules {
    Rules { inbound: None, dns: None, outbound: Some(selector), ..rules() }
}

/// A listener whose accept gives up at the deadline.
fn listen(address: impl AsRef<str>) -> TcpListener {
    patient(sockets::bind_reuseport(address.as_ref().parse().unwrap(), 64).unwrap())
}

fn patient(listener: TcpListener) -> TcpListener {
    listener.set_nonblocking(false).unwrap();
    socket2::SockRef::from(&listener).set_read_timeout(Some(DEADLINE)).unwrap();
    listener
}

/// The two outbound listeners of a proxy.
fn proxy(port: u16) -> (TcpListener, TcpListener) {
    let mut both = sockets::bind_loopback(port, 64).unwrap().into_iter().map(patient);
    (both.next().unwrap(), both.next().unwrap())
}

/// Accepts one connection and says where it was meant to go.
fn original(listener: &TcpListener) -> Option<SocketAddr> {
    let (stream, _) = listener.accept().expect("a redirected connection");
    original_destination(&stream).unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Dials as the proxy does.
fn dial_marked(address: &str, hairpin: bool) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().unwrap();
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).unwrap();
    sockets::set_mark(&socket, MARK).unwrap();
    if hairpin {
        sockets::allow_hairpin(&socket).unwrap();
    }
    socket.connect_timeout(&address.into(), DEADLINE)?;
    Ok(socket.into())
}

/// Asserts that this connection ends at this listener, by bytes rather than by addresses.
fn assert_joined(mut client: TcpStream, server: &TcpListener) {
    let (mut accepted, _) = server.accept().expect("a connection");
    client.write_all(b"ahoy").unwrap();
    let mut bytes = [0; 4];
    accepted.set_read_timeout(Some(DEADLINE)).unwrap();
    accepted.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ahoy");
}

fn outbound_is_redirected(_: &Peer) {
    apply(&rules()).unwrap();
    let (v4, v6) = proxy(OUTBOUND);
    // Nobody listens there, nor is anybody asked.
    let _client = dial(format!("{PEER4}:8080"));
    assert_eq!(original(&v4), Some(at(PEER4, 8080)));
    let _client = dial(format!("[{PEER6}]:8443"));
    assert_eq!(original(&v6), Some(at(PEER6, 8443)));
    // A dial to the listener itself has no original destination.
    let _client = dial(format!("127.0.0.1:{OUTBOUND}"));
    assert_eq!(original(&v4), None);
    let _client = dial(format!("[::1]:{OUTBOUND}"));
    assert_eq!(original(&v6), None);
}

fn outbound_mapped_addresses(_: &Peer) {
    apply(&rules()).unwrap();
    let both = patient(sockets::bind_wildcard(OUTBOUND, 64).unwrap());
    let _client = dial(format!("{PEER4}:8080"));
    assert_eq!(original(&both), Some(at(PEER4, 8080)));
    let _client = dial(format!("[{PEER6}]:8080"));
    assert_eq!(original(&both), Some(at(PEER6, 8080)));
    let _client = dial(format!("127.0.0.1:{OUTBOUND}"));
    assert_eq!(original(&both), None);
    // An application that dials IPv4 through an IPv6 socket.
    let _client = dial(format!("[::ffff:{PEER4}]:8081"));
    assert_eq!(original(&both), Some(at(PEER4, 8081)));
}

fn exempt_by_mark(peer: &Peer) {
    apply(&rules()).unwrap();
    for address in [format!("{PEER4}:8080"), format!("[{PEER6}]:8080")] {
        let server = peer.run(|| listen(&address));
        assert_joined(dial_marked(&address, false).unwrap(), &server);
        assert_joined(dial_marked(&address, true).unwrap(), &server);
    }
    // DNS of the proxy itself, too.
    let server = peer.run(|| listen(format!("{PEER4}:53")));
    assert_joined(dial_marked(&format!("{PEER4}:53"), false).unwrap(), &server);
}

fn exempt_and_selected_by_uid(peer: &Peer) {
    let server = peer.run(|| listen(format!("{PEER4}:8080")));
    let (v4, _) = proxy(OUTBOUND);
    let target = format!("{PEER4}:8080");
    // Every process of this test is root of its user namespace: uid 0.
    let cases = [
        (Exempt::Uid(0), None, false),
        (Exempt::Uid(2102), None, true),
        (Exempt::Uid(2102), Some(Select::Uid { first: 0, last: 0 }), true),
        (Exempt::Uid(2102), Some(Select::Uid { first: 0, last: 70_000 }), true),
        (Exempt::Uid(2102), Some(Select::Uid { first: 1, last: 70_000 }), false),
        (Exempt::Uid(0), Some(Select::Uid { first: 0, last: 70_000 }), false),
    ];
    for (exempt, select, taken) in cases {
        apply(&Rules { exempt: vec![exempt], select: select.clone(), ..rules() }).unwrap();
        let client = dial(&target);
        assert_joined(client, if taken { &v4 } else { &server });
    }
}

fn selected_by_cgroup(peer: &Peer) {
    let missing = Select::Cgroup(PathBuf::from("outrigger-test/missing"));
    let error = apply(&Rules { select: Some(missing), ..rules() }).unwrap_err();
    assert!(
        matches!(&error, Error::Cgroup { path, .. } if path.ends_with("outrigger-test/missing")),
        "{error}"
    );
    assert_eq!(installed("outrigger").unwrap(), 0, "a refused apply changes nothing");

    // The kernel's verdict needs a cgroup below the root that we are, or are not, in: ours, or one made here.
    let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = membership.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let Some(mount) = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(PathBuf::from)
        .into_iter()
        .find(|mount| mount.join("cgroup.controllers").exists())
    else {
        return;
    };
    let server = peer.run(|| listen(format!("{PEER4}:8080")));
    let (v4, _) = proxy(OUTBOUND);
    let select = |path: &str| Rules { select: Some(Select::Cgroup(path.into())), ..rules() };
    if let Some(made) = Cgroup::make(&mount, own) {
        apply(&select(&made.name)).unwrap();
        assert_joined(dial(format!("{PEER4}:8080")), &server);
        std::fs::write(mount.join(&made.name).join("cgroup.procs"), "0").unwrap();
        assert_joined(dial(format!("{PEER4}:8080")), &v4);
    } else if !own.is_empty() && mount.join(own).exists() {
        apply(&select(own)).unwrap();
        assert_joined(dial(format!("{PEER4}:8080")), &v4);
    }
}

/// A cgroup that leaves with its test; the test's process goes back to where it was.
struct Cgroup {
    mount: PathBuf,
    own: String,
    name: String,
}

impl Cgroup {
    /// `None` where we may not make one, as without root.
    fn make(mount: &Path, own: &str) -> Option<Self> {
        let name = format!("outrigger-test-{}", std::process::id());
        std::fs::create_dir(mount.join(&name)).ok()?;
        Some(Self { mount: mount.to_owned(), own: own.to_owned(), name })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        std::fs::write(self.mount.join(&self.own).join("cgroup.procs"), "0").unwrap();
        std::fs::remove_dir(self.mount.join(&self.name)).unwrap();
    }
}

fn outbound_excludes(peer: &Peer) {
    let selector = Selector {
        exclude_ports: vec![22.into(), PortRange { first: 6000, last: 6010 }],
        exclude_cidrs: vec!["10.77.0.64/26".parse().unwrap(), "fd77::/64".parse().unwrap()],
        ..Selector::default()
    };
    apply(&outbound_only(selector)).unwrap();
    let (v4, v6) = proxy(OUTBOUND);
    for port in [22, 6000, 6010] {
        let server = peer.run(|| listen(format!("{PEER4}:{port}")));
        assert_joined(dial(format!("{PEER4}:{port}")), &server);
    }
    let server = peer.run(|| listen(format!("[{PEER6}]:80")));
    assert_joined(dial(format!("[{PEER6}]:80")), &server);
    for port in [21, 23, 5999, 6011] {
        let _client = dial(format!("{PEER4}:{port}"));
        assert_eq!(original(&v4), Some(at(PEER4, port)));
    }
    // Another host's admin port is scraped directly.
    let server = peer.run(|| listen(format!("{PEER4}:{ADMIN}")));
    assert_joined(dial(format!("{PEER4}:{ADMIN}")), &server);
    let _client = dial("[fd00:240::7]:80");
    assert_eq!(original(&v6), Some(at("fd00:240::7", 80)));
}

fn outbound_includes(peer: &Peer) {
    let selector = Selector {
        include_ports: vec![80.into(), PortRange { first: 8000, last: 8100 }],
        include_cidrs: vec!["10.77.0.0/24".parse().unwrap()],
        ..Selector::default()
    };
    apply(&outbound_only(selector)).unwrap();
    let (v4, _) = proxy(OUTBOUND);
    for port in [80, 8000, 8100] {
        let _client = dial(format!("{PEER4}:{port}"));
        assert_eq!(original(&v4), Some(at(PEER4, port)));
    }
    for address in [format!("{PEER4}:81"), format!("{PEER4}:8101"), format!("[{PEER6}]:80")] {
        let server = peer.run(|| listen(&address));
        assert_joined(dial(&address), &server);
    }
}

fn own_addresses_are_left_alone(_: &Peer) {
    apply(&rules()).unwrap();
    for host in ["127.0.0.1", "127.8.8.8", HERE4, "[::1]", &format!("[{HERE6}]")] {
        let application = listen(format!("{host}:8080"));
        assert_joined(dial(format!("{host}:8080")), &application);
    }
}

fn ipv6_is_left_alone_when_off(peer: &Peer) {
    apply(&Rules { ipv6: false, ..rules() }).unwrap();
    let (v4, _) = proxy(OUTBOUND);
    let server = peer.run(|| listen(format!("[{PEER6}]:8080")));
    assert_joined(dial(format!("[{PEER6}]:8080")), &server);
    let _client = dial(format!("{PEER4}:8080"));
    assert_eq!(original(&v4), Some(at(PEER4, 8080)));
    let inbound = listen(format!("[{HERE6}]:8080"));
    assert_joined(peer.run(|| dial(format!("[{HERE6}]:8080"))), &inbound);
}

fn udp(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// Asks a server and asserts that the answer came from the server asked, as resolvers do by connecting.
fn ask(server: &str, answering: &UdpSocket) {
    let server: SocketAddr = server.parse().unwrap();
    let client = udp(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
    client.connect(server).unwrap();
    client.send(b"who?").unwrap();
    let mut bytes = [0; 16];
    let (length, from) = answering.recv_from(&mut bytes).expect("a question");
    assert_eq!(&bytes[..length], b"who?");
    answering.send_to(b"you", from).unwrap();
    let length = client.recv(&mut bytes).expect("an answer");
    assert_eq!(&bytes[..length], b"you");
}

fn dns_is_redirected(_: &Peer) {
    apply(&rules()).unwrap();
    let (v4, v6) = (udp(&format!("127.0.0.1:{DNS}")), udp(&format!("[::1]:{DNS}")));
    // Another host's, a local stub's, this host's own, and one to which there is no route but the virtual one.
    for server in [PEER4, "127.0.0.53", "127.0.0.1", HERE4, "253.0.0.53"] {
        ask(&format!("{server}:53"), &v4);
    }
    for server in [PEER6, "::1", HERE6] {
        ask(&format!("[{server}]:53"), &v6);
    }
    let (v4, v6) = proxy(DNS);
    let _client = dial("127.0.0.53:53");
    assert_eq!(original(&v4), Some(at("127.0.0.53", 53)));
    let _client = dial(format!("[{PEER6}]:53"));
    assert_eq!(original(&v6), Some(at(PEER6, 53)));
}

fn dns_excludes(peer: &Peer) {
    let dns = Selector {
        include_ports: vec![53.into(), 8600.into()],
        exclude_cidrs: vec![format!("{PEER4}/32").parse().unwrap()],
        ..Selector::default()
    };
    apply(&Rules { dns: Some(dns), ..rules() }).unwrap();
    let proxy = udp(&format!("127.0.0.1:{DNS}"));
    ask("127.0.0.1:8600", &proxy);
    ask("127.0.0.53:53", &proxy);
    let server = peer.run(|| udp(&format!("{PEER4}:53")));
    ask(&format!("{PEER4}:53"), &server);
}

fn virtual_addresses(_: &Peer) {
    let unreachable =
        |address: &str| TcpStream::connect_timeout(&address.parse().unwrap(), DEADLINE).is_err();
    assert!(unreachable("253.0.0.1:80") && unreachable("[fd00:240::1]:80"), "there is no default route");
    apply(&rules()).unwrap();
    let (v4, v6) = proxy(OUTBOUND);
    let client = dial("253.1.2.3:80");
    assert_eq!(original(&v4), Some(at("253.1.2.3", 80)));
    assert_eq!(client.local_addr().unwrap().ip(), at(HERE4, 0).ip(), "the host's own address as source");
    let client = dial("[fd00:240:1::9]:80");
    assert_eq!(original(&v6), Some(at("fd00:240:1::9", 80)));
    assert_eq!(client.local_addr().unwrap().ip(), at(HERE6, 0).ip());
    remove("outrigger").unwrap();
    assert!(unreachable("253.0.0.1:80") && unreachable("[fd00:240::1]:80"), "the routes are gone again");
}

fn virtual_routes() -> usize {
    let v4 = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
    let v6 = std::fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap();
    v4.lines().filter(|line| line.starts_with("lo\t000000FD\t")).count()
        + v6.lines().filter(|line| line.starts_with("fd000240000000000000000000000000 20 ")).count()
}

fn apply_and_remove_repeat(peer: &Peer) {
    assert!(matches!(remove("filter"), Err(Error::Invalid(_))), "a table that is not ours");
    remove("outrigger").unwrap();
    assert_eq!(installed("outrigger").unwrap(), 0);
    apply(&rules()).unwrap();
    let count = installed("outrigger").unwrap();
    let printed = render(&rules()).unwrap();
    let rule_lines =
        printed.lines().filter(|line| line.starts_with("\t\t") && !line.contains("policy accept"));
    assert_eq!(count, rule_lines.count(), "what is printed is what the kernel holds");
    apply(&rules()).unwrap();
    assert_eq!((installed("outrigger").unwrap(), virtual_routes()), (count, 2));
    // Other rules replace, they do not add up.
    apply(&outbound_only(Selector::default())).unwrap();
    assert!(installed("outrigger").unwrap() < count);
    remove("outrigger").unwrap();
    remove("outrigger").unwrap();
    assert_eq!((installed("outrigger").unwrap(), virtual_routes()), (0, 0));
    let server = peer.run(|| listen(format!("{PEER4}:8080")));
    assert_joined(dial(format!("{PEER4}:8080")), &server);
}

fn replacing_leaves_no_gap(_: &Peer) {
    apply(&rules()).unwrap();
    let (v4, _) = proxy(OUTBOUND);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let mut made = 0;
            while !done.load(Ordering::Relaxed) {
                // Nobody listens at the peer: a connection past the rules would be refused.
                let _client = dial(format!("{PEER4}:8080"));
                assert_eq!(original(&v4), Some(at(PEER4, 8080)));
                made += 1;
            }
            made
        });
        let applied: Vec<_> = (0..10).map(|_| apply(&rules())).collect();
        done.store(true, Ordering::Relaxed);
        applied.into_iter().collect::<Result<Vec<()>, _>>().unwrap();
        assert!(caller.join().unwrap() > 0);
    });
}

fn ipv6_may_be_missing(_: &Peer) {
    std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    apply(&rules()).unwrap();
    let [v4] = sockets::bind_loopback(OUTBOUND, 64).unwrap().try_into().expect("one listener");
    let v4 = patient(v4);
    let _client = dial("253.0.0.1:80");
    assert_eq!(original(&v4), Some(at("253.0.0.1", 80)));
    let inbound = patient(sockets::bind_wildcard(INBOUND, 64).unwrap());
    let _client = dial_marked(&format!("{HERE4}:80"), true).unwrap();
    assert_eq!(original(&inbound), Some(at(HERE4, 80)));
    remove("outrigger").unwrap();
    assert_eq!(virtual_routes(), 0);
}

fn two_sidecars_on_a_host(peer: &Peer) {
    let sidecar = |name: &str, offset: u16, port: u16, select| {
        let mut rules = Rules { table: format!("outrigger-{name}"), select: Some(select), ..rules() };
        rules.ports.outbound += offset;
        rules.ports.inbound += offset;
        rules.ports.dns += offset;
        rules.ports.admin += offset;
        rules.inbound = Some(Selector { include_ports: vec![port.into()], ..Selector::default() });
        rules
    };
    apply(&sidecar("web", 0, 8080, Select::Uid { first: 1, last: 1000 })).unwrap();
    apply(&sidecar("orders", 1000, 8081, Select::Uid { first: 0, last: 0 })).unwrap();
    let (orders, _) = proxy(OUTBOUND + 1000);
    let _client = dial(format!("{PEER4}:80"));
    assert_eq!(original(&orders), Some(at(PEER4, 80)));
    for (port, listener) in [(8080, INBOUND), (8081, INBOUND + 1000)] {
        let inbound = patient(sockets::bind_wildcard(listener, 64).unwrap());
        let _client = peer.run(|| dial(format!("{HERE4}:{port}")));
        assert_eq!(original(&inbound), Some(at(HERE4, port)));
        // From either sidecar of the host to the other's workload.
        let _client = dial_marked(&format!("{HERE4}:{port}"), true).unwrap();
        assert_eq!(original(&inbound), Some(at(HERE4, port)));
    }
    remove("outrigger-web").unwrap();
    assert_eq!((installed("outrigger-web").unwrap(), virtual_routes()), (0, 2));
    let _client = dial("253.0.0.1:80");
    assert_eq!(original(&orders), Some(at("253.0.0.1", 80)));
    remove("outrigger-orders").unwrap();
    assert_eq!(virtual_routes(), 0);
}

fn as_many_rules_as_allowed(_: &Peer) {
    let mut selector = Selector::default();
    loop {
        let number = selector.exclude_cidrs.len();
        let net = format!("fd99:{number:x}::/32").parse().unwrap();
        selector.exclude_cidrs.push(net);
        let mut fewer = selector.clone();
        match render(&outbound_only(selector.clone())) {
            Ok(_) => {}
            Err(Error::Invalid(_)) => {
                fewer.exclude_cidrs.pop();
                apply(&outbound_only(fewer.clone())).unwrap();
                assert!(installed("outrigger").unwrap() > fewer.exclude_cidrs.len());
                return;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn inbound_is_redirected(peer: &Peer) {
    apply(&rules()).unwrap();
    let proxy = patient(sockets::bind_wildcard(INBOUND, 64).unwrap());
    for (host, address) in [(HERE4.to_owned(), HERE4), (format!("[{HERE6}]"), HERE6)] {
        let _client = peer.run(|| dial(format!("{host}:8080")));
        assert_eq!(original(&proxy), Some(at(address, 8080)));
        let _client = peer.run(|| dial(format!("{host}:{INBOUND}")));
        assert_eq!(original(&proxy), None, "dialled to the proxy itself");
    }
}

fn inbound_excludes(peer: &Peer) {
    let selector = Selector {
        exclude_ports: vec![22.into()],
        exclude_cidrs: vec!["fd77::2/128".parse().unwrap()],
        include_ports: vec![PortRange { first: 1, last: 9000 }],
        ..Selector::default()
    };
    apply(&Rules { inbound: Some(selector), ..rules() }).unwrap();
    let proxy = patient(sockets::bind_wildcard(INBOUND, 64).unwrap());
    for address in
        [format!("{HERE4}:22"), format!("[{HERE6}]:80"), format!("{HERE4}:9001"), format!("{HERE4}:{ADMIN}")]
    {
        let application = listen(&address);
        assert_joined(peer.run(|| dial(&address)), &application);
    }
    let _client = peer.run(|| dial(format!("{HERE4}:80")));
    assert_eq!(original(&proxy), Some(at(HERE4, 80)));
}

fn inbound_reaches_the_workload_and_loops(_: &Peer) {
    apply(&rules()).unwrap();
    let proxy = patient(sockets::bind_wildcard(INBOUND, 64).unwrap());
    for (host, address) in [(HERE4.to_owned(), HERE4), (format!("[{HERE6}]"), HERE6)] {
        let target = format!("{host}:8080");
        let application = listen(&target);
        // The inbound half forwards to the workload's own address.
        assert_joined(dial_marked(&target, false).unwrap(), &application);
        // The outbound half picked this very host as an endpoint.
        let _client = dial_marked(&target, true).unwrap();
        assert_eq!(original(&proxy), Some(at(address, 8080)));
    }
    // Only a proxy's connections may do so.
    let address: SocketAddr = format!("{HERE4}:8082").parse().unwrap();
    let application = listen(address.to_string());
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    sockets::allow_hairpin(&socket).unwrap();
    socket.connect_timeout(&address.into(), DEADLINE).unwrap();
    assert_joined(socket.into(), &application);
}

fn proxy_ports_are_closed_to_others(peer: &Peer) {
    apply(&rules()).unwrap();
    let open = patient(sockets::bind_wildcard(OUTBOUND, 64).unwrap());
    let dns = udp(&format!("0.0.0.0:{DNS}"));
    let admin = listen(format!("{HERE4}:{ADMIN}"));
    assert_joined(peer.run(|| dial(format!("{HERE4}:{ADMIN}"))), &admin);
    let refused = peer.run(|| {
        TcpStream::connect_timeout(
            &format!("{HERE4}:{OUTBOUND}").parse().unwrap(),
            Duration::from_millis(300),
        )
    });
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::TimedOut);
    peer.run(|| udp("0.0.0.0:0").send_to(b"from outside", format!("{HERE4}:{DNS}")).unwrap());
    // The question asked inside afterwards is the first one seen.
    ask("127.0.0.53:53", &dns);
    let _client = dial(format!("127.0.0.1:{OUTBOUND}"));
    assert_eq!(original(&open), None);
}

fn udp_passes_by_default(peer: &Peer) {
    apply(&rules()).unwrap();
    let server = peer.run(|| udp(&format!("{PEER4}:443")));
    ask(&format!("{PEER4}:443"), &server);
    let server = udp(&format!("{HERE4}:443"));
    peer.run(|| ask(&format!("{HERE4}:443"), &server));
}

fn udp_is_dropped_when_asked(peer: &Peer) {
    apply(&Rules { drop_udp: true, ..rules() }).unwrap();
    let send = |target: &str| {
        udp(if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }).send_to(b"x", target)
    };
    for target in [format!("{PEER4}:443"), format!("[{PEER6}]:443")] {
        assert_eq!(send(&target).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    // Inside the host, DNS, and the proxy's own pass.
    let local = udp(&format!("{HERE4}:443"));
    ask(&format!("{HERE4}:443"), &local);
    let dns = udp(&format!("127.0.0.1:{DNS}"));
    ask(&format!("{PEER4}:53"), &dns);
    let server = peer.run(|| udp(&format!("{PEER4}:123")));
    let client = udp("0.0.0.0:0");
    sockets::set_mark(&client, MARK).unwrap();
    client.connect(format!("{PEER4}:123")).unwrap();
    client.send(b"time?").unwrap();
    let mut bytes = [0; 16];
    let (_, from) = server.recv_from(&mut bytes).unwrap();
    server.send_to(b"noon", from).unwrap();
    assert_eq!(client.recv(&mut bytes).unwrap(), 4);
    // What others send does not arrive: the next datagram from inside is the first one seen.
    peer.run(|| udp("0.0.0.0:0").send_to(b"from outside", format!("{HERE4}:443")).unwrap());
    ask(&format!("{HERE4}:443"), &local);
}

fn port_locks_are_per_namespace(peer: &Peer) {
    let _held = PortLock::acquire(OUTBOUND).unwrap();
    let error = PortLock::acquire(OUTBOUND).unwrap_err();
    assert!(error.to_string().contains("port 15401 belongs to another outrigger-proxy"), "{error}");
    peer.run(|| PortLock::acquire(OUTBOUND).map(drop)).unwrap();
}
