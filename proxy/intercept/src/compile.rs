//! From what to redirect to the list of rules. The order is the meaning: the first rule that decides wins, so
//! each chain names what is left alone before what is taken.
//!
//! Ranges are one rule each, not nftables sets: there are few, a list prints as it is meant, and only the first
//! packet of a connection walks it.

use std::path::Component;

use ipnet::IpNet;

use crate::Error;
use crate::program::{Action, Chain, Hook, Match, Protocol, Rule, Table};
use crate::rules::{Exempt, PortRange, Rules, Select, Selector};
use crate::sockets::HAIRPIN_PRIORITY;

/// A batch of this many rules (up to 700 bytes each) fits the socket buffer that an unprivileged user may have.
const MAX_RULES: usize = 384;
/// The kernel allows longer names (`NFT_NAME_MAXLEN`); this one is read by people.
const MAX_TABLE_NAME: usize = 48;
const DNS_PORT: u16 = 53;

const INBOUND: &str = "inbound";
const TAKE: &str = "take";
const DNS: &str = "dns";

pub(crate) fn compile(rules: &Rules) -> Result<Table, Error> {
    validate(rules)?;
    let mut chains = Vec::new();
    if let Some(selector) = &rules.inbound {
        chains.push(prerouting(rules));
        chains.push(inbound(rules, selector));
        if rules.refuse_closed {
            chains.push(take(rules));
        }
    }
    if let Some(selector) = &rules.dns {
        chains.push(dns(rules, selector));
    }
    if rules.outbound.is_some() || rules.dns.is_some() || rules.inbound.is_some() {
        chains.extend(output(rules));
    }
    chains.push(guard(rules));
    if rules.drop_udp {
        chains.extend(drop_udp(rules));
    }
    let count = chains.iter().map(|chain| chain.rules.len()).sum::<usize>();
    if count > MAX_RULES {
        return Err(Error::Invalid(format!(
            "they come to {count} kernel rules, at most {MAX_RULES} are allowed; merge ports and CIDRs into larger ranges"
        )));
    }
    Ok(Table { name: rules.table.clone(), chains })
}

/// The virtual ranges that need a route of ours.
pub(crate) fn routed(rules: &Rules) -> Vec<IpNet> {
    if rules.outbound.is_none() {
        return Vec::new();
    }
    rules.virtual_ranges.iter().filter(|net| rules.ipv6 || net.addr().is_ipv4()).map(IpNet::trunc).collect()
}

/// Only names of ours: whatever stands in a table of that name is deleted.
pub(crate) fn check_table_name(table: &str) -> Result<(), Error> {
    let named = table.strip_prefix("outrigger").is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
    let plain = table.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if named && plain && table.len() <= MAX_TABLE_NAME {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the table name `{table}` must be `outrigger`, or `outrigger-` and lower case letters, digits and hyphens, at most {MAX_TABLE_NAME} in all"
    )))
}

fn validate(rules: &Rules) -> Result<(), Error> {
    let invalid = |text: String| Err(Error::Invalid(text));
    check_table_name(&rules.table)?;
    if rules.exempt.is_empty() {
        return invalid(
            "nobody is exempt, so the proxy's own traffic would come back to it; name its uid or mark".into(),
        );
    }
    if rules.exempt.contains(&Exempt::Mark(0)) {
        return invalid("mark 0 is what every unmarked socket has, so everybody would be exempt".into());
    }
    let ports = rules.ports.all();
    for (index, port) in ports.iter().enumerate() {
        if *port == 0 || ports[..index].contains(port) {
            return invalid(format!(
                "the proxy's ports {ports:?} must be four different ones, none of them 0"
            ));
        }
    }
    for selector in [&rules.inbound, &rules.outbound, &rules.dns].into_iter().flatten() {
        let Selector { include_ports, exclude_ports, include_cidrs, exclude_cidrs } = selector;
        let longest =
            include_ports.len().max(exclude_ports.len()).max(include_cidrs.len()).max(exclude_cidrs.len());
        if longest > MAX_RULES {
            return invalid(format!(
                "a list of ports or CIDRs has {longest} entries, at most {MAX_RULES} are allowed"
            ));
        }
        for range in include_ports.iter().chain(exclude_ports) {
            if range.first > range.last || range.first == 0 {
                return invalid(format!(
                    "the port range {range} must begin at 1 or above and not end before it begins"
                ));
            }
        }
    }
    match &rules.select {
        Some(Select::Uid { first, last }) if first > last => {
            invalid(format!("the uid range {first}-{last} ends before it begins"))
        }
        Some(Select::Cgroup(path))
            if path.as_os_str().is_empty()
                || path.to_str().is_none_or(|text| text.contains(['"', '\n']))
                || path.components().any(|part| !matches!(part, Component::Normal(_))) =>
        {
            invalid(format!(
                "the cgroup `{}` must be a path under the cgroup mount, without a leading slash, `..` or quotes",
                path.display()
            ))
        }
        _ => Ok(()),
    }
}

