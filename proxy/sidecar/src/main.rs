//! `outrigger-proxy`: the sidecar, and the redirection that brings traffic to it.
#![forbid(unsafe_code)]

use std::{io::stderr, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use outrigger_proxy::{
    config::{self, Config, LogFormat},
    redirect, run,
};
use tracing_subscriber::EnvFilter;

/// Exit code for bad configuration (sysexits.h, `EX_USAGE`).
const BAD_CONFIGURATION: u8 = 64;

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
    Redirect(redirect::Arguments),
}

fn main() -> ExitCode {
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
        Some(path) => std::fs::read_to_string(path)
            .map_err(|error| format!("- cannot read the file {}: {error}", path.display()))?,
        None => String::new(),
    };
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    config::load(&file, environment).map_err(|faults| faults.to_string())
}

fn log(config: &Config) {
    // `load` has checked the directives.
    let filter = EnvFilter::new(&config.log.level);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match config.log.format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
}
