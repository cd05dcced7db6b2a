//! What objects refer to, and what they come to together.

use super::{Known, Report, World};
use crate::catalog::{CatalogProtocol, Workload};
use crate::kind::{Key, Kind};
use crate::kinds::{
    AccessMode, AccessPolicy, AccessTargetKind, Action, BackendObjectReference, BackendRef, DefaultAction,
    ExternalService, GrpcFilter, HttpFilter, MeshDefaults, Mtls, Operation, ParentReference, RequestMirror,
    Source, TrafficPolicy, TrafficTargetKind,
};
use crate::object::{Object, Spec};

pub(super) fn check(world: &World<'_>, object: &Object, report: &mut Report<'_>) {
    let namespace = &*object.metadata.namespace;
    match &object.spec {
        Spec::MeshDefaults(spec) => mesh_defaults(world, namespace, spec, report),
        Spec::TrafficPolicy(spec) => traffic(world, object, spec, report),
        Spec::AccessPolicy(spec) => access(world, namespace, spec, report),
        Spec::ExternalService(spec) => external(world, object, spec, report),
        Spec::HttpRoute(_) | Spec::GrpcRoute(_) => {}
    }
    let named = object.spec.parents().unwrap_or_default();
    parents(world, namespace, named, report);
    for (at, reference) in backends(object) {
        backend(world, named, &at, &reference, report);
    }
}

/// What the rules of a route send requests and copies to, with the path of each reference; nothing of other objects.
pub(super) fn backends(object: &Object) -> Vec<(String, BackendObjectReference)> {
    let mut found = Vec::new();
    match &object.spec {
        Spec::HttpRoute(route) => {
            for (number, rule) in route.rules.iter().enumerate() {
                of_rule(number, &rule.filters, &rule.backend_refs, &mut found);
            }
        }
        Spec::GrpcRoute(route) => {
            for (number, rule) in route.rules.iter().enumerate() {
                of_rule(number, &rule.filters, &rule.backend_refs, &mut found);
            }
        }
        _ => {}
    }
    found
}

fn of_rule<F: Filter>(
    number: usize,
    filters: &[F],
    backends: &[BackendRef<F>],
    found: &mut Vec<(String, BackendObjectReference)>,
) {
    let at = format!("spec.rules[{number}]");
    mirrors(&at, filters, found);
    for (index, backend) in backends.iter().enumerate() {
        let at = format!("{at}.backendRefs[{index}]");
        found.push((at.clone(), backend.reference()));
        mirrors(&at, &backend.filters, found);
    }
}

fn mirrors<F: Filter>(at: &str, filters: &[F], found: &mut Vec<(String, BackendObjectReference)>) {
    for (number, filter) in filters.iter().enumerate() {
        if let Some(mirror) = filter.mirror() {
            let at = format!("{at}.filters[{number}].requestMirror.backendRef");
            found.push((at, mirror.backend_ref.clone()));
        }
    }
}

/// A filter of either kind of route.
trait Filter {
    fn mirror(&self) -> Option<&RequestMirror>;
}

impl Filter for HttpFilter {
    fn mirror(&self) -> Option<&RequestMirror> {
        self.request_mirror.as_ref()
    }
}

impl Filter for GrpcFilter {
    fn mirror(&self) -> Option<&RequestMirror> {
        self.request_mirror.as_ref()
    }
}

fn mesh_defaults(world: &World<'_>, namespace: &str, spec: &MeshDefaults, report: &mut Report<'_>) {
    let whole_mesh = namespace == world.catalog.mesh_namespace;
    let workloads = world.catalog.workloads();
    let held = |workload: &&Workload| whole_mesh || workload.namespace == namespace;
    if spec.mtls == Some(Mtls::Strict) {
        let plain = workloads.iter().filter(held).filter(|workload| workload.identity.is_none()).count();
        if plain > 0 {
            let message = format!(
                "workloads without a sidecar that it holds for: {plain}; they are called in plaintext as before"
            );
            report.warn("spec.mtls", message);
        }
    }
    if spec.inbound == Some(DefaultAction::Deny) && !allows(world) {
        report.warn("spec.inbound", "no AccessPolicy allows anything: all requests will be refused");
    }
}

