//! What feeds the catalog.
//!
//! A source owns a task that reads something (a directory, Consul) and publishes what it knows as one immutable
//! [`Snapshot`] over a `watch` channel: readers always see the newest whole picture and can never slow the source down.
//! Services are behind `Arc`s, so that a source with thousands of them republishes by cloning pointers, and the catalog
//! finds what changed by comparing pointers first and values second.
//!
//! The rules of every source:
//! - Last good wins. What could not be read is not gone: the service stays in the next snapshot as it was, and
//!   [`Sync`] or [`Snapshot::faults`] says what is wrong. A service leaves a snapshot only because a complete answer
//!   no longer has it.
//! - A snapshot says [`Sync::Synced`] only when each of its services, and the absence of every other one, comes from a
//!   complete answer. "There is no such service" is told to proxies only while every source says so.
//! - Publish only what changed: keep the `Arc` of an unchanged service, and skip a snapshot that equals the last.
//!
//! A source module has a `Config` (every field defaulted, `deny_unknown_fields`) that is one section of the
//! controller's configuration, and a `spawn` that returns a [`Source`] at once and never waits for the first answer:
//! `pub fn spawn(config: Config, stop: CancellationToken) -> anyhow::Result<Source>`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use outrigger_api::v1::{Health, Protocol};
use outrigger_policy::kinds::Probe;
use tokio::sync::watch;

pub mod consul;
pub mod file;
pub mod kubernetes;
pub(crate) mod policy;

/// A running source, as the catalog sees it.
#[derive(Debug, Clone)]
pub struct Source {
    /// Short, stable, unique among the sources of a controller: `file`, `consul`. Shown to people.
    pub name: Arc<str>,
    /// Always holds the newest snapshot; starts with [`Snapshot::default`].
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
}

/// All that one source knows at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Every service of the source. A service without instances is a service; one that is not here does not exist.
    pub services: BTreeMap<ServiceKey, Arc<SourceService>>,
    /// Every workload that can be dialled at its own address, whether or not a service leads to it, by
    /// [`ServiceKey::of_workload`]. Only of sources that know them (Kubernetes).
    pub workloads: Arc<BTreeMap<ServiceKey, Arc<Workload>>>,
    /// Addresses that belong to the mesh because the source says so, beside the configured ones.
    pub ranges: Arc<BTreeSet<IpNet>>,
    /// How far the snapshot can be trusted.
    pub sync: Sync,
    /// What is wrong with single parts (a file, a service) while the rest is read well; at most [`MAX_FAULTS`].
    pub faults: Vec<Fault>,
}

/// More faults than this are not listed: nobody reads them, and a hostile catalog could make millions.
pub const MAX_FAULTS: usize = 100;

/// How far a snapshot can be trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Sync {
    /// Nothing complete was read since the controller started. Absence means nothing.
    #[default]
    Never,
    /// A complete answer, as far as the source knows.
    Synced,
    /// Was synced, cannot be read now; the snapshot holds the last good. Absence means nothing.
    Degraded {
        /// Since when.
        since: SystemTime,
        /// What was tried, on what, why it failed.
        reason: String,
    },
}

/// A part of a source that could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What it is about: a file with its line, a service, an instance.
    pub subject: String,
    /// What is wrong and what to do.
    pub reason: String,
}

/// A service as one source describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceService {
    /// Its name in the mesh.
    pub key: ServiceKey,
    /// The ports that clients dial. Empty: any port, which leads to each instance's own (Consul).
    pub ports: Vec<ServicePort>,
    /// What the one port of a service without listed `ports` speaks.
    pub protocol: Protocol,
    /// Addresses at which the source says the service can be dialled (Consul's virtual addresses).
    pub virtual_addresses: Vec<IpAddr>,
    /// Complete DNS names beyond `<name>.<namespace>.mesh`, lower case, no final dot: `orders.service.consul`,
    /// `orders.service.dc1.consul`, `orders.virtual.consul`.
    pub names: Vec<String>,
    /// Which of its instances a client is led to.
    pub reach: Reach,
    /// Its workloads, sorted by `id`.
    pub instances: Vec<Instance>,
}

/// Which instances of a service a client is led to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reach {
    /// All alike, unless a policy prefers some.
    #[default]
    All,
    /// Those of its own zone as long as there are any, unless a policy says otherwise.
    OwnZone,
    /// Those of its own node, and no other.
    OwnNode,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// The port that clients dial, 1 to 65,535.
    pub port: u16,
    /// For people and policies; may be empty.
    pub name: String,
    /// A hint; unspecified is detected.
    pub protocol: Protocol,
}

