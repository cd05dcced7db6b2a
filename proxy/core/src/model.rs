//! The catalog as one proxy sees it: what discovery pushed, checked once, in the form that decisions read.
//!
//! A push is untrusted input: conversion from the wire refuses what later code would have to doubt (bad addresses,
//! port 0, identities that do not parse are the caller's to check), and the refusal becomes a NACK that keeps
//! the last good value.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use outrigger_api::v1;

use crate::{route::Routes, traffic::Traffic};

/// A service and all its endpoints: an immutable snapshot, shared by all threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// `<name>.<namespace>`.
    pub name: Arc<str>,
    /// By service port. Key 0 stands for every port not listed.
    pub ports: BTreeMap<u16, Port>,
    /// Sorted by id, ids unique.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// "consul", "file".
    pub source: Arc<str>,
    /// Where requests to it go; those that hold for this client.
    pub routes: Routes,
    /// How it is called where no route takes a request; `None`: nobody has a policy.
    pub traffic: Option<Arc<Traffic>>,
    /// The other services that its routes name, sorted, each once.
    pub leads_to: Vec<Arc<str>>,
}

/// A port that clients dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The port's name, for people.
    pub name: Arc<str>,
    /// What it speaks, if anybody said so.
    pub protocol: Protocol,
}

/// One workload's address in a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Unique in its service, stable over pushes.
    pub id: Arc<str>,
    /// The workload's address.
    pub address: IpAddr,
    /// Service port -> port at the address. Key 0 stands for every port not listed. Empty: each port leads to itself.
    pub ports: BTreeMap<u16, u16>,
    /// 1 or more.
    pub weight: u32,
    /// What the source says of it.
    pub health: Health,
    /// The SPIFFE id that the peer must prove; `None`: not meshed, plaintext.
    pub identity: Option<Arc<str>>,
    /// Empty where unknown.
    pub zone: Arc<str>,
}

/// What a port speaks. A hint: `Detect` looks at the first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// Nobody said.
    #[default]
    Detect,
    /// HTTP/1.x.
    Http1,
    /// HTTP/2 with prior knowledge; gRPC.
    Http2,
    /// Bytes; never looked at.
    Tcp,
}

/// An endpoint's health, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// Takes its share.
    Healthy,
    /// Takes less.
    Degraded,
    /// Finishes what it has.
    Draining,
    /// Fails its checks.
    Unhealthy,
    /// Never chosen; only its own address leads there.
    Unready,
}

/// Where an address or a name leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// `<name>.<namespace>` of the service.
    pub service: Arc<str>,
    /// The service port; 0 for a name.
    pub port: u16,
    /// Set: exactly this endpoint.
    pub endpoint: Option<Arc<str>>,
    /// What DNS answers with.
    pub virtual_addresses: Vec<IpAddr>,
}

/// Why a pushed resource was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{resource}: {fault}")]
pub struct InvalidResource {
    resource: String,
    fault: String,
}

impl InvalidResource {
    /// `resource` is the resource's name, `fault` what is wrong with it.
    pub fn new(resource: &str, fault: impl Into<String>) -> Self {
        Self { resource: resource.to_owned(), fault: fault.into() }
    }
}

impl Service {
    /// Checks a pushed service; `client_namespace` is the own workload's, whose consumer routes hold.
    ///
    /// # Errors
    /// On an empty name, a port above 65,535, an address that is no IP address, an endpoint id that occurs twice, and
    /// what [`Routes::from_wire`] and [`Traffic::from_wire`] refuse.
    pub fn from_wire(wire: v1::Service, client_namespace: &str) -> Result<Self, InvalidResource> {
        let name = format!("{}.{}", wire.name, wire.namespace);
        let invalid = |fault: String| InvalidResource::new(&name, fault);
        if wire.name.is_empty() || wire.namespace.is_empty() {
            return Err(invalid("a service needs a name and a namespace".to_owned()));
        }
        let mut ports = BTreeMap::new();
        for port in wire.ports {
            let protocol = Protocol::from_wire(port.protocol());
            let number =
                u16::try_from(port.port).map_err(|_| invalid(format!("port {} is no port", port.port)))?;
            ports.insert(number, Port { name: port.name.into(), protocol });
        }
        let mut endpoints = Vec::with_capacity(wire.endpoints.len());
        for endpoint in wire.endpoints {
            endpoints.push(Arc::new(Endpoint::from_wire(endpoint).map_err(invalid)?));
        }
        endpoints.sort_by(|a, b| a.id.cmp(&b.id));
        if let Some(twice) = endpoints.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(invalid(format!("endpoint {} occurs twice", twice[0].id)));
        }
        let routes = Routes::from_wire(&wire.routes, client_namespace).map_err(invalid)?;
        let traffic = wire.traffic.as_ref().map(Traffic::from_wire).transpose().map_err(invalid)?;
        let leads_to = routes.leads_to().into_iter().filter(|service| **service != *name).collect();
        Ok(Self {
            name: name.into(),
            ports,
            endpoints,
            source: wire.source.into(),
            routes,
            traffic: traffic.map(Arc::new),
            leads_to,
        })
    }

    /// What `port` speaks; the entry for port 0 answers for ports not listed.
    pub fn protocol(&self, port: u16) -> Protocol {
        self.ports.get(&port).or_else(|| self.ports.get(&0)).map_or(Protocol::Detect, |p| p.protocol)
    }

    /// The endpoint of this id.
    pub fn endpoint(&self, id: &str) -> Option<&Arc<Endpoint>> {
        self.endpoints.binary_search_by(|e| (*e.id).cmp(id)).ok().map(|at| &self.endpoints[at])
    }
}