/// What arrives from other hosts for an address of this one. Packets that come by `lo` were judged in `output`.
fn prerouting(rules: &Rules) -> Chain {
    let mut list = Vec::new();
    push_ipv6(rules, &mut list);
    list.push(rule([Match::FromLoopback(true)], Action::Return));
    list.push(rule([Match::DestinationLocal(false)], Action::Return));
    list.push(rule([Match::Protocol(Protocol::Tcp)], Action::Jump(INBOUND)));
    Chain { name: "prerouting", hook: Some(Hook::NatPrerouting), rules: list }
}

/// Which of the workload's ports the inbound listener serves.
fn inbound(rules: &Rules, selector: &Selector) -> Chain {
    let tcp = Protocol::Tcp;
    let mut list = Vec::new();
    // Were 15401 redirected too, a caller could ask the inbound listener to forward to the outbound one.
    for port in rules.ports.all() {
        list.push(rule([Match::DestinationPort(tcp, port.into())], Action::Return));
    }
    push_excluded(&mut list, tcp, selector, Match::Source);
    let action = if rules.refuse_closed { Action::Jump(TAKE) } else { Action::Redirect(rules.ports.inbound) };
    push_included(&mut list, tcp, selector, Match::Source, None, action);
    Chain { name: INBOUND, hook: None, rules: list }
}

/// A listener that comes or goes meanwhile changes nothing: what arrives is the proxy's, or it is refused.
fn take(rules: &Rules) -> Chain {
    let tcp = Match::Protocol(Protocol::Tcp);
    let list = vec![
        rule([tcp.clone(), Match::Listening], Action::Redirect(rules.ports.inbound)),
        rule([tcp], Action::Refuse),
    ];
    Chain { name: TAKE, hook: None, rules: list }
}

/// What processes of this host send.
fn output(rules: &Rules) -> Vec<Chain> {
    let mut first = Vec::new();
    push_ipv6(rules, &mut first);
    if rules.inbound.is_some() {
        // A sidecar that picks an endpoint on its own host: the packets never pass prerouting as new ones. Closed ports are taken
        // here, too (`Match::Listening`), and the proxy finds out.
        for exempt in &rules.exempt {
            let hairpin = [Match::Priority(HAIRPIN_PRIORITY), Match::DestinationLocal(true)];
            let matches =
                [exempt_match(*exempt)].into_iter().chain(hairpin).chain([Match::Protocol(Protocol::Tcp)]);
            first.push(rule(matches, Action::Jump(INBOUND)));
        }
    }
    push_exempt(rules, &mut first);

    let mut then = Vec::new();
    if rules.dns.is_some() {
        // Before the host's own addresses: a stub resolver listens on one of them, as on 127.0.0.53.
        then.push(rule([], Action::Jump(DNS)));
    }
    if let Some(selector) = &rules.outbound {
        let tcp = Protocol::Tcp;
        then.push(rule([Match::DestinationLocal(true)], Action::Return));
        then.push(rule([Match::DestinationPort(tcp, rules.ports.admin.into())], Action::Return));
        push_excluded(&mut then, tcp, selector, Match::Destination);
        push_included(
            &mut then,
            tcp,
            selector,
            Match::Destination,
            None,
            Action::Redirect(rules.ports.outbound),
        );
    }
    for_selected(rules, "output", Hook::NatOutput, first, "workload", then)
}

/// Which questions the DNS listener answers. What is excluded here is still judged as TCP.
fn dns(rules: &Rules, selector: &Selector) -> Chain {
    let mut list = Vec::new();
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        push_excluded(&mut list, protocol, selector, Match::Destination);
        let action = Action::Redirect(rules.ports.dns);
        push_included(&mut list, protocol, selector, Match::Destination, Some(DNS_PORT.into()), action);
    }
    Chain { name: DNS, hook: None, rules: list }
}

