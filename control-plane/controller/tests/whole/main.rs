//! The whole controller over its real ports.

#![allow(
    clippy::unwrap_used,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "what fails here fails a test"
)]

mod access;
mod claims;
mod discovery;
#[path = "../../src/sources/kubernetes/fake.rs"]
#[allow(dead_code, reason = "the source's own tests use the rest")]
mod fake;
mod harness;
mod kubernetes;
mod policies;
mod replicas;
mod signing;
mod state;
