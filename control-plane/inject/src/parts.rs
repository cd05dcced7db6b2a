//! What is put into a pod: our containers and volumes.
//!
//! All of it meets Pod Security `restricted`, but for the redirecting container of init mode: uid 0 with `NET_ADMIN`
//! alone, for the milliseconds that it lives. What a pod sets for all of its containers (user, group, seccomp)
//! is set again in each of ours, so that it does not reach them.

use serde_json::{Map, Value, json};

use crate::annotations::{PodSettings, Upstream};
use crate::json::{at, field, list, text};
use crate::settings::{Mesh, Mode, Quantities, Resources, Settings};
use crate::{ADMIN_PORT, BUNDLE_VOLUME, CHECKER, PROXY, PROXY_USER, REDIRECTOR, TOKEN_VOLUME, quantity};

/// Not the sidecar's user, whose traffic is not redirected, and no user of an application.
const NOBODY: u32 = 65534;
/// Seconds; renewed by the kubelet from four fifths. The shortest that Kubernetes gives is ten minutes.
const TOKEN_LIFE: u32 = 3600;
/// Seconds that Kubernetes lets a pod take to end where it says nothing.
const DEFAULT_GRACE: u64 = 30;
/// Seconds between the end of our drain and the kubelet's SIGKILL.
const DRAIN_MARGIN: u64 = 5;
/// Seconds that the sidecar may take to become ready before the kubelet starts it anew. It waits for the controller, and
/// each new start would only add the kubelet's back-off to that wait.
const STARTUP_SECONDS: u32 = 600;
const TOKEN_FOLDER: &str = "/var/run/secrets/outrigger";
const BUNDLE_FOLDER: &str = "/var/run/outrigger";

/// Our init containers, in their order.
pub(crate) fn containers(pod: &Value, own: &PodSettings, mesh: &Mesh) -> Vec<Value> {
    let resources = resources(pod, &own.resources);
    let first = match mesh.settings.mode {
        Mode::Init => redirector(pod, own, &mesh.settings, &resources),
        Mode::Cni => checker(pod, &mesh.settings, &resources),
    };
    vec![first, proxy(pod, own, mesh, &resources)]
}

/// Our volumes, in their order.
pub(crate) fn volumes() -> Vec<Value> {
    vec![
        json!({
            "name": TOKEN_VOLUME,
            "projected": { "sources": [{ "serviceAccountToken": {
                "audience": "outrigger",
                "expirationSeconds": TOKEN_LIFE,
                "path": "token",
            } }] },
        }),
        json!({ "name": BUNDLE_VOLUME, "configMap": { "name": BUNDLE_VOLUME } }),
    ]
}

/// The flags of `outrigger-proxy redirect` for a pod.
pub(crate) fn redirect_flags(own: &PodSettings) -> Vec<String> {
    let mut flags = vec![format!("--proxy-uid={PROXY_USER}")];
    let mut add = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            flags.push(format!("--{name}={}", values.join(",")));
        }
    };
    add("exclude-inbound-ports", own.skip_inbound_ports.iter().map(ToString::to_string).collect());
    add("exclude-outbound-ports", own.skip_outbound_ports.iter().map(ToString::to_string).collect());
    add("exclude-outbound-cidrs", own.skip_outbound_cidrs.iter().map(ToString::to_string).collect());
    flags
}

fn redirector(pod: &Value, own: &PodSettings, settings: &Settings, resources: &Value) -> Value {
    let arguments = [vec!["redirect".to_owned()], redirect_flags(own)].concat();
    json!({
        "name": REDIRECTOR,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": arguments,
        "resources": resources,
        "securityContext": security(pod, 0, &["NET_ADMIN"]),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    })
}

fn checker(pod: &Value, settings: &Settings, resources: &Value) -> Value {
    json!({
        "name": CHECKER,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["redirect", "--check"],
        "resources": resources,
        "securityContext": security(pod, NOBODY, &[]),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    })
}

fn proxy(pod: &Value, own: &PodSettings, mesh: &Mesh, resources: &Value) -> Value {
    let probe = |path: &str, period: u32, timeout: u32, failures: u32| {
        json!({
            "httpGet": { "path": path, "port": ADMIN_PORT },
            "periodSeconds": period,
            "timeoutSeconds": timeout,
            "failureThreshold": failures,
        })
    };
    json!({
        "name": PROXY,
        "image": mesh.settings.image,
        "imagePullPolicy": mesh.settings.image_pull_policy,
        "restartPolicy": "Always",
        "env": variables(pod, own, mesh),
        "ports": [{ "name": "outrigger-admin", "containerPort": ADMIN_PORT, "protocol": "TCP" }],
        "resources": resources,
        "securityContext": security(pod, PROXY_USER, &[]),
        // The application starts when this has passed: its first call finds a mesh.
        "startupProbe": probe("/ready", 1, 1, STARTUP_SECONDS),
        "readinessProbe": probe("/ready", 5, 3, 3),
        "livenessProbe": probe("/live", 10, 3, 3),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            { "name": TOKEN_VOLUME, "mountPath": TOKEN_FOLDER, "readOnly": true },
            { "name": BUNDLE_VOLUME, "mountPath": BUNDLE_FOLDER, "readOnly": true },
        ],
    })
}

