//! The controller's configuration: a YAML file, then environment variables over it.
//!
//! Every field has a default, so that a field can be judged alone, against an otherwise valid configuration: that is how
//! all faults are listed and not only the first. The variables are derived from the fields, `OUTRIGGER_` and the path
//! in upper case joined by `_`, so that none can be forgotten.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use outrigger_certs::{SpiffeId, TrustDomain};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{injector, kubernetes, sources};

/// The configuration of `outrigger-controller`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The name under which this mesh's roots vouch for identities. Cannot change while workloads run.
    pub trust_domain: String,
    /// The namespace of the controller's own identity.
    pub mesh_namespace: String,
    /// Where the CA's key, the join tokens, claims and virtual addresses are kept. One controller only.
    pub data_dir: PathBuf,
    /// Discovery and certificates, for sidecars.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// The API, for people. Loopback only.
    #[schemars(with = "String")]
    pub api_listen: SocketAddr,
    /// `/metrics`, `/live`, `/ready`.
    #[schemars(with = "String")]
    pub metrics_listen: SocketAddr,
    /// What is logged, and how.
    pub log: Log,
    /// Addresses that belong to the mesh: inside them an address that cannot be resolved is refused, never passed.
    #[schemars(with = "Vec<String>")]
    pub mesh_cidrs: Vec<IpNet>,
    /// What proxies do with connections that leave the mesh. This, `inbound` and `mtls` hold until a `MeshDefaults` says
    /// otherwise.
    pub outbound: Outbound,
    /// What becomes of requests to workloads that no `AccessPolicy` is about.
    pub inbound: Inbound,
    /// Whether workloads take plaintext beside mutual TLS.
    pub mtls: Mtls,
    /// Take endpoints on loopback addresses: for demonstrations and tests on one host.
    pub allow_loopback_endpoints: bool,
    /// How long a workload's certificate lives; it is renewed from a third of that.
    pub leaf_life: Span,
    /// Certificates signed a second, in all.
    pub sign_per_second: u32,
    /// Certificates signed a second for one identity, which all replicas of a workload share.
    pub sign_per_identity_per_second: u32,
    /// Connections of proxies.
    pub max_connections: usize,
    /// Names that one proxy can ask for.
    pub max_subscriptions: usize,
    /// A CA to bring. Unset: the controller makes one at its first start and keeps it in `data_dir`.
    pub ca: Ca,
    /// Services from a directory.
    pub file: sources::file::Config,
    /// Services from Consul.
    pub consul: sources::consul::Config,
    /// Services, identities and more from Kubernetes.
    pub kubernetes: kubernetes::Config,
    /// The webhook that puts sidecars into pods: `--role injector`.
    pub injector: injector::Config,
    /// Where policies are kept.
    pub policies: Policies,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            trust_domain: "outrigger.local".to_owned(),
            mesh_namespace: "outrigger-system".to_owned(),
            data_dir: "/var/lib/outrigger".into(),
            listen: SocketAddr::from(([0, 0, 0, 0], 15410)),
            api_listen: SocketAddr::from(([127, 0, 0, 1], 15480)),
            metrics_listen: SocketAddr::from(([0, 0, 0, 0], 15490)),
            log: Log::default(),
            mesh_cidrs: Vec::new(),
            outbound: Outbound::Allow,
            inbound: Inbound::Allow,
            mtls: Mtls::Strict,
            allow_loopback_endpoints: false,
            leaf_life: Span(Duration::from_hours(24)),
            sign_per_second: 200,
            sign_per_identity_per_second: 50,
            max_connections: 10_000,
            max_subscriptions: 65_536,
            ca: Ca::default(),
            file: sources::file::Config::default(),
            consul: sources::consul::Config::default(),
            kubernetes: kubernetes::Config::default(),
            injector: injector::Config::default(),
            policies: Policies::default(),
        }
    }
}

/// Where policies are kept.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policies {
    /// The store.
    pub store: PolicyStore,
}

/// A store of policies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyStore {
    /// The controller's own file in `data_dir`.
    #[default]
    Embedded,
    /// Consul's key-value store under `outrigger/`, by the settings of `consul`. The token needs
    /// `key_prefix "outrigger/" { policy = "write" }`.
    Consul,
    /// Objects of the Kubernetes API, by the settings of `kubernetes`.
    Kubernetes,
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// A level, or directives of the form `info,outrigger_controller=debug`.
    pub level: String,
    /// Lines for people or for machines.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What proxies do with connections that leave the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Outbound {
    /// Pass them.
    Allow,
    /// Pass and log them.
    Audit,
    /// Refuse them.
    Deny,
}

