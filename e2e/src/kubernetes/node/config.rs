//! Configuration of what the node runs.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{CNI_BINARIES, CNI_CONFIG};
use crate::kubernetes::cgroups;
use crate::sandbox;

/// The first container of every pod.
pub(super) const PAUSE: &str = "e2e.outrigger.dev/pause:1";
/// Cluster DNS.
pub(super) const COREDNS: &str = "e2e.outrigger.dev/coredns:1";

/// containerd's socket.
pub(super) fn socket(home: &Path) -> PathBuf {
    home.join("containerd.sock")
}

pub(super) fn containerd(home: &Path) -> String {
    let (root, state, socket) = (home.join("containerd"), home.join("containerd-state"), socket(home));
    format!(
        r#"version = 2
root = "{}"
state = "{}"
[grpc]
address = "{}"
[plugins."io.containerd.internal.v1.opt"]
path = "{}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Without CAP_SYS_RESOURCE the kernel refuses a negative score, and runc fails with it.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_BINARIES}"
conf_dir = "{CNI_CONFIG}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#,
        root.display(),
        state.display(),
        socket.display(),
        home.join("opt").display(),
    )
}

pub(super) fn kubelet(home: &Path) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{}", socket(home).display()),
        // Nobody but this suite reaches the node's network, and the API server needs no certificate then.
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "clusterDNS": ["10.96.0.10"],
        "clusterDomain": "cluster.local",
        "resolvConf": home.join("resolv.conf"),
        "volumePluginDir": home.join("volume-plugins"),
        "podLogsDir": home.join("pod-logs"),
        // Groups of containers only, below the suite's own: the machine's other groups are left alone.
        "cgroupRoot": format!("/{}", cgroups::name(sandbox::get().outside)),
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        // The machine may be fuller than a node should be. It is no node.
        "evictionHard": { "memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%" },
        "imageGCHighThresholdPercent": 100,
    })
    .to_string()
}

/// A bridge with an address of each family for every pod.
pub(super) fn pod_network(home: &Path) -> String {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "pods",
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": home.join("addresses"),
                // What controller-manager gives the first node.
                "ranges": [[{ "subnet": "10.244.0.0/24" }], [{ "subnet": "fd00:244::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        }],
    })
    .to_string()
}

/// `CoreDNS` at the customary address. Names outside the cluster do not exist: tests ask nobody.
pub(super) const CLUSTER_DNS: &str = include_str!("coredns.yaml");
