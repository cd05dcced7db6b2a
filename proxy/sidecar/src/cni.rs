//! Redirection without a privileged container in each pod: a chained CNI plugin and the agent that installs it.
//!
//! The container runtime calls the plugin when it has made a pod's network namespace and before it starts any container of
//! it. The plugin is told the pod's annotations by the runtime itself (the capability
//! `io.kubernetes.cri.pod-annotations`, which containerd and CRI-O have), so that it needs neither the API server, nor a
//! token on the node's disk, nor a running agent: pods start as before while the agent is away or upgraded. What it does is
//! said by the one annotation that the injector writes, [`ANNOTATION`]: the flags of `outrigger-proxy redirect`. A pod
//! without it is left alone.
//!
//! The agent copies this program beside the other plugins, adds the plugin to the node's network configuration, keeps it
//! there, and takes it out again when its DaemonSet is deleted.
//!
//! A pod that was started without the plugin is held by its first init container, `outrigger-proxy redirect --check`.

pub mod agent;
mod conflist;
mod daemon_set;
mod plugin;

pub use plugin::{is_plugin, run as run_plugin};

/// The plugin's name, and that of its executable.
pub(crate) const PLUGIN: &str = "outrigger-cni";
/// The pod annotation that holds the flags of `outrigger-proxy redirect`, separated by spaces.
pub const ANNOTATION: &str = "outrigger.dev/redirect";
/// How a runtime hands over the annotations of a pod.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
