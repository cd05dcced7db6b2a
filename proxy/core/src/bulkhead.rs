//! Bounds on how much this proxy asks of one service at once.
//!
//! A bound holds for all threads together: what is held is one count, and a permit that is dropped gives its place back. Where
//! a policy sets no bound nothing is counted, so that it costs nothing; what began before a bound was set is not held against it.
//!
//! Who finds no place among the connections may wait for one, in one line for all threads: a place that comes back is given to
//! whoever has waited for longest, and nobody overtakes the line.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    task::Waker,
};

use outrigger_api::v1;

use crate::padded::Padded;

/// Requests that wait where a policy bounds the connections and says nothing of those who wait for one: a burst, and a queue that
/// does not outlive its callers' patience.
const PENDING: u32 = 1024;

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
        let connections = bound(wire.connections);
        Self {
            connections,
            pending: bound(wire.pending).or(connections.map(|_| PENDING)),
            requests: bound(wire.requests),
            streams: bound(wire.streams),
            origin: (&*wire.origin).into(),
        }
    }
}

/// What is held of one service, by all threads.
#[derive(Debug, Default)]
pub struct Permits {
    connections: Arc<Connections>,
    pending: Arc<Padded<AtomicU32>>,
    requests: Arc<Padded<AtomicU32>>,
}

/// One request, or one that waits. Its place is free again when it is dropped.
#[derive(Debug)]
#[must_use = "dropped, it bounds nothing"]
pub struct Permit {
    /// `None`: there was no bound.
    held: Option<Arc<Padded<AtomicU32>>>,
}

/// One connection. When it is dropped its place goes to whoever waits first.
#[derive(Debug)]
#[must_use = "dropped, it bounds nothing"]
pub struct Place {
    /// `None`: there was no bound.
    held: Option<Arc<Connections>>,
}

impl Permits {
    /// For a connection; `None`: there are as many as there may be, or others wait already.
    pub fn connection(&self, bulkhead: Option<&Bulkhead>) -> Option<Place> {
        let Some(most) = bulkhead.and_then(|bulkhead| bulkhead.connections) else {
            return Some(Place { held: None });
        };
        let free = self.waiting() == 0 && self.connections.take(most);
        free.then(|| Place { held: Some(Arc::clone(&self.connections)) })
    }

    /// Stands in the line for a connection; `waker` is woken when there is a place. Where nothing bounds the connections any more
    /// that is at once.
    pub fn line_up(&self, bulkhead: Option<&Bulkhead>, waker: Waker) -> Ticket {
        let most = bulkhead.and_then(|bulkhead| bulkhead.connections).unwrap_or(u32::MAX);
        let stub = Arc::new(Stub { called: AtomicBool::new(false), waker });
        let mut line = self.connections.line();
        line.most = most;
        line.stubs.push_back(Arc::clone(&stub));
        self.connections.call(line);
        Ticket { connections: Arc::clone(&self.connections), stub, is_used: false }
    }

