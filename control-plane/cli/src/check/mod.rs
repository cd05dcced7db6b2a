//! `outrigger check`: whether a mesh is well and, before an installation, whether a cluster takes one.
//!
//! Each module of a category first asks and then judges, by functions that take what was answered and nothing else. What
//! cannot be asked, because the caller may not, is `unknown` and never `ok`. Nothing is changed, and no secret is read: the
//! webhook's certificate is looked at from the API server's side, by a handshake, and the CA's end is the controller's to
//! tell.

mod api_server;
mod control_plane;
mod mesh;
mod neighbours;
mod networks;
mod nodes;
mod report;
mod webhook;
mod workloads;

use anyhow::{Context, Result};
use clap::Args;
use kube::{Api, api::ListParams};
use serde::de::DeserializeOwned;

use self::report::Report;
use crate::{
    Answer,
    cluster::Cluster,
    config::{Connection, Target},
    output::Format,
};

/// Objects of one page of a list: a large cluster is read without holding it whole.
const PAGE: u32 = 500;
/// Labels and annotations of ours on namespaces and pods.
const INJECT: &str = "outrigger.dev/inject";

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// Check whether a cluster takes an installation, before there is one
    #[arg(long)]
    pre: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Runs the command.
pub(crate) async fn run(arguments: Arguments) -> Result<Answer> {
    let mut report = Report::default();
    let Arguments { connection, pre, output } = arguments;
    if pre {
        let cluster = Cluster::connect(connection.cluster()?).await?;
        before(&cluster, &mut report).await?;
    } else {
        let server = connection.server()?;
        if let Target::Cluster(_) = connection.target()? {
            let cluster = server.cluster().await?.context("the cluster is connected")?;
            installed(cluster, &mut report).await?;
            networks::installed(&server, cluster, &mut report).await;
        }
        mesh::check(&server, &mut report).await;
    }
    report.print(output)
}

/// What an installation needs.
async fn before(cluster: &Cluster, report: &mut Report) -> Result<()> {
    // Without an answer to this there is no sense in asking for more.
    api_server::version(cluster, report).await?;
    api_server::clock(cluster, report).await;
    api_server::permissions(cluster, report).await;
    nodes::check(cluster, report).await;
    networks::before(cluster, report).await;
    neighbours::check(cluster, report).await;
    Ok(())
}

/// What an installation has put into the cluster.
async fn installed(cluster: &Cluster, report: &mut Report) -> Result<()> {
    api_server::version(cluster, report).await?;
    control_plane::check(cluster, report).await;
    webhook::check(cluster, report).await;
    workloads::check(cluster, report).await;
    Ok(())
}

/// Hands over every object of a list, page by page.
async fn each<K>(
    cluster: &Cluster,
    api: Api<K>,
    parameters: ListParams,
    mut take: impl FnMut(K),
) -> Result<()>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    let mut parameters = parameters.limit(PAGE);
    loop {
        let page = cluster.patiently(api.list(&parameters)).await?;
        page.items.into_iter().for_each(&mut take);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// All objects of a list.
async fn all<K>(cluster: &Cluster, api: Api<K>) -> Result<Vec<K>>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    let mut found = Vec::new();
    each(cluster, api, ListParams::default(), |one| found.push(one)).await?;
    Ok(found)
}

/// Some of the names, and how many more there are: what is at fault may be at fault a thousand times.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 3;
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..SHOWN].join(", ")),
    }
}
