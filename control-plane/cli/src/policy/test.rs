//! `outrigger policy test`: questions to policies, with the answers that are expected, before anybody applies them.

use std::{fmt::Write as _, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use outrigger_policy::{
    Catalog, Documents, Object, Policies,
    cases::{self, CaseResult},
    kinds::Case,
    resolve,
};
use serde::Serialize;

use super::{
    Scope, api,
    files::{self, Faults, Files},
    overlay::overlay,
    stand_in,
};
use crate::{
    Answer,
    output::{self, Colour, Format, Paint, plain},
};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    scope: Scope,
    #[command(flatten)]
    cases: Files,
    /// The policies that are asked, beside those in the files of cases; may be repeated
    #[arg(short, long, value_name = "FILE|DIR|-")]
    policies: Vec<PathBuf>,
    /// Ask what the controller holds, with the policies of the files over it
    #[arg(long)]
    live: bool,
    /// The services that there are, as `GET /api/v1/catalog` answers [default: the controller's with --live, else whatever the
    /// policies and cases name, with one workload each]
    #[arg(long, value_name = "FILE")]
    catalog: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Form,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Form {
    /// A line for each case, and how one that failed came to its answer
    #[default]
    Table,
    /// XML that CI systems show
    Junit,
    /// Everything, each decision of each case among it
    Json,
    /// The same in YAML
    Yaml,
}

#[derive(Serialize)]
struct Report<'a> {
    passed: usize,
    failed: usize,
    cases: &'a [CaseResult],
}

impl Arguments {
    pub(super) async fn run(self) -> Result<Answer> {
        let namespace = self.scope.namespace()?;
        let Documents { objects: beside, tests } = files::documents(&self.cases.files, &namespace)?;
        let mut parsed = beside;
        if !self.policies.is_empty() {
            parsed.extend(files::objects(&self.policies, &namespace)?);
        }
        let twice = files::twice(&parsed);
        if !twice.is_empty() {
            return Err(Faults(twice).into());
        }
        files::warn(&parsed);
        let cases: Vec<&Case> = tests.iter().flat_map(|test| &test.test.cases).collect();
        if cases.is_empty() {
            bail!("the files hold no case: name a file with `kind: PolicyTest`");
        }
        let objects: Vec<&Object> = parsed.iter().map(|parsed| &parsed.object).collect();
        let (policies, catalog) = self.world(&objects, &cases).await?;
        let resolved = resolve(&overlay(&policies, objects), &catalog);
        let results = cases::run(cases, &resolved, &catalog);
        let failed = results.iter().filter(|result| !result.passed()).count();
        let report = Report { passed: results.len() - failed, failed, cases: &results };
        output::write(&match self.output {
            Form::Table => table(&report, Paint::stdout()),
            Form::Junit => cases::junit(&results),
            Form::Json => output::document(Format::Json, &report)?,
            Form::Yaml => output::document(Format::Yaml, &report)?,
        })?;
        Ok(if failed == 0 { Answer::Yes } else { Answer::No })
    }

    /// What is in force, and what there is.
    async fn world(&self, objects: &[&Object], cases: &[&Case]) -> Result<(Policies, Catalog)> {
        let mut world = if self.live {
            api::everything(&self.scope.server()?).await?
        } else {
            let stand_in = stand_in::catalog(objects.iter().copied(), cases.iter().copied());
            (Policies::new(), stand_in)
        };
        if let Some(file) = &self.catalog {
            let tried = || format!("reading the catalog {}", file.display());
            let text = std::fs::read(file).with_context(tried)?;
            world.1 = serde_json::from_slice(&text).with_context(tried)?;
        }
        Ok(world)
    }
}

fn table(report: &Report<'_>, paint: Paint) -> String {
    let mut text = String::new();
    for case in report.cases {
        // Writing to a string does not fail.
        let _ = if case.passed() {
            writeln!(text, "{}  {}", paint.paint(Colour::Green, "PASS"), plain(&case.name))
        } else {
            writeln!(text, "{}  {}", paint.paint(Colour::Red, "FAIL"), plain(&case.name))
        };
        for failure in &case.failures {
            let _ = writeln!(text, "      {}", plain(failure));
        }
        if let Some(explanation) = case.explanation.as_ref().filter(|_| !case.passed()) {
            for line in explanation.to_string().lines() {
                let _ = writeln!(text, "        {}", plain(line));
            }
        }
    }
    let _ = writeln!(text, "{} passed, {} failed", report.passed, report.failed);
    text
}
