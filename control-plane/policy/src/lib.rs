//! The kinds that people write: parse, validate, compile to the wire, compare, explain. No I/O.
//!
//! A policy is Kubernetes-shaped YAML, the same in a cluster, in Consul and in a file. [`parse`](parse()) makes
//! [`Object`]s of it and knows where each field stands.
#![forbid(unsafe_code)]

pub mod catalog;
pub mod fault;
pub mod kind;
pub mod kinds;
pub mod object;
pub mod value;

pub use catalog::Catalog;
pub use fault::{Fault, Finding, Findings};
pub use kind::{Key, Kind};
pub use object::{Metadata, Object, Policies, Spec, Stored};
