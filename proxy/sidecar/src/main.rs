//! `outrigger-proxy`: the sidecar, and the redirection that brings traffic to it.
#![forbid(unsafe_code)]

use std::{
    fs::File,
    io::{self, Read, stderr},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use outrigger_proxy::{
    cni,
    config::{self, Config, LogFormat},
    redirect, run,
};
use tracing_subscriber::EnvFilter;

/// Exit code for bad configuration (sysexits.h, `EX_USAGE`).
const BAD_CONFIGURATION: u8 = 64;
/// Bytes; a hundred times what every field takes.
const MAX_CONFIGURATION: u64 = 1024 * 1024;

/// The sidecar of the Outrigger service mesh.
#[derive(Parser)]
#[command(name = "outrigger-proxy", version)]
struct Arguments {
    /// YAML configuration. Every field can also be set as `OUTRIGGER_<FIELD>`.
    #[arg(long, env = "OUTRIGGER_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Check the configuration, list every fault and exit.
    #[arg(long)]
    check_config: bool,
    /// Print the JSON schema of the configuration and exit.
    #[arg(long)]
    print_schema: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Write, print or remove the rules that bring a workload's traffic to its sidecar.
    Redirect(Box<redirect::Arguments>),
    /// What runs on the nodes of a cluster in which pods may not redirect themselves.
    #[command(subcommand)]
    Cni(Cni),
}

#[derive(Subcommand)]
enum Cni {
    /// Install the CNI plugin on this node, keep it there, and take it out when the mesh goes.
    Agent(cni::agent::Arguments),
}

fn main() -> ExitCode {
    if cni::is_plugin() {
        return cni::run_plugin();
    }
    let arguments = Arguments::parse();
    if arguments.print_schema {
        println!("{:#}", config::schema());
        return ExitCode::SUCCESS;
    }
    let config = match load(&arguments) {
        Ok(config) => config,
        Err(faults) => {
            eprintln!("outrigger-proxy: the configuration has faults:\n{}", faults.trim_end());
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    if arguments.check_config {
        println!("the configuration is valid");
        return ExitCode::SUCCESS;
    }
    log(&config);
    let result = match arguments.command {
        Some(Command::Redirect(arguments)) => redirect::run(&arguments, &config),
        Some(Command::Cni(Cni::Agent(arguments))) => cni::agent::run(&arguments),
        None => run::run(config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(arguments: &Arguments) -> Result<Config, String> {
    let file = match &arguments.config {
        Some(path) => read_bounded(path)
            .map_err(|error| format!("- cannot read the file {}: {error}", path.display()))?,
        None => String::new(),
    };
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    config::load(&file, environment).map_err(|faults| faults.to_string())
}

/// The text of a file that may be no configuration at all, such as a device without an end.
fn read_bounded(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_CONFIGURATION + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CONFIGURATION {
        return Err(io::Error::other("it is larger than 1 MiB, so it is no configuration"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8 text"))
}

fn log(config: &Config) {
    // `load` has checked the directives.
    let filter = EnvFilter::new(&config.log.level);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match config.log.format {
        LogFormat::Text => builder.with_ansi(io::IsTerminal::is_terminal(&stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_an_end_is_no_configuration() {
        for device in ["/dev/zero", "/dev/urandom"] {
            let error = read_bounded(Path::new(device)).unwrap_err().to_string();
            assert!(error.contains("larger than 1 MiB"), "{error}");
        }
    }
}
