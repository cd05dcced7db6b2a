//! Kubernetes: the connection to its API (one client for everything that reads or writes there) and, in the modules below,
//! what the controller keeps there. `authority` is the mesh's CA. Of the replicas one leads (`leader`) and keeps what only
//! one may write: the webhooks' certificate (`webhook`) and the roots beside each injected workload (`bundles`).
//! Where a CNI plugin redirects it also replaces the pods that the plugin missed (`held`).
//!
//! All upkeep has one form: look at the whole, compare it with what must be, write the difference; begun by a watch,
//! repeated now and then in case a watch missed something, and again after a pause when it fails. So nothing depends on
//! what another replica did before, or on how often something is done.

pub(crate) mod authority;
pub(crate) mod bundles;
#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod held;
mod known;
pub(crate) mod leader;
pub(crate) mod webhook;

use std::fmt::{Debug, Display};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use futures_util::{Stream, StreamExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The name of the controller's Deployment, Service, service account and Lease; it signs what it writes with it.
pub(crate) const CONTROLLER: &str = "outrigger-controller";
/// The label of the objects that the controller made, and may remove, with [`CONTROLLER`] as its value.
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The longest silence on a connection to the API server. A watch hears a bookmark about once a minute and ends by itself
/// after 290 s, so this ends only those whose other end is gone.
const SILENCE: Duration = Duration::from_secs(295);

/// Something that goes on failing: said once when it begins, and once when it is over.
#[derive(Debug)]
pub(crate) struct Trouble {
    what: &'static str,
    last: Option<String>,
}

impl Trouble {
    /// `what` is not done, as in "cannot `what`".
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, last: None }
    }

    /// It failed, for this reason.
    pub(crate) fn is(&mut self, reason: &impl Display) {
        let reason = reason.to_string();
        if self.last.is_none() {
            tracing::warn!(reason, "cannot {}; trying on", self.what);
        } else {
            tracing::debug!(reason, "cannot {} yet", self.what);
        }
        self.last = Some(reason);
    }

    /// It was done.
    pub(crate) fn over(&mut self) {
        if let Some(reason) = self.last.take() {
            tracing::info!(reason, "it is possible again to {}", self.what);
        }
    }
}

/// What happens to the objects of a kind, for ever: errors are said and retried here.
pub(crate) fn watch<K>(
    api: Api<K>,
    of: watcher::Config,
    what: &'static str,
) -> impl Stream<Item = Event<K>> + Send
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    without_errors(watcher::watcher(api, of).default_backoff(), what)
}

/// One object whenever it changes, `None` when it has gone. It is watched by its name: least privilege grants no more.
pub(crate) fn watch_one<K>(
    api: Api<K>,
    name: &str,
    what: &'static str,
) -> impl Stream<Item = Option<K>> + Send + use<K>
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    without_errors(watcher::watch_object(api, name).default_backoff(), what)
}

fn without_errors<T: Send>(
    seen: impl Stream<Item = watcher::Result<T>> + Send,
    what: &'static str,
) -> impl Stream<Item = T> + Send {
    let mut trouble = Trouble::new(what);
    seen.filter_map(move |seen| {
        match &seen {
            Ok(_) => trouble.over(),
            Err(error) => trouble.is(error),
        }
        let seen = seen.ok();
        async move { seen }
    })
}

/// The section `kubernetes` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Read services from the cluster, attest its service accounts' tokens, and keep in it what the controller must keep.
    pub enabled: bool,
    /// A kubeconfig, for a controller outside the cluster. Unset: the pod's own service account.
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig. Unset: its current one.
    pub context: Option<String>,
    /// The Secret `outrigger-ca` is brought, by a person or by cert-manager: wait for it, never make one.
    pub external_ca: bool,
    /// The domain of the cluster's DNS names.
    pub cluster_domain: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            kubeconfig: None,
            context: None,
            external_ca: false,
            cluster_domain: "cluster.local".to_owned(),
        }
    }
}

impl Config {
    /// A client by this section. Nothing is sent yet.
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let shown = path.display();
                let file = Kubeconfig::read_from(path)
                    .with_context(|| format!("kubernetes.kubeconfig: cannot read {shown}"))?;
                let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
                kube::Config::from_custom_kubeconfig(file, &options)
                    .await
                    .with_context(|| format!("kubernetes.kubeconfig: {shown} leads to no cluster"))?
            }
            None => kube::Config::incluster().context(
                "kubernetes.enabled: this process runs in no pod with a service account; set kubernetes.kubeconfig",
            )?,
        };
        config.read_timeout = Some(SILENCE);
        Client::try_from(config).context("cannot make a client of the Kubernetes API")
    }
}
