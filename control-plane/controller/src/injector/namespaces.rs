//! The labels of namespaces: a watch, and, where it has not seen one, or where what it saw would keep a sidecar out, the
//! API itself. A namespace that was labelled a moment ago must not get a pod without a sidecar because a watch is late.

use std::time::Duration;

use anyhow::Context;
use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use outrigger_inject::{INJECT, Namespace as Facts, POD_SECURITY};

/// For one question: the API server waits for us meanwhile.
const PATIENCE: Duration = Duration::from_secs(3);

type Metadata = PartialObjectMeta<Namespace>;

/// What is known of namespaces.
pub(super) struct Namespaces {
    api: Api<Metadata>,
    seen: Store<Metadata>,
}

impl Namespaces {
    /// What is known, and what keeps it up with the API.
    pub(super) fn new(api: Api<Metadata>) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (seen, writer) = reflector::store();
        let following = follow(api.clone(), writer);
        (Self { api, seen }, following)
    }

    /// What the watch saw last.
    pub(super) fn seen(&self, name: &str) -> Option<Facts> {
        self.seen.get(&ObjectRef::new(name)).map(|namespace| facts(&namespace))
    }

    /// What the API says now.
    pub(super) async fn fresh(&self, name: &str) -> anyhow::Result<Facts> {
        let asked = tokio::time::timeout(PATIENCE, self.api.get(name)).await;
        let answer = asked.context("the API did not answer in time").and_then(|answer| Ok(answer?));
        answer.map(|namespace| facts(&namespace)).with_context(|| format!("cannot read the namespace {name}"))
    }
}

async fn follow(api: Api<Metadata>, writer: Writer<Metadata>) {
    let pruned = watcher(api, watcher::Config::default()).default_backoff().modify(|namespace| {
        namespace.metadata.annotations = None;
        namespace.metadata.managed_fields = None;
    });
    let changes = reflector::reflector(writer, pruned);
    pin_mut!(changes);
    while let Some(change) = changes.next().await {
        if let Err(error) = change {
            tracing::warn!(%error, "cannot watch namespaces; each is asked for when a pod comes");
        }
    }
}

fn facts(namespace: &Metadata) -> Facts {
    let label = |name: &str| namespace.labels().get(name).cloned();
    Facts { name: namespace.name_any(), inject: label(INJECT), pod_security: label(POD_SECURITY) }
}
