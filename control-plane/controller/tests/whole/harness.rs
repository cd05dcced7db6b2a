//! A controller on loopback and the clients that sidecars are, in one process: real sockets, TLS and gRPC.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use outrigger_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use outrigger_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status as Refusal};
use outrigger_api::v1::certificates_client::CertificatesClient;
use outrigger_api::v1::workloads_client::WorkloadsClient;
use outrigger_api::v1::{Announcement, AnnouncementStatus, Claim, SignRequest, SignResponse};
use outrigger_certs::{CertificateAuthority, Credentials, KeyPair, Leaf, SpiffeId, TrustBundle};
use outrigger_controller::config::Config;
use outrigger_controller::controller::Controller;
use prost::Message;
use rustls::ClientConfig;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// How long anything may take before a test fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

/// Gives a controller a CA of its own files: for API servers that keep nothing.
pub(crate) fn bring_ca(config: &mut Config) {
    let made = CertificateAuthority::generate(&config.trust_domain().unwrap()).unwrap();
    std::fs::create_dir_all(&config.data_dir).unwrap();
    let write = |name: &str, text: &str| {
        let path = config.data_dir.join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    config.ca.certificate_file = write("brought.pem", &made.certificates);
    config.ca.key_file = write("brought-key.pem", &made.key);
    config.ca.roots_file = write("brought-roots.pem", &made.roots);
}

/// A controller with its directories; it can be stopped and started again on them.
pub(crate) struct Bench {
    directory: tempfile::TempDir,
    pub(crate) config: Config,
    controller: Option<Controller>,
    writes: u64,
}

impl Bench {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[], |_| {}).await
    }

    /// Starts with these service files.
    pub(crate) async fn of(files: &[(&str, &str)]) -> Self {
        Self::start_with(files, |_| {}).await
    }

    pub(crate) async fn start_with(files: &[(&str, &str)], change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let services = directory.path().join("services");
        std::fs::create_dir(&services).unwrap();
        let mut config = Config {
            data_dir: directory.path().join("data"),
            listen: loopback(),
            api_listen: loopback(),
            metrics_listen: loopback(),
            allow_loopback_endpoints: true,
            ..Config::default()
        };
        config.file.directory = Some(services);
        config.file.poll_interval = "50ms".parse().unwrap();
        change(&mut config);
        let mut bench = Self { directory, config, controller: None, writes: 0 };
        for (name, text) in files {
            bench.write(name, text);
        }
        bench.up().await;
        bench
    }

    pub(crate) async fn up(&mut self) {
        self.controller = Some(Controller::start(&self.config).await.unwrap());
    }

    pub(crate) async fn down(&mut self) {
        let controller = self.controller.take().unwrap();
        soon("stopping", controller.stop()).await;
    }

    pub(crate) fn controller(&self) -> &Controller {
        self.controller.as_ref().unwrap()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("services").join(name)
    }

    /// Writes a service file that looks old, and differs in age from all before: it is read at the next look.
    pub(crate) fn write(&mut self, name: &str, text: &str) {
        self.writes += 1;
        let mut file = tempfile::NamedTempFile::new_in(self.directory.path()).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let age = Duration::from_secs(1_000_000 - self.writes);
        file.as_file().set_modified(SystemTime::now() - age).unwrap();
        file.persist(self.file(name)).unwrap();
    }

    pub(crate) fn bundle(&self) -> TrustBundle {
        let pem = std::fs::read(self.config.data_dir.join("root.pem")).unwrap();
        TrustBundle::from_pem(self.config.trust_domain().unwrap(), &pem, 0).unwrap()
    }

    /// A call to the API, with the admin token unless `token` is another.
    pub(crate) async fn api(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let token = std::fs::read_to_string(self.config.data_dir.join("admin-token")).unwrap();
        self.api_as(token.trim(), method, path, body).await
    }

    pub(crate) async fn api_as(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = http(self.controller().api_listen, &request).await;
        let status = answer[9..12].parse().unwrap();
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    pub(crate) async fn monitoring(&self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        http(self.controller().metrics_listen, &request).await
    }

    /// A reusable token.
    pub(crate) async fn token(&self, account: &str, services: &[&str], cidrs: &[&str]) -> String {
        self.new_token(account, services, cidrs, "reusable").await
    }

    pub(crate) async fn new_token(
        &self,
        account: &str,
        services: &[&str],
        cidrs: &[&str],
        uses: &str,
    ) -> String {
        let request = serde_json::json!({
            "identity": identity(account).as_str(), "services": services, "cidrs": cidrs, "uses": uses,
        });
        let (status, answer) = self.api("POST", "/api/v1/tokens", Some(request)).await;
        assert_eq!(status, 201, "{answer}");
        answer["token"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn channel(&self, tls: Arc<ClientConfig>) -> Result<Channel, tonic::transport::Error> {
        let address = self.controller().listen;
        let connector = tower::service_fn(move |_| {
            let tls = TlsConnector::from(Arc::clone(&tls));
            async move {
                let tcp = TcpStream::connect(address).await?;
                std::io::Result::Ok(TokioIo::new(tls.connect(outrigger_certs::server_name(), tcp).await?))
            }
        });
        Endpoint::from_static("http://controller").connect_with_connector(connector).await
    }

    /// A channel of a workload that has no leaf.
    pub(crate) async fn stranger(&self) -> Channel {
        let credentials = Credentials::new(self.bundle());
        let tls = credentials.bootstrap_config(&self.config.identity().unwrap(), &[b"h2"]);
        self.channel(tls).await.unwrap()
    }

    pub(crate) async fn sign(
        &self,
        channel: Channel,
        csr: Vec<u8>,
        token: &str,
    ) -> Result<SignResponse, Status> {
        let request = SignRequest { csr, token: token.to_owned() };
        let mut client = CertificatesClient::new(channel);
        Ok(soon("Sign", client.sign(request)).await?.into_inner())
    }

    pub(crate) async fn join(&self, token: &str) -> Result<Workload, Status> {
        let key = KeyPair::generate().unwrap();
        let signed = self.sign(self.stranger().await, key.csr().unwrap(), token).await?;
        let leaf = self.leaf(key, &signed, None);
        let credentials = Credentials::new(self.bundle());
        credentials.set_leaf(leaf).unwrap();
        Ok(Workload { credentials, controller: self.config.identity().unwrap() })
    }

    /// A workload that serves these services from anywhere on loopback.
    pub(crate) async fn workload(&self, account: &str, services: &[&str]) -> Workload {
        let token = self.token(account, services, &["127.0.0.0/8"]).await;
        self.join(&token).await.unwrap()
    }

    pub(crate) fn leaf(&self, key: KeyPair, signed: &SignResponse, expected: Option<&SpiffeId>) -> Leaf {
        let chain = signed.chain.iter().map(|der| der.clone().into()).collect();
        Leaf::accept(key, chain, expected, &self.bundle(), SystemTime::now()).unwrap()
    }
}

pub(crate) fn identity(account: &str) -> SpiffeId {
    format!("spiffe://outrigger.local/ns/shop/sa/{account}").parse().unwrap()
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

async fn http(address: SocketAddr, request: &str) -> String {
    let exchange = async {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.unwrap();
        answer
    };
    soon("HTTP", exchange).await
}

/// A workload with a leaf.
pub(crate) struct Workload {
    pub(crate) credentials: Credentials,
    controller: SpiffeId,
}

impl Workload {
    pub(crate) async fn channel(&self, bench: &Bench) -> Channel {
        let tls = self.credentials.client_config(&self.controller, &[b"h2"]).unwrap();
        bench.channel(tls).await.unwrap()
    }

    pub(crate) async fn discover(&self, bench: &Bench) -> Discovery {
        Discovery::open(self.channel(bench).await).await.unwrap()
    }

    pub(crate) async fn announce(&self, bench: &Bench) -> Announcing {
        Announcing::open(self.channel(bench).await).await.unwrap()
    }
}

/// An open discovery stream.
pub(crate) struct Discovery {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Discovery {
    pub(crate) async fn open(channel: Channel) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(64);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let opening = client.delta_aggregated_resources(ReceiverStream::new(receiver));
        let responses = soon("opening discovery", opening).await?.into_inner();
        Ok(Self { requests, responses })
    }

    pub(crate) async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn subscribe(&self, kind: &str, names: &[&str]) {
        self.resume(kind, names, &[]).await;
    }

    /// Subscribes and says which versions are held.
    pub(crate) async fn resume(&self, kind: &str, names: &[&str], held: &[(&str, &str)]) {
        let owned = |text: &&str| (*text).to_owned();
        self.send(DeltaDiscoveryRequest {
            type_url: url(kind),
            resource_names_subscribe: names.iter().map(owned).collect(),
            initial_resource_versions: held
                .iter()
                .map(|(name, version)| (owned(name), owned(version)))
                .collect(),
            ..Default::default()
        })
        .await;
    }

    pub(crate) async fn next(&mut self) -> DeltaDiscoveryResponse {
        soon("a response", self.responses.message()).await.unwrap().expect("the stream ended")
    }

    pub(crate) async fn end(&mut self) -> Option<Status> {
        loop {
            match soon("the end of the stream", self.responses.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    pub(crate) async fn ack(&self, response: &DeltaDiscoveryResponse) {
        self.answer(response, None).await;
    }

    pub(crate) async fn nack(&self, response: &DeltaDiscoveryResponse, message: &str) {
        self.answer(response, Some(Refusal { code: 3, message: message.to_owned() })).await;
    }

    async fn answer(&self, response: &DeltaDiscoveryResponse, error_detail: Option<Refusal>) {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..Default::default()
        })
        .await;
    }

    /// The next response, acknowledged, must be of this kind.
    pub(crate) async fn take(&mut self, kind: &str) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        assert_eq!(response.type_url, url(kind), "{response:?}");
        self.ack(&response).await;
        response
    }

    /// The one resource of the next response, with its version.
    pub(crate) async fn one<T: Message + Default>(&mut self, kind: &str) -> (T, String) {
        let response = self.take(kind).await;
        assert_eq!((response.resources.len(), response.removed_resources.len()), (1, 0), "{response:?}");
        let resource = &response.resources[0];
        (T::decode(&*resource.resource.as_ref().unwrap().value).unwrap(), resource.version.clone())
    }

    /// Nothing was said to what was asked before: requests are worked on in order, and here comes the answer to a
    /// later one first.
    pub(crate) async fn assert_silent(&mut self) {
        // A name that always exists, asked for anew each time.
        self.subscribe("TrustBundle", &["trust-bundle"]).await;
        let response = self.next().await;
        assert_eq!(response.type_url, url("TrustBundle"), "not silent: {response:?}");
        self.ack(&response).await;
    }
}

pub(crate) fn url(kind: &str) -> String {
    format!("type.googleapis.com/outrigger.v1.{kind}")
}

/// An open announcing stream.
pub(crate) struct Announcing {
    announcements: mpsc::Sender<Announcement>,
    answers: Streaming<AnnouncementStatus>,
}

impl Announcing {
    pub(crate) async fn open(channel: Channel) -> Result<Self, Status> {
        let (announcements, receiver) = mpsc::channel(8);
        let mut client = WorkloadsClient::new(channel);
        let opening = client.announce(ReceiverStream::new(receiver));
        let answers = soon("opening the announcement", opening).await?.into_inner();
        Ok(Self { announcements, answers })
    }

    /// Announces, and returns for each claim whether it was accepted, and why not.
    pub(crate) async fn say(&mut self, claims: &[(&str, &str, u32)], draining: bool) -> Vec<(bool, String)> {
        let claims = claims
            .iter()
            .map(|(service, address, port)| Claim {
                service: (*service).to_owned(),
                address: (*address).to_owned(),
                port: *port,
            })
            .collect();
        self.announcements.send(Announcement { claims, draining }).await.unwrap();
        let status = soon("a status", self.answers.message()).await.unwrap().expect("the stream ended");
        status.claims.into_iter().map(|claim| (claim.accepted, claim.message)).collect()
    }
}
