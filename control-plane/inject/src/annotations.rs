//! The settings of one pod: its annotations over the mesh's defaults. Each value is judged as strictly as the sidecar will
//! judge it, because a sidecar that exits at start is a workload that never starts, and says so where nobody looks.
//!
//! A setting is data: it becomes a value of a variable or of a flag of ours, never a part of a container's definition. So
//! no annotation can add a capability, a volume or a command.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::json::{at, text};
use crate::settings::{PortRange, Resources, Settings};
use crate::{INJECT, REDIRECT, SKIPPED, quantity};

/// What our annotations begin with.
const PREFIX: &str = "outrigger.dev/";
/// Entries of a list: rules in each pod's kernel.
const MAX_ENTRIES: usize = 64;
/// Characters of a wrong value that are shown.
const SHOWN: usize = 48;
/// As the sidecar's own bound: threads beyond it gain nothing beside one workload.
const MAX_THREADS: u16 = 256;
/// Characters of log directives.
const MAX_LOG_LEVEL: usize = 256;

/// Every annotation that is a setting.
const KNOWN: [&str; 11] = [
    "skip-inbound-ports",
    "skip-outbound-ports",
    "skip-outbound-cidrs",
    "opaque-ports",
    "upstreams",
    "proxy-cpu-request",
    "proxy-cpu-limit",
    "proxy-memory-request",
    "proxy-memory-limit",
    "proxy-log-level",
    "proxy-concurrency",
];

/// The settings of one pod.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PodSettings {
    pub(crate) skip_inbound_ports: Vec<PortRange>,
    pub(crate) skip_outbound_ports: Vec<PortRange>,
    pub(crate) skip_outbound_cidrs: Vec<IpNet>,
    pub(crate) opaque_ports: Vec<u16>,
    pub(crate) upstreams: Vec<Upstream>,
    pub(crate) resources: Resources,
    pub(crate) log_level: String,
    pub(crate) threads: Option<u16>,
}

/// A service that the sidecar serves on a port of loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Upstream {
    service: String,
    listen: SocketAddr,
}

impl Upstream {
    /// As the sidecar's configuration has it.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "service": self.service, "listen": self.listen.to_string() })
    }
}

/// What the annotations of a pod came to.
pub(crate) struct Read {
    pub(crate) settings: PodSettings,
    /// One for each annotation that is wrong, with its name.
    pub(crate) faults: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

/// Reads the annotations of `pod` over `defaults`.
pub(crate) fn read(pod: &Value, defaults: &Settings) -> Read {
    let mut reader = Reader { pod, faults: Vec::new() };
    let resources = reader.resources(&defaults.resources);
    let settings = PodSettings {
        skip_inbound_ports: reader.list(
            "skip-inbound-ports",
            &defaults.skip_inbound_ports,
            PortRange::from_str,
        ),
        skip_outbound_ports: reader.list(
            "skip-outbound-ports",
            &defaults.skip_outbound_ports,
            PortRange::from_str,
        ),
        skip_outbound_cidrs: reader.list("skip-outbound-cidrs", &defaults.skip_outbound_cidrs, cidr),
        opaque_ports: reader.list("opaque-ports", &defaults.opaque_ports, port),
        upstreams: reader.upstreams(),
        resources,
        log_level: reader.one("proxy-log-level", log_level).unwrap_or_else(|| defaults.log_level.clone()),
        threads: reader.one("proxy-concurrency", threads).or(defaults.concurrency),
    };
    Read { settings, faults: reader.faults, warnings: unknown(pod) }
}

struct Reader<'p> {
    pod: &'p Value,
    faults: Vec<String>,
}

impl Reader<'_> {
    fn one<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let value = text(self.pod, &["metadata", "annotations", &format!("{PREFIX}{name}")])?;
        parse(value.trim()).map_err(|error| self.fault(name, &error)).ok()
    }

    fn list<T: Clone>(
        &mut self,
        name: &str,
        default: &[T],
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        self.one(name, |value| entries(value, &parse)).unwrap_or_else(|| default.to_vec())
    }

    fn upstreams(&mut self) -> Vec<Upstream> {
        let upstreams = self.list("upstreams", &[], upstream);
        for (index, one) in upstreams.iter().enumerate() {
            if upstreams[..index].iter().any(|other| other.listen == one.listen) {
                self.fault("upstreams", &format!("{} is used twice", one.listen));
            }
        }
        upstreams
    }

    fn resources(&mut self, defaults: &Resources) -> Resources {
        let mut resources = defaults.clone();
        for (kind, request, limit) in [
            ("cpu", &mut resources.requests.cpu, &mut resources.limits.cpu),
            ("memory", &mut resources.requests.memory, &mut resources.limits.memory),
        ] {
            let names = (format!("proxy-{kind}-request"), format!("proxy-{kind}-limit"));
            let own = (self.one(&names.0, amount), self.one(&names.1, amount));
            let before = self.faults.len();
            match &own {
                (Some(own_request), Some(own_limit)) if above(own_request, own_limit) => {
                    self.fault(
                        &names.0,
                        &format!("{own_request} is more than {PREFIX}{}, {own_limit}", names.1),
                    );
                }
                // A default gives way to what the pod says.
                (Some(own_request), None)
                    if limit.as_ref().is_some_and(|limit| above(own_request, limit)) =>
                {
                    *limit = Some(own_request.clone());
                }
                (None, Some(own_limit))
                    if request.as_ref().is_some_and(|request| above(request, own_limit)) =>
                {
                    *request = Some(own_limit.clone());
                }
                _ => {}
            }
            if self.faults.len() == before {
                *request = own.0.or_else(|| request.take());
                *limit = own.1.or_else(|| limit.take());
            }
        }
        resources
    }

    fn fault(&mut self, name: &str, error: &str) {
        self.faults.push(format!("annotation {PREFIX}{name}: {error}"));
    }
}

