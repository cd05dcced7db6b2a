//! Services whose routes lead to others: traffic never follows a route to a service that we have not heard of, so that one
//! waits, and the one that was held before stays, until all that it leads to is known.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{Held, State};
use crate::discovery::directory::ServiceHandle;

/// Takes up services that wait, once everything that their routes lead to is known or waits for nothing else. Returns whether the
/// directory changes.
pub(super) fn take_up(services: &mut HashMap<Arc<str>, Held>) -> bool {
    let mut ready: Vec<Arc<str>> =
        services.iter().filter(|(_, held)| held.pending.is_some()).map(|(name, _)| name.clone()).collect();
    // Routes may lead back to their own service, and to each other's: what is left when nothing more drops out is
    // taken up together.
    loop {
        let known = |name: &Arc<str>| {
            ready.contains(name) || services.get(name).is_some_and(|held| !matches!(held.state, State::Asked))
        };
        let is_ready = |name: &&Arc<str>| {
            services[*name].pending.as_ref().is_some_and(|service| service.leads_to.iter().all(known))
        };
        let still: Vec<Arc<str>> = ready.iter().filter(is_ready).cloned().collect();
        if still.len() == ready.len() {
            break;
        }
        ready = still;
    }
    let mut moved = false;
    for name in ready {
        let Some(held) = services.get_mut(&name) else { continue };
        let Some(service) = held.pending.take() else { continue };
        if let State::Service(handle) = &held.state {
            handle.store(service);
        } else {
            held.state = State::Service(ServiceHandle::new(service));
            moved = true;
        }
    }
    moved
}

/// All that routes lead to, of what holds and of what waits.
pub(super) fn all(services: &HashMap<Arc<str>, Held>) -> HashSet<Arc<str>> {
    let mut all = HashSet::new();
    for held in services.values() {
        let current = match &held.state {
            State::Service(handle) => Some(handle.load()),
            _ => None,
        };
        all.extend(current.iter().chain(&held.pending).flat_map(|service| service.leads_to.iter().cloned()));
    }
    all
}