impl Endpoint {
    fn from_wire(wire: v1::Endpoint) -> Result<Self, String> {
        let id = wire.id.clone();
        if id.is_empty() {
            return Err("an endpoint needs an id".to_owned());
        }
        let health = match wire.health() {
            v1::Health::Unspecified | v1::Health::Healthy => Health::Healthy,
            v1::Health::Degraded => Health::Degraded,
            v1::Health::Draining => Health::Draining,
            v1::Health::Unhealthy => Health::Unhealthy,
            v1::Health::Unready => Health::Unready,
        };
        let address: IpAddr = wire
            .address
            .parse()
            .map_err(|_| format!("endpoint {id}: {:?} is no IP address", wire.address))?;
        // To dial 0.0.0.0 is to dial this host; see also the wildcard addresses that servers register by mistake.
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("endpoint {id}: {address} is nobody's address"));
        }
        let mut ports = BTreeMap::new();
        for (from, to) in wire.ports {
            let (Ok(from), Ok(to)) = (u16::try_from(from), u16::try_from(to)) else {
                return Err(format!("endpoint {id}: {from} -> {to} are no ports"));
            };
            if to == 0 {
                return Err(format!("endpoint {id}: port {from} leads to port 0"));
            }
            ports.insert(from, to);
        }
        Ok(Self {
            id: id.into(),
            address,
            ports,
            weight: wire.weight.max(1),
            health,
            identity: (!wire.identity.is_empty()).then(|| wire.identity.into()),
            zone: wire.locality.map(|l| l.zone).unwrap_or_default().into(),
        })
    }

    /// The socket address for a service port, if this endpoint serves it.
    pub fn socket_address(&self, service_port: u16) -> Option<SocketAddr> {
        if self.ports.is_empty() {
            return Some(SocketAddr::new(self.address, service_port));
        }
        let port = self.ports.get(&service_port).or_else(|| self.ports.get(&0))?;
        Some(SocketAddr::new(self.address, *port))
    }

    /// Whether it may be chosen for a service port.
    pub fn takes_part(&self, service_port: u16) -> bool {
        self.health != Health::Unready && self.socket_address(service_port).is_some()
    }
}

impl Protocol {
    /// The hint as pushed.
    pub fn from_wire(wire: v1::Protocol) -> Self {
        match wire {
            v1::Protocol::Unspecified => Self::Detect,
            v1::Protocol::Http1 => Self::Http1,
            v1::Protocol::Http2 | v1::Protocol::Grpc => Self::Http2,
            v1::Protocol::Tcp => Self::Tcp,
        }
    }
}

