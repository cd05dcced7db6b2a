//! What the controller tells: where addresses and names lead, which services there are, whom to trust.
//!
//! `directory` is what workers read. `book` decides (no I/O) by what `check` lets through, `stream` carries it to and from the controller,
//! `announce` says what the workload beside us serves.

mod announce;
mod book;
mod check;
pub mod directory;
mod report;
mod stream;

pub use stream::Discovery;
