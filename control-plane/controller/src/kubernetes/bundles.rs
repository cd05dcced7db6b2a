//! The roots beside each injected workload: the ConfigMap `outrigger-trust-bundle`, kept in every namespace that may hold
//! one.
//!
//! A pod cannot mount what lies in another namespace, and a sidecar must not trust the first certificate that it sees; so
//! the roots go where the pods are. A namespace gets the ConfigMap when it is labelled for injection (before its first pod)
//! or when it holds an injected pod, and keeps it as long as one of these holds. In the mesh's own namespace it always is:
//! there it also remembers which root this mesh has (see `authority`).
//!
//! The name is the mesh's. A ConfigMap of that name that somebody else made is overwritten, which is said: a sidecar that
//! mounts it would otherwise trust whoever made it. But what does not bear our label is never removed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{FuturesUnordered, select};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{DeleteParams, ListParams, ObjectMeta, PartialObjectMeta, Patch, PatchParams, Preconditions};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use outrigger_certs::retry_delay;
use tokio::time::{Instant, interval, sleep_until, timeout};

use super::known::{Changed, Known};
use super::{CONTROLLER, MANAGED_BY, Trouble, watch};

/// The ConfigMap's name.
pub(crate) const NAME: &str = "outrigger-trust-bundle";
/// Its only key: the roots, PEM.
pub(crate) const KEY: &str = "trust-bundle.pem";
/// The label that opts a namespace in, and its value.
const INJECT: (&str, &str) = ("outrigger.dev/inject", "enabled");
/// What an injected pod bears.
const INJECTED: &str = "outrigger.dev/injected=true";

/// Namespaces that are written at once: a thousand that are labelled together are done in a few seconds.
const AT_ONCE: usize = 16;
/// After a write the namespace is left alone for this long: somebody who always writes something else costs us one write a
/// second.
const REST: Duration = Duration::from_secs(1);
/// How often everything is compared, whatever the watches say.
const COMPARE: Duration = Duration::from_mins(5);
/// The longest pause after a failure: an API server that is back is used within it.
const SLOWEST: Duration = Duration::from_secs(30);
/// The longest that one write takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Keeps the ConfigMaps, for as long as it is polled.
pub(crate) async fn keep(client: Client, mesh_namespace: String, roots: String) {
    let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(client.clone());
    let pods: Api<PartialObjectMeta<Pod>> = Api::all(client.clone());
    let maps: Api<ConfigMap> = Api::all(client.clone());
    let namespaces =
        watch(namespaces, watcher::Config::default(), "watch the namespaces").map(Seen::Namespace);
    let pods =
        watch(pods, watcher::Config::default().labels(INJECTED), "watch the injected pods").map(Seen::Pod);
    let maps = watch(
        maps,
        watcher::Config::default().fields(&format!("metadata.name={NAME}")),
        "watch the trust bundles' ConfigMaps",
    )
    .map(Seen::Map);
    let mut seen = pin!(select(namespaces, select(pods, maps)));

    let mut view = View::new(mesh_namespace, roots.clone());
    let mut queue = Queue::default();
    let mut running = FuturesUnordered::new();
    let mut compare = interval(COMPARE);
    let mut trouble = Trouble::new("keep the trust bundle in each injected namespace");
    loop {
        while running.len() < AT_ONCE
            && let Some(namespace) = queue.pop(Instant::now())
        {
            let action = view.decide(&namespace);
            if action == Action::Nothing {
                queue.failures.remove(&namespace);
            } else {
                queue.busy.insert(namespace.clone());
                running.push(act(&client, namespace, action, &roots));
            }
        }
        let next = queue.next().filter(|_| running.len() < AT_ONCE);
        tokio::select! {
            event = seen.next() => match event {
                Some(event) => view.see(event).mark(&view, &mut queue),
                // A watch has no end.
                None => return,
            },
            Some((namespace, done)) = running.next() => match done {
                Ok(written) => {
                    trouble.over();
                    // The watch will say so too, but perhaps later.
                    if let Some(map) = written {
                        view.see(Seen::Map(Event::Apply(map)));
                    }
                    queue.done(namespace);
                }
                Err(error) => {
                    trouble.is(&format!("{namespace}: {error:#}"));
                    queue.failed(namespace);
                }
            },
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            _ = compare.tick() => Changed::All.mark(&view, &mut queue),
        }
    }
}

/// Writes the ConfigMap of a namespace, whatever is there; returns it.
pub(crate) async fn apply(client: &Client, namespace: &str, roots: &str) -> kube::Result<ConfigMap> {
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), CONTROLLER.to_owned())])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(KEY.to_owned(), roots.to_owned())])),
        ..ConfigMap::default()
    };
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    maps.patch(NAME, &PatchParams::apply(CONTROLLER).force(), &Patch::Apply(&map)).await
}

async fn act(
    client: &Client,
    namespace: String,
    action: Action,
    roots: &str,
) -> (String, anyhow::Result<Option<ConfigMap>>) {
    let acting = async {
        match action {
            Action::Nothing => Ok(None),
            Action::Apply { foreign } => {
                if foreign {
                    tracing::warn!(
                        namespace,
                        "somebody else's ConfigMap {NAME} is overwritten: the name is the mesh's"
                    );
                }
                let written = apply(client, &namespace, roots).await?;
                tracing::info!(namespace, "the trust bundle is in the ConfigMap {NAME}");
                Ok(Some(written))
            }
            Action::Remove { version } => {
                remove(client, &namespace, version).await?;
                Ok(None)
            }
        }
    };
    let acted = timeout(PATIENCE, acting).await;
    let acted = acted.unwrap_or_else(|_| Err(anyhow::anyhow!("the API server did not answer in time")));
    (namespace, acted)
}

