use bytes::Bytes;
use http::Method;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{Call, fake::entry};

const STRICT: AddressRules = AddressRules { allow_local: false };
const LOCAL: AddressRules = AddressRules { allow_local: true };

fn read(body: impl Into<Bytes>, rules: AddressRules) -> Result<Normalised, Error> {
    let call = Call { method: Method::GET, path: "/v1/health/service/web".into(), agent: "test:1".into() };
    normalise(&Answer { call, status: 200, headers: http::HeaderMap::new(), body: body.into() }, rules)
}

fn one(entry: &Value, rules: AddressRules) -> Result<Instance, &'static str> {
    let normalised = read(json!([entry]).to_string(), rules).unwrap();
    match normalised.skipped.first() {
        Some(skip) => Err(skip.reason),
        None => Ok(normalised.instances.into_values().next().unwrap()),
    }
}

/// Recorded from Consul 1.20.6.
#[test]
fn a_recorded_answer() {
    let normalised = read(&include_bytes!("testdata/health-1.20.6.json")[..], STRICT).unwrap();
    // `web-2` has no address of its own, and its node's is loopback.
    assert_eq!(normalised.skipped.len(), 1);
    assert_eq!(normalised.skipped[0].id.to_string(), "dc1/c1/web-2");
    assert_eq!(normalised.skipped[0].reason, "loopback addresses are not allowed");
    let instances: Vec<Instance> = normalised.instances.into_values().collect();
    let [first, third] = instances.as_slice() else { panic!("{instances:#?}") };
    assert_eq!(first.id.to_string(), "dc1/c1/web-1");
    assert_eq!(first.service, "web");
    assert_eq!(first.namespace, None);
    assert_eq!(first.address, "10.1.0.1:8080".parse().unwrap());
    assert_eq!((first.health, first.weight), (Health::Warning, 2));
    assert_eq!(first.tags, ["v1", "v2"]);
    assert_eq!(first.protocol.as_deref(), Some("http2"));
    assert_eq!(first.zone.as_deref(), Some("z1"));
    assert_eq!(first.region(), "dc1");
    assert_eq!(third.address, "[2001:db8::3]:8081".parse().unwrap());
    assert_eq!((third.health, third.weight), (Health::Critical, 1));

    let local = read(&include_bytes!("testdata/health-1.20.6.json")[..], LOCAL).unwrap();
    assert_eq!(local.instances.len(), 3);
    let node_address = local.instances.values().find(|i| i.id.service_id == "web-2").unwrap().address;
    assert_eq!(node_address, "127.0.0.1:8081".parse().unwrap());
}

/// Recorded from Consul 1.20.6: a service of Consul's own mesh has a virtual address.
#[test]
fn a_recorded_answer_with_a_virtual_address() {
    let normalised = read(&include_bytes!("testdata/health-connect-1.20.6.json")[..], STRICT).unwrap();
    let instance = normalised.instances.into_values().next().unwrap();
    assert_eq!(instance.virtual_address, Some("240.0.0.1".parse().unwrap()));
    assert_eq!(instance.zone.as_deref(), Some("eu-1a"));
}

#[test]
fn hostile_addresses_are_left_out() {
    let cases = [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("0.0.0.0", "not one host's"),
        ("::", "not one host's"),
        ("224.0.0.1", "not one host's"),
        ("ff02::1", "not one host's"),
        ("255.255.255.255", "not one host's"),
        ("metadata.internal", "not an IP"),
        ("10.0.0.1:80", "not an IP"),
        ("0x7f.1", "not an IP"),
        ("127.1", "not an IP"),
        ("fe80::1%eth0", "not an IP"),
        (" 10.0.0.1", "not an IP"),
    ];
    for (address, reason) in cases {
        let got = one(&entry("web", "a", address, "passing"), STRICT).unwrap_err();
        assert!(got.contains(reason), "{address}: {got}");
    }
    for address in ["127.0.0.5", "169.254.1.1", "fe80::1"] {
        one(&entry("web", "a", address, "passing"), LOCAL).unwrap();
    }
    one(&entry("web", "a", "0.0.0.0", "passing"), LOCAL).unwrap_err();
    assert_eq!(one(&entry("web", "a", "", "passing"), STRICT).unwrap().address.ip().to_string(), "10.0.0.9");
}

