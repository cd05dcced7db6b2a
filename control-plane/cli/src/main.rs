//! `outrigger`: what people type.
//!
//! Commands about the mesh talk to the controller's API, in a cluster through its API server; `check` also looks at what
//! is installed there; `demo` starts a whole mesh of its own.
//!
//! Exit codes are part of the interface: scripts branch on them. They are kubectl's, and the 64 of all binaries for a
//! configuration that cannot be used.
#![forbid(unsafe_code)]

mod check;
mod client;
mod cluster;
mod config;
mod context;
mod demo;
mod inject;
mod kubeconfig;
mod output;
mod policy;
mod proxies;
mod schema;
mod services;
mod token;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

/// A command that was not done, or a question whose answer is no.
const NO: u8 = 1;
/// A question that could not be answered; also what clap exits with when the command line is wrong.
const UNKNOWN: u8 = 2;
/// The file of contexts or the kubeconfig cannot be used (`EX_USAGE` of `sysexits.h`, as the other binaries).
const BAD_CONFIG: u8 = 64;

const EXIT_CODES: &str = "\
Exit codes:
  0   done; `policy diff`: no differences; `policy test`: every case passed; `check`: nothing failed
  1   failed; `policy diff`: there are differences; `policy test`: a case failed; `check`: something failed;
      `inject --explain`: a pod would be refused
  2   the command line is wrong; `policy diff`, `policy test`, `check`: could not be run, or not whole
  64  the file of contexts or the kubeconfig cannot be used";

/// A service mesh that you can try in one command: `outrigger demo`.
#[derive(Parser)]
#[command(name = "outrigger", version, propagate_version = true, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write, read, compare, test and explain policies
    Policy(policy::Arguments),
    /// List the services that the controller knows
    Services(services::Arguments),
    /// List the endpoints of services
    Endpoints(services::EndpointArguments),
    /// List the sidecars that are connected, what each has acknowledged, and what it refused and why
    Proxies(proxies::Arguments),
    /// Create, list and revoke the join tokens with which workloads prove who they are
    Token(token::Arguments),
    /// Check whether the mesh is well or, with --pre, whether a cluster takes an installation
    Check(check::Arguments),
    /// Show which controller is meant, and choose between controllers
    Context(context::Arguments),
    /// Put sidecars into manifests, as the webhook would into their pods
    Inject(inject::Arguments),
    /// Take sidecars out of manifests
    Uninject(inject::UninjectArguments),
    /// Print the schema of a kind, or list the kinds
    Schema(schema::Arguments),
    /// Print a shell's completions, for `source <(outrigger completions bash)`
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Run a whole mesh on this machine: no root, no cluster, no other server
    Demo(demo::Arguments),
    /// One HTTP server of the demo's applications
    #[command(hide = true)]
    DemoApp(demo::app::Arguments),
    /// A client of the demo's applications
    #[command(hide = true)]
    DemoLoad(demo::load::Arguments),
}

/// What a command came to. Its exit code is part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done; for a question: yes.
    Yes,
    /// A question was answered: there are differences, or a case failed.
    No,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let is_question = match &command {
        Command::Policy(policy) => policy.is_question(),
        Command::Check(_) => true,
        _ => false,
    };
    let failure = if is_question { UNKNOWN } else { NO };
    match run(command).await {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => NO.into(),
        Err(error) => {
            eprintln!("outrigger: {error:#}");
            if error.is::<config::BadConfig>() { BAD_CONFIG.into() } else { failure.into() }
        }
    }
}

async fn run(command: Command) -> Result<Answer> {
    match command {
        Command::Policy(arguments) => return policy::run(arguments).await,
        Command::Check(arguments) => return check::run(arguments).await,
        Command::Services(arguments) => services::run(arguments).await,
        Command::Endpoints(arguments) => services::run_endpoints(arguments).await,
        Command::Proxies(arguments) => proxies::run(arguments).await,
        Command::Token(arguments) => token::run(arguments).await,
        Command::Context(arguments) => context::run(arguments),
        Command::Inject(arguments) => return inject::run(&arguments),
        Command::Uninject(arguments) => inject::run_uninject(&arguments),
        Command::Schema(arguments) => schema::run(&arguments),
        Command::Completions { shell } => completions(shell),
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::DemoApp(arguments) => demo::app::run(arguments).await,
        Command::DemoLoad(arguments) => demo::load::run(arguments).await,
    }?;
    Ok(Answer::Yes)
}

fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "outrigger", &mut script);
    output::write(&String::from_utf8_lossy(&script))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }
}
