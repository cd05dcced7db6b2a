//! Policies as objects of the Kubernetes API.
//!
//! ```text
//! follow  one list and watch for each kind         ->
//! decode  what an object says, or why it cannot be read   ->
//! held    the last good of each, as one picture     ->  the resolver
//! status  what became of each                       <-  the resolver, the proxies
//! ```
//!
//! What the API does not have, this store does not pretend to have:
//! - **No revision of all policies.** The picture's is a counter of this process. An object's is its `generation`, which every replica
//!   sees alike and a status does not move.
//! - **No write of several objects.** A write of more than one is tried on the server first (`dryRun`), and then made object by object in
//!   the given order, each only if it still is what was judged. Where one fails after others were written, the answer names them.
//! - **No history.** It has what is in force; who wants more keeps policies in a repository.
//!
//! Last good wins. An object that cannot be read keeps what it last said; an API server that is away changes nothing. Deleting a CRD
//! deletes its objects, and their events look like anybody's: so no object is believed to be gone before its CRD was seen to be there
//! still (see [`follow`]).

mod decode;
#[cfg(test)]
mod fake;
mod follow;
mod held;
mod resource;
pub(crate) mod status;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, PostParams, Preconditions};
use outrigger_policy::{Key, Object};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use self::held::Held;
use self::resource::Resource;
use super::{Action, Change, MAX_POLICIES, Past, Picture, PolicyStore, Write, WriteError};
use crate::sources::Sync;

/// Who writes, to the API server; the author follows.
const MANAGER: &str = "outrigger";
/// Bytes of a field manager's name (the API server's own bound).
const MAX_MANAGER: usize = 128;
/// How long a request that is no watch may take: an API server that is this slow is as good as away.
const REQUEST: Duration = Duration::from_secs(15);

/// See the module. Dropping it ends its tasks.
#[derive(Debug)]
pub(crate) struct KubernetesStore {
    shared: Arc<Shared>,
    /// Whoever holds it writes: of writers in this process none need lose.
    writing: tokio::sync::Mutex<()>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

struct Shared {
    client: Client,
    pictures: watch::Sender<Arc<Picture>>,
    held: Mutex<Held>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl KubernetesStore {
    /// Starts to watch. Must be called in a tokio runtime.
    pub(crate) fn start(client: Client) -> Self {
        let shared =
            Arc::new(Shared { client, pictures: watch::Sender::new(Arc::default()), held: Mutex::default() });
        let follow = |resource| tokio::spawn(Arc::clone(&shared).follow(resource));
        let tasks = Resource::ALL.into_iter().map(|resource| AbortOnDropHandle::new(follow(resource)));
        Self { _tasks: tasks.collect(), writing: tokio::sync::Mutex::new(()), shared }
    }
}

#[tonic::async_trait]
impl PolicyStore for KubernetesStore {
    fn pictures(&self) -> watch::Receiver<Arc<Picture>> {
        self.shared.pictures.subscribe()
    }

    async fn commit(&self, write: Write) -> Result<Arc<Picture>, WriteError> {
        let _writing = self.writing.lock().await;
        let before = Arc::clone(&self.shared.pictures.borrow());
        before.takes(&write, "the cluster's")?;
        if before.policies.len() + write.changes.len() > MAX_POLICIES {
            return Err(WriteError::TooLarge(format!("a mesh holds at most {MAX_POLICIES} objects")));
        }
        let manager: String = format!("{MANAGER}:{}", write.author).chars().take(MAX_MANAGER).collect();
        if write.changes.len() > 1 {
            for change in &write.changes {
                self.shared.write(change, &before, &manager, true).await?;
            }
        }
        let mut done = Vec::new();
        for change in &write.changes {
            match self.shared.write(change, &before, &manager, false).await {
                Ok(()) => done.push(change.key().to_string()),
                Err(error) if done.is_empty() => return Err(error),
                Err(error) => {
                    return Err(WriteError::Unavailable(format!(
                        "{}: {error}; already written: {}; what was given after it is not",
                        change.key(),
                        done.join(", ")
                    )));
                }
            }
        }
        Ok(Arc::clone(&self.shared.pictures.borrow()))
    }

    async fn history(&self, key: &Key) -> Result<Vec<Past>, String> {
        let picture = Arc::clone(&self.shared.pictures.borrow());
        let past = picture.policies.get(key).map(|stored| Past {
            revision: stored.revision,
            time: stored.updated,
            author: stored.author.clone(),
            action: if stored.revision > 1 { Action::Configured } else { Action::Created },
            object: Some(stored.object.clone()),
        });
        Ok(past.into_iter().collect())
    }
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        // Each change is a whole assignment: a panic elsewhere leaves it whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is held, and publishes the picture where it is another one then.
    fn change(&self, change: impl FnOnce(&mut Held)) {
        let mut held = self.held();
        change(&mut held);
        self.pictures.send_if_modified(|last| {
            let picture = held.picture(last);
            if **last == picture {
                return false;
            }
            tell(last, &picture);
            *last = Arc::new(picture);
            true
        });
    }

