//! From text to `Config`: defaults, then the file, then the environment, with every fault of all three.
//!
//! A typed deserializer stops at the first fault. So each setting is put into the defaults alone and tried: what fails
//! is a fault with the setting's name, what does not is kept.

use std::{collections::BTreeSet, fmt, net::SocketAddr};

use outrigger_certs::{SpiffeId, TrustDomain};
use serde_json::Value;

use super::{Config, is_service_name};

const ENVIRONMENT_PREFIX: &str = "OUTRIGGER_";
/// A configuration is a few KiB; a larger file is another file.
const MAX_FILE_BYTES: usize = 1024 * 1024;
/// Threads beyond this gain nothing beside one workload.
const MAX_THREADS: u16 = 256;

/// Everything that is wrong with a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in &self.0 {
            writeln!(f, "- {fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// The JSON schema of the file.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Config).to_value();
    schema["title"] = "outrigger-proxy configuration".into();
    schema
}

/// Reads a configuration. `file` is the YAML text (empty: defaults), `environment` the process's variables; those
/// that start with `OUTRIGGER_` and name a field override the file. Values in the environment are YAML; a list may
/// also be written with commas.
///
/// # Errors
/// All faults.
pub fn load(file: &str, environment: impl IntoIterator<Item = (String, String)>) -> Result<Config, Faults> {
    let mut faults = Vec::new();
    let mut settings = Vec::new();
    let defaults = serde_json::to_value(Config::default()).expect("the defaults are plain data");

    if file.len() > MAX_FILE_BYTES {
        faults.push("the file is larger than 1 MiB".to_owned());
    } else if !file.trim().is_empty() {
        match serde_saphyr::from_str::<Value>(file) {
            Ok(Value::Null) => {}
            Ok(value @ Value::Object(_)) => {
                collect(&mut Vec::new(), value, &defaults, &mut settings, &mut faults);
            }
            Ok(_) => faults.push("the file is no YAML mapping of fields to values".to_owned()),
            Err(error) => faults.push(format!("the file is not valid YAML: {error}")),
        }
    }

    let mut paths = Vec::new();
    leaves(&mut Vec::new(), &defaults, &mut paths);
    for (name, text) in environment {
        let Some(field) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        // Variables of our prefix that name no field are others': Kubernetes sets some for every service.
        let Some(path) = paths.iter().find(|path| path.join("_").eq_ignore_ascii_case(field)) else {
            continue;
        };
        settings.push(Setting {
            origin: name,
            value: environment_value(&text, at(&defaults, path)),
            path: path.clone(),
        });
    }

    let mut merged = defaults;
    for setting in settings {
        apply(&mut merged, setting, &mut faults);
    }
    let config = serde_json::from_value(merged).expect("every setting was tried");
    validate(&config, &mut faults);
    if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
}

struct Setting {
    /// What people call it: `timeouts.connect` or `OUTRIGGER_TIMEOUTS_CONNECT`.
    origin: String,
    path: Vec<String>,
    value: Value,
}

fn collect(
    path: &mut Vec<String>,
    value: Value,
    default: &Value,
    settings: &mut Vec<Setting>,
    faults: &mut Vec<String>,
) {
    match (value, default) {
        (Value::Object(fields), Value::Object(known)) => {
            for (name, value) in fields {
                path.push(name.clone());
                match known.get(&name) {
                    Some(default) => collect(path, value, default, settings, faults),
                    None => faults.push(format!("{}: there is no such field", path.join("."))),
                }
                path.pop();
            }
        }
        // A section whose fields are all commented out.
        (Value::Null, Value::Object(_)) => {}
        (value, _) => settings.push(Setting { origin: path.join("."), path: path.clone(), value }),
    }
}

fn leaves(path: &mut Vec<String>, value: &Value, into: &mut Vec<Vec<String>>) {
    if let Value::Object(fields) = value {
        for (name, value) in fields {
            path.push(name.clone());
            leaves(path, value, into);
            path.pop();
        }
    } else {
        into.push(path.clone());
    }
}

fn at<'v>(root: &'v Value, path: &[String]) -> &'v Value {
    path.iter().fold(root, |value, name| &value[name.as_str()])
}

fn environment_value(text: &str, default: &Value) -> Value {
    if default.is_string() {
        return text.into();
    }
    let parsed = serde_saphyr::from_str::<Value>(text).unwrap_or_else(|_| text.into());
    match parsed {
        Value::Null if default.is_array() => Value::Array(Vec::new()),
        Value::Array(_) | Value::Null => parsed,
        _ if default.is_array() => text
            .split(',')
            .map(|item| serde_saphyr::from_str::<Value>(item.trim()).unwrap_or_else(|_| item.trim().into()))
            .collect::<Value>(),
        _ => parsed,
    }
}

fn apply(merged: &mut Value, setting: Setting, faults: &mut Vec<String>) {
    let fits = |value: Value| {
        let mut candidate = merged.clone();
        replace(&mut candidate, &setting.path, value);
        serde_json::from_value::<Config>(candidate).map(|_| ())
    };
    let before = faults.len();
    match &setting.value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                if let Err(error) = fits(Value::Array(vec![item.clone()])) {
                    faults.push(format!("{}[{index}]: {error}", setting.origin));
                }
            }
            if items.is_empty()
                && let Err(error) = fits(Value::Array(Vec::new()))
            {
                faults.push(format!("{}: {error}", setting.origin));
            }
        }
        value => {
            if let Err(error) = fits(value.clone()) {
                faults.push(format!("{}: {error}", setting.origin));
            }
        }
    }
    if faults.len() == before {
        replace(merged, &setting.path, setting.value);
    }
}

