#![expect(
    clippy::needless_pass_by_value,
    reason = "a case reads better without a reference to each piece of JSON"
)]

use serde_json::{Value, json};

use super::super::objects::{Kind, raw};
use super::*;

fn parsed<K: Kind>(value: Value) -> K {
    K::prune(serde_json::from_value(value).unwrap()).1
}

fn service_of(spec: Value) -> Service {
    parsed(json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec}))
}

fn slice(version: u32, ports: Value, endpoints: Value) -> Slice {
    parsed(json!({
        "metadata": {"name": "s", "namespace": "shop", "resourceVersion": version.to_string(),
            "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    }))
}

fn pod_of(change: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "web-0", "namespace": "shop", "uid": "u", "labels": {"app": "web"}},
        "spec": {"serviceAccountName": "web", "nodeName": "n1", "containers": [{"name": "app"}],
            "initContainers": [{"name": "outrigger-proxy", "restartPolicy": "Always",
                "readinessProbe": {"httpGet": {"path": "/ready", "port": 15490}}}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "hostIP": "192.168.0.1"},
    });
    merge(&mut pod, change);
    parsed(pod)
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

static NOWHERE: Node = Node { zone: String::new(), region: String::new(), pod_ranges: Vec::new() };

fn made(service: &Service, slices: &[&Slice], pods: &[Pod]) -> Option<SourceService> {
    let key = ("shop".into(), "web".into());
    let found = super::service(&key, service, slices, "cluster.local", "t", |endpoint| {
        let at = |pod: &&Pod| pod.addresses.contains(&endpoint.address);
        let found = match pods.iter().find(at) {
            Some(pod) => Found::Pod(pod),
            None if endpoint.pod.is_some() => Found::Unknown,
            None => Found::Stranger,
        };
        (found, &NOWHERE)
    });
    found.map(Result::unwrap)
}

#[test]
fn a_service_has_its_ports_addresses_names_and_endpoints() {
    let service = service_of(json!({
        "type": "ClusterIP", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:96::9"],
        "ipFamilies": ["IPv4", "IPv6"],
        "ports": [
            {"name": "web", "port": 80, "targetPort": "http", "protocol": "TCP", "appProtocol": "kubernetes.io/h2c"},
            {"name": "metrics", "port": 9090, "protocol": "TCP"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
    }));
    let ready = slice(
        5,
        json!([{"name": "web", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]),
        json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": true}, "zone": "a",
            "targetRef": {"kind": "Pod", "name": "web-0", "namespace": "shop"}}]),
    );
    let v6 = slice(5, json!([{"name": "web", "port": 8080}]), json!([{"addresses": ["fd00::1"]}]));
    let web = made(&service, &[&ready, &v6], &[pod_of(json!({}))]).unwrap();
    assert_eq!(web.key.as_str(), "web.shop");
    let ports: Vec<_> = web.ports.iter().map(|port| (port.port, port.protocol)).collect();
    assert_eq!(ports, [(80, Protocol::Http2), (9090, Protocol::Unspecified)], "UDP is left out");
    assert_eq!(web.names, ["web.shop", "web.shop.svc.cluster.local", "web.shop.svc"]);
    assert_eq!(web.virtual_addresses.len(), 2);
    let [only] = &web.instances[..] else { panic!("of the first family only: {:?}", web.instances) };
    assert_eq!((only.id.as_str(), &only.ports), ("web-0", &[(80, 8080)].into()));
    assert_eq!(only.identity.as_deref(), Some("spiffe://t/ns/shop/sa/web"));
    assert_eq!((only.zone.as_str(), only.labels["app"].as_str()), ("a", "web"));

    let v6_alone = made(&service, &[&v6], &[]).unwrap();
    assert_eq!(v6_alone.instances[0].address.to_string(), "fd00::1", "better another family than nobody");
}

#[test]
fn conditions_say_who_may_be_chosen() {
    use Health::{Draining, Healthy, Unready};
    let service = service_of(json!({"clusterIP": "None", "ports": [{"port": 80}]}));
    assert_eq!(service.cluster_ips, Vec::<IpAddr>::new());
    let endpoint = |last: u8, conditions: Value| json!({"addresses": [format!("10.0.0.{last}")], "conditions": conditions});
    let slice = slice(
        1,
        json!([{"port": 8080}]),
        json!([
            endpoint(1, json!({"ready": true, "serving": true, "terminating": false})),
            endpoint(2, json!({})),
            endpoint(3, json!({"ready": false, "serving": true, "terminating": true})),
            endpoint(4, json!({"ready": false, "serving": false, "terminating": true})),
            endpoint(5, json!({"ready": false})),
            // publishNotReadyAddresses
            endpoint(6, json!({"ready": true, "serving": false, "terminating": true})),
            {"addresses": ["10.0.0.7"], "conditions": null},
        ]),
    );
    let health: Vec<_> =
        made(&service, &[&slice], &[]).unwrap().instances.iter().map(|one| one.health).collect();
    assert_eq!(health, [Healthy, Healthy, Draining, Unready, Unready, Draining, Healthy]);
}

#[test]
fn an_endpoint_in_two_slices_is_one_and_the_newer_slice_says_how_it_is() {
    let service = service_of(json!({"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]}));
    let old = slice(
        9,
        json!([{"name": "a", "port": 1}, {"name": "b", "port": 2}]),
        json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": false}}, {"addresses": ["10.0.0.2"]}]),
    );
    let new = slice(10, json!([{"name": "a", "port": 3}]), json!([{"addresses": ["10.0.0.1"]}]));
    for order in [[&old, &new], [&new, &old]] {
        let instances = made(&service, &order, &[]).unwrap().instances;
        assert_eq!(instances.len(), 2);
        assert_eq!((instances[0].health, &instances[0].ports), (Health::Healthy, &[(80, 3), (81, 2)].into()));
    }
}

#[test]
fn a_pod_that_is_not_known_gets_nothing_and_strangers_are_plaintext() {
    let service = service_of(json!({"ports": [{"port": 80}]}));
    let slice = slice(
        1,
        json!([{"port": 8080}]),
        json!([
            {"addresses": ["10.0.0.9"], "targetRef": {"kind": "Pod", "name": "web-9"}},
            {"addresses": ["192.168.0.1"]},
            {"addresses": ["10.0.0.1"]},
        ]),
    );
    let instances = made(&service, &[&slice], &[pod_of(json!({}))]).unwrap().instances;
    let seen: Vec<_> =
        instances.iter().map(|one| (one.id.as_str(), one.health, one.identity.is_some())).collect();
    let expected = [
        ("10.0.0.1", Health::Healthy, true), // whose slice names nobody: the pod with the address is who it is
        ("192.168.0.1", Health::Healthy, false),
        ("web-9", Health::Unready, false),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn what_cannot_be_dialled_through_us_is_no_service() {
    let external = service_of(json!({"type": "ExternalName", "externalName": "db.example.com"}));
    assert!(made(&external, &[], &[]).is_none());
    let udp = service_of(json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]}));
    assert!(made(&udp, &[], &[]).is_none());
    let bare = service_of(json!({"clusterIP": "None"}));
    let slice = slice(1, Value::Null, json!([{"addresses": ["10.0.0.1"]}]));
    let bare = made(&bare, &[&slice], &[]).unwrap();
    assert!(
        bare.ports.is_empty() && bare.instances[0].ports.is_empty(),
        "headless without ports: any port is its own"
    );
}

#[test]
fn protocols_by_app_protocol_then_by_name() {
    for (app, name, expected) in [
        (Some("http"), "tcp-x", Protocol::Http1),
        (Some("kubernetes.io/h2c"), "", Protocol::Http2),
        (Some("kubernetes.io/ws"), "", Protocol::Http1),
        (Some("kubernetes.io/wss"), "", Protocol::Tcp),
        (Some("GRPC"), "", Protocol::Grpc),
        (Some("example.com/own"), "http", Protocol::Unspecified),
        (None, "http-admin", Protocol::Http1),
        (None, "grpc", Protocol::Grpc),
        (None, "grpc-web", Protocol::Http1),
        (None, "https", Protocol::Tcp),
        (None, "postgres", Protocol::Tcp),
        (None, "web", Protocol::Unspecified),
        (None, "", Protocol::Unspecified),
    ] {
        assert_eq!(protocol(app, name), expected, "{app:?} {name}");
    }
}

#[test]
fn a_pod_keeps_what_its_node_asks_of_it() {
    let pod = pod_of(json!({"spec": {"containers": [
        {
            "name": "app",
            "ports": [{"name": "http", "containerPort": 8080}, {"name": "tls", "containerPort": 8443}],
            "startupProbe": {"httpGet": {"path": "started?x=1", "port": "http"}},
            "readinessProbe": {"grpc": {"port": 9000, "service": "x"}},
            "livenessProbe": {"tcpSocket": {"port": 8080}},
            "lifecycle": {"preStop": {"httpGet": {"path": "/bye", "port": 8080}}, "postStart": {"exec": {"command": ["x"]}}},
        },
        {"name": "tls", "ports": [{"name": "tls", "containerPort": 8443}],
            "livenessProbe": {"httpGet": {"path": "/", "port": "tls", "scheme": "HTTPS"}},
            "readinessProbe": {"httpGet": {"path": "/", "port": 80, "host": "elsewhere.example"}}},
        {"name": "none", "readinessProbe": {"httpGet": {"port": "http"}}},
        {"name": "odd", "readinessProbe": {"httpGet": {"path": "/is it up", "port": 81}},
            "livenessProbe": {"httpGet": {"path": "/%zz", "port": 81}}},
    ]}}));
    let node = Node {
        pod_ranges: vec!["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()],
        ..Node::default()
    };
    let found = workload(&pod, &node, "t").unwrap().unwrap();
    let seen: Vec<_> = found
        .probes
        .iter()
        .map(|probe| (probe.port, probe.method.as_deref(), probe.path.as_deref(), probe.nodes.len()))
        .collect();
    let get = |path| (Some("GET"), Some(path));
    let expected = [
        (81, get("/is%20it%20up"), 0),
        (8080, get("/bye"), 0),
        (8080, get("/started"), 0),
        (9000, (Some("POST"), Some("/grpc.health.v1.Health/Check")), 0),
        (8080, (None, None), 3),
        (8443, (None, None), 3),
    ]
    .map(|(port, (method, path), nodes)| (port, method, path, nodes));
    assert_eq!(seen, expected, "named ports are the container's own; the sidecar's probe is not redirected");
    assert_eq!(found.probes[4].nodes, ["10.0.0.1/32", "192.168.0.1/32", "fd00::1/128"]);
    let identity = found.identity.as_deref().unwrap();
    assert_eq!(identity, "spiffe://t/ns/shop/sa/web");
    let resolved =
        outrigger_policy::resolve(&outrigger_policy::Policies::new(), &outrigger_policy::Catalog::default());
    let told = resolved.inbound(identity, &[crate::mesh::as_policies_see(&found)]).access.unwrap();
    assert_eq!(told.probes.len(), expected.len());
    outrigger_core::access::Access::from_wire(&told).expect("a proxy takes them");
}

#[test]
fn a_slice_with_a_number_that_is_no_port_costs_that_port_alone() {
    let ports = json!([{"name": "odd", "port": 70000}, {"name": "all"}, {"name": "less", "port": -1}, {"name": "http", "port": 80}]);
    assert_eq!(slice(1, ports, json!([])).ports, [("http".to_owned(), 80)]);
}

#[test]
fn who_is_no_workload_of_the_mesh() {
    let of = |change| workload(&pod_of(change), &NOWHERE, "t").map(Result::unwrap);
    assert!(of(json!({"spec": {"hostNetwork": true}})).is_none());
    assert!(of(json!({"status": {"phase": "Succeeded"}})).is_none());
    assert!(of(json!({"status": {"podIP": ""}})).is_none());
    let bare = of(json!({"spec": {"initContainers": null}})).unwrap();
    assert_eq!((bare.identity, bare.probes.len()), (None, 0));
    let leaving = of(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})).unwrap();
    assert!(leaving.terminating);
    let both = of(json!({"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}})).unwrap();
    assert_eq!(both.addresses.len(), 2);
}

proptest::proptest! {
    /// Whatever a slice holds: ids and addresses are unique, and the order of slices changes nothing.
    #[test]
    fn instances_are_unique_and_do_not_depend_on_the_order_of_slices(
        slices in proptest::collection::vec(proptest::collection::vec((0_u8..5, 0_u8..3, proptest::prelude::any::<bool>()), 0..5), 0..5),
    ) {
        let service = service_of(json!({"ports": [{"port": 80}]}));
        let slices: Vec<Slice> = slices.iter().zip(1..).map(|(endpoints, version)| {
            let endpoints: Vec<Value> = endpoints.iter().map(|(host, pod, ready)| json!({
                "addresses": [format!("10.0.0.{host}")], "conditions": {"ready": ready},
                "targetRef": {"kind": "Pod", "name": format!("p{pod}")},
            })).collect();
            slice(version, json!([{"port": 8080}]), json!(endpoints))
        }).collect();
        let mut order: Vec<&Slice> = slices.iter().collect();
        let forth = made(&service, &order, &[]).unwrap().instances;
        order.reverse();
        proptest::prop_assert_eq!(&forth, &made(&service, &order, &[]).unwrap().instances);
        let ids: BTreeSet<_> = forth.iter().map(|one| &one.id).collect();
        let addresses: BTreeSet<_> = forth.iter().map(|one| one.address).collect();
        proptest::prop_assert_eq!((ids.len(), addresses.len()), (forth.len(), forth.len()));
    }
}

#[test]
fn what_the_api_may_write_as_null_is_read() {
    let raw: raw::Slice =
        serde_json::from_value(json!({"metadata": {"name": "s"}, "endpoints": null, "ports": null})).unwrap();
    assert!(Slice::prune(raw).1.endpoints.is_empty());
}
