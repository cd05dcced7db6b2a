//! Which services and ports there are, for everything that refers to one.

use std::collections::{BTreeMap, BTreeSet};

use super::external::External;
use crate::catalog::{self, Catalog, Grant};
use crate::kind::Key;
use crate::kinds::ParentReference;

/// The services of the catalog and of `ExternalService`s, by `<name>.<namespace>`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Services {
    ports: BTreeMap<String, Ports>,
    grants: Option<BTreeSet<Grant>>,
}

/// A service's ports.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Ports {
    /// With their names.
    listed: BTreeMap<u16, String>,
    /// Any other port leads somewhere as well (a Consul service's).
    any: bool,
}

impl Services {
    pub(crate) fn new(catalog: &Catalog, externals: &[External]) -> Self {
        let of_catalog = catalog.services.iter().map(|service| {
            let listed = service.ports.iter().filter(|port| port.port != 0);
            let ports = Ports {
                any: service.ports.is_empty() || service.ports.iter().any(|port| port.port == 0),
                listed: listed.map(|port| (port.port, port.name.clone())).collect(),
            };
            (format!("{}.{}", service.name, service.namespace), ports)
        });
        let of_externals = externals.iter().map(|external| {
            let listed = external.ports.iter().map(|port| (port.port, port.name.clone().unwrap_or_default()));
            (external.service.clone(), Ports { any: false, listed: listed.collect() })
        });
        // The catalog's win: an ExternalService of the same name is not accepted.
        let ports = of_externals.chain(of_catalog).collect();
        Self { ports, grants: catalog.grants.clone() }
    }

    pub(crate) fn get(&self, service: &str) -> Option<&Ports> {
        self.ports.get(service)
    }

    /// Whether a route may name the Service as a backend.
    pub(crate) fn permit(
        &self,
        route: &Key,
        parents: &[ParentReference],
        namespace: &str,
        name: &str,
    ) -> bool {
        catalog::permits(self.grants.as_ref(), route, parents, namespace, name)
    }

    /// Why there is no such service, or no such port of it.
    pub(crate) fn check(&self, service: &str, port: Option<u16>) -> Result<&Ports, String> {
        let ports = self.get(service).ok_or_else(|| format!("there is no service {service}"))?;
        match port {
            Some(port) if !ports.has(port) => Err(format!("service {service} has no port {port}")),
            _ => Ok(ports),
        }
    }
}

impl Ports {
    pub(crate) fn has(&self, port: u16) -> bool {
        self.any || self.listed.contains_key(&port)
    }

    pub(crate) fn named(&self, name: &str) -> Option<u16> {
        self.listed.iter().find(|(_, own)| *own == name).map(|(port, _)| *port)
    }

    /// All of them; `None`: they cannot be listed.
    pub(crate) fn all(&self) -> Option<Vec<u16>> {
        (!self.any).then(|| self.listed.keys().copied().collect())
    }
}
