//! The charts, and real Helm.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the chart can be installed, and nowhere else.
pub const NAMESPACE: &str = "outrigger-system";
/// The profiles: files of values beside the chart.
pub const PROFILES: [&str; 5] = ["ha", "cni", "consul", "external-ca", "cert-manager"];

/// The folder of a chart.
pub fn folder(chart: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts").join(chart)
}

/// The values of a profile.
pub fn profile(name: &str) -> PathBuf {
    folder("outrigger").join("profiles").join(format!("{name}.yaml"))
}

/// Helm. Its own files, of which a chart on disk needs none, would lie in `home`.
pub fn helm(binary: &Path, home: &Path) -> Command {
    let mut command = Command::new(binary);
    for folder in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "HOME"] {
        command.env(folder, home);
    }
    command
}
