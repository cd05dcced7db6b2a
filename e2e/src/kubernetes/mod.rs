//! Real Kubernetes, as much of it as a suite needs.
//!
//! [`Cluster`] is etcd and the API server, and controller-manager where asked for: no pod ever runs, but everything that is
//! decided by the API is real: admission, RBAC, tokens and their review, custom resources and their rules, watches, audit. It
//! needs no root and is there in seconds, so a suite starts one of its own.
//!
//! [`Node`](node::Node) is a cluster with a machine in it: kubelet, containerd, kube-proxy, scheduler and cluster DNS on one host
//! of the [`network`](crate::network). It needs real root.
//!
//! Both live in the suite's sandbox. Its pid, mount and network namespaces end with the suite, however that ends, and take every
//! process, container, mount and link with them; what a pid namespace cannot hold are control groups ([`cgroups`]).

mod access;
mod audit;
pub(crate) mod cgroups;
mod cluster;
pub mod images;
pub mod keep;
pub mod node;
mod objects;

pub use self::audit::Request;
pub use self::cluster::{API_PORT, Cluster, Setup};
pub use self::objects::{apply, delete, gone, pod_ready, wait_for};
