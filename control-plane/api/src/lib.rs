//! The wire between sidecars and the controller: protobuf messages and gRPC services, generated from `proto/` and
//! checked in (`tests/generated.rs` keeps the two equal). A leaf: no logic, and nothing of ours below it.
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
