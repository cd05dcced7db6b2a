//! When to look at a connection's first bytes, and what to do while there are none.
//!
//! Detection waits for the client; where the server speaks first, the client waits too, and a proxy that waits for a
//! time-out delays every such connection by it. So after [`EARLY_CONNECT_AFTER`] without a byte the
//! proxy connects to the server, as it would for opaque bytes, and goes on listening to both: **whoever speaks first
//! decides**. If it is the server, the connection is opaque. If it is the client, its bytes are looked at as ever, and
//! an early connection that HTTP has no use for is closed. Being wrong costs one idle connection, never a wait.
//!
//! That is also why a memory that the server spoke first only moves the early connect to "at once" and does not skip
//! detection: an HTTP server that tires of a silent connection and writes a 408 into it has spoken first, too, and
//! must not turn its destination opaque for ten minutes.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use crate::model::Protocol;

/// How long the client may be silent before the server is dialled. Longer than it takes a client that has something
/// to say (its first bytes follow the handshake on the same host within a millisecond), shorter than anybody notices.
pub const EARLY_CONNECT_AFTER: Duration = Duration::from_millis(10);

/// The same where the client spoke first last time: pools open connections ahead of use, and the server need not see
/// those. Short enough to be borne if the memory is wrong.
pub const EARLY_CONNECT_AFTER_CLIENT_FIRST: Duration = Duration::from_millis(100);

/// How long first bytes may stay undecided ([`Detection::NeedMore`]) before they pass as opaque. A request line comes
/// in one segment; what does not may be a text protocol whose client already waits for its answer.
///
/// [`Detection::NeedMore`]: crate::detect::Detection::NeedMore
pub const INCOMPLETE_TIMEOUT: Duration = Duration::from_secs(1);

/// Destinations remembered at most.
pub const MEMORY_MAX: usize = 4096;

/// How long a memory counts.
pub const MEMORY_TTL: Duration = Duration::from_mins(10);

/// Ports where nobody speaks HTTP: looking there could only go wrong, and connecting at once saves even the early
/// connect's delay. Only assignments that hold everywhere; a port that people reuse for HTTP (8080, 9000) never.
///
/// The server speaks first: 21 FTP, 22 SSH, 25 and 587 SMTP, 110 POP3, 119 NNTP, 143 IMAP, 873 rsync, 3306 `MySQL`,
/// 4222 NATS, 5900 VNC.
/// The client speaks first, but no HTTP. Binary, so that one look would do as well: 1433 SQL Server, 1521 Oracle,
/// 1883 MQTT, 2181 `ZooKeeper` (its text commands have no line end and look like a method that is still coming), 3268 and
/// 389 LDAP, 5432 `PostgreSQL`, 5672 AMQP, 9042 Cassandra, 9092 Kafka, 9300 Elasticsearch's transport, 27017 `MongoDB`.
/// Text that looks like a request line until the line ends: 6379 Redis, 11211 memcached.
/// Either: 4444, 4567, 4568 Galera's state transfer and replication, which choose at run time.
const OPAQUE_PORTS: [u16; 28] = [
    21, 22, 25, 110, 119, 143, 389, 587, 873, 1433, 1521, 1883, 2181, 3268, 3306, 4222, 4444, 4567, 4568,
    5432, 5672, 5900, 6379, 9042, 9092, 9300, 11211, 27017,
];

/// Who spoke first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// The side that dialled.
    Client,
    /// The side that was dialled.
    Server,
}

/// What to do with a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Connect now, pass bytes, look at nothing.
    Opaque,
    /// Serve HTTP: whatever does not begin with HTTP/2's preface is HTTP/1.x.
    Http1,
    /// Serve HTTP/2.
    Http2,
    /// Read and [`detect`](crate::detect::detect); connect early if the client stays silent.
    Detect {
        /// Zero: connect at once.
        early_connect_after: Duration,
    },
}

