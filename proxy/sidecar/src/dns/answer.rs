//! Whose name a question is about, and our own answers. No I/O.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, SOA},
    },
};
use outrigger_core::{external::ExternalHosts, resolve::Knowledge};

/// A virtual address is stable for a day; short, so that a service that goes is noticed.
const TTL_SECONDS: u32 = 10;
/// "Not found" is believed this long, as in the directory.
const NEGATIVE_TTL_SECONDS: u32 = 5;
/// Addresses in one answer: as many fit into 512 bytes with any name.
const MAX_ADDRESSES: usize = 8;
/// What we can take, said to askers that use EDNS (the value of the DNS flag day 2020).
const EDNS_PAYLOAD: u16 = 1232;
const HEADER_BYTES: usize = 12;

/// What to do with a message.
pub(super) enum Verdict {
    /// No question; an answer to it could start a loop.
    Ignore,
    /// Answer so.
    Malformed(Vec<u8>),
    /// A name of the mesh: ask discovery.
    Mesh(Question),
    /// How to connect to a host of an external service: ask discovery.
    External(Question),
    /// A name of the mesh, or a host of an external service, with a search domain behind it: there is no such name, and
    /// nobody else need be asked.
    NoSuchName(Question),
    /// For Consul's DNS.
    Consul,
    /// For the name servers.
    Forward,
}

/// A question that is answered here.
pub(super) struct Question {
    message: Message,
    query: Query,
    /// Lower case, no final dot.
    host: String,
}

/// Judges a message. `consul`: Consul's DNS is configured.
pub(super) fn judge(bytes: &[u8], consul: bool, search: &[String], external: &ExternalHosts) -> Verdict {
    let Ok(message) = Message::from_vec(bytes) else {
        // Bit 7 of the third byte: a response.
        if bytes.len() < HEADER_BYTES || bytes[2] & 0x80 != 0 {
            return Verdict::Ignore;
        }
        let id = u16::from_be_bytes([bytes[0], bytes[1]]);
        let error = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
        return error.to_vec().map_or(Verdict::Ignore, Verdict::Malformed);
    };
    if message.metadata.message_type != MessageType::Query {
        return Verdict::Ignore;
    }
    let [query] = message.queries.as_slice() else { return Verdict::Forward };
    if message.metadata.op_code != OpCode::Query || query.query_class() != DNSClass::IN {
        return Verdict::Forward;
    }
    let query = query.clone();
    let text = query.name().to_ascii().to_ascii_lowercase();
    let host = text.strip_suffix('.').unwrap_or(&text).to_owned();
    let ours = |host: &str| under(host, "mesh") || (!consul && under(host, "consul"));
    if ours(&host) {
        return Verdict::Mesh(Question { message, query, host });
    }
    if under(&host, "consul") {
        return Verdict::Consul;
    }
    if external.service(&host).is_some() {
        if leads_to_connections(query.query_type()) {
            return Verdict::External(Question { message, query, host });
        }
        return Verdict::Forward;
    }
    // A host of one label is not meant by what stands below a search domain: that is how others are named.
    let is_external = |rest: &str| rest.contains('.') && external.service(rest).is_some();
    let mut searched =
        search.iter().filter_map(|domain| host.strip_suffix(domain.as_str())?.strip_suffix('.'));
    if searched.any(|rest| ours(rest) || under(rest, "consul") || is_external(rest)) {
        return Verdict::NoSuchName(Question { message, query, host });
    }
    Verdict::Forward
}

/// Whether the answer says where to connect to. HTTPS and SVCB do, too: their hints would lead around the mesh.
fn leads_to_connections(kind: RecordType) -> bool {
    use RecordType::{A, AAAA, ANY, HTTPS, SVCB};
    matches!(kind, A | AAAA | ANY | HTTPS | SVCB)
}

fn under(host: &str, domain: &str) -> bool {
    host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
}

