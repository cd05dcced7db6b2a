//! The rules in a real kernel, judged by real sockets. Each test has two hosts of its own; where the kernel
//! refuses namespaces, this fails.
#![allow(clippy::unwrap_used, reason = "test code, which clippy cannot see without the usual harness")]

mod dns_and_udp;
mod inbound;
mod lifecycle;
mod net;
mod outbound;

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use libtest_mimic::{Arguments, Failed, Trial};
use net::{DEADLINE, Peer};
use outrigger_intercept::{Exempt, Rules, Selector, original_destination, sockets};
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
        trial("outbound_is_redirected", outbound::outbound_is_redirected),
        trial("outbound_mapped_addresses", outbound::outbound_mapped_addresses),
        trial("exempt_by_mark", outbound::exempt_by_mark),
        trial("exempt_and_selected_by_uid", outbound::exempt_and_selected_by_uid),
        trial("selected_by_cgroup", outbound::selected_by_cgroup),
        trial("outbound_excludes", outbound::outbound_excludes),
        trial("outbound_includes", outbound::outbound_includes),
        trial("own_addresses_are_left_alone", outbound::own_addresses_are_left_alone),
        trial("ipv6_is_left_alone_when_off", outbound::ipv6_is_left_alone_when_off),
        trial("dns_is_redirected", dns_and_udp::dns_is_redirected),
        trial("dns_excludes", dns_and_udp::dns_excludes),
        trial("virtual_addresses", outbound::virtual_addresses),
        trial("apply_and_remove_repeat", lifecycle::apply_and_remove_repeat),
        trial("replacing_leaves_no_gap", lifecycle::replacing_leaves_no_gap),
        trial("ipv6_may_be_missing", lifecycle::ipv6_may_be_missing),
        trial("two_sidecars_on_a_host", lifecycle::two_sidecars_on_a_host),
        trial("as_many_rules_as_allowed", lifecycle::as_many_rules_as_allowed),
        trial("inbound_is_redirected", inbound::inbound_is_redirected),
        trial("inbound_excludes", inbound::inbound_excludes),
        trial(
            "a_port_on_which_nothing_listens_is_closed",
            inbound::a_port_on_which_nothing_listens_is_closed,
        ),
        trial("inbound_reaches_the_workload_and_loops", inbound::inbound_reaches_the_workload_and_loops),
        trial("proxy_ports_are_closed_to_others", inbound::proxy_ports_are_closed_to_others),
        trial("udp_passes_by_default", dns_and_udp::udp_passes_by_default),
        trial("udp_is_dropped_when_asked", dns_and_udp::udp_is_dropped_when_asked),
        trial("port_locks_are_per_namespace", lifecycle::port_locks_are_per_namespace),
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