/// What becomes of requests to workloads that no `AccessPolicy` is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Inbound {
    /// They pass.
    Allow,
    /// They pass and are logged.
    Audit,
    /// They are refused.
    Deny,
}

/// Whether workloads take plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mtls {
    /// No.
    Strict,
    /// Yes, beside mutual TLS: for a migration.
    Permissive,
}

/// A CA that was brought: all three files, PEM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ca {
    /// The issuing certificate, then further intermediates.
    pub certificate_file: Option<PathBuf>,
    /// Its key.
    pub key_file: Option<PathBuf>,
    /// Every root that workloads shall trust.
    pub roots_file: Option<PathBuf>,
}

/// A length of time: a number and `ms`, `s`, `m`, `h` or `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema)]
#[schemars(with = "String")]
pub struct Span(pub Duration);

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit);
        let millis = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => {
                return Err(format!(
                    "`{text}` is no length of time: write a number and ms, s, m, h or d, as in `24h`"
                ));
            }
        };
        let number: u64 = number.parse().map_err(|_| format!("`{text}` does not begin with a number"))?;
        let millis = number.checked_mul(millis).ok_or_else(|| format!("`{text}` is too long"))?;
        Ok(Self(Duration::from_millis(millis)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        match [(3_600_000, "h"), (60_000, "m"), (1000, "s")]
            .into_iter()
            .find(|(unit, _)| millis.is_multiple_of(*unit))
        {
            Some((unit, name)) if millis > 0 => write!(f, "{}{name}", millis / unit),
            _ => write!(f, "{millis}ms"),
        }
    }
}

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Everything that is wrong with a configuration, a line each.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is not usable:\n{}", .0.iter().map(|fault| format!("  - {fault}")).collect::<Vec<_>>().join("\n"))]
pub struct Faults(pub Vec<String>);

