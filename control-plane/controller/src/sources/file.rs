//! A watched directory of service files: a catalog without any other server.
//!
//! The directory is polled: a look at a few hundred files each second costs nothing measurable, and works on every
//! file system, through symbolic links that are swapped, and when the directory itself is replaced.
//!
//! Each file stands for itself. One that is half written, unreadable or wrong keeps what it last said and is reported
//! with file, line and reason; one that is gone takes its services with it; a directory that cannot be listed changes
//! nothing. A change is read when the file has been left alone for [`SETTLE`], because YAML that was cut off at the
//! end of a line is valid YAML.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_api::v1::{Health, Protocol};
use outrigger_certs::SpiffeId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_saphyr::Spanned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Fault, Instance, MAX_FAULTS, Reach, ServiceKey, ServicePort, Snapshot, Source, SourceService, Sync,
};
use crate::config::Span;

/// How long a file must have been left alone before it is read.
const SETTLE: Duration = Duration::from_millis(250);
/// How long after its last change a file's time stamp is not trusted to show the next one (coarse clocks).
const RACY: Duration = Duration::from_secs(3);
/// Bytes of one file: some ten thousand endpoints.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Labels of one endpoint: as many as Consul's meta has.
const MAX_LABELS: usize = 64;
/// Files of the directory.
const MAX_FILES: usize = 10_000;

/// The section `file` of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The directory whose `*.yaml`, `*.yml` and `*.json` files describe services. Unset: no file source.
    pub directory: Option<PathBuf>,
    /// How often the directory is looked at.
    pub poll_interval: Span,
}

impl Default for Config {
    fn default() -> Self {
        Self { directory: None, poll_interval: Span(Duration::from_secs(1)) }
    }
}

/// One document of a service file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Document {
    #[expect(dead_code, reason = "there is one kind; its name is checked by parsing it")]
    kind: DocumentKind,
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default)]
    ports: Vec<Port>,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize, JsonSchema)]
enum DocumentKind {
    Service,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[expect(clippy::struct_field_names, reason = "the names are those of the file")]
struct Port {
    /// What clients dial.
    port: u16,
    #[serde(default)]
    name: String,
    #[serde(default)]
    protocol: ProtocolName,
    /// The port at the endpoints; `port` where it is not given.
    target_port: Option<u16>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Endpoint {
    address: IpAddr,
    /// The port at this endpoint, for a service with one port or none listed.
    port: Option<u16>,
    /// Service port -> port at this endpoint, for a service with several.
    #[serde(default)]
    ports: BTreeMap<u16, u16>,
    weight: Option<u16>,
    #[serde(default)]
    health: HealthName,
    /// The SPIFFE id of the workload; without it the endpoint is plaintext until its sidecar claims it.
    identity: Option<String>,
    #[serde(default)]
    region: String,
    #[serde(default)]
    zone: String,
    /// What policies select the workload by.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
enum ProtocolName {
    #[default]
    #[serde(skip)]
    Unspecified,
    #[serde(rename = "HTTP1", alias = "http1")]
    Http1,
    #[serde(rename = "HTTP2", alias = "http2")]
    Http2,
    #[serde(rename = "GRPC", alias = "grpc")]
    Grpc,
    #[serde(rename = "TCP", alias = "tcp")]
    Tcp,
}

#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
enum HealthName {
    #[default]
    #[serde(alias = "healthy")]
    Healthy,
    #[serde(alias = "degraded")]
    Degraded,
    #[serde(alias = "draining")]
    Draining,
    #[serde(alias = "unhealthy")]
    Unhealthy,
}

fn default_namespace() -> String {
    ServiceKey::DEFAULT_NAMESPACE.to_owned()
}

/// Starts to watch the directory. `None` where none is configured.
pub fn spawn(config: &Config, stop: CancellationToken) -> Option<Source> {
    let directory = config.directory.clone()?;
    let (sender, snapshots) = watch::channel(Arc::default());
    tokio::spawn(watch_directory(directory, config.poll_interval.0, sender, stop));
    Some(Source { name: "file".into(), snapshots })
}

/// The JSON schema of one document.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(Document)
}

async fn watch_directory(
    directory: PathBuf,
    interval: Duration,
    sender: watch::Sender<Arc<Snapshot>>,
    stop: CancellationToken,
) {
    let mut directory = Directory::new(directory);
    loop {
        // The file system may hang (NFS): not on a thread that serves proxies.
        let polled = tokio::task::spawn_blocking(move || {
            let again = directory.poll(SystemTime::now());
            (directory, again)
        });
        let again;
        match polled.await {
            Ok((polled, soon)) => (directory, again) = (polled, soon),
            Err(error) => {
                tracing::error!(%error, "the file source failed and has stopped; its last snapshot stands");
                return;
            }
        }
        let snapshot = directory.snapshot();
        sender.send_if_modified(|held| {
            let changed = **held != snapshot;
            if changed {
                *held = Arc::new(snapshot);
            }
            changed
        });
        let wait = if again { interval.min(SETTLE) } else { interval };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// What is known of the directory.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Every file was read well, at least once since the start.
    complete: bool,
    unlisted: Option<(SystemTime, String)>,
}

/// What is known of one file.
#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    content: Option<Vec<u8>>,
    /// The last good; `None` if there never was one.
    services: Option<Vec<Arc<SourceService>>>,
    fault: Option<Fault>,
}

#[derive(Debug, Clone, PartialEq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
}

impl Directory {
    fn new(path: PathBuf) -> Self {
        Self { path, files: BTreeMap::new(), complete: false, unlisted: None }
    }

