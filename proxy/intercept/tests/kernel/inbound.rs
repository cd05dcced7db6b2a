//! What arrives for the workload, and what must not arrive.

use std::io;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::time::Duration;

use outrigger_intercept::{Applied, PortRange, Rules, Selector, apply, sockets};
use socket2::{Domain, Socket, Type};

use crate::net::{DEADLINE, HERE4, HERE6, Peer, dial};
use crate::{
    ADMIN, DNS, INBOUND, OUTBOUND, ask, assert_joined, at, dial_marked, listen, original, patient, rules, udp,
};

pub(crate) fn inbound_is_redirected(peer: &Peer) {
    apply(&rules()).unwrap();
    let proxy = patient(sockets::bind_wildcard(INBOUND, 64).unwrap());
    for (host, address) in [(HERE4.to_owned(), HERE4), (format!("[{HERE6}]"), HERE6)] {
        let _application = listen(format!("{host}:8080"));
        let _client = peer.run(|| dial(format!("{host}:8080")));
        assert_eq!(original(&proxy), Some(at(address, 8080)));
        let _client = peer.run(|| dial(format!("{host}:{INBOUND}")));
        assert_eq!(original(&proxy), None, "dialled to the proxy itself");
    }
}

pub(crate) fn a_port_on_which_nothing_listens_is_closed(peer: &Peer) {
    assert_eq!(apply(&rules()).unwrap(), Applied::Whole);
    let proxy = patient(sockets::bind_wildcard(INBOUND, 64).unwrap());
    // For everybody, or for callers inside only: neither of the first two is reached by its address.
    let _inside = listen("127.0.0.1:8080");
    let _inside6 = listen("[::1]:8080");
    let _everywhere = listen("[::]:8081");
    for (host, address) in [(HERE4.to_owned(), HERE4), (format!("[{HERE6}]"), HERE6)] {
        for port in [8080, 8082] {
            let target = format!("{host}:{port}").parse().unwrap();
            let refused = peer.run(|| TcpStream::connect_timeout(&target, DEADLINE)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{target}");
        }
        let _client = peer.run(|| dial(format!("{host}:8081")));
        assert_eq!(original(&proxy), Some(at(address, 8081)));
    }
    apply(&Rules { refuse_closed: false, ..rules() }).unwrap();
    let _client = peer.run(|| dial(format!("{HERE4}:8082")));
    assert_eq!(original(&proxy), Some(at(HERE4, 8082)));
}

pub(crate) fn inbound_excludes(peer: &Peer) {
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
    let _application = listen(format!("{HERE4}:80"));
    let _client = peer.run(|| dial(format!("{HERE4}:80")));
    assert_eq!(original(&proxy), Some(at(HERE4, 80)));
}

pub(crate) fn inbound_reaches_the_workload_and_loops(_: &Peer) {
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

pub(crate) fn proxy_ports_are_closed_to_others(peer: &Peer) {
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
