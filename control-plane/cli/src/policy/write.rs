//! `outrigger policy apply`, `delete` and `rollback`: what changes the mesh.
//!
//! The controller takes all of one `apply` or nothing. A file that says from which revision it was made
//! (`metadata.resourceVersion`) is taken only while that revision holds.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{ArgGroup, Args};
use outrigger_policy::{Key, Kind, Parsed};
use serde::{Serialize, Serializer};

use super::{
    Scope,
    api::{self, Applied, Apply as Request, Written},
    files::{self, Files},
    names,
    prune::Prune,
};
use crate::output::{self, Format};

/// How what was written is printed.
#[derive(Args)]
struct Output {
    /// How to print: a line for each object, or for programs
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Have the controller check it, and write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
#[command(group = ArgGroup::new("pruned").args(["namespace", "all_namespaces"]).multiple(true))]
pub(super) struct Apply {
    #[command(flatten)]
    scope: Scope,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    prune: Prune,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
pub(super) struct Delete {
    #[command(flatten)]
    scope: Scope,
    /// KIND NAME..., KIND/NAME or KIND/NAMESPACE/NAME
    #[arg(value_name = "KIND NAME", required_unless_present = "files", conflicts_with = "files")]
    words: Vec<String>,
    /// Delete the objects that are in these files
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", id = "files")]
    files: Vec<PathBuf>,
    /// Only while this revision holds
    #[arg(long, value_name = "REVISION", conflicts_with = "files")]
    revision: Option<u64>,
    /// An object that is not there is no failure
    #[arg(long)]
    ignore_not_found: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
pub(super) struct Rollback {
    #[command(flatten)]
    scope: Scope,
    /// KIND NAME, KIND/NAME or KIND/NAMESPACE/NAME
    #[arg(value_name = "KIND NAME", required = true)]
    words: Vec<String>,
    /// What to go back to, as `outrigger policy history` lists them [default: the one before the last]
    #[arg(long, value_name = "REVISION")]
    to_revision: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// What became of one object.
#[derive(Serialize)]
struct Done {
    #[serde(serialize_with = "as_text")]
    key: Key,
    action: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

fn as_text<S: Serializer>(key: &Key, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(key)
}

impl From<Written> for Done {
    fn from(Written { key, action, revision, warnings }: Written) -> Self {
        Self { key, action, revision: Some(revision), warnings }
    }
}

impl Output {
    /// Warnings have their places in the files that the objects came from.
    fn print(&self, done: &[Done], files: &[Parsed]) -> Result<()> {
        for (done, warning) in done.iter().flat_map(|done| done.warnings.iter().map(move |text| (done, text)))
        {
            eprintln!(
                "warning: {}",
                output::plain(&files::locate_warning(&done.key, warning, files).to_string())
            );
        }
        let dry = if self.dry_run { " (dry run)" } else { "" };
        let line = |done: &Done| match self.output {
            Format::Name => names::name(&done.key) + "\n",
            Format::Wide => match done.revision {
                Some(revision) => format!("{} {}{dry}, revision {revision}\n", done.key, done.action),
                None => format!("{} {}{dry}\n", done.key, done.action),
            },
            _ => format!("{} {}{dry}\n", done.key, done.action),
        };
        match self.output {
            Format::Json | Format::Yaml => output::write(&output::document(self.output, &done)?),
            _ => output::write(&done.iter().map(line).collect::<String>()),
        }
    }

    fn print_applied(&self, applied: Applied, files: &[Parsed]) -> Result<()> {
        self.print(&applied.results.into_iter().map(Done::from).collect::<Vec<_>>(), files)
    }
}

impl Apply {
    pub(super) async fn run(self) -> Result<()> {
        // The controller warns of all that there is to warn of.
        let parsed = files::objects(&self.files.files, &self.scope.namespace()?)?;
        let objects: Vec<_> = parsed.iter().map(|parsed| &parsed.object).collect();
        let pruned = self.prune.deletions(&self.scope, &objects).await?;
        let deletions = pruned.keys().cloned().collect();
        let expect = objects
            .iter()
            .filter_map(|object| Some((object.key().to_string(), files::revision(object)?)))
            .chain(pruned)
            .collect();
        let request = Request { objects, deletions, dry_run: self.output.dry_run, expect };
        let applied = api::apply(&self.scope.server()?, &request).await;
        self.output.print_applied(applied.map_err(|error| files::locate(error, &parsed))?, &parsed)
    }
}

impl Delete {
    pub(super) async fn run(self) -> Result<()> {
        let (server, namespace) = (self.scope.server()?, self.scope.namespace()?);
        let mut keys = if self.files.is_empty() {
            names::keys(&self.words, &namespace)?
        } else {
            files::objects(&self.files, &namespace)?.iter().map(|parsed| parsed.object.key()).collect()
        };
        if self.revision.is_some() && keys.len() > 1 {
            bail!("--revision is about one object");
        }
        // What refers to others goes before them: nobody need be warned of what goes in the same breath.
        keys.sort_by_key(|key| match key.kind {
            Kind::TrafficPolicy => 0,
            Kind::AccessPolicy | Kind::HttpRoute | Kind::GrpcRoute => 1,
            Kind::ExternalService | Kind::MeshDefaults => 2,
        });
        for key in keys {
            match api::delete(&server, &key, self.revision, self.output.dry_run).await {
                // Each by itself, so that what was deleted is told even if the next one fails.
                Ok(warnings) => {
                    let done = Done { key, action: "deleted".to_owned(), revision: None, warnings };
                    self.output.print(&[done], &[])?;
                }
                Err(error) if self.ignore_not_found && api::is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Rollback {
    pub(super) async fn run(self) -> Result<()> {
        let (server, namespace) = (self.scope.server()?, self.scope.namespace()?);
        let key = names::key(&self.words, &namespace)?;
        let revision = if let Some(revision) = self.to_revision {
            revision
        } else {
            let history = api::history(&server, &key).await?;
            // The first is what holds now; one without an object is a deletion.
            match history.iter().skip(1).find(|past| past.object.is_some()) {
                Some(past) => past.revision,
                None => bail!("{key} has no earlier revision to go back to"),
            }
        };
        self.output.print_applied(api::rollback(&server, &key, revision, self.output.dry_run).await?, &[])
    }
}
