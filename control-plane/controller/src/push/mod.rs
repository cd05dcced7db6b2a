//! Delta ADS: every proxy is told what changed in what it asked for, and nothing else.
//!
//! [`session`] is the protocol without I/O, [`fanout`] finds the streams that a change concerns, and here the two meet
//! a gRPC stream. One task per stream: a client that does not read or does not acknowledge stops its own task only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use outrigger_api::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use outrigger_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use outrigger_policy::Key;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::compile::Kind;
use crate::mesh::{Mesh, Viewer};
use crate::metrics::{KindLabel, Metrics, ReasonLabel};
use crate::server::Caller;

mod fanout;
mod session;

use fanout::Dirty;
pub(crate) use fanout::Fanout;
pub(crate) use session::Taken;
use session::{Session, TypeView};

/// Changes reach a stream at most this often, so that a flapping catalog costs a proxy ten pushes a second. Answers
/// to what the proxy itself asks are not delayed.
const CHANGE_INTERVAL: Duration = Duration::from_millis(100);
/// One response of each kind can be in flight, and a final status: the channel never fills.
const RESPONSES: usize = Kind::ALL.len() + 1;

/// The ADS service.
#[derive(Debug)]
pub(crate) struct Ads {
    mesh: Arc<Mesh>,
    proxies: Arc<Proxies>,
    metrics: Arc<Metrics>,
    max_subscriptions: usize,
    stop: CancellationToken,
}

impl Ads {
    /// Serves what `mesh` knows, at most `max_subscriptions` names to each stream, until `stop`.
    pub(crate) fn new(
        mesh: Arc<Mesh>,
        proxies: Arc<Proxies>,
        metrics: Arc<Metrics>,
        max_subscriptions: usize,
        stop: CancellationToken,
    ) -> Self {
        Self { mesh, proxies, metrics, max_subscriptions, stop }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (viewer, expires) = Caller::of(&request)?.workload("discovery")?;
        let (responses, receiver) = mpsc::channel(RESPONSES);
        let proxy = self.proxies.connect(viewer, self.max_subscriptions);
        let stream = Stream {
            mesh: Arc::clone(&self.mesh),
            metrics: Arc::clone(&self.metrics),
            proxies: Arc::clone(&self.proxies),
            proxy,
            responses,
        };
        tokio::spawn(stream.run(request.into_inner(), expires, self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct Stream {
    mesh: Arc<Mesh>,
    metrics: Arc<Metrics>,
    proxies: Arc<Proxies>,
    proxy: Arc<Proxy>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Stream {
    async fn run(
        self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        expires: Instant,
        stop: CancellationToken,
    ) {
        let viewer = &self.proxy.viewer;
        tracing::debug!(identity = %viewer.identity, peer = %viewer.address, "discovery stream opened");
        self.metrics.streams.inc();
        let mesh = Arc::clone(&self.mesh);
        mesh.entered(viewer);
        let mut watcher = mesh.fanout().watcher();
        let mut changes_from = Instant::now();
        let mut changed = false;
        let end = loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.take(request, &mut watcher),
                    Ok(None) => break None,
                    Err(status) => {
                        tracing::debug!(identity = %viewer.identity, %status, "discovery stream broke");
                        break None;
                    }
                },
                () = watcher.changed(), if !changed => changed = true,
                () = tokio::time::sleep_until(changes_from), if changed => {
                    changed = false;
                    changes_from = Instant::now() + CHANGE_INTERVAL;
                    self.proxy.session().touch(&watcher.take());
                }
                () = self.responses.closed() => break None,
                () = stop.cancelled() => break Some(Status::unavailable("the controller is stopping; reconnect")),
                () = tokio::time::sleep_until(expires) => {
                    break Some(Status::unauthenticated("the leaf of this connection has expired; reconnect with its successor"));
                }
            }
            if !self.push() {
                break None;
            }
        };
        if let Some(status) = end {
            // No client left to tell is fine.
            let _ = self.responses.try_send(Err(status));
        }
        self.metrics.streams.dec();
        self.proxies.disconnect(&self.proxy);
        mesh.left(viewer);
        tracing::debug!(identity = %viewer.identity, "discovery stream closed");
    }

    fn take(&self, request: DeltaDiscoveryRequest, watcher: &mut fanout::Watcher<'_>) {
        let identity = &self.proxy.viewer.identity;
        if let Some(node) = &request.node {
            self.proxy.set_node(&node.id, &node.user_agent_name);
        }
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            self.metrics.unknown_types.inc();
            let text: String = request.type_url.escape_debug().take(200).collect();
            tracing::warn!(%identity, type_url = text, "a proxy asks for a resource type that this controller does not know; ignored");
            return;
        };
        if kind == Kind::Inbound {
            for name in request.resource_names_subscribe.iter().filter(|name| *name != identity.as_str()) {
                let asked: String = name.escape_debug().take(300).collect();
                tracing::warn!(target: "audit", %identity, asked, "a proxy asked for the inbound configuration of another identity; refused");
                self.metrics.ads_refused.get_or_create(&ReasonLabel::new("other_inbound")).inc();
            }
        }
        let refusal = request.error_detail.as_ref().map(|status| status.message.clone());
        let effect = self.proxy.session().request(kind, request, SystemTime::now());
        watcher.watch(&effect.added, &effect.removed);
        match effect.acked {
            Some(true) => drop(self.metrics.acks.get_or_create(&KindLabel::new(kind)).inc()),
            Some(false) => {
                self.metrics.nacks.get_or_create(&KindLabel::new(kind)).inc();
                let reason: String = refusal.unwrap_or_default().escape_debug().take(500).collect();
                tracing::warn!(%identity, kind = kind.name(), reason, "a proxy refused what it was sent (NACK); it keeps what it had");
            }
            None => {}
        }
        if effect.refused > 0 {
            self.metrics
                .ads_refused
                .get_or_create(&ReasonLabel::new("subscriptions"))
                .inc_by(effect.refused as u64);
            tracing::warn!(%identity, refused = effect.refused, "subscriptions refused: over the bound of this stream, or no name");
        }
    }

    /// Sends what there is to send. `false`: the client is gone.
    fn push(&self) -> bool {
        let now = SystemTime::now();
        for kind in Kind::ALL {
            let viewer = &self.proxy.viewer;
            let response = self.proxy.session().next(kind, |name| self.mesh.answer(kind, name, viewer, now));
            let Some(response) = response else { continue };
            let label = KindLabel::new(kind);
            self.metrics.pushes.get_or_create(&label).inc();
            let resources = response.resources.len() + response.removed_resources.len();
            self.metrics.pushed_resources.get_or_create(&label).inc_by(resources as u64);
            if self.responses.try_send(Ok(response)).is_err() {
                return false;
            }
        }
        true
    }
}

/// The proxies with an open discovery stream.
#[derive(Debug, Default)]
pub(crate) struct Proxies(Mutex<Registry>);

#[derive(Debug, Default)]
struct Registry {
    next_id: u64,
    proxies: BTreeMap<u64, Arc<Proxy>>,
}

/// A proxy with an open discovery stream.
#[derive(Debug)]
struct Proxy {
    id: u64,
    viewer: Viewer,
    connected: SystemTime,
    node: Mutex<(String, String)>,
    session: Mutex<Session>,
}

/// A proxy, for people.
#[derive(Debug, serde::Serialize)]
pub(crate) struct ProxyView {
    identity: String,
    address: String,
    node: String,
    agent: String,
    /// Unix seconds.
    connected: u64,
    subscriptions: usize,
    types: BTreeMap<&'static str, TypeView>,
    claims: Vec<ClaimView>,
    /// The policies that are in what it was sent.
    policies: Vec<PolicyView>,
}

/// A policy at a proxy, for people.
#[derive(Debug, serde::Serialize)]
struct PolicyView {
    key: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// A claim, for people.
#[derive(Debug, serde::Serialize)]
struct ClaimView {
    service: String,
    address: String,
    port: u32,
    accepted: bool,
    message: String,
}

impl Proxies {
    /// Every proxy, with at most `subscriptions` of each type listed.
    pub(crate) fn view(&self, mesh: &Mesh, subscriptions: usize) -> Vec<ProxyView> {
        let proxies: Vec<_> = lock(&self.0).proxies.values().cloned().collect();
        proxies.iter().map(|proxy| proxy.view(mesh, subscriptions)).collect()
    }

