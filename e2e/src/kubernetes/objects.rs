//! What suites do with objects all the time: apply what a person would, and wait for what comes of it.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{Scope, pinned_kind};
use kube::{Client, ResourceExt as _};
use serde::de::DeserializeOwned;

use crate::wait::wait_until;

/// Whose fields the suites' fields are.
const FIELD_MANAGER: &str = "e2e";
/// A kind is served a moment after its definition was accepted.
const KIND_LIMIT: Duration = Duration::from_secs(10);

/// Applies the documents of a YAML text, in their order, as `kubectl apply --server-side --force-conflicts` does. Returns what the
/// server made of them.
pub async fn apply(client: &Client, yaml: &str) -> anyhow::Result<Vec<DynamicObject>> {
    let mut applied = Vec::new();
    for object in parse(yaml)? {
        let api = api_of(client, &object).await?;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let result = api.patch(&object.name_any(), &parameters, &Patch::Apply(&object)).await;
        applied.push(result.with_context(|| format!("applying {}", shown(&object)))?);
    }
    Ok(applied)
}

/// Deletes what a YAML text names, last first, and does not wait for its end. What is not there is as good as deleted.
pub async fn delete(client: &Client, yaml: &str) -> anyhow::Result<()> {
    for object in parse(yaml)?.iter().rev() {
        let api = api_of(client, object).await?;
        match api.delete(&object.name_any(), &DeleteParams::background()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => {
                return Err(error).with_context(|| format!("deleting {}", shown(object)));
            }
        }
    }
    Ok(())
}

/// Waits until `probe` finds an answer in the object of this name.
pub async fn wait_for<K, T>(
    api: &Api<K>,
    name: &str,
    limit: Duration,
    what: &str,
    probe: impl Fn(&K) -> anyhow::Result<T>,
) -> anyhow::Result<T>
where
    K: Clone + Debug + DeserializeOwned,
{
    wait_until(limit, &format!("{name}: {what}"), || async {
        let object = api.get_opt(name).await?.with_context(|| format!("there is no {name}"))?;
        probe(&object)
    })
    .await
}

/// Waits until there is no object of this name.
pub async fn gone<K>(api: &Api<K>, name: &str, limit: Duration) -> anyhow::Result<()>
where
    K: Clone + Debug + DeserializeOwned,
{
    wait_until(limit, &format!("{name} to be gone"), || async {
        ensure!(api.get_opt(name).await?.is_none(), "it is there");
        Ok(())
    })
    .await
}

/// A probe for [`wait_for`]: the pod is ready. Says what its containers wait for otherwise.
pub fn pod_ready(pod: &Pod) -> anyhow::Result<()> {
    let status = pod.status.as_ref().context("it has no status")?;
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let ready = conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let states = || {
        let inits = status.init_container_statuses.iter().flatten();
        let all = inits.chain(status.container_statuses.iter().flatten());
        let said = |state: &_| serde_json::to_string(state).unwrap_or_default();
        all.map(|one| format!("{} {}", one.name, one.state.as_ref().map(said).unwrap_or_default()))
            .collect::<Vec<_>>()
            .join(", ")
    };
    ensure!(ready, "{}: {}", status.phase.as_deref().unwrap_or("no phase"), states());
    Ok(())
}

fn parse(yaml: &str) -> anyhow::Result<Vec<DynamicObject>> {
    // A document without content is what stands between two separators.
    let documents: Vec<Option<serde_json::Value>> =
        serde_saphyr::from_multiple(yaml).map_err(|error| anyhow::anyhow!("reading YAML: {error}"))?;
    let objects = documents.into_iter().flatten().filter(|document| !document.is_null());
    objects
        .map(|document| {
            let shown = document.to_string();
            serde_json::from_value(document).with_context(|| format!("this is no object: {shown}"))
        })
        .collect()
}

async fn api_of(client: &Client, object: &DynamicObject) -> anyhow::Result<Api<DynamicObject>> {
    let types = object.types.as_ref().context("an object has apiVersion and kind")?;
    let kind = GroupVersionKind::try_from(types).with_context(|| format!("the kind of {}", shown(object)))?;
    let (resource, capabilities) = wait_until(KIND_LIMIT, &format!("{} to be served", kind.kind), || async {
        Ok(pinned_kind(client, &kind).await?)
    })
    .await?;
    Ok(match (capabilities.scope, object.namespace()) {
        (Scope::Cluster, _) => Api::all_with(client.clone(), &resource),
        (Scope::Namespaced, Some(namespace)) => Api::namespaced_with(client.clone(), &namespace, &resource),
        (Scope::Namespaced, None) => Api::default_namespaced_with(client.clone(), &resource),
    })
}

fn shown(object: &DynamicObject) -> String {
    let kind = object.types.as_ref().map_or("object", |types| types.kind.as_str());
    let name = object.name_any();
    object
        .namespace()
        .map_or_else(|| format!("{kind} {name}"), |namespace| format!("{kind} {namespace}/{name}"))
}
