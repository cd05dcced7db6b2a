//! The world that a suite runs in: user, mount, pid and network namespaces of its own.
//!
//! Entered once, from `main`, before any thread starts: the kernel lets only a single-threaded process into a new
//! user namespace. The suite then runs as the first process of a new pid namespace, so that everything it ever
//! started dies with it, however it ends. That first process has to be a *new* process; forking is unsafe, so the
//! suite starts itself again and passes the outcome on.
//!
//! Two modes. As anybody, root inside a user namespace is the only uid there is, and sidecars are told apart by packet
//! mark (`make test`). With `OUTRIGGER_ROOT_SUITES=1`, as real root, there is no user namespace and sidecars run
//! under a uid of their own without any capability, as a package would install them (`make test-root`).

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid};

use crate::kubernetes::cgroups;

/// Set in the second process of a suite; the value is the mode.
const INSIDE: &str = "OUTRIGGER_E2E_INSIDE";
/// Set beside it: the process that waits outside, by its id there.
const OUTSIDE: &str = "OUTRIGGER_E2E_OUTSIDE";

/// What unchanged clients find in `/etc/resolv.conf`. Nobody has this address: a sidecar's redirection answers for it.
pub const NAMESERVER: &str = "10.77.0.53";

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

/// Where things are, once inside.
#[derive(Debug)]
pub struct Sandbox {
    /// Real root: several uids can be used.
    pub real_root: bool,
    /// Name of the suite.
    pub suite: String,
    /// The profile's folder with the binaries under test, at a path that every uid can reach.
    pub binaries: PathBuf,
    /// The real servers, built by `make tools`.
    pub tools: PathBuf,
    /// Logs of all processes; on disk, kept until the suite runs again.
    pub logs: PathBuf,
    /// Configuration and state of the processes; in memory, gone with the suite.
    pub work: PathBuf,
    /// `target/figures`.
    pub figures: PathBuf,
    /// The process that waits for the suite, by its id outside.
    pub(crate) outside: u32,
}

/// The sandbox of this process.
///
/// # Panics
/// Outside of a suite.
pub fn get() -> &'static Sandbox {
    SANDBOX.get().expect("the suite's main entered the sandbox first")
}

impl Sandbox {
    /// The path of a binary of this workspace.
    pub fn binary(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.binaries.join(name);
        ensure!(
            path.exists(),
            "the binary `{name}` is not built: run `make build` (cargo build --workspace) first"
        );
        Ok(path)
    }

    /// The path of a server or client built from a pinned Go module.
    pub fn tool(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.tools.join(name);
        ensure!(
            path.exists(),
            "target/tools/{name} is not built: run `make tools` first (needs Go, takes minutes)"
        );
        Ok(path)
    }
}

/// Whether suites are to run as real root, with what that brings: several uids, servers of Debian's packages, pods.
#[must_use]
pub fn wants_real_root() -> bool {
    std::env::var_os("OUTRIGGER_ROOT_SUITES").is_some()
}

/// Enters the sandbox: `None` inside it, the suite's exit code in the process that only waited.
pub(crate) fn enter(suite: &str) -> anyhow::Result<Option<ExitCode>> {
    match std::env::var(INSIDE) {
        Ok(mode) => {
            exit_with_parent();
            let sandbox = furnish(suite, mode == "root").context("setting up the suite's namespaces")?;
            SANDBOX.set(sandbox).map_err(|_| anyhow::anyhow!("the sandbox is entered once"))?;
            Ok(None)
        }
        Err(_) => start_again().map(Some),
    }
}

fn start_again() -> anyhow::Result<ExitCode> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    let real_root = wants_real_root();
    ensure!(
        uid.is_root() || !real_root,
        "OUTRIGGER_ROOT_SUITES is set, which needs root: run `make test` instead"
    );
    let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET;
    if !real_root {
        namespaces |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(namespaces).context(
        "making namespaces for the suite: the kernel refused. Unprivileged user namespaces have to be allowed \
         (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns=0; in a container: its seccomp profile), or run as root",
    )?;
    if !real_root {
        fs::write("/proc/self/setgroups", "deny").context("writing /proc/self/setgroups")?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("writing /proc/self/uid_map")?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1")).context("writing /proc/self/gid_map")?;
    }
    if real_root {
        cgroups::sweep();
    }
    let me = std::env::current_exe().context("finding the suite's own executable")?;
    let mut inside = Command::new(&me)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, if real_root { "root" } else { "user" })
        .env(OUTSIDE, std::process::id().to_string())
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {} inside its namespaces", me.display()))?;
    // Held open until the suite has ended: `wait` would close it first.
    let _lifeline = inside.stdin.take();
    let status = inside.wait().context("waiting for the suite")?;
    if real_root {
        cgroups::remove_all(&cgroups::name(std::process::id()));
    }
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The first process of a pid namespace does not hear its terminal's signals; the end of its standard input, which the
/// waiting process holds, tells it to go.
fn exit_with_parent() {
    std::thread::spawn(|| {
        let mut rest = [0; 1];
        while matches!(std::io::stdin().read(&mut rest), Ok(1..)) {}
        std::process::exit(130);
    });
}

fn furnish(suite: &str, real_root: bool) -> anyhow::Result<Sandbox> {
    let none: Option<&str> = None;
    let resolv_conf = fs::canonicalize("/etc/resolv.conf").context("finding /etc/resolv.conf")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)
        .context("mounting /proc for the pid namespace (a container that masks /proc forbids it)")?;
    let me = std::env::current_exe().context("finding the suite's own executable")?;
    let outside = std::env::var(OUTSIDE).ok().and_then(|id| id.parse().ok());
    let outside = outside.context("the process that waits did not say who it is")?;
    // A suite lies in target/<profile>/deps, a program in target/<profile>.
    let folder = me.parent().context("the suite lies in target/<profile>/deps")?;
    let profile = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
    let profile = profile.context("the suite lies in target/<profile>/deps")?;
    let target = profile.parent().context("the suite lies in target/<profile>/deps")?;
    let logs = target.join("e2e").join(suite);
    if logs.exists() {
        fs::remove_dir_all(&logs).with_context(|| format!("removing {}", logs.display()))?;
    }
    let figures = target.join("figures");
    for folder in [&logs, &figures, &target.join("tools")] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }

    // A /run of our own also hides the host's nscd and systemd-resolved, which would answer look-ups past the mesh.
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .context("mounting /run")?;
    let run = Path::new("/run/outrigger-e2e");
    let (binaries, tools, work) = (run.join("bin"), run.join("tools"), run.join("work"));
    for folder in [&binaries, &tools, &work] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    // Another uid may not be able to search the folders above the checkout: it need not.
    bind(profile, &binaries)?;
    bind(&target.join("tools"), &tools)?;

    let text = format!("nameserver {NAMESERVER}\noptions timeout:2 attempts:2\n");
    if resolv_conf.exists() {
        let ours = run.join("resolv.conf");
        fs::write(&ours, text).context("writing resolv.conf")?;
        bind(&ours, &resolv_conf)?;
    } else {
        // It was a link into the /run that is now hidden.
        let folder = resolv_conf.parent().context("/etc/resolv.conf is in no folder")?;
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        fs::write(&resolv_conf, text).context("writing resolv.conf")?;
    }
    Ok(Sandbox { real_root, suite: suite.to_owned(), binaries, tools, logs, work, figures, outside })
}

fn bind(from: &Path, to: &Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .with_context(|| format!("showing {} at {}", from.display(), to.display()))
}
