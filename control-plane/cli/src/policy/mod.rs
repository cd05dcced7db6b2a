//! `outrigger policy`: what people write about the mesh.
//!
//! Questions (`diff`, `test`, `explain`, `validate --live`) are answered here, from what the controller holds, by the code
//! that the controller and the proxies run: the controller serves no computation that anybody could ask of it in bulk.

pub(crate) mod api;
mod diff;
mod explain;
mod files;
mod get;
mod history;
mod names;
mod overlay;
mod prune;
mod stand_in;
mod test;
mod validate;
mod write;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::{
    Answer,
    client::Server,
    config::{Connection, Namespace},
};

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write objects: all of them or, if one has a fault, none
    Apply(write::Apply),
    /// List objects, what became of them and on how many proxies they are
    Get(get::Get),
    /// Show all about an object: its conditions, and which proxies refuse it and why
    Describe(get::Describe),
    /// Delete objects
    Delete(write::Delete),
    /// Show what applying files would change, in the text and in effect; exit code 1: there are differences, 2: it failed
    Diff(diff::Arguments),
    /// Ask policies the questions of a `PolicyTest`, with no controller needed; exit code 1: a case failed, 2: it could not be run
    Test(test::Arguments),
    /// Show what becomes of a request, decision by decision, with the policy and rule that made each
    Explain(explain::Arguments),
    /// Check files, with no controller needed
    Validate(validate::Arguments),
    /// List the last revisions of an object
    History(history::Arguments),
    /// Write an earlier revision of an object again
    Rollback(write::Rollback),
}

/// Which controller, and the namespace of what names none.
#[derive(Args)]
struct Scope {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    namespace: Namespace,
}

impl Scope {
    fn server(&self) -> Result<Server> {
        self.connection.server()
    }

    fn namespace(&self) -> Result<String> {
        self.connection.namespace(&self.namespace)
    }
}

impl Arguments {
    /// Whether the answer is in the exit code, so that a failure needs another one.
    pub(crate) fn is_question(&self) -> bool {
        matches!(self.command, Command::Diff(_) | Command::Test(_))
    }
}

/// Runs the command.
pub(crate) async fn run(arguments: Arguments) -> Result<Answer> {
    match arguments.command {
        Command::Diff(diff) => return diff.run().await,
        Command::Test(test) => return test.run().await,
        Command::Explain(explain) => explain.run().await,
        Command::Apply(apply) => apply.run().await,
        Command::Get(get) => get.run().await,
        Command::Describe(describe) => describe.run().await,
        Command::Delete(delete) => delete.run().await,
        Command::Validate(validate) => validate.run().await,
        Command::History(history) => history.run().await,
        Command::Rollback(rollback) => rollback.run().await,
    }?;
    Ok(Answer::Yes)
}
