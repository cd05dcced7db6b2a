//! What else is in the cluster: other meshes, Pod Security, the Gateway API, and an installation that is there already.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        apps::v1::Deployment,
        core::v1::{Namespace, Pod},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, api::ListParams};

use super::{
    INJECT, all, each,
    report::{Outcome, Report},
    some,
};
use crate::cluster::{Cluster, MESH_NAMESPACE};

const OTHERS: &str = "Other meshes";
const SECURITY: &str = "Pod Security";
const GATEWAY_API: &str = "Gateway API";
const INSTALLATION: &str = "Installation";
/// Our own webhook.
const OURS: &str = "outrigger-injector";
/// What a namespace lets its pods do.
const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
/// Where the Gateway API's definitions say of which release they are.
const BUNDLE: &str = "gateway.networking.k8s.io/bundle-version";
/// The routes that the mesh reads.
const ROUTES: [&str; 2] = ["httproutes.gateway.networking.k8s.io", "grpcroutes.gateway.networking.k8s.io"];
/// Meshes by a part of their webhooks' names.
const WEBHOOKS: [(&str, &str); 6] = [
    ("istio", "Istio"),
    ("linkerd", "Linkerd"),
    ("consul-connect", "Consul"),
    ("kuma", "Kuma"),
    ("osm", "Open Service Mesh"),
    ("nginx-mesh", "NGINX Service Mesh"),
];
/// Meshes by the containers that they put into pods.
const SIDECARS: [(&str, &str); 5] = [
    ("istio-proxy", "Istio"),
    ("linkerd-proxy", "Linkerd"),
    ("consul-dataplane", "Consul"),
    ("kuma-sidecar", "Kuma"),
    ("envoy-sidecar", "Consul"),
];

pub(super) async fn check(cluster: &Cluster, report: &mut Report) {
    let client = || cluster.client.clone();
    match all(cluster, Api::<MutatingWebhookConfiguration>::all(client())).await {
        Ok(found) => judge_webhooks(&found, report),
        Err(error) => report.unknown(OTHERS, "webhooks", &error),
    }
    let mut meshed = BTreeMap::new();
    match each(cluster, Api::<Pod>::all(client()), ListParams::default(), |pod| count(&pod, &mut meshed))
        .await
    {
        Ok(()) => judge_sidecars(&meshed, report),
        Err(error) => report.unknown(OTHERS, "sidecars", &error),
    }
    match all(cluster, Api::<Namespace>::all(client())).await {
        Ok(namespaces) => judge_security(&namespaces, report),
        Err(error) => report.unknown(SECURITY, "namespaces", &error),
    }
    let definitions = Api::<CustomResourceDefinition>::all(client());
    let found = ROUTES.map(|name| cluster.patiently(definitions.get_opt(name)));
    match futures_util::future::try_join_all(found).await {
        Ok(found) => judge_gateway_api(&found, report),
        Err(error) => report.unknown(GATEWAY_API, "definitions", &error),
    }
    let deployments = Api::<Deployment>::namespaced(client(), MESH_NAMESPACE);
    match cluster.patiently(deployments.get_opt("outrigger-controller")).await {
        Ok(None) => report.ok(INSTALLATION, "new", "no controller is installed"),
        Ok(Some(_)) => {
            report.note(INSTALLATION, "new", "a controller is installed already: `helm upgrade` changes it");
        }
        Err(error) => report.unknown(INSTALLATION, "new", &error),
    }
}

fn judge_webhooks(found: &[MutatingWebhookConfiguration], report: &mut Report) {
    let of_pods = found.iter().filter(|configuration| {
        let rules =
            configuration.webhooks.iter().flatten().flat_map(|webhook| webhook.rules.iter().flatten());
        let mut resources = rules.flat_map(|rule| rule.resources.iter().flatten());
        resources.any(|resource| matches!(resource.as_str(), "pods" | "*" | "*/*" | "pods/*"))
    });
    let names: Vec<String> = of_pods
        .filter_map(|configuration| configuration.metadata.name.clone())
        .filter(|name| name != OURS)
        .collect();
    let (meshes, rest): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| WEBHOOKS.iter().any(|(part, _)| name.contains(part)));
    if !meshes.is_empty() {
        let advice = "a pod can be in one mesh only: take the other's label from a namespace before you label it for this one";
        report.add(
            OTHERS,
            "webhooks",
            Outcome::Warning,
            format!("other meshes inject pods: {}", some(&meshes)),
            advice,
        );
    } else if rest.is_empty() {
        report.ok(OTHERS, "webhooks", "nobody else changes pods");
    } else {
        report.note(OTHERS, "webhooks", format!("others change pods, too: {}", some(&rest)));
    }
}

