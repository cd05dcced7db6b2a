//! The mesh, as its controllers see it: the same for a cluster and for hosts.
//!
//! A sidecar is connected to one controller, so each is asked.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use serde::Deserialize;

use super::{
    report::{Outcome, Report},
    some,
};
use crate::{
    client::{Refusal, Server},
    cluster::Refused,
    policy::api::{self, Item},
    proxies::{self, Proxy},
};

const CONTROLLER: &str = "Controller";
const SOURCES: &str = "Sources";
const PROXIES: &str = "Proxies";
const POLICIES: &str = "Policies";
/// A CA that ends sooner needs its successor now: a root leaves only when nothing stands on it any more.
const CA_LEFT: i64 = 30 * 86_400;
/// Our own version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Deserialize)]
struct Controller {
    version: String,
    trust_domain: String,
    /// Unix seconds.
    issuer_expires: i64,
    leaf_expires: i64,
}

#[derive(Deserialize)]
struct Sources {
    #[serde(rename = "sources")]
    all: Vec<Source>,
    #[serde(default)]
    policies: Option<Source>,
    #[serde(default)]
    store: Option<Store>,
}

#[derive(Deserialize)]
struct Source {
    #[serde(default)]
    name: String,
    state: String,
    reason: Option<String>,
    faults: Vec<Fault>,
}

#[derive(Deserialize)]
struct Fault {
    subject: String,
    reason: String,
}

#[derive(Deserialize)]
struct Store {
    writable: bool,
    reason: Option<String>,
}

/// What one controller says.
struct Said {
    controller: Controller,
    sources: Sources,
    proxies: Vec<Proxy>,
}

async fn ask(server: &Server) -> Result<Said> {
    Ok(Said {
        controller: server.get("/api/v1/controller").await?,
        sources: server.get("/api/v1/sources").await?,
        proxies: proxies::of(server).await?,
    })
}

pub(super) async fn check(server: &Server, report: &mut Report) {
    let servers = match server.replicas().await {
        Ok(servers) => servers,
        Err(error) => return unreachable(&error, report),
    };
    let mut proxies = Vec::new();
    for (at, one) in servers.iter().enumerate() {
        match ask(one).await {
            Ok(said) => {
                judge_controller(&said.controller, now(), report);
                // All replicas have the same sources and their own disks.
                judge_store(said.sources.store.as_ref(), report);
                if at == 0 {
                    judge_sources(&said.sources, report);
                }
                proxies.extend(said.proxies);
            }
            Err(error) => unreachable(&error, report),
        }
    }
    if !servers.is_empty() && report.0.iter().any(|finding| finding.category == SOURCES) {
        judge_proxies(&proxies, report);
    }
    match api::list(server, None, None).await {
        Ok(items) => judge_policies(&items, report),
        Err(error) => report.unknown(POLICIES, "accepted", &error),
    }
}

/// A controller that may not be asked is unknown; one that does not answer has failed.
fn unreachable(error: &anyhow::Error, report: &mut Report) {
    let of_controller = error.downcast_ref::<Refusal>().map(|refusal| refusal.status.as_u16());
    let of_cluster = error.downcast_ref::<Refused>().map(|refused| refused.code);
    if of_controller.or(of_cluster) == Some(403) {
        return report.unknown(CONTROLLER, "reachable", error);
    }
    let advice = "see that it runs, and that `outrigger context` shows the one that is meant";
    report.add(CONTROLLER, "reachable", Outcome::Failed, format!("{error:#}"), advice);
}

fn judge_controller(controller: &Controller, now: i64, report: &mut Report) {
    let Controller { version, trust_domain, issuer_expires, leaf_expires } = controller;
    if version == VERSION {
        report.ok(CONTROLLER, "version", format!("{version}, trust domain {trust_domain}"));
    } else {
        let advice = "use the command of the controller's version: what it works out itself may differ";
        let seen = format!("the controller is {version}, this command {VERSION}");
        report.add(CONTROLLER, "version", Outcome::Warning, seen, advice);
    }
    let left = issuer_expires - now;
    if left > CA_LEFT {
        report.ok(CONTROLLER, "CA", ends(*issuer_expires, now));
    } else {
        let result = if left > 0 { Outcome::Warning } else { Outcome::Failed };
        report.add(CONTROLLER, "CA", result, ends(*issuer_expires, now), "rotate the CA");
    }
    if *leaf_expires <= now {
        let advice = "no sidecar can connect: the controller's log says why it cannot renew";
        report.add(CONTROLLER, "certificate", Outcome::Failed, ends(*leaf_expires, now), advice);
    }
}

fn judge_store(store: Option<&Store>, report: &mut Report) {
    match store {
        None => {}
        Some(Store { writable: true, .. }) => report.ok(CONTROLLER, "store", "takes writes"),
        Some(Store { reason, .. }) => report.add(
            CONTROLLER,
            "store",
            Outcome::Failed,
            format!("its disk takes no writes: {}", reason.as_deref().unwrap_or("no reason was given")),
            "make room on the disk of data_dir, or repair it",
        ),
    }
}

