use super::*;

fn endpoint(id: &str, address: &str, account: Option<&str>, ports: &[(u16, u16)]) -> CatalogEndpoint {
    CatalogEndpoint {
        id: id.to_owned(),
        address: address.parse().unwrap(),
        ports: ports.iter().copied().collect(),
        identity: account.map(|account| format!("spiffe://outrigger.local/ns/shop/sa/{account}")),
        zone: String::new(),
        health: CatalogHealth::Healthy,
        labels: BTreeMap::from([("app".to_owned(), id.to_owned())]),
        probes: Vec::new(),
    }
}

#[test]
fn a_workload_is_an_identity_at_an_address() {
    let service = |name: &str, endpoints| CatalogService {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        ports: vec![CatalogPort { port: 80, name: "http".to_owned(), protocol: CatalogProtocol::Http1 }],
        endpoints,
    };
    let catalog = Catalog {
        services: vec![
            service(
                "orders",
                vec![
                    endpoint("a", "10.0.0.1", Some("orders"), &[(80, 8080)]),
                    endpoint("b", "10.0.0.2", Some("orders"), &[(80, 8080)]),
                ],
            ),
            service("orders.admin", vec![endpoint("a", "10.0.0.1", Some("orders"), &[(80, 9090)])]),
            service("plain", vec![endpoint("c", "10.0.0.1", None, &[(80, 80)])]),
        ],
        ..Catalog::default()
    };
    let workloads = catalog.workloads();
    assert_eq!(workloads.len(), 3);
    let behind = catalog.workloads_behind("orders.admin.shop");
    assert_eq!(behind.len(), 1);
    assert_eq!(behind[0].ports, BTreeSet::from([8080, 9090]));
    assert_eq!(behind[0].services.keys().collect::<Vec<_>>(), ["orders.admin.shop", "orders.shop"]);
    assert_eq!(behind[0].namespace, "shop");
    assert_eq!(catalog.service("orders.admin.shop").unwrap().name, "orders.admin");
    assert!(catalog.service("orders").is_none());

    let json = serde_json::to_string(&catalog).unwrap();
    assert_eq!(serde_json::from_str::<Catalog>(&json).unwrap(), catalog);
}

#[test]
fn an_identity_names_a_namespace_and_a_service_account() {
    let parts = identity_parts("spiffe://outrigger.local/ns/shop/sa/orders");
    assert_eq!(parts, Some(("shop", "orders")));
    for text in ["", "spiffe://a", "spiffe://a/ns/b", "https://a/ns/b/sa/c"] {
        assert_eq!(identity_parts(text), None, "{text}");
    }
}
