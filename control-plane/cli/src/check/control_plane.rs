//! The control plane: whether its pods run, all of them and of one version.

use std::collections::BTreeSet;

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::Api;

use super::{
    report::{Outcome, Report},
    some,
};
use crate::cluster::{Cluster, MESH_NAMESPACE, is_ready};

const CATEGORY: &str = "Control plane";
const AGENTS: &str = "node agents";

pub(super) async fn check(cluster: &Cluster, report: &mut Report) {
    let deployments = Api::<Deployment>::namespaced(cluster.client.clone(), MESH_NAMESPACE);
    for (component, name) in [("controller", "outrigger-controller"), ("injector", "outrigger-injector")] {
        match cluster.patiently(deployments.get_opt(name)).await {
            Ok(deployment) => judge(component, name, deployment.as_ref(), report),
            Err(error) => report.unknown(CATEGORY, component, &error),
        }
    }
    match futures_util::future::try_join(cluster.pods("controller"), cluster.pods("injector")).await {
        Ok((controllers, injectors)) => judge_images(controllers.iter().chain(&injectors), report),
        Err(error) => report.unknown(CATEGORY, "images", &error),
    }
    match cluster.pods("cni").await {
        Ok(agents) => judge_agents(&agents, report),
        Err(error) => report.unknown(CATEGORY, AGENTS, &error),
    }
}

/// Without the CNI plugin there are none.
fn judge_agents(agents: &[Pod], report: &mut Report) {
    let node = |agent: &Pod| agent.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    let unready: Vec<String> = agents.iter().filter(|agent| !is_ready(agent)).map(node).collect();
    if !unready.is_empty() {
        let advice = format!(
            "pods of the mesh that start there are held: the log of the agent says why \
             (`kubectl logs -n {MESH_NAMESPACE} -l app.kubernetes.io/component=cni --prefix`)"
        );
        let seen = format!("{} of {} not ready, on {}", unready.len(), agents.len(), some(&unready));
        report.add(CATEGORY, AGENTS, Outcome::Failed, seen, advice);
    } else if !agents.is_empty() {
        report.ok(CATEGORY, AGENTS, format!("{} ready", agents.len()));
    }
}

fn judge(component: &'static str, name: &str, deployment: Option<&Deployment>, report: &mut Report) {
    let Some(deployment) = deployment else {
        let advice = "install the chart; `outrigger check --pre` says whether the cluster takes it";
        report.add(CATEGORY, component, Outcome::Failed, format!("there is no Deployment {name}"), advice);
        return;
    };
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
    let seen = format!("{ready} of {wanted} ready");
    if ready >= wanted && wanted > 0 {
        report.ok(CATEGORY, component, seen);
        return;
    }
    // One that serves is enough for what runs; without any, nothing new starts.
    let result = if ready > 0 { Outcome::Warning } else { Outcome::Failed };
    let advice = if wanted == 0 {
        format!("it is scaled to 0: `kubectl scale deployment {name} --replicas 1 -n {MESH_NAMESPACE}`")
    } else {
        format!(
            "`kubectl describe deployment {name} -n {MESH_NAMESPACE}` and the events of its pods say what they wait for"
        )
    };
    report.add(CATEGORY, component, result, seen, advice);
}

/// Controller and injector come from one image; during an upgrade there are two for a while.
fn judge_images<'a>(pods: impl Iterator<Item = &'a Pod>, report: &mut Report) {
    let images: BTreeSet<&str> = pods
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .filter_map(|pod| pod.spec.as_ref()?.containers.first()?.image.as_deref())
        .collect();
    let images: Vec<&str> = images.into_iter().collect();
    match images.as_slice() {
        // That there are none was told above.
        [] => {}
        [image] => report.ok(CATEGORY, "images", *image),
        _ => report.add(
            CATEGORY,
            "images",
            Outcome::Warning,
            images.join(", "),
            format!(
                "if no upgrade is under way, one is stuck: `kubectl rollout status deployment -n {MESH_NAMESPACE}` says which"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::output::{Format, Paint};

    #[test]
    fn replicas_and_images() {
        let mut report = Report::default();
        let deployment = |wanted: i32, ready: i32| -> Deployment {
            serde_json::from_value(json!({
                "metadata": {},
                "spec": { "replicas": wanted, "selector": {}, "template": {} },
                "status": { "readyReplicas": ready },
            }))
            .unwrap()
        };
        judge("controller", "outrigger-controller", None, &mut report);
        for (wanted, ready) in [(3, 3), (3, 1), (3, 0), (0, 0)] {
            judge("controller", "outrigger-controller", Some(&deployment(wanted, ready)), &mut report);
        }
        let pod = |image: &str| -> Pod {
            let spec = json!({ "containers": [{ "name": "c", "image": image }] });
            serde_json::from_value(json!({ "metadata": {}, "spec": spec })).unwrap()
        };
        judge_images([].iter(), &mut report);
        judge_images([pod("a:1"), pod("a:1")].iter(), &mut report);
        judge_images([pod("a:1"), pod("a:2")].iter(), &mut report);
        let agent = |node: &str, ready: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": {}, "spec": { "containers": [], "nodeName": node },
                "status": { "conditions": [{ "type": "Ready", "status": ready }] },
            }))
            .unwrap()
        };
        judge_agents(&[], &mut report);
        judge_agents(&[agent("n1", "True"), agent("n2", "True")], &mut report);
        judge_agents(&[agent("n1", "True"), agent("n2", "False")], &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }
}
