use std::net::Ipv4Addr;

use outrigger_api::v1::{Health, Protocol};
use proptest::prelude::*;

use super::*;

fn key(name: &str) -> ServiceKey {
    ServiceKey::parse(name).unwrap()
}

fn instance(id: &str, address: &str, port: u16) -> Instance {
    Instance {
        id: id.to_owned(),
        address: address.parse().unwrap(),
        ports: [(0, port)].into(),
        weight: 1,
        health: Health::Healthy,
        identity: None,
        region: String::new(),
        zone: String::new(),
        node: Arc::default(),
        labels: Arc::default(),
    }
}

fn service(name: &str, instances: Vec<Instance>) -> SourceService {
    SourceService {
        key: key(name),
        ports: Vec::new(),
        protocol: Protocol::Unspecified,
        virtual_addresses: Vec::new(),
        names: Vec::new(),
        reach: crate::sources::Reach::default(),
        instances,
    }
}

fn snapshot(services: impl IntoIterator<Item = SourceService>, sync: Sync) -> Arc<Snapshot> {
    let services = services.into_iter().map(|service| (service.key.clone(), Arc::new(service))).collect();
    Arc::new(Snapshot { services, sync, ..Snapshot::default() })
}

fn catalog(sources: &[&str]) -> Catalog {
    Catalog::new(sources.iter().map(|name| Arc::from(*name)), false)
}

#[test]
fn of_two_sources_with_one_name_the_first_has_it_and_absence_needs_both() {
    let mut catalog = catalog(&["kubernetes", "consul"]);
    let consuls = SourceService {
        names: vec!["orders.service.consul".into()],
        virtual_addresses: vec!["240.0.0.1".parse().unwrap()],
        ..service("orders", vec![instance("n1", "10.0.0.1", 80)])
    };
    let changed = catalog.apply(1, snapshot([consuls], Sync::Synced));
    assert!(!catalog.synced() && !changed.became_synced);
    assert_eq!(&*catalog.service(&key("orders")).unwrap().source, "consul");
    let clusters = service("orders", vec![instance("x", "10.0.0.2", 80)]);
    let changed = catalog.apply(0, snapshot([clusters], Sync::Synced));
    assert!(catalog.synced() && changed.became_synced);
    let orders = catalog.service(&key("orders")).unwrap();
    assert_eq!((&*orders.source, orders.spec.instances.len()), ("kubernetes", 1));
    assert_eq!(catalog.named("orders.service.consul"), None, "nothing of the other's is left");
    assert_eq!(catalog.at_virtual("240.0.0.1".parse().unwrap()), None);
    let refused = catalog.sources().nth(1).unwrap().refused;
    assert_eq!(refused[0].subject, "orders.default");
    assert!(
        refused[0].reason.contains("`kubernetes`") && refused[0].reason.contains("consul.default_namespace")
    );

    let degraded = Sync::Degraded { since: std::time::UNIX_EPOCH, reason: String::new() };
    catalog.apply(0, snapshot([], degraded));
    assert!(!catalog.synced() && catalog.started());
    assert_eq!(&*catalog.service(&key("orders")).unwrap().source, "consul", "the name is free again");
    assert!(catalog.sources().nth(1).unwrap().refused.is_empty());
}

