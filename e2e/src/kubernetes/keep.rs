//! A node that stays up until it is told to end: `make kubernetes KEEP=1`.
//!
//! It lives in a sandbox as every suite does. Its network is entered from outside by a file in the sandbox's mount namespace, which
//! the process that waits outside shares; small scripts do it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroups;
use super::node::Node;
use crate::sandbox;

const NAME: &str = "kept_node";
/// The node's network, at a path of the sandbox.
const NAMESPACE: &str = "/run/outrigger-e2e/node.network";
const READY_LIMIT: Duration = Duration::from_mins(3);
const END_LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(100);

/// Starts a node in the background, waits until it is ready, and prints how to use it.
pub fn keep() -> anyhow::Result<()> {
    stop()?;
    let folder = folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let log = fs::File::create(folder.join("log")).context("creating the node's log")?;
    let me = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(me);
    // In a session of its own, so that nothing that is sent to the terminal's processes ends it.
    command.arg("run").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut waiting = std::os::unix::process::CommandExt::process_group(&mut command, 0)
        .spawn()
        .context("starting a node in the background")?;
    fs::write(folder.join(PROCESS), waiting.id().to_string()).context("remembering the node's process")?;
    let start = Instant::now();
    while !folder.join(READY).exists() {
        if let Some(status) = waiting.try_wait().context("asking after the node")? {
            let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
            bail!("the node has ended ({status}): {log}");
        }
        ensure!(start.elapsed() < READY_LIMIT, "the node is not ready after {READY_LIMIT:?}");
        std::thread::sleep(PAUSE);
    }
    print!("{}", fs::read_to_string(folder.join(READY)).context("reading how to use the node")?);
    Ok(())
}

/// Ends the node that was kept, if there is one, and waits until nothing of it is left.
pub fn stop() -> anyhow::Result<()> {
    let folder = folder()?;
    if let Some(process) = kept(&folder) {
        let id = i32::try_from(process).context("a process id is positive")?;
        kill(Pid::from_raw(id), Signal::SIGTERM).with_context(|| format!("ending process {process}"))?;
        let start = Instant::now();
        while kept(&folder).is_some() {
            ensure!(start.elapsed() < END_LIMIT, "process {process} does not end");
            std::thread::sleep(PAUSE);
        }
        println!("the node is gone");
    }
    cgroups::sweep();
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    Ok(())
}

/// The node itself, until its process is ended.
pub fn run() -> ExitCode {
    match sandbox::enter(NAME) {
        Ok(Some(code)) => code,
        Ok(None) => match serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("{error:#}");
    ExitCode::FAILURE
}

fn serve() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let start = Instant::now();
        let (mut node, _network) = Node::with_mesh().await?;
        node.host().run(|| async { show_network() }).await?;
        let folder = folder()?;
        let cluster = node.cluster();
        let authority = folder.join("apiserver.crt");
        fs::copy(cluster.authority(), &authority).context("copying the API server's certificate")?;
        let kubeconfig = fs::read_to_string(cluster.kubeconfig()).context("reading the kubeconfig")?;
        let kubeconfig =
            kubeconfig.replace(&*cluster.authority().to_string_lossy(), &authority.to_string_lossy());
        fs::write(folder.join("kubeconfig"), kubeconfig).context("writing the kubeconfig")?;
        for (name, text) in [("enter", enter(&folder)), ("load", load(&node.containerd_socket()))] {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("making it executable")?;
        }
        let ready = folder.join("ready.new");
        fs::write(&ready, usage(&folder, start.elapsed())).context("writing how to use the node")?;
        fs::rename(&ready, folder.join(READY)).context("saying that the node is ready")?;
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            node.expect_running()?;
        }
    })
}

/// On the node's host: makes its network namespace a file.
fn show_network() -> anyhow::Result<()> {
    let none: Option<&str> = None;
    fs::write(NAMESPACE, "").with_context(|| format!("creating {NAMESPACE}"))?;
    mount(Some("/proc/thread-self/ns/net"), NAMESPACE, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("mounting {NAMESPACE}"))
}

const PROCESS: &str = "process";
const READY: &str = "ready";

/// `target/kubernetes`.
fn folder() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("finding this program")?;
    let target = me.parent().and_then(Path::parent).context("this program lies in target/<profile>")?;
    Ok(target.join("kubernetes"))
}

/// The process that waits for a kept node, if it is there.
fn kept(folder: &Path) -> Option<u32> {
    let process = fs::read_to_string(folder.join(PROCESS)).ok()?.trim().parse().ok()?;
    // Another program may have the number by now.
    let command = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let words: Vec<_> = command.split(|byte| *byte == 0).collect();
    let ours = words.first()?.ends_with(b"/e2e-node") && words.get(1) == Some(&b"run".as_slice());
    ours.then_some(process)
}

fn enter(folder: &Path) -> String {
    format!(
        "#!/bin/sh\n\
         # Runs a command in the network of the node, as its administrator.\n\
         exec nsenter --net=/proc/{}/root{NAMESPACE} env KUBECONFIG='{}' \"$@\"\n",
        sandbox::get().outside,
        folder.join("kubeconfig").display(),
    )
}

fn load(socket: &Path) -> String {
    format!(
        "#!/bin/sh\n\
         # Puts the images of an archive into the node's store.\n\
         exec nsenter --mount=/proc/{}/ns/mnt ctr --address {} --namespace k8s.io images import - <\"$1\"\n",
        sandbox::get().outside,
        socket.display(),
    )
}

fn usage(folder: &Path, took: Duration) -> String {
    let enter = folder.join("enter");
    let (enter, tools) = (enter.display(), folder.with_file_name("tools"));
    let binaries = folder.with_file_name("debug");
    let (tools, binaries) = (tools.display(), binaries.display());
    format!(
        "A node is up (it took {:.0} s). Commands run in its network, as its administrator, by `enter`:\n\n\
         \x20 {enter} {tools}/kubectl get pods -A\n\
         \x20 {enter} {tools}/helm list -A\n\
         \x20 {enter} {tools}/helm install outrigger charts/outrigger -n outrigger-system --create-namespace   # its images are there\n\
         \x20 {enter} {binaries}/outrigger check\n\
         \x20 {enter} bash          # everything else: curl to pods and Services, ip, nft\n\
         \x20 {}/load IMAGES.tar    # what `docker save` or `buildah push` wrote\n\n\
         `make kubernetes STOP=1`, or the next `make kubernetes`, takes it down.\n",
        took.as_secs_f64(),
        folder.display(),
    )
}
