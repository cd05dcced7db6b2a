//! Whether a pod gets a sidecar.
//!
//! Nothing is decided in silence. A pod that opted in is injected, or refused with every reason at once, or, where a
//! sidecar can do nothing for it, let through with a warning and an annotation. What did not opt in passes as it is: the
//! webhook's selectors see to that already, and this is the second lock on a door behind which the whole cluster lies.

use serde_json::{Map, Value};

use crate::annotations;
use crate::json::{at, list, list_mut, name, object_mut, text};
use crate::parts;
use crate::settings::{Mesh, Mode};
use crate::{
    BUNDLE_VOLUME, CHECKER, INJECT, INJECTED, POD_SECURITY, PROXY, PROXY_PORTS, PROXY_USER, REDIRECT,
    REDIRECTOR, SKIPPED, TOKEN_VOLUME,
};

/// Namespaces whose pods are never injected, beside the mesh's own: nodes and cluster DNS depend on them.
const SYSTEM_NAMESPACES: [&str; 2] = ["kube-system", "kube-node-lease"];
/// Containers of other meshes, which redirect the same traffic.
const OTHER_MESHES: [&str; 4] = ["istio-proxy", "linkerd-proxy", "kuma-sidecar", "consul-dataplane"];
/// Where the API server mounts the token for itself.
const API_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Faults and warnings of one pod that are told; a hostile pod could have thousands.
const MAX_TOLD: usize = 16;

/// What is known of a pod's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its label [`INJECT`].
    pub inject: Option<String>,
    /// Its label [`POD_SECURITY`].
    pub pod_security: Option<String>,
}

/// What became of a pod.
#[derive(Debug, Clone, PartialEq)]
pub struct Review {
    /// In one word.
    pub outcome: Outcome,
    /// The pod as it shall be; `None` where it stays as it is.
    pub pod: Option<Value>,
    /// What its owner should know all the same.
    pub warnings: Vec<String>,
}

/// What became of a pod, in one word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It has a sidecar now.
    Injected,
    /// It had one.
    Already,
    /// It passes without one.
    Skipped(Skip),
    /// It must not run as it is.
    Refused(Vec<Fault>),
}

/// Why a pod passes without a sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// Neither it nor its namespace has the label.
    NotOptedIn,
    /// Its label says so.
    OptedOut,
    /// Its namespace is one of the system's or the mesh's own.
    SystemNamespace,
    /// It shares its node's network, whose traffic is not its own.
    HostNetwork,
}

impl Skip {
    /// The word for annotations and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotOptedIn => "notOptedIn",
            Self::OptedOut => "optedOut",
            Self::SystemNamespace => "systemNamespace",
            Self::HostNetwork => "hostNetwork",
        }
    }
}

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Which kind of thing.
    pub reason: Reason,
    /// What it is, and what to do.
    pub message: String,
}

/// Kinds of things that stand in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is no pod.
    Malformed,
    /// A label or annotation of ours has no valid value.
    Setting,
    /// A container or volume has one of our names.
    Name,
    /// A container declares one of our ports.
    Port,
    /// A container runs as our user.
    User,
    /// The namespace does not permit the redirecting container.
    PodSecurity,
    /// There is no sidecar for its system.
    System,
}

impl Reason {
    /// The word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Setting => "setting",
            Self::Name => "name",
            Self::Port => "port",
            Self::User => "user",
            Self::PodSecurity => "pod_security",
            Self::System => "system",
        }
    }
}

impl Review {
    /// Whether another label of the namespace could have led elsewhere: worth a fresh look before it is acted on.
    pub fn hangs_on_namespace(&self) -> bool {
        match &self.outcome {
            Outcome::Skipped(skip) => *skip == Skip::NotOptedIn,
            Outcome::Refused(faults) => faults.iter().any(|fault| fault.reason == Reason::PodSecurity),
            Outcome::Injected | Outcome::Already => false,
        }
    }

    fn unchanged(outcome: Outcome) -> Self {
        Self { outcome, pod: None, warnings: Vec::new() }
    }
}

/// Decides about `pod`, which is to be made in `namespace`.
pub fn decide(pod: &Value, namespace: &Namespace, mesh: &Mesh) -> Review {
    if let Some(fault) = malformed(pod) {
        return Review::unchanged(Outcome::Refused(vec![fault]));
    }
    match opted_in(pod, namespace, mesh) {
        Ok(None) => {}
        Ok(Some(skip)) => return Review::unchanged(Outcome::Skipped(skip)),
        Err(fault) => return Review::unchanged(Outcome::Refused(vec![fault])),
    }
    if at(pod, &["spec", "hostNetwork"]) == Some(&Value::Bool(true)) {
        return host_network(pod);
    }
    match ours(pod) {
        Ours::None => inject(pod, namespace, mesh),
        Ours::All => {
            let restored = restored(pod);
            Review {
                outcome: Outcome::Already,
                pod: (restored != *pod).then_some(restored),
                warnings: Vec::new(),
            }
        }
        Ours::Some(found) => Review::unchanged(Outcome::Refused(vec![Fault {
            reason: Reason::Name,
            message: format!(
                "the pod has {} of a name that the sidecar needs, without being injected: rename it, or, if the pod \
                 was injected before, remove what is left of that (`outrigger uninject`)",
                found.join(", ")
            ),
        }])),
    }
}

