//! The server's side: who may call a workload, and how much at once it is asked.
//!
//! No `AccessPolicy` outranks another: those of every target of a workload count together. What `MeshDefaults` say is ranked,
//! the namespace's field over the mesh's, but probes add up: to take a probe away from a namespace is never what it wants.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use outrigger_api::v1;
use outrigger_core::access::Access;
use outrigger_core::limit::{Limits, MAX_LIMITS};
use outrigger_core::path::EscapedSlashes as EscapedForms;

use super::ByAge;
use super::access;
use super::condition::{Condition, ConditionReason, Conditions};
use super::layers::Layer;
use super::services::Services;
use super::targets::{Target, Targets};
use crate::catalog::{Catalog, Defaults, Workload, identity_namespace};
use crate::kind::{Key, Kind};
use crate::kinds::{
    AccessPolicy, AccessTarget, AccessTargetKind, DefaultAction, EscapedSlashes, MeshDefaults, Mtls,
};
use crate::object::Spec;

/// The one name of `MeshDefaults`.
const DEFAULTS_NAME: &str = "default";

/// The server's side of a workload: what `v1::Inbound` has of policies.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InboundPolicy {
    /// Whether it takes plaintext.
    pub mtls: v1::inbound::Mode,
    /// `None`: nobody has a policy, and all that `mtls` lets in is allowed.
    pub access: Option<v1::Access>,
    /// The most specific first: of those that are about a port, the first holds.
    pub concurrency: Vec<v1::Concurrency>,
}

/// What becomes of connections out of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outbound {
    /// As the `Mesh` resource has it.
    pub default: v1::mesh::OutboundDefault,
    /// Who said so, as `MeshDefaults shop/default`; empty: the controller's configuration.
    pub origin: String,
}

/// What the servers' side needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Servers {
    configured: Defaults,
    mesh_namespace: String,
    /// By namespace.
    defaults: BTreeMap<String, MeshDefaults>,
    /// The oldest first.
    access: Vec<(Subject, v1::AccessPolicy)>,
    targets: Targets,
}

/// Whom an `AccessPolicy` is about.
#[derive(Debug, Clone, PartialEq)]
enum Subject {
    Mesh(Option<u16>),
    Namespace(String, Option<u16>),
    Service(String, Option<u16>),
    Workload(String, BTreeMap<String, String>, Option<u16>),
}

/// Which of a workload's ports something is about.
enum OwnPorts {
    None,
    All,
    These(BTreeSet<u16>),
}

impl Servers {
    pub(crate) fn new(
        by_age: &ByAge<'_>,
        services: &Services,
        targets: Targets,
        catalog: &Catalog,
        conditions: &mut Conditions,
    ) -> Self {
        let mut servers = Self {
            configured: catalog.defaults.clone(),
            mesh_namespace: catalog.mesh_namespace.clone(),
            targets,
            ..Self::default()
        };
        for (key, stored) in by_age {
            match &stored.object.spec {
                Spec::MeshDefaults(defaults) => servers.add_defaults(key, defaults, conditions),
                Spec::AccessPolicy(policy) => {
                    let placed = subject(key, &policy.target_ref, services, &catalog.mesh_namespace)
                        .and_then(|subject| servers.add_policy(key, subject, policy, &catalog.trust_domain));
                    let condition = match placed {
                        Ok(()) => Condition::accepted("it holds for the workloads of its target"),
                        Err((reason, message)) => Condition::refused(reason, message),
                    };
                    conditions.add(key, condition);
                }
                _ => {}
            }
        }
        servers.say_which_limits_are_left_out(catalog, conditions);
        servers
    }