/// Annotations of ours that mean nothing: somebody expects something of them.
fn unknown(pod: &Value) -> Vec<String> {
    let annotations = at(pod, &["metadata", "annotations"]).and_then(Value::as_object);
    let ours = annotations.into_iter().flatten().filter_map(|(name, _)| name.strip_prefix(PREFIX));
    ours.filter(|name| {
        !KNOWN.contains(name) && ![REDIRECT, SKIPPED].contains(&format!("{PREFIX}{name}").as_str())
    })
    .map(|name| {
        let shown = shown(&format!("{PREFIX}{name}"));
        if name == INJECT.trim_start_matches(PREFIX) {
            return format!("annotation {shown} has no effect: it is a label");
        }
        format!("annotation {shown} has no effect: there is no such setting")
    })
    .collect()
}

fn above(one: &str, other: &str) -> bool {
    quantity::nanos(one) > quantity::nanos(other)
}

/// A value as a message shows it: bounded, on one line.
pub(crate) fn shown(value: &str) -> String {
    if value.chars().count() <= SHOWN {
        return format!("{value:?}");
    }
    format!("{:?}...", value.chars().take(SHOWN).collect::<String>())
}

fn entries<T>(value: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    if value.is_empty() {
        return Ok(Vec::new());
    }
    if value.split(',').count() > MAX_ENTRIES {
        return Err(format!("more than {MAX_ENTRIES} entries"));
    }
    value.split(',').map(|entry| parse(entry.trim())).collect()
}

/// A port: digits only, because the sidecar's parser would take `+80` for something else.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = digits.then(|| text.parse().ok()).flatten().filter(|port| *port != 0);
    port.ok_or_else(|| format!("{} is no port: 1 to 65535", shown(text)))
}

fn cidr(text: &str) -> Result<IpNet, String> {
    // An address alone is the range of one.
    let net = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| format!("{} is no address and no range such as 10.0.0.0/8", shown(text)))
}

fn amount(text: &str) -> Result<String, String> {
    match quantity::nanos(text) {
        Some(nanos) if nanos > 0 => Ok(text.to_owned()),
        _ => Err(format!("{} is no quantity above 0, as in 100m or 64Mi", shown(text))),
    }
}

/// The number of threads.
pub(crate) fn threads(text: &str) -> Result<u16, String> {
    let number = text.parse().ok().filter(|threads| (1..=MAX_THREADS).contains(threads));
    number.ok_or_else(|| format!("{} is no number of threads: 1 to {MAX_THREADS}", shown(text)))
}

/// Directives of the log: `info`, `info,outrigger_proxy::dns=debug`. Narrower than what the sidecar takes, because what it
/// does not take ends it.
pub(crate) fn log_level(text: &str) -> Result<String, String> {
    let level = |text: &str| ["error", "warn", "info", "debug", "trace", "off"].contains(&text);
    let target = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':')
    };
    let directive = |text: &str| match text.split_once('=') {
        Some((name, value)) => target(name) && level(value),
        None => level(text),
    };
    if text.len() <= MAX_LOG_LEVEL && text.split(',').all(directive) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{} is no level (error, warn, info, debug, trace, off) and no list such as info,outrigger_proxy::dns=debug",
        shown(text)
    ))
}

/// `<name>.<namespace>:<port>=<port of loopback>`, or with the loopback address before that port. Another address would
/// lend the pod's identity to whoever can reach it.
fn upstream(text: &str) -> Result<Upstream, String> {
    let wrong = || {
        format!(
            "{} is not of the form name.namespace:port=listen-port, as in payments.shop:8080=9001",
            shown(text)
        )
    };
    let (service, listen) = text.split_once('=').ok_or_else(wrong)?;
    let (name, service_port) = service.rsplit_once(':').ok_or_else(wrong)?;
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if !name.split_once('.').is_some_and(|(name, namespace)| label(name) && label(namespace)) {
        return Err(wrong());
    }
    port(service_port)?;
    let listen = match listen.parse::<SocketAddr>() {
        Ok(address) => address,
        Err(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, port(listen)?)),
    };
    if !listen.ip().is_loopback() || listen.port() == 0 {
        return Err(format!("{} is no port of loopback", shown(&listen.to_string())));
    }
    Ok(Upstream { service: service.to_owned(), listen })
}
