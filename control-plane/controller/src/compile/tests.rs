use std::collections::HashSet;

use super::*;
use crate::catalog::Catalog;
use crate::claims::Claims;
use crate::sources::{Instance, ServiceKey, ServicePort, Snapshot, SourceService, Sync};

fn service_of(instances: Vec<Instance>) -> (Catalog, ServiceKey) {
    let key = ServiceKey::parse("orders.shop").unwrap();
    let ports = (1..20).map(|port| ServicePort { port, name: String::new(), protocol: v1::Protocol::Http1 });
    let spec = SourceService {
        key: key.clone(),
        ports: ports.collect(),
        protocol: v1::Protocol::Unspecified,
        virtual_addresses: Vec::new(),
        names: Vec::new(),
        reach: crate::sources::Reach::default(),
        instances,
    };
    let snapshot = Snapshot {
        services: [(key.clone(), Arc::new(spec))].into(),
        sync: Sync::Synced,
        ..Snapshot::default()
    };
    let mut catalog = Catalog::new([Arc::from("test")], false);
    catalog.apply(0, Arc::new(snapshot));
    (catalog, key)
}

fn instance(ports: std::collections::BTreeMap<u16, u16>) -> Instance {
    Instance {
        id: "a".into(),
        address: "10.0.0.1".parse().unwrap(),
        ports,
        weight: 0,
        health: v1::Health::Healthy,
        identity: None,
        region: String::new(),
        zone: String::new(),
        node: Arc::default(),
        labels: Arc::default(),
    }
}

#[test]
fn a_version_depends_on_the_content_alone() {
    let many = instance((1..20).map(|port| (port, port + 100)).collect());
    let (catalog, key) = service_of(vec![many.clone(), Instance { id: "b".into(), ..many.clone() }]);
    let service = catalog.service(&key).unwrap();
    // Maps iterate in another order each time they are made.
    let versions: HashSet<_> = (0..50).map(|_| super::service(message(service, |_| None)).version).collect();
    assert_eq!(versions.len(), 1);

    let mut other = many.clone();
    other.ports.insert(3, 999);
    let (changed, _) = service_of(vec![many.clone(), Instance { id: "b".into(), ..other.clone() }]);
    let (swapped, _) =
        service_of(vec![Instance { id: "a".into(), ..other }, Instance { id: "b".into(), ..many }]);
    let all: HashSet<_> = [&catalog, &changed, &swapped]
        .map(|catalog| super::service(message(catalog.service(&key).unwrap(), |_| None)).version)
        .into();
    assert_eq!(all.len(), 3, "ports count, and whose they are");
}

#[test]
fn a_claim_gives_an_identity_only_where_the_source_gives_none() {
    let (catalog, key) = service_of(vec![
        instance([(0, 80)].into()),
        Instance {
            id: "b".into(),
            identity: Some("spiffe://t/ns/a/sa/b".into()),
            ..instance([(0, 81)].into())
        },
    ]);
    let mut claims = Claims::default();
    let now = std::time::SystemTime::now();
    let claimant = "spiffe://t/ns/a/sa/claimant".parse().unwrap();
    for at in ["10.0.0.1:80", "10.0.0.1:81"] {
        claims.accept(1, &claimant, (&key, at.parse().unwrap()), true, now, &mut Vec::new()).unwrap();
    }
    let message = message(catalog.service(&key).unwrap(), |instance| {
        claims.get(&key, (instance.address, instance.ports[&0]).into())
    });
    let seen: Vec<_> =
        message.endpoints.iter().map(|e| (e.identity.as_str(), e.health(), e.weight)).collect();
    assert_eq!(
        seen,
        [
            ("spiffe://t/ns/a/sa/claimant", v1::Health::Draining, 1),
            ("spiffe://t/ns/a/sa/b", v1::Health::Healthy, 1)
        ]
    );
}

#[test]
fn a_stranger_in_a_meshed_service_is_no_endpoint() {
    let endpoint = |id: &str, identity: &str| v1::Endpoint {
        id: id.to_owned(),
        identity: identity.to_owned(),
        ..v1::Endpoint::default()
    };
    let left = |source: &str, meshed: bool, endpoints: Vec<v1::Endpoint>| {
        let mut message = v1::Service { source: source.to_owned(), endpoints, ..v1::Service::default() };
        drop_strangers(&mut message, meshed);
        message.endpoints.into_iter().map(|endpoint| endpoint.id).collect::<Vec<_>>()
    };
    let mixed = || vec![endpoint("meshed", "spiffe://outrigger.local/ns/a/sa/b"), endpoint("stranger", "")];
    assert_eq!(left("consul", false, mixed()), ["meshed"]);
    assert_eq!(left("file", false, mixed()), ["meshed", "stranger"], "a file is somebody's word");
    let plain = vec![endpoint("a", ""), endpoint("b", "")];
    assert_eq!(left("consul", false, plain.clone()), ["a", "b"], "a service that is not meshed");
    assert_eq!(left("consul", true, plain).len(), 0, "its last claimed endpoint left, and strangers stayed");
}

#[test]
fn who_keeps_to_a_node_chooses_nobody_elsewhere_and_a_policy_outranks_the_zone() {
    use v1::Health::{Healthy, Unready};
    let on =
        |id: &str, node: &str| Instance { id: id.into(), node: node.into(), ..instance([(1, 1)].into()) };
    let instances = vec![on("a", "n1"), on("b", "n2")];
    let (catalog, key) = service_of(instances.clone());
    let service = catalog.service(&key).unwrap();
    let healths = |node: &str| {
        let mut message = message(service, |_| None);
        keep_to_node(&mut message, &instances, node);
        message.endpoints.iter().map(v1::Endpoint::health).collect::<Vec<_>>()
    };
    assert_eq!(healths("n1"), [Healthy, Unready]);
    assert_eq!(healths("n3"), [Unready, Unready]);
    assert_eq!(healths(""), [Healthy, Healthy], "who is on no node is led to all");

    let mut plain = message(service, |_| None);
    prefer_own_zone(&mut plain);
    assert_eq!(plain.traffic.unwrap().load_balancer.unwrap().zone_percent, 1);
    let random = v1::LoadBalancer { zone_percent: 0, ..v1::LoadBalancer::default() };
    let traffic = v1::Traffic { load_balancer: Some(random), ..v1::Traffic::default() };
    let mut ruled = v1::Service { traffic: Some(traffic), ..message(service, |_| None) };
    prefer_own_zone(&mut ruled);
    assert_eq!(ruled.traffic.unwrap().load_balancer.unwrap().zone_percent, 0);
}
