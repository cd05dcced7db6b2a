//! What attackers and broken peers send, against both sides of the sidecar: on loopback, from peers that write their
//! own bytes.
//!
//! The cases follow a list: A1 to A10 are HTTP/1.1 (framing, then slowness), C1 to C11 are HTTP/2 and gRPC. Each line of
//! it is at least one test; its number stands above the test. Expected is what the RFCs allow at the strict end:
//! ambiguous means 400 and close, malformed means an error of the stream or of the connection, too much means an end
//! within a bound that the test names.
//!
//! Under each attack a well-behaved client goes on working through the same sidecars (`support::Siege`): it must not
//! notice, memory must not grow, and nothing may panic.

#![allow(clippy::unwrap_used, missing_docs)]

mod evil;
mod frames;
mod grpc;
mod h1;
mod h1_bodies;
mod h1_upstream;
mod h2;
mod h2_streams;
mod h2_upstream;
#[path = "../data_path/support.rs"]
#[allow(dead_code, reason = "shared with the suite that owns it, which uses the rest")]
mod harness;
mod scripted;
mod slow;
mod support;
