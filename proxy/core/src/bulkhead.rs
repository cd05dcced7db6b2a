//! Bounds on how much this proxy asks of one service at once.

use std::sync::Arc;

use outrigger_api::v1;

/// Bounds of this proxy as a whole, over all threads, towards one service. `None`: the proxy's own bounds only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bulkhead {
    /// Open connections.
    pub connections: Option<u32>,
    /// Requests that wait for a connection.
    pub pending: Option<u32>,
    /// Requests that are under way.
    pub requests: Option<u32>,
    /// Streams on one connection of HTTP/2.
    pub streams: Option<u32>,
    /// Who said so.
    pub origin: Arc<str>,
}

impl Bulkhead {
    pub(crate) fn from_wire(wire: &v1::Bulkhead) -> Self {
        let bound = |value: u32| (value != 0).then_some(value);
        Self {
            connections: bound(wire.connections),
            pending: bound(wire.pending),
            requests: bound(wire.requests),
            streams: bound(wire.streams),
            origin: (&*wire.origin).into(),
        }
    }
}
