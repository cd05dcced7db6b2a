//! A controller of another release: the real one, but for resources that hold a mark. To them something is added that no sidecar of
//! this release can take.

use std::net::SocketAddr;
use std::pin::Pin;

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _};
use outrigger_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use outrigger_api::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use outrigger_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use outrigger_api::v1::certificates_client::CertificatesClient;
use outrigger_api::v1::certificates_server::{Certificates, CertificatesServer};
use outrigger_api::v1::workloads_client::WorkloadsClient;
use outrigger_api::v1::workloads_server::{Workloads, WorkloadsServer};
use outrigger_api::v1::{Announcement, AnnouncementStatus, SignRequest, SignResponse};
use outrigger_api::{type_url, v1};
use outrigger_e2e::mesh::{DISCOVERY_PORT, Mesh, identity};
use outrigger_e2e::network::Host;
use outrigger_e2e::tls::{self, Handshake};
use prost::Message as _;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// What a resource holds that is spoiled.
pub(crate) const MARK: &str = "strange";

/// The other controller, for one workload's sidecar. It works as long as this lives.
pub(crate) struct Other {
    /// Where it is for that sidecar.
    pub(crate) address: SocketAddr,
    _host: Host,
}

/// The way to the real controller, as the workload.
#[derive(Clone)]
struct Between(Channel);

/// Starts one for the sidecar of `account`.
pub(crate) async fn start(mesh: &Mesh, account: &str) -> anyhow::Result<Other> {
    let host = mesh.network.host("between").await?;
    let authority = mesh.authority()?;
    let as_workload = Handshake { leaf: Some(authority.workload(&identity(account))?), alpn: "h2" };
    let controller = tls::relay(&host, mesh.controller_host.at(DISCOVERY_PORT), as_workload).await?;
    let inside = host
        .run(move || async move {
            let channel = Endpoint::from_shared(format!("http://{controller}"))?.connect().await?;
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("listening in between")?;
            let address = listener.local_addr()?;
            let between = Between(channel);
            let server = Server::builder()
                .add_service(AggregatedDiscoveryServiceServer::new(between.clone()))
                .add_service(CertificatesServer::new(between.clone()))
                .add_service(WorkloadsServer::new(between))
                .serve_with_incoming(TcpIncoming::from(listener));
            tokio::spawn(server);
            Ok(address)
        })
        .await?;
    let leaf = authority.workload(&identity("outrigger-system/outrigger-controller"))?;
    let address = tls::terminate(&host, DISCOVERY_PORT, &leaf, "h2", inside).await?;
    Ok(Other { address, _host: host })
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Between {
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let requests = request.into_inner().filter_map(|request| std::future::ready(request.ok()));
        let mut client = AggregatedDiscoveryServiceClient::new(self.0.clone());
        let pushes = client.delta_aggregated_resources(requests).await?.into_inner();
        Ok(Response::new(Box::pin(pushes.map(|push| spoil(push?)))))
    }
}

#[tonic::async_trait]
impl Certificates for Between {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        CertificatesClient::new(self.0.clone()).sign(request.into_inner()).await
    }
}

#[tonic::async_trait]
impl Workloads for Between {
    type AnnounceStream = Answers<AnnouncementStatus>;

    async fn announce(
        &self,
        request: Request<Streaming<Announcement>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        let said = request.into_inner().filter_map(|said| std::future::ready(said.ok()));
        let answers = WorkloadsClient::new(self.0.clone()).announce(said).await?.into_inner();
        Ok(Response::new(Box::pin(answers)))
    }
}

/// Gives every rule of a marked resource an expression that does not end.
fn spoil(mut push: DeltaDiscoveryResponse) -> Result<DeltaDiscoveryResponse, Status> {
    let path = v1::PathMatch { kind: v1::path_match::Kind::Regex.into(), value: "/(".to_owned() };
    let unreadable = |error: prost::DecodeError| Status::internal(error.to_string());
    for any in push.resources.iter_mut().filter_map(|resource| resource.resource.as_mut()) {
        if !any.value.windows(MARK.len()).any(|part| part == MARK.as_bytes()) {
            continue;
        }
        match push.type_url.as_str() {
            type_url::SERVICE => {
                let mut service = v1::Service::decode(&*any.value).map_err(unreadable)?;
                for rule in service.routes.iter_mut().flat_map(|route| &mut route.rules) {
                    rule.matches.push(v1::RouteMatch { path: Some(path.clone()), ..Default::default() });
                }
                any.value = service.encode_to_vec();
            }
            type_url::INBOUND => {
                let mut inbound = v1::Inbound::decode(&*any.value).map_err(unreadable)?;
                let policies = inbound.access.iter_mut().flat_map(|access| &mut access.policies);
                for rule in policies.flat_map(|policy| &mut policy.rules) {
                    rule.to.push(v1::Operation { paths: vec![path.clone()], ..Default::default() });
                }
                any.value = inbound.encode_to_vec();
            }
            _ => {}
        }
    }
    Ok(push)
}
