//! Who may call the workload: probe, then any deny, then any allow, then the default.
//!
//! All rules of all policies count together, so their order never matters and a policy more can be read by itself.
//! What matches is decided in the sense of the rule: a deny holds if it holds for any reading of a request, an allow
//! only if it holds for each (repeated headers, paths that applications decode further). A connection whose bytes are
//! not read as HTTP is allowed by no rule that speaks of HTTP, and denied by each that denies something of HTTP.
//!
//! Which rules are about a port is worked out once per push; a decision runs through these in a line and allocates
//! nothing, but for the verdicts of policies under audit and for a path that an application may read differently.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use outrigger_api::v1;

use crate::{
    criteria::{
        Operation, Seen, Sense, Source, hold, is_connection, is_from, is_request, networks, normal_path,
        ports,
    },
    path::{self, EscapedSlashes},
    request::View,
};

/// Rules of all policies of a workload: each may be looked at for each request.
const MAX_RULES: usize = 4_096;

/// Ports that a workload's policies name: each has a list of rules.
const MAX_PORTS: usize = 256;

/// Probes of a workload: some for each of its containers.
const MAX_PROBES: usize = 1_024;

/// Verdicts of policies under audit that one decision tells of. More say the same once more.
pub const MAX_AUDITS: usize = 16;

/// Whoever calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller<'a> {
    /// The SPIFFE id that it has proved.
    pub identity: Option<&'a str>,
    /// The namespace of that: of `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
    pub namespace: Option<&'a str>,
    /// Where it calls from.
    pub source: IpAddr,
}

impl<'a> Caller<'a> {
    /// Reads the namespace from the identity. Who knows it already, for each request, fills it in.
    pub fn new(identity: Option<&'a str>, source: IpAddr) -> Self {
        let parts = identity.and_then(|text| text.strip_prefix("spiffe://")).map(|text| text.split('/'));
        let namespace = parts.and_then(|mut parts| {
            match [parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next()] {
                [Some(_), Some("ns"), Some(namespace), Some("sa"), Some(_), None] => Some(namespace),
                _ => None,
            }
        });
        Self { identity, namespace, source }
    }
}

/// The access policies of a workload, as one proxy evaluates them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    default: Otherwise,
    default_origin: Arc<str>,
    rules: Vec<Rule>,
    by_port: BTreeMap<u16, Rules>,
    /// Of every port that no policy names.
    elsewhere: Rules,
    probes: Vec<Probe>,
    slashes: EscapedSlashes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Otherwise {
    Allow,
    Audit,
    Deny,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    policy: Arc<str>,
    name: Arc<str>,
    audit: bool,
    deny: bool,
    /// The policy's; empty: all.
    ports: Arc<[u16]>,
    from: Vec<Source>,
    to: Vec<Operation>,
}

/// The rules that are about a port, by their places.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Rules {
    denies: Vec<usize>,
    allows: Vec<usize>,
    /// Denies first; rules of one policy are neighbours in each of the two.
    audited: Vec<usize>,
    look_at_paths: bool,
    /// Rules in force do, not only such under audit.
    decide_on_paths: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Probe {
    /// From these networks.
    Tcp { port: u16, nodes: Vec<IpNet> },
    /// From anywhere.
    Http { port: u16, method: Box<str>, path: Box<str> },
}

/// What was decided, and who decided it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// Whether it may go on.
    pub allowed: bool,
    /// What decided.
    pub by: By<'a>,
    /// Its place among all that can decide, below [`Access::deciders`]: who counts decisions needs no names to find the counter.
    pub decider: usize,
    /// It is allowed only because the default is to let pass and to tell.
    pub audited: bool,
    /// What policies under audit would have decided, at most [`MAX_AUDITS`] of them.
    pub audits: Vec<Audit<'a>>,
}

/// What decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By<'a> {
    /// It is a probe of the platform's.
    Probe,
    /// A rule of a policy.
    Rule {
        /// `<namespace>/<name>`.
        policy: &'a Arc<str>,
        /// The rule's name.
        rule: &'a Arc<str>,
    },
    /// No rule is about it.
    Default {
        /// Who set the default.
        origin: &'a Arc<str>,
    },
}

impl<'a> By<'a> {
    /// Policy and rule, as logs and metrics name them.
    pub fn names(&self) -> (&'a str, &'a str) {
        match self {
            Self::Probe => ("", "probe"),
            Self::Rule { policy, rule } => (policy, rule),
            Self::Default { origin } => (origin, "default"),
        }
    }
}

impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe => f.write_str("a probe"),
            Self::Rule { policy, rule } => write!(f, "AccessPolicy {policy}, {rule}"),
            Self::Default { origin } if origin.is_empty() => f.write_str("the default"),
            Self::Default { origin } => write!(f, "the default of {origin}"),
        }
    }
}

/// What a policy under audit would have decided: its first deny that holds, else its first allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Audit<'a> {
    /// `<namespace>/<name>`.
    pub policy: &'a Arc<str>,
    /// The rule's name.
    pub rule: &'a Arc<str>,
    /// See [`Verdict::decider`].
    pub decider: usize,
    /// Else it would have denied.
    pub would_allow: bool,
}

