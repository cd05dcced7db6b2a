//! The workloads: whether what should be in the mesh is.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::{Api, api::ListParams};

use super::{
    INJECT, all, each,
    report::{Outcome, Report},
    some,
};
use crate::cluster::{Cluster, MESH_NAMESPACE};

const NAMESPACES: &str = "Namespaces";
const WORKLOADS: &str = "Workloads";
/// The `ConfigMap` with the roots, and its key.
const BUNDLE: (&str, &str) = ("outrigger-trust-bundle", "trust-bundle.pem");
/// The sidecar's container.
const SIDECAR: &str = "outrigger-proxy";
/// Why a pod was not injected that asked for it.
const SKIPPED: &str = "outrigger.dev/skipped";

/// What is looked at of the pods that are, or should be, in the mesh.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pods {
    ready: usize,
    /// Their sidecars run and are not ready.
    unready: Vec<String>,
    /// Created before the label.
    missed: Vec<String>,
    missed_in: BTreeSet<String>,
    /// With reasons.
    skipped: BTreeMap<String, Vec<String>>,
}

pub(super) async fn check(cluster: &Cluster, report: &mut Report) {
    let client = || cluster.client.clone();
    let labelled = match all(cluster, Api::<Namespace>::all(client())).await {
        Ok(namespaces) => labelled(&namespaces),
        Err(error) => return report.unknown(NAMESPACES, "label", &error),
    };
    if labelled.is_empty() {
        let seen = format!("no namespace has the label {INJECT}=enabled");
        report.note(NAMESPACES, "label", seen);
    } else {
        report.ok(NAMESPACES, "label", some(&labelled.iter().cloned().collect::<Vec<_>>()));
    }
    let mut bundles = BTreeMap::new();
    let named = ListParams::default().fields(&format!("metadata.name={}", BUNDLE.0));
    let listed = each(cluster, Api::<ConfigMap>::all(client()), named, |map| {
        let text = map.data.and_then(|mut data| data.remove(BUNDLE.1)).unwrap_or_default();
        bundles.insert(map.metadata.namespace.unwrap_or_default(), text);
    });
    match listed.await {
        Ok(()) => judge_bundles(&labelled, &bundles, report),
        Err(error) => report.unknown(NAMESPACES, "trust bundle", &error),
    }
    let mut pods = Pods::default();
    let listed =
        each(cluster, Api::<Pod>::all(client()), ListParams::default(), |pod| pods.take(&pod, &labelled));
    match listed.await {
        Ok(()) => pods.judge(report),
        Err(error) => report.unknown(WORKLOADS, "injected", &error),
    }
    let mut datagrams = Vec::new();
    let listed = each(cluster, Api::<Service>::all(client()), ListParams::default(), |service| {
        datagrams.extend(uses_datagrams(&service, &labelled));
    });
    match listed.await {
        Ok(()) => judge_datagrams(&datagrams, report),
        Err(error) => report.unknown(WORKLOADS, "UDP", &error),
    }
}

fn labelled(namespaces: &[Namespace]) -> BTreeSet<String> {
    let is_labelled = |namespace: &&Namespace| {
        let labels = namespace.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(INJECT)).is_some_and(|value| value == "enabled")
    };
    namespaces.iter().filter(is_labelled).filter_map(|namespace| namespace.metadata.name.clone()).collect()
}

fn judge_bundles(labelled: &BTreeSet<String>, bundles: &BTreeMap<String, String>, report: &mut Report) {
    let check = "trust bundle";
    let advice = "the leading controller keeps it: its log says why it cannot";
    let Some(ours) = bundles.get(MESH_NAMESPACE).filter(|text| !text.is_empty()) else {
        let seen = format!("there is no ConfigMap {} in {MESH_NAMESPACE}", BUNDLE.0);
        return report.add(NAMESPACES, check, Outcome::Failed, seen, advice);
    };
    let wrong: Vec<String> = labelled
        .iter()
        .filter_map(|namespace| match bundles.get(namespace) {
            None => Some(format!("{namespace} (missing)")),
            Some(text) if text != ours => Some(format!("{namespace} (not the mesh's)")),
            Some(_) => None,
        })
        .collect();
    if wrong.is_empty() {
        report.ok(NAMESPACES, check, "every labelled namespace has the mesh's");
    } else {
        report.add(NAMESPACES, check, Outcome::Failed, some(&wrong), advice);
    }
}

impl Pods {
    fn take(&mut self, pod: &Pod, labelled: &BTreeSet<String>) {
        let (meta, status) = (&pod.metadata, pod.status.clone().unwrap_or_default());
        let Some(spec) = &pod.spec else { return };
        // What has ended, or is about to, needs nothing any more.
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
            || meta.deletion_timestamp.is_some()
        {
            return;
        }
        let namespace = meta.namespace.clone().unwrap_or_default();
        let name = format!("{namespace}/{}", meta.name.as_deref().unwrap_or_default());
        let containers = || spec.init_containers.iter().flatten().chain(&spec.containers);
        if containers().any(|container| container.name == SIDECAR) {
            let mut states =
                status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
            if states.any(|state| state.name == SIDECAR && state.ready) {
                self.ready += 1;
            } else {
                self.unready.push(name);
            }
            return;
        }
        let wish = meta.labels.as_ref().and_then(|labels| labels.get(INJECT)).map(String::as_str);
        let is_wanted = match wish {
            Some("enabled") => namespace != MESH_NAMESPACE,
            Some("disabled") => false,
            _ => labelled.contains(&namespace),
        };
        if !is_wanted {
            return;
        }
        let reason = meta.annotations.as_ref().and_then(|annotations| annotations.get(SKIPPED)).cloned();
        let reason = reason.or_else(|| spec.host_network.unwrap_or(false).then(|| "hostNetwork".to_owned()));
        if let Some(reason) = reason {
            self.skipped.entry(reason).or_default().push(name);
        } else {
            self.missed.push(name);
            self.missed_in.insert(namespace);
        }
    }

