//! What people and scripts see of `outrigger`: its output, its exit codes and what it leaves on the disk.
#![forbid(unsafe_code)]

mod contexts;
mod fake;
mod lists;
mod policies;
mod questions;
