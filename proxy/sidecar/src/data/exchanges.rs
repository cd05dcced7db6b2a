//! The exchanges of one thread that are under way, by key.
//!
//! Connections know an exchange by its [`Key`] and tell it what came; it is taken out of its place while it acts, so that
//! nothing is borrowed twice, and a panic while it acts ends it and nobody else. Boxes are used again: a request costs
//! no allocation once a thread is warm.

use std::{cell::RefCell, panic::AssertUnwindSafe, rc::Rc, time::Instant};

use super::{Worker, buffers, exchange::Exchange};

/// Boxes kept for reuse: the concurrency of a busy thread; a kibibyte or two each.
const SPARES: usize = 128;

/// Names an exchange for as long as it lives, and nothing afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u64);

impl Key {
    fn new(at: usize, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | at as u64)
    }

    fn at(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// As HTTP/2 streams carry it.
    pub(crate) fn to_bits(self) -> u64 {
        self.0
    }

    /// The key of these bits.
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

#[derive(Default)]
pub(crate) struct Exchanges {
    places: RefCell<Vec<Place>>,
    free: RefCell<Vec<u32>>,
    #[expect(clippy::vec_box, reason = "the boxes are what is kept")]
    spares: RefCell<Vec<Box<Exchange>>>,
}

struct Place {
    generation: u32,
    exchange: Option<Box<Exchange>>,
}

impl Exchanges {
    /// A key for an exchange that is about to begin; [`begin`](Self::begin) must follow.
    fn reserve(&self) -> Key {
        let mut places = self.places.borrow_mut();
        if let Some(at) = self.free.borrow_mut().pop() {
            let place = &places[at as usize];
            return Key::new(at as usize, place.generation);
        }
        places.push(Place { generation: 1, exchange: None });
        Key::new(places.len() - 1, 1)
    }

    /// Keys of those under way.
    pub(crate) fn keys(&self) -> Vec<Key> {
        let places = self.places.borrow();
        places
            .iter()
            .enumerate()
            .filter(|(_, place)| place.exchange.is_some())
            .map(|(at, place)| Key::new(at, place.generation))
            .collect()
    }

    /// Keys of those that want to be woken by `now`; `later` is told when the others do.
    pub(crate) fn due(&self, now: Instant, mut later: impl FnMut(Instant)) -> Vec<Key> {
        let places = self.places.borrow();
        let mut due = Vec::new();
        for (at, place) in places.iter().enumerate() {
            match place.exchange.as_ref().and_then(|exchange| exchange.wants_waking()) {
                Some(when) if when <= now => due.push(Key::new(at, place.generation)),
                Some(when) => later(when),
                None => {}
            }
        }
        due
    }

    /// Whether the exchange is under way.
    pub(crate) fn lives(&self, key: Key) -> bool {
        let places = self.places.borrow();
        places
            .get(key.at())
            .is_some_and(|place| place.generation == key.generation() && place.exchange.is_some())
    }

    fn take(&self, key: Key) -> Option<Box<Exchange>> {
        let mut places = self.places.borrow_mut();
        let place = places.get_mut(key.at()).filter(|place| place.generation == key.generation())?;
        place.exchange.take()
    }

    fn put(&self, key: Key, exchange: Box<Exchange>) {
        self.places.borrow_mut()[key.at()].exchange = Some(exchange);
    }

    /// Ends a key.
    fn free(&self, key: Key) {
        let place = &mut self.places.borrow_mut()[key.at()];
        place.generation = place.generation.wrapping_add(1);
        self.free.borrow_mut().push(u32::try_from(key.at()).expect("keys are made from 32 bits"));
    }

    /// Gives memory back after a burst.
    pub(crate) fn sweep(&self) {
        let mut places = self.places.borrow_mut();
        let mut free = self.free.borrow_mut();
        if !places.is_empty() && free.len() == places.len() {
            // No key is in use. Generations start anew far from where they were, so that old keys stay unknown.
            let past = places.iter().map(|place| place.generation).max().unwrap_or_default();
            if places.len() > SPARES {
                *places =
                    (0..SPARES).map(|_| Place { generation: past.wrapping_add(1), exchange: None }).collect();
                *free = (0..u32::try_from(SPARES).expect("few")).collect();
            }
            places.shrink_to_fit();
            free.shrink_to_fit();
            *self.spares.borrow_mut() = Vec::new();
            buffers::free();
        }
    }
}

impl Worker {
    /// Begins an exchange: `begin` fills it and acts.
    pub(super) fn begin(self: &Rc<Self>, begin: impl FnOnce(&mut Exchange, &Rc<Self>, Key)) -> Key {
        let key = self.exchanges.reserve();
        let exchange = self.exchanges.spares.borrow_mut().pop().unwrap_or_default();
        self.act(key, exchange, |exchange, worker| begin(exchange, worker, key));
        key
    }

    /// Ends an exchange without a client, if it still lives, when the guard is dropped.
    pub(super) fn ends_with(self: &Rc<Self>, key: Key) -> Ends {
        Ends { worker: self.clone(), key }
    }

    /// Lets an exchange act, if it still lives.
    pub(super) fn with(self: &Rc<Self>, key: Key, act: impl FnOnce(&mut Exchange, &Rc<Self>)) {
        if let Some(exchange) = self.exchanges.take(key) {
            self.act(key, exchange, act);
        }
    }

    fn act(
        self: &Rc<Self>,
        key: Key,
        mut exchange: Box<Exchange>,
        act: impl FnOnce(&mut Exchange, &Rc<Self>),
    ) {
        let acted = std::panic::catch_unwind(AssertUnwindSafe(|| act(&mut exchange, self)));
        if acted.is_err() {
            self.ctx.metrics.panicked();
            // What it left half done must not be used again.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| exchange.panicked(self)));
            self.exchanges.free(key);
            return;
        }
        if !exchange.is_over() {
            return self.exchanges.put(key, exchange);
        }
        self.exchanges.free(key);
        exchange.reset();
        let mut spares = self.exchanges.spares.borrow_mut();
        if spares.len() < SPARES && exchange.is_small() {
            spares.push(exchange);
        }
    }
}

/// See [`Worker::ends_with`].
pub(super) struct Ends {
    worker: Rc<Worker>,
    key: Key,
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.worker.with(self.key, super::exchange::Exchange::end);
    }
}