#[test]
fn hostile_ports_meta_and_weights() {
    let mut bad = entry("web", "a", "10.0.0.1", "passing");
    for port in [json!(0), json!(-1), json!(65536)] {
        bad["Service"]["Port"] = port;
        one(&bad, STRICT).unwrap_err();
    }
    bad["Service"]["Port"] = json!(1);
    for id in ["a\nb".to_owned(), "a".repeat(513)] {
        let mut bad = bad.clone();
        bad["Service"]["ID"] = json!(id);
        one(&bad, STRICT).unwrap_err();
    }
    bad["Service"]["Meta"] = json!({"big": "x".repeat(1 << 20), "zone": "y".repeat(600), "ok": "1"});
    bad["Service"]["Tags"] = json!(["z".repeat(1 << 20), "b", "a", "b"]);
    bad["Service"]["Weights"] = json!({"Passing": i64::MAX, "Warning": i64::MIN});
    let instance = one(&bad, STRICT).unwrap();
    assert_eq!(instance.meta.keys().collect::<Vec<_>>(), ["ok"]);
    assert_eq!(instance.tags, ["a", "b"]);
    assert_eq!(instance.weight, 65_535);
    assert_eq!(instance.zone, None);
}

#[test]
fn the_worst_check_decides() {
    for (checks, health, weight) in [
        (json!(null), Health::Passing, 10),
        (json!([]), Health::Passing, 10),
        (json!([["a", "passing"], ["b", "warning"]]), Health::Warning, 2),
        (json!([["a", "critical"], ["b", "warning"]]), Health::Critical, 10),
        (json!([["_node_maintenance", "critical"]]), Health::Maintenance, 10),
        (json!([["_service_maintenance:a", "critical"], ["b", "critical"]]), Health::Maintenance, 10),
        (json!([["a", "brand-new-state"]]), Health::Critical, 10),
    ] {
        let mut with_checks = entry("web", "a", "10.0.0.1", "passing");
        let wire = |check: &Value| json!({"CheckID": check[0], "Status": check[1]});
        with_checks["Checks"] = checks.as_array().map_or(json!(null), |list| list.iter().map(wire).collect());
        let instance = one(&with_checks, STRICT).unwrap();
        assert_eq!((instance.health, instance.weight), (health, weight), "{checks}");
    }
}

#[test]
fn ids_are_unique_per_node_only() {
    let mut other = entry("web", "a", "10.0.0.2", "passing");
    other["Node"]["Node"] = json!("node-b");
    let both = json!([entry("web", "a", "10.0.0.1", "passing"), other]).to_string();
    assert_eq!(read(both, STRICT).unwrap().instances.len(), 2);
}

proptest! {
    /// Cut or mangled answers are errors or fewer instances, never a panic.
    #[test]
    fn mangled_answers_do_no_harm(cut in 0_usize..4000, at in 0_usize..4000, byte: u8) {
        let mut body = include_bytes!("testdata/health-1.20.6.json").to_vec();
        let at = at % body.len();
        body[at] = byte;
        body.truncate(body.len().min(cut.max(1)));
        let _ = read(body, LOCAL);
    }

    #[test]
    fn accepted_addresses_are_acceptable(octets: [u8; 4]) {
        let ip = IpAddr::from(octets);
        if let Ok(instance) = one(&entry("web", "a", &ip.to_string(), "passing"), STRICT) {
            prop_assert_eq!(instance.address.ip(), ip);
            prop_assert!(octets[0] != 0 || octets != [0; 4]);
            prop_assert!(octets[0] != 127 && !(octets[0] == 169 && octets[1] == 254));
        }
    }
}