/// Whether any policy allows anything.
pub(super) fn allows(world: &World<'_>) -> bool {
    world.objects.values().any(|object| match &object.spec {
        Spec::AccessPolicy(policy) => {
            policy.mode == AccessMode::Enforce && policy.rules.iter().any(|rule| rule.action == Action::Allow)
        }
        _ => false,
    })
}

fn missing_service(world: &World<'_>, namespace: &str, name: &str) -> String {
    let elsewhere = world.catalog.services.iter().find(|service| service.name == name);
    let hint = elsewhere.map(|service| format!(" (there is one in namespace {})", service.namespace));
    format!("there is no service {name}.{namespace} yet{}", hint.unwrap_or_default())
}

fn missing_port(known: &Known, service: &str, port: u16) -> String {
    let ports: Vec<String> = known.ports.iter().map(|(port, ..)| port.to_string()).collect();
    format!("service {service} has no port {port}: there are {}", ports.join(", "))
}

/// Whether a port is a service's, as far as one knows: a service whose ports are not known has any.
fn port(known: &Known, port: u16) -> Result<Option<&(u16, String, CatalogProtocol)>, ()> {
    if known.ports.is_empty() {
        return Ok(None);
    }
    known.ports.iter().find(|(number, ..)| *number == port).map(Some).ok_or(())
}

fn parents(world: &World<'_>, namespace: &str, parents: &[ParentReference], report: &mut Report<'_>) {
    for (number, parent) in parents.iter().enumerate().filter(|(_, parent)| parent.is_service()) {
        let at = format!("spec.parentRefs[{number}]");
        let of = parent.namespace.as_deref().unwrap_or(namespace);
        let service = format!("{}.{of}", parent.name);
        let Some(known) = world.service(of, &parent.name) else {
            report.warn(at, missing_service(world, of, &parent.name));
            continue;
        };
        let mut attached = Vec::new();
        match parent.port.map(|number| (number, port(&known, number))) {
            Some((number, Err(()))) => {
                report.error(format!("{at}.port"), missing_port(&known, &service, number));
            }
            Some((_, Ok(found))) => attached.extend(found),
            None => attached.extend(&known.ports),
        }
        if let Some(section) = &parent.section_name {
            attached.retain(|(_, name, _)| name == section);
            if !known.ports.is_empty() && !known.ports.iter().any(|(_, name, _)| name == section) {
                let message = format!("service {service} has no port of the name `{section}`");
                report.error(format!("{at}.sectionName"), message);
                continue;
            }
        }
        if !attached.is_empty() && attached.iter().all(|(.., protocol)| *protocol == CatalogProtocol::Tcp) {
            let message =
                format!("service {service} speaks no HTTP there (protocol TCP): the route matches nothing");
            report.error(at.clone(), message);
        }
        if of != namespace {
            let message =
                format!("is of another namespace: the route holds for clients of namespace {namespace} only");
            report.warn(format!("{at}.namespace"), message);
        }
    }
}

fn backend(
    world: &World<'_>,
    parents: &[ParentReference],
    at: &str,
    reference: &BackendObjectReference,
    report: &mut Report<'_>,
) {
    let is_service = matches!(reference.group.as_deref(), None | Some("" | "core"))
        && matches!(reference.kind.as_deref(), None | Some("Service"));
    let (true, Some(number)) = (is_service, reference.port) else { return };
    let of = reference.namespace.as_deref().unwrap_or(&report.key.namespace);
    let service = format!("{}.{of}", reference.name);
    if !world.catalog.permits(&report.key, parents, of, &reference.name) {
        let message = format!(
            "no ReferenceGrant in namespace {of} lets it refer to service {service}: its share of the requests gets 500"
        );
        report.warn(at, message);
        return;
    }
    let Some(known) = world.service(of, &reference.name) else {
        let message = missing_service(world, of, &reference.name);
        report.warn(at, format!("{message}: its share of the requests gets 500"));
        return;
    };
    match port(&known, number) {
        Err(()) => report.warn(
            format!("{at}.port"),
            format!("{}: its share of the requests gets 500", missing_port(&known, &service, number)),
        ),
        Ok(Some((.., CatalogProtocol::Tcp))) => {
            report
                .warn(format!("{at}.port"), format!("service {service} speaks no HTTP there (protocol TCP)"));
        }
        Ok(_) => {}
    }
}

