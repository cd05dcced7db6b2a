//! Writing, replacing and removing the rules; more than one sidecar; what limits and absences do.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use outrigger_intercept::{
    Error, PortLock, Rules, Select, Selector, apply, installed, remove, render, sockets,
};

use crate::net::{HERE4, PEER4, Peer, dial};
use crate::{
    INBOUND, OUTBOUND, assert_joined, at, dial_marked, listen, original, outbound_only, patient, proxy, rules,
};

fn virtual_routes() -> usize {
    let v4 = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
    let v6 = std::fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap();
    v4.lines().filter(|line| line.starts_with("lo\t000000FD\t")).count()
        + v6.lines().filter(|line| line.starts_with("fd000240000000000000000000000000 20 ")).count()
}

pub(crate) fn apply_and_remove_repeat(peer: &Peer) {
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

pub(crate) fn replacing_leaves_no_gap(_: &Peer) {
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
        let applied: Vec<_> = (0..10).map(|_| apply(&rules()).map(drop)).collect();
        done.store(true, Ordering::Relaxed);
        applied.into_iter().collect::<Result<Vec<()>, _>>().unwrap();
        assert!(caller.join().unwrap() > 0);
    });
}

pub(crate) fn ipv6_may_be_missing(_: &Peer) {
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

pub(crate) fn two_sidecars_on_a_host(peer: &Peer) {
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
        let _application = listen(format!("{HERE4}:{port}"));
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

pub(crate) fn as_many_rules_as_allowed(_: &Peer) {
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

pub(crate) fn port_locks_are_per_namespace(peer: &Peer) {
    let _held = PortLock::acquire(OUTBOUND).unwrap();
    let error = PortLock::acquire(OUTBOUND).unwrap_err();
    assert!(error.to_string().contains("port 15401 belongs to another outrigger-proxy"), "{error}");
    peer.run(|| PortLock::acquire(OUTBOUND).map(drop)).unwrap();
}