fn replace(root: &mut Value, path: &[String], value: Value) {
    *path.iter().fold(root, |value, name| &mut value[name.as_str()]) = value;
}

// What types cannot say.
fn validate(config: &Config, faults: &mut Vec<String>) {
    let mut fault = |text: String| faults.push(text);
    match config.trust_domain.parse::<TrustDomain>() {
        Err(error) => fault(format!("trust_domain: {error}")),
        Ok(domain) => {
            if let Err(error) = SpiffeId::controller(&domain, &config.mesh_namespace) {
                fault(format!("mesh_namespace: {error}"));
            }
        }
    }
    if config.controller.is_empty() {
        fault("controller: at least one host:port is needed".to_owned());
    }
    for (index, address) in config.controller.iter().enumerate() {
        if host_and_port(address).is_none() {
            fault(format!("controller[{index}]: {address:?} is not of the form host:port"));
        }
    }
    for (index, claim) in config.services.iter().enumerate() {
        let namespaced =
            is_service_name(&claim.service) || is_service_name(&format!("{}.default", claim.service));
        if !namespaced {
            fault(format!(
                "services[{index}].service: {:?} is not of the form name.namespace",
                claim.service
            ));
        }
        if claim.port == 0 {
            fault(format!("services[{index}].port: 0 is no port"));
        }
        if claim.address.is_some_and(|address| address.is_unspecified() || address.is_multicast()) {
            fault(format!("services[{index}].address: not an address that others can dial"));
        }
    }
    let mut listeners = BTreeSet::new();
    for (index, upstream) in config.upstreams.iter().enumerate() {
        if upstream.target().is_none() {
            fault(format!(
                "upstreams[{index}].service: {:?} is not of the form name.namespace:port",
                upstream.service
            ));
        }
        if upstream.listen.port() == 0 || !listeners.insert(upstream.listen) {
            fault(format!("upstreams[{index}].listen: {} is port 0 or used twice", upstream.listen));
        }
    }
    for (index, inbound) in config.inbounds.iter().enumerate() {
        if inbound.listen.port() == 0 || !listeners.insert(inbound.listen) {
            fault(format!("inbounds[{index}].listen: {} is port 0 or used twice", inbound.listen));
        }
        if inbound.forward.port() == 0 {
            fault(format!("inbounds[{index}].forward: 0 is no port"));
        }
        if inbound.forward == inbound.listen {
            fault(format!("inbounds[{index}]: forward leads back to listen"));
        }
    }
    let mut ports = BTreeSet::new();
    let bound = [
        ("ports.outbound", config.ports.outbound, &config.bind.outbound, config.redirection),
        ("ports.inbound", config.ports.inbound, &config.bind.inbound, config.redirection),
        ("ports.dns", config.ports.dns, &config.bind.dns, true),
        ("ports.admin", config.ports.admin, &config.bind.admin, true),
    ];
    for (name, port, addresses, used) in bound {
        if port == 0 || !used {
            continue;
        }
        if !ports.insert(port) || addresses.iter().any(|ip| listeners.contains(&SocketAddr::new(*ip, port))) {
            fault(format!("{name}: {port} is used twice"));
        }
        if addresses.is_empty() {
            fault(format!("bind.{}: at least one address is needed", &name["ports.".len()..]));
        }
    }
    if config.threads.is_some_and(|threads| threads == 0 || threads > MAX_THREADS) {
        fault(format!("threads: must be 1 to {MAX_THREADS}"));
    }
    if config.mark == Some(0) {
        fault("mark: 0 is the mark of unmarked traffic".to_owned());
    }
    if config.opaque_ports.contains(&0) {
        fault("opaque_ports: 0 is no port".to_owned());
    }
    let timeouts = &config.timeouts;
    for (name, value) in [
        ("connect", timeouts.connect),
        ("detect", timeouts.detect),
        ("handshake", timeouts.handshake),
        ("headers", timeouts.headers),
        ("discovery", timeouts.discovery),
        ("ping_interval", timeouts.ping_interval),
        ("ping_timeout", timeouts.ping_timeout),
    ] {
        if value.enabled().is_none() {
            fault(format!("timeouts.{name}: must be more than 0"));
        }
    }
    if timeouts.discovery.get().as_millis() > 1_000 {
        fault("timeouts.discovery: at most 1s".to_owned());
    }
    let limits = &config.limits;
    if !(8 * 1024..=1024 * 1024).contains(&limits.header_bytes) {
        fault("limits.header_bytes: must be 8192 to 1048576".to_owned());
    }
    for (name, value) in [
        ("connections", limits.connections),
        ("endpoints_per_service", limits.endpoints_per_service.into()),
        ("streams_per_connection", limits.streams_per_connection),
        ("destinations", limits.destinations),
        ("dns_queries", limits.dns_queries.into()),
    ] {
        if value == 0 {
            fault(format!("limits.{name}: must be at least 1"));
        }
    }
    if config.drain.max < config.drain.min {
        fault("drain.max: must not be less than drain.min".to_owned());
    }
    if config.log.level.parse::<tracing_subscriber::EnvFilter>().is_err() {
        fault(format!("log.level: {:?} is no level and no list of directives", config.log.level));
    }
}

/// Splits `host:port`; an IPv6 address stands in brackets.
pub(crate) fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').filter(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok())?,
        None if host.contains(':') => return None,
        None => host,
    };
    (!host.is_empty()).then_some((host, port))
}