    /// What became of each policy at each proxy. The name of a proxy is its node, or its identity and address.
    pub(crate) fn policies(&self) -> Vec<(String, BTreeMap<Key, Taken>)> {
        let proxies: Vec<_> = lock(&self.0).proxies.values().cloned().collect();
        proxies.iter().map(|proxy| (proxy.name(), proxy.session().policies())).collect()
    }

    fn connect(&self, viewer: Viewer, max_subscriptions: usize) -> Arc<Proxy> {
        let mut registry = lock(&self.0);
        let id = registry.next_id;
        registry.next_id += 1;
        let session = Mutex::new(Session::new(viewer.connection, max_subscriptions));
        let proxy =
            Arc::new(Proxy { id, viewer, connected: SystemTime::now(), node: Mutex::default(), session });
        registry.proxies.insert(id, Arc::clone(&proxy));
        proxy
    }

    fn disconnect(&self, proxy: &Proxy) {
        lock(&self.0).proxies.remove(&proxy.id);
    }
}

impl Proxy {
    fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.session)
    }

    fn set_node(&self, id: &str, agent: &str) {
        let short = |text: &str| text.chars().take(200).collect();
        *lock(&self.node) = (short(id), short(agent));
    }

    fn name(&self) -> String {
        let (node, _) = &*lock(&self.node);
        if node.is_empty() {
            format!("{} at {}", self.viewer.identity, self.viewer.address)
        } else {
            node.clone()
        }
    }

    fn view(&self, mesh: &Mesh, subscriptions: usize) -> ProxyView {
        let (node, agent) = lock(&self.node).clone();
        let claims = mesh.announced(self.viewer.connection).into_iter().map(|claim| ClaimView {
            service: claim.service,
            address: claim.address,
            port: claim.port,
            accepted: claim.accepted,
            message: claim.message,
        });
        let session = self.session();
        let policies = session.policies().into_iter().map(|(key, taken)| {
            let (state, reason) = match taken {
                Taken::Sent => ("sent", None),
                Taken::Accepted => ("accepted", None),
                Taken::Refused(reason) => ("refused", Some(reason.to_string())),
            };
            PolicyView { key: key.to_string(), state, reason }
        });
        let policies = policies.collect();
        ProxyView {
            identity: self.viewer.identity.to_string(),
            address: self.viewer.address.to_string(),
            node,
            agent,
            connected: self
                .connected
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            subscriptions: session.subscriptions(),
            types: session.view(subscriptions),
            claims: claims.collect(),
            policies,
        }
    }
}

// A panic in a stream's task ends that stream; what it leaves in a lock is its own session, or a whole map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
