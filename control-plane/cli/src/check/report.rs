//! What was found, and how it is told.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use crate::{
    Answer,
    output::{self, Colour, Format, Paint, Row, plain},
};

/// What a check came to, from the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    /// As it should be.
    Ok,
    /// Nothing is wrong, but somebody should know.
    Note,
    /// It works, and will or may not do so for long.
    Warning,
    /// It could not be looked at.
    Unknown,
    /// It does not work.
    Failed,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) category: &'static str,
    pub(super) check: &'static str,
    pub(super) result: Outcome,
    /// What was seen.
    pub(super) seen: String,
    /// What to do about it; empty where nothing is to be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) advice: String,
}

impl Row for Finding {
    const COLUMNS: &[&str] = &["CATEGORY", "CHECK", "RESULT", "SEEN"];

    fn name(&self) -> String {
        format!("{}/{}", self.category, self.check)
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.category.to_owned(),
            self.check.to_owned(),
            self.result.word().to_owned(),
            self.seen.clone(),
        ]
    }

    fn is_alarming(&self) -> bool {
        self.result == Outcome::Failed
    }
}

/// All findings, in the order in which they were made.
#[derive(Debug, Default)]
pub(super) struct Report(pub(super) Vec<Finding>);

impl Report {
    pub(super) fn ok(&mut self, category: &'static str, check: &'static str, seen: impl Into<String>) {
        self.add(category, check, Outcome::Ok, seen, "");
    }

    pub(super) fn note(&mut self, category: &'static str, check: &'static str, seen: impl Into<String>) {
        self.add(category, check, Outcome::Note, seen, "");
    }

    /// What could not be looked at, and why.
    pub(super) fn unknown(&mut self, category: &'static str, check: &'static str, error: &anyhow::Error) {
        let advice = "make this answer possible, or ask somebody who may see it to run the check";
        self.add(category, check, Outcome::Unknown, format!("{error:#}"), advice);
    }

    pub(super) fn add(
        &mut self,
        category: &'static str,
        check: &'static str,
        result: Outcome,
        seen: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.0.push(Finding { category, check, result, seen: seen.into(), advice: advice.into() });
    }

    /// Prints it. The answer is no where something failed; a question without an answer is an error.
    pub(super) fn print(&self, format: Format) -> Result<Answer> {
        output::write(&self.render(format, Paint::stdout())?)?;
        match self.worst() {
            Outcome::Failed => Ok(Answer::No),
            Outcome::Unknown => anyhow::bail!("some checks could not be made"),
            Outcome::Ok | Outcome::Note | Outcome::Warning => Ok(Answer::Yes),
        }
    }

    fn worst(&self) -> Outcome {
        self.0.iter().map(|finding| finding.result).max().unwrap_or(Outcome::Ok)
    }

    pub(super) fn render(&self, format: Format, paint: Paint) -> Result<String> {
        let mut text = output::render(format, &self.0, paint)?;
        if !matches!(format, Format::Table | Format::Wide) {
            return Ok(text);
        }
        // Writing to a string does not fail.
        let advised: Vec<&Finding> = self.0.iter().filter(|finding| !finding.advice.is_empty()).collect();
        if !advised.is_empty() {
            let _ = writeln!(text, "\nWhat to do:");
        }
        for finding in advised {
            let _ = writeln!(text, "- {}, {}: {}", finding.category, finding.check, plain(&finding.advice));
        }
        let all = [Outcome::Ok, Outcome::Note, Outcome::Warning, Outcome::Unknown, Outcome::Failed];
        let counts = all.into_iter().filter_map(|outcome| {
            let count = self.0.iter().filter(|finding| finding.result == outcome).count();
            (count > 0).then(|| format!("{count} {}", outcome.word()))
        });
        let line = format!("{} checks: {}", self.0.len(), counts.collect::<Vec<_>>().join(", "));
        let colour = if self.worst() >= Outcome::Unknown { Colour::Red } else { Colour::Green };
        let _ = writeln!(text, "\n{}", paint.paint(colour, &line));
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.ok("Kubernetes API", "version", "v1.34.4");
        report.note("Other meshes", "webhooks", "1 other webhook changes pods");
        report.add(
            "Nodes",
            "kernel",
            Outcome::Failed,
            "n1 has Linux 4.19\u{1b}[2J",
            "use Linux 5.2 or newer",
        );
        report.unknown("Nodes", "clock", &anyhow::anyhow!("leases is forbidden"));
        report
    }

    #[test]
    fn a_report_says_what_was_seen_and_what_to_do() {
        insta::assert_snapshot!(report().render(Format::Table, Paint::NONE).unwrap());
        let json: serde_json::Value =
            serde_json::from_str(&report().render(Format::Json, Paint::NONE).unwrap()).unwrap();
        assert_eq!(json[2]["result"], "failed");
        assert!(json[0].get("advice").is_none());
    }

    #[test]
    fn what_could_not_be_looked_at_is_no_yes() {
        let print = |report: &Report| report.print(Format::Name);
        assert_eq!(print(&report()).unwrap(), Answer::No, "a failure is an answer");
        let mut report = report();
        report.0.retain(|finding| finding.result != Outcome::Failed);
        assert!(print(&report).is_err());
        report.0.retain(|finding| finding.result != Outcome::Unknown);
        assert_eq!(print(&report).unwrap(), Answer::Yes);
    }
}
