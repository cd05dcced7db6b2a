//! What a node takes for granted of a machine, and what it must not do to this one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::mount::{MsFlags, mount};

use super::{CNI_BINARIES, CNI_CONFIG, ctr};
use crate::network::Host;
use crate::sandbox;
use crate::wait::wait_until;

/// Programs that Debian packages: what is missing without them.
const PROGRAMS: [(&str, &str); 4] = [
    ("containerd", "containerd"),
    ("containerd-shim-runc-v2", "containerd"),
    ("runc", "runc"),
    ("nft", "nftables"),
];
/// Where Debian puts the plugins of pod networks.
const PLUGINS: &str = "/usr/lib/cni";
/// The ones that the node uses.
const USED_PLUGINS: [&str; 3] = ["bridge", "host-local", "loopback"];
/// State of programs that cannot be told to keep it elsewhere, or whose users look for it here: libcni's results, the kubelet's
/// plugins and links to logs. An empty folder each
/// is all that stays of it on the machine.
const STATE: [&str; 5] = ["/var/lib/cni", "/var/lib/kubelet", "/var/log/containers", "/etc/cni", "/opt/cni"];
/// What the kubelet wants of the kernel, and sets for the whole machine where it finds something else. It finds what it wants.
const WANTED: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];
/// What a router of pods' packets sets in its own network namespace. Without the last two, answers between pods on the bridge
/// would not come back through kube-proxy's translation.
const NETWORK: [(&str, &str); 4] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/bridge/bridge-nf-call-iptables", "1"),
    ("net/bridge/bridge-nf-call-ip6tables", "1"),
];

const CONTAINERD_LIMIT: Duration = Duration::from_secs(30);

/// Says at once which of Debian's programs are missing.
pub(super) fn check_programs() -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |program: &&str| std::env::split_paths(&path).any(|folder| folder.join(program).exists());
    let mut missing: Vec<_> =
        PROGRAMS.iter().filter(|(program, _)| !found(program)).map(|(_, package)| *package).collect();
    if !USED_PLUGINS.iter().all(|plugin| Path::new(PLUGINS).join(plugin).exists()) {
        missing.push("containernetworking-plugins");
    }
    missing.dedup();
    ensure!(missing.is_empty(), "a node needs more of Debian: apt-get install {}", missing.join(" "));
    Ok(())
}

/// In the suite's own mount namespace: hides the machine's folders that the node would write to.
pub(super) fn hide_state() -> anyhow::Result<()> {
    let none: Option<&str> = None;
    for folder in STATE {
        fs::create_dir_all(folder).with_context(|| format!("creating {folder}"))?;
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
            .with_context(|| format!("mounting over {folder}"))?;
    }
    for folder in [CNI_BINARIES, CNI_CONFIG] {
        fs::create_dir_all(folder).with_context(|| format!("creating {folder}"))?;
    }
    for plugin in USED_PLUGINS {
        let (from, to) = (Path::new(PLUGINS).join(plugin), Path::new(CNI_BINARIES).join(plugin));
        fs::copy(&from, &to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    }
    let shown = sandbox::get().work.join("kernel");
    for (setting, value) in WANTED {
        let (ours, theirs) = (shown.join(setting), PathBuf::from("/proc/sys").join(setting));
        let folder = ours.parent().context("a setting is in a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        fs::write(&ours, value).with_context(|| format!("writing {}", ours.display()))?;
        mount(Some(&ours), &theirs, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("hiding {}", theirs.display()))?;
    }
    Ok(())
}

/// On the node's host: makes it a router.
pub(super) fn set_network() -> anyhow::Result<()> {
    for (setting, value) in NETWORK {
        let path = Path::new("/proc/sys").join(setting);
        fs::write(&path, value).with_context(|| {
            format!(
                "setting {} (a kernel without bridges' netfilter wants `modprobe br_netfilter`)",
                path.display()
            )
        })?;
    }
    Ok(())
}

/// Until containerd answers.
pub(super) async fn wait_for_containerd(host: &Host, home: &Path) -> anyhow::Result<()> {
    wait_until(CONTAINERD_LIMIT, "containerd to answer", || async {
        let mut command = ctr(home);
        command.arg("version");
        host.output(command).await
    })
    .await
    .map(drop)
}
