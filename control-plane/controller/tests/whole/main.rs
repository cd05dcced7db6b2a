//! The whole controller over its real ports.

#![allow(
    clippy::unwrap_used,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "what fails here fails a test"
)]

mod access;
mod claims;
mod discovery;
mod harness;
mod policies;
mod signing;
mod state;
