//! Control groups of containers: the one thing of a node that outlives the suite's namespaces.
//!
//! Every suite has a group of its own, named after the process that waits outside, below which the kubelet makes all others. The
//! one who waits removes it when the suite has ended; if it was killed, whoever comes next does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Before the process id.
const PREFIX: &str = "outrigger-e2e-";
const ROOT: &str = "/sys/fs/cgroup";
/// The kernel takes a moment to let go of a group whose last process has ended.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// The group of the suite that this process waits for.
pub(crate) fn name(outside: u32) -> String {
    format!("{PREFIX}{outside}")
}

/// Removes the groups of suites that nobody waits for any more. What cannot be removed stays for the next one: no suite fails
/// because of what another one left.
pub(crate) fn sweep() {
    for group in groups() {
        let process =
            group.file_name().and_then(|name| name.to_str()?.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            remove(&group);
        }
    }
}

/// Removes one suite's groups, whose processes have all ended.
pub(crate) fn remove_all(name: &str) {
    groups().into_iter().filter(|group| group.ends_with(name)).for_each(|group| remove(&group));
}

/// The suites' groups in every hierarchy: one in version 2, one for each controller in version 1.
fn groups() -> Vec<PathBuf> {
    let below =
        |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let top: Vec<_> = below(Path::new(ROOT)).collect();
    let ours = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) && path.is_dir()
    };
    let second = top.iter().filter(|path| path.is_dir()).flat_map(|path| below(path));
    top.iter().cloned().chain(second).filter(ours).collect()
}

fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    for _ in 0..TRIES {
        if fs::remove_dir(group).is_ok() || !group.exists() {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}
