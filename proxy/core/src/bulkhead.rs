//! Bounds on how much this proxy asks of one service at once.
//!
//! A bound holds for all threads together: what is held is one count, and a permit that is dropped gives its place back. Where
//! a policy sets no bound nothing is counted, so that it costs nothing; what began before a bound was set is not held against it.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use outrigger_api::v1;

use crate::padded::Padded;

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

/// What is held of one service, by all threads.
#[derive(Debug, Default)]
pub struct Permits {
    connections: Arc<Padded<AtomicU32>>,
    pending: Arc<Padded<AtomicU32>>,
    requests: Arc<Padded<AtomicU32>>,
}

/// One connection or request. Its place is free again when it is dropped.
#[derive(Debug)]
#[must_use = "dropped, it bounds nothing"]
pub struct Permit {
    /// `None`: there was no bound.
    held: Option<Arc<Padded<AtomicU32>>>,
}

impl Permits {
    /// For a connection; `None`: there are as many as there may be.
    pub fn connection(&self, bulkhead: Option<&Bulkhead>) -> Option<Permit> {
        Permit::take(&self.connections, bulkhead.and_then(|bulkhead| bulkhead.connections))
    }

    /// For a request that waits for a connection; `None`: as many as may wait do.
    pub fn pending(&self, bulkhead: Option<&Bulkhead>) -> Option<Permit> {
        Permit::take(&self.pending, bulkhead.and_then(|bulkhead| bulkhead.pending))
    }

    /// For a request; `None`: there are as many under way as there may be.
    pub fn request(&self, bulkhead: Option<&Bulkhead>) -> Option<Permit> {
        Permit::take(&self.requests, bulkhead.and_then(|bulkhead| bulkhead.requests))
    }
}

impl Permit {
    fn take(count: &Arc<Padded<AtomicU32>>, most: Option<u32>) -> Option<Self> {
        let Some(most) = most else { return Some(Self { held: None }) };
        let more = |held: u32| (held < most).then(|| held + 1);
        count.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self { held: Some(Arc::clone(count)) })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(count) = &self.held {
            count.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_no_bound() {
        let wire = v1::Bulkhead { connections: 3, ..v1::Bulkhead::default() };
        let bulkhead = Bulkhead::from_wire(&wire);
        assert_eq!((bulkhead.connections, bulkhead.pending, bulkhead.requests), (Some(3), None, None));
    }

    #[test]
    fn each_kind_has_its_own_bound_and_places_come_back() {
        let bulkhead =
            Bulkhead { connections: Some(1), pending: Some(2), requests: Some(3), ..Bulkhead::default() };
        let permits = Permits::default();
        let take = |kind: fn(&Permits, Option<&Bulkhead>) -> Option<Permit>| -> Vec<Permit> {
            std::iter::from_fn(|| kind(&permits, Some(&bulkhead))).take(10).collect()
        };
        let held = [take(Permits::connection), take(Permits::pending), take(Permits::request)];
        assert_eq!(held.each_ref().map(Vec::len), [1, 2, 3]);
        drop(held);
        assert_eq!(take(Permits::request).len(), 3);
        assert!(permits.request(Some(&Bulkhead::default())).is_some());
    }

    #[test]
    fn what_began_without_a_bound_is_not_held_against_one() {
        let permits = Permits::default();
        let bulkhead = Bulkhead { requests: Some(1), ..Bulkhead::default() };
        let unbounded = permits.request(None);
        let bounded = permits.request(Some(&bulkhead));
        assert!(unbounded.is_some() && bounded.is_some());
        drop(unbounded);
        assert!(permits.request(Some(&bulkhead)).is_none());
    }

    #[test]
    fn threads_together_keep_the_bound() {
        for threads in [1, 2, 4] {
            let permits = Permits::default();
            let bulkhead = Bulkhead { requests: Some(3), ..Bulkhead::default() };
            let inside = AtomicU32::new(0);
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        for _ in 0..5000 {
                            let Some(permit) = permits.request(Some(&bulkhead)) else { continue };
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 3);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(permit);
                        }
                    });
                }
            });
            let left: Vec<_> = std::iter::from_fn(|| permits.request(Some(&bulkhead))).collect();
            assert_eq!(left.len(), 3, "{threads} threads");
        }
    }
}
