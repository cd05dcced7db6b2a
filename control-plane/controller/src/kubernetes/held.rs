//! Pods that their node's CNI plugin missed: a node that has just come, or comes back, starts pods before its agent has put
//! the plugin in place. Such a pod is held by its init container `outrigger-check`, because it would send in clear, and
//! nothing that a node or an agent without privileges can do gives it the rules afterwards. So it is evicted, and its owner
//! makes another.
//!
//! Only what is known to end: the pod has an owner, its node's agent is ready, and the pod was started before that. One that
//! was started later and is held all the same (another plugin rewrote the node's configuration just then) waits for
//! [`PATIENCE`], and of these a node loses one in that time: an agent that is mistaken about its node (another folder is in
//! use, the runtime hands over no annotations) costs a pod now and then, and no storm. Where many are due at once they go
//! [`AT_ONCE`] by [`AT_ONCE`].
//!
//! Eviction rather than deletion, for it is the smaller right; a held pod is no part of any budget. It names the pod's uid and
//! version, so that one which has moved on, or taken another's name, stays.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{ListParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use outrigger_inject::{CHECKER, INJECTED};
use tokio::time::{interval, timeout};

use super::known::Known;
use super::{Trouble, watch};

/// Between two looks. A check fails five seconds after it began, so a held pod costs its owner some fifteen.
const LOOK: Duration = Duration::from_secs(10);
/// How long a pod that was started after its agent was ready is held, and between two such pods of a node that go.
const PATIENCE: SignedDuration = SignedDuration::from_mins(5);
/// Pods that go in one look: two a second.
const AT_ONCE: usize = 20;
/// The longest that one request takes.
const DEADLINE: Duration = Duration::from_secs(5);
/// The pods of the DaemonSet.
const AGENTS: &str = "app.kubernetes.io/name=outrigger,app.kubernetes.io/component=cni";
/// With what the check ends where nothing is redirected. Others are the runtime's word: it was killed, or could not start.
const NOT_REDIRECTED: i32 = 1;

/// Evicts what is held, for as long as it is polled.
pub(crate) async fn keep(client: Client, mesh_namespace: String) {
    let injected = watcher::Config::default().labels(&format!("{INJECTED}=true"));
    let mut seen = pin!(watch(Api::<Pod>::all(client.clone()), injected, "watch the injected pods"));
    let mut held = Known::default();
    let mut late = Late::default();
    let mut look = interval(LOOK);
    let mut trouble = Trouble::new("replace pods that the CNI plugin missed");
    loop {
        tokio::select! {
            event = seen.next() => match event {
                Some(event) => _ = held.see(event, Held::of),
                // A watch has no end.
                None => return,
            },
            _ = look.tick() => match replace(&client, &mesh_namespace, &held.objects, &mut late).await {
                Ok(()) => trouble.over(),
                Err(error) => trouble.is(&format!("{error:#}")),
            },
        }
    }
}

/// A pod that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    uid: String,
    version: String,
    node: String,
    started: Timestamp,
}

impl Held {
    /// The pod, if its check has failed and another pod would take its place.
    fn of(pod: &Pod) -> Option<Self> {
        if !pod.owner_references().iter().any(|owner| owner.controller == Some(true))
            || pod.metadata.deletion_timestamp.is_some()
        {
            return None;
        }
        let status = pod.status.as_ref()?;
        // The phase says little: it is `Running` where the pod's containers have run before its node came back, and `Failed` where
        // they may not be started again, which is their owner's to see.
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let check = status.init_container_statuses.iter().flatten().find(|one| one.name == CHECKER)?;
        let mut ended = [&check.state, &check.last_state].into_iter().flatten();
        let has_failed = ended
            .any(|state| state.terminated.as_ref().is_some_and(|ended| ended.exit_code == NOT_REDIRECTED));
        if check.ready || !has_failed {
            return None;
        }
        Some(Self {
            uid: pod.uid()?,
            version: pod.resource_version()?,
            node: pod.spec.as_ref()?.node_name.clone()?,
            started: status.start_time.as_ref()?.0,
        })
    }
}

