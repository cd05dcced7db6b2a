//! The load: connections that stay open for a warm-up and a measured stretch, so that CPU time is read while the
//! load is steady.

mod bytes;
mod http2;
mod paced;

pub(crate) mod http1;
pub(crate) mod idle;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::cases::{Call, Work};

/// What one stretch showed.
#[derive(Default)]
pub(crate) struct Stretch {
    /// Requests, messages, handshakes, or GiB.
    pub(crate) operations: f64,
    pub(crate) elapsed: Duration,
    /// Nanoseconds, unordered; empty where latency means nothing.
    pub(crate) latencies: Vec<u64>,
}

impl Stretch {
    /// A stretch in which every operation has its latency.
    fn of(begun: Instant, latencies: Vec<u64>) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 operations")]
        let operations = latencies.len() as f64;
        Self { operations, elapsed: begun.elapsed(), latencies }
    }
}

/// A time as the load keeps it: up to 584 years.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A load with its connections.
pub(crate) trait Load {
    /// Goes on until `end`.
    fn run(&mut self, end: Instant) -> Result<Stretch>;
}

/// Where a path through the mesh, or around it, begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entries {
    pub(crate) http1: SocketAddr,
    /// `None`: this peer carries no HTTP/2 to the application.
    pub(crate) http2: Option<SocketAddr>,
    /// The same for gRPC, which has routes of its own.
    pub(crate) grpc: Option<SocketAddr>,
    pub(crate) bytes: SocketAddr,
}

/// Opens the connections of a case; `None` where the peer has no such path.
pub(crate) fn open(work: Work, entries: Entries) -> Result<Option<Box<dyn Load>>> {
    let load: Box<dyn Load> = match work {
        Work::Http1 { connections, exchange } => {
            Box::new(http1::Closed::open(entries.http1, connections, exchange)?)
        }
        Work::Paced { per_second } => Box::new(paced::Paced::open(entries.http1, per_second)?),
        Work::Http2 { connections, streams, call } => {
            let entry = if call == Call::Get { entries.http2 } else { entries.grpc };
            let Some(address) = entry else { return Ok(None) };
            Box::new(http2::Http2::open(address, connections, streams, call)?)
        }
        Work::Bytes { connections } => Box::new(bytes::Exchanges::open(entries.bytes, connections)?),
        Work::Flood => Box::new(bytes::Flood::open(entries.bytes)?),
        Work::Handshakes { connections } => Box::new(bytes::Handshakes::new(entries.bytes, connections)?),
    };
    Ok(Some(load))
}