fn only_from_the_mesh(world: &World<'_>, namespace: &str, report: &mut Report<'_>) {
    let mesh = &world.catalog.mesh_namespace;
    if namespace != mesh {
        let message = format!(
            "is for policies of namespace {mesh}: write it there, or target `kind: Namespace` for namespace {namespace}"
        );
        report.error("spec.targetRef.kind", message);
    }
}

fn traffic(world: &World<'_>, object: &Object, spec: &TrafficPolicy, report: &mut Report<'_>) {
    let namespace = &*object.metadata.namespace;
    let target = &spec.target_ref;
    let name = target.name.as_deref().unwrap_or_default();
    match target.kind {
        TrafficTargetKind::Mesh => only_from_the_mesh(world, namespace, report),
        TrafficTargetKind::Namespace => {}
        TrafficTargetKind::Service => match (world.service(namespace, name), target.port) {
            (None, _) => report.warn("spec.targetRef", missing_service(world, namespace, name)),
            (Some(known), Some(number)) => match port(&known, number) {
                Err(()) => {
                    let message = missing_port(&known, &format!("{name}.{namespace}"), number);
                    report.error("spec.targetRef.port", message);
                }
                Ok(Some((.., CatalogProtocol::Tcp))) => only_http(spec, report),
                Ok(_) => {}
            },
            (Some(known), None) => {
                if !known.ports.is_empty()
                    && known.ports.iter().all(|(.., protocol)| *protocol == CatalogProtocol::Tcp)
                {
                    only_http(spec, report);
                }
                if known.external && spec.concurrency.is_some() {
                    let message = "is kept at the workloads' own sidecars, and an ExternalService has none";
                    report.warn("spec.concurrency", message);
                }
            }
        },
        TrafficTargetKind::HttpRoute => route(world, Kind::HttpRoute, namespace, spec, report),
        TrafficTargetKind::GrpcRoute => route(world, Kind::GrpcRoute, namespace, spec, report),
    }
    conflicts(world, object, spec, report);
}

/// What has no meaning for bytes.
fn only_http(spec: &TrafficPolicy, report: &mut Report<'_>) {
    let fields =
        [("retry", spec.retry.is_some()), ("hedge", spec.hedge.is_some()), ("fault", spec.fault.is_some())];
    for (field, _) in fields.into_iter().filter(|(_, set)| *set) {
        report.warn(
            format!("spec.{field}"),
            "is about requests, and the service's protocol is TCP: it has no effect",
        );
    }
}

fn route(world: &World<'_>, kind: Kind, namespace: &str, spec: &TrafficPolicy, report: &mut Report<'_>) {
    let name = spec.target_ref.name.as_deref().unwrap_or_default();
    let key = Key::new(kind, namespace, name);
    let Some(route) = world.objects.get(&key) else {
        report.warn("spec.targetRef", format!("there is no {key} yet"));
        return;
    };
    let Some(section) = &spec.target_ref.section_name else { return };
    let rules: Vec<Option<&str>> = match &route.spec {
        Spec::HttpRoute(route) => route.rules.iter().map(|rule| rule.name.as_deref()).collect(),
        Spec::GrpcRoute(route) => route.rules.iter().map(|rule| rule.name.as_deref()).collect(),
        _ => return,
    };
    let numbered = section.strip_prefix("rule-").and_then(|number| number.parse::<usize>().ok());
    let found = rules.contains(&Some(section)) || numbered.is_some_and(|number| number < rules.len());
    if !found {
        let names: Vec<String> = rules
            .iter()
            .enumerate()
            .map(|(number, name)| name.map_or_else(|| format!("rule-{number}"), str::to_owned))
            .collect();
        let message = format!("{key} has no rule `{section}`: there are {}", names.join(", "));
        report.error("spec.targetRef.sectionName", message);
    }
}