fn pod(name: &str, addresses: &[&str], account: Option<&str>) -> Workload {
    Workload {
        key: ServiceKey::of_workload(name, "shop").unwrap(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        identity: account.map(|account| format!("spiffe://t/ns/shop/sa/{account}")),
        region: String::new(),
        zone: String::new(),
        node: Arc::default(),
        labels: Arc::default(),
        probes: Vec::new(),
        terminating: false,
    }
}

fn of_cluster(services: Vec<SourceService>, pods: Vec<Workload>) -> Arc<Snapshot> {
    let workloads = pods.into_iter().map(|pod| (pod.key.clone(), Arc::new(pod))).collect();
    let snapshot = Snapshot::clone(&snapshot(services, Sync::Synced));
    Arc::new(Snapshot { workloads: Arc::new(workloads), ..snapshot })
}

#[test]
fn a_pod_is_at_its_addresses_and_services_lead_to_it() {
    let mut catalog = catalog(&["kubernetes", "consul"]);
    let at = |catalog: &Catalog, address: &str| {
        catalog.workload_at(address.parse().unwrap()).map(|pod| pod.key.to_string())
    };
    let mut old = pod("old", &["10.0.0.1"], Some("web"));
    old.terminating = true;
    let new = pod("web-0", &["10.0.0.1", "fd00::1"], Some("web"));
    let meshed = Instance { identity: new.identity.clone(), ..instance("web-0", "10.0.0.1", 8080) };
    let other =
        Instance { identity: Some("spiffe://t/ns/shop/sa/db".into()), ..instance("x", "10.0.0.1", 9) };
    let services = vec![service("web", vec![meshed]), service("db", vec![other])];
    let changed = catalog.apply(0, of_cluster(services.clone(), vec![old, new.clone()]));
    assert_eq!(at(&catalog, "10.0.0.1").unwrap(), "web-0._pod.shop", "the one that is not ending");
    assert_eq!(at(&catalog, "fd00::1").unwrap(), "web-0._pod.shop");
    assert_eq!(at(&catalog, "10.0.0.2"), None);
    assert!(changed.workloads && changed.keys.contains(&Key::Ip("fd00::1".parse().unwrap())));
    let leading: Vec<_> = catalog.leading_to(&new).map(|(service, _)| service.spec.key.name()).collect();
    assert_eq!(leading, ["web"], "by its own identity only");

    let again = catalog.apply(0, of_cluster(services, vec![pod("web-0", &["10.0.0.3"], Some("web"))]));
    assert_eq!((at(&catalog, "10.0.0.1"), at(&catalog, "10.0.0.3").is_some()), (None, true));
    assert!(again.keys.contains(&Key::Service(new.key)));

    let taken = service("web-0._pod.shop", vec![instance("evil", "10.6.6.6", 80)]);
    catalog.apply(1, snapshot([taken], Sync::Synced));
    assert!(catalog.at_endpoint("10.6.6.6:80".parse().unwrap()).next().is_none());
    assert!(catalog.sources().nth(1).unwrap().refused[0].reason.contains("rename"));
}

#[test]
fn ranges_are_unknown_until_the_cluster_was_read() {
    let mut catalog = catalog(&["kubernetes", "file"]);
    catalog.apply(1, snapshot([], Sync::Synced));
    assert_eq!(catalog.ranges(), None);
    let ranges: BTreeSet<IpNet> = ["10.244.0.0/24".parse().unwrap()].into();
    let read = Snapshot { ranges: Arc::new(ranges.clone()), sync: Sync::Synced, ..Snapshot::default() };
    assert!(catalog.apply(0, Arc::new(read)).ranges);
    assert_eq!(catalog.ranges(), Some(ranges));
}

/// What readiness waits for however long it takes: a controller that knows nothing of its cluster refuses every pod.
#[test]
fn a_cluster_is_known_once_its_services_and_policies_were_read() {
    let mut catalog = self::catalog(&["kubernetes", "consul", "policy"]);
    for source in [0, 1] {
        assert!(!catalog.knows_its_cluster(), "before source {source}");
        catalog.apply(source, snapshot([], Sync::Synced));
    }
    assert!(!catalog.knows_its_cluster(), "without policies");
    catalog.apply(2, snapshot([], Sync::Synced));
    assert!(catalog.knows_its_cluster());
    assert!(self::catalog(&["consul"]).knows_its_cluster(), "there is none");
}

#[test]
fn addresses_that_lead_back_into_the_caller_are_refused() {
    let mut catalog = catalog(&["consul"]);
    let bad = [
        "127.0.0.1",
        "::1",
        "169.254.169.254",
        "fe80::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "255.255.255.255",
        "253.0.0.1",
        "fd00:240::5",
        "::ffff:127.0.0.1",
    ];
    let mut instances: Vec<_> = bad.iter().map(|address| instance(address, address, 80)).collect();
    instances.push(instance("portless", "10.0.0.1", 0));
    instances.push(instance("good", "10.0.0.1", 80));
    instances.push(instance("good6", "2001:db8::1", 80));
    catalog.apply(0, snapshot([service("orders", instances.clone())], Sync::Synced));
    let kept: Vec<_> =
        catalog.service(&key("orders")).unwrap().spec.instances.iter().map(|i| i.id.as_str()).collect();
    assert_eq!(kept, ["good", "good6"]);
    let view = catalog.sources().next().unwrap();
    assert_eq!(view.refused.len(), bad.len() + 1);
    assert!(catalog.at_endpoint("127.0.0.1:80".parse().unwrap()).next().is_none());

    let mut lenient = Catalog::new([Arc::from("file")], true);
    lenient.apply(0, snapshot([service("orders", instances)], Sync::Synced));
    assert_eq!(lenient.service(&key("orders")).unwrap().spec.instances.len(), 4, "loopback alone is let in");
}

#[derive(Debug, Clone)]
struct Step {
    source: usize,
    services: Vec<Described>,
}

/// A service's name, its instances' hosts and ports, and whether it has a name and address of Consul's.
type Described = (u8, Vec<(u8, u16)>, bool);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let instances = proptest::collection::vec((0_u8..4, 1_u16..4), 0..4);
    let services = proptest::collection::vec((0_u8..5, instances, any::<bool>()), 0..5);
    proptest::collection::vec(
        (0_usize..2, services).prop_map(|(source, services)| Step { source, services }),
        1..12,
    )
}

