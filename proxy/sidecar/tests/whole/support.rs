//! A controller for tests: real TLS with a CA of its own, real gRPC, and a memory of all that it was told.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::Duration,
};

use outrigger_api::{
    MESH_NAME, TRUST_BUNDLE_NAME,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
    type_url,
    v1::{
        self, Announcement, AnnouncementStatus, ClaimStatus, SignRequest, SignResponse,
        certificates_server::{Certificates, CertificatesServer},
        workloads_server::{Workloads, WorkloadsServer},
    },
};
use outrigger_certs::{CertificateAuthority, ClientAuth, Credentials, SpiffeId, TrustDomain};
use outrigger_proxy::config::Config;
use prost::Message;
use prost_types::Any;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Connected},
};

pub(crate) const DOMAIN: &str = "outrigger.local";
pub(crate) const WORKLOAD: &str = "spiffe://outrigger.local/ns/shop/sa/web";
pub(crate) const TOKEN: &str = "join-token-of-the-test";

/// What survives a restart of the fake, and what tests look at.
pub(crate) struct State {
    pub(crate) leaf_life: Duration,
    /// The token can be used this many more times.
    pub(crate) token_uses: u32,
    pub(crate) signed_by_token: u32,
    pub(crate) signed_by_leaf: u32,
    /// Sign as many requests wrongly: with another key.
    pub(crate) forge: u32,
    pub(crate) resources: BTreeMap<(&'static str, String), (String, Vec<u8>)>,
    /// Names that a synced source does not know.
    pub(crate) absent: BTreeSet<String>,
    pub(crate) requests: Vec<DeltaDiscoveryRequest>,
    pub(crate) announcements: Vec<Announcement>,
    pub(crate) accept_claims: bool,
    streams: Vec<mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>>,
    subscribed: BTreeSet<(String, String)>,
    nonce: u64,
}

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    pub(crate) ca: Arc<CertificateAuthority>,
    pub(crate) state: Arc<Mutex<State>>,
    tasks: Arc<Mutex<Vec<JoinHandle<()>>>>,
    identity: &'static str,
}

