//! Outrigger's end-to-end harness: hosts, real servers, real binaries, and a look at the wire between them.
//!
//! A suite (`e2e/tests/*.rs`) enters a [`sandbox`] of namespaces, builds [`network`] hosts in it, starts Consul, the
//! controller, sidecars and applications as ordinary processes, and asserts on what clients see. Nothing here is
//! linked into what is tested: the binaries are run as users run them, configured by files.
//!
//! What the harness needs from outside is the kernel's namespaces, the workspace's binaries (`make build`) and the
//! tools of `make tools`; it says which is missing. It never skips a case.
#![forbid(unsafe_code)]

pub mod app;
pub mod capture;
pub mod chart;
pub mod client;
pub mod consul;
pub mod controller;
pub mod faults;
pub mod figures;
pub mod kubernetes;
pub mod load;
pub mod mesh;
pub mod name_server;
pub mod network;
pub mod policies;
pub mod process;
pub mod sandbox;
pub mod suite;
pub mod tls;
pub mod transcript;
pub mod wait;
