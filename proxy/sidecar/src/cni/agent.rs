//! `outrigger-proxy cni agent`: keeps the plugin installed on its node.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    PLUGIN, conflist,
    daemon_set::{self, ApiServer},
};

/// Between two looks at the node's configuration. A pod that starts while the plugin is out of it is held, not open.
const LOOK: Duration = Duration::from_secs(1);
/// What an executable must have.
const EXECUTABLE: u32 = 0o755;
/// The agent and the plugin are one program.
const OURSELVES: &str = "/proc/self/exe";

/// The flags: where the node's folders are mounted, and whose agent this is.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The node's folder of CNI plugins.
    #[arg(long, default_value = "/host/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The node's folder of network configurations.
    #[arg(long, default_value = "/host/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// The DaemonSet of this agent, `<namespace>/<name>`: when it is deleted the plugin is taken out again. Unset: it is
    /// taken out whenever the agent stops.
    #[arg(long, value_parser = namespaced)]
    daemon_set: Option<(String, String)>,
    /// Only say whether the plugin is installed, by the exit code: a probe.
    #[arg(long)]
    check: bool,
}

fn namespaced(text: &str) -> Result<(String, String), String> {
    let (namespace, name) = text.split_once('/').ok_or("write <namespace>/<name>")?;
    Ok((namespace.to_owned(), name.to_owned()))
}

/// Installs the plugin and keeps it until a signal.
///
/// # Errors
/// If it cannot start. What cannot be installed is told in the log and tried again.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.check {
        return check(arguments);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(keep(arguments))
}

fn check(arguments: &Arguments) -> anyhow::Result<()> {
    let file = conflist::in_use(&arguments.conf_dir)?;
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    anyhow::ensure!(text.contains(PLUGIN), "{} does not name {PLUGIN}", file.display());
    let plugin = arguments.bin_dir.join(PLUGIN);
    anyhow::ensure!(plugin.exists(), "{} is missing", plugin.display());
    Ok(())
}

async fn keep(arguments: &Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut told = None;
    // What an earlier version has left may be as long as this program: it is replaced once in any case.
    let mut replaced = false;
    loop {
        match install(arguments, Path::new(OURSELVES), &mut replaced) {
            Ok(done) => {
                for what in done {
                    tracing::info!("{what}");
                }
                told = None;
            }
            Err(error) => {
                let text = format!("{error:#}");
                if told.as_ref() != Some(&text) {
                    tracing::error!("{text}; pods of the mesh are held until it is mended");
                    told = Some(text);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    leave(arguments).await
}

/// Makes the node as it shall be. The program first: a configuration that names a missing plugin starts no pod at all.
fn install(arguments: &Arguments, program: &Path, replaced: &mut bool) -> anyhow::Result<Vec<String>> {
    let mut done = Vec::new();
    let plugin = arguments.bin_dir.join(PLUGIN);
    let size = fs::metadata(&plugin).map_or(0, |found| found.len());
    let mut program = File::open(program).context("cannot read this program")?;
    if !*replaced || size != program.metadata().context("cannot read this program")?.len() {
        // The kernel copies: held in memory it would be most of what the agent needs.
        conflist::replace(&plugin, &mut program, EXECUTABLE)
            .with_context(|| format!("cannot write {}", plugin.display()))?;
        *replaced = true;
        done.push(format!("{} is in place", plugin.display()));
    }
    let file = conflist::in_use(&arguments.conf_dir)?;
    // In a folder where the runtime does not look the plugin would be missing, and with it the network of every pod of the node.
    // A link may lead out of what is mounted here.
    let is_here = |name: &String| arguments.bin_dir.join(name).symlink_metadata().is_ok();
    let others = conflist::others(&file)?;
    anyhow::ensure!(
        others.is_empty() || others.iter().any(is_here),
        "{} names {}, of which {} has none: it is not the folder that this node's runtime takes plugins from; set cni.binDir",
        file.display(),
        others.join(", "),
        arguments.bin_dir.display()
    );
    if conflist::set(&file, true)? {
        done.push(format!("{} names the plugin", file.display()));
    }
    Ok(done)
}

/// At the end of the mesh on this cluster the node becomes what it was; else the plugin stays and does its work without us.
async fn leave(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some((namespace, name)) = &arguments.daemon_set {
        match stays(namespace, name).await {
            Ok(false) => {}
            Ok(true) => {
                tracing::info!("{namespace}/{name} stays: so does the plugin");
                return Ok(());
            }
            Err(error) => {
                tracing::warn!(
                    "cannot find out whether {namespace}/{name} stays, so the plugin does: {error:#}"
                );
                return Ok(());
            }
        }
    }
    // Every file: the one in use may have changed since.
    let entries = fs::read_dir(&arguments.conf_dir)
        .with_context(|| format!("cannot list {}", arguments.conf_dir.display()))?;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let ours = path.extension().is_some_and(|end| end == "conflist")
            && fs::read_to_string(&path).is_ok_and(|text| text.contains(PLUGIN));
        if ours && conflist::set(&path, false)? {
            tracing::info!("{} is as it was", path.display());
        }
    }
    let plugin = arguments.bin_dir.join(PLUGIN);
    match fs::remove_file(&plugin) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", plugin.display()))
        }
        _ => Ok(()),
    }
}

async fn stays(namespace: &str, name: &str) -> anyhow::Result<bool> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let port = variable("KUBERNETES_SERVICE_PORT")?;
    let api = ApiServer {
        host: variable("KUBERNETES_SERVICE_HOST")?,
        port: port.parse().with_context(|| format!("KUBERNETES_SERVICE_PORT={port} is no port"))?,
    };
    daemon_set::stays(&api, namespace, name).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_gets_the_plugin_keeps_it_and_becomes_what_it_was() {
        let node = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = node.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let arguments =
            Arguments { bin_dir: folder("bin"), conf_dir: folder("net.d"), daemon_set: None, check: false };
        let (plugin, file) = (arguments.bin_dir.join(PLUGIN), arguments.conf_dir.join("10-pods.conflist"));
        let mut replaced = false;
        let program = node.path().join("program");
        let mut install = |bytes: &[u8]| {
            fs::write(&program, bytes).unwrap();
            super::install(&arguments, &program, &mut replaced)
        };
        let error = install(b"program").unwrap_err().to_string();
        assert!(error.contains("no network configuration"), "{error}");
        assert!(check(&arguments).is_err());

        let before = r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge"}]}"#;
        fs::write(&file, before).unwrap();
        let error = install(b"program").unwrap_err().to_string();
        assert!(error.contains("set cni.binDir"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), before);

        fs::write(arguments.bin_dir.join("bridge"), "").unwrap();
        assert_eq!(install(b"program").unwrap().len(), 1);
        check(&arguments).unwrap();
        assert!(install(b"program").unwrap().is_empty());

        // The cluster's own plugin is upgraded and writes its file anew; so are we.
        fs::write(&file, before).unwrap();
        assert!(check(&arguments).is_err());
        assert_eq!(install(b"program2").unwrap().len(), 2);
        assert_eq!(fs::read(&plugin).unwrap(), b"program2");

        leave(&arguments).await.unwrap();
        assert!(!plugin.exists() && !fs::read_to_string(&file).unwrap().contains(PLUGIN));
        leave(&arguments).await.unwrap();
    }
}