fn judge_sources(sources: &Sources, report: &mut Report) {
    let named = sources.all.iter().map(|source| (source.name.as_str(), source));
    let policies = sources.policies.iter().map(|source| ("policies", source));
    for (name, source) in named.chain(policies) {
        let reason = source.reason.as_deref().unwrap_or("it has not answered yet");
        let faults: Vec<String> =
            source.faults.iter().map(|fault| format!("{}: {}", fault.subject, fault.reason)).collect();
        match (source.state.as_str(), faults.as_slice()) {
            ("synced", []) => report.ok(SOURCES, "synced", name),
            ("synced", faults) => {
                let advice = "correct what the source says";
                report.add(SOURCES, "faults", Outcome::Warning, format!("{name}: {}", some(faults)), advice);
            }
            // What it said last still holds.
            ("degraded", _) => report.add(
                SOURCES,
                "synced",
                Outcome::Warning,
                format!("{name} cannot be read: {reason}"),
                "until it can, the last good picture holds",
            ),
            _ => report.add(
                SOURCES,
                "synced",
                Outcome::Failed,
                format!("{name} was never read: {reason}"),
                "until it is, no destination is reported as missing",
            ),
        }
    }
}

fn judge_proxies(proxies: &[Proxy], report: &mut Report) {
    let mut versions: BTreeMap<&str, usize> = BTreeMap::new();
    for proxy in proxies {
        *versions.entry(proxy.version()).or_default() += 1;
    }
    let others: Vec<String> = versions
        .iter()
        .filter(|(version, _)| **version != VERSION)
        .map(|(version, count)| format!("{count} of {version}"))
        .collect();
    if others.is_empty() {
        report.ok(PROXIES, "versions", format!("{} connected, all of {VERSION}", proxies.len()));
    } else {
        let seen = format!("{} connected, {}", proxies.len(), some(&others));
        let advice = "restart their workloads: a pod gets the injector's version when it is created, a host what is installed";
        report.add(PROXIES, "versions", Outcome::Warning, seen, advice);
    }
    let refused: Vec<String> = proxies
        .iter()
        .filter_map(|proxy| Some(format!("{} ({})", proxy.identity, proxy.nacks().next()?.message)))
        .collect();
    if refused.is_empty() {
        report.ok(PROXIES, "accept", "no proxy refuses what it was sent");
    } else {
        let advice = "`outrigger proxies` shows each; they keep what they took before";
        report.add(PROXIES, "accept", Outcome::Failed, some(&refused), advice);
    }
    let claims: Vec<String> = proxies
        .iter()
        .flat_map(|proxy| proxy.claims.iter().map(move |claim| (proxy, claim)))
        .filter(|(_, claim)| !claim.accepted)
        .map(|(proxy, claim)| format!("{} ({}: {})", proxy.identity, claim.service, claim.message))
        .collect();
    if !claims.is_empty() {
        let advice = "give the workload a join token for the service, or correct what it announces";
        report.add(PROXIES, "claims", Outcome::Failed, some(&claims), advice);
    }
}

fn judge_policies(items: &[Item], report: &mut Report) {
    let name = |item: &Item| item.object.key().to_string();
    let bad: Vec<String> = items
        .iter()
        .filter_map(|item| {
            let condition = item.status.conditions.iter().find(|condition| condition.is_bad())?;
            Some(format!("{} ({}: {})", name(item), condition.reason, condition.message))
        })
        .collect();
    if bad.is_empty() {
        report.ok(POLICIES, "accepted", format!("{} in force", items.len()));
    } else {
        let advice = "`outrigger policy describe` says what each lacks";
        report.add(POLICIES, "accepted", Outcome::Failed, some(&bad), advice);
    }
    let refused: Vec<String> =
        items.iter().filter(|item| !item.status.proxies.refused.is_empty()).map(name).collect();
    if !refused.is_empty() {
        let advice = "`outrigger policy describe` says which proxies, and why";
        report.add(
            POLICIES,
            "taken",
            Outcome::Failed,
            format!("refused by proxies: {}", some(&refused)),
            advice,
        );
    }
}

/// Unix seconds.
pub(super) fn now() -> i64 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

/// When something ends, in words.
pub(super) fn ends(at: i64, now: i64) -> String {
    match at - now {
        left if left <= 0 => format!("ended {} days ago", -left / 86_400),
        left if left < 2 * 86_400 => format!("ends in {} hours", left / 3_600),
        left => format!("ends in {} days", left / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::output::{Format, Paint};

    #[test]
    fn certificates_and_versions() {
        let mut report = Report::default();
        let controller = |version: &str, issuer: i64, leaf: i64| Controller {
            version: version.to_owned(),
            trust_domain: "outrigger.local".to_owned(),
            issuer_expires: issuer * 86_400,
            leaf_expires: leaf * 86_400,
        };
        judge_controller(&controller(VERSION, 300, 1), 0, &mut report);
        judge_controller(&controller("0.0.9", 20, 1), 0, &mut report);
        judge_controller(&controller(VERSION, -3, -1), 0, &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }

    #[test]
    fn what_is_not_read_and_what_is_wrong_in_it() {
        let mut report = Report::default();
        let sources: Sources = serde_json::from_value(json!({
            "sources": [
                { "name": "file", "state": "synced", "reason": null,
                  "faults": [{ "subject": "a.yaml", "reason": "no ports" }] },
                { "name": "consul", "state": "degraded", "reason": "connection refused", "faults": [] },
                { "name": "kubernetes", "state": "never-synced", "reason": null, "faults": [] },
            ],
            "policies": { "state": "synced", "reason": null, "faults": [] },
            "store": { "writable": false, "reason": "no space left on device" },
        }))
        .unwrap();
        judge_sources(&sources, &mut report);
        judge_store(sources.store.as_ref(), &mut report);
        insta::assert_snapshot!(report.render(Format::Table, Paint::NONE).unwrap());
    }
}