/// Other hosts have no business with the outbound and DNS listeners, whatever address they are bound to.
fn guard(rules: &Rules) -> Chain {
    let mut list =
        vec![rule([Match::FromLoopback(true)], Action::Return), rule([Match::Established], Action::Return)];
    let ports = &rules.ports;
    for (protocol, port) in
        [(Protocol::Tcp, ports.outbound), (Protocol::Tcp, ports.dns), (Protocol::Udp, ports.dns)]
    {
        list.push(rule([Match::DestinationPort(protocol, port.into())], Action::Drop));
    }
    // Where several workloads share the host, arriving UDP cannot be told apart; the selected one is mute anyway.
    if rules.drop_udp && rules.select.is_none() {
        list.push(rule([Match::Protocol(Protocol::Udp)], Action::Drop));
    }
    Chain { name: "guard", hook: Some(Hook::FilterInput), rules: list }
}

fn drop_udp(rules: &Rules) -> Vec<Chain> {
    let mut first = Vec::new();
    push_exempt(rules, &mut first);
    let then = vec![
        rule([Match::DestinationLocal(true)], Action::Return),
        rule([Match::DestinationPort(Protocol::Udp, DNS_PORT.into())], Action::Return),
        rule([Match::Protocol(Protocol::Udp)], Action::Drop),
    ];
    for_selected(rules, "refuse", Hook::FilterOutput, first, "workload-refuse", then)
}

/// One chain, or two where only some processes are meant. The selection jumps to what it selects instead of
/// returning for all others: a match on a socket's cgroup fails, whichever way it is asked, for processes that
/// live less deep in the tree and for packets without a socket.
fn for_selected(
    rules: &Rules,
    name: &'static str,
    hook: Hook,
    mut first: Vec<Rule>,
    selected: &'static str,
    then: Vec<Rule>,
) -> Vec<Chain> {
    let workload = match &rules.select {
        None => {
            first.extend(then);
            return vec![Chain { name, hook: Some(hook), rules: first }];
        }
        Some(Select::Uid { first, last }) => Match::SocketUidWithin { first: *first, last: *last },
        Some(Select::Cgroup(path)) => Match::WithinCgroup(path.clone()),
    };
    first.push(rule([workload], Action::Jump(selected)));
    vec![Chain { name, hook: Some(hook), rules: first }, Chain { name: selected, hook: None, rules: then }]
}

fn push_ipv6(rules: &Rules, list: &mut Vec<Rule>) {
    if !rules.ipv6 {
        list.push(rule([Match::Ipv6], Action::Return));
    }
}

fn push_exempt(rules: &Rules, list: &mut Vec<Rule>) {
    for exempt in &rules.exempt {
        list.push(rule([exempt_match(*exempt)], Action::Return));
    }
}

fn exempt_match(exempt: Exempt) -> Match {
    match exempt {
        Exempt::Uid(uid) => Match::SocketUid(uid),
        Exempt::Mark(mark) => Match::Mark(mark),
    }
}

fn push_excluded(list: &mut Vec<Rule>, protocol: Protocol, selector: &Selector, address: fn(IpNet) -> Match) {
    for ports in &selector.exclude_ports {
        list.push(rule([Match::DestinationPort(protocol, *ports)], Action::Return));
    }
    for net in &selector.exclude_cidrs {
        list.push(rule([Match::Protocol(protocol), address(net.trunc())], Action::Return));
    }
}

/// One rule for each pair of an included range of ports and of addresses.
fn push_included(
    list: &mut Vec<Rule>,
    protocol: Protocol,
    selector: &Selector,
    address: fn(IpNet) -> Match,
    default_port: Option<PortRange>,
    action: Action,
) {
    let mut ports: Vec<Match> =
        selector.include_ports.iter().map(|range| Match::DestinationPort(protocol, *range)).collect();
    if ports.is_empty() {
        ports.push(
            default_port.map_or(Match::Protocol(protocol), |port| Match::DestinationPort(protocol, port)),
        );
    }
    let mut nets: Vec<Option<Match>> =
        selector.include_cidrs.iter().map(|net| Some(address(net.trunc()))).collect();
    if nets.is_empty() {
        nets.push(None);
    }
    for net in &nets {
        for port in &ports {
            list.push(rule([Some(port.clone()), net.clone()].into_iter().flatten(), action));
        }
    }
}

fn rule(matches: impl IntoIterator<Item = Match>, action: Action) -> Rule {
    Rule { matches: matches.into_iter().collect(), action }
}
