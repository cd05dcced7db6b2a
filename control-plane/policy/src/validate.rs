//! Objects against all that is in force and all that is there.
//!
//! An error is what can never come to work; what may come to work with the next service or object, or works in a way that nobody
//! wants, is a warning: a policy may be written before what it is about.

use std::collections::BTreeMap;

use crate::catalog::{Catalog, CatalogProtocol, CatalogService};
use crate::check::{self, Severity};
use crate::fault::{Finding, Findings};
use crate::kind::{Key, Kind};
use crate::object::{Object, Policies};

mod deletions;
mod references;

/// Looks at new objects as if they were in force together with the policies, whose objects of the same keys they replace,
/// and at what those lose that stay when `deleted` go.
pub fn validate(new: &[Object], deleted: &[Key], policies: &Policies, catalog: &Catalog) -> Findings {
    let kept: BTreeMap<Key, &Object> =
        policies.iter().map(|(key, stored)| (key.clone(), &stored.object)).collect();
    let mut objects = kept.clone();
    objects.retain(|key, _| !deleted.contains(key));
    let mut findings = Findings::default();
    let mut given = BTreeMap::new();
    for object in new {
        if given.insert(object.key(), object).is_some() {
            let message = "is given twice: one must go".to_owned();
            findings.errors.push(Finding { key: object.key(), path: String::new(), message });
        }
    }
    objects.extend(given.iter().map(|(key, object)| (key.clone(), *object)));
    let world = World { objects, policies, catalog };
    for (key, object) in given {
        let mut report = Report { key, findings: &mut findings };
        let problems = check::object(object);
        let sound = problems.iter().all(|problem| problem.severity != Severity::Error);
        for problem in problems {
            report.push(problem.severity, problem.path, problem.message);
        }
        if sound {
            references::check(&world, object, &mut report);
        }
    }
    let before = World { objects: kept, policies, catalog };
    for key in deleted {
        deletions::check(&before, &world, key, &mut Report { key: key.clone(), findings: &mut findings });
    }
    findings
}

/// All that an object may be about.
struct World<'a> {
    objects: BTreeMap<Key, &'a Object>,
    policies: &'a Policies,
    catalog: &'a Catalog,
}

/// A service, of the catalog or external: its ports with what is spoken there.
struct Known {
    external: bool,
    /// Port, name, protocol.
    ports: Vec<(u16, String, CatalogProtocol)>,
}

impl World<'_> {
    fn service(&self, namespace: &str, name: &str) -> Option<Known> {
        use crate::kinds::ExternalProtocol;
        use crate::object::Spec;
        let key = Key::new(Kind::ExternalService, namespace, name);
        if let Some(Spec::ExternalService(spec)) = self.objects.get(&key).map(|object| &object.spec) {
            let ports = spec.ports.iter().map(|port| {
                let protocol = match port.protocol {
                    ExternalProtocol::Http => CatalogProtocol::Http1,
                    ExternalProtocol::Http2 => CatalogProtocol::Http2,
                    ExternalProtocol::Grpc => CatalogProtocol::Grpc,
                    ExternalProtocol::Tcp => CatalogProtocol::Tcp,
                };
                (port.port, port.name.clone().unwrap_or_default(), protocol)
            });
            return Some(Known { external: true, ports: ports.collect() });
        }
        let service: &CatalogService = self.catalog.service_of(namespace, name)?;
        let ports = service.ports.iter().map(|port| (port.port, port.name.clone(), port.protocol));
        Some(Known { external: false, ports: ports.collect() })
    }
}

/// What is found of one object.
struct Report<'a> {
    key: Key,
    findings: &'a mut Findings,
}

impl Report<'_> {
    fn push(&mut self, severity: Severity, path: String, message: String) {
        let finding = Finding { key: self.key.clone(), path, message };
        match severity {
            Severity::Error => self.findings.errors.push(finding),
            Severity::Warning => self.findings.warnings.push(finding),
        }
    }

    fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push(Severity::Error, path.into(), message.into());
    }

    fn warn(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push(Severity::Warning, path.into(), message.into());
    }
}

#[cfg(test)]
mod tests;