/// The pod without what was put into it.
pub fn remove(pod: &Value) -> Value {
    let mut pod = pod.clone();
    let Some(object) = pod.as_object_mut() else { return pod };
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        for (field, names) in [
            ("initContainers", [REDIRECTOR, CHECKER, PROXY].as_slice()),
            ("volumes", &[TOKEN_VOLUME, BUNDLE_VOLUME]),
        ] {
            if let Some(list) = spec.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|element| !names.contains(&name(element)));
                if list.is_empty() {
                    spec.remove(field);
                }
            }
        }
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for (field, names) in [("labels", [INJECTED].as_slice()), ("annotations", &[SKIPPED, REDIRECT])] {
            if let Some(entries) = metadata.get_mut(field).and_then(Value::as_object_mut) {
                entries.retain(|name, _| !names.contains(&name.as_str()));
                if entries.is_empty() {
                    metadata.remove(field);
                }
            }
        }
        if metadata.is_empty() {
            object.remove("metadata");
        }
    }
    pod
}

/// What must hold before anything else can be asked.
fn malformed(pod: &Value) -> Option<Fault> {
    let kind = |value: Option<&Value>, path: &str, fits: fn(&Value) -> bool, kind: &str| {
        value.filter(|value| !fits(value)).map(|_| format!("{path} is no {kind}"))
    };
    let wrong = if !pod.is_object() {
        Some("it is no object".to_owned())
    } else if at(pod, &["spec"]).is_none() {
        Some("it has no spec".to_owned())
    } else {
        kind(at(pod, &["spec"]), "spec", Value::is_object, "object")
            .or_else(|| kind(at(pod, &["metadata"]), "metadata", Value::is_object, "object"))
            .or_else(|| kind(at(pod, &["metadata", "labels"]), "metadata.labels", Value::is_object, "object"))
            .or_else(|| {
                kind(
                    at(pod, &["metadata", "annotations"]),
                    "metadata.annotations",
                    Value::is_object,
                    "object",
                )
            })
            .or_else(|| kind(at(pod, &["spec", "containers"]), "spec.containers", Value::is_array, "list"))
            .or_else(|| {
                kind(at(pod, &["spec", "initContainers"]), "spec.initContainers", Value::is_array, "list")
            })
            .or_else(|| kind(at(pod, &["spec", "volumes"]), "spec.volumes", Value::is_array, "list"))
    };
    wrong.map(|wrong| Fault { reason: Reason::Malformed, message: format!("this is no pod: {wrong}") })
}

fn opted_in(pod: &Value, namespace: &Namespace, mesh: &Mesh) -> Result<Option<Skip>, Fault> {
    if namespace.name == mesh.namespace || SYSTEM_NAMESPACES.contains(&namespace.name.as_str()) {
        return Ok(Some(Skip::SystemNamespace));
    }
    match text(pod, &["metadata", "labels", INJECT]) {
        Some("enabled") => Ok(None),
        Some("disabled") => Ok(Some(Skip::OptedOut)),
        Some(other) => Err(Fault {
            reason: Reason::Setting,
            message: format!("label {INJECT}: {} is neither enabled nor disabled", annotations::shown(other)),
        }),
        None if namespace.inject.as_deref() == Some("enabled") => Ok(None),
        None => Ok(Some(Skip::NotOptedIn)),
    }
}

fn host_network(pod: &Value) -> Review {
    let skip = Skip::HostNetwork;
    let mut marked = pod.clone();
    if let Some(annotations) = metadata(&mut marked, "annotations") {
        annotations.insert(SKIPPED.to_owned(), skip.as_str().into());
    }
    Review {
        outcome: Outcome::Skipped(skip),
        pod: (marked != *pod).then_some(marked),
        warnings: vec![format!(
            "not injected: the pod has hostNetwork, so its traffic cannot be told from its node's; it is not part of the \
             mesh. Label it {INJECT}=disabled to say that this is meant"
        )],
    }
}

enum Ours {
    None,
    All,
    /// What is there, by kind and name.
    Some(Vec<String>),
}