fn build(step: &Step) -> Arc<Snapshot> {
    let services = step.services.iter().map(|(name, instances, extra)| {
        let name = format!("s{name}");
        let instances = instances
            .iter()
            .enumerate()
            .map(|(id, (host, port))| instance(&id.to_string(), &format!("10.0.0.{host}"), *port))
            .collect();
        let mut service = service(&name, instances);
        if *extra {
            service.names = vec![format!("{name}.service.consul")];
            service.virtual_addresses = vec![Ipv4Addr::new(240, 0, 0, 1).into()];
        }
        service
    });
    snapshot(services, Sync::Synced)
}

/// All that can be asked, with the key that it depends on.
fn answers(catalog: &Catalog) -> Vec<(Key, String)> {
    let mut answers = Vec::new();
    for service in 0..5 {
        let name = key(&format!("s{service}"));
        let spec = catalog.service(&name).map(|service| Arc::clone(&service.spec));
        answers.push((Key::Service(name.clone()), format!("{spec:?}")));
        for dialled in [format!("s{service}.default.mesh"), format!("s{service}.service.consul")] {
            answers.push((Key::Name(dialled.as_str().into()), format!("{:?}", catalog.named(&dialled))));
        }
    }
    for host in 0..4 {
        for port in 1..4 {
            let at = SocketAddr::from(([10, 0, 0, host], port));
            let found: Vec<_> = catalog
                .at_endpoint(at)
                .map(|name| {
                    (
                        name.clone(),
                        catalog.service(name).map(|service| format!("{:?}", service.instance_at(at))),
                    )
                })
                .collect();
            answers.push((Key::Ip(at.ip()), format!("{found:?}")));
        }
    }
    let virtual_address = Ipv4Addr::new(240, 0, 0, 1).into();
    answers.push((Key::Ip(virtual_address), format!("{:?}", catalog.at_virtual(virtual_address))));
    answers
}

proptest! {
    #[test]
    fn changes_are_complete_and_the_indexes_are_those_of_a_fresh_catalog(steps in steps()) {
        let mut lived = catalog(&["a", "b"]);
        let mut last = [Arc::<Snapshot>::default(), Arc::default()];
        for step in &steps {
            let before = answers(&lived);
            let snapshot = build(step);
            last[step.source] = Arc::clone(&snapshot);
            let changed = lived.apply(step.source, snapshot);
            let after = answers(&lived);
            for ((key, before), (_, after)) in before.iter().zip(&after) {
                prop_assert!(before == after || changed.keys.contains(key), "{key:?}: {before} -> {after}");
            }
            let mut fresh = catalog(&["a", "b"]);
            for (source, snapshot) in last.iter().enumerate() {
                fresh.apply(source, Arc::clone(snapshot));
            }
            prop_assert_eq!(after, answers(&fresh));
            // Saying the same again changes nothing.
            let again = lived.apply(step.source, build(step));
            prop_assert!(again.services.is_empty() && again.keys.is_empty());
        }
    }
}
