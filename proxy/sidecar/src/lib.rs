//! The sidecar: it stands beside one workload and carries its traffic over mutual TLS.
//!
//! Worker threads own connections; one control thread owns everything that talks to the controller. What they share
//! is [`context::Context`]: snapshots that the control thread replaces and workers read, and counters.
//!
//! A connection's path is in `data`; what the control thread does is, in the order of a start: `certificates` (who we
//! are) -> `discovery` (where things are) -> `dns` and `admin` (what others ask us) -> `drain` (how we leave).
#![forbid(unsafe_code)]

pub mod admin;
pub mod certificates;
pub mod cni;
pub mod config;
pub mod context;
pub mod control_metrics;
pub mod controller;
pub mod data;
pub mod discovery;
pub mod dns;
pub mod drain;
pub mod lives;
pub mod metrics;
mod mounted;
pub mod ready;
pub mod redirect;
pub mod run;
pub mod workers;
