//! The data path end to end, on loopback: real rustls and real HTTP peers around two sidecars.

#![allow(clippy::unwrap_used, missing_docs)]

mod access;
mod failure;
mod framing;
mod http1;
mod http2;
mod identity;
mod inbound;
mod resilience;
mod routes;
mod support;
mod tcp;
mod upgrades;
