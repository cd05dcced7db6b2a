//! `outrigger context`: which controllers there are, and which one is meant.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{
    config::{Connection, Context, File, Namespace, Target},
    kubeconfig::{Cluster, Clusters},
    output::{self, Format, Row},
};

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Arguments {
    /// Without one: which controller is meant
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    namespace: Namespace,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Subcommand)]
enum Command {
    /// List the contexts, those of the kubeconfig too; never their tokens
    List {
        #[command(flatten)]
        file: File,
        /// How to print
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Make a context the current one
    Use {
        #[command(flatten)]
        file: File,
        /// The context; one of the kubeconfig will do
        name: String,
    },
    /// Add a context or change what is given of it; the first one becomes the current one
    Set(Set),
}

#[derive(Args)]
struct Set {
    #[command(flatten)]
    file: File,
    /// The context
    name: String,
    /// Address of the controller's API
    #[arg(long, value_name = "HOST:PORT")]
    server: Option<String>,
    /// File that holds the API's token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Namespace of what names none itself
    #[arg(short, long)]
    namespace: Option<String>,
}

#[derive(Serialize)]
struct Listed {
    /// None: no context leads there.
    name: Option<String>,
    current: bool,
    /// `address` or `cluster`.
    by: &'static str,
    server: Option<String>,
    namespace: Option<String>,
    token: String,
}

impl Listed {
    fn of_cluster(cluster: &Cluster, name: Option<&str>, current: bool) -> Self {
        Self {
            name: name.map(str::to_owned),
            current,
            by: "cluster",
            server: cluster.server().map(str::to_owned),
            namespace: cluster.namespace(),
            token: format!("of {cluster}"),
        }
    }
}

impl Row for Listed {
    const COLUMNS: &[&str] = &["NAME", "CURRENT", "BY", "SERVER", "NAMESPACE"];
    const WIDE: &[&str] = &["TOKEN"];

    fn name(&self) -> String {
        self.name.clone().unwrap_or_default()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone().unwrap_or_else(|| "-".to_owned()),
            if self.current { "*".to_owned() } else { String::new() },
            self.by.to_owned(),
            self.server.clone().unwrap_or_default(),
            self.namespace.clone().unwrap_or_default(),
        ]
    }

    fn wide(&self) -> Vec<String> {
        vec![self.token.clone()]
    }
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        None => {
            let used = used(&arguments.connection, &arguments.namespace)?;
            output::print(arguments.output, &[used])
        }
        Some(Command::List { file, output }) => output::print(output, &list(&file)?),
        Some(Command::Use { file, name }) => {
            let (path, mut config) = file.load_or_new()?;
            let is_ours = config.contexts.iter().any(|context| context.name == name);
            if !is_ours && Clusters::read(None)?.and_then(|clusters| clusters.context(&name)).is_none() {
                bail!(
                    "{} has no context `{name}`, and no kubeconfig either; `outrigger context set {name} --server HOST:PORT` adds \
                     it",
                    path.display()
                );
            }
            config.current_context = Some(name);
            config.save(&path)
        }
        Some(Command::Set(set)) => set.run(),
    }
}

/// Where a command with these options goes.
fn used(connection: &Connection, namespace: &Namespace) -> Result<Listed> {
    let namespace = Some(connection.namespace(namespace)?);
    Ok(match connection.target()? {
        Target::Cluster(cluster) => {
            let name = cluster.name().map(str::to_owned);
            Listed { namespace, ..Listed::of_cluster(&cluster, name.as_deref(), true) }
        }
        Target::Address(context) => Listed {
            current: true,
            by: "address",
            server: Some(connection.address(context.as_ref())),
            namespace,
            token: connection.token_source(context.as_ref()),
            name: context.map(|context| context.name),
        },
    })
}

/// Our contexts, then those of the kubeconfig whose names are not taken.
fn list(file: &File) -> Result<Vec<Listed>> {
    let (_, config) = file.load()?;
    let current = config.current_context.as_deref();
    let clusters = Clusters::read(None)?;
    let ours: Vec<&str> = config.contexts.iter().map(|context| context.name.as_str()).collect();
    let of_cluster = clusters.iter().flat_map(|clusters| {
        let current = current.or(clusters.current());
        let free = clusters.names().filter(|name| !ours.contains(name));
        free.filter_map(move |name| {
            let cluster = clusters.context(name)?;
            Some(Listed::of_cluster(&cluster, Some(name), current == Some(name)))
        })
    });
    let of_cluster: Vec<Listed> = of_cluster.collect();
    let at_address = config.contexts.iter().map(|context| Listed {
        name: Some(context.name.clone()),
        current: current == Some(context.name.as_str()),
        by: "address",
        server: context.server.clone(),
        namespace: context.namespace.clone(),
        token: context.token_source(),
    });
    Ok(at_address.chain(of_cluster).collect())
}

impl Set {
    fn run(self) -> Result<()> {
        let (path, mut config) = self.file.load_or_new()?;
        let at = config.contexts.iter().position(|context| context.name == self.name);
        let at = at.unwrap_or_else(|| {
            config.contexts.push(Context::new(&self.name));
            config.contexts.len() - 1
        });
        let context = &mut config.contexts[at];
        if let Some(server) = self.server {
            context.server = Some(server);
        }
        if let Some(file) = self.token_file {
            context.set_token_file(std::path::absolute(file)?);
        }
        if let Some(namespace) = self.namespace {
            context.namespace = Some(namespace);
        }
        if config.current_context.is_none() {
            config.current_context = Some(self.name);
        }
        config.save(&path)
    }
}
