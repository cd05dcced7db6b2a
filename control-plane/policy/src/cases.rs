//! Questions of `PolicyTest` documents, asked and compared with what is expected.

use std::fmt::Write as _;

use outrigger_core::request::Request;
use serde::Serialize;

use crate::catalog::Catalog;
use crate::explain::{Evaluator, Explanation, From, Outcome, Question, To};
use crate::kinds::{Case, Expect, TestFrom, TestRequest};
use crate::resolve::Resolved;

/// What came of a case.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaseResult {
    /// The case's name, or its question.
    pub name: String,
    /// What was not as expected, each with what was; empty: it passed.
    pub failures: Vec<String>,
    /// How it came to that; `None`: the question could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Explanation>,
}

impl CaseResult {
    /// Whether all was as expected.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Asks all of them.
pub fn run<'c>(
    cases: impl IntoIterator<Item = &'c Case>,
    resolved: &Resolved,
    catalog: &Catalog,
) -> Vec<CaseResult> {
    let evaluator = Evaluator::new(resolved, catalog);
    cases.into_iter().map(|case| one(case, &evaluator, catalog)).collect()
}

fn one(case: &Case, evaluator: &Evaluator<'_>, catalog: &Catalog) -> CaseResult {
    let name = case.name.clone().unwrap_or_else(|| name(case));
    match question(case, evaluator, catalog) {
        Err(fault) => CaseResult { name, failures: vec![fault], explanation: None },
        Ok(question) => {
            let explanation = evaluator.explain(&question);
            let failures = compare(&case.expect, &explanation.outcomes);
            CaseResult { name, failures, explanation: Some(explanation) }
        }
    }
}

fn name(case: &Case) -> String {
    let TestFrom { identity, namespace, service, address } = &case.from;
    let address = address.map(|address| address.to_string());
    let from = [identity, service, namespace, &address].into_iter().flatten().next();
    let mut name = format!("{} -> {}", from.map_or("anybody", String::as_str), case.to.service);
    if let Some(port) = case.to.port {
        // Writing to a string does not fail.
        let _ = write!(name, ":{port}");
    }
    if let Some(request) = &case.request {
        let _ = write!(name, " {} {}", request.method.as_deref().unwrap_or("GET"), request.path);
    }
    name
}

fn question(case: &Case, evaluator: &Evaluator<'_>, catalog: &Catalog) -> Result<Question, String> {
    let mut from = match (&case.from.identity, &case.from.service) {
        (Some(identity), _) => From::identity(identity, catalog),
        (None, Some(service)) => match evaluator.workloads_behind(service) {
            [] => return Err(format!("from.service: {service} has no workload in the catalog")),
            [first, ..] => From::workload(first),
        },
        (None, None) => From::nobody(),
    };
    if let Some(namespace) = &case.from.namespace {
        from.namespace.clone_from(namespace);
    }
    if let Some(address) = case.from.address {
        from.address = address;
    }
    let port = match case.to.port {
        Some(port) => port,
        None => evaluator
            .only_port(&case.to.service)
            .ok_or_else(|| format!("to.port: {} has not exactly one port; name one", case.to.service))?,
    };
    let to = To { service: case.to.service.clone(), port };
    Ok(Question { from, request: case.request.as_ref().map(|wanted| request(wanted, &to)), to })
}

fn request(wanted: &TestRequest, to: &To) -> Request {
    let mut request = Request::new(wanted.method.as_deref().unwrap_or("GET"), &wanted.path);
    request.authority = Some(wanted.authority.clone().unwrap_or_else(|| to.service.clone()).into_bytes());
    wanted.headers.iter().fold(request, |request, (name, value)| request.with(name, value.as_bytes()))
}

/// What of the expected does not hold. It must hold of all that can come of the question, or where a backend is expected, of all that
/// can come of it there.
fn compare(expect: &Expect, outcomes: &[Outcome]) -> Vec<String> {
    let mut failures = Vec::new();
    let there: Vec<&Outcome> = match &expect.backend {
        None => outcomes.iter().collect(),
        Some(backend) => {
            outcomes.iter().filter(|outcome| outcome.backend.as_ref() == Some(backend)).collect()
        }
    };
    if let Some(backend) = &expect.backend
        && there.is_empty()
    {
        let mut others: Vec<&str> =
            outcomes.iter().filter_map(|outcome| outcome.backend.as_deref()).collect();
        others.dedup();
        let others = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
        failures.push(format!("backend: expected {backend}, got {others}"));
    }
    for outcome in there {
        let mut differs = |field: &str, expected: Option<String>, got: Option<String>| {
            let Some(expected) = expected.filter(|expected| got.as_ref() != Some(expected)) else { return };
            let failure = format!("{field}: expected {expected}, got {}", got.as_deref().unwrap_or("none"));
            if !failures.contains(&failure) {
                failures.push(failure);
            }
        };
        let word = |decision: crate::kinds::Decision| format!("{decision:?}");
        differs("decision", expect.decision.map(word), Some(word(outcome.decision)));
        differs("status", expect.status.map(|s| s.to_string()), outcome.status.map(|s| s.to_string()));
        differs("policy", expect.policy.clone(), outcome.policy.clone());
        differs("rule", expect.rule.clone(), outcome.rule.clone());
        differs("route", expect.route.clone(), outcome.route.clone());
        differs("retries", expect.retries.map(|n| n.to_string()), Some(outcome.retries.to_string()));
        differs("timeout", expect.timeout.map(|t| t.to_string()), outcome.timeout.map(|t| t.to_string()));
    }
    failures
}

/// All results as one suite of `JUnit`'s XML, which CI systems show.
pub fn junit(results: &[CaseResult]) -> String {
    let failed = results.iter().filter(|result| !result.passed()).count();
    let counts = format!("tests=\"{}\" failures=\"{failed}\"", results.len());
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites {counts}>\n  <testsuite name=\"outrigger policy\" {counts}>\n"
    );
    for result in results {
        let name = escaped(&result.name);
        // Writing to a string does not fail.
        let _ = if result.passed() {
            writeln!(xml, "    <testcase classname=\"policy\" name=\"{name}\"/>")
        } else {
            let steps = result.explanation.as_ref().map(ToString::to_string).unwrap_or_default();
            writeln!(
                xml,
                "    <testcase classname=\"policy\" name=\"{name}\">\n      <failure message=\"{}\">{}</failure>\n    </testcase>",
                escaped(&result.failures.join("; ")),
                escaped(&steps)
            )
        };
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

/// For text and attributes. What XML 1.0 cannot say (2.2, `Char`) becomes U+FFFD.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(character),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
