//! Pods that their node's CNI plugin missed: a node that has just come, or comes back, starts pods before its agent has put
//! the plugin in place. Such a pod is held by its init container `outrigger-check`, because it would send in clear, and
//! nothing that a node or an agent without privileges can do gives it the rules afterwards. So it is evicted, and its owner
//! makes another.
//!
//! Only what is known to end: the pod has an owner, its node's agent is ready, and the pod was started before that. One that
//! was started later and is held all the same (another plugin rewrote the node's configuration just then) is evicted
//! after [`PATIENCE`], so that a node whose agent is mistaken costs one pod in that time and no storm. Eviction rather than
//! deletion: it respects budgets, and is the smaller right.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, EvictParams, ListParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use outrigger_inject::{CHECKER, INJECTED};
use tokio::time::{sleep, timeout};

use super::Trouble;

/// Between two looks. A check fails five seconds after it began, so a held pod costs its owner some fifteen.
const LOOK: Duration = Duration::from_secs(10);
/// How long a pod that was started after its agent was ready may be held.
const PATIENCE: Duration = Duration::from_mins(5);
/// The longest that one look takes.
const DEADLINE: Duration = Duration::from_secs(30);
/// The pods of the DaemonSet.
const AGENTS: &str = "app.kubernetes.io/name=outrigger,app.kubernetes.io/component=cni";

/// Evicts what is held, for as long as it is polled.
pub(crate) async fn keep(client: Client, mesh_namespace: String) {
    let mut trouble = Trouble::new("look for pods that the CNI plugin missed");
    loop {
        let looked = timeout(DEADLINE, look(&client, &mesh_namespace)).await;
        match looked.unwrap_or_else(|_| Err(anyhow::anyhow!("the API server did not answer in time"))) {
            Ok(()) => trouble.over(),
            Err(error) => trouble.is(&format!("{error:#}")),
        }
        sleep(LOOK).await;
    }
}

async fn look(client: &Client, mesh_namespace: &str) -> anyhow::Result<()> {
    // What a cache says is enough: an eviction names the pod's uid, and an old look is mended by the next.
    let pending = ListParams::default().labels(&format!("{INJECTED}=true")).fields("status.phase=Pending");
    let pods =
        Api::<Pod>::all(client.clone()).list(&pending.match_any()).await.context("cannot list pods")?;
    let held: Vec<Pod> = pods.items.into_iter().filter(is_held).collect();
    if held.is_empty() {
        return Ok(());
    }
    let agents = Api::<Pod>::namespaced(client.clone(), mesh_namespace);
    let agents = agents.list(&ListParams::default().labels(AGENTS).match_any()).await;
    let ready = agents.context("cannot list the agents of nodes")?.items.iter().filter_map(ready).collect();
    for pod in held.iter().filter(|pod| is_due(pod, &ready, Timestamp::now())) {
        evict(client, pod).await?;
    }
    Ok(())
}

async fn evict(client: &Client, pod: &Pod) -> anyhow::Result<()> {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let preconditions = Some(Preconditions { uid: pod.uid(), resource_version: None });
    let parameters = EvictParams {
        delete_options: Some(DeleteParams { preconditions, ..DeleteParams::default() }),
        ..EvictParams::default()
    };
    match Api::<Pod>::namespaced(client.clone(), &namespace).evict(&name, &parameters).await {
        Ok(_) => {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
            tracing::info!(
                namespace,
                name,
                node,
                "a pod was started when the CNI plugin was not in place on its node; it is evicted, and its owner makes another"
            );
            Ok(())
        }
        // Gone, another one by now, or a budget that says not yet.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 429) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot evict the pod {namespace}/{name}")),
    }
}

/// Whether its check has failed, and another pod would take its place.
fn is_held(pod: &Pod) -> bool {
    let has_owner = pod.owner_references().iter().any(|owner| owner.controller == Some(true));
    let statuses = pod.status.as_ref().and_then(|status| status.init_container_statuses.as_ref());
    let has_failed = statuses.into_iter().flatten().filter(|status| status.name == CHECKER).any(|status| {
        let ended = [&status.state, &status.last_state].into_iter().flatten();
        !status.ready && ended.filter_map(|state| state.terminated.as_ref()).any(|ended| ended.exit_code != 0)
    });
    has_owner && has_failed && pod.metadata.deletion_timestamp.is_none()
}

