//! Outrigger's control plane.
//!
//! The modules are the steps that data takes. What proxies are told: [`sources`] -> `catalog` (with `addresses` and
//! `claims`, all behind the one lock of `mesh`) -> `compile` -> `push`. How a workload gets its certificate:
//! `attest` (with `tokens`) -> `sign`. What it says of itself: `announce`. What people want of the mesh: `policies`,
//! which resolves it into what `mesh` tells. What must outlive a restart: `store`. The ports are `server` for sidecars and `api` for people; [`controller`] starts it all from
//! [`config`]. [`injector`] is another process: the webhook.
//!
//! Two rules hold throughout: last good wins (what a source cannot say now is not gone), and absence is told only when
//! every source is synced.
#![forbid(unsafe_code)]

mod addresses;
mod announce;
mod api;
mod attest;
mod authority;
mod catalog;
mod claims;
mod compile;
pub mod config;
pub mod controller;
pub mod injector;
pub mod kubernetes;
mod mesh;
mod metrics;
mod policies;
mod push;
mod replicas;
mod server;
mod sign;
pub mod sources;
mod store;
mod tokens;
