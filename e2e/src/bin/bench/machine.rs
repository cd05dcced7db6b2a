//! The machine: which processor does what, and whether somebody else uses it.
//!
//! Proxies share one processor and the load has the other, so that CPU time per request does not depend on where the
//! scheduler puts things. On a virtual machine the host may steal time, which leaks into CPU time through cold
//! caches; a measurement with too much of it is made again.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

/// Load, backend and controller.
pub(crate) const LOAD_CPU: usize = 0;
/// Both proxies.
pub(crate) const PROXY_CPU: usize = 1;
/// The share of the two processors' time that the host may steal from a measurement.
pub(crate) const MAX_STEAL: f64 = 0.015;
/// Files that 1,000 connections through every process here need, and to spare.
const FILES: u64 = 20_000;
/// The priority of everything here, where it may be raised: builds beside it then get a few per cent.
const NICENESS: &str = "-15";
/// Where the scheduler keeps it for a session: everything that was started from one terminal.
const AUTOGROUP: &str = "/proc/self/autogroup";
/// The unit of `/proc/stat`: `USER_HZ`, 100 on every Linux.
const TICK: Duration = Duration::from_millis(10);

/// Pins the calling thread, and all that it starts, to one processor; does nothing where there is only one.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    if std::thread::available_parallelism().is_ok_and(|count| count.get() == 1) && cpu > 0 {
        return Ok(());
    }
    let mut set = CpuSet::new();
    set.set(cpu).context("naming a processor")?;
    match sched_setaffinity(Pid::from_raw(0), &set) {
        // A machine with one processor.
        Err(nix::errno::Errno::EINVAL) => Ok(()),
        result => result.with_context(|| format!("pinning to processor {cpu}")),
    }
}

/// Raises the limit of open files and, where that is allowed, this process's priority: builds on the same machine
/// then take less from it. What it starts inherits both, proxies of all kinds alike.
pub(crate) fn prepare() -> Result<Priority> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
    let wanted = FILES.min(hard).max(soft);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).context("raising the limit of open files")?;
    // Without the right to either it is measured as it comes.
    let _ = Command::new("renice")
        .args(["-n", NICENESS, "-p"])
        .arg(std::process::id().to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // Where the scheduler groups processes by session, niceness counts within a group, and the group has its own.
    let before = fs::read_to_string(AUTOGROUP).ok();
    let before = before.and_then(|text| Some(text.trim().rsplit_once("nice ")?.1.to_owned()));
    let _ = fs::write(AUTOGROUP, NICENESS);
    pin(LOAD_CPU)?;
    Ok(Priority { before })
}

/// The session's priority, which outlives this process unless it is put back.
#[must_use = "the session gets its priority back when this is dropped"]
pub(crate) struct Priority {
    before: Option<String>,
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(AUTOGROUP, before);
        }
    }
}

/// What the two processors have done since they started.
#[derive(Clone, Copy, Default)]
pub(crate) struct Usage {
    stolen: Duration,
    busy: Duration,
    at: Option<Instant>,
}

/// Shares of both processors' time.
#[derive(Clone, Copy, Default)]
pub(crate) struct Shares {
    /// Taken by the host.
    pub(crate) stolen: f64,
    /// Used by anybody.
    pub(crate) busy: f64,
}

impl Usage {
    pub(crate) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let mut usage = Self { at: Some(Instant::now()), ..Self::default() };
        for cpu in [LOAD_CPU, PROXY_CPU] {
            let Some(line) = text.lines().find_map(|line| line.strip_prefix(&format!("cpu{cpu} "))) else {
                continue;
            };
            let ticks: Vec<u32> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
            let field = |at: usize| TICK * ticks.get(at).copied().unwrap_or(0);
            // user, nice, system, idle, iowait, irq, softirq, steal
            usage.busy += field(0) + field(1) + field(2) + field(5) + field(6);
            usage.stolen += field(7);
        }
        Ok(usage)
    }

    /// What has happened since.
    pub(crate) fn since(&self) -> Result<Shares> {
        let now = Self::now()?;
        let elapsed = self.at.map_or(0.0, |at| at.elapsed().as_secs_f64()).max(f64::EPSILON) * 2.0;
        Ok(Shares {
            stolen: now.stolen.saturating_sub(self.stolen).as_secs_f64() / elapsed,
            busy: now.busy.saturating_sub(self.busy).as_secs_f64() / elapsed,
        })
    }
}

/// Waits until the host leaves us alone, at most for `limit`.
pub(crate) fn wait_for_calm(limit: Duration) -> Result<()> {
    const PROBE: Duration = Duration::from_millis(250);
    let end = Instant::now() + limit;
    while Instant::now() < end {
        let before = Usage::now()?;
        // Only a processor that is wanted can be stolen.
        let until = Instant::now() + PROBE;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        if before.since()?.stolen <= MAX_STEAL {
            break;
        }
    }
    Ok(())
}

/// How fast the machine is just now: milliseconds of a fixed piece of work in and out of the cache.
pub(crate) fn spin() -> f64 {
    let begun = Instant::now();
    let words: Vec<u64> = (0..1 << 19).collect();
    let (mut state, mut sum) = (88_172_645_463_325_252_u64, 0_u64);
    for _ in 0..1_000_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        #[expect(clippy::cast_possible_truncation, reason = "an index is what is wanted")]
        let at = state as usize % words.len();
        sum = sum.wrapping_add(words[at]);
    }
    std::hint::black_box(sum);
    begun.elapsed().as_secs_f64() * 1e3
}
