//! `outrigger services` and `outrigger proxies`: what the controller knows.

use std::collections::BTreeMap;

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

#[derive(Deserialize)]
struct Services {
    services: Vec<Service>,
}

#[derive(Serialize, Deserialize)]
struct Service {
    name: String,
    namespace: String,
    source: String,
    ports: Vec<ServicePort>,
    endpoints: Vec<Endpoint>,
}

#[derive(Serialize, Deserialize)]
struct ServicePort {
    port: u16,
    name: String,
    protocol: String,
}

#[derive(Serialize, Deserialize)]
struct Endpoint {
    id: String,
    address: String,
    health: String,
    identity: String,
}

impl Row for Service {
    const COLUMNS: &[&str] = &["NAME", "SOURCE", "PORTS", "ENDPOINTS", "MESHED", "HEALTHY"];

    fn cells(&self) -> Vec<String> {
        let ports: Vec<String> = self
            .ports
            .iter()
            .map(|port| if port.port == 0 { "any".to_owned() } else { port.port.to_string() })
            .collect();
        let count = |holds: fn(&Endpoint) -> bool| {
            self.endpoints.iter().filter(|endpoint| holds(endpoint)).count().to_string()
        };
        vec![
            format!("{}.{}", self.name, self.namespace),
            self.source.clone(),
            ports.join(","),
            count(|_| true),
            count(|endpoint| !endpoint.identity.is_empty()),
            count(|endpoint| endpoint.health == "HEALTHY"),
        ]
    }
}

#[derive(Deserialize)]
struct Sources {
    sources: Vec<Source>,
}

#[derive(Deserialize)]
struct Source {
    name: String,
    state: String,
    reason: Option<String>,
    faults: Vec<Fault>,
}

#[derive(Deserialize)]
struct Fault {
    subject: String,
    reason: String,
}

#[derive(Deserialize)]
struct Proxies {
    proxies: Vec<Proxy>,
}

#[derive(Serialize, Deserialize)]
struct Proxy {
    identity: String,
    address: String,
    agent: String,
    subscriptions: u64,
    types: BTreeMap<String, Type>,
    claims: Vec<Claim>,
}

#[derive(Serialize, Deserialize)]
struct Type {
    nack: Option<Nack>,
}

#[derive(Serialize, Deserialize)]
struct Nack {
    message: String,
    names: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Claim {
    service: String,
    address: String,
    port: u32,
    accepted: bool,
    message: String,
}

impl Row for Proxy {
    const COLUMNS: &[&str] = &["IDENTITY", "ADDRESS", "AGENT", "SUBSCRIPTIONS", "CLAIMS", "REFUSED BY IT"];

    fn cells(&self) -> Vec<String> {
        let claims = match self.claims.iter().filter(|claim| !claim.accepted).count() {
            0 => format!("{} accepted", self.claims.len()),
            refused => format!("{refused} of {} refused", self.claims.len()),
        };
        let nacks = self.types.values().filter_map(|kind| kind.nack.as_ref());
        let nacks: Vec<&str> = nacks.map(|nack| nack.message.as_str()).collect();
        vec![
            self.identity.clone(),
            self.address.clone(),
            self.agent.clone(),
            self.subscriptions.to_string(),
            claims,
            if nacks.is_empty() { "nothing".to_owned() } else { nacks.join("; ") },
        ]
    }
}

/// Runs `outrigger services`.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    output::print(arguments.output, &arguments.server.get::<Services>("/api/v1/services").await?.services)?;
    // A list that is short because a source cannot be read must not look like a small mesh.
    for source in arguments.server.get::<Sources>("/api/v1/sources").await?.sources {
        if source.state != "synced" {
            let fault = source.faults.first().map(|fault| format!("{}: {}", fault.subject, fault.reason));
            let why = source.reason.or(fault).unwrap_or_else(|| "it has not answered yet".to_owned());
            eprintln!("outrigger: the source {} is {}: {why}", source.name, source.state);
        }
    }
    Ok(())
}

/// Runs `outrigger proxies`.
pub(crate) async fn run_proxies(arguments: Arguments) -> Result<()> {
    output::print(arguments.output, &arguments.server.get::<Proxies>("/api/v1/proxies").await?.proxies)
}