/// Which of the things that we would add are there. A pod that was injected offline, or under settings that have changed since,
/// has them all and stays as it is.
fn ours(pod: &Value) -> Ours {
    let spec = &pod["spec"];
    let mut found = Vec::new();
    for (field, kind, names) in [
        ("containers", "a container", [REDIRECTOR, CHECKER, PROXY].as_slice()),
        ("initContainers", "an init container", &[REDIRECTOR, CHECKER, PROXY]),
        ("volumes", "a volume", &[TOKEN_VOLUME, BUNDLE_VOLUME]),
    ] {
        let taken = list(spec, field).iter().map(name).filter(|name| names.contains(name));
        found.extend(taken.map(|name| format!("{kind} {name}")));
    }
    if found.is_empty() {
        return Ours::None;
    }
    let labelled = text(pod, &["metadata", "labels", INJECTED]) == Some("true");
    let sidecar = list(spec, "initContainers").iter().any(|container| {
        name(container) == PROXY
            && text(container, &["restartPolicy"]) == Some("Always")
            && text(container, &["image"]).is_some_and(|image| !image.is_empty())
    });
    let first = |found: &Vec<String>| {
        [REDIRECTOR, CHECKER].iter().any(|name| found.contains(&format!("an init container {name}")))
    };
    let volumes =
        [TOKEN_VOLUME, BUNDLE_VOLUME].iter().all(|name| found.contains(&format!("a volume {name}")));
    let container = found.iter().any(|found| found.starts_with("a container"));
    if labelled && sidecar && first(&found) && volumes && !container { Ours::All } else { Ours::Some(found) }
}

/// Our init containers as they should be after others had their hands on the pod: before all others, which would run before
/// there is a mesh; and without the token for the Kubernetes API, which the API server mounts into what webhooks add, and which a
/// sidecar does not need.
fn restored(pod: &Value) -> Value {
    let mut pod = pod.clone();
    if let Some(containers) = pod["spec"]["initContainers"].as_array_mut() {
        let is_ours = |container: &Value| [REDIRECTOR, CHECKER, PROXY].contains(&name(container));
        containers.sort_by_key(|container| !is_ours(container));
        for container in containers.iter_mut().filter(|container| is_ours(container)) {
            let Some(mounts) = container.get_mut("volumeMounts").and_then(Value::as_array_mut) else {
                continue;
            };
            mounts.retain(|mount| text(mount, &["mountPath"]) != Some(API_TOKEN));
            if mounts.is_empty()
                && let Some(container) = container.as_object_mut()
            {
                container.remove("volumeMounts");
            }
        }
    }
    pod
}

fn inject(pod: &Value, namespace: &Namespace, mesh: &Mesh) -> Review {
    let read = annotations::read(pod, &mesh.settings);
    let setting = |message| Fault { reason: Reason::Setting, message };
    let mut faults: Vec<Fault> = read.faults.into_iter().map(setting).collect();
    faults.extend(obstacles(pod, namespace, mesh));
    if !faults.is_empty() {
        bound(&mut faults, |left| Fault { reason: Reason::Setting, message: format!("and {left} more") });
        return Review::unchanged(Outcome::Refused(faults));
    }
    let mut warnings = warnings(pod, mesh, &read.settings);
    warnings.extend(read.warnings);
    bound(&mut warnings, |left| format!("and {left} more"));

    let mut injected = pod.clone();
    if let Some(labels) = metadata(&mut injected, "labels") {
        labels.insert(INJECTED.to_owned(), "true".into());
    }
    if mesh.settings.mode == Mode::Cni
        && let Some(annotations) = metadata(&mut injected, "annotations")
    {
        annotations.insert(REDIRECT.to_owned(), parts::redirect_flags(&read.settings).join(" ").into());
    }
    if let Some(spec) = injected.get_mut("spec").and_then(Value::as_object_mut) {
        if let Some(containers) = list_mut(spec, "initContainers") {
            containers.splice(0..0, parts::containers(pod, &read.settings, mesh));
        }
        if let Some(volumes) = list_mut(spec, "volumes") {
            volumes.extend(parts::volumes());
        }
    }
    Review { outcome: Outcome::Injected, pod: Some(injected), warnings }
}

/// Cuts what is too much, and says how much that was.
fn bound<T>(told: &mut Vec<T>, rest: impl Fn(usize) -> T) {
    if told.len() > MAX_TOLD {
        let left = told.len() - MAX_TOLD;
        told.truncate(MAX_TOLD);
        told.push(rest(left));
    }
}

fn metadata<'p>(pod: &'p mut Value, name: &str) -> Option<&'p mut Map<String, Value>> {
    object_mut(object_mut(pod.as_object_mut()?, "metadata")?, name)
}

