//! What all threads know of one service while it is used: who fails, what is under way, what was tried again.
//!
//! Everything else that a balancer learns stays on its thread. Here is what must be one for the whole proxy, so that an endpoint
//! that fails is found out once and not once per thread, and a limit of N is N. Requests touch atomics only; the lock is
//! taken when a push has changed the service.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Instant,
};

use crate::{
    breaker::{
        Breaker, Cause,
        circuit::{Circuit, Ejections, Group, Millis},
    },
    bulkhead::Permits,
    model::{Endpoint, Service},
    retry::Budget,
};

/// What all threads know of one service.
#[derive(Debug)]
pub struct Live {
    begun: Instant,
    budget: Budget,
    permits: Permits,
    ejections: Arc<Ejections>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    snapshot: Option<Arc<Service>>,
    breaker: Breaker,
    /// By service port, as endpoints list it; 0 stands for every port that nobody lists.
    ports: BTreeMap<u16, OnPort>,
}

#[derive(Debug)]
struct OnPort {
    group: Arc<Group>,
    /// By the endpoint's id.
    circuits: BTreeMap<Arc<str>, Arc<Circuit>>,
}

impl Live {
    /// Nothing is known yet. `begun` is the earliest time that it can be asked about.
    pub fn new(begun: Instant) -> Self {
        Self {
            begun,
            budget: Budget::new(begun),
            permits: Permits::default(),
            ejections: Arc::default(),
            known: Mutex::default(),
        }
    }

    /// What retries of its requests may be.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// What is held of it.
    pub fn permits(&self) -> &Permits {
        &self.permits
    }

    /// Takes over a snapshot; cheap if it is the one from last time. What is known of an endpoint stays while its id and address do,
    /// and the policy on when it is put aside.
    pub fn adopt(&self, service: &Arc<Service>) {
        let mut known = self.known();
        if known.snapshot.as_ref().is_some_and(|last| Arc::ptr_eq(last, service)) {
            return;
        }
        known.snapshot = Some(Arc::clone(service));
        let breaker =
            service.traffic.as_ref().and_then(|traffic| traffic.breaker.clone()).unwrap_or_default();
        if known.breaker != breaker {
            // What was counted for another policy says little for this one; and nobody stays ejected who would not be.
            known.breaker = breaker;
            known.ports.clear();
        }
        let mut listed: Vec<u16> =
            service.endpoints.iter().flat_map(|endpoint| endpoint.ports.keys().copied()).collect();
        listed.push(0);
        listed.sort_unstable();
        listed.dedup();
        let known = &mut *known;
        known.ports.retain(|port, _| listed.binary_search(port).is_ok());
        for port in listed {
            let on_port = known.ports.entry(port).or_insert_with(|| OnPort {
                group: Arc::new(Group::new(known.breaker.clone(), Arc::clone(&self.ejections))),
                circuits: BTreeMap::new(),
            });
            on_port.adopt(port, service);
        }
    }

    /// What is known of these endpoints on a port that endpoints list, or 0: together, and of each; `None` for one that is not of
    /// the snapshot that was taken over last, or not on that port.
    pub(crate) fn on_port(
        &self,
        port: u16,
        endpoints: &[Arc<Endpoint>],
    ) -> (Arc<Group>, Vec<Option<Arc<Circuit>>>) {
        let known = self.known();
        let Some(on_port) = known.ports.get(&port) else {
            let nobody = Group::new(known.breaker.clone(), Arc::clone(&self.ejections));
            return (Arc::new(nobody), vec![None; endpoints.len()]);
        };
        let circuit = |endpoint: &Arc<Endpoint>| {
            on_port.circuits.get(&endpoint.id).filter(|circuit| circuit.address == endpoint.address).cloned()
        };
        (Arc::clone(&on_port.group), endpoints.iter().map(circuit).collect())
    }

    /// The time as circuits know it.
    pub(crate) fn millis(&self, now: Instant) -> Millis {
        u64::try_from(now.saturating_duration_since(self.begun).as_millis()).unwrap_or(u64::MAX)
    }

    /// What health checks say of an endpoint, until they say otherwise.
    pub fn checked(&self, id: &str, well: bool) {
        for on_port in self.known().ports.values() {
            if let Some(circuit) = on_port.circuits.get(id) {
                circuit.checked(&on_port.group, well);
            }
        }
    }

    /// Endpoints that are ejected, on each port that they are.
    pub fn ejected(&self) -> u64 {
        self.known().ports.values().map(|on_port| on_port.group.ejected()).sum()
    }

    /// Whether endpoints that fail go on being asked, because no more may be ejected.
    pub fn panicking(&self) -> bool {
        self.known().ports.values().any(|on_port| on_port.group.is_panicking())
    }

    /// Ejections so far, by cause.
    pub fn ejections(&self) -> impl Iterator<Item = (Cause, u64)> {
        Cause::ALL.into_iter().map(|cause| (cause, self.ejections[cause as usize].load(Ordering::Relaxed)))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing that holds it can panic half-way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OnPort {
    fn adopt(&mut self, port: u16, service: &Service) {
        self.circuits.retain(|id, circuit| {
            let stays = service
                .endpoint(id)
                .is_some_and(|endpoint| endpoint.address == circuit.address && endpoint.takes_part(port));
            if !stays {
                circuit.leave(&self.group);
            }
            stays
        });
        for endpoint in service.endpoints.iter().filter(|endpoint| endpoint.takes_part(port)) {
            if !self.circuits.contains_key(&endpoint.id) {
                let circuit = Arc::new(Circuit::new(endpoint.address));
                self.circuits.insert(Arc::clone(&endpoint.id), circuit);
            }
        }
        // Fewer endpoints, fewer that may be ejected: those that would come back first do.
        for _ in 0..self.group.resize(self.circuits.len()) {
            let ejected =
                self.circuits.values().filter_map(|circuit| Some((circuit.ejected_until()?, circuit)));
            if let Some((_, first)) = ejected.min_by_key(|(until, _)| *until) {
                first.reinstate(&self.group);
            }
        }
    }
}

#[cfg(test)]
mod tests;
