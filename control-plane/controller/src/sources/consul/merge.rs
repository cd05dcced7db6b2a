//! Consul's instances as a service of the catalog.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use outrigger_api::v1;
use outrigger_consul as consul;

use crate::sources::{Instance, ServiceKey, SourceService};

/// Makes the service `key` of all its instances. `domain`: of Consul's DNS names; services in the mesh's `default_namespace` have
/// no namespace in Consul.
pub(super) fn service<'a>(
    key: &ServiceKey,
    domain: &str,
    default_namespace: &str,
    instances: impl Iterator<Item = &'a consul::Instance>,
) -> SourceService {
    let mut out = BTreeMap::new();
    let mut virtual_addresses: BTreeSet<IpAddr> = BTreeSet::new();
    let mut datacenters = BTreeSet::new();
    let mut hints = BTreeSet::new();
    for instance in instances {
        virtual_addresses.extend(instance.virtual_address);
        datacenters.insert(instance.region());
        hints.extend(instance.protocol.as_deref());
        let id = instance.id.to_string();
        out.insert(id.clone(), endpoint(id, instance));
    }
    let names = names(key, domain, default_namespace, &datacenters, !virtual_addresses.is_empty());
    SourceService {
        key: key.clone(),
        ports: Vec::new(),
        protocol: protocol(&hints),
        virtual_addresses: virtual_addresses.into_iter().collect(),
        names,
        reach: crate::sources::Reach::default(),
        instances: out.into_values().collect(),
    }
}

fn endpoint(id: String, instance: &consul::Instance) -> Instance {
    Instance {
        id,
        address: instance.address.ip(),
        ports: BTreeMap::from([(0, instance.address.port())]),
        weight: instance.weight.max(1),
        health: match instance.health {
            consul::Health::Passing => v1::Health::Healthy,
            // A warning weight of 0 is Consul's way to say "not while it warns".
            consul::Health::Warning if instance.weight == 0 => v1::Health::Unhealthy,
            consul::Health::Warning => v1::Health::Degraded,
            consul::Health::Critical => v1::Health::Unhealthy,
            consul::Health::Maintenance => v1::Health::Draining,
        },
        // Consul's word is no proof of identity: the instance's own sidecar claims it.
        identity: None,
        region: instance.region().to_owned(),
        zone: instance.zone.clone().unwrap_or_default(),
        node: std::sync::Arc::default(),
        labels: instance.meta.clone().into(),
    }
}

/// What all instances with a hint agree on.
fn protocol(hints: &BTreeSet<&str>) -> v1::Protocol {
    let mut protocols = hints.iter().map(|hint| match *hint {
        "http" | "http1" | "http/1.1" => v1::Protocol::Http1,
        "http2" | "h2" | "h2c" => v1::Protocol::Http2,
        "grpc" => v1::Protocol::Grpc,
        "tcp" => v1::Protocol::Tcp,
        _ => v1::Protocol::Unspecified,
    });
    match protocols.next() {
        Some(first) if protocols.all(|other| other == first) => first,
        _ => v1::Protocol::Unspecified,
    }
}

/// The names that Consul's DNS gives the service.
fn names(
    key: &ServiceKey,
    domain: &str,
    default_namespace: &str,
    datacenters: &BTreeSet<&str>,
    has_virtual: bool,
) -> Vec<String> {
    let name = key.name();
    let mut names = Vec::new();
    if key.namespace() == default_namespace {
        names.push(format!("{name}.service.{domain}"));
        names.extend(
            datacenters.iter().map(|dc| format!("{name}.service.{}.{domain}", dc.to_ascii_lowercase())),
        );
        if has_virtual {
            names.push(format!("{name}.virtual.{domain}"));
        }
    } else {
        let namespace = key.namespace();
        names.push(format!("{name}.service.{namespace}.ns.{domain}"));
        let with_dc =
            |dc: &&str| format!("{name}.service.{namespace}.ns.{}.dc.{domain}", dc.to_ascii_lowercase());
        names.extend(datacenters.iter().map(with_dc));
        if has_virtual {
            names.push(format!("{name}.virtual.{namespace}.ns.{domain}"));
        }
    }
    names
}