    /// Looks once. `true`: look again soon, a file is being written.
    fn poll(&mut self, now: SystemTime) -> bool {
        let paths = match list(&self.path) {
            Ok(paths) => paths,
            Err(error) => {
                if self.unlisted.is_none() {
                    tracing::warn!(directory = %self.path.display(), %error, "cannot list the directory; keeping what it held");
                }
                let since = self.unlisted.take().map_or(now, |(since, _)| since);
                let reason = format!("cannot list {}: {error}", self.path.display());
                self.unlisted = Some((since, reason));
                return false;
            }
        };
        self.unlisted = None;
        self.files.retain(|path, _| paths.binary_search(path).is_ok());
        let mut again = false;
        for path in paths {
            let file = self.files.entry(path.clone()).or_default();
            let before = file.fault.clone();
            again |= file.poll(&path, now);
            if let Some(fault) = &file.fault
                && file.fault != before
            {
                tracing::warn!(
                    file = fault.subject,
                    reason = fault.reason,
                    "service file not used; keeping what it last said"
                );
            }
        }
        // At the start a file that cannot be read may hold anything, among it what proxies use right now: until it was
        // read once, nothing is said not to exist. A broken file that comes later never was part of the picture.
        self.complete |= self.files.values().all(|file| file.services.is_some());
        again
    }

    fn snapshot(&self) -> Snapshot {
        let mut services: BTreeMap<ServiceKey, Arc<SourceService>> = BTreeMap::new();
        let mut faults: Vec<Fault> = Vec::new();
        for (path, file) in &self.files {
            faults.extend(file.fault.clone());
            for service in file.services.iter().flatten() {
                if services.contains_key(&service.key) {
                    faults.push(Fault {
                        subject: path.display().to_string(),
                        reason: format!("service `{}` is in an earlier file too, which counts", service.key),
                    });
                } else {
                    services.insert(service.key.clone(), Arc::clone(service));
                }
            }
        }
        faults.truncate(MAX_FAULTS);
        let sync = match &self.unlisted {
            _ if !self.complete => Sync::Never,
            Some((since, reason)) => Sync::Degraded { since: *since, reason: reason.clone() },
            None => Sync::Synced,
        };
        Snapshot { services, sync, faults, ..Snapshot::default() }
    }
}

impl File {
    fn poll(&mut self, path: &Path, now: SystemTime) -> bool {
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) => {
                self.stamp = None;
                self.fault = Some(fault(path, None, format!("cannot be read: {error}")));
                return false;
            }
        };
        let stamp = Stamp { modified: metadata.modified().unwrap_or(now), length: metadata.len() };
        let age = now.duration_since(stamp.modified).unwrap_or(RACY);
        if self.stamp.as_ref() == Some(&stamp) && age > RACY {
            return false;
        }
        if age < SETTLE {
            return true;
        }
        if stamp.length > MAX_FILE_BYTES {
            self.fault = Some(fault(path, None, format!("larger than {MAX_FILE_BYTES} bytes")));
            self.stamp = Some(stamp);
            return false;
        }
        match std::fs::read(path) {
            Ok(content) => {
                self.stamp = Some(stamp);
                if self.content.as_ref() != Some(&content) {
                    match parse(path, &content) {
                        Ok(services) => {
                            self.services = Some(keep_unchanged(self.services.take(), services));
                            self.fault = None;
                        }
                        Err(fault) => self.fault = Some(fault),
                    }
                    self.content = Some(content);
                }
            }
            Err(error) => {
                self.stamp = None;
                self.fault = Some(fault(path, None, format!("cannot be read: {error}")));
            }
        }
        false
    }
}

/// The catalog compares pointers first.
fn keep_unchanged(old: Option<Vec<Arc<SourceService>>>, new: Vec<SourceService>) -> Vec<Arc<SourceService>> {
    let old = old.unwrap_or_default();
    new.into_iter()
        .map(|service| match old.iter().find(|held| ***held == service) {
            Some(held) => Arc::clone(held),
            None => Arc::new(service),
        })
        .collect()
}

fn list(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let ours =
            path.extension().is_some_and(|ext| ["yaml", "yml", "json"].iter().any(|known| ext == *known));
        if ours && !hidden {
            paths.push(path);
        }
    }
    if paths.len() > MAX_FILES {
        return Err(std::io::Error::other(format!("more than {MAX_FILES} files")));
    }
    paths.sort();
    Ok(paths)
}

fn fault(path: &Path, line: Option<u64>, reason: String) -> Fault {
    let subject = match line {
        Some(line) => format!("{}:{line}", path.display()),
        None => path.display().to_string(),
    };
    Fault { subject, reason }
}