    /// Of the limits of a workload the oldest policies' hold: with one more than [`MAX_LIMITS`] its sidecar would refuse all that
    /// it is told, denials included.
    fn say_which_limits_are_left_out(&self, catalog: &Catalog, conditions: &mut Conditions) {
        if self.access.iter().map(|(_, policy)| policy.limits.len()).sum::<usize>() <= MAX_LIMITS {
            return;
        }
        let mut workloads: BTreeMap<String, Vec<Workload>> = BTreeMap::new();
        for workload in catalog.workloads() {
            workloads.entry(workload.identity.clone().unwrap_or_default()).or_default().push(workload);
        }
        let mut short: BTreeSet<String> = BTreeSet::new();
        for (identity, workloads) in &workloads {
            let namespace = identity_namespace(identity).unwrap_or_default();
            let told = self.access(namespace, workloads);
            for policy in told.into_iter().flat_map(|access| access.policies) {
                let whole = self.access.iter().find(|(_, whole)| whole.name == policy.name);
                if whole.is_some_and(|(_, whole)| whole.limits.len() > policy.limits.len()) {
                    short.insert(policy.name);
                }
            }
        }
        for name in short {
            let Some((namespace, policy)) = name.split_once('/') else { continue };
            let message = format!(
                "some workloads have more than {MAX_LIMITS} limits: those of this policy are not all in force there, older ones are"
            );
            conditions.add(&Key::new(Kind::AccessPolicy, namespace, policy), Condition::partial(message));
        }
    }

    fn add_defaults(&mut self, key: &Key, defaults: &MeshDefaults, conditions: &mut Conditions) {
        if key.name != DEFAULTS_NAME {
            let message = format!("MeshDefaults are named `{DEFAULTS_NAME}`, one in each namespace");
            return conditions.add(key, Condition::refused(ConditionReason::Invalid, message));
        }
        let whom = if key.namespace == self.mesh_namespace { "mesh" } else { "namespace" };
        conditions.add(key, Condition::accepted(format!("it holds for the {whom}")));
        let mut defaults = defaults.clone();
        // The rest of it stays: without its `inbound` more would be allowed.
        defaults.probes.retain(|probe| {
            let probes = access::probe(probe).into_iter().collect();
            let refusal = refusal(&v1::Access { probes, ..Default::default() });
            if let Some(fault) = &refusal {
                conditions.add(key, Condition::partial(fault.clone()));
            }
            refusal.is_none()
        });
        self.defaults.insert(key.namespace.clone(), defaults);
    }

    fn add_policy(
        &mut self,
        key: &Key,
        subject: Subject,
        policy: &AccessPolicy,
        trust_domain: &str,
    ) -> Result<(), (ConditionReason, String)> {
        let name = format!("{}/{}", key.namespace, key.name);
        let policy = access::policy(policy, name, trust_domain);
        let alone = v1::Access { policies: vec![policy.clone()], ..Default::default() };
        if let Some(fault) = refusal(&alone) {
            return Err((ConditionReason::Invalid, fault));
        }
        self.access.push((subject, policy));
        Ok(())
    }

    /// A field of `MeshDefaults`, and who said so: the namespace, else the mesh.
    fn field<T>(&self, namespace: &str, field: impl Fn(&MeshDefaults) -> Option<T>) -> Option<(T, String)> {
        [namespace, &self.mesh_namespace].into_iter().find_map(|namespace| {
            let value = field(self.defaults.get(namespace)?)?;
            Some((value, Key::new(Kind::MeshDefaults, namespace, DEFAULTS_NAME).to_string()))
        })
    }

    fn mode(&self, namespace: &str) -> v1::inbound::Mode {
        match self.field(namespace, |defaults| defaults.mtls).map_or(self.configured.mtls, |(mtls, _)| mtls) {
            Mtls::Strict => v1::inbound::Mode::Strict,
            Mtls::Permissive => v1::inbound::Mode::Permissive,
        }
    }

