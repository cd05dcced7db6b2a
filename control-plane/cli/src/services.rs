//! `outrigger services` and `outrigger proxies`: what the controller knows.

use anyhow::Result;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{
    client::Server,
    output::{self, Format, Row},
};

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    server: Server,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args)]
pub(crate) struct ProxyArguments {
    #[command(flatten)]
    server: Server,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize, Deserialize)]
struct Service {
    name: String,
    source: String,
    endpoints: u64,
    meshed: u64,
}

impl Row for Service {
    const COLUMNS: &[&str] = &["NAME", "SOURCE", "ENDPOINTS", "MESHED"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), self.source.clone(), self.endpoints.to_string(), self.meshed.to_string()]
    }
}

#[derive(Serialize, Deserialize)]
struct Proxy {
    identity: String,
    peer: String,
    subscriptions: u64,
    nacked: u64,
}

impl Row for Proxy {
    const COLUMNS: &[&str] = &["IDENTITY", "PEER", "SUBSCRIPTIONS", "NACKED"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.identity.clone(),
            self.peer.clone(),
            self.subscriptions.to_string(),
            self.nacked.to_string(),
        ]
    }
}

/// Runs `outrigger services`.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    output::print(arguments.output, &arguments.server.get::<Vec<Service>>("/api/v1/services").await?)
}

/// Runs `outrigger proxies`.
pub(crate) async fn run_proxies(arguments: ProxyArguments) -> Result<()> {
    output::print(arguments.output, &arguments.server.get::<Vec<Proxy>>("/api/v1/proxies").await?)
}
