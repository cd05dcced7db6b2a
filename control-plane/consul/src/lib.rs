//! A thin, typed Consul client and a watch on its blocking queries.
//!
//! # Why our own
//! A mesh needs the instances of a service with their checks, weights, meta and tagged addresses; ACL tokens in the
//! header where Consul looks for them; deadlines that cover bodies; and Consul's rules for clients of blocking
//! queries. No published crate has all of them, and the part of the API that is needed fits in a few files.
//!
//! # What it promises
//! - *Last good wins.* A [`Watch`] never takes an item away because Consul is away, overloaded, without a leader,
//!   refuses the token, filters by ACL or answers nonsense. What is wrong stands in [`Status`], beside the value.
//! - *Bounded.* Every call has a deadline, every body a limit, connections a ceiling below the 200 per address that
//!   a Consul agent admits, and retries a pace.
//! - *No secrets.* Tokens and keys are in no `Debug` output, log line or error.
//! - *No look-ups of its own.* Agents are IP addresses, `localhost`, or names for the caller's [`Resolve`].
//!
//! The files read in the order of a call: `config` -> `transport` (one HTTP/1.1 exchange with one agent) ->
//! `client` (fail-over, the typed calls) -> `health` (Consul's JSON to [`Instance`]) -> `watch`.
#![forbid(unsafe_code)]

mod client;
mod config;
mod encode;
mod error;
mod health;
mod kv;
mod pace;
mod transport;
mod watch;

#[cfg(any(test, feature = "fake"))]
pub mod fake;

pub use client::{AgentSelf, Check, Client, Registration, ServiceNames};
pub use config::{AgentAddress, ClientConfig, Resolve, Scope, Secret, Tls, Token};
pub use error::{Call, Error};
pub use health::{Health, HealthQuery, Instance, InstanceId, Instances, Normalised, Skip};
pub use kv::{KvOperation, KvOutcome, KvPair, MAX_TRANSACTION, MAX_TRANSACTION_BYTES};
pub use watch::{Reason, State, Status, Watch};
