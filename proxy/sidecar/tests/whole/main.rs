//! The sidecar's control thread and its binary, against a controller that speaks the real protocols.
#![allow(clippy::unwrap_used)] // the lint spares tests, not what they call

mod config;
mod control;
mod dns;
mod mounted;
mod process;
mod support;
