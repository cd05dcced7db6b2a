//! `outrigger services` and `outrigger endpoints`: where everything is, as the controller sees it.

use anyhow::Result;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    client::{Server, segment},
    config::Connection,
    output::{self, Format, Row},
};

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args)]
pub(crate) struct EndpointArguments {
    #[command(flatten)]
    connection: Connection,
    /// Of this service only, `name.namespace`
    service: Option<String>,
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
    ports: Vec<Port>,
    endpoints: Vec<Instance>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct Port {
    #[serde(rename = "port")]
    number: u16,
    name: String,
    protocol: String,
}

#[derive(Serialize, Deserialize)]
struct Instance {
    health: String,
    identity: String,
    #[serde(flatten)]
    more: Map<String, Value>,
}

impl Row for Service {
    const COLUMNS: &[&str] = &["NAME", "SOURCE", "PORTS", "ENDPOINTS", "MESHED", "HEALTHY"];
    const WIDE: &[&str] = &["PROTOCOLS"];

    fn name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }

    fn cells(&self) -> Vec<String> {
        let ports: Vec<String> = self
            .ports
            .iter()
            .map(|port| if port.number == 0 { "any".to_owned() } else { port.number.to_string() })
            .collect();
        let count = |holds: fn(&Instance) -> bool| {
            self.endpoints.iter().filter(|endpoint| holds(endpoint)).count().to_string()
        };
        vec![
            self.name(),
            self.source.clone(),
            ports.join(","),
            count(|_| true),
            count(|endpoint| !endpoint.identity.is_empty()),
            count(|endpoint| endpoint.health == "HEALTHY"),
        ]
    }

    fn wide(&self) -> Vec<String> {
        let protocols: Vec<String> =
            self.ports.iter().map(|port| format!("{}={}", port.name, port.protocol)).collect();
        vec![protocols.join(",")]
    }

    fn is_alarming(&self) -> bool {
        !self.endpoints.is_empty() && self.endpoints.iter().all(|endpoint| endpoint.health != "HEALTHY")
    }
}

#[derive(Deserialize)]
struct Endpoints {
    items: Vec<Endpoint>,
}

#[derive(Serialize, Deserialize)]
struct Endpoint {
    service: String,
    id: String,
    address: String,
    /// The service's port to the endpoint's own.
    #[serde(default)]
    ports: Map<String, Value>,
    #[serde(default)]
    identity: String,
    health: String,
    #[serde(default)]
    zone: String,
    weight: u32,
    #[serde(flatten)]
    more: Map<String, Value>,
}

impl Row for Endpoint {
    const COLUMNS: &[&str] = &["SERVICE", "ADDRESS", "PORTS", "HEALTH", "IDENTITY"];
    const WIDE: &[&str] = &["ID", "ZONE", "WEIGHT"];

    fn name(&self) -> String {
        self.id.clone()
    }

    fn cells(&self) -> Vec<String> {
        let ports: Vec<String> = self
            .ports
            .iter()
            .map(|(port, target)| match target.to_string() {
                target if target == *port => target,
                target => format!("{port}->{target}"),
            })
            .collect();
        vec![
            self.service.clone(),
            self.address.clone(),
            ports.join(","),
            self.health.clone(),
            if self.identity.is_empty() { "none: not meshed".to_owned() } else { self.identity.clone() },
        ]
    }

    fn wide(&self) -> Vec<String> {
        vec![self.id.clone(), self.zone.clone(), self.weight.to_string()]
    }

    fn is_alarming(&self) -> bool {
        self.health == "UNHEALTHY"
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

/// Runs `outrigger services`.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let server = arguments.connection.server()?;
    output::print(arguments.output, &server.get::<Services>("/api/v1/services").await?.services)?;
    tell_of_sources(&server).await
}

/// Runs `outrigger endpoints`.
pub(crate) async fn run_endpoints(arguments: EndpointArguments) -> Result<()> {
    let server = arguments.connection.server()?;
    let path = match &arguments.service {
        Some(service) => format!("/api/v1/endpoints?service={}", segment(service)),
        None => "/api/v1/endpoints".to_owned(),
    };
    output::print(arguments.output, &server.get::<Endpoints>(&path).await?.items)?;
    tell_of_sources(&server).await
}

/// A list that is short because a source cannot be read must not look like a small mesh.
async fn tell_of_sources(server: &Server) -> Result<()> {
    for source in server.get::<Sources>("/api/v1/sources").await?.sources {
        if source.state != "synced" {
            let fault = source.faults.first().map(|fault| format!("{}: {}", fault.subject, fault.reason));
            let why = source.reason.or(fault).unwrap_or_else(|| "it has not answered yet".to_owned());
            eprintln!("outrigger: the source {} is {}: {why}", source.name, source.state);
        }
    }
    Ok(())
}
