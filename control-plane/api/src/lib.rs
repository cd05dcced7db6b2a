//! The wire between sidecars and the controller: protobuf messages and gRPC services, generated from `proto/` and
//! checked in (`tests/generated.rs` keeps the two equal). A leaf: no logic but how a channel is made over a connection, and
//! nothing of ours below it.
//!
//! The transport is xDS's delta ADS, because its nonces, acknowledgements and version echo are what a last-good client
//! needs and every mesh engineer knows them; the resources in it are our own, because Envoy's describe a proxy's
//! configuration where ours describe the mesh.
#![forbid(unsafe_code)]
#![allow(missing_docs, clippy::pedantic)] // generated

/// The delta ADS transport.
pub mod discovery {
    include!("generated/envoy.service.discovery.v3.rs");
}

/// Outrigger's resources and services.
pub mod v1 {
    include!("generated/outrigger.v1.rs");
}

/// A gRPC channel over one finished connection. It never reconnects by itself: whoever holds it must say again what it said.
///
/// # Errors
/// If the peer speaks no HTTP/2.
pub async fn channel<S>(
    endpoint: tonic::transport::Endpoint,
    stream: S,
) -> Result<tonic::transport::Channel, tonic::transport::Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let once = std::sync::Arc::new(std::sync::Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_| {
        let stream = once.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let closed = || std::io::Error::from(std::io::ErrorKind::NotConnected);
        async move { stream.map(hyper_util::rt::TokioIo::new).ok_or_else(closed) }
    });
    endpoint.connect_with_connector(connector).await
}

/// Type URLs of the resources, as they stand in `DeltaDiscoveryRequest.type_url`.
pub mod type_url {
    pub const DESTINATION: &str = "type.googleapis.com/outrigger.v1.Destination";
    pub const SERVICE: &str = "type.googleapis.com/outrigger.v1.Service";
    pub const INBOUND: &str = "type.googleapis.com/outrigger.v1.Inbound";
    pub const MESH: &str = "type.googleapis.com/outrigger.v1.Mesh";
    pub const TRUST_BUNDLE: &str = "type.googleapis.com/outrigger.v1.TrustBundle";
}

/// The one name of the `Mesh` resource.
pub const MESH_NAME: &str = "mesh";
/// The most `Mesh.external_hosts`: a proxy holds them all, whatever it uses.
pub const MAX_EXTERNAL_HOSTS: usize = 4096;
/// The one name of the `TrustBundle` resource.
pub const TRUST_BUNDLE_NAME: &str = "trust-bundle";
