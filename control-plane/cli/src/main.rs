//! `outrigger`: what people type.
//!
//! Commands about the mesh talk to the controller's API and to nothing else; `demo` starts a whole mesh of its own.
#![forbid(unsafe_code)]

mod client;
mod demo;
mod output;
mod services;
mod token;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A service mesh that you can try in one command: `outrigger demo`.
#[derive(Parser)]
#[command(name = "outrigger", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create, list and revoke the join tokens with which workloads prove who they are
    Token(token::Arguments),
    /// List the services that the controller knows
    Services(services::Arguments),
    /// List the sidecars that are connected, and what each has acknowledged
    Proxies(services::Arguments),
    /// Run a whole mesh on this machine: no root, no cluster, no other server
    Demo(demo::Arguments),
    /// One HTTP server of the demo's applications
    #[command(hide = true)]
    DemoApp(demo::app::Arguments),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Token(arguments) => token::run(arguments).await,
        Command::Services(arguments) => services::run(arguments).await,
        Command::Proxies(arguments) => services::run_proxies(arguments).await,
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::DemoApp(arguments) => demo::app::run(arguments).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: {error:#}");
            ExitCode::FAILURE
        }
    }
}