    fn judge(&self, report: &mut Report) {
        if self.missed.is_empty() {
            report.ok(WORKLOADS, "injected", "every pod that should have a sidecar has one");
        } else {
            let restarts: Vec<String> = self
                .missed_in
                .iter()
                .map(|namespace| {
                    format!("`kubectl rollout restart deployment,statefulset,daemonset -n {namespace}`")
                })
                .collect();
            let advice =
                format!("they were created before the label, or past the webhook: {}", some(&restarts));
            report.add(
                WORKLOADS,
                "injected",
                Outcome::Failed,
                format!("without sidecar: {}", some(&self.missed)),
                advice,
            );
        }
        if self.unready.is_empty() {
            report.ok(WORKLOADS, "sidecars", format!("{} ready", self.ready));
        } else {
            let seen = format!("{} ready; not ready: {}", self.ready, some(&self.unready));
            let advice = format!("`kubectl logs POD -c {SIDECAR} -n NAMESPACE` says what they wait for");
            report.add(WORKLOADS, "sidecars", Outcome::Failed, seen, advice);
        }
        for (reason, pods) in &self.skipped {
            report.note(WORKLOADS, "skipped", format!("{reason}: {}", some(pods)));
        }
    }
}

/// The service's name, if it is in the mesh and has ports that the mesh does not carry.
fn uses_datagrams(service: &Service, labelled: &BTreeSet<String>) -> Option<String> {
    let namespace = service.metadata.namespace.as_ref().filter(|namespace| labelled.contains(*namespace))?;
    let mut ports = service.spec.as_ref()?.ports.iter().flatten();
    let is_one = ports.any(|port| matches!(port.protocol.as_deref(), Some("UDP" | "SCTP")));
    is_one.then(|| format!("{}.{namespace}", service.metadata.name.as_deref().unwrap_or_default()))
}

fn judge_datagrams(services: &[String], report: &mut Report) {
    if services.is_empty() {
        report.ok(WORKLOADS, "UDP", "no service of a labelled namespace has ports of UDP or SCTP");
    } else {
        let seen = format!("UDP (QUIC, too) and SCTP pass without identity and policies: {}", some(services));
        report.note(WORKLOADS, "UDP", seen);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::output::{Format, Paint};

    fn pod(namespace: &str, name: &str, change: &Value) -> Pod {
        let mut pod = json!({
            "metadata": { "name": name, "namespace": namespace },
            "spec": { "containers": [{ "name": "app" }] },
            "status": { "phase": "Running" },
        });
        for (path, value) in change.as_object().unwrap() {
            *pod.pointer_mut(path).unwrap_or_else(|| panic!("{path}")) = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn meta(namespace: &str, name: &str, more: &Value) -> Value {
        let mut meta = json!({ "name": name, "namespace": namespace });
        meta.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "/metadata": meta })
    }

    #[test]
    fn each_pod_is_where_it_belongs() {
        let labelled = BTreeSet::from(["shop".to_owned()]);
        let injected = |ready: bool| {
            json!({
                "/spec": { "containers": [{ "name": "app" }], "initContainers": [{ "name": SIDECAR }] },
                "/status": { "phase": "Running", "initContainerStatuses": [
                    { "name": SIDECAR, "ready": ready, "image": "", "imageID": "", "restartCount": 0 }] },
            })
        };
        let mut pods = Pods::default();
        for pod in vec![
            pod("shop", "good", &injected(true)),
            pod("shop", "slow", &injected(false)),
            pod("shop", "old", &json!({})),
            pod(
                "shop",
                "opted-out",
                &meta("shop", "opted-out", &json!({ "labels": { INJECT: "disabled" } })),
            ),
            pod("shop", "job", &json!({ "/status/phase": "Succeeded" })),
            pod("bank", "other", &json!({})),
            pod("bank", "wants", &meta("bank", "wants", &json!({ "labels": { INJECT: "enabled" } }))),
            pod(
                "shop",
                "agent",
                &json!({ "/spec": { "containers": [{ "name": "a" }], "hostNetwork": true } }),
            ),
            pod(
                "shop",
                "told",
                &meta("shop", "told", &json!({ "annotations": { SKIPPED: "port 15401 is taken" } })),
            ),
        ] {
            pods.take(&pod, &labelled);
        }
        let mut report = Report::default();
        pods.judge(&mut report);
        Pods::default().judge(&mut report);

        let bundle = |namespace: &str, text: &str| (namespace.to_owned(), text.to_owned());
        judge_bundles(&labelled, &BTreeMap::new(), &mut report);
        judge_bundles(&labelled, &[bundle(MESH_NAMESPACE, "a")].into(), &mut report);
        judge_bundles(&labelled, &[bundle(MESH_NAMESPACE, "a"), bundle("shop", "b")].into(), &mut report);
        judge_bundles(&labelled, &[bundle(MESH_NAMESPACE, "a"), bundle("shop", "a")].into(), &mut report);

        let service = |namespace: &str, protocol: &str| -> Service {
            serde_json::from_value(json!({
                "metadata": { "name": "dns", "namespace": namespace },
                "spec": { "ports": [{ "port": 53, "protocol": protocol }] },
            }))
            .unwrap()
        };
        let services = [service("shop", "UDP"), service("shop", "TCP"), service("bank", "UDP")];
        let datagrams: Vec<String> =
            services.iter().filter_map(|one| uses_datagrams(one, &labelled)).collect();
        assert_eq!(datagrams, ["dns.shop"]);
        judge_datagrams(&datagrams, &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }
}
