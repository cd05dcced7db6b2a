//! Questions to name servers, and all other UDP.

use std::io;

use outrigger_intercept::{Rules, Selector, apply, sockets};

use crate::net::{HERE4, HERE6, PEER4, PEER6, Peer, dial};
use crate::{DNS, MARK, OUTBOUND, ask, at, original, proxy, rules, udp};

pub(crate) fn dns_is_redirected(_: &Peer) {
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

pub(crate) fn dns_excludes(peer: &Peer) {
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
    // Excluded from DNS only.
    let (v4, _) = crate::proxy(OUTBOUND);
    for port in [53, 80] {
        let _client = dial(format!("{PEER4}:{port}"));
        assert_eq!(original(&v4), Some(at(PEER4, port)));
    }
}

pub(crate) fn udp_passes_by_default(peer: &Peer) {
    apply(&rules()).unwrap();
    let server = peer.run(|| udp(&format!("{PEER4}:443")));
    ask(&format!("{PEER4}:443"), &server);
    let server = udp(&format!("{HERE4}:443"));
    peer.run(|| ask(&format!("{HERE4}:443"), &server));
}

pub(crate) fn udp_is_dropped_when_asked(peer: &Peer) {
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
