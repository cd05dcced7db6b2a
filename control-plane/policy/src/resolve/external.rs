//! Services outside the mesh: which `ExternalService`s are in force.
//!
//! A name leads to one service. Of two objects that claim a host, or a service of the catalog and an object of its name, the one that
//! was there first stays: nobody takes a destination away from others by writing an object. The mesh's own names cannot be claimed.

use std::collections::{BTreeMap, BTreeSet};

use outrigger_api::MAX_EXTERNAL_HOSTS;

use super::ByAge;
use super::condition::{Condition, ConditionReason, Conditions};
use crate::catalog::Catalog;
use crate::kind::Key;
use crate::kinds::{ExternalEndpoint, ExternalPort, ExternalService};
use crate::object::Spec;

/// Names under these are the mesh's.
const OWN_SUFFIXES: [&str; 2] = [".mesh", ".consul"];

/// An `ExternalService` that is in force.
#[derive(Debug, Clone, PartialEq)]
pub struct External {
    /// `<name>.<namespace>`, as any service.
    pub service: String,
    /// The object.
    pub key: Key,
    /// Names that workloads dial, in lower case.
    pub hosts: Vec<String>,
    /// Ports that workloads dial.
    pub ports: Vec<ExternalPort>,
    /// Where it is; `None`: the hosts are resolved by DNS.
    pub endpoints: Option<Vec<ExternalEndpoint>>,
    /// The SPIFFE id that its endpoints prove; `None`: plaintext, or the application's own TLS.
    pub identity: Option<String>,
}

pub(crate) fn accept(by_age: &ByAge<'_>, catalog: &Catalog, conditions: &mut Conditions) -> Vec<External> {
    let of_catalog: BTreeSet<String> =
        catalog.services.iter().map(|service| format!("{}.{}", service.name, service.namespace)).collect();
    let mut claimed: BTreeMap<String, &Key> = BTreeMap::new();
    let mut accepted = Vec::new();
    for &(key, stored) in by_age {
        let Spec::ExternalService(spec) = &stored.object.spec else { continue };
        let external = external(key, spec);
        if let Some((reason, message)) = fault(&external, &of_catalog, &claimed) {
            conditions.add(key, Condition::refused(reason, message));
            continue;
        }
        claimed.extend(external.hosts.iter().map(|host| (host.clone(), key)));
        conditions.add(key, Condition::accepted(format!("its hosts lead to service {}", external.service)));
        accepted.push(external);
    }
    accepted.sort_by(|a, b| a.service.cmp(&b.service));
    accepted
}

fn external(key: &Key, spec: &ExternalService) -> External {
    External {
        service: format!("{}.{}", key.name, key.namespace),
        key: key.clone(),
        hosts: spec.hosts.iter().map(|host| host.trim_end_matches('.').to_ascii_lowercase()).collect(),
        ports: spec.ports.clone(),
        endpoints: spec.endpoints.clone(),
        identity: spec.identity.clone(),
    }
}

fn fault(
    external: &External,
    of_catalog: &BTreeSet<String>,
    claimed: &BTreeMap<String, &Key>,
) -> Option<(ConditionReason, String)> {
    if of_catalog.contains(&external.service) {
        let message = format!("the catalog has a service {} already: choose another name", external.service);
        return Some((ConditionReason::Conflicted, message));
    }
    if claimed.len() + external.hosts.len() > MAX_EXTERNAL_HOSTS {
        // Every proxy knows every host.
        let message = format!(
            "older objects name {} hosts, and a mesh has at most {MAX_EXTERNAL_HOSTS}",
            claimed.len()
        );
        return Some((ConditionReason::LimitReached, message));
    }
    external.hosts.iter().find_map(|host| {
        if OWN_SUFFIXES.iter().any(|suffix| host.ends_with(suffix)) {
            return Some((ConditionReason::Invalid, format!("{host} is a name of the mesh")));
        }
        let older = claimed.get(host)?;
        Some((ConditionReason::Conflicted, format!("{host} is a host of {older}, which is older")))
    })
}
