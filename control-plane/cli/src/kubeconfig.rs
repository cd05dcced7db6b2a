//! Which cluster: kubeconfig files as kubectl reads them, or the pod that the command runs in.
//!
//! Nothing is sent here. What is asked of the cluster is in `cluster`.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::config::BadConfig;

/// Where a pod finds its namespace.
const POD_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// What is known of clusters on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Clusters {
    /// Where it was read, for messages.
    path: PathBuf,
    config: Arc<Kubeconfig>,
}

/// One cluster, and who talks to it.
#[derive(Clone)]
pub(crate) enum Cluster {
    /// A context of a kubeconfig.
    Context {
        /// What is known of it.
        clusters: Clusters,
        /// The context's name.
        name: String,
    },
    /// The one that runs this process in a pod, as the pod's service account.
    Pod,
}

impl Clusters {
    /// Reads `file` or, where none is named, what `KUBECONFIG` lists, else `~/.kube/config`. As for kubectl, a file that is
    /// only listed may be missing, and of two files the first has the word. `None`: there is nothing.
    pub(crate) fn read(file: Option<&Path>) -> Result<Option<Self>> {
        let is_named = file.is_some();
        let paths: Vec<PathBuf> =
            match (file, std::env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty())) {
                (Some(file), _) => vec![file.to_owned()],
                (None, Some(paths)) => {
                    std::env::split_paths(&paths).filter(|path| path != Path::new("")).collect()
                }
                (None, None) => {
                    std::env::home_dir().map(|home| home.join(".kube/config")).into_iter().collect()
                }
            };
        let mut all: Option<Self> = None;
        for path in paths {
            if !is_named && !path.exists() {
                continue;
            }
            let bad = |error: kube::config::KubeconfigError| BadConfig::new(&path, vec![causes(&error)]);
            let next = Kubeconfig::read_from(&path).map_err(bad)?;
            all = Some(match all {
                None => Self { path, config: Arc::new(next) },
                Some(Self { path: first, config }) => {
                    let merged = Arc::unwrap_or_clone(config).merge(next).map_err(bad)?;
                    Self { path: first, config: Arc::new(merged) }
                }
            });
        }
        Ok(all)
    }

    /// The names of the contexts.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.config.contexts.iter().map(|context| context.name.as_str())
    }

    /// The name of the current one.
    pub(crate) fn current(&self) -> Option<&str> {
        self.config.current_context.as_deref().filter(|name| !name.is_empty())
    }

    /// The cluster of a context, if there is such a context.
    pub(crate) fn context(&self, name: &str) -> Option<Cluster> {
        let is_known = self.names().any(|known| known == name);
        is_known.then(|| Cluster::Context { clusters: self.clone(), name: name.to_owned() })
    }

    /// The cluster of the context `name`, or of the current one.
    pub(crate) fn choose(&self, name: Option<&str>) -> Result<Cluster> {
        let fault = match name.or(self.current()) {
            Some(name) => match self.context(name) {
                Some(cluster) => return Ok(cluster),
                None => format!(
                    "there is no context `{name}`; there are: {}",
                    self.names().collect::<Vec<_>>().join(", ")
                ),
            },
            None => "it has no current context; name one with --context".to_owned(),
        };
        Err(BadConfig::new(&self.path, vec![fault]).into())
    }
}

impl Cluster {
    /// The pod's own cluster, if this process runs in a pod with a service account.
    pub(crate) fn of_pod() -> Option<Self> {
        let is_pod =
            std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() && Path::new(POD_NAMESPACE).exists();
        is_pod.then_some(Self::Pod)
    }

    /// The context that leads to it, if one does.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Context { name, .. } => Some(name),
            Self::Pod => None,
        }
    }

    /// Where its API server is, as far as a file says so.
    pub(crate) fn server(&self) -> Option<&str> {
        let Self::Context { clusters, .. } = self else { return None };
        let wanted = &self.context()?.cluster;
        let found = clusters.config.clusters.iter().find(|cluster| cluster.name == *wanted);
        found?.cluster.as_ref()?.server.as_deref()
    }

    /// The namespace of what names none.
    pub(crate) fn namespace(&self) -> Option<String> {
        match self {
            Self::Context { .. } => self.context()?.namespace.clone().filter(|name| !name.is_empty()),
            Self::Pod => Some(std::fs::read_to_string(POD_NAMESPACE).ok()?.trim().to_owned()),
        }
    }

    fn context(&self) -> Option<&kube::config::Context> {
        let Self::Context { clusters, name } = self else { return None };
        let found = clusters.config.contexts.iter().find(|context| context.name == *name);
        found?.context.as_ref()
    }

    /// What a client needs to know.
    pub(crate) async fn config(&self) -> Result<kube::Config> {
        let Self::Context { clusters, name } = self else {
            return kube::Config::incluster().context("reading the pod's service account");
        };
        let options = KubeConfigOptions { context: Some(name.clone()), ..KubeConfigOptions::default() };
        let read = kube::Config::from_custom_kubeconfig(Kubeconfig::clone(&clusters.config), &options).await;
        let mut config = read.map_err(|error| {
            BadConfig::new(&clusters.path, vec![format!("context `{name}`: {}", causes(&error))])
        })?;
        // A proxy of the environment is for what is elsewhere; kubectl sees it so, too.
        let is_here = |host: &str| {
            let host = host.trim_matches(['[', ']']);
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
        };
        if config.cluster_url.host().is_some_and(is_here) {
            config.proxy_url = None;
        }
        Ok(config)
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Context { clusters, name } => write!(f, "context `{name}` of {}", clusters.path.display()),
            Self::Pod => f.write_str("the pod's own cluster"),
        }
    }
}

impl fmt::Debug for Cluster {
    /// A kubeconfig holds keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An error with what caused it, once each.
pub(crate) fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}