impl Question {
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// The answer to what discovery says.
    pub(super) fn reply(&self, known: Knowledge<Arc<[IpAddr]>>, ipv6: bool) -> Option<Vec<u8>> {
        let addresses = match known {
            Knowledge::Found(addresses) => addresses,
            Knowledge::NotFound => return self.no_such_name(),
            Knowledge::Silent => return self.response(ResponseCode::ServFail).to_vec().ok(),
        };
        let mut response = self.response(ResponseCode::NoError);
        let wanted = self.query.query_type();
        let of = |kind: RecordType| wanted == kind || wanted == RecordType::ANY;
        let data = addresses.iter().filter_map(|address| match address {
            IpAddr::V4(v4) if of(RecordType::A) => Some(RData::A(A(*v4))),
            IpAddr::V6(v6) if ipv6 && of(RecordType::AAAA) => Some(RData::AAAA(AAAA(*v6))),
            _ => None,
        });
        for data in data.take(MAX_ADDRESSES) {
            response.add_answer(Record::from_rdata(self.query.name().clone(), TTL_SECONDS, data));
        }
        if response.answers.is_empty() {
            response.add_authority(self.soa()?);
        }
        response.to_vec().ok()
    }

    pub(super) fn no_such_name(&self) -> Option<Vec<u8>> {
        let mut response = self.response(ResponseCode::NXDomain);
        response.add_authority(self.soa()?);
        response.to_vec().ok()
    }

    fn response(&self, code: ResponseCode) -> Message {
        let asked = &self.message.metadata;
        let mut response = Message::response(asked.id, OpCode::Query);
        response.metadata.recursion_desired = asked.recursion_desired;
        response.metadata.recursion_available = true;
        response.metadata.authoritative = true;
        response.metadata.response_code = code;
        response.add_query(self.query.clone());
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(EDNS_PAYLOAD);
            response.set_edns(edns);
        }
        response
    }

    /// Says how long a negative answer may be kept (RFC 2308, section 3).
    fn soa(&self) -> Option<Record> {
        let zone = Name::from_ascii(self.host.rsplit('.').next()?).ok()?;
        let server = Name::from_ascii("ns.outrigger.invalid.").ok()?;
        let hour = 3600;
        let soa = SOA::new(server.clone(), server, 1, hour, hour, hour, NEGATIVE_TTL_SECONDS);
        Some(Record::from_rdata(zone, NEGATIVE_TTL_SECONDS, RData::SOA(soa)))
    }
}

/// SERVFAIL for a question that could not be passed on: its own bytes with the header changed.
pub(super) fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    let mut response = Message::from_vec(query).ok()?.into_response();
    response.metadata.response_code = ResponseCode::ServFail;
    response.metadata.recursion_available = true;
    response.to_vec().ok()
}

