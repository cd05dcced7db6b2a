//! From the list of rules to nftables' netlink messages. Names of attributes are those of
//! `include/uapi/linux/netfilter/nf_tables.h`; values compared with a register are in network order, except
//! those that the kernel keeps as host integers (uid, mark, priority, address type, conntrack state, cgroup id).

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions,
    Hook as HookAttribute, Immediate, InetHookNumber, ListAttribute, Meta, MetaKey, NfTablesMessage,
    Operator, Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage, Verdict,
    VerdictAttribute,
};

use crate::program::{Action, Chain, Hook, Match, Protocol, Rule, Table, cgroup_level};

type Expression = ListAttribute<ExpressionAttribute>;

const REGISTER: Register = Register::Reg1;
/// `NFT_PAYLOAD_NETWORK_HEADER` and `NFT_PAYLOAD_TRANSPORT_HEADER`.
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
/// `NF_IP_PRI_NAT_DST` and `NF_IP_PRI_FILTER`.
const PRIORITY_DSTNAT: i32 = -100;
const PRIORITY_FILTER: i32 = 0;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// `RTN_LOCAL` of rtnetlink.
const ROUTE_TYPE_LOCAL: u32 = 2;
/// Bits of `enum nf_ct_state`: established and related.
const CT_ESTABLISHED_RELATED: u32 = 0b110;

/// The id of a cgroup, for the paths that a table names.
pub(crate) type CgroupId = dyn Fn(&std::path::Path) -> Result<u64, crate::Error>;

/// What brings the kernel from any state of our table to exactly this one, in order.
pub(crate) fn replace(table: &Table, cgroup: &CgroupId) -> Result<Vec<NfTablesMessage>, crate::Error> {
    let mut messages = remove(&table.name);
    messages.push(NfTablesMessage::NewTable(table_message(&table.name)));
    // All chains before the first rule: a jump names a chain that exists.
    messages.extend(table.chains.iter().map(|chain| new_chain(&table.name, chain)));
    for chain in &table.chains {
        for rule in &chain.rules {
            messages.push(new_rule(&table.name, chain.name, rule, cgroup)?);
        }
    }
    Ok(messages)
}

/// Creating first makes the deletion succeed whether the table existed or not.
pub(crate) fn remove(table: &str) -> Vec<NfTablesMessage> {
    vec![NfTablesMessage::NewTable(table_message(table)), NfTablesMessage::DeleteTable(table_message(table))]
}

fn table_message(name: &str) -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] }
}

fn new_chain(table: &str, chain: &Chain) -> NfTablesMessage {
    let mut attributes =
        vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain.name.to_owned())];
    if let Some(hook) = chain.hook {
        let (kind, number, priority) = match hook {
            Hook::NatPrerouting => ("nat", InetHookNumber::PreRouting, PRIORITY_DSTNAT),
            Hook::NatOutput => ("nat", InetHookNumber::LocalOut, PRIORITY_DSTNAT),
            Hook::FilterInput => ("filter", InetHookNumber::LocalIn, PRIORITY_FILTER),
            Hook::FilterOutput => ("filter", InetHookNumber::LocalOut, PRIORITY_FILTER),
        };
        attributes.push(ChainAttribute::Type(kind.to_owned()));
        attributes.push(ChainAttribute::Hook(vec![
            HookAttribute::Number(number.into()),
            HookAttribute::Priority(priority.cast_unsigned()),
        ]));
        attributes.push(ChainAttribute::Policy(NF_ACCEPT));
    }
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