fn parse(path: &Path, content: &[u8]) -> Result<Vec<SourceService>, Fault> {
    let text = std::str::from_utf8(content)
        .map_err(|error| fault(path, None, format!("not UTF-8 from byte {}", error.valid_up_to())))?;
    let documents: Vec<Spanned<Document>> = serde_saphyr::from_multiple(text).map_err(|error| {
        let line = error.location().map(|location| location.line());
        fault(path, line, error.without_snippet().to_string())
    })?;
    if documents.is_empty() {
        let reason = "holds no document; delete the file to remove its services";
        return Err(fault(path, None, reason.to_owned()));
    }
    let mut services: Vec<SourceService> = Vec::new();
    for document in documents {
        let line = Some(document.referenced.line());
        let name = document.value.name.clone();
        let service = service(document.value)
            .map_err(|reason| fault(path, line, format!("service `{}`: {reason}", name.escape_debug())))?;
        if services.iter().any(|other| other.key == service.key) {
            return Err(fault(path, line, format!("service `{}` is in this file twice", service.key)));
        }
        services.push(service);
    }
    Ok(services)
}

fn service(document: Document) -> Result<SourceService, String> {
    let key = ServiceKey::new(&document.name, &document.namespace).map_err(|error| error.to_string())?;
    for (index, port) in document.ports.iter().enumerate() {
        if port.port == 0 || port.target_port == Some(0) {
            return Err("a port is 1 to 65535".to_owned());
        }
        if document.ports[..index].iter().any(|other| other.port == port.port) {
            return Err(format!("port {} is listed twice", port.port));
        }
    }
    let mut instances: Vec<Instance> = Vec::new();
    for endpoint in document.endpoints {
        let address = endpoint.address;
        let instance =
            instance(&document.ports, endpoint).map_err(|reason| format!("endpoint {address}: {reason}"))?;
        instances.push(instance);
    }
    instances.sort_by(|a, b| a.id.cmp(&b.id));
    if let Some(pair) = instances.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(format!("endpoint {} is listed twice", pair[0].id));
    }
    let ports = document
        .ports
        .into_iter()
        .map(|port| ServicePort { port: port.port, name: port.name, protocol: port.protocol.into() })
        .collect();
    Ok(SourceService {
        key,
        ports,
        protocol: Protocol::Unspecified,
        virtual_addresses: Vec::new(),
        names: Vec::new(),
        reach: Reach::default(),
        instances,
    })
}

fn instance(ports: &[Port], endpoint: Endpoint) -> Result<Instance, String> {
    if let Some(identity) = &endpoint.identity {
        identity.parse::<SpiffeId>().map_err(|error| format!("identity: {error}"))?;
    }
    let mut targets: BTreeMap<u16, u16> =
        ports.iter().map(|port| (port.port, port.target_port.unwrap_or(port.port))).collect();
    match (endpoint.port, ports) {
        (None, []) => return Err("needs a `port`, because the service lists no ports".to_owned()),
        (None, _) => {}
        (Some(port), []) => drop(targets.insert(0, port)),
        (Some(port), [only]) => drop(targets.insert(only.port, port)),
        (Some(_), _) => {
            return Err("the service has several ports: use `ports: {<service port>: <port>}`".to_owned());
        }
    }
    for (port, target) in endpoint.ports {
        if !targets.contains_key(&port) || port == 0 {
            return Err(format!("ports: {port} is no port of the service"));
        }
        targets.insert(port, target);
    }
    if endpoint.labels.len() > MAX_LABELS {
        return Err(format!("more than {MAX_LABELS} labels"));
    }
    if targets.values().any(|port| *port == 0) {
        return Err("a port is 1 to 65535".to_owned());
    }
    let listed: Vec<String> = targets.values().map(u16::to_string).collect();
    Ok(Instance {
        id: format!("{}/{}", endpoint.address, listed.join(",")),
        address: endpoint.address,
        ports: targets,
        weight: endpoint.weight.unwrap_or(1).max(1).into(),
        health: endpoint.health.into(),
        identity: endpoint.identity,
        region: endpoint.region,
        zone: endpoint.zone,
        node: Arc::default(),
        labels: endpoint.labels.into(),
    })
}

impl From<ProtocolName> for Protocol {
    fn from(name: ProtocolName) -> Self {
        match name {
            ProtocolName::Unspecified => Self::Unspecified,
            ProtocolName::Http1 => Self::Http1,
            ProtocolName::Http2 => Self::Http2,
            ProtocolName::Grpc => Self::Grpc,
            ProtocolName::Tcp => Self::Tcp,
        }
    }
}

impl From<HealthName> for Health {
    fn from(name: HealthName) -> Self {
        match name {
            HealthName::Healthy => Self::Healthy,
            HealthName::Degraded => Self::Degraded,
            HealthName::Draining => Self::Draining,
            HealthName::Unhealthy => Self::Unhealthy,
        }
    }
}

#[cfg(test)]
mod tests;
