//! Who may be asked.

use std::{sync::Arc, time::Instant};

use super::{
    Balancer,
    slot::{TIERS, tier},
};
use crate::{
    breaker::circuit::{Circuit, Group, Millis, Standing},
    model::Health,
};

/// Of a subset, the part that a preference for zones leaves to other zones: they must be there when the own zone fails.
const OTHER_ZONES: usize = 4;

/// What is known of the endpoints on one service port.
#[derive(Debug)]
pub(super) struct OnPort {
    pub(super) group: Arc<Group>,
    /// By slot; `None`: it does not serve the port.
    pub(super) circuits: Vec<Option<Arc<Circuit>>>,
    /// The slots that serve the port.
    pub(super) serving: Vec<usize>,
    /// Those of them that this proxy uses.
    pub(super) subset: Vec<usize>,
}

/// What there is to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gathered {
    Candidates,
    /// This one, to find out whether it still fails.
    Trial(usize),
    Nobody,
    AllFailing,
}

impl OnPort {
    fn stands(&self, at: usize, now: Millis) -> bool {
        self.circuits[at].as_ref().is_none_or(|circuit| circuit.standing(now) == Standing::Stands)
    }

    /// Whether it has failed its health checks.
    fn is_unwell(&self, at: usize) -> bool {
        self.group.has_unwell() && self.circuits[at].as_ref().is_some_and(|circuit| circuit.is_unwell())
    }

    fn is_dead(&self, at: usize) -> bool {
        self.circuits[at].as_ref().is_some_and(|circuit| circuit.is_dead(&self.group))
    }

    /// Begins the trial of an ejected endpoint. `forced`: also before its time.
    pub(super) fn begins_trial(&self, at: usize, now: Millis, forced: bool) -> bool {
        self.circuits[at].as_ref().is_some_and(|circuit| circuit.begins_trial(&self.group, now, forced))
    }

    /// Whether the subset is not all there is.
    fn is_cut(&self) -> bool {
        self.subset.len() < self.serving.len()
    }
}

impl Balancer {
    /// Makes sure that what is known of a port is there; returns its key.
    pub(super) fn on_port(&mut self, service_port: u16) -> u16 {
        // All ports that nobody lists have the same endpoints: those that answer for any.
        let port = if self.listed.contains(&service_port) { service_port } else { 0 };
        if !self.on_ports.contains_key(&port) {
            let made = self.make_on_port(port);
            let is_stale = |table: &super::Table| !table.is_for(&self.slots, &made.serving);
            if self.tables.get(&port).is_some_and(is_stale) {
                self.tables.remove(&port);
            }
            self.on_ports.insert(port, made);
        }
        port
    }

    fn make_on_port(&self, port: u16) -> OnPort {
        let endpoints = self.snapshot.as_ref().map_or(&[][..], |snapshot| &snapshot.endpoints);
        let (group, circuits) = self.live.on_port(port, endpoints);
        let serves = |at: &usize| self.slots[*at].endpoint.takes_part(port);
        let serving: Vec<usize> = (0..self.slots.len()).filter(serves).collect();
        let mut subset = serving.clone();
        let hashes = self.policy.algorithm.hashes();
        let most = if hashes { serving.len() } else { self.max_endpoints };
        let prefers_zone = self.policy.zone_percent > 0 && !self.zone.is_empty();
        // Health before score: a proxy must not be left with the failing ones of a service that works.
        let rank = |at: usize, wanted: bool| {
            let is_other = prefers_zone && self.is_in_own_zone(at) != wanted;
            (tier(self.slots[at].endpoint.health), is_other, self.slots[at].score, at)
        };
        subset.sort_unstable_by_key(|at| rank(*at, true));
        if subset.len() > most {
            let reserved = if prefers_zone { most / OTHER_ZONES } else { 0 };
            subset[most - reserved..].sort_unstable_by_key(|at| rank(*at, false));
            subset.truncate(most);
        }
        OnPort { group, circuits, serving, subset }
    }

    pub(super) fn is_in_own_zone(&self, at: usize) -> bool {
        self.slots[at].endpoint.zone == self.zone
    }