/// Decides how a connection begins. `hint` is the service port's protocol, `memory` what [`Memory`] knows of the
/// destination, `port` the dialled port. What the catalog says counts before what a port number suggests.
pub fn plan(hint: Protocol, memory: Option<First>, port: u16) -> Plan {
    match hint {
        Protocol::Tcp => Plan::Opaque,
        Protocol::Http1 => Plan::Http1,
        Protocol::Http2 => Plan::Http2,
        Protocol::Detect if OPAQUE_PORTS.contains(&port) => Plan::Opaque,
        Protocol::Detect => Plan::Detect {
            early_connect_after: match memory {
                None => EARLY_CONNECT_AFTER,
                Some(First::Client) => EARLY_CONNECT_AFTER_CLIENT_FIRST,
                Some(First::Server) => Duration::ZERO,
            },
        },
    }
}

/// Who spoke first, per destination: at most [`MEMORY_MAX`] of them, each for [`MEMORY_TTL`].
///
/// Two generations instead of a list in order of use: when the young one is full it becomes the old one and the old
/// one is dropped. A destination in use is always among the last half.
#[derive(Debug)]
pub struct Memory<K> {
    young: HashMap<K, (First, Instant)>,
    old: HashMap<K, (First, Instant)>,
}

impl<K> Default for Memory<K> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new() }
    }
}

impl<K: Eq + Hash> Memory<K> {
    /// Remembers who spoke first at `destination`. The latest observation counts.
    pub fn record(&mut self, destination: K, first: First, now: Instant) {
        if self.young.len() >= MEMORY_MAX / 2 && !self.young.contains_key(&destination) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(destination, (first, now));
    }

    /// What is remembered of `destination`, if it still counts.
    pub fn recall(&self, destination: &K, now: Instant) -> Option<First> {
        let (first, at) = self.young.get(destination).or_else(|| self.old.get(destination))?;
        (now.saturating_duration_since(*at) < MEMORY_TTL).then_some(*first)
    }

    /// Destinations held, at most [`MEMORY_MAX`].
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_catalog_counts_before_the_port() {
        assert_eq!(plan(Protocol::Http1, Some(First::Server), 3306), Plan::Http1);
        assert_eq!(plan(Protocol::Http2, None, 25), Plan::Http2);
        assert_eq!(plan(Protocol::Tcp, Some(First::Client), 80), Plan::Opaque);
        assert_eq!(plan(Protocol::Detect, None, 3306), Plan::Opaque);
    }

    #[test]
    fn a_server_that_spoke_first_is_dialled_at_once_and_its_clients_still_looked_at() {
        let detect = |memory| plan(Protocol::Detect, memory, 8080);
        assert_eq!(detect(Some(First::Server)), Plan::Detect { early_connect_after: Duration::ZERO });
        assert_eq!(detect(None), Plan::Detect { early_connect_after: EARLY_CONNECT_AFTER });
    }

    #[test]
    fn ports_of_http_are_never_opaque() {
        for port in [80, 443, 3000, 5000, 8000, 8080, 8443, 8500, 9000, 9090, 9200, 15401] {
            assert!(matches!(plan(Protocol::Detect, None, port), Plan::Detect { .. }), "{port}");
        }
    }

    #[test]
    fn a_memory_expires() {
        let start = Instant::now();
        let mut memory = Memory::default();
        memory.record(1, First::Server, start);
        assert_eq!(memory.recall(&1, start + MEMORY_TTL.mul_f64(0.999)), Some(First::Server));
        assert_eq!(memory.recall(&1, start + MEMORY_TTL), None);
        memory.record(1, First::Client, start + MEMORY_TTL);
        assert_eq!(memory.recall(&1, start + MEMORY_TTL), Some(First::Client));
        assert_eq!(memory.recall(&2, start), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn the_memory_is_bounded_and_keeps_the_latest(
            records in prop::collection::vec((0_u32..20_000, any::<bool>()), 1..20_000),
        ) {
            let now = Instant::now();
            let mut memory = Memory::default();
            for (destination, server) in &records {
                let first = if *server { First::Server } else { First::Client };
                memory.record(*destination, first, now);
                prop_assert_eq!(memory.recall(destination, now), Some(first));
                prop_assert!(memory.len() <= MEMORY_MAX);
            }
            let mut seen = std::collections::HashSet::new();
            for (destination, server) in records.iter().rev() {
                if seen.len() == MEMORY_MAX / 2 {
                    break;
                }
                if seen.insert(destination) {
                    let first = if *server { First::Server } else { First::Client };
                    prop_assert_eq!(memory.recall(destination, now), Some(first));
                }
            }
        }
    }
}
