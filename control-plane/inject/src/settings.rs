//! What holds for every pod of a mesh, until a pod's annotations say otherwise.

use std::fmt;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{annotations, quantity};

/// The mesh that pods are injected for.
#[derive(Debug, Clone, PartialEq)]
pub struct Mesh {
    /// Its trust domain.
    pub trust_domain: String,
    /// The namespace of its controller. Pods in it are never injected: they are what sidecars wait for.
    pub namespace: String,
    /// The domain of the cluster's DNS names.
    pub cluster_domain: String,
    /// The settings.
    pub settings: Settings,
}

impl Mesh {
    /// Where sidecars find the controller.
    pub(crate) fn controllers(&self) -> Vec<String> {
        if !self.settings.controller.is_empty() {
            return self.settings.controller.clone();
        }
        vec![format!("outrigger-controller.{}.svc.{}:15410", self.namespace, self.cluster_domain)]
    }
}

/// The settings of the injector, and the defaults of what a pod's annotations can say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Settings {
    /// The sidecar's image.
    pub image: String,
    /// When the node pulls it.
    pub image_pull_policy: PullPolicy,
    /// Who redirects a pod's traffic.
    pub mode: Mode,
    /// Where sidecars find controllers, `host:port` each. Empty: the Service of the controller in the mesh's namespace.
    pub controller: Vec<String>,
    /// What a sidecar asks of its node.
    pub resources: Resources,
    /// The sidecar's log: a level, or directives such as `info,outrigger_proxy::dns=debug`.
    pub log_level: String,
    /// The form of its lines.
    pub log_format: LogFormat,
    /// Worker threads of a sidecar. Unset: its CPU limit rounded up; 1 where there is none.
    pub concurrency: Option<u16>,
    /// Connections to these ports of a pod go past its sidecar.
    #[schemars(with = "Vec<String>")]
    pub skip_inbound_ports: Vec<PortRange>,
    /// Connections from a pod to these ports go past its sidecar.
    #[schemars(with = "Vec<String>")]
    pub skip_outbound_ports: Vec<PortRange>,
    /// Connections from a pod to these addresses go past its sidecar.
    #[schemars(with = "Vec<String>")]
    pub skip_outbound_cidrs: Vec<IpNet>,
    /// Ports whose bytes are never looked at: protocols in which the server speaks first.
    pub opaque_ports: Vec<u16>,
}

impl Default for Settings {
    fn default() -> Self {
        let quantity = |text: &str| Some(text.to_owned());
        Self {
            image: concat!("outrigger-proxy:", env!("CARGO_PKG_VERSION")).to_owned(),
            image_pull_policy: PullPolicy::IfNotPresent,
            mode: Mode::Init,
            controller: Vec::new(),
            // No CPU limit: a sidecar that is throttled is latency for its workload. A memory limit: a leak must end in
            // one pod, not in a node.
            resources: Resources {
                requests: Quantities { cpu: quantity("100m"), memory: quantity("64Mi") },
                limits: Quantities { cpu: None, memory: quantity("256Mi") },
            },
            log_level: "info".to_owned(),
            log_format: LogFormat::Json,
            concurrency: None,
            skip_inbound_ports: Vec::new(),
            skip_outbound_ports: Vec::new(),
            skip_outbound_cidrs: Vec::new(),
            opaque_ports: Vec::new(),
        }
    }
}

impl Settings {
    /// Every fault that the types cannot show, as `FIELD: WHAT`.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.image.trim().is_empty() || self.image.contains(char::is_whitespace) {
            faults.push(format!("image: {:?} names no image", self.image));
        }
        for (index, address) in self.controller.iter().enumerate() {
            if !address
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            {
                faults.push(format!("controller[{index}]: {address:?} is not of the form host:port"));
            }
        }
        let resources = &self.resources;
        for (name, value) in [
            ("requests.cpu", &resources.requests.cpu),
            ("requests.memory", &resources.requests.memory),
            ("limits.cpu", &resources.limits.cpu),
            ("limits.memory", &resources.limits.memory),
        ] {
            if let Some(value) = value
                && quantity::nanos(value).is_none_or(|nanos| nanos == 0)
            {
                faults
                    .push(format!("resources.{name}: {value:?} is no quantity above 0, as in 100m or 64Mi"));
            }
        }
        if let Err(error) = annotations::log_level(&self.log_level) {
            faults.push(format!("log_level: {error}"));
        }
        if let Some(threads) = self.concurrency
            && let Err(error) = annotations::threads(&threads.to_string())
        {
            faults.push(format!("concurrency: {error}"));
        }
        if self.opaque_ports.contains(&0) {
            faults.push("opaque_ports: 0 is no port".to_owned());
        }
        faults
    }
}

/// Who redirects a pod's traffic to its sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// An init container, which needs `NET_ADMIN` in each pod.
    Init,
    /// The node's CNI plugin.
    Cni,
}

/// When a node pulls an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PullPolicy {
    /// At each start.
    Always,
    /// When the node lacks it.
    IfNotPresent,
    /// Never.
    Never,
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

/// What a container asks of its node, in Kubernetes' own form.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Resources {
    /// What is kept free for it.
    pub requests: Quantities,
    /// What it cannot go beyond.
    pub limits: Quantities,
}

/// Amounts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Quantities {
    /// Of cores.
    pub cpu: Option<String>,
    /// Of bytes.
    pub memory: Option<String>,
}

/// A port, or a range of ports: `8080` or `9000-9100`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl std::str::FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (annotations::port(first), annotations::port(last)) {
            (Ok(first), Ok(last)) if first <= last => Ok(Self { first, last }),
            _ => Err(format!("{} is no port and no range such as 9000-9100", annotations::shown(text))),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return write!(f, "{}", self.first);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A single port is a number to whoever writes YAML.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Port(u16),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Port(port) => port.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}
