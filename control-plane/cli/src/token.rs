//! `outrigger token`: the join tokens with which workloads outside Kubernetes prove who they are.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use crate::{
    client::Server,
    output::{self, Format, Row},
};

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a token and print it; it is shown this once and stored as a hash
    Create(Create),
    /// List the tokens, without their secrets
    List {
        #[command(flatten)]
        server: Server,
        /// How to print
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Make a token useless from now on; certificates that it brought run out by themselves
    Revoke {
        #[command(flatten)]
        server: Server,
        /// The token's id, as `outrigger token list` prints it
        id: String,
    },
}

#[derive(Args)]
struct Create {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    grant: Grant,
}

/// What a new token grants; also what the demo asks for.
#[derive(Args, Serialize, Debug, Clone)]
pub(crate) struct Grant {
    /// Namespace of the identity
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
    /// Service account of the identity
    #[arg(long, value_name = "NAME")]
    pub(crate) service_account: String,
    /// A service that the workload may serve, `name` or `name.namespace`; may be repeated
    #[arg(long = "service", value_name = "SERVICE")]
    pub(crate) services: Vec<String>,
    /// Addresses that the workload may live at, beside the one that it calls from; may be repeated
    #[arg(long = "cidr", value_name = "CIDR")]
    pub(crate) cidrs: Vec<String>,
    /// How long the token can be used, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub(crate) ttl_seconds: u64,
    /// Let the token be used until it expires, not just once
    #[arg(long)]
    pub(crate) reusable: bool,
}

/// A new token.
#[derive(Deserialize)]
pub(crate) struct Created {
    pub(crate) token: String,
}

#[derive(Serialize, Deserialize)]
struct Token {
    id: String,
    identity: String,
    services: Vec<String>,
    cidrs: Vec<String>,
    reusable: bool,
    uses: u64,
    expires: String,
}

impl Row for Token {
    const COLUMNS: &[&str] = &["ID", "IDENTITY", "SERVICES", "CIDRS", "REUSABLE", "USES", "EXPIRES"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.identity.clone(),
            self.services.join(","),
            self.cidrs.join(","),
            self.reusable.to_string(),
            self.uses.to_string(),
            self.expires.clone(),
        ]
    }
}

/// Runs the command.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Create(Create { server, grant }) => {
            println!("{}", create(&server, &grant).await?.token);
        }
        Command::List { server, output } => {
            output::print(output, &server.get::<Vec<Token>>("/api/v1/tokens").await?)?;
        }
        Command::Revoke { server, id } => {
            server.delete(&format!("/api/v1/tokens/{id}")).await?;
            println!("token {id} revoked");
        }
    }
    Ok(())
}

/// Asks the controller for a token.
pub(crate) async fn create(server: &Server, grant: &Grant) -> Result<Created> {
    server.post("/api/v1/tokens", grant).await
}
