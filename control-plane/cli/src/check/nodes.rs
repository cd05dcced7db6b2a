//! The machines: what the sidecar and its redirection need of them.

use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{Node, NodeSystemInfo},
    },
    jiff::Timestamp,
};
use kube::Api;

use super::{
    all,
    api_server::server_time,
    report::{Outcome, Report},
    some,
};
use crate::cluster::Cluster;

const CATEGORY: &str = "Nodes";
/// `nf_tables` with inet NAT and redir (`proxy/intercept`).
const OLDEST_KERNEL: (u32, u32) = (5, 2);
/// Native sidecars are on by default from here on (<https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/>).
const OLDEST_KUBELET: u32 = 29;
/// What there are images for.
const ARCHITECTURES: &[&str] = &["amd64", "arm64"];
/// Where kubelets say every 10 s that they live, by their own clocks.
const LEASES: &str = "kube-node-lease";
/// A clock that is further ahead makes tokens and certificates of the node's pods come from the future.
const MOST_AHEAD: i64 = 10;

pub(super) async fn check(cluster: &Cluster, report: &mut Report) {
    match all(cluster, Api::<Node>::all(cluster.client.clone())).await {
        Ok(nodes) => judge(&nodes, report),
        Err(error) => report.unknown(CATEGORY, "system", &error),
    }
    let leases = all(cluster, Api::<Lease>::namespaced(cluster.client.clone(), LEASES));
    match futures_util::future::try_join(leases, server_time(cluster)).await {
        Ok((leases, now)) => judge_clocks(&leases, now, report),
        Err(error) => report.unknown(CATEGORY, "clock", &error),
    }
}

fn judge(nodes: &[Node], report: &mut Report) {
    let infos: Vec<(String, &NodeSystemInfo)> = nodes
        .iter()
        .filter_map(|node| {
            Some((node.metadata.name.clone().unwrap_or_default(), node.status.as_ref()?.node_info.as_ref()?))
        })
        .collect();
    if infos.is_empty() {
        report.add(
            CATEGORY,
            "system",
            Outcome::Warning,
            "there is no node",
            "add nodes: without one no pod runs",
        );
        return;
    }
    let linux: Vec<_> = infos.iter().filter(|(_, info)| info.operating_system == "linux").collect();
    let count = infos.len() - linux.len();
    if count > 0 {
        let what = format!("{count} of {} nodes run no Linux; their pods cannot be injected", infos.len());
        report.note(CATEGORY, "system", what);
    }
    let mut judge = |check,
                     fits: &dyn Fn(&NodeSystemInfo) -> bool,
                     shown: &dyn Fn(&NodeSystemInfo) -> String,
                     advice: String| {
        let wrong: Vec<String> = linux
            .iter()
            .filter(|(_, info)| !fits(info))
            .map(|(name, info)| format!("{name} ({})", shown(info)))
            .collect();
        if wrong.is_empty() {
            let mut seen: Vec<String> = linux.iter().map(|(_, info)| shown(info)).collect();
            seen.sort();
            seen.dedup();
            report.ok(CATEGORY, check, some(&seen));
        } else {
            report.add(CATEGORY, check, Outcome::Failed, some(&wrong), advice);
        }
    };
    let (major, minor) = OLDEST_KERNEL;
    judge(
        "kernel",
        &|info| number(&info.kernel_version) >= OLDEST_KERNEL,
        &|info| format!("Linux {}", info.kernel_version),
        format!("redirection needs Linux {major}.{minor} or newer on every node that runs injected pods"),
    );
    judge(
        "architecture",
        &|info| ARCHITECTURES.contains(&info.architecture.as_str()),
        &|info| info.architecture.clone(),
        format!("there are images for {}; keep injected pods off other nodes", ARCHITECTURES.join(" and ")),
    );
    judge(
        "kubelet",
        &|info| number(info.kubelet_version.trim_start_matches('v')) >= (1, OLDEST_KUBELET),
        &|info| format!("kubelet {}", info.kubelet_version),
        format!("native sidecars need kubelets of 1.{OLDEST_KUBELET} or newer"),
    );
}

/// The first two numbers of a version.
fn number(version: &str) -> (u32, u32) {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// A lease from the future shows a clock that is ahead. One that is behind cannot be told from a kubelet that is late.
fn judge_clocks(leases: &[Lease], now: Timestamp, report: &mut Report) {
    let ahead: Vec<String> = leases
        .iter()
        .filter_map(|lease| {
            let renewed = lease.spec.as_ref()?.renew_time.as_ref()?.0;
            let by = renewed.as_second() - now.as_second();
            let name = lease.metadata.name.as_deref().unwrap_or_default();
            (by > MOST_AHEAD).then(|| format!("{name} (by {by} s)"))
        })
        .collect();
    if ahead.is_empty() {
        report.ok(CATEGORY, "clock", "no node's is ahead of the API server's");
    } else {
        let seen = format!("ahead of the API server's: {}", some(&ahead));
        report.add(CATEGORY, "clock", Outcome::Warning, seen, "let all nodes follow NTP");
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeStatus;
    use serde_json::json;

    use super::*;
    use crate::output::{Format, Paint};

    fn node(name: &str, os: &str, kernel: &str, architecture: &str, kubelet: &str) -> Node {
        let info = NodeSystemInfo {
            operating_system: os.to_owned(),
            kernel_version: kernel.to_owned(),
            architecture: architecture.to_owned(),
            kubelet_version: kubelet.to_owned(),
            ..NodeSystemInfo::default()
        };
        let mut node = Node {
            status: Some(NodeStatus { node_info: Some(info), ..NodeStatus::default() }),
            ..Node::default()
        };
        node.metadata.name = Some(name.to_owned());
        node
    }

    #[test]
    fn each_node_is_named_for_what_it_lacks() {
        let good = node("a", "linux", "6.8.0-45-generic", "arm64", "v1.34.4-eks-1");
        let nodes = [
            good.clone(),
            node("b", "linux", "4.19.0-27-amd64", "amd64", "v1.28.2"),
            node("c", "linux", "5.15.0", "s390x", "v1.30.0"),
            node("w", "windows", "10.0.20348", "amd64", "v1.34.4"),
        ];
        let mut report = Report::default();
        judge(&nodes, &mut report);
        judge(&[good], &mut report);
        judge(&[], &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }

    #[test]
    fn a_lease_from_the_future_is_a_clock_that_is_ahead() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let lease = |name: &str, time: &str| -> Lease {
            serde_json::from_value(json!({ "metadata": { "name": name }, "spec": { "renewTime": time } }))
                .unwrap()
        };
        let mut report = Report::default();
        judge_clocks(&[lease("a", "2025-12-31T23:59:55.000000Z")], now, &mut report);
        judge_clocks(&[lease("b", "2026-01-01T00:01:00.000000Z")], now, &mut report);
        assert_eq!(report.0[0].result, Outcome::Ok);
        assert_eq!(report.0[1].seen, "ahead of the API server's: b (by 60 s)");
    }
}