/// Removes the ConfigMap, if the API server itself says that there is no injected pod: what we heard of pods may be old.
async fn remove(client: &Client, namespace: &str, version: String) -> kube::Result<()> {
    let pods: Api<PartialObjectMeta<Pod>> = Api::namespaced(client.clone(), namespace);
    if !pods.list(&ListParams::default().labels(INJECTED).limit(1)).await?.items.is_empty() {
        return Ok(());
    }
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let preconditions = Some(Preconditions { resource_version: Some(version), uid: None });
    match maps.delete(NAME, &DeleteParams { preconditions, ..DeleteParams::default() }).await {
        Ok(_) => tracing::info!(namespace, "nobody needs the ConfigMap {NAME} any more; it is removed"),
        // It has changed or gone since; the watch says how.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

enum Seen {
    Namespace(Event<PartialObjectMeta<Namespace>>),
    Pod(Event<PartialObjectMeta<Pod>>),
    Map(Event<ConfigMap>),
}

/// What a namespace needs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Nothing,
    /// Write the ConfigMap; `foreign`: over somebody else's.
    Apply {
        foreign: bool,
    },
    /// Remove the ConfigMap of this version.
    Remove {
        version: String,
    },
}

/// A ConfigMap as it was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    ours: bool,
    current: bool,
    version: String,
}

/// What was heard of the cluster. Pure.
struct View {
    mesh_namespace: String,
    roots: String,
    /// Whether each is labelled; those that are being deleted are not here.
    namespaces: Known<bool>,
    pods: Known<()>,
    maps: Known<Found>,
}

impl View {
    fn new(mesh_namespace: String, roots: String) -> Self {
        Self {
            mesh_namespace,
            roots,
            namespaces: Known::default(),
            pods: Known::default(),
            maps: Known::default(),
        }
    }

    fn see(&mut self, seen: Seen) -> Changed {
        match seen {
            Seen::Namespace(event) => self.namespaces.see(event, |namespace| {
                let labelled = namespace.labels().get(INJECT.0).is_some_and(|value| value == INJECT.1);
                namespace.meta().deletion_timestamp.is_none().then_some(labelled)
            }),
            Seen::Pod(event) => self.pods.see(event, |_| Some(())),
            Seen::Map(event) => self.maps.see(event, |map| Some(Found::of(map, &self.roots))),
        }
    }

    /// Nothing until everything was read once: what has not been heard of may exist.
    fn decide(&self, namespace: &str) -> Action {
        if !(self.namespaces.is_synced && self.pods.is_synced && self.maps.is_synced) {
            return Action::Nothing;
        }
        // In one that is being deleted nothing can be made, and everything is removed.
        let Some(labelled) = self.namespaces.of(namespace).next() else { return Action::Nothing };
        let wanted =
            *labelled || namespace == self.mesh_namespace || self.pods.of(namespace).next().is_some();
        match self.maps.of(namespace).next() {
            None if wanted => Action::Apply { foreign: false },
            Some(found) if wanted && !found.current => Action::Apply { foreign: !found.ours },
            Some(found) if !wanted && found.ours => Action::Remove { version: found.version.clone() },
            _ => Action::Nothing,
        }
    }
}

impl Found {
    fn of(map: &ConfigMap, roots: &str) -> Self {
        let ours = map.labels().get(MANAGED_BY).is_some_and(|value| value == CONTROLLER);
        let text = map.data.as_ref().and_then(|data| data.get(KEY));
        Self {
            ours,
            current: ours && text.is_some_and(|text| text == roots),
            version: map.resource_version().unwrap_or_default(),
        }
    }
}

impl Changed {
    fn mark(self, view: &View, queue: &mut Queue) {
        match self {
            Self::Nothing => {}
            Self::One(namespace) => queue.mark(namespace),
            Self::All => {
                for (namespace, _) in view.namespaces.objects.keys() {
                    queue.mark(namespace.clone());
                }
            }
        }
    }
}

/// The namespaces to look at, and when: each once, however often it is named, and never while it is being written.
#[derive(Debug, Default)]
struct Queue {
    due: BTreeMap<String, Instant>,
    busy: BTreeSet<String>,
    failures: HashMap<String, u32>,
}

impl Queue {
    /// One that rests, or waits after a failure, keeps its time.
    fn mark(&mut self, namespace: String) {
        self.due.entry(namespace).or_insert_with(Instant::now);
    }

    fn pop(&mut self, now: Instant) -> Option<String> {
        let due = |(namespace, at): &(&String, &Instant)| **at <= now && !self.busy.contains(*namespace);
        let namespace = self.due.iter().find(due)?.0.clone();
        self.due.remove(&namespace);
        Some(namespace)
    }

    fn next(&self) -> Option<Instant> {
        self.due.iter().filter(|(namespace, _)| !self.busy.contains(*namespace)).map(|(_, at)| *at).min()
    }

    fn done(&mut self, namespace: String) {
        self.failures.remove(&namespace);
        self.again(namespace, REST);
    }

    fn failed(&mut self, namespace: String) {
        let failures = self.failures.entry(namespace.clone()).or_default();
        *failures += 1;
        let delay = retry_delay(*failures, SLOWEST * 4, &mut fastrand::Rng::new());
        self.again(namespace, delay);
    }

    fn again(&mut self, namespace: String, delay: Duration) {
        self.busy.remove(&namespace);
        self.due.insert(namespace, Instant::now() + delay);
    }
}

#[cfg(test)]
mod tests;
