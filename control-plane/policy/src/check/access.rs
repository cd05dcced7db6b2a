//! `AccessPolicy`.

use super::{Problems, labels, names, rule_name};
use crate::bounds::{
    MAX_BURST, MAX_CONDITIONS, MAX_ENTRIES, MAX_LABELS, MAX_LIMITS, MAX_OPERATIONS, MAX_RULES,
};
use crate::kinds::{
    AccessPolicy, AccessTargetKind, HeaderConditionType, Limit, LimitPer, MatchType, Operation,
    PathMatchType, Source,
};

pub(super) fn check(out: &mut Problems, spec: &AccessPolicy) {
    target(out, spec);
    if spec.rules.is_empty() && spec.limits.is_empty() {
        out.error("spec", "has neither `rules` nor `limits`: it would say nothing");
    }
    out.at_most("spec.rules", &spec.rules, MAX_RULES);
    for (number, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{number}]");
        rule_name(out, format!("{at}.name"), rule.name.as_ref());
        from(out, &format!("{at}.from"), rule.from.as_deref());
        to(out, &format!("{at}.to"), rule.to.as_deref());
    }
    let named = spec.rules.iter().enumerate();
    let named = named
        .filter_map(|(number, rule)| Some((format!("spec.rules[{number}].name"), rule.name.as_deref()?)));
    out.unique(named);

    out.at_most("spec.limits", &spec.limits, MAX_LIMITS);
    for (number, one) in spec.limits.iter().enumerate() {
        limit(out, &format!("spec.limits[{number}]"), one);
    }
    let named = spec.limits.iter().enumerate();
    let named =
        named.filter_map(|(number, one)| Some((format!("spec.limits[{number}].name"), one.name.as_deref()?)));
    out.unique(named);
}

fn target(out: &mut Problems, spec: &AccessPolicy) {
    let target = &spec.target_ref;
    let kind = target.kind;
    match (&target.name, kind) {
        (Some(name), AccessTargetKind::Service) => out.take("spec.targetRef.name", names::service(name)),
        (None, AccessTargetKind::Service) => {
            out.error("spec.targetRef.name", "is missing: write the Service's name");
        }
        (Some(_), _) => out.error("spec.targetRef.name", format!("is for kind Service, not for {kind:?}")),
        (None, _) => {}
    }
    match (target.labels.is_empty(), kind) {
        (true, AccessTargetKind::Workload) => out.error(
            "spec.targetRef.labels",
            "is empty: write the workloads' labels, or `kind: Namespace` for all of them",
        ),
        (false, AccessTargetKind::Workload) => labels(out, "spec.targetRef.labels", &target.labels),
        (false, _) => out.error("spec.targetRef.labels", format!("is for kind Workload, not for {kind:?}")),
        (true, _) => {}
    }
    if target.labels.len() > MAX_LABELS {
        let message = format!("has {} entries: at most {MAX_LABELS} are taken", target.labels.len());
        out.error("spec.targetRef.labels", message);
    }
    if target.port == Some(0) {
        out.error("spec.targetRef.port", "0 is not 1 to 65535");
    }
}

fn limit(out: &mut Problems, at: &str, limit: &Limit) {
    rule_name(out, format!("{at}.name"), limit.name.as_ref());
    match (&limit.header, limit.per) {
        (Some(header), LimitPer::Header) => out.take(format!("{at}.header"), names::header(header)),
        (None, LimitPer::Header) => {
            out.error(format!("{at}.header"), "is missing: write the header whose values are told apart");
        }
        (Some(_), per) => out.error(format!("{at}.header"), format!("is for `per: Header`, not for {per:?}")),
        (None, _) => {}
    }
    if limit.requests_per_second.is_none() && limit.max_connections.is_none() {
        out.error(at, "has neither `requestsPerSecond` nor `maxConnections`: it would bound nothing");
    }
    if limit.burst.is_some() && limit.requests_per_second.is_none() {
        out.error(format!("{at}.burst"), "is for a limit with `requestsPerSecond`");
    }
    if limit.tell_remaining.is_some() && limit.requests_per_second.is_none() {
        out.error(format!("{at}.tellRemaining"), "is for a limit with `requestsPerSecond`");
    }
    out.range(format!("{at}.burst"), limit.burst, 1, MAX_BURST);
    out.range(format!("{at}.maxConnections"), limit.max_connections, 1, MAX_BURST);
    if limit.max_connections.is_some() && limit.per != LimitPer::Caller {
        out.error(format!("{at}.maxConnections"), "is for `per: Caller`: connections are counted by caller");
    }
    if limit.max_connections.is_some() && limit.requests_per_second.is_none() && limit.to.is_some() {
        out.error(format!("{at}.to"), "is about requests, and this limit counts connections");
    }
    from(out, &format!("{at}.from"), limit.from.as_deref());
    to(out, &format!("{at}.to"), limit.to.as_deref());
}

