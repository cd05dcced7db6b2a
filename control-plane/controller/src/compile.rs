//! Catalog and claims as the wire's resources.
//!
//! A resource's version is a hash of its content, so that it is the same after a restart of the controller: proxies
//! that reconnect and echo their versions are sent nothing that they have.

use std::net::IpAddr;
use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use outrigger_api::{type_url, v1};
use outrigger_policy::Key;
use prost::Message;

use crate::catalog::Service;
use crate::claims::Claim;
use crate::sources::{Instance, Workload};
use crate::tokens::hex;

pub(crate) mod origins;

/// Bytes of the hash in a version: 96 bits, which no two contents share by accident.
const VERSION_BYTES: usize = 12;

/// The resource types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// `Destination`
    Destination,
    /// `Service`
    Service,
    /// `Inbound`
    Inbound,
    /// `Mesh`
    Mesh,
    /// `TrustBundle`
    TrustBundle,
}

impl Kind {
    /// Every kind.
    pub(crate) const ALL: [Self; 5] =
        [Self::Mesh, Self::TrustBundle, Self::Inbound, Self::Service, Self::Destination];

    /// The type URL of the kind.
    pub(crate) fn type_url(self) -> &'static str {
        match self {
            Self::Destination => type_url::DESTINATION,
            Self::Service => type_url::SERVICE,
            Self::Inbound => type_url::INBOUND,
            Self::Mesh => type_url::MESH,
            Self::TrustBundle => type_url::TRUST_BUNDLE,
        }
    }

    /// The kind of a type URL.
    pub(crate) fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// The message's name, for people.
    pub(crate) fn name(self) -> &'static str {
        self.type_url().rsplit('.').next().unwrap_or_default()
    }
}

/// A resource, ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Compiled {
    /// A hash of the content.
    pub(crate) version: Arc<str>,
    /// The message in its envelope.
    pub(crate) any: prost_types::Any,
    /// The policies that said something in it, in order.
    pub(crate) origins: Arc<[Key]>,
}

impl Compiled {
    /// Wraps a message without maps: their order on the wire is not fixed, see [`service`].
    pub(crate) fn new(kind: Kind, message: &impl Message) -> Self {
        let value = message.encode_to_vec();
        let mut hash = Context::new(&SHA256);
        hash.update(&value);
        Self::with_hash(kind, value, hash)
    }

    fn with_hash(kind: Kind, value: Vec<u8>, hash: Context) -> Self {
        let digest = hash.finish();
        let version = hex(&digest.as_ref()[..VERSION_BYTES]).into();
        let any = prost_types::Any { type_url: kind.type_url().to_owned(), value };
        Self { version, any, origins: Arc::from([]) }
    }

    /// The same, said by these policies.
    pub(crate) fn by(self, origins: std::collections::BTreeSet<Key>) -> Self {
        Self { origins: origins.into_iter().collect(), ..self }
    }
}

/// A service with its endpoints. `claim` finds the claim on an instance, if there is one.
pub(crate) fn message<'a>(service: &Service, claim: impl Fn(&Instance) -> Option<&'a Claim>) -> v1::Service {
    let spec = &service.spec;
    let mut ports: Vec<v1::service::Port> = spec
        .ports
        .iter()
        .map(|port| v1::service::Port {
            port: port.port.into(),
            name: port.name.clone(),
            protocol: port.protocol.into(),
        })
        .collect();
    if ports.is_empty() {
        ports.push(v1::service::Port { port: 0, name: String::new(), protocol: spec.protocol.into() });
    }
    v1::Service {
        name: spec.key.name().to_owned(),
        namespace: spec.key.namespace().to_owned(),
        ports,
        endpoints: spec.instances.iter().map(|instance| endpoint(instance, claim(instance))).collect(),
        source: service.source.to_string(),
        ..v1::Service::default()
    }
}

/// A workload that was dialled at its own address: each port leads to itself.
pub(crate) fn workload(workload: &Workload, source: &str) -> v1::Service {
    let endpoint = |address: &IpAddr| v1::Endpoint {
        id: address.to_string(),
        address: address.to_string(),
        weight: 1,
        health: if workload.terminating { v1::Health::Draining } else { v1::Health::Healthy }.into(),
        identity: workload.identity.clone().unwrap_or_default(),
        locality: locality(&workload.region, &workload.zone),
        ..v1::Endpoint::default()
    };
    v1::Service {
        name: workload.key.name().to_owned(),
        namespace: workload.key.namespace().to_owned(),
        ports: vec![v1::service::Port::default()],
        endpoints: workload.addresses.iter().map(endpoint).collect(),
        source: source.to_owned(),
        ..v1::Service::default()
    }
}

