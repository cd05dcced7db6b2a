//! A catalog for tests that have no controller: every service that a policy or a case names is there, at the ports that
//! they name, with one workload.
//!
//! So a repository can test its policies in CI as it is. What cannot be made up is which workloads have which labels: an `AccessPolicy`
//! for labels is about nobody here, and tests of it take a catalog from a file or a controller.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use outrigger_policy::{
    Catalog, Object, Spec,
    catalog::{CatalogEndpoint, CatalogHealth, CatalogPort, CatalogService, split_service},
    kinds::{AccessTargetKind, BackendRef, Case, ParentReference, TrafficTargetKind},
};

/// The port of a service of which nobody names one.
const PORT: u16 = 80;
/// Addresses of the workloads: RFC 2544's range, which no real one is in.
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

/// The ports of services, by namespace and name.
#[derive(Default)]
struct Named(BTreeMap<(String, String), BTreeSet<u16>>);

/// The services that `objects` and `cases` name.
pub(super) fn catalog<'a>(
    objects: impl IntoIterator<Item = &'a Object>,
    cases: impl IntoIterator<Item = &'a Case>,
) -> Catalog {
    let (mut named, mut external) = (Named::default(), BTreeSet::new());
    for object in objects {
        let namespace = &object.metadata.namespace;
        match &object.spec {
            Spec::MeshDefaults(_) => {}
            Spec::ExternalService(_) => {
                external.insert((namespace.clone(), object.metadata.name.clone()));
            }
            Spec::TrafficPolicy(policy) => {
                let target = &policy.target_ref;
                if let (TrafficTargetKind::Service, Some(name)) = (target.kind, &target.name) {
                    named.add(namespace, name, target.port);
                }
            }
            Spec::AccessPolicy(policy) => {
                let target = &policy.target_ref;
                if let (AccessTargetKind::Service, Some(name)) = (target.kind, &target.name) {
                    named.add(namespace, name, target.port);
                }
            }
            Spec::HttpRoute(route) => {
                named.add_parents(namespace, &route.parent_refs);
                route.rules.iter().for_each(|rule| named.add_backends(namespace, &rule.backend_refs));
            }
            Spec::GrpcRoute(route) => {
                named.add_parents(namespace, &route.parent_refs);
                route.rules.iter().for_each(|rule| named.add_backends(namespace, &rule.backend_refs));
            }
        }
    }
    for case in cases {
        named.add_full(&case.to.service, case.to.port);
        if let Some(service) = &case.from.service {
            named.add_full(service, None);
        }
    }
    named.0.retain(|service, _| !external.contains(service));
    let mut catalog = Catalog::default();
    let services = named.0.into_iter().zip(u32::from(FIRST_ADDRESS)..);
    let trust_domain = &catalog.trust_domain;
    catalog.services =
        services.map(|(service, address)| made_up(service, address.into(), trust_domain)).collect();
    catalog
}

impl Named {
    fn add(&mut self, namespace: &str, name: &str, port: Option<u16>) {
        self.0.entry((namespace.to_owned(), name.to_owned())).or_default().extend(port);
    }

    fn add_full(&mut self, service: &str, port: Option<u16>) {
        if let Some((name, namespace)) = split_service(service) {
            self.add(namespace, name, port);
        }
    }

    fn add_parents(&mut self, namespace: &str, parents: &[ParentReference]) {
        for parent in parents.iter().filter(|parent| parent.is_service()) {
            self.add(parent.namespace.as_deref().unwrap_or(namespace), &parent.name, parent.port);
        }
    }

    fn add_backends<F>(&mut self, namespace: &str, backends: &[BackendRef<F>]) {
        for backend in backends {
            self.add(backend.namespace.as_deref().unwrap_or(namespace), &backend.name, backend.port);
        }
    }
}

fn made_up(
    ((namespace, name), mut ports): ((String, String), BTreeSet<u16>),
    address: Ipv4Addr,
    trust_domain: &str,
) -> CatalogService {
    if ports.is_empty() {
        ports.insert(PORT);
    }
    let endpoint = CatalogEndpoint {
        id: format!("{name}-1"),
        address: address.into(),
        ports: ports.iter().map(|port| (*port, *port)).collect(),
        identity: Some(format!("spiffe://{trust_domain}/ns/{namespace}/sa/{name}")),
        zone: String::new(),
        health: CatalogHealth::default(),
        labels: BTreeMap::new(),
        probes: Vec::new(),
    };
    let ports = ports.into_iter().map(|port| CatalogPort { port, ..CatalogPort::default() }).collect();
    CatalogService { name, namespace, ports, endpoints: vec![endpoint] }
}
