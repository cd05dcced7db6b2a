//! Outrigger's control plane: sources -> catalog -> compile -> push, and attest -> sign.
#![forbid(unsafe_code)]

pub mod sources;
