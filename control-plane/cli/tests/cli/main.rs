//! What people and scripts see of `outrigger`: its output, its exit codes and what it leaves on the disk.
#![forbid(unsafe_code)]
// Clippy knows tests by `#[test]`, not the functions that they share.
#![allow(clippy::unwrap_used)]

mod checks;
mod cluster;
mod clusters;
mod contexts;
mod fake;
mod inject;
mod lists;
mod policies;
mod questions;
