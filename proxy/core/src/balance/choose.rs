//! Who is asked, of those who may be.

use std::{sync::Arc, time::Instant};

use super::{Balancer, slot::Slot};
use crate::{
    hash::{Maglev, Member, Ring, mix},
    traffic::Algorithm,
};

/// Where the keys of one service port belong. Kept over pushes that do not change who there is.
#[derive(Debug)]
pub(super) struct Table {
    /// By id, with weights, in the order of the slots that serve the port.
    members: Vec<Member>,
    finder: Finder,
}

#[derive(Debug)]
enum Finder {
    Ring(Ring),
    Maglev(Maglev),
}

impl Table {
    fn new(algorithm: Algorithm, slots: &[Slot], serving: &[usize]) -> Self {
        let members: Vec<Member> =
            members(slots, serving).map(|(id, weight)| (Arc::clone(id), weight)).collect();
        let finder = match algorithm {
            Algorithm::RingHash => Finder::Ring(Ring::new(&members)),
            _ => Finder::Maglev(Maglev::new(&members)),
        };
        Self { members, finder }
    }

    pub(super) fn is_of(&self, algorithm: Algorithm) -> bool {
        match self.finder {
            Finder::Ring(_) => algorithm == Algorithm::RingHash,
            Finder::Maglev(_) => algorithm == Algorithm::Maglev,
        }
    }

    pub(super) fn is_for(&self, slots: &[Slot], serving: &[usize]) -> bool {
        members(slots, serving).eq(self.members.iter().map(|(id, weight)| (id, *weight)))
    }
}

fn members<'a>(slots: &'a [Slot], serving: &'a [usize]) -> impl Iterator<Item = (&'a Arc<str>, u32)> {
    serving.iter().map(|at| &slots[*at].endpoint).map(|endpoint| (&endpoint.id, endpoint.weight.max(1)))
}

impl Balancer {
    /// One of `found`, whose weights are filled in here.
    pub(super) fn choose(
        &mut self,
        port: u16,
        found: &mut Vec<(usize, u64)>,
        now: Instant,
        rng: &mut fastrand::Rng,
        key: Option<u64>,
    ) -> Option<usize> {
        for (at, weight) in &mut *found {
            *weight = self.slots[*at].weight(now, self.policy.slow_start);
        }
        if self.policy.zone_percent > 0 && !self.zone.is_empty() {
            self.keep_zone(port, found, now, rng, key);
        }
        let typical = self.typical();
        match (self.policy.algorithm, key) {
            (Algorithm::RoundRobin, _) => self.next_in_turn(found),
            (Algorithm::Random, _) => {
                let total = found.iter().map(|(_, weight)| weight).sum();
                draw(found, total, None, rng).map(|(at, _)| *at)
            }
            (Algorithm::LeastRequest, _) => less_loaded(found, rng, |at, share| self.slots[at].queue(share)),
            (Algorithm::RingHash | Algorithm::Maglev, Some(key)) => self.owner(port, found, key),
            (Algorithm::PeakEwma | Algorithm::RingHash | Algorithm::Maglev, _) => {
                less_loaded(found, rng, |at, share| self.slots[at].load(typical, share, now))
            }
        }
    }

    /// Leaves those of the own zone, or of the others: the own zone has all while enough of it stands, and then the
    /// share that does. Of a key it depends on the key, so that it stays where it is.
    fn keep_zone(
        &self,
        port: u16,
        found: &mut Vec<(usize, u64)>,
        now: Instant,
        rng: &mut fastrand::Rng,
        key: Option<u64>,
    ) {
        let own = |at: usize| self.is_in_own_zone(at);
        let standing: u64 = found.iter().filter(|(at, _)| own(*at)).map(|(_, weight)| weight).sum();
        let whole = self.on_ports[&port].subset.iter().filter(|at| own(**at));
        let whole: u64 = whole.map(|at| self.slots[*at].weight(now, self.policy.slow_start)).sum();
        let enough = whole * u64::from(self.policy.zone_percent) / 100;
        if standing == 0 || found.iter().all(|(at, _)| own(*at)) {
            return;
        }
        let stays = standing >= enough || {
            let drawn = key.map_or_else(|| rng.u64(..), |key| mix(!key)) % enough;
            drawn < standing
        };
        found.retain(|(at, _)| own(*at) == stays);
    }

    /// Smooth weighted round-robin: each gains its weight with every request, the first in line pays for all.
    fn next_in_turn(&mut self, found: &[(usize, u64)]) -> Option<usize> {
        let mut total = 0;
        for (at, weight) in found {
            let weight = i128::from(*weight);
            total += weight;
            self.slots[*at].turn += weight;
        }
        let chosen =
            found.iter().map(|(at, _)| *at).max_by_key(|at| (self.slots[*at].turn, usize::MAX - at))?;
        self.slots[chosen].turn -= total;
        Some(chosen)
    }

    /// Who a key belongs to.
    fn owner(&mut self, port: u16, found: &[(usize, u64)], key: u64) -> Option<usize> {
        let serving = &self.on_ports[&port].serving;
        let (algorithm, slots) = (self.policy.algorithm, &self.slots);
        let table = self.tables.entry(port).or_insert_with(|| Table::new(algorithm, slots, serving));
        let may_be = |number: usize| found.iter().any(|(at, _)| *at == serving[number]);
        let number = match &table.finder {
            Finder::Ring(ring) => ring.find(key, may_be),
            Finder::Maglev(maglev) => maglev.find(key, may_be),
        };
        // A table has no room for more members than places.
        number.map(|number| serving[number]).or_else(|| found.first().map(|(at, _)| *at))
    }
}

/// Two are drawn by weight, and the second replaces the first with the probability by which it is less loaded.
fn less_loaded(
    found: &[(usize, u64)],
    rng: &mut fastrand::Rng,
    load: impl Fn(usize, f64) -> f64,
) -> Option<usize> {
    let total: u64 = found.iter().map(|(_, weight)| weight).sum();
    let first = draw(found, total, None, rng)?;
    let Some(second) = draw(found, total - first.1, Some(first.0), rng) else { return Some(first.0) };
    #[expect(clippy::cast_precision_loss, reason = "weights are only compared")]
    let load = |(at, weight): &(usize, u64)| load(*at, *weight as f64 * found.len() as f64 / total as f64);
    Some(if rng.f64() < 1.0 - load(second) / load(first) { second.0 } else { first.0 })
}

/// Draws one by weight, but not `except`; `total` is the sum of the others' weights.
fn draw<'a>(
    candidates: &'a [(usize, u64)],
    total: u64,
    except: Option<usize>,
    rng: &mut fastrand::Rng,
) -> Option<&'a (usize, u64)> {
    if total == 0 {
        return None;
    }
    let mut left = rng.u64(0..total);
    candidates.iter().filter(|(at, _)| Some(*at) != except).find(|(_, weight)| {
        let here = left < *weight;
        left = left.saturating_sub(*weight);
        here
    })
}