    fn access(&self, namespace: &str, workloads: &[Workload]) -> Option<v1::Access> {
        let mut room = MAX_LIMITS;
        let mut policies: Vec<_> = self
            .access
            .iter()
            .filter_map(|(subject, policy)| {
                let ports = subject.ports(namespace, workloads).to_wire()?;
                let mut policy = v1::AccessPolicy { ports, ..policy.clone() };
                policy.limits.truncate(room);
                room -= policy.limits.len();
                Some(policy)
            })
            .collect();
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        let said = self.field(namespace, |defaults| defaults.inbound);
        let (default, default_origin) = said.unwrap_or((self.configured.inbound, String::new()));
        let mesh = Some(&*self.mesh_namespace).filter(|mesh| *mesh != namespace);
        let of_both =
            mesh.into_iter().chain([namespace]).filter_map(|namespace| self.defaults.get(namespace));
        let of_defaults = of_both.flat_map(|defaults| &defaults.probes);
        let all = of_defaults.chain(workloads.iter().flat_map(|workload| &workload.probes));
        let mut probes: Vec<v1::Probe> = Vec::new();
        for probe in all.filter_map(access::probe) {
            if !probes.contains(&probe) {
                probes.push(probe);
            }
        }
        // Probes pass in clear even where mutual TLS is demanded and everything is allowed.
        if policies.is_empty() && probes.is_empty() && default == DefaultAction::Allow {
            return None;
        }
        let slashes = self.field(namespace, |defaults| defaults.escaped_slashes);
        Some(v1::Access {
            default: access::default(default).into(),
            default_origin,
            policies,
            probes,
            escaped_slashes: access::escaped_slashes(
                slashes.map_or(EscapedSlashes::Reject, |(mode, _)| mode),
            )
            .into(),
        })
    }

    fn concurrency(&self, namespace: &str, workloads: &[Workload]) -> Vec<v1::Concurrency> {
        let mut found: Vec<v1::Concurrency> = Vec::new();
        let mut covered: BTreeSet<u16> = BTreeSet::new();
        let mut add = |target: &Target, ports: BTreeSet<u16>| {
            let Some(concurrency) = self.targets.get(target).and_then(|layer| layer.concurrency.as_ref())
            else {
                return;
            };
            let ports: Vec<u32> =
                ports.into_iter().filter(|port| covered.insert(*port)).map(u32::from).collect();
            if !ports.is_empty() {
                found.push(v1::Concurrency { ports, ..concurrency.clone() });
            }
        };
        let services: BTreeSet<&str> =
            workloads.iter().flat_map(|workload| workload.services.keys()).map(|name| &**name).collect();
        for &service in &services {
            for port in self.targets.ports_of(service) {
                add(&Target::Port(service.to_owned(), port), service_ports(workloads, service, Some(port)));
            }
        }
        for &service in &services {
            add(&Target::Service(service.to_owned()), service_ports(workloads, service, None));
        }
        let whole = [Target::Mesh, Target::Namespace(namespace.to_owned())];
        found.extend(Layer::merged(whole.iter().filter_map(|target| self.targets.get(target))).concurrency);
        found
    }
}

impl super::Resolved {
    /// The server's side of an identity's workloads. What holds for any of them holds for the identity: a policy about labels that only
    /// some of them have is for all, unless the caller asks for each workload by itself. `workloads` may be empty, as before any of them
    /// is in the catalog.
    pub fn inbound(&self, identity: &str, workloads: &[Workload]) -> InboundPolicy {
        let namespace = identity_namespace(identity).unwrap_or_default();
        InboundPolicy {
            mtls: self.servers.mode(namespace),
            access: self.servers.access(namespace, workloads),
            concurrency: self.servers.concurrency(namespace, workloads),
        }
    }

    /// What becomes of connections out of the mesh that workloads of a namespace open.
    pub fn outbound(&self, namespace: &str) -> Outbound {
        let said = self.servers.field(namespace, |defaults| defaults.outbound);
        let (default, origin) = said.unwrap_or((self.servers.configured.outbound, String::new()));
        let default = match default {
            DefaultAction::Allow => v1::mesh::OutboundDefault::Allow,
            DefaultAction::Audit => v1::mesh::OutboundDefault::Audit,
            DefaultAction::Deny => v1::mesh::OutboundDefault::Deny,
        };
        Outbound { default, origin }
    }
}

