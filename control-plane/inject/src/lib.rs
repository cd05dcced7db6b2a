//! From a pod to a pod with a sidecar, or to why not. No I/O: the webhook and `outrigger inject` stand on the same code.
//!
//! The path of a pod: [`decide`] asks whether it opted in and whether anything stands in the way, `annotations` reads
//! its settings over those of the mesh, `parts` makes our containers and volumes of them, and [`patch`] says what
//! became different. [`manifest`] finds the pods in what people write: a Deployment, a Job, a List.
//!
//! Pods are JSON values here and stay so. A typed pod would lose each field that is newer than its types, and a pod
//! that lost a field starts, and does something else. Four places of a pod are ours, and nothing else is ever touched:
//! the first init containers, the last volumes, one label, and two annotations. So what was done can be undone
//! ([`remove`]), and an application's container is never part of a patch.
#![forbid(unsafe_code)]

mod annotations;
mod decide;
mod json;
pub mod manifest;
mod parts;
pub mod patch;
mod quantity;
mod settings;

pub use decide::{Fault, Namespace, Outcome, Reason, Review, Skip, decide, remove};
pub use settings::{LogFormat, Mesh, Mode, PortRange, PullPolicy, Quantities, Resources, Settings};

/// The label that opts in or out, of a namespace or a pod.
pub const INJECT: &str = "outrigger.dev/inject";
/// The label of an injected pod.
pub const INJECTED: &str = "outrigger.dev/injected";
/// The annotation of a pod that opted in and could not be injected: why.
pub const SKIPPED: &str = "outrigger.dev/skipped";
/// The annotation that tells the CNI plugin how to redirect: flags of `outrigger-proxy redirect`.
pub const REDIRECT: &str = "outrigger.dev/redirect";
/// The label of a namespace that says which pods may run in it.
pub const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";
/// The sidecar.
pub const PROXY: &str = "outrigger-proxy";
/// The init container that redirects.
pub const REDIRECTOR: &str = "outrigger-redirect";
/// The init container that waits for the CNI plugin's redirection, so that no pod starts open.
pub const CHECKER: &str = "outrigger-check";
/// The volume of the service account's token.
pub const TOKEN_VOLUME: &str = "outrigger-token";
/// The volume, and the `ConfigMap`, of the mesh's roots.
pub const BUNDLE_VOLUME: &str = "outrigger-trust-bundle";
/// The user and group of the sidecar, whose traffic is not redirected.
pub const PROXY_USER: u32 = 15400;
/// Ports of the sidecar in its pod: outbound, inbound, DNS, admin.
pub const PROXY_PORTS: [u16; 4] = [15401, 15406, 15453, ADMIN_PORT];
const ADMIN_PORT: u16 = 15490;