    /// How many wait for a connection, on all threads.
    pub fn waiting(&self) -> usize {
        self.connections.waiting.load(Ordering::SeqCst)
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

/// The places among the connections, and the line for them.
///
/// Who gives a place back lowers `held` and then looks at `waiting`; who lines up raises `waiting` and then looks at `held`. Both in
/// one order for all threads (`SeqCst`), so that one of the two sees the other.
#[derive(Debug, Default)]
struct Connections {
    held: Padded<AtomicU32>,
    /// How long the line is. Written with its lock only.
    waiting: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    stubs: VecDeque<Arc<Stub>>,
    /// What the policy said last.
    most: u32,
}

/// What the line keeps of a ticket.
#[derive(Debug)]
struct Stub {
    /// It has left the line, and a place is held for it.
    called: AtomicBool,
    waker: Waker,
}

impl Connections {
    fn take(&self, most: u32) -> bool {
        let more = |held: u32| (held < most).then(|| held + 1);
        self.held.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    fn give_back(&self) {
        self.held.0.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.call(self.line());
        }
    }

    /// Gives those who wait what there is.
    fn call(&self, mut line: MutexGuard<'_, Line>) {
        self.waiting.store(line.stubs.len(), Ordering::SeqCst);
        while !line.stubs.is_empty() && self.take(line.most) {
            if let Some(first) = line.stubs.pop_front() {
                first.called.store(true, Ordering::SeqCst);
                first.waker.wake_by_ref();
            }
            self.waiting.store(line.stubs.len(), Ordering::SeqCst);
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        // Nothing that holds it can panic half-way.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Whether it counts: a policy bounds the connections.
    pub fn is_bounded(&self) -> bool {
        self.held.is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(connections) = &self.held {
            connections.give_back();
        }
    }
}

/// A request in the line for a connection. It leaves the line when it is dropped, and a place that was held for it goes on.
#[derive(Debug)]
pub struct Ticket {
    connections: Arc<Connections>,
    stub: Arc<Stub>,
    /// Its place was handed out.
    is_used: bool,
}

impl Ticket {
    /// The place, once there is one.
    pub fn place(&mut self) -> Option<Place> {
        if self.is_used || !self.stub.called.load(Ordering::SeqCst) {
            return None;
        }
        self.is_used = true;
        Some(Place { held: Some(Arc::clone(&self.connections)) })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_used {
            return;
        }
        let mut line = self.connections.line();
        // Under the lock: it is in the line still, or it was called.
        if let Some(at) = line.stubs.iter().position(|stub| Arc::ptr_eq(stub, &self.stub)) {
            line.stubs.remove(at);
            self.connections.waiting.store(line.stubs.len(), Ordering::SeqCst);
        } else {
            drop(line);
            self.connections.give_back();
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
        assert_eq!((bulkhead.connections, bulkhead.requests), (Some(3), None));
        assert_eq!(bulkhead.pending, Some(PENDING), "a line for connections is bounded in any case");
        assert_eq!(Bulkhead::from_wire(&v1::Bulkhead::default()).pending, None);
    }

    #[test]
    fn each_kind_has_its_own_bound_and_places_come_back() {
        let bulkhead =
            Bulkhead { connections: Some(1), pending: Some(2), requests: Some(3), ..Bulkhead::default() };
        let permits = Permits::default();
        let take = |kind: fn(&Permits, Option<&Bulkhead>) -> Option<Permit>| -> Vec<Permit> {
            std::iter::from_fn(|| kind(&permits, Some(&bulkhead))).take(10).collect()
        };
        let connection = permits.connection(Some(&bulkhead));
        assert!(connection.is_some() && permits.connection(Some(&bulkhead)).is_none());
        let held = [take(Permits::pending), take(Permits::request)];
        assert_eq!(held.each_ref().map(Vec::len), [2, 3]);
        drop((connection, held));
        assert!(permits.connection(Some(&bulkhead)).is_some());
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

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl std::task::Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn connections(most: u32) -> Bulkhead {
        Bulkhead { connections: Some(most), ..Bulkhead::default() }
    }

    #[test]
    fn a_place_that_comes_back_goes_to_who_waits_for_longest() {
        let (permits, bulkhead) = (Permits::default(), connections(1));
        let bell = Arc::new(Bell::default());
        let line_up = || permits.line_up(Some(&bulkhead), Arc::clone(&bell).into());
        let held = permits.connection(Some(&bulkhead));
        let [mut first, second, mut third] = [line_up(), line_up(), line_up()];
        assert!(first.place().is_none());
        drop(held);
        assert_eq!(bell.0.load(Ordering::SeqCst), 1);
        assert!(permits.connection(Some(&bulkhead)).is_none(), "nobody overtakes the line");
        let place = first.place();
        assert!(place.is_some() && first.place().is_none(), "a ticket is good for one");
        drop(second);
        drop(place);
        assert!(third.place().is_some());
        drop((first, third));
        assert_eq!(permits.waiting(), 0);
        assert!(permits.connection(Some(&bulkhead)).is_some());
    }

    #[test]
    fn a_place_for_somebody_who_has_left_goes_on() {
        let (permits, bulkhead) = (Permits::default(), connections(1));
        let line_up = || permits.line_up(Some(&bulkhead), Arc::new(Bell::default()).into());
        let held = permits.connection(Some(&bulkhead));
        let (called, mut next) = (line_up(), line_up());
        drop(held);
        assert!(next.place().is_none());
        drop(called);
        assert!(next.place().is_some());
    }

    #[test]
    fn a_bound_that_is_raised_or_gone_lets_those_who_wait_go_on() {
        let permits = Permits::default();
        let bell = || Waker::from(Arc::new(Bell::default()));
        let _held = permits.connection(Some(&connections(1)));
        let mut first = permits.line_up(Some(&connections(1)), bell());
        let mut second = permits.line_up(Some(&connections(2)), bell());
        let first_has = first.place();
        assert!(first_has.is_some() && second.place().is_none());
        let mut third = permits.line_up(None, bell());
        assert!(second.place().is_some() && third.place().is_some());
    }

    #[test]
    fn no_place_is_lost_and_none_is_given_twice() {
        let (permits, bulkhead) = (Permits::default(), connections(2));
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let place = permits.connection(Some(&bulkhead)).unwrap_or_else(|| {
                            let waker = std::thread::current();
                            let mut ticket = permits.line_up(Some(&bulkhead), Arc::new(Unpark(waker)).into());
                            loop {
                                match ticket.place() {
                                    Some(place) => return place,
                                    None => std::thread::park(),
                                }
                            }
                        });
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(place);
                    }
                });
            }
        });
        assert_eq!(permits.waiting(), 0);
        let left: Vec<_> = std::iter::from_fn(|| permits.connection(Some(&bulkhead))).collect();
        assert_eq!(left.len(), 2);
    }

    struct Unpark(std::thread::Thread);

    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
}
