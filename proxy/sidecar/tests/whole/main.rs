//! The sidecar's control thread and its binary, against a controller that speaks the real protocols.

mod config;
mod control;
mod dns;
mod process;
mod support;