fn new_rule(
    table: &str,
    chain: &str,
    rule: &Rule,
    cgroup: &CgroupId,
) -> Result<NfTablesMessage, crate::Error> {
    let mut expressions = Vec::new();
    for one in &rule.matches {
        encode_match(one, cgroup, &mut expressions)?;
    }
    match rule.action {
        Action::Return => expressions.push(verdict(vec![VerdictAttribute::Code(Verdict::Return)])),
        Action::Drop => expressions.push(verdict(vec![VerdictAttribute::Code(Verdict::Other(NF_DROP))])),
        Action::Jump(target) => expressions.push(verdict(vec![
            VerdictAttribute::Code(Verdict::Jump),
            VerdictAttribute::Chain(target.to_owned()),
        ])),
        Action::Redirect(port) => expressions.extend(redirect(port)),
        Action::Refuse => expressions.extend(redirect(0)),
    }
    Ok(NfTablesMessage::NewRule(RuleMessage {
        attributes: vec![
            RuleAttribute::Table(table.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
            RuleAttribute::Expressions(expressions),
        ],
    }))
}

fn encode_match(one: &Match, cgroup: &CgroupId, out: &mut Vec<Expression>) -> Result<(), crate::Error> {
    let equal_if = |holds: &bool| if *holds { Operator::Equal } else { Operator::NotEqual };
    match one {
        Match::Ipv6 => out.extend([meta(MetaKey::Nfproto), cmp(Operator::Equal, &[NFPROTO_IPV6])]),
        Match::Protocol(protocol) => encode_protocol(*protocol, out),
        Match::DestinationPort(protocol, ports) => {
            encode_protocol(*protocol, out);
            out.push(payload(TRANSPORT_HEADER, 2, 2));
            if ports.first == ports.last {
                out.push(cmp(Operator::Equal, &ports.first.to_be_bytes()));
            } else {
                out.push(cmp(Operator::GreatherThanEqual, &ports.first.to_be_bytes()));
                out.push(cmp(Operator::LessThanEqual, &ports.last.to_be_bytes()));
            }
        }
        Match::Destination(net) => address(net, 16, 24, out),
        Match::Source(net) => address(net, 12, 8, out),
        Match::DestinationLocal(holds) => {
            // NFTA_FIB_DREG, NFTA_FIB_RESULT = ADDRTYPE, NFTA_FIB_FLAGS = DADDR
            out.push(other("fib", &[(1, REGISTER.into()), (2, 3), (3, 2)]));
            out.push(cmp(equal_if(holds), &ROUTE_TYPE_LOCAL.to_ne_bytes()));
        }
        Match::FromLoopback(holds) => {
            // Names fill IFNAMSIZ bytes in the register.
            let mut name = [0; 16];
            name[..2].copy_from_slice(b"lo");
            out.extend([meta(MetaKey::Iifname), cmp(equal_if(holds), &name)]);
        }
        Match::SocketUid(uid) => {
            out.extend([meta(MetaKey::SocketUserId), cmp(Operator::Equal, &uid.to_ne_bytes())]);
        }
        Match::SocketUidWithin { first, last } => {
            out.push(meta(MetaKey::SocketUserId));
            // Order is that of bytes, so the uid goes to network order first: NFTA_BYTEORDER_SREG, DREG, OP = HTON,
            // LEN, SIZE.
            out.push(other(
                "byteorder",
                &[(1, REGISTER.into()), (2, REGISTER.into()), (3, 1), (4, 4), (5, 4)],
            ));
            out.push(cmp(Operator::GreatherThanEqual, &first.to_be_bytes()));
            out.push(cmp(Operator::LessThanEqual, &last.to_be_bytes()));
        }
        Match::Mark(mark) => {
            out.extend([meta(MetaKey::Mark), cmp(Operator::Equal, &mark.to_ne_bytes())]);
        }
        Match::Priority(value) => {
            out.extend([meta(MetaKey::Priority), cmp(Operator::Equal, &value.to_ne_bytes())]);
        }
        Match::WithinCgroup(path) => {
            // NFTA_SOCKET_KEY = CGROUPV2, NFTA_SOCKET_DREG, NFTA_SOCKET_LEVEL
            out.push(other("socket", &[(1, 3), (2, REGISTER.into()), (3, cgroup_level(path))]));
            out.push(cmp(Operator::Equal, &cgroup(path)?.to_ne_bytes()));
        }
        Match::Established => {
            // NFTA_CT_DREG, NFTA_CT_KEY = STATE
            out.push(other("ct", &[(1, REGISTER.into()), (2, 0)]));
            out.push(mask(4, &CT_ESTABLISHED_RELATED.to_ne_bytes()));
            out.push(cmp(Operator::NotEqual, &0_u32.to_ne_bytes()));
        }
        Match::Listening => {
            // NFTA_SOCKET_KEY = TRANSPARENT, NFTA_SOCKET_DREG. The expression fails where there is no socket; of one that is
            // there any value will do.
            out.push(other("socket", &[(1, 0), (2, REGISTER.into())]));
            out.push(cmp(Operator::LessThanEqual, &[1]));
        }
    }
    Ok(())
}

fn redirect(port: u16) -> [Expression; 2] {
    let port = Expressions::Immediate(vec![
        Immediate::DestinationRegister(REGISTER),
        Immediate::Data(DataAttribute::Value(port.to_be_bytes().to_vec())),
    ]);
    // NFTA_REDIR_REG_PROTO_MIN
    [port.into(), other("redir", &[(1, REGISTER.into())])]
}

fn encode_protocol(protocol: Protocol, out: &mut Vec<Expression>) {
    let number = match protocol {
        Protocol::Tcp => IPPROTO_TCP,
        Protocol::Udp => IPPROTO_UDP,
    };
    out.extend([meta(MetaKey::L4Proto), cmp(Operator::Equal, &[number])]);
}

fn address(net: &IpNet, offset4: u32, offset6: u32, out: &mut Vec<Expression>) {
    let (family, offset) =
        if net.addr().is_ipv4() { (NFPROTO_IPV4, offset4) } else { (NFPROTO_IPV6, offset6) };
    let (address, netmask) = (octets(net.network()), octets(net.netmask()));
    let length = if net.addr().is_ipv4() { 4 } else { 16 };
    out.extend([
        meta(MetaKey::Nfproto),
        cmp(Operator::Equal, &[family]),
        payload(NETWORK_HEADER, offset, length),
        mask(length, &netmask),
        cmp(Operator::Equal, &address),
    ]);
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn meta(key: MetaKey) -> Expression {
    Expressions::Meta(vec![Meta::DestinationRegister(REGISTER), Meta::Key(key)]).into()
}

fn payload(base: u32, offset: u32, length: u32) -> Expression {
    Expressions::Payload(vec![
        Payload::DestinationRegister(REGISTER),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
    .into()
}

fn cmp(operator: Operator, value: &[u8]) -> Expression {
    let value = DataAttribute::Value(value.to_vec());
    Expressions::Cmp(vec![Cmp::SourceRegister(REGISTER), Cmp::Op(operator), Cmp::Data(value)]).into()
}

fn mask(length: u32, bits: &[u8]) -> Expression {
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(REGISTER),
        Bitwise::DestinationRegister(REGISTER),
        Bitwise::Length(length),
        Bitwise::Mask(DataAttribute::Value(bits.to_vec())),
        Bitwise::Xor(DataAttribute::Value(vec![0; bits.len()])),
    ])
    .into()
}

fn verdict(attributes: Vec<VerdictAttribute>) -> Expression {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(attributes)),
    ])
    .into()
}

/// An expression that the crate has no type for, whose attributes are all numbers.
fn other(name: &str, attributes: &[(u16, u32)]) -> Expression {
    let number = |(kind, value): &(u16, u32)| DefaultNla::new(*kind, value.to_be_bytes().to_vec());
    let attributes = attributes.iter().map(number).collect();
    Expressions::Other { expression_type: name.to_owned(), attributes }.into()
}