impl Destination {
    /// Checks a pushed destination; `name` is the resource's name.
    ///
    /// # Errors
    /// On an empty service, a port above 65,535 or a virtual address that is no IP address.
    pub fn from_wire(name: &str, wire: v1::Destination) -> Result<Self, InvalidResource> {
        let invalid = |fault: String| InvalidResource::new(name, fault);
        if wire.service.is_empty() {
            return Err(invalid("a destination needs a service".to_owned()));
        }
        let mut virtual_addresses = Vec::with_capacity(wire.virtual_addresses.len());
        for address in wire.virtual_addresses {
            virtual_addresses
                .push(address.parse().map_err(|_| invalid(format!("{address:?} is no IP address")))?);
        }
        Ok(Self {
            port: u16::try_from(wire.port).map_err(|_| invalid(format!("port {} is no port", wire.port)))?,
            service: wire.service.into(),
            endpoint: (!wire.endpoint.is_empty()).then(|| wire.endpoint.into()),
            virtual_addresses,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(id: &str) -> v1::Endpoint {
        v1::Endpoint {
            id: id.to_owned(),
            address: "10.0.0.1".to_owned(),
            ports: [(80, 8080)].into(),
            ..v1::Endpoint::default()
        }
    }

    fn service(endpoints: Vec<v1::Endpoint>) -> Result<Service, InvalidResource> {
        let wire = v1::Service {
            name: "s".to_owned(),
            namespace: "default".to_owned(),
            endpoints,
            ..v1::Service::default()
        };
        Service::from_wire(wire, "default")
    }

    #[test]
    fn a_service_is_sorted_and_found_by_id() {
        let service = service(vec![endpoint("b"), endpoint("a"), endpoint("c")]).unwrap();
        assert_eq!(&*service.name, "s.default");
        assert_eq!(service.endpoints.iter().map(|e| &*e.id).collect::<Vec<_>>(), ["a", "b", "c"]);
        let b = service.endpoint("b").unwrap();
        assert_eq!((b.weight, b.health, &b.identity), (1, Health::Healthy, &None));
        assert_eq!(b.socket_address(80), Some("10.0.0.1:8080".parse().unwrap()));
        assert_eq!(b.socket_address(81), None);
        assert!(b.takes_part(80) && !b.takes_part(81));
        assert_eq!(service.endpoint("d"), None);
    }

    #[test]
    fn a_pod_at_its_own_address_serves_each_port_as_it_is_and_is_not_chosen_unready() {
        let mut pod = endpoint("a");
        pod.ports.clear();
        pod.health = v1::Health::Unready.into();
        let service = service(vec![pod]).unwrap();
        let pod = service.endpoint("a").unwrap();
        assert_eq!(pod.socket_address(9100), Some("10.0.0.1:9100".parse().unwrap()));
        assert!(!pod.takes_part(9100));
    }

    #[test]
    fn what_later_code_would_have_to_doubt_is_refused() {
        let bad = |change: fn(&mut v1::Endpoint)| {
            let mut bad = endpoint("b");
            change(&mut bad);
            service(vec![endpoint("a"), bad]).unwrap_err().to_string()
        };
        for (error, text) in [
            (bad(|e| e.id.clear()), "s.default: an endpoint needs an id"),
            (bad(|e| "a".clone_into(&mut e.id)), "s.default: endpoint a occurs twice"),
            (
                bad(|e| "b.example".clone_into(&mut e.address)),
                "s.default: endpoint b: \"b.example\" is no IP address",
            ),
            (bad(|e| "::".clone_into(&mut e.address)), "s.default: endpoint b: :: is nobody's address"),
            (bad(|e| e.ports = [(80, 0)].into()), "s.default: endpoint b: port 80 leads to port 0"),
            (bad(|e| e.ports = [(80, 65_536)].into()), "s.default: endpoint b: 80 -> 65536 are no ports"),
        ] {
            assert_eq!(error, text);
        }
    }

    #[test]
    fn what_is_wrong_with_a_route_or_a_policy_is_said() {
        let route = v1::Route { kind: "Route".to_owned(), name: "n/r".to_owned(), ..v1::Route::default() };
        let hash = v1::LoadBalancer {
            algorithm: v1::load_balancer::Algorithm::Maglev.into(),
            hash: vec![v1::HashKey::default()],
            ..v1::LoadBalancer::default()
        };
        let traffic = v1::Traffic { load_balancer: Some(hash), ..v1::Traffic::default() };
        let wire =
            v1::Service { name: "s".to_owned(), namespace: "default".to_owned(), ..v1::Service::default() };
        for (wire, text) in [
            (
                v1::Service { routes: vec![route], ..wire.clone() },
                "s.default: Route n/r: a route is an HTTPRoute or",
            ),
            (v1::Service { traffic: Some(traffic), ..wire }, "s.default: load balancer: "),
        ] {
            let error = Service::from_wire(wire, "default").unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }

    #[test]
    fn a_destination_needs_a_service_and_real_addresses() {
        let wire = v1::Destination {
            service: "s.default".to_owned(),
            port: 80,
            virtual_addresses: vec!["253.0.0.1".to_owned()],
            ..v1::Destination::default()
        };
        let destination = Destination::from_wire("10.0.0.1:80", wire.clone()).unwrap();
        assert_eq!((destination.port, destination.endpoint), (80, None));
        for bad in [
            v1::Destination { service: String::new(), ..wire.clone() },
            v1::Destination { port: 65_536, ..wire.clone() },
            v1::Destination { virtual_addresses: vec!["x".to_owned()], ..wire },
        ] {
            assert!(Destination::from_wire("10.0.0.1:80", bad).is_err());
        }
    }
}
