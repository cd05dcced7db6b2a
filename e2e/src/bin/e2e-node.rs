//! A Kubernetes node to work with: `make kubernetes KEEP=1` and `STOP=1`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use outrigger_e2e::kubernetes::keep;

#[derive(Debug, Parser)]
#[command(version, about = "A Kubernetes node that stays up")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start one in the background and say how to use it; one that is there goes first.
    Keep,
    /// Be one, until this process ends.
    Run,
    /// End the one that was kept.
    Stop,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Keep => keep::keep(),
        Command::Run => return keep::run(),
        Command::Stop => keep::stop(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("e2e-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