impl Config {
    /// Reads the YAML text of `origin` (a file's name, for messages), then the variables over it, and checks the whole.
    pub fn load(
        text: Option<(&str, &str)>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, Faults> {
        let default = serde_json::to_value(Self::default())
            .map_err(|error| Faults(vec![format!("the defaults cannot be written: {error}")]))?;
        let mut faults = Vec::new();
        let mut document = Value::Object(serde_json::Map::new());
        if let Some((origin, text)) = text {
            match serde_saphyr::from_str::<Value>(text) {
                Ok(Value::Null) => {}
                Ok(value @ Value::Object(_)) => document = value,
                Ok(_) => faults.push(format!("{origin}: not a mapping of fields")),
                Err(error) => faults.push(format!("{origin}: {}", error.without_snippet())),
            }
        }
        let mut merged = default.clone();
        collect(&document, &default, &mut Vec::new(), &mut merged, &mut faults);
        let mut leaves = Vec::new();
        leaf_paths(&default, &mut Vec::new(), &mut leaves);
        for path in leaves {
            let name = variable_name(&path);
            let Some(text) = variable(&name) else { continue };
            match from_variable(&text, &path, &default) {
                Ok(value) => set(&mut merged, &path, value),
                Err(error) => faults.push(format!("{name}: {error}")),
            }
        }
        match serde_json::from_value::<Self>(merged) {
            Ok(config) => {
                config.check(&mut faults);
                if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
            }
            Err(error) => {
                faults.push(error.to_string());
                Err(Faults(faults))
            }
        }
    }

    /// The JSON schema, with the one of service files under `$defs`.
    pub fn schema() -> Value {
        let mut schema = schemars::schema_for!(Self).to_value();
        schema["$defs"]["ServiceFile"] = sources::file::schema().to_value();
        schema
    }

    /// The trust domain; it was checked.
    pub fn trust_domain(&self) -> Result<TrustDomain, outrigger_certs::IdentityError> {
        self.trust_domain.parse()
    }

    /// The controller's identity; its parts were checked.
    pub fn identity(&self) -> Result<SpiffeId, outrigger_certs::IdentityError> {
        SpiffeId::controller(&self.trust_domain()?, &self.mesh_namespace)
    }

    fn check(&self, faults: &mut Vec<String>) {
        if let Err(error) = self.trust_domain() {
            faults.push(format!("trust_domain: {error}"));
        } else if let Err(error) = self.identity() {
            faults.push(format!("mesh_namespace: {error}"));
        }
        if !self.api_listen.ip().is_loopback() {
            faults.push(
                "api_listen: the API has no TLS and is for loopback only, as in 127.0.0.1:15480".to_owned(),
            );
        }
        let life = self.leaf_life.0;
        if life < Duration::from_secs(10) || life > Duration::from_hours(24 * 90) {
            faults.push("leaf_life: 10s to 90d".to_owned());
        }
        if self.file.poll_interval.0 < Duration::from_millis(50) {
            faults.push("file.poll_interval: at least 50ms".to_owned());
        }
        for (name, value) in [
            ("sign_per_second", u64::from(self.sign_per_second)),
            ("sign_per_identity_per_second", u64::from(self.sign_per_identity_per_second)),
            ("max_connections", self.max_connections as u64),
            ("max_subscriptions", self.max_subscriptions as u64),
        ] {
            if value == 0 || value > 1_000_000 {
                faults.push(format!("{name}: 1 to 1000000"));
            }
        }
        let ca = [&self.ca.certificate_file, &self.ca.key_file, &self.ca.roots_file];
        if ca.iter().any(|file| file.is_some()) && ca.iter().any(|file| file.is_none()) {
            faults.push("ca: certificate_file, key_file and roots_file belong together".to_owned());
        }
        for (index, address) in self.consul.addresses.iter().enumerate() {
            if let Err(error) = address.parse::<outrigger_consul::AgentAddress>() {
                faults.push(format!("consul.addresses[{index}]: {error}"));
            }
        }
        if sources::ServiceKey::new("service", &self.consul.default_namespace).is_err() {
            faults.push("consul.default_namespace: 1 to 63 letters, digits and `-`".to_owned());
        }
        if self.policies.store == PolicyStore::Consul && self.consul.addresses.is_empty() {
            faults.push("policies.store: `consul` needs consul.addresses".to_owned());
        }
        if self.policies.store == PolicyStore::Kubernetes && !self.kubernetes.enabled {
            faults.push("policies.store: `kubernetes` needs kubernetes.enabled".to_owned());
        }
        if self.consul.cert_file.is_some() != self.consul.key_file.is_some() {
            faults.push("consul: cert_file and key_file belong together".to_owned());
        }
        faults.extend(self.injector.settings.faults().into_iter().map(|fault| format!("injector.{fault}")));
        if let Err(error) = self.log.level.parse::<tracing_subscriber::EnvFilter>() {
            faults.push(format!("log.level: {error}"));
        }
    }
}

/// Copies each field of the document that is valid alone, and lists what is wrong with the others.
fn collect(
    document: &Value,
    default: &Value,
    path: &mut Vec<String>,
    merged: &mut Value,
    faults: &mut Vec<String>,
) {
    let (Value::Object(fields), Value::Object(known)) = (document, at(default, path)) else { return };
    for (name, value) in fields {
        path.push(name.clone());
        let shown = path.join(".");
        match known.get(name) {
            None => {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                faults.push(format!("{shown}: no such field; there are {}", names.join(", ")));
            }
            Some(Value::Object(_)) if value.is_object() => collect(value, default, path, merged, faults),
            Some(Value::Object(_)) if value.is_null() => {}
            Some(_) => match judge(default, path, value) {
                Ok(()) => set(merged, path, value.clone()),
                Err(error) => faults.push(format!("{shown}: {error}")),
            },
        }
        path.pop();
    }
}

/// Whether a configuration with nothing but this field set can be read.
fn judge(default: &Value, path: &[String], value: &Value) -> Result<(), String> {
    let mut trial = default.clone();
    set(&mut trial, path, value.clone());
    serde_json::from_value::<Config>(trial).map(drop).map_err(|error| error.to_string())
}

fn from_variable(text: &str, path: &[String], default: &Value) -> Result<Value, String> {
    let parsed = || serde_saphyr::from_str::<Value>(text).unwrap_or(Value::String(text.to_owned()));
    let listed = || text.split(',').map(|item| Value::String(item.trim().to_owned())).collect();
    let mut first_error = None;
    for value in [Value::String(text.to_owned()), parsed(), listed()] {
        match judge(default, path, &value) {
            Ok(()) => return Ok(value),
            Err(error) => _ = first_error.get_or_insert(error),
        }
    }
    Err(first_error.unwrap_or_default())
}

fn variable_name(path: &[String]) -> String {
    format!("OUTRIGGER_{}", path.join("_").to_ascii_uppercase())
}

fn leaf_paths(value: &Value, path: &mut Vec<String>, leaves: &mut Vec<Vec<String>>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                path.push(name.clone());
                leaf_paths(value, path, leaves);
                path.pop();
            }
        }
        _ => leaves.push(path.clone()),
    }
}

