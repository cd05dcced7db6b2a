//! Which policies said something in a resource: what a proxy takes or refuses, it takes or refuses of these.

use std::collections::BTreeSet;

use outrigger_api::v1;
use outrigger_policy::{Key, Kind};

/// Of a service: its routes, and whoever said how it is called. An external service is its own object's.
pub(crate) fn of_service(service: &v1::Service) -> BTreeSet<Key> {
    let mut found = BTreeSet::new();
    for route in &service.routes {
        if let (Ok(kind), Some((namespace, name))) = (route.kind.parse(), route.name.split_once('/')) {
            found.insert(Key::new(kind, namespace, name));
        }
        for rule in &route.rules {
            found.extend(rule.traffic.iter().flat_map(of_traffic));
        }
    }
    found.extend(service.traffic.iter().flat_map(of_traffic));
    if service.source.split(',').any(|source| source == crate::sources::policy::NAME) {
        found.insert(Key::new(Kind::ExternalService, &service.namespace, &service.name));
    }
    found
}

/// Of a workload's side.
pub(crate) fn of_inbound(inbound: &v1::Inbound) -> BTreeSet<Key> {
    let mut found = BTreeSet::new();
    if let Some(access) = &inbound.access {
        found.extend(named(&access.default_origin));
        let names = access.policies.iter().filter_map(|policy| policy.name.split_once('/'));
        found.extend(names.map(|(namespace, name)| Key::new(Kind::AccessPolicy, namespace, name)));
    }
    found.extend(inbound.concurrency.iter().flat_map(|concurrency| named(&concurrency.origin)));
    found
}

fn of_traffic(traffic: &v1::Traffic) -> BTreeSet<Key> {
    let v1::Traffic { timeouts, retry, hedge, fault, load_balancer, breaker, bulkhead, health_check } =
        traffic;
    let origins = [
        timeouts.as_ref().map(|part| &part.origin),
        retry.as_ref().map(|part| &part.origin),
        hedge.as_ref().map(|part| &part.origin),
        fault.as_ref().map(|part| &part.origin),
        load_balancer.as_ref().map(|part| &part.origin),
        breaker.as_ref().map(|part| &part.origin),
        bulkhead.as_ref().map(|part| &part.origin),
        health_check.as_ref().map(|part| &part.origin),
    ];
    origins.into_iter().flatten().flat_map(|origin| named(origin)).collect()
}

/// The objects of an origin; of a field that several have written, `, ` stands between them.
fn named(origin: &str) -> impl Iterator<Item = Key> {
    origin.split(", ").filter_map(|name| name.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_that_names_a_policy_is_looked_at() {
        let key = |text: &str| text.parse::<Key>().unwrap();
        let by = |origin: &str| v1::Traffic {
            timeouts: Some(v1::Timeouts { origin: origin.to_owned(), ..Default::default() }),
            ..Default::default()
        };
        let service = v1::Service {
            name: "api".into(),
            namespace: "shop".into(),
            source: "consul,policy".into(),
            routes: vec![v1::Route {
                kind: "HTTPRoute".into(),
                name: "shop/split".into(),
                rules: vec![v1::RouteRule {
                    traffic: Some(by("TrafficPolicy shop/rule, HTTPRoute shop/split")),
                    ..Default::default()
                }],
                ..Default::default()
            }],
            traffic: Some(v1::Traffic {
                health_check: Some(v1::HealthCheck {
                    origin: "TrafficPolicy m/mesh".into(),
                    ..Default::default()
                }),
                retry: Some(v1::Retry::default()),
                ..by("TrafficPolicy shop/service")
            }),
            ..Default::default()
        };
        let want = [
            "TrafficPolicy m/mesh",
            "TrafficPolicy shop/rule",
            "TrafficPolicy shop/service",
            "ExternalService shop/api",
            "HTTPRoute shop/split",
        ];
        assert_eq!(of_service(&service), want.map(key).into());

        let inbound = v1::Inbound {
            access: Some(v1::Access {
                default_origin: "MeshDefaults m/default".into(),
                policies: vec![v1::AccessPolicy { name: "shop/pay".into(), ..Default::default() }],
                ..Default::default()
            }),
            concurrency: vec![v1::Concurrency {
                origin: "TrafficPolicy shop/limit".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let want = ["MeshDefaults m/default", "AccessPolicy shop/pay", "TrafficPolicy shop/limit"];
        assert_eq!(of_inbound(&inbound), want.map(key).into());
        assert!(of_inbound(&v1::Inbound::default()).is_empty());
    }
}