fn variables(pod: &Value, own: &PodSettings, mesh: &Mesh) -> Vec<Value> {
    let comma = |values: Vec<String>| values.join(",");
    let mut variables = vec![
        ("OUTRIGGER_CONTROLLER", comma(mesh.controllers())),
        ("OUTRIGGER_TRUST_DOMAIN", mesh.trust_domain.clone()),
        ("OUTRIGGER_MESH_NAMESPACE", mesh.namespace.clone()),
        ("OUTRIGGER_TOKEN_FILE", format!("{TOKEN_FOLDER}/token")),
        ("OUTRIGGER_TRUST_BUNDLE", format!("{BUNDLE_FOLDER}/trust-bundle.pem")),
        ("OUTRIGGER_REDIRECTION", "true".to_owned()),
        // A native sidecar hears SIGTERM when its application is gone: there is nobody left to accept for.
        ("OUTRIGGER_DRAIN_MIN", "0s".to_owned()),
        ("OUTRIGGER_DRAIN_MAX", format!("{}ms", drain_millis(pod))),
        ("OUTRIGGER_LOG_LEVEL", own.log_level.clone()),
        ("OUTRIGGER_LOG_FORMAT", serde_text(&mesh.settings.log_format)),
    ];
    if let Some(threads) = own.threads {
        variables.push(("OUTRIGGER_THREADS", threads.to_string()));
    }
    if !own.opaque_ports.is_empty() {
        let ports = own.opaque_ports.iter().map(ToString::to_string).collect();
        variables.push(("OUTRIGGER_OPAQUE_PORTS", comma(ports)));
    }
    if !own.upstreams.is_empty() {
        let upstreams: Vec<Value> = own.upstreams.iter().map(Upstream::to_json).collect();
        // JSON is YAML.
        variables.push(("OUTRIGGER_UPSTREAMS", Value::from(upstreams).to_string()));
    }
    let mut variables: Vec<Value> = variables
        .into_iter()
        .map(|(name, value)| json!({ "name": name, "value": escaped(&value) }))
        .collect();
    // Kubernetes copies the label from the node where it can (from 1.35 on); elsewhere it is empty, which is "unknown".
    variables.push(json!({
        "name": "OUTRIGGER_ZONE",
        "valueFrom": { "fieldRef": { "fieldPath": "metadata.labels['topology.kubernetes.io/zone']" } },
    }));
    variables
}

/// Kubernetes replaces `$(NAME)` in values; ours are meant as they are.
fn escaped(value: &str) -> String {
    value.replace("$(", "$$(")
}

fn serde_text(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// How long the sidecar may drain within what the pod has in all, which begins before the sidecar hears of it.
fn drain_millis(pod: &Value) -> u64 {
    let grace =
        at(pod, &["spec", "terminationGracePeriodSeconds"]).and_then(Value::as_u64).unwrap_or(DEFAULT_GRACE);
    // An hour: nobody waits longer, and the number must fit.
    let grace = grace.min(3600) * 1000;
    grace.saturating_sub(DRAIN_MARGIN * 1000).max(grace / 2)
}

fn security(pod: &Value, user: u32, capabilities: &[&str]) -> Value {
    let mut dropped = json!({ "drop": ["ALL"] });
    if !capabilities.is_empty() {
        dropped["add"] = json!(capabilities);
    }
    let mut context = json!({
        "allowPrivilegeEscalation": false,
        "capabilities": dropped,
        "privileged": false,
        "readOnlyRootFilesystem": true,
        "runAsGroup": user,
        "runAsNonRoot": user != 0,
        "runAsUser": user,
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    // Set only where the pod sets it: on a node without AppArmor even the default would be refused.
    if at(pod, &["spec", "securityContext", "appArmorProfile"]).is_some() {
        context["appArmorProfile"] = json!({ "type": "RuntimeDefault" });
    }
    context
}

/// The resources of our containers. A pod in which everything is guaranteed stays so: ours then gets as its request what is
/// its limit, and where it has no limit, its request as limit.
fn resources(pod: &Value, wanted: &Resources) -> Value {
    let mut resources = wanted.clone();
    if guaranteed(pod) {
        for (request, limit) in [
            (&mut resources.requests.cpu, &mut resources.limits.cpu),
            (&mut resources.requests.memory, &mut resources.limits.memory),
        ] {
            let amount = limit.take().or_else(|| request.take());
            request.clone_from(&amount);
            *limit = amount;
        }
    }
    let mut object = Map::new();
    for (name, quantities) in [("requests", &resources.requests), ("limits", &resources.limits)] {
        let Quantities { cpu, memory } = quantities;
        let amounts: Map<String, Value> = [("cpu", cpu), ("memory", memory)]
            .into_iter()
            .filter_map(|(name, amount)| Some((name.to_owned(), json!(amount.as_ref()?))))
            .collect();
        if !amounts.is_empty() {
            object.insert(name.to_owned(), amounts.into());
        }
    }
    object.into()
}

/// Whether a pod's class is Guaranteed: each container, init containers among them, has limits for CPU and memory, and
/// requests them (which is the default where it has limits).
pub(crate) fn guaranteed(pod: &Value) -> bool {
    let Some(spec) = field(pod, "spec") else { return false };
    let amount = |value: &Value, path: &[&str]| {
        let found = at(value, path)?;
        let text = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
        quantity::nanos(&text)
    };
    let mut containers = list(spec, "containers").iter().chain(list(spec, "initContainers")).peekable();
    containers.peek().is_some()
        && containers.all(|container| {
            ["cpu", "memory"].iter().all(|kind| {
                let limit = amount(container, &["resources", "limits", kind]);
                let request = amount(container, &["resources", "requests", kind]);
                limit.is_some_and(|limit| limit > 0) && (request.is_none() || request == limit)
            })
        })
}

/// Whether the sidecar asks the pod's own name servers, which may not know the cluster's names.
pub(crate) fn own_name_servers(pod: &Value) -> Option<&str> {
    text(pod, &["spec", "dnsPolicy"]).filter(|policy| ["None", "Default"].contains(policy))
}