/// The node of an agent that is ready, and since when.
fn ready(agent: &Pod) -> Option<(String, Timestamp)> {
    let node = agent.spec.as_ref()?.node_name.clone()?;
    let conditions = agent.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|one| one.type_ == "Ready" && one.status == "True")?;
    Some((node, ready.last_transition_time.as_ref()?.0))
}

fn is_due(pod: &Pod, ready: &HashMap<String, Timestamp>, now: Timestamp) -> bool {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
    let Some(since) = node.and_then(|node| ready.get(node)) else { return false };
    let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref());
    started.is_some_and(|started| started.0 < *since || now.duration_since(started.0) > seconds(PATIENCE))
}

fn seconds(duration: Duration) -> k8s_openapi::jiff::SignedDuration {
    k8s_openapi::jiff::SignedDuration::try_from(duration).unwrap_or(k8s_openapi::jiff::SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const READY: &str = "2026-01-01T00:10:00Z";

    fn pod(started: &str, check: &Value) -> Value {
        json!({
            "metadata": {
                "name": "web-1", "namespace": "shop", "uid": "u-1",
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "u-0", "controller": true,
                }],
            },
            "spec": { "nodeName": "node-1", "containers": [] },
            "status": {
                "phase": "Pending",
                "startTime": started,
                "initContainerStatuses": [{
                    "name": CHECKER, "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": check,
                }],
            },
        })
    }

    fn typed(pod: Value) -> Pod {
        serde_json::from_value(pod).unwrap()
    }

    fn failed() -> Value {
        json!({ "terminated": { "exitCode": 1 } })
    }

    #[test]
    fn a_pod_is_held_while_its_check_fails_and_somebody_would_replace_it() {
        assert!(is_held(&typed(pod(READY, &failed()))));
        let mut waits = pod(READY, &json!({ "waiting": { "reason": "CrashLoopBackOff" } }));
        assert!(!is_held(&typed(waits.clone())));
        waits["status"]["initContainerStatuses"][0]["lastState"] = failed();
        assert!(is_held(&typed(waits)));

        for passes in [json!({ "running": {} }), json!({ "terminated": { "exitCode": 0 } })] {
            assert!(!is_held(&typed(pod(READY, &passes))));
        }
        let mut bare = pod(READY, &failed());
        bare["metadata"]["ownerReferences"] = json!([]);
        assert!(!is_held(&typed(bare)));
        let mut going = pod(READY, &failed());
        going["metadata"]["deletionTimestamp"] = json!(READY);
        assert!(!is_held(&typed(going)));
        let mut other = pod(READY, &failed());
        other["status"]["initContainerStatuses"][0]["name"] = json!("migrate");
        assert!(!is_held(&typed(other)));
    }

    #[test]
    fn one_that_was_there_before_the_agent_goes_at_once_and_another_after_a_while() {
        let agent = typed(json!({
            "metadata": { "name": "outrigger-cni-1" },
            "spec": { "nodeName": "node-1", "containers": [] },
            "status": { "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": READY }] },
        }));
        let ready: HashMap<_, _> = [&agent].into_iter().filter_map(super::ready).collect();
        let due = |started: &str, now: &str| {
            is_due(&typed(pod(started, &failed())), &ready, now.parse::<Timestamp>().unwrap())
        };
        assert!(due("2026-01-01T00:09:59Z", "2026-01-01T00:10:01Z"));
        assert!(!due("2026-01-01T00:10:30Z", "2026-01-01T00:15:00Z"));
        assert!(due("2026-01-01T00:10:30Z", "2026-01-01T00:15:31Z"));

        let mut elsewhere = pod("2026-01-01T00:00:00Z", &failed());
        elsewhere["spec"]["nodeName"] = json!("node-2");
        assert!(!is_due(&typed(elsewhere), &ready, "2026-01-02T00:00:00Z".parse().unwrap()));
        let mut away = agent;
        away.status.as_mut().unwrap().conditions.as_mut().unwrap()[0].status = "False".to_owned();
        assert_eq!(super::ready(&away), None);
    }
}
