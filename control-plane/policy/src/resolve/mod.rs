//! What all policies together come to: for each service how it is called, for each workload who may call it.
//!
//! A pure function of the objects and of the catalog; the order in which objects were written only counts where two of them conflict,
//! by the time that is written in them. It is computed anew with every change: a policy whose target appears later then holds without
//! anybody writing it again, and what a status says is what proxies are told. What comes out are the wire's messages, which proxies
//! evaluate, and `explain` with the proxies' own code.

mod access;
mod condition;
mod external;
mod inbound;
mod layers;
mod routes;
mod rules;
mod services;
mod targets;
#[cfg(test)]
pub(crate) mod tests;
mod traffic;

use std::collections::BTreeMap;

use outrigger_api::v1;

pub use self::condition::{Condition, ConditionReason, ConditionStatus, ConditionType};
pub use self::external::External;
pub use self::inbound::{InboundPolicy, Outbound};

use self::condition::Conditions;
use self::inbound::Servers;
use self::layers::Layer;
use self::services::Services;
use self::targets::Targets;
use crate::catalog::{Catalog, split_service};
use crate::kind::Key;
use crate::object::{Policies, Stored};

/// All objects, the oldest first, then by `<namespace>/<name>`, as the Gateway API orders them.
type ByAge<'a> = Vec<(&'a Key, &'a Stored)>;

/// What all policies together come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resolved {
    /// Services that a route or a `TrafficPolicy` names.
    services: BTreeMap<String, ServicePolicy>,
    /// The others, by namespace, where one has a `TrafficPolicy`.
    namespaces: BTreeMap<String, ServicePolicy>,
    /// The others.
    mesh: ServicePolicy,
    servers: Servers,
    externals: Vec<External>,
    conditions: Conditions,
}

/// The client's side of a service: what `v1::Service` has of policies.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServicePolicy {
    /// Those of producers and of consumers; a client keeps those that are for its namespace.
    pub routes: Vec<v1::Route>,
    /// What holds where no route takes a request.
    pub traffic: Option<v1::Traffic>,
}

/// Resolves targets, precedence and conflicts.
pub fn resolve(policies: &Policies, catalog: &Catalog) -> Resolved {
    let mut by_age: ByAge<'_> = policies.iter().map(|(key, stored)| (key, &**stored)).collect();
    by_age.sort_by_cached_key(|(key, stored)| {
        (stored.created, format!("{}/{}", key.namespace, key.name), key.kind)
    });
    let mut conditions = Conditions::default();
    let externals = external::accept(&by_age, catalog, &mut conditions);
    let services = Services::new(catalog, &externals);
    let targets = Targets::new(&by_age, policies, &services, &catalog.mesh_namespace, &mut conditions);
    let of_others = |namespace: &str| {
        let traffic = Layer::merged(targets.of_service("", namespace)).to_wire();
        ServicePolicy { routes: Vec::new(), traffic }
    };
    Resolved {
        services: routes::services(&by_age, &services, &targets, &mut conditions),
        namespaces: targets.namespaces().map(|name| (name.to_owned(), of_others(name))).collect(),
        mesh: of_others(""),
        servers: Servers::new(&by_age, &services, targets, catalog, &mut conditions),
        externals,
        conditions,
    }
}

impl Resolved {
    /// The client's side of the service `<name>.<namespace>`, whether or not it is there.
    pub fn service(&self, name: &str) -> ServicePolicy {
        let of_namespace = || {
            split_service(name)
                .and_then(|(_, namespace)| self.namespaces.get(namespace))
                .unwrap_or(&self.mesh)
        };
        self.services.get(name).unwrap_or_else(of_namespace).clone()
    }

    /// The `ExternalService`s that are in force, by service name.
    pub fn externals(&self) -> &[External] {
        &self.externals
    }

    /// What became of an object. Of a route, for each parent that is a Service: `Accepted`, then `ResolvedRefs`.
    pub fn conditions(&self, key: &Key) -> &[Condition] {
        self.conditions.of(key)
    }
}
