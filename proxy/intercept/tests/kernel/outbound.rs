//! What the workload sends: whose, and where to.

use std::net::TcpStream;
use std::path::Path;
use std::path::PathBuf;

use outrigger_intercept::{
    Error, Exempt, PortRange, Rules, Select, Selector, apply, installed, remove, sockets,
};

use crate::net::{DEADLINE, HERE4, HERE6, PEER4, PEER6, Peer, dial};
use crate::{
    ADMIN, OUTBOUND, assert_joined, at, dial_marked, listen, original, outbound_only, patient, proxy, rules,
};

pub(crate) fn outbound_is_redirected(_: &Peer) {
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

pub(crate) fn outbound_mapped_addresses(_: &Peer) {
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

pub(crate) fn exempt_by_mark(peer: &Peer) {
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

pub(crate) fn exempt_and_selected_by_uid(peer: &Peer) {
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

pub(crate) fn selected_by_cgroup(peer: &Peer) {
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

pub(crate) fn outbound_excludes(peer: &Peer) {
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

pub(crate) fn outbound_includes(peer: &Peer) {
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

pub(crate) fn own_addresses_are_left_alone(_: &Peer) {
    apply(&rules()).unwrap();
    for host in ["127.0.0.1", "127.8.8.8", HERE4, "[::1]", &format!("[{HERE6}]")] {
        let application = listen(format!("{host}:8080"));
        assert_joined(dial(format!("{host}:8080")), &application);
    }
}

pub(crate) fn ipv6_is_left_alone_when_off(peer: &Peer) {
    apply(&Rules { ipv6: false, ..rules() }).unwrap();
    let (v4, _) = proxy(OUTBOUND);
    let server = peer.run(|| listen(format!("[{PEER6}]:8080")));
    assert_joined(dial(format!("[{PEER6}]:8080")), &server);
    let _client = dial(format!("{PEER4}:8080"));
    assert_eq!(original(&v4), Some(at(PEER4, 8080)));
    let inbound = listen(format!("[{HERE6}]:8080"));
    assert_joined(peer.run(|| dial(format!("[{HERE6}]:8080"))), &inbound);
}

pub(crate) fn virtual_addresses(_: &Peer) {
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