/// One policy per target: the older one counts.
fn conflicts(world: &World<'_>, object: &Object, spec: &TrafficPolicy, report: &mut Report<'_>) {
    let target = |spec: &TrafficPolicy| {
        let target = &spec.target_ref;
        (target.kind, target.name.clone(), target.section_name.clone(), target.port)
    };
    let own = object.key();
    // New objects are younger than any that is kept.
    let age = |key: &Key| world.policies.get(key).map_or(i64::MAX, |stored| stored.created);
    for (key, other) in &world.objects {
        let Spec::TrafficPolicy(other_spec) = &other.spec else { continue };
        if *key == own || key.namespace != own.namespace || target(other_spec) != target(spec) {
            continue;
        }
        if (age(key), &key.name) < (age(&own), &own.name) {
            let message =
                format!("{key} has the same target and is older: this one will have no effect (Conflicted)");
            report.warn("spec.targetRef", message);
        } else {
            let message =
                format!("{key} has the same target and is younger: it has no effect beside this one");
            report.warn("spec.targetRef", message);
        }
    }
}

fn access(world: &World<'_>, namespace: &str, spec: &AccessPolicy, report: &mut Report<'_>) {
    let target = &spec.target_ref;
    let mut opaque = false;
    let all = world.catalog.workloads();
    let targeted: Vec<&Workload> = match target.kind {
        AccessTargetKind::Mesh => {
            only_from_the_mesh(world, namespace, report);
            all.iter().collect()
        }
        AccessTargetKind::Namespace => {
            all.iter().filter(|workload| workload.namespace == namespace).collect()
        }
        AccessTargetKind::Service => {
            let name = target.name.as_deref().unwrap_or_default();
            let full_name = format!("{name}.{namespace}");
            match world.service(namespace, name) {
                None => report.warn("spec.targetRef", missing_service(world, namespace, name)),
                Some(known) if known.external => {
                    let message = format!(
                        "{full_name} is an ExternalService, which no sidecar guards: use MeshDefaults.outbound"
                    );
                    report.error("spec.targetRef", message);
                }
                Some(known) => match target.port.map(|number| (number, port(&known, number))) {
                    Some((number, Err(()))) => {
                        report.error("spec.targetRef.port", missing_port(&known, &full_name, number));
                    }
                    Some((_, Ok(found))) => {
                        opaque = found.is_some_and(|(.., protocol)| *protocol == CatalogProtocol::Tcp);
                    }
                    None => {
                        opaque = !known.ports.is_empty()
                            && known.ports.iter().all(|(.., protocol)| *protocol == CatalogProtocol::Tcp);
                    }
                },
            }
            all.iter().filter(|workload| workload.services.contains_key(&full_name)).collect()
        }
        AccessTargetKind::Workload => {
            let has = |workload: &&Workload| {
                workload.namespace == namespace
                    && target.labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
            };
            let matching: Vec<&Workload> = all.iter().filter(has).collect();
            if matching.is_empty() {
                report.warn(
                    "spec.targetRef.labels",
                    format!("no workload of namespace {namespace} has these labels yet"),
                );
            }
            matching
        }
    };
    let bare = targeted.iter().filter(|workload| workload.identity.is_none()).count();
    if bare > 0 {
        let message =
            format!("workloads without a sidecar: {bare} of {}; nothing is enforced there", targeted.len());
        report.warn("spec.targetRef", message);
    }
    rules(world, namespace, spec, opaque, report);
}

