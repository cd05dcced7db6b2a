//! `outrigger schema`: what the kinds look like, for editors, for Kubernetes and for whoever asks what there is.

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use outrigger_policy::{Kind, schema};
use serde::Serialize;

use crate::output::{self, Format, Row};

/// The kind of files with tests, which is no kind of object.
const POLICY_TEST: &str = "PolicyTest";

#[derive(Args)]
pub(crate) struct Arguments {
    /// The kind: its name, plural or short name, or `PolicyTest`; all kinds are listed where it is left out
    kind: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Form,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Form {
    /// JSON Schema
    #[default]
    Json,
    /// The same in YAML
    Yaml,
    /// The `CustomResourceDefinition`
    Crd,
}

/// A kind, as it is listed.
#[derive(Serialize)]
struct Listed {
    kind: Kind,
    plural: &'static str,
    short: &'static str,
    version: &'static str,
}

impl Row for Listed {
    const COLUMNS: &[&str] = &["KIND", "PLURAL", "SHORT", "API VERSION"];

    fn name(&self) -> String {
        self.kind.to_string()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.kind.to_string(), self.plural.to_owned(), self.short.to_owned(), self.version.to_owned()]
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Some(name) = &arguments.kind else { return list() };
    let kind = if name.eq_ignore_ascii_case(POLICY_TEST) { None } else { Some(name.parse::<Kind>()?) };
    let schema = kind.map_or_else(schema::policy_test, schema::json);
    let format = match arguments.output {
        Form::Json => Format::Json,
        Form::Yaml => Format::Yaml,
        Form::Crd => {
            let Some(kind) = kind else { bail!("a PolicyTest lives in files only: it has no CRD") };
            let crd = schema::crd(kind);
            let crd = crd.with_context(|| format!("{kind} is the Gateway API's: install its own CRDs"))?;
            return output::write(&crd);
        }
    };
    output::write(&output::document(format, &schema)?)
}

fn list() -> Result<()> {
    let listed = |kind: Kind| Listed {
        kind,
        plural: kind.plural(),
        short: kind.short_name(),
        version: kind.api_version(),
    };
    output::print(Format::Table, &Kind::ALL.map(listed))
}