/// Among those that decide; rules come after them.
const PROBE: usize = 0;
const DEFAULT: usize = 1;
const FIRST_RULE: usize = 2;

impl Access {
    /// Checks what was pushed. Faults are told with the policy's and the rule's name.
    pub fn from_wire(wire: &v1::Access) -> Result<Self, String> {
        let default = match wire.default() {
            v1::Default::Unspecified => return Err("the access policies come without a default".to_owned()),
            v1::Default::Allow => Otherwise::Allow,
            v1::Default::Audit => Otherwise::Audit,
            v1::Default::Deny => Otherwise::Deny,
        };
        let slashes = EscapedSlashes::from_wire(wire.escaped_slashes());
        let mut rules = Vec::new();
        for policy in &wire.policies {
            let name: Arc<str> = policy.name.as_str().into();
            let ports: Arc<[u16]> =
                ports(&policy.ports).map_err(|error| format!("AccessPolicy {name}: {error}"))?.into();
            for rule in &policy.rules {
                let rule = Rule::from_wire(&name, policy.audit, &ports, rule, slashes)
                    .map_err(|error| format!("AccessPolicy {name}, {}: {error}", rule.name))?;
                rules.push(rule);
            }
        }
        bounded("rules", rules.len(), MAX_RULES)?;
        bounded("probes", wire.probes.len(), MAX_PROBES)?;
        let named: BTreeSet<u16> = rules.iter().flat_map(Rule::named_ports).collect();
        bounded("ports", named.len(), MAX_PORTS)?;
        Ok(Self {
            default,
            default_origin: wire.default_origin.as_str().into(),
            by_port: named.iter().map(|port| (*port, Rules::about(&rules, Some(*port)))).collect(),
            elsewhere: Rules::about(&rules, None),
            rules,
            probes: wire
                .probes
                .iter()
                .map(|probe| Probe::from_wire(probe, slashes))
                .collect::<Result<_, _>>()?,
            slashes,
        })
    }

    /// Whether rules in force about the port look at paths: then a request's path is to be brought into its one form, and
    /// forwarded in it. Such under audit change nothing of a request.
    pub fn decides_on_paths(&self, port: u16) -> bool {
        self.rules_of(port).decide_on_paths
    }

