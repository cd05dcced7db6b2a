//! What people read in `--dry-run`. The snapshots are the review of a change to the rules.

use outrigger_intercept::{Error, Exempt, PortRange, Rules, Select, Selector, render};

fn rules() -> Rules {
    Rules { exempt: vec![Exempt::Uid(2102)], ..Rules::default() }
}

#[test]
fn everything() {
    insta::assert_snapshot!(render(&rules()).unwrap());
}

#[test]
fn narrowed_in_each_direction() {
    let rules = Rules {
        exempt: vec![Exempt::Mark(0x72), Exempt::Uid(101)],
        inbound: Some(Selector {
            include_ports: vec![8080.into(), PortRange { first: 9000, last: 9010 }],
            exclude_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
            ..Selector::default()
        }),
        outbound: Some(Selector {
            include_ports: vec![80.into(), 443.into()],
            include_cidrs: vec!["10.96.0.9/12".parse().unwrap(), "fd00::/16".parse().unwrap()],
            exclude_ports: vec![22.into()],
            exclude_cidrs: vec!["169.254.169.254/32".parse().unwrap()],
        }),
        dns: Some(Selector {
            include_ports: vec![53.into(), 8600.into()],
            exclude_cidrs: vec!["10.96.0.53/32".parse().unwrap()],
            ..Selector::default()
        }),
        ..rules()
    };
    insta::assert_snapshot!(render(&rules).unwrap());
}

#[test]
fn one_of_several_workloads_without_ipv6_and_udp() {
    let rules = Rules {
        table: "outrigger-orders".into(),
        select: Some(Select::Uid { first: 1000, last: 1009 }),
        ipv6: false,
        drop_udp: true,
        ..rules()
    };
    insta::assert_snapshot!(render(&rules).unwrap());
}

#[test]
fn a_cgroup_outbound_only() {
    let rules = Rules {
        select: Some(Select::Cgroup("system.slice/orders.service".into())),
        inbound: None,
        dns: None,
        ..rules()
    };
    insta::assert_snapshot!(render(&rules).unwrap());
}

#[test]
fn udp_dropped() {
    insta::assert_snapshot!(render(&Rules { drop_udp: true, ..rules() }).unwrap());
}

#[test]
fn contradictions_are_refused() {
    let ports = |first, last| {
        Some(Selector { include_ports: vec![PortRange { first, last }], ..Selector::default() })
    };
    let mut same_ports = rules();
    same_ports.ports.dns = same_ports.ports.outbound;
    let many = Selector { exclude_ports: (1..=400).map(PortRange::from).collect(), ..Selector::default() };
    let product = Selector {
        include_ports: (1..=40).map(PortRange::from).collect(),
        include_cidrs: (1..=40).map(|n| format!("10.{n}.0.0/16").parse().unwrap()).collect(),
        ..Selector::default()
    };
    let cases = [
        Rules { table: "filter".into(), ..rules() },
        Rules { table: "outriggers".into(), ..rules() },
        Rules { table: "outrigger-{".into(), ..rules() },
        Rules { exempt: vec![], ..rules() },
        Rules { exempt: vec![Exempt::Uid(1), Exempt::Mark(0)], ..rules() },
        Rules { outbound: ports(90, 80), ..rules() },
        Rules { dns: ports(0, 80), ..rules() },
        Rules { outbound: Some(many), ..rules() },
        Rules { outbound: Some(product), ..rules() },
        Rules { select: Some(Select::Uid { first: 2, last: 1 }), ..rules() },
        Rules { select: Some(Select::Cgroup("/sys/fs/cgroup/x".into())), ..rules() },
        Rules { select: Some(Select::Cgroup("../x".into())), ..rules() },
        Rules { select: Some(Select::Cgroup("".into())), ..rules() },
        Rules { select: Some(Select::Cgroup("a\"b".into())), ..rules() },
        same_ports,
    ];
    let faults: Vec<String> = cases
        .iter()
        .map(|rules| match render(rules) {
            Err(error @ Error::Invalid(_)) => error.to_string(),
            other => panic!("{rules:?} gave {other:?}"),
        })
        .collect();
    insta::assert_snapshot!(faults.join("\n"));
}

#[test]
fn port_ranges_read_as_they_print() {
    for text in ["1", "8080", "9000-9010", "1-65535"] {
        assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
    }
    for text in ["", "0", "http", "65536", "9-8", "0-9", "1-", "-1", "1-2-3", " 80"] {
        assert!(text.parse::<PortRange>().is_err(), "{text}");
    }
}