    /// Leaves in `found` the slots to choose from: the best tier that has any, from the subset if it can be, without
    /// those ejected, and without those put aside if it can be.
    pub(super) fn gather(
        &self,
        port: u16,
        now: Instant,
        exclude: &[Arc<str>],
        found: &mut Vec<(usize, u64)>,
    ) -> Gathered {
        let on_port = &self.on_ports[&port];
        let millis = self.live.millis(now);
        let allowed = |at: usize| !exclude.contains(&self.slots[at].endpoint.id);
        let some_ejected = on_port.group.ejected() > 0;
        let stands = |at: usize| !some_ejected || on_port.stands(at, millis);
        let mut all_failing = false;
        found.clear();
        for wanted in 0..TIERS {
            let in_tier = |at: &usize| self.tier(on_port, *at, now) == wanted;
            let members = || on_port.subset.iter().copied().filter(in_tier);
            let all = || on_port.serving.iter().copied().filter(in_tier);
            // All that there are, and not only those that we use: another one may still work.
            if members().next().is_some() && members().chain(all()).all(|at| on_port.is_dead(at)) {
                if let Some(at) = Self::takes_turn(on_port, all, allowed, millis) {
                    found.push((at, 0));
                    return Gathered::Candidates;
                }
                all_failing = true;
                continue;
            }
            if some_ejected {
                let tried = |at: &usize| allowed(*at) && on_port.begins_trial(*at, millis, false);
                if let Some(at) = all().find(tried) {
                    return Gathered::Trial(at);
                }
            }
            found.extend(members().filter(|at| stands(*at)).map(|at| (at, 0)));
            self.drop_aside(found, now);
            found.retain(|(at, _)| allowed(*at));
            if found.is_empty() {
                // All are excluded or aside; better one that is aside than a worse tier.
                found.extend(members().filter(|at| stands(*at) && allowed(*at)).map(|at| (at, 0)));
            }
            if found.is_empty() && on_port.is_cut() {
                found.extend(all().filter(|at| stands(*at) && allowed(*at)).map(|at| (at, 0)));
            }
            if !found.is_empty() {
                return Gathered::Candidates;
            }
        }
        if all_failing {
            return Gathered::AllFailing;
        }
        self.last_resort(on_port, now, allowed, found)
    }

    /// Which of `all`, who all fail, this request tries.
    fn takes_turn<All: Iterator<Item = usize>>(
        on_port: &OnPort,
        all: impl Fn() -> All,
        allowed: impl Fn(usize) -> bool,
        now: Millis,
    ) -> Option<usize> {
        if !all().any(&allowed) {
            return None;
        }
        let turn = on_port.group.takes_turn(all().count(), now)?;
        all().skip(turn).chain(all()).find(|at| allowed(*at))
    }

    fn tier(&self, on_port: &OnPort, at: usize, now: Instant) -> u8 {
        let pushed = self.slots[at].tier(now);
        if on_port.is_unwell(at) { pushed.max(tier(Health::Unhealthy)) } else { pushed }
    }

    /// Those that are ejected, when this request has tried all others.
    fn last_resort(
        &self,
        on_port: &OnPort,
        now: Instant,
        allowed: impl Fn(usize) -> bool,
        found: &mut Vec<(usize, u64)>,
    ) -> Gathered {
        let left = || on_port.serving.iter().copied().filter(|at| allowed(*at));
        let best = left().map(|at| self.tier(on_port, at, now)).min();
        found.extend(left().filter(|at| Some(self.tier(on_port, *at, now)) == best).map(|at| (at, 0)));
        if found.is_empty() { Gathered::Nobody } else { Gathered::Candidates }
    }

    /// Drops the slots that are put aside from `found`, but never more than half of them.
    fn drop_aside(&self, found: &mut Vec<(usize, u64)>, now: Instant) {
        let most = found.len() / 2;
        let is_aside = |at: usize| self.slots[at].is_aside(now);
        if found.iter().filter(|(at, _)| is_aside(*at)).count() > most {
            // Those that come back first stay.
            found.sort_by_key(|(at, _)| self.slots[*at].aside_until.filter(|_| is_aside(*at)));
            found.truncate(found.len() - most);
        } else {
            found.retain(|(at, _)| !is_aside(*at));
        }
    }
}
