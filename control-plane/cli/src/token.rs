//! `outrigger token`: the join tokens with which workloads outside Kubernetes prove who they are.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize, de::IgnoredAny};

use crate::{
    client::{Server, segment},
    config::Connection,
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
        connection: Connection,
        /// How to print
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Make a token useless from now on; certificates that it brought run out by themselves
    Revoke {
        #[command(flatten)]
        connection: Connection,
        /// The token's id, as `outrigger token list` prints it
        id: String,
    },
}

#[derive(Args)]
struct Create {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    grant: Grant,
}

/// What a new token grants; also what the demo asks for.
#[derive(Args, Serialize, Debug, Clone)]
pub(crate) struct Grant {
    /// The identity that its bearer gets, `spiffe://<trust-domain>/ns/<namespace>/sa/<name>`
    #[arg(long, value_name = "SPIFFE_ID")]
    pub(crate) identity: String,
    /// A service that the workload may serve, `name` or `name.namespace`; may be repeated
    #[arg(long = "service", value_name = "SERVICE")]
    pub(crate) services: Vec<String>,
    /// A network that the workload's addresses must lie in; may be repeated. Default: only the address that it calls from
    #[arg(long = "cidr", value_name = "CIDR")]
    pub(crate) cidrs: Vec<String>,
    /// How long the token can be used, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub(crate) ttl_seconds: u64,
    /// How often: a one-time token is for workloads whose restart brings a new one
    #[arg(long, value_enum, default_value_t)]
    pub(crate) uses: Uses,
}

/// How often a token can be used.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Uses {
    #[default]
    OneTime,
    Reusable,
}

/// A new token.
#[derive(Deserialize)]
pub(crate) struct Created {
    pub(crate) token: String,
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<Token>,
}

#[derive(Serialize, Deserialize)]
struct Token {
    id: String,
    identity: String,
    services: Vec<String>,
    cidrs: Vec<String>,
    uses: Uses,
    /// How many certificates it brought.
    used: u64,
    /// Unix seconds.
    expires: u64,
    usable: bool,
}

impl Row for Token {
    const COLUMNS: &[&str] = &["ID", "IDENTITY", "SERVICES", "CIDRS", "USES", "USED", "USABLE"];

    fn name(&self) -> String {
        self.id.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.identity.clone(),
            self.services.join(","),
            self.cidrs.join(","),
            match self.uses {
                Uses::OneTime => "one-time".to_owned(),
                Uses::Reusable => "reusable".to_owned(),
            },
            self.used.to_string(),
            if self.usable { format!("for {}", duration(self.expires)) } else { "no".to_owned() },
        ]
    }
}

/// From now until `end`, in the largest unit that says something.
fn duration(end: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match end.saturating_sub(now) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// Runs the command.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Create(Create { connection, grant }) => {
            println!("{}", create(&connection.server()?, &grant).await?.token);
        }
        Command::List { connection, output } => {
            output::print(output, &connection.server()?.get::<Tokens>("/api/v1/tokens").await?.tokens)?;
        }
        Command::Revoke { connection, id } => {
            let path = format!("/api/v1/tokens/{}", segment(&id));
            connection.server()?.delete::<IgnoredAny>(&path).await?;
            println!("token {id} revoked");
        }
    }
    Ok(())
}

/// Asks the controller for a token.
pub(crate) async fn create(server: &Server, grant: &Grant) -> Result<Created> {
    server.post("/api/v1/tokens", grant).await
}
