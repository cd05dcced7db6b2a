//! An answer, for programs and for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::kinds::Decision;
use crate::value::Span;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// In the order of a request's way.
    pub steps: Vec<Step>,
    /// What comes of it. Where several things can, the worst of them.
    pub outcome: Outcome,
    /// All that can come of it: one entry, or one for each backend and each way in which its workloads answer.
    pub outcomes: Vec<Outcome>,
}

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was decided on.
    pub what: String,
    /// How.
    pub decision: String,
    /// Who said so; `None`: nobody did, it is how the mesh is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Origin>,
}

/// An object, and its part, that says something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// `<Kind> <namespace>/<name>`.
    pub object: String,
    /// Its rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

/// What comes of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// In one word.
    pub decision: Decision,
    /// What the mesh itself answers; `None`: the workload answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why the mesh answers itself: a code of `outrigger-reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The `AccessPolicy` that decides, `<namespace>/<name>`, or `default`; `None`: it does not come to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The rule of it that decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The route that is taken, `<namespace>/<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The service that takes it, `<name>.<namespace>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Tries beside the first one.
    pub retries: u32,
    /// Who said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries_by: Option<String>,
    /// How long the whole may take; `None`: the proxy's configuration, or without end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Who said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_by: Option<String>,
}

impl Origin {
    pub(super) fn of(object: &str) -> Option<Self> {
        (!object.is_empty()).then(|| Self { object: object.to_owned(), rule: None })
    }

    pub(super) fn access(policy: &str, rule: Option<&str>) -> Self {
        Self { object: format!("AccessPolicy {policy}"), rule: rule.map(str::to_owned) }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)?;
        self.rule.as_ref().map_or(Ok(()), |rule| write!(f, ", {rule}"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.decision)?;
        if let Some(status) = self.status {
            write!(f, " {status}")?;
        }
        if let Some(reason) = &self.reason {
            write!(f, " ({reason})")?;
        }
        if let Some(backend) = &self.backend {
            write!(f, " at {backend}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Step { what, decision, by } in &self.steps {
            write!(f, "{what:>9}  {decision}")?;
            match by {
                Some(by) => writeln!(f, "  [{by}]")?,
                None => writeln!(f)?,
            }
        }
        for outcome in &self.outcomes {
            writeln!(f, "{:>9}  {outcome}", "=>")?;
        }
        Ok(())
    }
}
