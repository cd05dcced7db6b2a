//! The demo's child processes: started from the binaries beside this one, logging into the demo's folder, killed
//! with it.

use std::{
    fs::File,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{sys::signal::Signal, unistd::Pid};
use tokio::process::{Child, Command};

/// How long a process may take to end after SIGTERM: longer than the sidecar's longest drain.
const END_DEADLINE: Duration = Duration::from_secs(40);

/// Where the demo's files are and which binaries it starts.
pub(super) struct Site {
    pub(super) folder: PathBuf,
    binaries: PathBuf,
}

/// A running child.
pub(super) struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Site {
    /// Uses `folder` for files and the folder of this executable for binaries.
    pub(super) fn new(folder: PathBuf) -> Result<Self> {
        let this = std::env::current_exe().context("finding this executable")?;
        let binaries = this.parent().context("this executable has no folder")?.to_owned();
        for binary in ["outrigger-controller", "outrigger-proxy"] {
            if !binaries.join(binary).exists() {
                bail!("{binary} is not beside {}: build all three with `make build`", this.display());
            }
        }
        Ok(Self { folder, binaries })
    }

    /// Starts one of our own binaries.
    pub(super) fn start(&self, name: &str, binary: &str, arguments: &[&str]) -> Result<Process> {
        self.start_program(name, &self.binaries.join(binary), arguments)
    }

    /// Starts any program, its output in `<folder>/<name>.log`, appended.
    pub(super) fn start_program(&self, name: &str, program: &Path, arguments: &[&str]) -> Result<Process> {
        let log = self.folder.join(format!("{name}.log"));
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the log between both outputs")?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Process { name: name.to_owned(), log, child })
    }

    /// Writes a file into the demo's folder and returns its path.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<String> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path.display().to_string())
    }
}

impl Process {
    /// Fails with the end of its log if the process has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("asking after a child")? {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(8).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!(
                "{} ended by itself ({status}); the end of {}:\n{}",
                self.name,
                self.log.display(),
                tail.join("\n")
            );
        }
        Ok(())
    }

    /// Ends it at once, as a crash would.
    pub(super) async fn kill(mut self) -> Result<()> {
        self.child.kill().await.with_context(|| format!("killing {}", self.name))
    }

    /// Ends it as an operator would, and waits.
    pub(super) async fn terminate(mut self) -> Result<()> {
        if let Some(id) = self.child.id() {
            let id = i32::try_from(id).context("a process id above 2^31")?;
            nix::sys::signal::kill(Pid::from_raw(id), Signal::SIGTERM)
                .with_context(|| format!("ending {}", self.name))?;
        }
        match tokio::time::timeout(END_DEADLINE, self.child.wait()).await {
            Ok(status) => status.map(drop).with_context(|| format!("waiting for {}", self.name)),
            Err(_) => bail!("{} did not end within {} s of SIGTERM", self.name, END_DEADLINE.as_secs()),
        }
    }
}

/// `count` ports of 127.0.0.1 that are free now. They are held together while they are chosen, so that none comes twice.
pub(super) fn free_addresses(count: usize) -> Result<Vec<SocketAddr>> {
    let held: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").context("finding free ports on 127.0.0.1"))
        .collect::<Result<_>>()?;
    held.iter().map(|listener| listener.local_addr().context("reading a port")).collect()
}
