//! What those lose that stay, when an object goes.
//!
//! It is said and never refused: a deletion is how what hurts is taken away, and what refers to it may go next.

use super::{Report, World, references};
use crate::fault::{Finding, Findings};
use crate::kind::{Key, Kind};
use crate::kinds::{DefaultAction, ParentReference, TrafficTargetKind};
use crate::object::{Object, Spec};

pub(super) fn check(before: &World<'_>, after: &World<'_>, key: &Key, report: &mut Report<'_>) {
    match key.kind {
        Kind::MeshDefaults => defaults(before, after, &key.namespace, report),
        Kind::AccessPolicy => last_allow(before, after, report),
        Kind::ExternalService | Kind::HttpRoute | Kind::GrpcRoute => {
            references_to(before, after, key, report);
        }
        // Nothing refers to one.
        Kind::TrafficPolicy => {}
    }
}

/// What holds from then on where nothing else is said.
fn defaults(before: &World<'_>, after: &World<'_>, namespace: &str, report: &mut Report<'_>) {
    let of = &before.catalog.defaults;
    let says = |world: &World<'_>| {
        [
            (
                "mtls",
                format!(
                    "{:?}",
                    references::default_of(world, namespace, |spec| spec.mtls).unwrap_or(of.mtls)
                ),
            ),
            ("inbound", format!("{:?}", references::inbound_default(world, namespace))),
            (
                "outbound",
                format!(
                    "{:?}",
                    references::default_of(world, namespace, |spec| spec.outbound).unwrap_or(of.outbound)
                ),
            ),
        ]
    };
    for ((field, was), (_, is)) in says(before).into_iter().zip(says(after)) {
        if was != is {
            report.warn(format!("spec.{field}"), format!("was {was}; without this object it is {is}"));
        }
    }
}

fn last_allow(before: &World<'_>, after: &World<'_>, report: &mut Report<'_>) {
    let denies = |world: &World<'_>| {
        let of_objects = world.objects.values().any(|object| match &object.spec {
            Spec::MeshDefaults(spec) => spec.inbound == Some(DefaultAction::Deny),
            _ => false,
        });
        let of_mesh = references::inbound_default(world, &world.catalog.mesh_namespace);
        of_objects || of_mesh == DefaultAction::Deny
    };
    if references::allows(before) && !references::allows(after) && denies(after) {
        let message = "is the last AccessPolicy that allows anything: where `inbound` is Deny all requests will be refused";
        report.warn("", message);
    }
}

/// What is found of those that name it, and was not before.
fn references_to(before: &World<'_>, after: &World<'_>, key: &Key, report: &mut Report<'_>) {
    for (other, object) in after.objects.iter().filter(|(_, object)| names(object, key)) {
        let of = |world: &World<'_>| {
            let mut findings = Findings::default();
            references::check(world, object, &mut Report { key: other.clone(), findings: &mut findings });
            findings.errors.extend(findings.warnings);
            findings.errors
        };
        let known = of(before);
        for Finding { path, message, .. } in of(after).into_iter().filter(|found| !known.contains(found)) {
            report.warn("", format!("{other} refers to it: {path}: {message}"));
        }
    }
}

/// Whether `object` names what `key` is.
fn names(object: &Object, key: &Key) -> bool {
    let namespace = &*object.metadata.namespace;
    let is_service = |of: Option<&str>, name: &str| {
        key.kind == Kind::ExternalService && of.unwrap_or(namespace) == key.namespace && name == key.name
    };
    let parent = |parent: &ParentReference| is_service(parent.namespace.as_deref(), &parent.name);
    let sends = || {
        let backends = references::backends(object);
        backends.iter().any(|(_, backend)| is_service(backend.namespace.as_deref(), &backend.name))
    };
    match &object.spec {
        Spec::MeshDefaults(_) | Spec::AccessPolicy(_) | Spec::ExternalService(_) => false,
        Spec::TrafficPolicy(spec) => {
            let target = &spec.target_ref;
            let kind = match target.kind {
                TrafficTargetKind::Mesh | TrafficTargetKind::Namespace => return false,
                TrafficTargetKind::Service => Kind::ExternalService,
                TrafficTargetKind::HttpRoute => Kind::HttpRoute,
                TrafficTargetKind::GrpcRoute => Kind::GrpcRoute,
            };
            key.kind == kind && key.namespace == namespace && target.name.as_ref() == Some(&key.name)
        }
        Spec::HttpRoute(_) | Spec::GrpcRoute(_) => {
            object.spec.parents().unwrap_or_default().iter().any(parent) || sends()
        }
    }
}
