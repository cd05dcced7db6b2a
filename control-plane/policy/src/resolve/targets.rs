//! Which `TrafficPolicy` holds for what: one per target, the oldest.
//!
//! A target that does not exist (yet) has no policy; as soon as it does, the policy holds without another write. The younger of two
//! policies with one target waits in the same way for the older one to go.

use std::collections::BTreeMap;

use outrigger_core::traffic::Traffic;

use super::condition::{Condition, ConditionReason, Conditions};
use super::layers::Layer;
use super::services::Services;
use super::{ByAge, traffic};
use crate::kind::{Key, Kind};
use crate::kinds::{TrafficTarget, TrafficTargetKind};
use crate::object::{Policies, Spec};

/// Why a policy does not hold.
type Refusal = (ConditionReason, String);

/// What a `TrafficPolicy` is about. A service is `<name>.<namespace>`, a rule its number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Mesh,
    Namespace(String),
    Service(String),
    Port(String, u16),
    Route(Key),
    Rule(Key, usize),
}

impl Target {
    fn is_of_a_whole_service(&self) -> bool {
        matches!(self, Self::Mesh | Self::Namespace(_) | Self::Service(_))
    }

    fn is_of_a_route(&self) -> bool {
        matches!(self, Self::Route(_) | Self::Rule(..))
    }
}

/// What holds for each target that has a policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Targets(BTreeMap<Target, (Key, Layer)>);

impl Targets {
    pub(crate) fn new(
        by_age: &ByAge<'_>,
        policies: &Policies,
        services: &Services,
        mesh_namespace: &str,
        conditions: &mut Conditions,
    ) -> Self {
        let mut targets = Self::default();
        for (key, stored) in by_age {
            let Spec::TrafficPolicy(policy) = &stored.object.spec else { continue };
            let placed = target(key, &policy.target_ref, policies, services, mesh_namespace)
                .and_then(|target| targets.place(key, target, traffic::layer(policy, &key.to_string())));
            match placed {
                Err((reason, message)) => conditions.add(key, Condition::refused(reason, message)),
                Ok(partial) => {
                    conditions.add(key, Condition::accepted("it holds for its target"));
                    if let Some(message) = partial {
                        conditions.add(key, Condition::partial(message));
                    }
                }
            }
        }
        targets
    }

    /// Gives it the target if nobody has it. What of it has no effect there is said.
    fn place(&mut self, key: &Key, target: Target, mut layer: Layer) -> Result<Option<String>, Refusal> {
        if let Some((older, _)) = self.0.get(&target) {
            let message = format!("{older} has the same target and came first; one of them must go");
            return Err((ConditionReason::Conflicted, message));
        }
        let partial = without_effect(&target, &mut layer);
        // What sidecars would refuse they would refuse with the whole service.
        if let Some(Err(fault)) = layer.to_wire().map(|wire| Traffic::from_wire(&wire)) {
            return Err((ConditionReason::Invalid, fault));
        }
        self.0.insert(target, (key.clone(), layer));
        Ok(partial)
    }

    pub(crate) fn get(&self, target: &Target) -> Option<&Layer> {
        self.0.get(target).map(|(_, layer)| layer)
    }

    /// What holds for a service as a whole, the least specific first.
    pub(crate) fn of_service(&self, service: &str, namespace: &str) -> Vec<&Layer> {
        let targets =
            [Target::Mesh, Target::Namespace(namespace.to_owned()), Target::Service(service.to_owned())];
        targets.iter().filter_map(|target| self.get(target)).collect()
    }

    /// The ports of a service that have a policy of their own.
    pub(crate) fn ports_of(&self, service: &str) -> impl Iterator<Item = u16> {
        let range = Target::Port(service.to_owned(), 0)..=Target::Port(service.to_owned(), u16::MAX);
        self.0.range(range).filter_map(|(target, _)| match target {
            Target::Port(_, port) => Some(*port),
            _ => None,
        })
    }

    /// The namespaces and the services that have a policy of their own, or of a port.
    pub(crate) fn services(&self) -> impl Iterator<Item = &str> {
        self.0.keys().filter_map(|target| match target {
            Target::Service(service) | Target::Port(service, _) => Some(&**service),
            _ => None,
        })
    }

    pub(crate) fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.0.keys().filter_map(|target| match target {
            Target::Namespace(namespace) => Some(&**namespace),
            _ => None,
        })
    }
}

/// Takes out what the target cannot have, and says so.
fn without_effect(target: &Target, layer: &mut Layer) -> Option<String> {
    let mut taken = Vec::new();
    if !target.is_of_a_whole_service() {
        taken = layer.take_whole_service_fields();
    }
    if target.is_of_a_route() && layer.concurrency.take().is_some() {
        taken.push("concurrency");
    }
    (!taken.is_empty()).then(|| {
        format!(
            "{} cannot be of a port, a route or a rule, and has no effect: target the Service",
            taken.join(", ")
        )
    })
}

fn target(
    key: &Key,
    target: &TrafficTarget,
    policies: &Policies,
    services: &Services,
    mesh_namespace: &str,
) -> Result<Target, Refusal> {
    let invalid = |message: &str| (ConditionReason::Invalid, message.to_owned());
    if target.namespace.as_ref().is_some_and(|namespace| *namespace != key.namespace) {
        return Err(invalid("a TrafficPolicy can only be about its own namespace: write it there"));
    }
    let name = || target.name.clone().ok_or_else(|| invalid("targetRef.name is missing"));
    match target.kind {
        TrafficTargetKind::Mesh if key.namespace != mesh_namespace => Err(invalid(&format!(
            "the mesh can only be the target of a policy in namespace {mesh_namespace}"
        ))),
        TrafficTargetKind::Mesh => Ok(Target::Mesh),
        TrafficTargetKind::Namespace => Ok(Target::Namespace(key.namespace.clone())),
        TrafficTargetKind::Service => {
            let service = format!("{}.{}", name()?, key.namespace);
            services
                .check(&service, target.port)
                .map_err(|fault| (ConditionReason::TargetNotFound, fault))?;
            Ok(match target.port {
                Some(port) => Target::Port(service, port),
                None => Target::Service(service),
            })
        }
        TrafficTargetKind::HttpRoute => route(key, Kind::HttpRoute, name()?, target, policies),
        TrafficTargetKind::GrpcRoute => route(key, Kind::GrpcRoute, name()?, target, policies),
    }
}

fn route(
    policy: &Key,
    kind: Kind,
    name: String,
    target: &TrafficTarget,
    policies: &Policies,
) -> Result<Target, Refusal> {
    let key = Key::new(kind, &policy.namespace, name);
    let not_found = |message: String| (ConditionReason::TargetNotFound, message);
    let route = policies.get(&key).ok_or_else(|| not_found(format!("there is no {key}")))?;
    let Some(section) = &target.section_name else { return Ok(Target::Route(key)) };
    let names: Vec<Option<&str>> = match &route.object.spec {
        Spec::HttpRoute(route) => route.rules.iter().map(|rule| rule.name.as_deref()).collect(),
        Spec::GrpcRoute(route) => route.rules.iter().map(|rule| rule.name.as_deref()).collect(),
        _ => Vec::new(),
    };
    let by_name = names.iter().position(|name| *name == Some(section));
    let by_number = || section.strip_prefix("rule-")?.parse().ok().filter(|number| *number < names.len());
    match by_name.or_else(by_number) {
        Some(rule) => Ok(Target::Rule(key, rule)),
        None => Err(not_found(format!("{key} has no rule {section}"))),
    }
}