fn at<'a>(value: &'a Value, path: &[String]) -> &'a Value {
    path.iter().fold(value, |value, name| &value[name])
}

fn set(value: &mut Value, path: &[String], new: Value) {
    *path.iter().fold(value, |value, name| &mut value[name]) = new;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_variables(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn the_example_holds_every_field_with_its_default() {
        let text = include_str!("../examples/controller.yaml");
        let config = Config::load(Some(("controller.yaml", text)), no_variables).unwrap();
        let example: Value = serde_saphyr::from_str(text).unwrap();
        let (mut shown, mut all) = (Vec::new(), Vec::new());
        leaf_paths(&example, &mut Vec::new(), &mut shown);
        leaf_paths(&serde_json::to_value(Config::default()).unwrap(), &mut Vec::new(), &mut all);
        shown.sort();
        all.sort();
        assert_eq!(shown, all, "the example shows each field");
        assert_eq!(config.trust_domain, "outrigger.local");
    }

    #[test]
    fn every_fault_is_listed_not_only_the_first() {
        let text = "trust_domain: Bad!\nlisten: nowhere\nleaf_life: 1y\nfile: {directory: /x, colour: red}\nmtls: maybe\nfoo: 1\napi_listen: 0.0.0.0:1\nconsul: {addresses: ['ftp://consul']}\n";
        let faults = Config::load(Some(("c.yaml", text)), |name| {
            (name == "OUTRIGGER_MAX_CONNECTIONS").then(|| "many".to_owned())
        })
        .unwrap_err()
        .0;
        for field in [
            "trust_domain",
            "listen",
            "leaf_life",
            "file.colour",
            "consul.addresses[0]",
            "mtls",
            "foo",
            "api_listen",
            "OUTRIGGER_MAX_CONNECTIONS",
        ] {
            assert_eq!(
                faults.iter().filter(|fault| fault.starts_with(&format!("{field}:"))).count(),
                1,
                "{field}: {faults:#?}"
            );
        }
        assert_eq!(faults.len(), 9, "{faults:#?}");
    }

    #[test]
    fn variables_reach_every_field_and_win() {
        let variables = |name: &str| {
            let value = match name {
                "OUTRIGGER_TRUST_DOMAIN" => "example.org",
                "OUTRIGGER_MESH_CIDRS" => "10.0.0.0/8, fd00::/8",
                "OUTRIGGER_FILE_DIRECTORY" => "/srv/services",
                "OUTRIGGER_LOG_FORMAT" => "json",
                "OUTRIGGER_ALLOW_LOOPBACK_ENDPOINTS" => "true",
                "OUTRIGGER_MAX_SUBSCRIPTIONS" => "7",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let config =
            Config::load(Some(("c.yaml", "trust_domain: file.example\nleaf_life: 90m")), variables).unwrap();
        assert_eq!(config.trust_domain, "example.org");
        assert_eq!(config.mesh_cidrs.len(), 2);
        assert_eq!(config.file.directory.unwrap(), PathBuf::from("/srv/services"));
        assert_eq!((config.log.format, config.max_subscriptions), (LogFormat::Json, 7));
        assert!(config.allow_loopback_endpoints);
        assert_eq!(config.leaf_life.to_string(), "90m");
    }

    #[test]
    fn a_bad_file_is_told_with_its_line() {
        let faults = Config::load(Some(("c.yaml", "a: 1\nb: [1\n")), no_variables).unwrap_err().0;
        assert!(faults[0].contains("line"), "{faults:?}");
        assert!(Config::load(Some(("c.yaml", "")), no_variables).is_ok());
    }
}
