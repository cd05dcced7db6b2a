//! Consul's health answer, reduced to what the mesh uses.
//!
//! What whoever may register a service writes ends up here, so all of it is checked: an address must be an IP
//! address (the mesh looks up no names on behalf of a registration), must not lead to the proxy's own host or a
//! cloud's metadata server, and meta and tags have the limits that Consul documents. An instance that fails is left
//! out, counted and named with the reason; it never spoils the others.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::Deserialize;

use crate::{Error, Scope, transport::Answer};

/// Meta key of a service that says what it speaks.
const META_PROTOCOL: &str = "outrigger-protocol";
/// Meta key of a service or a node that says its zone.
const META_ZONE: &str = "zone";
/// Key under which Consul puts a service's virtual address.
const TAGGED_VIRTUAL: &str = "consul-virtual";
/// Consul's own limits for meta: 64 pairs, 128 and 512 bytes. The last serves for tags, too.
const MAX_META: usize = 64;
const MAX_META_KEY: usize = 128;
const MAX_META_VALUE: usize = 512;
/// A weight above is cut: far beyond any sensible ratio, and sums stay far from overflow.
const MAX_WEIGHT: i64 = 65_535;

/// What to ask of a service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HealthQuery {
    /// Where to look.
    pub scope: Scope,
    /// A filter expression that Consul evaluates, e.g. `"v2" in Service.Tags`.
    pub filter: Option<String>,
}

/// Instances by their key.
pub type Instances = BTreeMap<InstanceId, Instance>;

/// A health answer: the usable instances and those left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Normalised {
    /// Usable, whatever their health.
    pub instances: Instances,
    /// Left out.
    pub skipped: Vec<Skip>,
}

/// What makes an instance unique: service ids are unique at their node only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId {
    /// Datacenter.
    pub datacenter: String,
    /// Node name.
    pub node: String,
    /// Service id.
    pub service_id: String,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.datacenter, self.node, self.service_id)
    }
}

/// One instance of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Its key.
    pub id: InstanceId,
    /// Service name.
    pub service: String,
    /// Consul namespace; `None` where the server has none.
    pub namespace: Option<String>,
    /// Where it listens: the service's own address, else its node's.
    pub address: SocketAddr,
    /// Share of traffic in its present health; 0 (possible in [`Health::Warning`]) means none.
    pub weight: u32,
    /// The worst of its checks and its node's.
    pub health: Health,
    /// At most 64 pairs.
    pub meta: BTreeMap<String, String>,
    /// Sorted, at most 64.
    pub tags: Vec<String>,
    /// The virtual address that Consul gave the service.
    pub virtual_address: Option<IpAddr>,
    /// Zone, from `Locality` or the meta key `zone` of the service, else of the node.
    pub zone: Option<String>,
    /// Meta `outrigger-protocol`, lower case.
    pub protocol: Option<String>,
}

impl Instance {
    /// The region: Consul's datacenter.
    pub fn region(&self) -> &str {
        &self.id.datacenter
    }
}

/// The worst check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// All pass.
    Passing,
    /// One warns.
    Warning,
    /// One is critical.
    Critical,
    /// Somebody put the service or its node into maintenance.
    Maintenance,
}

/// An instance that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// Which.
    pub id: InstanceId,
    /// Why.
    pub reason: &'static str,
}

/// Which addresses are acceptable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AddressRules {
    pub(crate) allow_local: bool,
}

impl AddressRules {
    fn check(self, ip: IpAddr) -> Result<(), &'static str> {
        let (link_local, broadcast) = match ip {
            IpAddr::V4(v4) => (v4.is_link_local(), v4.is_broadcast()),
            IpAddr::V6(v6) => (v6.is_unicast_link_local(), false),
        };
        if ip.is_unspecified() || ip.is_multicast() || broadcast {
            Err("the address is not one host's")
        } else if self.allow_local {
            Ok(())
        } else if ip.is_loopback() {
            Err("loopback addresses are not allowed")
        } else if link_local {
            Err("link-local addresses are not allowed")
        } else {
            Ok(())
        }
    }
}