/// One workload of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Unique in its service and stable over snapshots: `dc1/node-a/orders-1`.
    pub id: String,
    /// Where it listens. Host names are the source's to resolve.
    pub address: IpAddr,
    /// Service port -> port at `address`; key 0 holds for every service port that is not listed. Empty: each port leads to
    /// itself.
    pub ports: BTreeMap<u16, u16>,
    /// Relative share of traffic, 1 to 65,535.
    pub weight: u32,
    /// What the source's checks say.
    pub health: Health,
    /// The SPIFFE id that the source vouches for. `None`: plaintext until its own sidecar claims it.
    pub identity: Option<String>,
    /// May be empty.
    pub region: String,
    /// May be empty.
    pub zone: String,
    /// The node that it runs on; may be empty. For [`Reach::OwnNode`].
    pub node: Arc<str>,
    /// What policies select workloads by; at most 64. Shared, because a pod is an instance of several services.
    pub labels: Arc<BTreeMap<String, String>>,
}

/// A workload that its source knows by itself: a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// [`ServiceKey::of_workload`].
    pub key: ServiceKey,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// The SPIFFE id that the source vouches for. `None`: it has no sidecar, and is dialled in plaintext.
    pub identity: Option<String>,
    /// May be empty.
    pub region: String,
    /// May be empty.
    pub zone: String,
    /// The node that it runs on; may be empty.
    pub node: Arc<str>,
    /// What policies select workloads by.
    pub labels: Arc<BTreeMap<String, String>>,
    /// What its host asks of it, which passes whatever policies say. Only where it has a sidecar.
    pub probes: Vec<Probe>,
    /// It was told to end.
    pub terminating: bool,
}

/// `<name>.<namespace>`, lower case: the key of a service in the catalog and the name of its resource.
///
/// One shared string, because a key is stored in every index and cloned into every snapshot.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey(Arc<str>);

/// Bytes of a name: that of a pod (253, RFC 1123) and its suffix.
const MAX_NAME: usize = 260;
/// Behind the name of a workload. `_` is in no name of a Kubernetes object.
const WORKLOAD_SUFFIX: &str = "._pod";

/// Why a name cannot be a service's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot name a service: a name is 1 to 260 letters, digits, `-`, `_` and inner dots, a namespace 1 to 63 letters, digits and `-`"
)]
pub struct InvalidServiceKey(String);

impl ServiceKey {
    /// The namespace of services that have none.
    pub const DEFAULT_NAMESPACE: &'static str = "default";

    /// Checks and joins the parts; upper case becomes lower case, because the names are dialled through DNS.
    pub fn new(name: &str, namespace: &str) -> Result<Self, InvalidServiceKey> {
        let label = |s: &str, also: &[u8]| {
            !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || also.contains(&b))
        };
        let valid = name.len() <= MAX_NAME
            && namespace.len() <= 63
            && name.split('.').all(|part| label(part, b"-_"))
            && label(namespace, b"-");
        if valid {
            Ok(Self(format!("{name}.{namespace}").to_ascii_lowercase().into()))
        } else {
            // What a hostile registration may hold goes into logs: escaped and short.
            let text: String = format!("{name}.{namespace}").escape_debug().take(300).collect();
            Err(InvalidServiceKey(text))
        }
    }

    /// The name of a workload that is dialled at its own address: `<workload>._pod.<namespace>`. No service has such a name
    /// ([`ServiceKey::is_workload`]), so that none can take a workload's place.
    pub fn of_workload(name: &str, namespace: &str) -> Result<Self, InvalidServiceKey> {
        Self::new(&format!("{name}{WORKLOAD_SUFFIX}"), namespace)
    }

    /// Whether it names a workload.
    pub fn is_workload(&self) -> bool {
        self.name().ends_with(WORKLOAD_SUFFIX)
    }

    /// Parses `<name>.<namespace>`; a bare name is in namespace `default`.
    pub fn parse(text: &str) -> Result<Self, InvalidServiceKey> {
        match text.rsplit_once('.') {
            Some((name, namespace)) => Self::new(name, namespace),
            None => Self::new(text, Self::DEFAULT_NAMESPACE),
        }
    }

    /// `<name>.<namespace>`
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part before the last dot.
    pub fn name(&self) -> &str {
        self.0.rsplit_once('.').map_or(&*self.0, |(name, _)| name)
    }

    /// The part behind the last dot.
    pub fn namespace(&self) -> &str {
        self.0.rsplit_once('.').map_or(Self::DEFAULT_NAMESPACE, |(_, namespace)| namespace)
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked_and_lower_case() {
        let key = ServiceKey::new("Orders", "Shop").unwrap();
        assert_eq!((key.as_str(), key.name(), key.namespace()), ("orders.shop", "orders", "shop"));
        assert_eq!(ServiceKey::parse("web").unwrap().as_str(), "web.default");
        assert_eq!(ServiceKey::parse("a.b.c").unwrap().name(), "a.b");
        let pod = ServiceKey::of_workload("web-0", "shop").unwrap();
        assert_eq!((pod.as_str(), pod.namespace()), ("web-0._pod.shop", "shop"));
        assert!(pod.is_workload() && !key.is_workload());
        for bad in ["", ".", "a.", ".a", "a..b", "../x", "a b", "a\n.b", "a.b_c"] {
            assert!(ServiceKey::parse(bad).is_err(), "{bad:?}");
        }
        assert!(ServiceKey::new(&"a".repeat(261), "b").is_err());
    }
}
