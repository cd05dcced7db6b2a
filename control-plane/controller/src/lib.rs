//! Outrigger's control plane.
//!
//! The modules are the steps that data takes. What proxies are told: [`sources`] -> [`catalog`] (with [`addresses`] and
//! [`claims`], all behind the one lock of [`mesh`]) -> [`compile`] -> [`push`]. How a workload gets its certificate:
//! [`attest`] (with [`tokens`]) -> [`sign`]. What it says of itself: [`announce`]. What must outlive a restart:
//! [`store`]. The ports are [`server`] for sidecars and [`api`] for people; [`controller`] starts it all from
//! [`config`].
//!
//! Two rules hold throughout: last good wins (what a source cannot say now is not gone), and absence is told only when
//! every source is synced.
#![forbid(unsafe_code)]

pub mod addresses;
pub mod announce;
pub mod api;
pub mod attest;
pub mod catalog;
pub mod claims;
pub mod compile;
pub mod config;
pub mod controller;
pub mod mesh;
pub mod metrics;
pub mod push;
pub mod server;
pub mod sign;
pub mod sources;
pub mod store;
pub mod tokens;