/// Consul's JSON. Unknown fields are ignored and missing ones empty, so that old and new servers both do; `null`
/// stands for empty in Go's JSON, hence the `Option`s.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry<'a> {
    #[serde(borrow)]
    node: Node<'a>,
    #[serde(borrow)]
    service: Service<'a>,
    #[serde(borrow, default)]
    checks: Option<Vec<Check<'a>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node<'a> {
    #[serde(borrow, rename = "Node")]
    name: Cow<'a, str>,
    #[serde(borrow, default)]
    address: Cow<'a, str>,
    #[serde(default)]
    datacenter: String,
    #[serde(default)]
    meta: Option<BTreeMap<String, String>>,
    #[serde(default)]
    locality: Option<Locality>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service<'a> {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Service")]
    name: String,
    #[serde(borrow, default)]
    address: Cow<'a, str>,
    #[serde(default)]
    port: i64,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    meta: Option<BTreeMap<String, String>>,
    #[serde(default)]
    weights: Option<Weights>,
    #[serde(borrow, default)]
    tagged_addresses: Option<BTreeMap<String, TaggedAddress<'a>>>,
    #[serde(default)]
    locality: Option<Locality>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TaggedAddress<'a> {
    #[serde(borrow, default)]
    address: Cow<'a, str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Weights {
    passing: i64,
    warning: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Locality {
    #[serde(default)]
    zone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check<'a> {
    #[serde(borrow, rename = "CheckID", default)]
    id: Cow<'a, str>,
    #[serde(borrow, default)]
    status: Cow<'a, str>,
}

/// Reads a health answer. `Err` where it is not a list of entries at all.
pub(crate) fn normalise(answer: &Answer, rules: AddressRules) -> Result<Normalised, Error> {
    let entries: Vec<Entry<'_>> = answer.json()?;
    let mut out = Normalised::default();
    for entry in entries {
        let id = InstanceId {
            datacenter: entry.node.datacenter.clone(),
            node: entry.node.name.to_string(),
            service_id: entry.service.id.clone(),
        };
        match instance(id.clone(), entry, rules) {
            Ok(instance) => drop(out.instances.insert(id, instance)),
            Err(reason) => out.skipped.push(Skip { id, reason }),
        }
    }
    Ok(out)
}

fn instance(id: InstanceId, entry: Entry<'_>, rules: AddressRules) -> Result<Instance, &'static str> {
    let Entry { node, service, checks } = entry;
    let parts = [&id.datacenter, &id.node, &id.service_id];
    if parts.iter().any(|part| part.len() > MAX_META_VALUE || part.chars().any(char::is_control)) {
        return Err("datacenter, node or service id is longer than 512 bytes or holds control characters");
    }
    let address = if service.address.is_empty() { &node.address } else { &service.address };
    let ip = address.parse::<IpAddr>().map_err(|_| "the address is not an IP address")?.to_canonical();
    rules.check(ip)?;
    let port = u16::try_from(service.port).map_err(|_| "the port is out of range")?;
    if port == 0 {
        return Err("there is no port");
    }
    let health = checks.iter().flatten().map(check_health).max().unwrap_or(Health::Passing);
    // Consul's default where nothing is set: 1 and 1.
    let weights = service.weights.unwrap_or(Weights { passing: 1, warning: 1 });
    let weight = if health == Health::Warning { weights.warning } else { weights.passing.max(1) };
    let meta = bounded_meta(service.meta);
    let zone = [
        service.locality.map(|locality| locality.zone),
        meta.get(META_ZONE).cloned(),
        node.locality.map(|locality| locality.zone),
        node.meta.and_then(|mut meta| meta.remove(META_ZONE)),
    ];
    let zone = zone.into_iter().flatten().find(|zone| !zone.is_empty() && zone.len() <= MAX_META_VALUE);
    let virtual_address = service
        .tagged_addresses
        .and_then(|tagged| tagged.get(TAGGED_VIRTUAL)?.address.parse::<IpAddr>().ok())
        .filter(|ip| rules.check(*ip).is_ok());
    Ok(Instance {
        id,
        service: service.name,
        namespace: service.namespace.filter(|namespace| !namespace.is_empty()),
        address: SocketAddr::new(ip, port),
        weight: u32::try_from(weight.clamp(0, MAX_WEIGHT)).unwrap_or(0),
        health,
        protocol: meta.get(META_PROTOCOL).map(|text| text.to_ascii_lowercase()),
        meta,
        tags: bounded_tags(service.tags),
        virtual_address,
        zone,
    })
}

fn check_health(check: &Check<'_>) -> Health {
    if check.id == "_node_maintenance" || check.id.starts_with("_service_maintenance:") {
        return Health::Maintenance;
    }
    match &*check.status {
        "passing" => Health::Passing,
        "warning" => Health::Warning,
        // "critical", and what a later Consul may invent.
        _ => Health::Critical,
    }
}

fn bounded_meta(meta: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let fits = |(key, value): &(String, String)| key.len() <= MAX_META_KEY && value.len() <= MAX_META_VALUE;
    meta.unwrap_or_default().into_iter().filter(fits).take(MAX_META).collect()
}

fn bounded_tags(tags: Option<Vec<String>>) -> Vec<String> {
    let mut tags = tags.unwrap_or_default();
    tags.retain(|tag| tag.len() <= MAX_META_VALUE);
    tags.sort_unstable();
    tags.dedup();
    tags.truncate(MAX_META);
    tags
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;
