//! `outrigger context`: which controllers there are, and which one is meant.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{
    config::{Context, File},
    output::{self, Format, Row},
};

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the contexts; never their tokens
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
        /// The context
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
    name: String,
    current: bool,
    server: Option<String>,
    namespace: Option<String>,
    token: String,
}

impl Row for Listed {
    const COLUMNS: &[&str] = &["NAME", "CURRENT", "SERVER", "NAMESPACE"];
    const WIDE: &[&str] = &["TOKEN"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            if self.current { "*".to_owned() } else { String::new() },
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
        Command::List { file, output } => {
            let (_, config) = file.load()?;
            let listed = config.contexts.into_iter().map(|context| Listed {
                current: config.current_context.as_ref() == Some(&context.name),
                token: context.token_source(),
                name: context.name,
                server: context.server,
                namespace: context.namespace,
            });
            output::print(output, &listed.collect::<Vec<_>>())
        }
        Command::Use { file, name } => {
            let (path, mut config) = file.load()?;
            if !config.contexts.iter().any(|context| context.name == name) {
                bail!(
                    "{} has no context `{name}`; `outrigger context set {name} --server HOST:PORT` adds it",
                    path.display()
                );
            }
            config.current_context = Some(name);
            config.save(&path)
        }
        Command::Set(set) => set.run(),
    }
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