/// When a node lost a pod last that was started after its agent was ready.
#[derive(Debug, Default)]
struct Late(HashMap<String, Timestamp>);

impl Late {
    /// Whether the pod goes now. `ready`: since when the agent of its node is, if it is.
    fn is_due(&mut self, pod: &Held, ready: Option<Timestamp>, now: Timestamp) -> bool {
        let Some(ready) = ready else { return false };
        if pod.started < ready {
            return true;
        }
        self.0.retain(|_, last| now.duration_since(*last) < PATIENCE);
        if now.duration_since(pod.started) < PATIENCE || self.0.contains_key(&pod.node) {
            return false;
        }
        self.0.insert(pod.node.clone(), now);
        true
    }
}

async fn replace(
    client: &Client,
    mesh_namespace: &str,
    held: &BTreeMap<(String, String), Held>,
    late: &mut Late,
) -> anyhow::Result<()> {
    if held.is_empty() {
        return Ok(());
    }
    let agents = Api::<Pod>::namespaced(client.clone(), mesh_namespace);
    let of_agents = ListParams::default().labels(AGENTS).match_any();
    let agents = timeout(DEADLINE, agents.list(&of_agents)).await;
    let agents =
        agents.context("the API server did not answer in time")?.context("cannot list the agents")?;
    let ready: HashMap<String, Timestamp> = agents.items.iter().filter_map(ready).collect();
    let now = Timestamp::now();
    let due = held.iter().filter(|(_, pod)| late.is_due(pod, ready.get(&pod.node).copied(), now));
    let mut failed = Ok(());
    for ((namespace, name), pod) in due.take(AT_ONCE) {
        let evicted = timeout(DEADLINE, evict(client, namespace, name, pod)).await;
        let evicted =
            evicted.unwrap_or_else(|_| Err(anyhow::anyhow!("the API server did not answer in time")));
        // One that cannot go keeps no other from going.
        if let Err(error) = evicted {
            failed = Err(error.context(format!("cannot evict the pod {namespace}/{name}")));
        }
    }
    failed
}