/// Of the client's own zone as long as there are any, where no policy says how to balance.
pub(crate) fn prefer_own_zone(message: &mut v1::Service) {
    let traffic = message.traffic.get_or_insert_default();
    let nearest = || v1::LoadBalancer { zone_percent: 1, ..v1::LoadBalancer::default() };
    traffic.load_balancer.get_or_insert_with(nearest);
}

/// Of one node only: nobody on it chooses the others, which can be dialled still. `node` is empty where it is not known.
pub(crate) fn keep_to_node(message: &mut v1::Service, instances: &[Instance], node: &str) {
    if node.is_empty() {
        return;
    }
    for endpoint in &mut message.endpoints {
        // Both are sorted by id.
        let at = instances.binary_search_by(|instance| instance.id.cmp(&endpoint.id));
        if at.is_ok_and(|at| *instances[at].node != *node) {
            endpoint.set_health(v1::Health::Unready);
        }
    }
}

/// Where somebody is; `None` where nothing is known.
pub(crate) fn locality(region: &str, zone: &str) -> Option<v1::Locality> {
    (!region.is_empty() || !zone.is_empty())
        .then(|| v1::Locality { region: region.to_owned(), zone: zone.to_owned() })
}

/// Leaves out endpoints without an identity where another endpoint of the service has one or had one once (`meshed`),
/// unless a file names them.
///
/// Whoever may write to Consul can register an address under any name; in a service that is meshed, such an address
/// gets nothing, neither traffic in the clear nor a share of it. What a file says, its author says.
pub(crate) fn drop_strangers(message: &mut v1::Service, meshed: bool) {
    let open_registry = message.source != "file";
    let has_identity = |endpoint: &v1::Endpoint| !endpoint.identity.is_empty();
    if open_registry && (meshed || message.endpoints.iter().any(has_identity)) {
        message.endpoints.retain(has_identity);
    }
}

/// The same, ready to be sent.
pub(crate) fn service(mut message: v1::Service) -> Compiled {
    let origins = origins::of_service(&message);
    // `Endpoint.ports` is a map, whose entries prost writes in no fixed order: they go into the hash by themselves.
    let ports: Vec<_> =
        message.endpoints.iter_mut().map(|endpoint| std::mem::take(&mut endpoint.ports)).collect();
    let mut hash = Context::new(&SHA256);
    hash.update(&message.encode_to_vec());
    for (endpoint, ports) in message.endpoints.iter_mut().zip(ports) {
        let mut sorted: Vec<_> = ports.iter().collect();
        sorted.sort_unstable();
        for (port, target) in sorted {
            hash.update(&port.to_be_bytes());
            hash.update(&target.to_be_bytes());
        }
        hash.update(b"endpoint");
        endpoint.ports = ports;
    }
    Compiled::with_hash(Kind::Service, message.encode_to_vec(), hash).by(origins)
}

/// Where an address or a name leads.
pub(crate) fn destination(
    service: &str,
    port: u16,
    endpoint: &str,
    virtual_addresses: &[IpAddr],
) -> Compiled {
    Compiled::new(
        Kind::Destination,
        &v1::Destination {
            service: service.to_owned(),
            port: port.into(),
            endpoint: endpoint.to_owned(),
            virtual_addresses: virtual_addresses.iter().map(IpAddr::to_string).collect(),
        },
    )
}

fn endpoint(instance: &Instance, claim: Option<&Claim>) -> v1::Endpoint {
    let (identity, draining) = match (&instance.identity, claim) {
        // What the source vouches for stands; a claim by the same identity can only say that it leaves.
        (Some(identity), claim) => (
            identity.clone(),
            claim.is_some_and(|claim| claim.draining && claim.identity.as_str() == identity),
        ),
        (None, Some(claim)) => (claim.identity.to_string(), claim.draining),
        (None, None) => (String::new(), false),
    };
    let health = if draining { v1::Health::Draining } else { instance.health };
    v1::Endpoint {
        id: instance.id.clone(),
        address: instance.address.to_string(),
        ports: instance.ports.iter().map(|(port, target)| ((*port).into(), (*target).into())).collect(),
        weight: instance.weight.clamp(1, u32::from(u16::MAX)),
        health: health.into(),
        identity,
        locality: locality(&instance.region, &instance.zone),
    }
}

#[cfg(test)]
mod tests;
