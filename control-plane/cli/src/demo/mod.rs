//! `outrigger demo`: a whole mesh on one machine, and what happens when parts of it fail.
//!
//! It starts what people run in production, as processes: a controller, three services with two or three replicas each,
//! and a sidecar beside each replica. Nothing is simulated: the failures are signals sent to those processes.

pub(crate) mod app;
mod consul;
mod edges;
pub(crate) mod load;
mod metrics;
mod plan;
mod processes;
mod scenario;
mod screen;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use scenario::Demo;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Walk through the scenario once without a live screen, and fail if a request failed that should not have
    #[arg(long)]
    once: bool,
    /// Take the services from a real Consul, started from this binary, in place of files
    #[arg(long, value_name = "BINARY")]
    consul: Option<PathBuf>,
    /// Requests a second
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=2000))]
    rate: u32,
    /// Keep configurations and logs in this folder
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
}

/// Runs the demo until its end (`--once`) or until it is interrupted.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let temporary = tempfile::Builder::new()
        .prefix("outrigger-demo-")
        .tempdir()
        .context("making a folder for the demo")?;
    let folder = match &arguments.keep {
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
            folder.canonicalize().with_context(|| format!("finding {}", folder.display()))?
        }
        None => temporary.path().to_owned(),
    };
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let played = tokio::select! {
        played = play(&arguments, folder.clone()) => played,
        _ = interrupt.recv() => Ok(0),
        _ = terminate.recv() => Ok(0),
    };
    // The logs are the only witnesses: keep them when something went wrong.
    match played {
        Ok(0) => Ok(()),
        Ok(unexpected) => {
            let logs = keep(temporary, &arguments);
            bail!("{unexpected} requests failed that should not have; the logs are in {logs}")
        }
        Err(error) => {
            let logs = keep(temporary, &arguments);
            Err(error.context(format!("the demo could not go on; the logs are in {logs}")))
        }
    }
}

fn keep(temporary: tempfile::TempDir, arguments: &Arguments) -> String {
    arguments
        .keep
        .as_ref()
        .map_or_else(|| temporary.keep().display().to_string(), |folder| folder.display().to_string())
}

/// Returns how many requests failed that should not have.
async fn play(arguments: &Arguments, folder: PathBuf) -> Result<u64> {
    let mut demo = Demo::start(folder, arguments.consul.as_deref(), arguments.rate, arguments.once).await?;
    let unexpected = demo.scenario().await?;
    if !arguments.once && unexpected == 0 {
        demo.watch().await?;
    }
    Ok(unexpected)
}
