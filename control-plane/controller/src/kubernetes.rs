//! The connection to the Kubernetes API: one client for everything that reads or writes there.

use std::path::PathBuf;

use anyhow::Context;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// The domain of the cluster's DNS names.
    pub cluster_domain: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { enabled: false, kubeconfig: None, context: None, cluster_domain: "cluster.local".to_owned() }
    }
}

impl Config {
    /// A client by this section. Nothing is sent yet.
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let config = match &self.kubeconfig {
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
        Client::try_from(config).context("cannot make a client of the Kubernetes API")
    }
}