fn rules(world: &World<'_>, namespace: &str, spec: &AccessPolicy, opaque: bool, report: &mut Report<'_>) {
    let default = inbound_default(world, namespace);
    for (number, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{number}]");
        if rule.action == Action::Allow && spec.mode == AccessMode::Enforce && default == DefaultAction::Allow
        {
            let message = format!(
                "allows what the default, `inbound: {default:?}`, lets pass anyway: set MeshDefaults.inbound to Deny, or write a Deny"
            );
            report.warn(format!("{at}.action"), message);
        }
        let from = rule.from.as_deref().unwrap_or_default();
        sources(world, &format!("{at}.from"), from, report);
        let only_l7 = rule.to.as_ref().is_some_and(|to| to.iter().all(about_requests));
        if opaque && only_l7 {
            let message = match rule.action {
                Action::Allow => {
                    "is about requests, and the port's protocol is TCP: it never allows anything"
                }
                Action::Deny => {
                    "is about requests, and the port's protocol is TCP: it denies every connection"
                }
            };
            report.error(format!("{at}.to"), message);
        }
    }
    for (number, limit) in spec.limits.iter().enumerate() {
        let at = format!("spec.limits[{number}]");
        sources(world, &format!("{at}.from"), limit.from.as_deref().unwrap_or_default(), report);
        if opaque && limit.requests_per_second.is_some() {
            report.warn(at, "counts requests, and the port's protocol is TCP: it has no effect");
        }
    }
}

/// Whether it has conditions that only a request can meet.
fn about_requests(operation: &Operation) -> bool {
    operation.methods.is_some()
        || operation.paths.is_some()
        || operation.headers.is_some()
        || operation.grpc.is_some()
}

fn sources(world: &World<'_>, at: &str, sources: &[Source], report: &mut Report<'_>) {
    let domain = format!("spiffe://{}/", world.catalog.trust_domain);
    for (number, source) in sources.iter().enumerate() {
        for (index, identity) in source.identities.iter().flatten().enumerate() {
            let start = identity.strip_suffix('*').unwrap_or(identity);
            let fits =
                start.starts_with(&domain) || domain.starts_with(start) && start.len() < identity.len();
            if !fits {
                let message = format!(
                    "`{identity}` is of another trust domain than the mesh's, {}: no caller has it",
                    world.catalog.trust_domain
                );
                report.warn(format!("{at}[{number}].identities[{index}]"), message);
            }
        }
    }
}

/// What holds for the workloads of a namespace.
pub(super) fn inbound_default(world: &World<'_>, namespace: &str) -> DefaultAction {
    default_of(world, namespace, |spec| spec.inbound).unwrap_or(world.catalog.defaults.inbound)
}

/// What the `MeshDefaults` of a namespace, or else of the mesh, say. `None`: nothing, the configuration holds.
pub(super) fn default_of<T>(
    world: &World<'_>,
    namespace: &str,
    field: impl Fn(&MeshDefaults) -> Option<T>,
) -> Option<T> {
    let of = |namespace: &str| {
        let key = Key::new(Kind::MeshDefaults, namespace, "default");
        match &world.objects.get(&key)?.spec {
            Spec::MeshDefaults(spec) => field(spec),
            _ => None,
        }
    };
    of(namespace).or_else(|| of(&world.catalog.mesh_namespace))
}

fn external(world: &World<'_>, object: &Object, spec: &ExternalService, report: &mut Report<'_>) {
    let key = object.key();
    if world
        .catalog
        .service_of(&key.namespace, &key.name)
        .is_some_and(|service| !service.endpoints.is_empty())
    {
        let message =
            format!("service {}.{} is in the mesh already: choose another name", key.name, key.namespace);
        report.error("metadata.name", message);
    }
    for (other_key, other) in &world.objects {
        let Spec::ExternalService(other) = &other.spec else { continue };
        if *other_key == key {
            continue;
        }
        for (number, host) in spec.hosts.iter().enumerate().filter(|(_, host)| other.hosts.contains(host)) {
            let shared =
                spec.ports.iter().find(|port| other.ports.iter().any(|theirs| theirs.port == port.port));
            if let Some(port) = shared {
                let message =
                    format!("{other_key} has host `{host}` at port {} too: the older one counts", port.port);
                report.warn(format!("spec.hosts[{number}]"), message);
            }
        }
    }
}
