//! Events: who looks at a Deployment whose pods have no sidecar should find the reason there.
//!
//! They are a courtesy: bounded in number, written behind the review's back, and dropped where there are too many.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use serde_json::Value;
use tokio::sync::mpsc;

use super::metrics::Metrics;

/// Events that wait to be written.
const QUEUE: usize = 64;
/// Between two: ten a second at most. The recorder remembers each for six minutes, so this bounds its memory too.
const PACE: Duration = Duration::from_millis(100);
/// Bytes of a note that the API takes.
const MAX_NOTE: usize = 1000;

/// Where events are given to.
#[derive(Debug, Clone)]
pub(super) struct Events {
    queue: mpsc::Sender<(ObjectReference, String)>,
    metrics: Arc<Metrics>,
}

impl Events {
    /// The queue, and what empties it.
    pub(super) fn new(
        client: Client,
        metrics: Arc<Metrics>,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        (Self { queue, metrics }, publish(client, waiting))
    }

    /// Says on the owner of `pod`, or on the pod itself, why it was not injected.
    pub(super) fn skipped(&self, pod: &Value, namespace: &str, why: &str) {
        let note: String = why.chars().take(MAX_NOTE).collect();
        if self.queue.try_send((about(pod, namespace), note)).is_err() {
            self.metrics.events_dropped.inc();
        }
    }
}

async fn publish(client: Client, mut waiting: mpsc::Receiver<(ObjectReference, String)>) {
    let recorder = Recorder::new(client, Reporter::from("outrigger-injector"));
    while let Some((object, note)) = waiting.recv().await {
        let event = Event {
            type_: EventType::Warning,
            reason: "InjectionSkipped".to_owned(),
            note: Some(note),
            action: "Inject".to_owned(),
            secondary: None,
        };
        if let Err(error) = recorder.publish(&event, &object).await {
            tracing::warn!(%error, kind = object.kind, name = object.name, "cannot write an event");
        }
        tokio::time::sleep(PACE).await;
    }
}

fn about(pod: &Value, namespace: &str) -> ObjectReference {
    let owner = &pod["metadata"]["ownerReferences"][0];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let (kind, api_version, object) = match text(&owner["kind"]) {
        Some(kind) => (kind, text(&owner["apiVersion"]), owner),
        None => ("Pod".to_owned(), Some("v1".to_owned()), &pod["metadata"]),
    };
    let name = text(&object["name"])
        .or_else(|| Some(text(&object["generateName"])?.trim_end_matches('-').to_owned()));
    ObjectReference {
        kind: Some(kind),
        api_version,
        name,
        namespace: Some(namespace.to_owned()),
        uid: text(&object["uid"]),
        ..ObjectReference::default()
    }
}