impl Fake {
    /// A controller that does not run yet, with an address that will be its own.
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let domain: TrustDomain = DOMAIN.parse().unwrap();
        let store = CertificateAuthority::generate_pem(&domain).unwrap();
        let ca = CertificateAuthority::from_store(&store, &domain).unwrap();
        let state = State {
            leaf_life: Duration::from_hours(1),
            token_uses: 1,
            signed_by_token: 0,
            signed_by_leaf: 0,
            forge: 0,
            resources: BTreeMap::new(),
            absent: BTreeSet::new(),
            requests: Vec::new(),
            announcements: Vec::new(),
            accept_claims: true,
            streams: Vec::new(),
            subscribed: BTreeSet::new(),
            nonce: 0,
        };
        let fake = Self {
            address: listener.local_addr().unwrap(),
            ca: Arc::new(ca),
            state: Arc::new(Mutex::new(state)),
            tasks: Arc::default(),
            identity: "outrigger-controller",
        };
        fake.set(type_url::MESH, MESH_NAME, "1", &fake.mesh());
        fake.set(type_url::TRUST_BUNDLE, TRUST_BUNDLE_NAME, "1", &fake.bundle(1, &[]));
        fake.set(
            type_url::INBOUND,
            WORKLOAD,
            "1",
            &v1::Inbound { mode: v1::inbound::Mode::Strict.into(), ..Default::default() },
        );
        fake
    }

    /// What it says of the mesh at first.
    #[expect(clippy::unused_self, reason = "as `bundle`")]
    pub(crate) fn mesh(&self) -> v1::Mesh {
        v1::Mesh {
            trust_domain: DOMAIN.to_owned(),
            cidrs: vec!["10.0.0.0/8".to_owned()],
            virtual_cidrs: vec!["253.0.0.0/8".to_owned()],
            outbound: v1::mesh::OutboundDefault::Allow.into(),
            external_hosts: Vec::new(),
        }
    }

    pub(crate) fn impostor(mut self) -> Self {
        self.identity = "somebody-else";
        self
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn bundle(&self, epoch: u64, more: &[&CertificateAuthority]) -> v1::TrustBundle {
        let own = self.ca.bundle().roots().iter();
        let others = more.iter().flat_map(|ca| ca.bundle().roots());
        let roots = own.chain(others).map(|root| root.to_vec()).collect();
        v1::TrustBundle { trust_domain: DOMAIN.to_owned(), roots, epoch }
    }

    /// A configuration that leads here. The folder holds its files.
    pub(crate) fn config(&self, folder: &std::path::Path) -> Config {
        let (token, bundle) = (folder.join("token"), folder.join("bundle.pem"));
        std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
        std::fs::write(&bundle, self.ca.bundle().to_pem()).unwrap();
        Config {
            controller: vec![self.address.to_string()],
            token_file: token,
            trust_bundle: bundle,
            ..Config::default()
        }
    }

    pub(crate) async fn start(&self) {
        let domain: TrustDomain = DOMAIN.parse().unwrap();
        let id = SpiffeId::new(&domain, "outrigger-system", self.identity).unwrap();
        let credentials = Credentials::new(self.ca.bundle().clone());
        credentials.set_leaf(self.ca.issue_own(&id, Duration::from_hours(1)).unwrap()).unwrap();
        let tls = TlsAcceptor::from(credentials.server_config(&[b"h2"], ClientAuth::Optional).unwrap());
        let listener = TcpListener::bind(self.address).await.unwrap();
        let (accepted, incoming) = mpsc::channel::<std::io::Result<Io>>(16);
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (tls, accepted) = (tls.clone(), accepted.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = tls.accept(stream).await {
                        let _ = accepted.send(Ok(Io(stream))).await;
                    }
                });
            }
        });
        let router = Server::builder()
            .add_service(CertificatesServer::new(self.clone()))
            .add_service(AggregatedDiscoveryServiceServer::new(self.clone()))
            .add_service(WorkloadsServer::new(self.clone()));
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            let _end = end;
            let _ = router.serve_with_incoming(ReceiverStream::new(incoming)).await;
        });
        drop(ended);
        self.tasks.lock().unwrap().extend([accepting, serving]);
    }

    /// Ends as a killed process does: all connections break.
    pub(crate) async fn stop(&self) {
        let tasks: Vec<_> = self.tasks.lock().unwrap().drain(..).collect();
        {
            let mut state = self.state();
            for stream in state.streams.drain(..) {
                let _ = stream.try_send(Err(Status::unavailable("killed")));
            }
            state.subscribed.clear();
        }
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
    }

    /// Sets a resource; who subscribed hears of it.
    pub(crate) fn set(&self, type_url: &'static str, name: &str, version: &str, message: &impl Message) {
        self.set_bytes(&[(type_url, name, version, message.encode_to_vec())]);
    }

    /// Sets several resources of one type in one push.
    pub(crate) fn set_bytes(&self, resources: &[(&'static str, &str, &str, Vec<u8>)]) {
        let mut state = self.state();
        let mut names = Vec::new();
        for (type_url, name, version, bytes) in resources {
            state.resources.insert((type_url, (*name).to_owned()), ((*version).to_owned(), bytes.clone()));
            names.push((*name).to_owned());
        }
        state.push(resources[0].0, &names);
    }

    pub(crate) fn remove(&self, type_url: &'static str, name: &str) {
        let mut state = self.state();
        state.resources.remove(&(type_url, name.to_owned()));
        state.absent.insert(name.to_owned());
        state.push(type_url, &[name.to_owned()]);
    }

    /// An address that leads to a service with one endpoint.
    pub(crate) fn add_service(&self, address: &str, name: &str, version: &str, endpoint: &str) {
        let (service, namespace) = name.split_once('.').unwrap();
        let destination = v1::Destination {
            service: name.to_owned(),
            port: 80,
            virtual_addresses: vec!["253.0.0.9".to_owned(), "fd00:240::9".to_owned()],
            ..Default::default()
        };
        self.set(
            type_url::SERVICE,
            name,
            version,
            &v1::Service {
                name: service.to_owned(),
                namespace: namespace.to_owned(),
                source: "test".to_owned(),
                ports: vec![v1::service::Port { port: 80, ..Default::default() }],
                endpoints: vec![endpoint_at(endpoint)],
                ..Default::default()
            },
        );
        self.set(type_url::DESTINATION, address, version, &destination);
    }
}

pub(crate) fn endpoint_at(address: &str) -> v1::Endpoint {
    v1::Endpoint {
        id: "node/one".to_owned(),
        address: address.to_owned(),
        ports: [(80, 8080)].into(),
        identity: "spiffe://outrigger.local/ns/shop/sa/orders".to_owned(),
        ..Default::default()
    }
}

impl State {
    fn push(&mut self, type_url: &str, names: &[String]) {
        let wanted: Vec<&String> = names
            .iter()
            .filter(|name| self.subscribed.contains(&(type_url.to_owned(), (*name).clone())))
            .collect();
        let mut response = DeltaDiscoveryResponse { type_url: type_url.to_owned(), ..Default::default() };
        for name in wanted {
            let held = self.resources.iter().find(|((url, held), _)| *url == type_url && held == name);
            if let Some((_, (version, bytes))) = held {
                response.resources.push(Resource {
                    name: name.clone(),
                    version: version.clone(),
                    resource: Some(Any { type_url: type_url.to_owned(), value: bytes.clone() }),
                });
            } else if self.absent.contains(name) {
                response.removed_resources.push(name.clone());
            }
        }
        if response.resources.is_empty() && response.removed_resources.is_empty() {
            return;
        }
        self.nonce += 1;
        response.nonce = self.nonce.to_string();
        self.streams.retain(|stream| stream.try_send(Ok(response.clone())).is_ok());
    }
}

#[tonic::async_trait]
impl Certificates for Fake {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let leaf = request.extensions().get::<Option<SpiffeId>>().cloned().flatten();
        let request = request.into_inner();
        let mut state = self.state();
        let id = match (leaf, &*request.token) {
            (Some(leaf), "") => {
                state.signed_by_leaf += 1;
                leaf
            }
            (_, TOKEN) if state.token_uses > 0 => {
                state.token_uses -= 1;
                state.signed_by_token += 1;
                WORKLOAD.parse().unwrap()
            }
            _ => return Err(Status::unauthenticated("unknown or used token")),
        };
        let csr = if state.forge > 0 {
            state.forge -= 1;
            state.token_uses += 1;
            outrigger_certs::KeyPair::generate().unwrap().csr().unwrap()
        } else {
            request.csr
        };
        let signed = self.ca.sign(&csr, &id, state.leaf_life).unwrap();
        Ok(Response::new(SignResponse {
            chain: signed.chain.iter().map(|der| der.to_vec()).collect(),
            bundle: Some(self.bundle(1, &[])),
        }))
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Fake {
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if request.extensions().get::<Option<SpiffeId>>().cloned().flatten().is_none() {
            return Err(Status::unauthenticated("no leaf"));
        }
        let mut requests = request.into_inner();
        let (sender, responses) = mpsc::channel(64);
        self.state().streams.push(sender);
        let state = self.state.clone();
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                let mut state = state.lock().unwrap();
                let url = request.type_url.clone();
                for name in &request.resource_names_unsubscribe {
                    state.subscribed.remove(&(url.clone(), name.clone()));
                }
                for name in &request.resource_names_subscribe {
                    state.subscribed.insert((url.clone(), name.clone()));
                }
                let names = request.resource_names_subscribe.clone();
                state.requests.push(request);
                state.push(&url, &names);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}

#[tonic::async_trait]
impl Workloads for Fake {
    type AnnounceStream = Responses<AnnouncementStatus>;

    async fn announce(
        &self,
        request: Request<Streaming<Announcement>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        let mut announcements = request.into_inner();
        let (sender, statuses) = mpsc::channel(8);
        let state = self.state.clone();
        tokio::spawn(async move {
            while let Some(Ok(announcement)) = announcements.next().await {
                let accepted = state.lock().unwrap().accept_claims;
                let message = if accepted { "" } else { "the token does not name it" };
                let claims = announcement.claims.iter().map(|claim| ClaimStatus {
                    service: claim.service.clone(),
                    address: claim.address.clone(),
                    port: claim.port,
                    accepted,
                    message: message.to_owned(),
                    ..Default::default()
                });
                let status = AnnouncementStatus { claims: claims.collect() };
                state.lock().unwrap().announcements.push(announcement);
                let _ = sender.send(Ok(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(statuses))))
    }
}

struct Io(TlsStream<TcpStream>);

impl Connected for Io {
    type ConnectInfo = Option<SpiffeId>;

    fn connect_info(&self) -> Self::ConnectInfo {
        outrigger_certs::peer_identity(self.0.get_ref().1)
    }
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Waits for a condition; fails after ten seconds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "in ten seconds not: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
