//! Processes under measurement: pinned, logged to a file, counted, and gone when the bench is.
//!
//! `setpriv --pdeathsig` has the kernel kill them when this process ends in any way at all, so that an interrupted run
//! leaves no proxy on a port that the next run believes free.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::machine;

/// A running process. Dropping it kills it.
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    pub(crate) begun: Instant,
}

/// Bytes that a process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    pub(crate) anonymous: u64,
}

impl Process {
    /// Starts `program` on a processor, its output in `folder`. To be called from the main thread only: the kernel
    /// ends the process with the thread that started it.
    pub(crate) fn start(
        folder: &Path,
        name: &str,
        cpu: usize,
        program: &Path,
        configure: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let out = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let err = out.try_clone().context("sharing a log file")?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        configure(&mut command);
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        machine::pin(cpu)?;
        let begun = Instant::now();
        let child = command.spawn();
        machine::pin(machine::LOAD_CPU)?;
        let child =
            child.with_context(|| format!("starting {} (setpriv is of util-linux)", program.display()))?;
        Ok(Self { name: name.to_owned(), child, log, begun })
    }

    /// Fails if the process has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context("asking after a process")? {
            None => Ok(()),
            Some(status) => {
                let log = fs::read(&self.log).unwrap_or_default();
                bail!("{} has ended ({status}); it said: {}", self.name, String::from_utf8_lossy(&log))
            }
        }
    }

    /// CPU time that all its threads have used, by the scheduler's account, to the nanosecond.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let tasks = format!("/proc/{}/task", self.child.id());
        let mut sum = 0;
        for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
            let path = task.context("reading a task")?.path().join("schedstat");
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let first = text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok());
            sum += first.with_context(|| format!("{} holds no number", path.display()))?;
        }
        Ok(Duration::from_nanos(sum))
    }

    /// What it holds now.
    pub(crate) fn memory(&self) -> Result<Memory> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            Ok(kib.with_context(|| format!("{path} has no {name}"))? * 1024)
        };
        Ok(Memory { resident: field("VmRSS:")?, anonymous: field("RssAnon:")? })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Probes until `probe` succeeds, a process ends, or `limit` has passed.
pub(crate) fn wait_until(
    limit: Duration,
    what: &str,
    processes: &mut [&mut Process],
    mut probe: impl FnMut() -> Result<()>,
) -> Result<()> {
    /// Between two probes: start to ready is measured to this.
    const PAUSE: Duration = Duration::from_millis(1);
    let end = Instant::now() + limit;
    loop {
        let Err(error) = probe() else { return Ok(()) };
        for process in &mut *processes {
            process.check()?;
        }
        if Instant::now() > end {
            return Err(error.context(format!("waited {limit:?} for {what}")));
        }
        std::thread::sleep(PAUSE);
    }
}