/// Why sidecars would refuse this, and with it all that an identity's workloads are told, whatever becomes of escaped slashes.
fn refusal(access: &v1::Access) -> Option<String> {
    use v1::access::EscapedSlashes::{Decode, Keep, Reject};
    let refused = [Reject, Keep, Decode].map(|mode| {
        let default = v1::Default::Allow.into();
        let access = v1::Access { default, escaped_slashes: mode.into(), ..access.clone() };
        let limits = || Limits::from_wire(&access.policies, EscapedForms::from_wire(mode), Instant::now());
        Access::from_wire(&access).err().or_else(|| limits().err())
    });
    let [reject, keep, decode] = refused;
    reject.filter(|_| keep.is_some() && decode.is_some())
}

fn subject(
    key: &Key,
    target: &AccessTarget,
    services: &Services,
    mesh_namespace: &str,
) -> Result<Subject, (ConditionReason, String)> {
    let invalid = |message: String| (ConditionReason::Invalid, message);
    let namespace = || key.namespace.clone();
    match target.kind {
        AccessTargetKind::Mesh if key.namespace != mesh_namespace => {
            Err(invalid(format!("the mesh can only be the target of a policy in namespace {mesh_namespace}")))
        }
        AccessTargetKind::Mesh => Ok(Subject::Mesh(target.port)),
        AccessTargetKind::Namespace => Ok(Subject::Namespace(namespace(), target.port)),
        AccessTargetKind::Service => {
            let name = target.name.as_ref().ok_or_else(|| invalid("targetRef.name is missing".to_owned()))?;
            let service = format!("{name}.{}", key.namespace);
            services
                .check(&service, target.port)
                .map_err(|fault| (ConditionReason::TargetNotFound, fault))?;
            Ok(Subject::Service(service, target.port))
        }
        AccessTargetKind::Workload if target.labels.is_empty() => {
            Err(invalid("targetRef.labels is empty; kind Namespace is all workloads".to_owned()))
        }
        AccessTargetKind::Workload => Ok(Subject::Workload(namespace(), target.labels.clone(), target.port)),
    }
}

impl Subject {
    fn ports(&self, namespace: &str, workloads: &[Workload]) -> OwnPorts {
        let own = |port: &Option<u16>| port.map_or(OwnPorts::All, |port| OwnPorts::These([port].into()));
        match self {
            Self::Mesh(port) => own(port),
            Self::Namespace(name, port) if name == namespace => own(port),
            Self::Service(service, port) => OwnPorts::These(service_ports(workloads, service, *port)),
            Self::Workload(name, labels, port) if name == namespace && has_labels(workloads, labels) => {
                own(port)
            }
            Self::Namespace(..) | Self::Workload(..) => OwnPorts::None,
        }
    }
}

impl OwnPorts {
    /// `None`: it is not about the workload; an empty list of the wire would be about all its ports.
    fn to_wire(&self) -> Option<Vec<u32>> {
        match self {
            Self::None => None,
            Self::All => Some(Vec::new()),
            Self::These(ports) if ports.is_empty() => None,
            Self::These(ports) => Some(ports.iter().map(|port| (*port).into()).collect()),
        }
    }
}

fn has_labels(workloads: &[Workload], labels: &BTreeMap<String, String>) -> bool {
    workloads
        .iter()
        .any(|workload| labels.iter().all(|(name, value)| workload.labels.get(name) == Some(value)))
}

/// The workloads' own ports behind a service, or behind one port of it. Key 0 is for the ports that are not listed.
fn service_ports(workloads: &[Workload], service: &str, port: Option<u16>) -> BTreeSet<u16> {
    let of_service = workloads.iter().filter_map(|workload| workload.services.get(service));
    of_service
        .flat_map(|ports| match port {
            Some(port) => ports.get(&port).or_else(|| ports.get(&0)).copied().into_iter().collect(),
            None => ports.values().copied().collect::<Vec<_>>(),
        })
        .collect()
}