/// Checks each entry of a list that must not be there and empty, and has at most `max` entries.
fn each<T>(
    out: &mut Problems,
    path: &str,
    (list, max): (Option<&Vec<T>>, usize),
    check: impl Fn(&T) -> Result<(), String>,
) {
    let Some(list) = list else { return };
    if list.is_empty() {
        out.error(path, EMPTY_SELECTOR);
    }
    out.at_most(path, list, max);
    for (number, entry) in list.iter().enumerate() {
        out.take(format!("{path}[{number}]"), check(entry));
    }
}

const EMPTY_SELECTOR: &str = "is an empty selector: it selects nothing; leave it out to select everything";

fn from(out: &mut Problems, path: &str, from: Option<&[Source]>) {
    let Some(from) = from else { return };
    if from.is_empty() {
        out.error(path, EMPTY_SELECTOR);
    }
    out.at_most(path, from, MAX_ENTRIES);
    for (number, source) in from.iter().enumerate() {
        let at = format!("{path}[{number}]");
        if *source == Source::default() {
            out.error(&at, EMPTY_SELECTOR);
        }
        each(out, &format!("{at}.identities"), (source.identities.as_ref(), MAX_ENTRIES), |identity| {
            names::identity_pattern(identity)
        });
        for (index, identity) in source.identities.iter().flatten().enumerate() {
            if let Some(start) = identity.strip_suffix('*')
                && !start.is_empty()
                && !start.ends_with('/')
            {
                let message = format!(
                    "`{identity}` also matches what only begins so: write `{start}/*` for what is below it"
                );
                out.warn(format!("{at}.identities[{index}]"), message);
            }
        }
        each(out, &format!("{at}.namespaces"), (source.namespaces.as_ref(), MAX_ENTRIES), |name| {
            names::namespace(name)
        });
        each(
            out,
            &format!("{at}.serviceAccounts"),
            (source.service_accounts.as_ref(), MAX_ENTRIES),
            |account| names::service_account(account),
        );
        each(out, &format!("{at}.cidrs"), (source.cidrs.as_ref(), MAX_ENTRIES), |cidr| names::cidr(cidr));
        let named =
            source.identities.is_some() || source.namespaces.is_some() || source.service_accounts.is_some();
        if source.unauthenticated && named {
            let message = "asks for callers without an identity that have a certain one: there are none";
            out.error(format!("{at}.unauthenticated"), message);
        }
    }
}

fn to(out: &mut Problems, path: &str, to: Option<&[Operation]>) {
    let Some(to) = to else { return };
    if to.is_empty() {
        out.error(path, EMPTY_SELECTOR);
    }
    out.at_most(path, to, MAX_OPERATIONS);
    for (number, operation) in to.iter().enumerate() {
        let at = format!("{path}[{number}]");
        if *operation == Operation::default() {
            out.error(&at, EMPTY_SELECTOR);
        }
        each(out, &format!("{at}.ports"), (operation.ports.as_ref(), MAX_ENTRIES), |port| {
            if *port == 0 { Err("0 is not 1 to 65535".to_owned()) } else { Ok(()) }
        });
        each(out, &format!("{at}.methods"), (operation.methods.as_ref(), MAX_ENTRIES), |method| {
            names::method(method)
        });
        each(out, &format!("{at}.paths"), (operation.paths.as_ref(), MAX_OPERATIONS), |path| {
            match path.kind {
                PathMatchType::RegularExpression => names::expression(&path.value),
                PathMatchType::Exact | PathMatchType::PathPrefix => names::path(&path.value),
            }
        });
        each(out, &format!("{at}.headers"), (operation.headers.as_ref(), MAX_CONDITIONS), |header| {
            names::header(&header.name)?;
            match (header.kind, &header.value) {
                (HeaderConditionType::Present, None) => Ok(()),
                (HeaderConditionType::Present, Some(_)) => {
                    Err("has a value, and type Present asks for none".to_owned())
                }
                (_, None) => Err("has no value: write one, or `type: Present`".to_owned()),
                (HeaderConditionType::Exact, Some(value)) => names::header_value(value),
                (HeaderConditionType::RegularExpression, Some(value)) => names::expression(value),
            }
        });
        each(out, &format!("{at}.grpc"), (operation.grpc.as_ref(), MAX_CONDITIONS), |grpc| {
            super::route::grpc_method(grpc.kind.unwrap_or(MatchType::Exact), grpc)
        });
    }
}