    /// The target that a request to the port is judged by: in the one form where any rule looks at paths. `limits_decide`:
    /// whether [`crate::limit::Limits::decides_on_paths`] there.
    ///
    /// # Errors
    /// On a target without such a form, where rules or limits in force look at it.
    pub fn judged<'a>(
        &self,
        port: u16,
        target: &'a [u8],
        limits_decide: bool,
    ) -> Result<Cow<'a, [u8]>, path::Fault> {
        let rules = self.rules_of(port);
        if !rules.look_at_paths && !limits_decide {
            return Ok(Cow::Borrowed(target));
        }
        match path::normalise(target, self.slashes) {
            Err(_) if !rules.decide_on_paths && !limits_decide => Ok(Cow::Borrowed(target)),
            judged => judged,
        }
    }

    /// Whether there are probes of the port, which pass without an identity.
    pub fn has_probes(&self, port: u16) -> bool {
        self.probes.iter().any(|probe| probe.port() == port)
    }

    /// How many there are that can decide: probes, the default, and each rule. Each decides always the same, or under audit would.
    pub fn deciders(&self) -> usize {
        FIRST_RULE + self.rules.len()
    }

    /// How a path is brought into its one form.
    pub fn escaped_slashes(&self) -> EscapedSlashes {
        self.slashes
    }

    /// Decides on a connection whose bytes are not looked at.
    pub fn connection(&self, caller: &Caller<'_>, port: u16) -> Verdict<'_> {
        let is_probe = self.probes.iter().any(|probe| probe.is_connection(port, caller.source));
        self.decide(caller, port, is_probe, |rule| is_connection(&rule.to, port, rule.sense()))
    }

    /// Decides on a request. `path` is without its query; as [`Access::judged`] has it.
    pub fn request<V: View>(&self, caller: &Caller<'_>, port: u16, view: &V, path: &[u8]) -> Verdict<'_> {
        let is_probe = self.probes.iter().any(|probe| probe.is_request(port, view.method(), path));
        let seen = Seen::new(view, path);
        self.decide(caller, port, is_probe, |rule| is_request(&rule.to, port, &seen, rule.sense()))
    }

    fn rules_of(&self, port: u16) -> &Rules {
        self.by_port.get(&port).unwrap_or(&self.elsewhere)
    }

    fn decide(
        &self,
        caller: &Caller<'_>,
        port: u16,
        is_probe: bool,
        is_it: impl Fn(&Rule) -> bool,
    ) -> Verdict<'_> {
        let verdict =
            |allowed, by, decider| Verdict { allowed, by, decider, audited: false, audits: Vec::new() };
        if is_probe {
            return verdict(true, By::Probe, PROBE);
        }
        let rules = self.rules_of(port);
        let holds = |at: &&usize| {
            let rule = &self.rules[**at];
            is_from(&rule.from, caller) && is_it(rule)
        };
        let by = |at: &usize| By::Rule { policy: &self.rules[*at].policy, rule: &self.rules[*at].name };
        let mut verdict = if let Some(deny) = rules.denies.iter().find(holds) {
            verdict(false, by(deny), FIRST_RULE + deny)
        } else if let Some(allow) = rules.allows.iter().find(holds) {
            verdict(true, by(allow), FIRST_RULE + allow)
        } else {
            let by = By::Default { origin: &self.default_origin };
            Verdict {
                audited: self.default == Otherwise::Audit,
                ..verdict(self.default != Otherwise::Deny, by, DEFAULT)
            }
        };
        for at in rules.audited.iter().filter(holds) {
            let Rule { policy, name: rule, deny, .. } = &self.rules[*at];
            let is_told = verdict.audits.iter().any(|told: &Audit<'_>| told.policy == policy);
            if !is_told && verdict.audits.len() < MAX_AUDITS {
                verdict.audits.push(Audit { policy, rule, decider: FIRST_RULE + at, would_allow: !deny });
            }
        }
        verdict
    }
}

fn bounded(what: &str, count: usize, most: usize) -> Result<(), String> {
    if count > most {
        return Err(format!("the access policies hold {count} {what}; a workload may have {most}"));
    }
    Ok(())
}

impl Rule {
    fn from_wire(
        policy: &Arc<str>,
        audit: bool,
        ports: &Arc<[u16]>,
        wire: &v1::AccessRule,
        slashes: EscapedSlashes,
    ) -> Result<Self, String> {
        Ok(Self {
            policy: policy.clone(),
            name: wire.name.as_str().into(),
            audit,
            deny: wire.deny,
            ports: ports.clone(),
            from: wire.from.iter().map(Source::from_wire).collect::<Result<_, _>>()?,
            to: wire.to.iter().map(|to| Operation::from_wire(to, slashes)).collect::<Result<_, _>>()?,
        })
    }

    fn sense(&self) -> Sense {
        if self.deny { Sense::Shuts } else { Sense::Opens }
    }

    fn named_ports(&self) -> impl Iterator<Item = u16> {
        self.ports.iter().chain(self.to.iter().flat_map(Operation::ports)).copied()
    }

    /// `None`: a port that nobody names.
    fn is_about(&self, port: Option<u16>) -> bool {
        let does = |operation: &Operation| match port {
            Some(port) => operation.is_about(port),
            None => operation.ports().is_empty(),
        };
        let is_the_policys = self.ports.is_empty() || port.is_some_and(|port| self.ports.contains(&port));
        is_the_policys && (self.to.is_empty() || self.to.iter().any(does))
    }
}

impl Rules {
    fn about(rules: &[Rule], port: Option<u16>) -> Self {
        let mut about = Self::default();
        for (at, rule) in rules.iter().enumerate().filter(|(_, rule)| rule.is_about(port)) {
            let list = match (rule.audit, rule.deny) {
                (true, _) => &mut about.audited,
                (false, true) => &mut about.denies,
                (false, false) => &mut about.allows,
            };
            list.push(at);
            let looks_at_paths = rule.to.iter().any(Operation::looks_at_paths);
            about.look_at_paths |= looks_at_paths;
            about.decide_on_paths |= looks_at_paths && !rule.audit;
        }
        about.audited.sort_by_key(|at| !rules[*at].deny);
        about
    }
}

impl Probe {
    fn port(&self) -> u16 {
        let (Self::Tcp { port, .. } | Self::Http { port, .. }) = self;
        *port
    }

    fn from_wire(wire: &v1::Probe, slashes: EscapedSlashes) -> Result<Self, String> {
        let fault = |error: String| format!("a probe of port {}: {error}", wire.port);
        let [port] = ports(&[wire.port]).map_err(fault)?[..] else {
            return Err(fault("it names no port".to_owned()));
        };
        match (wire.method.is_empty(), wire.path.is_empty()) {
            (true, true) => Ok(Self::Tcp { port, nodes: networks(&wire.nodes).map_err(fault)? }),
            (false, false) => Ok(Self::Http {
                port,
                method: wire.method.as_str().into(),
                path: normal_path(&wire.path, slashes).map_err(fault)?.into(),
            }),
            _ => Err(fault("of a method and a path it has only one".to_owned())),
        }
    }

    fn is_connection(&self, of: u16, source: IpAddr) -> bool {
        matches!(self, Self::Tcp { port, nodes } if *port == of && hold(nodes, source))
    }

    fn is_request(&self, of: u16, used: &[u8], asked: &[u8]) -> bool {
        matches!(self, Self::Http { port, method, path }
            if *port == of && method.as_bytes() == used && path.as_bytes() == asked)
    }
}

#[cfg(test)]
mod tests;
