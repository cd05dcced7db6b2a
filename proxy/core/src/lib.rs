//! What the sidecar decides, without I/O: where an address leads, which endpoint takes a request, what the first bytes
//! of a connection are, which headers may pass, and how a refusal is named.
//!
//! Everything here is a function of its arguments: time is passed in, randomness is seeded by the caller, and nothing
//! knows an HTTP library's types. That is what lets the data path change its codecs without changing its mind, and
//! what lets property tests say more than examples can.
#![forbid(unsafe_code)]

pub mod access;
pub mod authority;
pub mod balance;
pub mod breaker;
pub mod bulkhead;
pub mod case;
pub mod concurrency;
mod criteria;
pub mod deadline;
pub mod detect;
pub mod external;
pub mod fault;
pub mod hash;
pub mod headers;
pub mod key;
pub mod limit;
pub mod live;
pub mod mark;
pub mod matching;
pub mod model;
mod padded;
pub mod path;
pub mod reason;
pub mod request;
pub mod resolve;
pub mod retry;
pub mod route;
pub mod speaks_first;
pub mod traffic;
