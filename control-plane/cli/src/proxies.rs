//! `outrigger proxies`: who is connected, what each has taken and what it refused.
//!
//! Each resource has a version of its own, so "in sync" is a count over what a proxy asked for, and the versions
//! themselves are shown for one proxy at a time.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    client::Server,
    config::Connection,
    output::{self, Format, Row, age},
};

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// Show what this proxy holds, resource by resource: its identity, its service account, its node or its address
    proxy: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Deserialize)]
struct Proxies {
    proxies: Vec<Proxy>,
}

/// A sidecar that is connected.
#[derive(Serialize, Deserialize)]
pub(crate) struct Proxy {
    pub(crate) identity: String,
    address: String,
    #[serde(default)]
    node: String,
    agent: String,
    /// Unix seconds.
    connected: i64,
    types: BTreeMap<String, Type>,
    pub(crate) claims: Vec<Claim>,
    /// The policies that are in what it was sent.
    #[serde(default)]
    policies: Vec<Policy>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct Policy {
    key: String,
    /// `sent`, `accepted` or `refused`.
    state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Type {
    subscriptions: Vec<Subscription>,
    nack: Option<Nack>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct Subscription {
    name: String,
    version: Option<String>,
    /// `unanswered`, `sent`, `refused`, `absent` (it knows that there is none) or `acked`.
    state: String,
}

/// What it did not take.
#[derive(Serialize, Deserialize)]
pub(crate) struct Nack {
    pub(crate) message: String,
    names: Vec<String>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// What it says that it serves.
#[derive(Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) service: String,
    address: String,
    port: u32,
    pub(crate) accepted: bool,
    pub(crate) message: String,
}

impl Proxy {
    fn is_called(&self, name: &str) -> bool {
        let account = self.identity.rsplit('/').next().unwrap_or_default();
        let ip = self.address.rsplit_once(':').map_or(self.address.as_str(), |(ip, _)| ip);
        [self.identity.as_str(), account, &self.node, &self.address, ip.trim_matches(['[', ']'])]
            .contains(&name)
    }

    /// Its version; what it calls itself, where that names none.
    pub(crate) fn version(&self) -> &str {
        self.agent.rsplit(['/', ' ']).next().unwrap_or(&self.agent)
    }

    /// Of each type that it refuses, the last word.
    pub(crate) fn nacks(&self) -> impl Iterator<Item = &Nack> {
        self.types.values().filter_map(|kind| kind.nack.as_ref())
    }

    /// Resources, then the policies that are in them.
    fn held(&self) -> Vec<Held> {
        let held = |kind: &str, name: &str, state: &str| Held {
            proxy: self.address.clone(),
            kind: kind.to_owned(),
            name: name.to_owned(),
            version: None,
            state: state.to_owned(),
            reason: None,
        };
        let mut all = Vec::new();
        for (kind, Type { subscriptions, nack, .. }) in &self.types {
            for Subscription { name, version, state } in subscriptions {
                let refused = nack.as_ref().filter(|nack| state == "refused" && nack.names.contains(name));
                let reason = refused.map(|nack| nack.message.clone());
                all.push(Held { version: version.clone(), reason, ..held(kind, name, state) });
            }
        }
        for Policy { key, state, reason } in &self.policies {
            all.push(Held { reason: reason.clone(), ..held("Policy", key, state) });
        }
        all
    }
}

impl Row for Proxy {
    const COLUMNS: &[&str] =
        &["IDENTITY", "ADDRESS", "AGENT", "CONNECTED", "ACKED", "CLAIMS", "REFUSED BY IT"];
    const WIDE: &[&str] = &["NODE", "BY TYPE"];

    fn name(&self) -> String {
        self.identity.clone()
    }

    fn cells(&self) -> Vec<String> {
        let claims = match self.claims.iter().filter(|claim| !claim.accepted).count() {
            0 => format!("{} accepted", self.claims.len()),
            refused => format!("{refused} of {} refused", self.claims.len()),
        };
        let nacks: Vec<&str> = self.nacks().map(|nack| nack.message.as_str()).collect();
        vec![
            self.identity.clone(),
            self.address.clone(),
            self.agent.clone(),
            age(self.connected),
            acked(self.types.values().flat_map(|kind| &kind.subscriptions)),
            claims,
            if nacks.is_empty() { "nothing".to_owned() } else { nacks.join("; ") },
        ]
    }

    fn wide(&self) -> Vec<String> {
        let types: Vec<String> = self
            .types
            .iter()
            .map(|(kind, state)| format!("{kind} {}", acked(&state.subscriptions)))
            .collect();
        vec![self.node.clone(), types.join(", ")]
    }

    fn is_alarming(&self) -> bool {
        self.nacks().next().is_some() || self.claims.iter().any(|claim| !claim.accepted)
    }
}

/// How many of `subscriptions` hold what the controller has.
fn acked<'a>(subscriptions: impl IntoIterator<Item = &'a Subscription>) -> String {
    let (mut acked, mut all) = (0, 0);
    for subscription in subscriptions {
        all += 1;
        acked += usize::from(matches!(subscription.state.as_str(), "acked" | "absent"));
    }
    format!("{acked}/{all}")
}

/// One resource at one proxy.
#[derive(Serialize)]
struct Held {
    proxy: String,
    #[serde(rename = "type")]
    kind: String,
    name: String,
    version: Option<String>,
    state: String,
    reason: Option<String>,
}

impl Row for Held {
    const COLUMNS: &[&str] = &["PROXY", "TYPE", "NAME", "VERSION", "STATE", "REASON"];

    fn name(&self) -> String {
        format!("{}/{}", self.kind, self.name)
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.proxy.clone(),
            self.kind.clone(),
            self.name.clone(),
            self.version.clone().unwrap_or_default(),
            self.state.clone(),
            self.reason.clone().unwrap_or_default(),
        ]
    }

    fn is_alarming(&self) -> bool {
        self.state == "refused"
    }
}

/// Those that are connected to one controller.
pub(crate) async fn of(server: &Server) -> Result<Vec<Proxy>> {
    Ok(server.get::<Proxies>("/api/v1/proxies").await?.proxies)
}

/// Runs the command.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let mut proxies = Vec::new();
    // Each is connected to one of the controllers.
    for server in arguments.connection.server()?.replicas().await? {
        proxies.extend(of(&server).await?);
    }
    let Some(name) = arguments.proxy else { return output::print(arguments.output, &proxies) };
    proxies.retain(|proxy| proxy.is_called(&name));
    if proxies.is_empty() {
        bail!("no proxy that is connected is called `{name}`; `outrigger proxies -o wide` lists them");
    }
    output::print(arguments.output, &proxies.iter().flat_map(Proxy::held).collect::<Vec<_>>())
}