#[cfg(test)]
mod tests {
    use outrigger_api::v1;
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.metadata.recursion_desired = true;
        message.to_vec().unwrap()
    }

    fn verdict(name: &str, consul: bool) -> &'static str {
        asked(name, RecordType::A, consul)
    }

    fn asked(name: &str, kind: RecordType, consul: bool) -> &'static str {
        let host =
            |host: &str| v1::ExternalHost { host: host.to_owned(), service: "partner.shop".to_owned() };
        let hosts = ["api.partner.example", "db"].map(host).to_vec();
        let hosts = ExternalHosts::from_wire(hosts).unwrap();
        match judge(&query(name, kind), consul, &["svc.cluster.local".to_owned()], &hosts) {
            Verdict::External(_) => "external",
            Verdict::Ignore => "ignore",
            Verdict::Malformed(_) => "malformed",
            Verdict::Mesh(_) => "mesh",
            Verdict::NoSuchName(_) => "none",
            Verdict::Consul => "consul",
            Verdict::Forward => "forward",
        }
    }

    #[test]
    fn names_go_where_they_belong() {
        assert_eq!(verdict("orders.shop.mesh.", true), "mesh");
        assert_eq!(verdict("ORDERS.Shop.MESH.", true), "mesh");
        assert_eq!(verdict("orders.shop.mesh.svc.cluster.local.", true), "none");
        assert_eq!(verdict("orders.service.consul.", true), "consul");
        assert_eq!(verdict("orders.service.consul.", false), "mesh");
        assert_eq!(verdict("orders.svc.cluster.local.", false), "forward");
        assert_eq!(verdict("mesh.", false), "forward");
        assert_eq!(verdict("notmesh.", false), "forward");
        assert_eq!(verdict("example.com.", false), "forward");
    }

    #[test]
    fn hosts_of_external_services_are_ours_where_one_connects_to_them() {
        for consul in [false, true] {
            assert_eq!(verdict("api.partner.example.", consul), "external");
            assert_eq!(verdict("API.Partner.Example.", consul), "external");
            assert_eq!(verdict("db.", consul), "external");
            assert_eq!(verdict("partner.example.", consul), "forward");
            assert_eq!(verdict("x.api.partner.example.", consul), "forward");
            assert_eq!(verdict("api.partner.example.svc.cluster.local.", consul), "none");
            assert_eq!(verdict("db.svc.cluster.local.", consul), "forward");
        }
        for kind in [RecordType::AAAA, RecordType::ANY, RecordType::HTTPS, RecordType::SVCB] {
            assert_eq!(asked("api.partner.example.", kind, false), "external", "{kind}");
        }
        for kind in [RecordType::MX, RecordType::TXT, RecordType::NS, RecordType::CNAME, RecordType::SRV] {
            assert_eq!(asked("api.partner.example.", kind, false), "forward", "{kind}");
        }
    }

    fn reply(kind: RecordType, known: Knowledge<Arc<[IpAddr]>>, ipv6: bool) -> Message {
        let Verdict::Mesh(question) =
            judge(&query("Orders.Shop.mesh.", kind), false, &[], &ExternalHosts::default())
        else {
            panic!()
        };
        assert_eq!(question.host(), "orders.shop.mesh");
        Message::from_vec(&question.reply(known, ipv6).unwrap()).unwrap()
    }

    #[test]
    fn answers_follow_what_discovery_says() {
        let both: Arc<[IpAddr]> = ["253.0.0.7".parse().unwrap(), "fd00:240::7".parse().unwrap()].into();
        let found = || Knowledge::Found(both.clone());
        let a = reply(RecordType::A, found(), true);
        assert_eq!(a.answers.len(), 1);
        assert_eq!(a.answers[0].data, RData::A(A("253.0.0.7".parse().unwrap())));
        // The name comes back as it was asked, for resolvers that vary its case (0x20).
        assert_eq!(a.answers[0].name.to_ascii(), "Orders.Shop.mesh.");
        assert_eq!(reply(RecordType::AAAA, found(), true).answers.len(), 1);
        let without = reply(RecordType::AAAA, found(), false);
        assert_eq!((without.metadata.response_code, without.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(without.authorities.len(), 1);
        let text = reply(RecordType::TXT, found(), true);
        assert_eq!((text.metadata.response_code, text.answers.len()), (ResponseCode::NoError, 0));
        let none = reply(RecordType::A, Knowledge::NotFound, true);
        assert_eq!(none.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(none.authorities[0].ttl, NEGATIVE_TTL_SECONDS);
        let silent = reply(RecordType::A, Knowledge::Silent, true);
        assert_eq!(silent.metadata.response_code, ResponseCode::ServFail);
    }

    #[test]
    fn responses_are_never_answered() {
        let mut bytes = query("orders.shop.mesh.", RecordType::A);
        bytes[2] |= 0x80;
        assert!(matches!(judge(&bytes, false, &[], &ExternalHosts::default()), Verdict::Ignore));
        assert!(matches!(judge(&bytes[..14], false, &[], &ExternalHosts::default()), Verdict::Ignore));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            judge(&bytes, false, &[], &ExternalHosts::default());
            server_failure(&bytes);
        }
    }
}
