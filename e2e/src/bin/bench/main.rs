//! `make bench`: what a mesh of one client and one server costs, beside a direct call, on loopback.
//!
//! The release binaries run as processes of their own; load generator and application live in this one, so that CPU
//! time of the sidecars can be read apart. Direct and meshed rounds alternate, and medians are reported: on a
//! shared machine the rounds differ more than the two paths do. CPU time is the scheduler's own account
//! (`/proc/PID/task/*/schedstat`, nanoseconds), summed over both sidecars and divided by the requests.
#![forbid(unsafe_code)]

mod drive;
mod pair;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use drive::{Backend, Round};
use pair::Pair;

/// Connections at once, closed loop.
const CONNECTIONS: usize = 32;
/// Rounds of each path: enough for a median that a single disturbance does not move.
const ROUNDS: usize = 5;
/// Length of a round: long enough for the scheduler's account to be exact, short enough to alternate often.
const ROUND: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let binaries = release_folder()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("making a runtime")?;
    runtime.block_on(async { tokio::task::LocalSet::new().run_until(measure(binaries)).await })
}

/// The folder of this executable, where `make bench` leaves all four.
fn release_folder() -> Result<PathBuf> {
    let this = std::env::current_exe().context("finding this executable")?;
    let folder = this.parent().context("this executable has no folder")?.to_owned();
    ensure!(
        folder.join("outrigger-proxy").exists(),
        "outrigger-proxy is not in {}: run `make bench`",
        folder.display()
    );
    Ok(folder)
}

async fn measure(binaries: PathBuf) -> Result<()> {
    let backend = Backend::start().await?;
    let mut pair = Pair::start(&binaries, backend.address).await?;
    let idle = pair.server_memory()?;
    // Connections, pools and caches as in a process that has run for a while.
    drive::round(pair.entry, CONNECTIONS, ROUND / 2).await?;
    let (mut direct, mut meshed, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        direct.push(drive::round(backend.address, CONNECTIONS, ROUND).await?);
        let before = pair.cpu_nanoseconds()?;
        let round = drive::round(pair.entry, CONNECTIONS, ROUND).await?;
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of seconds")]
        cpu.push((pair.cpu_nanoseconds()? - before) as f64 / 1e3 / round.requests as f64);
        meshed.push(round);
    }
    pair.check()?;
    let size =
        std::fs::metadata(binaries.join("outrigger-proxy")).context("reading the sidecar's size")?.len();
    report(&Results { direct, meshed, cpu, idle, size })
}

struct Results {
    direct: Vec<Round>,
    meshed: Vec<Round>,
    /// Microseconds of both sidecars for a request.
    cpu: Vec<f64>,
    idle: pair::Memory,
    /// Bytes.
    size: u64,
}

fn report(results: &Results) -> Result<()> {
    let of = |rounds: &[Round], value: fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let mib = |bytes: u64| {
        #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52")]
        let bytes = bytes as f64;
        bytes / f64::from(1 << 20)
    };
    let rows = [
        ("direct: requests per second", "1/s", of(&results.direct, Round::rate)),
        ("meshed: requests per second", "1/s", of(&results.meshed, Round::rate)),
        ("direct: p50", "us", of(&results.direct, |round| round.quantile(0.5))),
        ("meshed: p50", "us", of(&results.meshed, |round| round.quantile(0.5))),
        ("direct: p99", "us", of(&results.direct, |round| round.quantile(0.99))),
        ("meshed: p99", "us", of(&results.meshed, |round| round.quantile(0.99))),
        ("meshed: CPU of both sidecars per request", "us", median(results.cpu.clone())),
        ("sidecar idle: resident", "MiB", mib(results.idle.resident)),
        ("sidecar idle: anonymous", "MiB", mib(results.idle.anonymous)),
        ("sidecar: binary", "MiB", mib(results.size)),
    ];
    println!("HTTP/1.1, 1 KiB answers, {CONNECTIONS} connections, medians of {ROUNDS} rounds\n");
    for (name, unit, value) in rows {
        println!("{name:<44} {value:>10.1} {unit}");
    }
    let figures: Vec<_> = rows
        .iter()
        .map(|(name, unit, value)| json!({"name": name, "unit": unit, "goal": "-", "measured": value, "met": true}))
        .collect();
    let folder = PathBuf::from("target/figures");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join("bench.json");
    std::fs::write(&path, format!("{:#}\n", json!(figures)))
        .with_context(|| format!("writing {}", path.display()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
