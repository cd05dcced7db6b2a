//! What can be said of an object alone: shapes, ranges, names, expressions, networks, identities, selectors that select nothing.
//!
//! A selector that is there and empty is refused wherever a rule decides who may: `identities: []`, from which the last one was
//! removed, must not come to mean everybody.

mod access;
mod external;
mod filters;
mod mesh_defaults;
pub(crate) mod names;
mod route;
mod traffic;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::hash::Hash;

use crate::bounds::MAX_RULE_NAME;
use crate::kinds::PolicyTest;
use crate::object::{Object, Spec};
use crate::tree::{field_text, shown};
use names::{is_label, is_subdomain};

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Severity {
    Error,
    Warning,
}

/// Something that is wrong, or doubtful, in an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) severity: Severity,
    /// As in `spec.rules[0].name`.
    pub(crate) path: String,
    pub(crate) message: String,
}

/// What has been found so far.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push(Severity::Error, path.into(), message.into());
    }

    fn warn(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push(Severity::Warning, path.into(), message.into());
    }

    fn push(&mut self, severity: Severity, path: String, message: String) {
        if self.0.len() < MAX_PROBLEMS {
            self.0.push(Problem { severity, path, message });
        }
    }

    /// Adds an error where there is one.
    fn take(&mut self, path: impl Into<String>, result: Result<(), String>) {
        if let Err(message) = result {
            self.error(path, message);
        }
    }

    /// A list that has a bound.
    fn at_most<T>(&mut self, path: &str, list: &[T], max: usize) {
        if list.len() > max {
            self.error(path, format!("has {} entries: at most {max} are taken", list.len()));
        }
    }

    /// A number that has a range.
    fn range<T: PartialOrd + Display + Copy>(&mut self, path: String, value: Option<T>, min: T, max: T) {
        if let Some(value) = value
            && !(min..=max).contains(&value)
        {
            self.error(path, format!("{value} is not {min} to {max}"));
        }
    }

    /// What the entries of a list are told apart by, each there once.
    fn unique<T: Hash + Eq + Display>(&mut self, keys: impl Iterator<Item = (String, T)>) {
        let mut seen = HashSet::new();
        for (path, key) in keys {
            if seen.contains(&key) {
                self.error(path, format!("`{}` is there twice: one must go", shown(&key.to_string())));
            } else {
                seen.insert(key);
            }
        }
    }
}

/// Problems of one object that are told: an object of nothing but problems must not take memory for each.
const MAX_PROBLEMS: usize = 200;
/// Bytes of all annotations together, as Kubernetes has it.
const MAX_ANNOTATIONS: usize = 256 << 10;

/// All that is wrong with an object, whatever else there is.
pub(crate) fn object(object: &Object) -> Vec<Problem> {
    let mut out = Problems::default();
    metadata(&mut out, object);
    match &object.spec {
        Spec::MeshDefaults(spec) => mesh_defaults::check(&mut out, &object.metadata.name, spec),
        Spec::TrafficPolicy(spec) => traffic::check(&mut out, &object.metadata.namespace, spec),
        Spec::AccessPolicy(spec) => access::check(&mut out, spec),
        Spec::ExternalService(spec) => external::check(&mut out, &object.metadata.name, spec),
        Spec::HttpRoute(spec) => route::http(&mut out, spec),
        Spec::GrpcRoute(spec) => route::grpc(&mut out, spec),
    }
    out.0
}

/// All that is wrong with a test.
pub(crate) fn test(test: &PolicyTest) -> Vec<Problem> {
    let mut out = Problems::default();
    if test.cases.is_empty() {
        out.error("cases", "is empty: write at least one");
    }
    for (number, case) in test.cases.iter().enumerate() {
        let at = format!("cases[{number}]");
        if let Some(identity) = &case.from.identity
            && names::identity(identity).is_err()
            && names::service_account(identity).is_err()
        {
            let message = format!(
                "`{}` is no identity: write spiffe://<trust domain>/ns/<namespace>/sa/<service account>, or <namespace>/<service account>",
                shown(identity)
            );
            out.error(format!("{at}.from.identity"), message);
        }
        for (field, service) in
            [("from.service", case.from.service.as_ref()), ("to.service", Some(&case.to.service))]
        {
            if let Some(service) = service {
                out.take(format!("{at}.{field}"), names::full_service(service));
            }
        }
        if let Some(namespace) = &case.from.namespace {
            out.take(format!("{at}.from.namespace"), names::namespace(namespace));
        }
        if let Some(request) = &case.request {
            if !request.path.starts_with('/') {
                out.error(format!("{at}.request.path"), "does not begin with `/`");
            }
            for name in request.headers.keys() {
                let path = format!("{at}.request.headers{}", field_text(name));
                out.take(path, names::header(name));
            }
        }
        if case.expect == crate::kinds::Expect::default() {
            out.error(
                format!("{at}.expect"),
                "expects nothing: write a decision, or what else must come of it",
            );
        }
    }
    out.0
}

fn metadata(out: &mut Problems, object: &Object) {
    let metadata = &object.metadata;
    if !is_subdomain(&metadata.name) {
        out.error("metadata.name", names::not_a(&metadata.name, "name", names::SUBDOMAIN));
    }
    if !is_label(&metadata.namespace) {
        out.error("metadata.namespace", names::not_a(&metadata.namespace, "namespace", names::LABEL));
    }
    labels(out, "metadata.labels", &metadata.labels);
    let mut bytes = 0;
    for (key, value) in &metadata.annotations {
        if !names::is_qualified(key) {
            let path = format!("metadata.annotations{}", field_text(key));
            out.error(path, names::not_a(key, "annotation's name", names::QUALIFIED));
        }
        bytes += key.len() + value.len();
    }
    if bytes > MAX_ANNOTATIONS {
        out.error("metadata.annotations", format!("hold {bytes} bytes: at most {MAX_ANNOTATIONS} are taken"));
    }
}

fn labels(out: &mut Problems, at: &str, labels: &BTreeMap<String, String>) {
    for (key, value) in labels {
        let path = format!("{at}{}", field_text(key));
        if !names::is_qualified(key) {
            out.error(path.clone(), names::not_a(key, "label's name", names::QUALIFIED));
        }
        if !names::is_label_value(value) {
            out.error(path, names::not_a(value, "label's value", names::LABEL_VALUE));
        }
    }
}

/// The name of a rule or limit, which goes into logs, metrics and headers.
fn rule_name(out: &mut Problems, path: String, name: Option<&String>) {
    let Some(name) = name else { return };
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > MAX_RULE_NAME || !name.bytes().all(good) {
        let what = format!("1 to {MAX_RULE_NAME} letters, digits, `-`, `_` and `.`");
        out.error(path, names::not_a(name, "name", &what));
    }
}

#[cfg(test)]
mod tests;
