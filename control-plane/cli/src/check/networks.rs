//! The pods' network: whether the mesh knows which addresses are pods', and what else translates a pod's connections.
//!
//! An address inside of the mesh's ranges that nobody knows is refused; one outside passes in clear. So a pod outside of them
//! is called in clear for as long as the controller does not know it yet.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::{Api, api::ListParams};
use serde::Deserialize;

use super::{
    all, each,
    report::{Outcome, Report},
    some,
};
use crate::{client::Server, cluster::Cluster};

const CATEGORY: &str = "Networks";
const RANGES: &str = "ranges";
const CILIUM: &str = "Cilium";
/// Where Cilium keeps its configuration, by default.
const CILIUM_CONFIG: (&str, &str) = ("kube-system", "cilium-config");

/// Before an installation: the ranges will be what nodes say.
pub(super) async fn before(cluster: &Cluster, report: &mut Report) {
    let nodes = all(cluster, Api::<Node>::all(cluster.client.clone())).await.map(|nodes| of_nodes(&nodes));
    judge(cluster, nodes, report).await;
    let maps = Api::<ConfigMap>::namespaced(cluster.client.clone(), CILIUM_CONFIG.0);
    match cluster.patiently(maps.get_opt(CILIUM_CONFIG.1)).await {
        Ok(None) => {}
        Ok(Some(map)) => judge_cilium(&map.data.unwrap_or_default(), report),
        Err(error) => report.unknown(CATEGORY, CILIUM, &error),
    }
}

/// With an installation: what the controller tells proxies.
pub(super) async fn installed(server: &Server, cluster: &Cluster, report: &mut Report) {
    #[derive(Deserialize)]
    struct Controller {
        ranges: Option<Vec<IpNet>>,
    }
    let told = server.get::<Controller>("/api/v1/controller").await;
    let told = told.and_then(|told| told.ranges.context("the controller has not read its cluster yet"));
    judge(cluster, told, report).await;
}

async fn judge(cluster: &Cluster, ranges: Result<Vec<IpNet>>, report: &mut Report) {
    let looked = async {
        let ranges = ranges?;
        let mut outside = Vec::new();
        let pods = Api::<Pod>::all(cluster.client.clone());
        each(cluster, pods, ListParams::default(), |pod| outside.extend(is_outside(&pod, &ranges))).await?;
        Ok((ranges, outside))
    };
    match looked.await {
        Ok((ranges, outside)) => judge_ranges(&ranges, &outside, report),
        Err(error) => report.unknown(CATEGORY, RANGES, &error),
    }
}

fn of_nodes(nodes: &[Node]) -> Vec<IpNet> {
    let specs = nodes.iter().filter_map(|node| node.spec.as_ref());
    specs.flat_map(|spec| spec.pod_cidrs.iter().flatten()).filter_map(|range| range.parse().ok()).collect()
}

/// The pod and its address, where that lies in none of the ranges. Pods of the node's network have the node's address, and are
/// no part of the mesh.
fn is_outside(pod: &Pod, ranges: &[IpNet]) -> Option<String> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
    if spec.host_network == Some(true) || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let addresses = status.pod_ips.iter().flatten().filter_map(|one| one.ip.parse::<IpAddr>().ok());
    let address = addresses.into_iter().find(|one| !ranges.iter().any(|range| range.contains(one)))?;
    let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
    Some(format!("{}/{} ({address})", namespace.unwrap_or_default(), name.unwrap_or_default()))
}

fn judge_ranges(ranges: &[IpNet], outside: &[String], report: &mut Report) {
    if outside.is_empty() && ranges.is_empty() {
        return report.ok(CATEGORY, RANGES, "there is neither a pod nor a range yet");
    }
    if outside.is_empty() {
        let mut ranges: Vec<String> =
            IpNet::aggregate(&ranges.to_vec()).iter().map(IpNet::to_string).collect();
        ranges.sort();
        return report.ok(CATEGORY, RANGES, format!("every pod is inside of {}", some(&ranges)));
    }
    report.add(
        CATEGORY,
        RANGES,
        Outcome::Warning,
        format!("pods outside of the mesh's ranges: {}", some(outside)),
        "install with mesh.cidrs, the networks that hold pods and nothing else: without it calls to a pod that the \
         controller does not know yet pass in clear instead of being refused",
    );
}

fn judge_cilium(config: &BTreeMap<String, String>, report: &mut Report) {
    let is = |key: &str, value: &str| config.get(key).is_some_and(|found| found == value);
    let translates = is("bpf-lb-sock", "true")
        || is("kube-proxy-replacement", "true")
        || is("kube-proxy-replacement", "strict");
    if translates && !is("bpf-lb-sock-hostns-only", "true") {
        let seen = "it translates Services inside of a pod's connect(): sidecars would see endpoints and never the Service";
        let advice = "set Cilium's socketLB.hostNamespaceOnly=true";
        report.add(CATEGORY, CILIUM, Outcome::Warning, seen, advice);
    } else {
        report.ok(CATEGORY, CILIUM, "it leaves Services of pods to their sidecars");
    }
    if !is("cni-exclusive", "false") {
        report.note(
            CATEGORY,
            CILIUM,
            "it removes other CNI plugins: cni.enabled needs Cilium's cni.exclusive=false",
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::output::{Format, Paint};

    fn pod(name: &str, address: &str, of_node: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "namespace": "shop", "name": name },
            "spec": { "containers": [], "hostNetwork": of_node },
            "status": { "phase": "Running", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": address }] },
        }))
        .unwrap()
    }

    #[test]
    fn pods_outside_of_every_range_are_named() {
        let node = |ranges: &[&str]| -> Node {
            serde_json::from_value(json!({ "metadata": { "name": "n" }, "spec": { "podCIDRs": ranges } }))
                .unwrap()
        };
        let ranges = of_nodes(&[node(&["10.0.0.0/24", "fd00::/64"]), node(&["10.0.1.0/24"]), node(&[])]);
        let pods = [
            pod("in", "10.0.1.7", false),
            pod("in6", "fd00::7", false),
            pod("agent", "192.168.0.1", true),
            pod("out", "10.1.0.7", false),
        ];
        let outside = |ranges: &[IpNet]| -> Vec<String> {
            pods.iter().filter_map(|pod| is_outside(pod, ranges)).collect()
        };
        assert_eq!(outside(&ranges), ["shop/out (10.1.0.7)"]);
        let mut report = Report::default();
        judge_ranges(&ranges, &[], &mut report);
        judge_ranges(&ranges, &outside(&ranges), &mut report);
        judge_ranges(&[], &outside(&[]), &mut report);
        judge_ranges(&[], &[], &mut report);

        let cilium = |config: &[(&str, &str)], report: &mut Report| {
            let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            judge_cilium(&config.collect(), report);
        };
        cilium(&[("kube-proxy-replacement", "true"), ("cni-exclusive", "true")], &mut report);
        cilium(
            &[
                ("kube-proxy-replacement", "true"),
                ("bpf-lb-sock-hostns-only", "true"),
                ("cni-exclusive", "false"),
            ],
            &mut report,
        );
        cilium(&[("bpf-lb-sock", "false"), ("cni-exclusive", "false")], &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }
}