/// Everything that a sidecar cannot live with.
fn obstacles(pod: &Value, namespace: &Namespace, mesh: &Mesh) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut fault = |reason, message| faults.push(Fault { reason, message });
    let system = text(pod, &["spec", "os", "name"])
        .or_else(|| text(pod, &["spec", "nodeSelector", "kubernetes.io/os"]))
        .unwrap_or("linux");
    if system != "linux" {
        fault(
            Reason::System,
            format!(
                "the pod runs on {}, and the sidecar on linux only: label it {INJECT}=disabled",
                annotations::shown(system)
            ),
        );
    }
    if text(pod, &["metadata", "annotations", REDIRECT]).is_some() {
        fault(
            Reason::Setting,
            format!("annotation {REDIRECT}: it is written by the injector alone; remove it"),
        );
    }
    if let Some(level) = namespace.pod_security.as_deref().filter(|level| *level != "privileged")
        && mesh.settings.mode == Mode::Init
    {
        fault(
            Reason::PodSecurity,
            format!(
                "the namespace {} permits no pod with NET_ADMIN ({POD_SECURITY}: {}), which the init container \
                 {REDIRECTOR} needs: install the mesh with cni.enabled=true, which needs none, or label the namespace \
                 {POD_SECURITY}=privileged",
                namespace.name,
                annotations::shown(level)
            ),
        );
    }
    if user(&pod["spec"]) == Some(PROXY_USER.into()) {
        fault(Reason::User, proxy_user("the pod's securityContext"));
    }
    for (kind, container) in containers(pod) {
        let shown = annotations::shown(name(container));
        if user(container) == Some(PROXY_USER.into()) {
            fault(Reason::User, proxy_user(&format!("the securityContext of the {kind} {shown}")));
        }
        let declared =
            list(container, "ports").iter().filter_map(|port| at(port, &["containerPort"])?.as_u64());
        for port in declared.filter(|port| PROXY_PORTS.iter().any(|own| u64::from(*own) == *port)) {
            fault(
                Reason::Port,
                format!(
                    "the {kind} {shown} declares port {port}, which is the sidecar's: let it listen elsewhere"
                ),
            );
        }
    }
    faults
}

fn user(value: &Value) -> Option<u64> {
    at(value, &["securityContext", "runAsUser"])?.as_u64()
}

fn proxy_user(whose: &str) -> String {
    format!(
        "{whose} has runAsUser {PROXY_USER}, the sidecar's own user, whose traffic is not redirected: it would bypass \
         the mesh; choose another"
    )
}

fn containers(pod: &Value) -> impl Iterator<Item = (&'static str, &Value)> {
    let of = |kind, field| list(&pod["spec"], field).iter().map(move |container| (kind, container));
    of("container", "containers").chain(of("init container", "initContainers"))
}

fn warnings(pod: &Value, mesh: &Mesh, own: &annotations::PodSettings) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(policy) = parts::own_name_servers(pod)
        && mesh.controllers().iter().any(|address| address.parse::<std::net::SocketAddr>().is_err())
    {
        warnings.push(format!(
            "dnsPolicy {policy}: the sidecar asks the pod's own name servers for {}; if they do not know it, the pod never \
             becomes ready",
            mesh.controllers().join(", ")
        ));
    }
    if let Some((_, other)) = containers(pod).find(|(_, container)| OTHER_MESHES.contains(&name(container))) {
        warnings.push(format!(
            "the pod has the sidecar of another mesh, {}, which takes the same traffic: switch one of them off",
            name(other)
        ));
    }
    if parts::guaranteed(pod)
        && own.resources.limits.cpu.is_none()
        && let Some(cpu) = &own.resources.requests.cpu
    {
        warnings.push(format!(
            "the pod is of the class Guaranteed, so the sidecar's CPU is limited to its request, {cpu}: \
             outrigger.dev/proxy-cpu-limit gives it more"
        ));
    }
    warnings
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Injected => f.write_str("injected"),
            Self::Already => f.write_str("has a sidecar already"),
            Self::Skipped(Skip::NotOptedIn) => {
                write!(f, "not injected: neither the pod nor its namespace has the label {INJECT}=enabled")
            }
            Self::Skipped(Skip::OptedOut) => write!(f, "not injected: the pod's label {INJECT} is disabled"),
            Self::Skipped(Skip::SystemNamespace) => {
                f.write_str("not injected: pods of the system's and the mesh's own namespaces never are")
            }
            Self::Skipped(Skip::HostNetwork) => f.write_str("not injected: hostNetwork"),
            Self::Refused(faults) => {
                let faults: Vec<&str> = faults.iter().map(|fault| fault.message.as_str()).collect();
                write!(f, "refused: {}", faults.join("; "))
            }
        }
    }
}
