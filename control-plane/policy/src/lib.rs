//! The kinds that people write: parse, validate, compile to the wire, compare, explain. No I/O.
//!
//! A policy is Kubernetes-shaped YAML, the same in a cluster, in Consul and in a file. [`parse`](parse()) makes
//! [`Object`]s of it and knows where each field stands.
#![forbid(unsafe_code)]

pub mod admission;
mod bounds;
pub mod cases;
pub mod catalog;
mod check;
mod de;
pub mod effective;
pub mod explain;
pub mod fault;
pub mod fields;
pub mod kind;
#[allow(clippy::doc_markdown, reason = "the words become descriptions in schemas, which are no Markdown")]
pub mod kinds;
mod newer;
pub mod object;
pub mod parse;
pub mod resolve;
pub mod schema;
pub mod text;
mod tree;
pub mod validate;
pub mod value;

pub use catalog::Catalog;
pub use fault::{Fault, Finding, Findings};
pub use fields::fields;
pub use kind::{Key, Kind};
pub use newer::take_newer_fields;
pub use object::{Metadata, Object, Policies, Spec, Stored};
pub use parse::{Documents, Parsed, ParsedTest, parse, parse_with_tests};
pub use resolve::{Resolved, resolve};
pub use validate::validate;