/// Counts a pod for the mesh and namespace that it is in, if it is in one.
fn count(pod: &Pod, meshed: &mut BTreeMap<(&'static str, String), usize>) {
    let Some(spec) = &pod.spec else { return };
    let mut containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mesh = containers.find_map(|container| SIDECARS.iter().find(|(name, _)| *name == container.name));
    if let Some((_, mesh)) = mesh {
        *meshed.entry((mesh, pod.metadata.namespace.clone().unwrap_or_default())).or_default() += 1;
    }
}

fn judge_sidecars(meshed: &BTreeMap<(&'static str, String), usize>, report: &mut Report) {
    if meshed.is_empty() {
        report.ok(OTHERS, "sidecars", "no pod has another mesh's sidecar");
        return;
    }
    let seen: Vec<String> = meshed
        .iter()
        .map(|((mesh, namespace), count)| format!("{mesh} in {namespace} ({count} pods)"))
        .collect();
    let advice = "leave these namespaces unlabelled until their pods run without the other sidecar";
    report.add(OTHERS, "sidecars", Outcome::Warning, some(&seen), advice);
}

fn judge_security(namespaces: &[Namespace], report: &mut Report) {
    let label = |namespace: &Namespace, name: &str| namespace.metadata.labels.as_ref()?.get(name).cloned();
    let named = |namespace: &&Namespace| namespace.metadata.name.as_deref() == Some(MESH_NAMESPACE);
    let level = namespaces.iter().find(named).and_then(|namespace| label(namespace, ENFORCE));
    let level = level.unwrap_or_else(|| "privileged".to_owned());
    let seen = format!("{MESH_NAMESPACE} enforces `{level}`, which the control plane meets");
    // The node agent mounts the node's folders.
    let cni = if level == "privileged" { "" } else { "; cni.enabled needs `privileged` there" };
    report.ok(SECURITY, MESH_NAMESPACE, seen + cni);
    let strict: Vec<String> = namespaces
        .iter()
        .filter(|namespace| label(namespace, INJECT).as_deref() == Some("enabled"))
        .filter(|namespace| matches!(label(namespace, ENFORCE).as_deref(), Some("baseline" | "restricted")))
        .filter_map(|namespace| namespace.metadata.name.clone())
        .collect();
    if strict.is_empty() {
        report.ok(SECURITY, "namespaces", "every labelled namespace takes the redirect container");
    } else {
        report.add(
            SECURITY,
            "namespaces",
            Outcome::Warning,
            format!("`baseline` and `restricted` refuse its NET_ADMIN: {}", some(&strict)),
            "install with cni.enabled=true, which needs no such container",
        );
    }
}

fn judge_gateway_api(found: &[Option<CustomResourceDefinition>], report: &mut Report) {
    let versions: Vec<String> = found
        .iter()
        .flatten()
        .map(|definition| {
            let annotations = definition.metadata.annotations.as_ref();
            annotations
                .and_then(|all| all.get(BUNDLE))
                .cloned()
                .unwrap_or_else(|| "unknown release".to_owned())
        })
        .collect();
    if versions.len() == found.len() {
        report.ok(GATEWAY_API, "definitions", versions.first().cloned().unwrap_or_default());
    } else {
        report.note(
            GATEWAY_API,
            "definitions",
            "HTTPRoute and GRPCRoute are not installed: everything works but routes, until their definitions are applied",
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::output::{Format, Paint};

    #[test]
    fn neighbours_are_named() {
        let mut report = Report::default();
        let webhook = |name: &str, resource: &str| -> MutatingWebhookConfiguration {
            serde_json::from_value(json!({
                "metadata": { "name": name },
                "webhooks": [{ "name": "a.b.c", "admissionReviewVersions": ["v1"], "clientConfig": {}, "sideEffects": "None",
                    "rules": [{ "apiGroups": [""], "apiVersions": ["v1"], "resources": [resource], "operations": ["CREATE"] }] }],
            }))
            .unwrap()
        };
        let (ours, istio) = (webhook(OURS, "pods"), webhook("istio-sidecar-injector", "pods"));
        let (vault, other) = (webhook("vault-agent", "pods"), webhook("defaults", "deployments"));
        judge_webhooks(&[ours.clone(), istio, vault.clone(), other.clone()], &mut report);
        judge_webhooks(&[ours.clone(), vault], &mut report);
        judge_webhooks(&[ours, other], &mut report);

        let pod = |namespace: &str, container: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": { "name": "p", "namespace": namespace },
                "spec": { "containers": [{ "name": "app" }], "initContainers": [{ "name": container }] },
            }))
            .unwrap()
        };
        let mut meshed = BTreeMap::new();
        judge_sidecars(&meshed, &mut report);
        for pod in
            [pod("shop", "linkerd-proxy"), pod("shop", "linkerd-proxy"), pod("bank", "outrigger-proxy")]
        {
            count(&pod, &mut meshed);
        }
        judge_sidecars(&meshed, &mut report);

        let namespace = |name: &str, labels: serde_json::Value| -> Namespace {
            serde_json::from_value(json!({ "metadata": { "name": name, "labels": labels } })).unwrap()
        };
        judge_security(&[namespace("shop", json!({ INJECT: "enabled" }))], &mut report);
        let strict = [
            namespace(MESH_NAMESPACE, json!({ ENFORCE: "restricted" })),
            namespace("shop", json!({ INJECT: "enabled", ENFORCE: "baseline" })),
            namespace("bank", json!({ ENFORCE: "restricted" })),
        ];
        judge_security(&strict, &mut report);

        let definition = |version: &str| -> CustomResourceDefinition {
            serde_json::from_value(json!({
                "metadata": { "name": "x", "annotations": { BUNDLE: version } },
                "spec": { "group": "g", "names": { "kind": "K", "plural": "ks" }, "scope": "Namespaced", "versions": [] },
            }))
            .unwrap()
        };
        judge_gateway_api(&[Some(definition("v1.4.0")), Some(definition("v1.4.0"))], &mut report);
        judge_gateway_api(&[Some(definition("v0.8.0")), None], &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }
}