    fn api(&self, resource: Resource, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &resource.api())
    }

    /// Makes one change, if its object still is what it was judged to be.
    async fn write(
        &self,
        change: &Change,
        before: &Picture,
        manager: &str,
        dry_run: bool,
    ) -> Result<(), WriteError> {
        let key = change.key();
        let resource = Resource::Policy(key.kind);
        let api = self.api(resource, &key.namespace);
        let found = within(api.get_opt(&key.name)).await.map_err(|failure| failed(&key, &failure))?;
        let judged = before.policies.get(&key);
        let is_as_judged = match (&found, judged) {
            (None, None) => true,
            (Some(found), Some(judged)) => {
                found.metadata.generation == judged.object.metadata.generation
                    && found.metadata.uid == judged.object.metadata.uid
            }
            _ => false,
        };
        if !is_as_judged {
            // The watch would tell, but the caller shall judge again at once. That it is gone is for the watch to find out.
            if let Some(found) = found {
                self.change(|held| held.put(resource, found, false));
            }
            return Err(WriteError::Conflict);
        }
        let params = PostParams { dry_run, field_manager: Some(manager.to_owned()) };
        let written = match (change, found) {
            (Change::Put(object), None) => within(api.create(&params, &new(object, resource))).await,
            (Change::Put(object), Some(found)) => {
                within(api.replace(&key.name, &params, &replaced(found, object))).await
            }
            (Change::Delete(_), found) => {
                let meta = found.map(|found| found.metadata).unwrap_or_default();
                let preconditions =
                    Preconditions { resource_version: meta.resource_version, uid: meta.uid.clone() };
                let params =
                    DeleteParams { dry_run, preconditions: Some(preconditions), ..DeleteParams::default() };
                let deleted = within(api.delete(&key.name, &params)).await;
                deleted.map_err(|failure| failed(&key, &failure))?;
                if !dry_run {
                    self.change(|held| held.deleted(resource, &key, meta.uid));
                }
                return Ok(());
            }
        };
        let written = written.map_err(|failure| failed(&key, &failure))?;
        if !dry_run {
            self.change(|held| held.put(resource, written, true));
        }
        Ok(())
    }
}

/// Logs what is new about how far the policies can be trusted.
fn tell(last: &Picture, picture: &Picture) {
    match (&last.sync, &picture.sync) {
        (Sync::Degraded { reason: old, .. }, Sync::Degraded { reason, .. }) if old == reason => {}
        (_, Sync::Degraded { reason, .. }) => {
            tracing::warn!(
                reason,
                "policies cannot be read from Kubernetes: the last good stay, writes fail"
            );
        }
        (Sync::Degraded { .. }, Sync::Synced) => tracing::info!("policies are read from Kubernetes again"),
        _ => {}
    }
    for fault in picture.faults.iter().filter(|fault| !last.faults.contains(fault)) {
        tracing::warn!(
            object = fault.subject,
            reason = fault.reason,
            "a policy in Kubernetes cannot be used"
        );
    }
}

/// Bounds a request.
async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(REQUEST, request).await {
        Ok(answer) => answer.map_err(Failure::Failed),
        Err(_) => Err(Failure::Slow),
    }
}

/// Why the API server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The server's own words without its machine-readable part, which repeats them.
    #[error("{}", words(.0))]
    Failed(kube::Error),
    #[error("the API server did not answer within {} s", REQUEST.as_secs())]
    Slow,
}

fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        // kube names the layer, the cause is what helps.
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text = format!("{text}: {cause_text}");
                }
                source = cause.source();
            }
            text
        }
    }
}

impl Failure {
    fn code(&self) -> Option<u16> {
        match self {
            Self::Failed(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }
}

fn failed(key: &Key, failure: &Failure) -> WriteError {
    match failure.code() {
        // AlreadyExists and a version that is not the newest; an object that went between reading and writing.
        Some(409 | 404) => WriteError::Conflict,
        Some(403) => {
            WriteError::Unavailable(format!("{failure}; the controller's role must let it write {key}"))
        }
        Some(400..500) => WriteError::Unavailable(format!("the API server refuses {key}: {failure}")),
        _ => WriteError::Unavailable(format!("{key} cannot be written: {failure}; it may have taken effect")),
    }
}

/// As the API server takes it.
fn new(object: &Object, resource: Resource) -> DynamicObject {
    replaced(
        DynamicObject::new(&object.metadata.name, &resource.api()).within(&object.metadata.namespace),
        object,
    )
}

/// What is there, with what people write of it from `object`: owners and finalizers are others' to change.
fn replaced(mut found: DynamicObject, object: &Object) -> DynamicObject {
    found.metadata.labels = Some(object.metadata.labels.clone());
    found.metadata.annotations = Some(object.metadata.annotations.clone());
    found.metadata.managed_fields = None;
    let spec =
        serde_json::to_value(&object.spec).expect("a spec holds strings, numbers and lists, which are JSON");
    found.data = serde_json::json!({ "spec": spec });
    found
}
