//! The controller binary: reads the configuration, starts the controller, stops at a signal.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use outrigger_controller::config::{Config, Faults, Log, LogFormat};
use outrigger_controller::controller::Controller;
use outrigger_controller::injector::Injector;
use tokio::signal::unix::{SignalKind, signal};

/// The exit code of a bad configuration: `EX_USAGE` of sysexits.h.
const BAD_CONFIGURATION: u8 = 64;
/// Bytes; a hundred times what every field takes.
const MAX_CONFIGURATION: u64 = 1024 * 1024;

/// Outrigger's control plane: it gives workloads identities and tells proxies where everything is.
///
/// Every field of the configuration can be set by an environment variable: `OUTRIGGER_` and its path in upper case,
/// joined by `_`.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// What this process is.
    #[arg(long, value_enum, default_value_t = Role::Controller)]
    role: Role,
    /// The configuration, YAML.
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_CONFIG")]
    config: Option<PathBuf>,
    /// Check the configuration, list every fault, and exit.
    #[arg(long)]
    check_config: bool,
    /// Print the configuration's JSON schema and exit.
    #[arg(long)]
    print_schema: bool,
}

/// What a process is.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    /// Gives identities and tells proxies where everything is.
    Controller,
    /// The webhook that puts sidecars into the pods of a Kubernetes cluster.
    Injector,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.print_schema {
        // A reader that has seen enough (`| head`) is no failure.
        let _ = writeln!(std::io::stdout(), "{:#}", Config::schema());
        return ExitCode::SUCCESS;
    }
    let config = match load(arguments.config) {
        Ok(config) => config,
        Err(faults) => {
            eprintln!("outrigger-controller: {faults}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    if arguments.check_config {
        println!("the configuration is usable");
        return ExitCode::SUCCESS;
    }
    match run(arguments.role, &config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(path: Option<PathBuf>) -> Result<Config, Faults> {
    let text = match path {
        Some(path) => {
            let name = path.display().to_string();
            let text = read_bounded(&path)
                .map_err(|error| Faults(vec![format!("{name}: cannot be read: {error}")]))?;
            Some((name, text))
        }
        None => None,
    };
    Config::load(text.as_ref().map(|(name, text)| (name.as_str(), text.as_str())), |name| {
        std::env::var(name).ok()
    })
}

/// The text of a file that may be no configuration at all, such as a device without an end.
fn read_bounded(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_CONFIGURATION + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CONFIGURATION {
        return Err(std::io::Error::other("it is larger than 1 MiB, so it is no configuration"));
    }
    String::from_utf8(bytes).map_err(|_| std::io::Error::other("it is not UTF-8 text"))
}

#[tokio::main]
async fn run(role: Role, config: &Config) -> anyhow::Result<()> {
    start_logging(&config.log)?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let signalled = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    };
    tokio::pin!(signalled);
    match role {
        Role::Controller => {
            let controller = tokio::select! {
                started = Controller::start(config) => started?,
                // It may wait for the Kubernetes API for long.
                () = &mut signalled => return Ok(()),
            };
            signalled.await;
            controller.stop().await;
        }
        Role::Injector => {
            let injector = Injector::start(config).await?;
            signalled.await;
            injector.stop().await;
        }
    }
    Ok(())
}

fn start_logging(log: &Log) -> anyhow::Result<()> {
    let filter: tracing_subscriber::EnvFilter = log.level.parse().context("log.level")?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_an_end_is_no_configuration() {
        for device in ["/dev/zero", "/dev/urandom"] {
            let faults = load(Some(device.into())).unwrap_err().to_string();
            assert!(faults.contains("larger than 1 MiB"), "{faults}");
        }
    }
}