async fn evict(client: &Client, namespace: &str, name: &str, pod: &Held) -> anyhow::Result<()> {
    let preconditions =
        Preconditions { uid: Some(pod.uid.clone()), resource_version: Some(pod.version.clone()) };
    // kube's own `evict` sends `delete_options`, which the API server does not know.
    let eviction = Eviction {
        metadata: ObjectMeta {
            namespace: Some(namespace.to_owned()),
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
        delete_options: Some(DeleteOptions {
            preconditions: Some(preconditions),
            ..DeleteOptions::default()
        }),
    };
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let asked = pods.create_subresource("eviction", name, &PostParams::default(), &eviction).await;
    match asked as kube::Result<serde_json::Value> {
        Ok(_) => {
            tracing::info!(
                namespace,
                name,
                node = pod.node,
                "a pod was started when the CNI plugin was not in place on its node; it is evicted, and its owner makes another"
            );
            Ok(())
        }
        // Gone, another one by now, or a budget that says not yet.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 429) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The node of an agent that is ready, and since when.
fn ready(agent: &Pod) -> Option<(String, Timestamp)> {
    let node = agent.spec.as_ref()?.node_name.clone()?;
    let conditions = agent.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|one| one.type_ == "Ready" && one.status == "True")?;
    Some((node, ready.last_transition_time.as_ref()?.0))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kubernetes::fake::Cluster;

    const READY: &str = "2026-01-01T00:10:00Z";

    fn pod(started: &str, check: &Value) -> Value {
        json!({
            "metadata": {
                "name": "web-1", "namespace": "shop", "uid": "u-1", "resourceVersion": "7",
                "labels": { "outrigger.dev/injected": "true" },
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

    fn agent(since: &str) -> Value {
        json!({
            "metadata": {
                "name": "outrigger-cni-1", "namespace": "mesh",
                "labels": { "app.kubernetes.io/name": "outrigger", "app.kubernetes.io/component": "cni" },
            },
            "spec": { "nodeName": "node-1", "containers": [] },
            "status": { "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": since }] },
        })
    }

    fn held(pod: Value) -> Option<Held> {
        Held::of(&serde_json::from_value(pod).unwrap())
    }

    fn failed() -> Value {
        json!({ "terminated": { "exitCode": 1 } })
    }

    #[test]
    fn a_pod_is_held_while_its_check_fails_and_somebody_would_replace_it() {
        assert!(held(pod(READY, &failed())).is_some());
        let mut waits = pod(READY, &json!({ "waiting": { "reason": "CrashLoopBackOff" } }));
        assert_eq!(held(waits.clone()), None);
        waits["status"]["initContainerStatuses"][0]["lastState"] = failed();
        // As that of a node that has started anew.
        waits["status"]["phase"] = json!("Running");
        assert!(held(waits).is_some());

        let ended = |code: i32| json!({ "terminated": { "exitCode": code } });
        for other in [json!({ "running": {} }), ended(0), ended(137)] {
            assert_eq!(held(pod(READY, &other)), None, "{other}");
        }
        for (path, value) in [
            ("/metadata/ownerReferences", json!([])),
            ("/metadata/deletionTimestamp", json!(READY)),
            ("/status/phase", json!("Failed")),
            ("/status/initContainerStatuses/0/name", json!("migrate")),
        ] {
            let mut other = pod(READY, &failed());
            other["metadata"]["deletionTimestamp"] = Value::Null;
            *other.pointer_mut(path).unwrap() = value;
            assert_eq!(held(other), None, "{path}");
        }
    }

    #[test]
    fn one_that_was_there_before_the_agent_goes_at_once_and_of_others_one_in_a_while() {
        let ready = READY.parse().ok();
        let mut late = Late::default();
        let mut due = |started: &str, now: &str| {
            late.is_due(&held(pod(started, &failed())).unwrap(), ready, now.parse().unwrap())
        };
        for now in ["2026-01-01T00:10:01Z", "2026-01-01T00:10:02Z"] {
            assert!(due("2026-01-01T00:09:59Z", now));
        }
        assert!(!due("2026-01-01T00:10:30Z", "2026-01-01T00:15:00Z"));
        assert!(due("2026-01-01T00:10:30Z", "2026-01-01T00:15:31Z"));
        assert!(!due("2026-01-01T00:10:31Z", "2026-01-01T00:16:00Z"), "the node has just lost one");
        assert!(due("2026-01-01T00:10:31Z", "2026-01-01T00:20:32Z"));

        let before = held(pod("2026-01-01T00:00:00Z", &failed())).unwrap();
        assert!(!late.is_due(&before, None, Timestamp::now()), "no agent is ready there");
        let typed = |agent: Value| serde_json::from_value::<Pod>(agent).unwrap();
        assert_eq!(super::ready(&typed(agent(READY))).map(|(node, _)| node).as_deref(), Some("node-1"));
        let mut away = agent(READY);
        away["status"]["conditions"][0]["status"] = json!("False");
        assert_eq!(super::ready(&typed(away)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_eviction_names_the_pod_that_was_seen() {
        let cluster = Cluster::new();
        cluster.put("pods", agent(READY));
        cluster.put("pods", pod("2026-01-01T00:00:00Z", &failed()));
        let version = cluster.get("pods", "shop", "web-1").unwrap()["metadata"]["resourceVersion"].clone();
        let (client, _way) = cluster.client();
        tokio::spawn(keep(client, "mesh".to_owned()));
        cluster.until("an eviction", |cluster| cluster.get("pods", "shop", "web-1").is_none()).await;
        let sent = cluster.evictions();
        assert_eq!(sent.len(), 1, "{sent:?}");
        let expected = json!({ "uid": "u-1", "resourceVersion": version });
        assert_eq!(sent[0]["deleteOptions"]["preconditions"], expected);
        assert_eq!((&sent[0]["kind"], &sent[0]["apiVersion"]), (&json!("Eviction"), &json!("policy/v1")));
    }
}
