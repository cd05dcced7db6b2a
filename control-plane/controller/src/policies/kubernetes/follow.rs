//! One list and watch for each resource.
//!
//! A list is read from the API server's own store, not from its cache, so that it is never older than what was seen before. Whatever
//! ends a watch but its own time-out (a version that the server no longer has, an error, silence) leads to a new list: policies are few.
//!
//! Before anything is believed to be gone its CRD is looked at. A CRD that is deleted takes its objects with it, and each gets a
//! deletion like any other; but it is marked first and goes last, so that one that is there, unmarked and the same *after* a deletion
//! was seen had no part in it.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, ListParams, WatchEvent, WatchParams};
use tokio_stream::StreamExt;

use super::resource::Resource;
use super::{Failure, Shared, within};

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// How long the server keeps a watch, in seconds. Short: a connection that died in silence is found out by the next one.
const WATCH_SECONDS: u32 = 60;
/// A watch that says nothing for longer than it should live is dead.
const SILENCE: Duration = Duration::from_secs(75);
/// How often the API server is asked for a resource that it does not have.
const ABSENT: Duration = Duration::from_secs(5);
/// Between tries: at first, and at most.
const PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Why a list and its watch have ended.
enum Ended {
    /// The resource has to be listed anew.
    Outdated,
    /// There is no such resource.
    Absent,
    Failed(String),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure.to_string())
    }
}

impl Shared {
    pub(super) async fn follow(self: Arc<Self>, resource: Resource) {
        let mut pause = PAUSE;
        loop {
            match self.read(resource, &mut pause).await {
                Ended::Outdated => tracing::debug!(%resource, "is listed anew"),
                Ended::Absent => {
                    self.change(|held| held.absent(resource));
                    tokio::time::sleep(ABSENT).await;
                }
                Ended::Failed(reason) => {
                    let reason = format!("{resource} cannot be read from the Kubernetes API: {reason}");
                    self.change(|held| held.failing(resource, reason));
                    // Half of it by chance: not all replicas come back in the same moment.
                    tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                    pause = MAX_PAUSE.min(pause * 2);
                }
            }
        }
    }

    /// Lists and watches until that ends.
    async fn read(&self, resource: Resource, pause: &mut Duration) -> Ended {
        match self.list_and_watch(resource, pause).await {
            Ok(()) => Ended::Outdated,
            Err(ended) => ended,
        }
    }

    async fn list_and_watch(&self, resource: Resource, pause: &mut Duration) -> Result<(), Ended> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource.api());
        let crd = self.crd(resource).await?.ok_or(Ended::Absent)?;
        let (objects, mut version) = list(&api).await?;
        // The list may be empty because the CRD went meanwhile.
        if self.crd(resource).await?.as_ref() != Some(&crd) {
            return Ok(());
        }
        self.change(|held| held.relist(resource, &crd, objects));
        let params = WatchParams::default().timeout(WATCH_SECONDS);
        loop {
            let events = within(api.watch(&params, &version)).await?;
            *pause = PAUSE;
            let mut events = pin!(events);
            loop {
                let next = tokio::time::timeout(SILENCE, events.next()).await;
                let next = next.map_err(|_| Ended::Failed("the watch says nothing any more".to_owned()))?;
                // Its time is over.
                let Some(event) = next else { break };
                match event.map_err(Failure::Failed)? {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        version = version_of(&object, version);
                        self.change(|held| held.put(resource, object, false));
                    }
                    WatchEvent::Deleted(object) => {
                        version = version_of(&object, version);
                        if self.crd(resource).await?.as_ref() != Some(&crd) {
                            return Ok(());
                        }
                        self.change(|held| held.remove(resource, &object));
                    }
                    WatchEvent::Bookmark(bookmark) => version = bookmark.metadata.resource_version,
                    WatchEvent::Error(status) if status.code == 410 => return Ok(()),
                    WatchEvent::Error(status) => return Err(Ended::Failed(status.message)),
                }
            }
        }
    }

    /// The uid of the resource's CRD. `None`: there is none, or it is being deleted.
    async fn crd(&self, resource: Resource) -> Result<Option<String>, Ended> {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let name = resource.crd();
        let found = within(crds.get_metadata_opt(&name)).await.map_err(|failure| match failure.code() {
            Some(403) => Ended::Failed(format!(
                "{failure}; the controller's role must let it get customresourcedefinitions, among them {name}: \
                 without that nobody can tell deleted policies from a deleted CRD"
            )),
            _ => failure.into(),
        })?;
        let alive = found.filter(|crd| crd.metadata.deletion_timestamp.is_none());
        Ok(alive.and_then(|crd| crd.metadata.uid))
    }
}

/// All objects, and the version that a watch goes on from.
async fn list(api: &Api<DynamicObject>) -> Result<(Vec<DynamicObject>, String), Ended> {
    let mut params = ListParams::default().limit(PAGE);
    let mut objects = Vec::new();
    loop {
        let page = within(api.list(&params)).await.map_err(|failure| match failure.code() {
            // Served neither by a CRD nor by anybody else.
            Some(404) => Ended::Absent,
            // The pages before are too old to go on from.
            Some(410) => Ended::Outdated,
            _ => failure.into(),
        })?;
        objects.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok((objects, page.metadata.resource_version.unwrap_or_default())),
        }
    }
}

fn version_of(object: &DynamicObject, last: String) -> String {
    object.metadata.resource_version.clone().unwrap_or(last)
}
