//! Hashes that stay the same, over restarts, builds and proxies, and what is chosen by them.
//!
//! Two ways to find one of several by a key, so that few keys move when one of several comes or goes. **A ring**: each has points on a
//! circle in proportion to its weight, a key belongs to the next point. Only the keys of who leaves move, but shares differ by some
//! percent, and a look-up is a binary search. **Maglev** (Eisenbud et al., NSDI 2016, section 3.4): a table whose places are dealt out in
//! turns. Shares are even to a fraction of a percent and a look-up is one access; a few keys of others move, too.
//! Both are asked with a condition: a key whose own place may not be used goes elsewhere, and comes back afterwards.

use std::sync::Arc;

/// FNV-1a, then the finalizer of splitmix64, for FNV alone orders similar names alike. Not the standard library's
/// hash: what is chosen by it must be the same after a restart with a newer build. Not for keys that an attacker gains by colliding.
pub fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed;
    mix(bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// The finalizer of splitmix64: every bit of the result depends on every bit of `value`.
pub fn mix(value: u64) -> u64 {
    let mixed = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Who is to be found by a key: a name that stays the same, and a weight of 1 or more.
pub type Member = (Arc<str>, u32);

/// Points of the member with the largest weight: shares then differ by less than a tenth.
const POINTS: u64 = 256;

/// Places of a table: a prime, so that every step width reaches all of them, and a hundred for each of some hundred
/// members, which keeps shares even.
const PLACES: usize = 65_537;

/// Places that are tried for a key whose own may not be used, before one after the other is.
const REHASHES: u64 = 32;

/// Members on a circle.
#[derive(Debug)]
pub struct Ring {
    /// Sorted. The member's number.
    points: Vec<(u64, u32)>,
}

/// When a member of a table has its turns: what place it wishes next, and what it is due.
struct Turns {
    next: usize,
    step: usize,
    weight: u64,
    due: u64,
}

/// Members in a table.
#[derive(Debug)]
pub struct Maglev {
    /// The member's number; empty where there is none.
    places: Vec<u32>,
}

impl Ring {
    /// A ring of these; their numbers are their places in `members`.
    pub fn new(members: &[Member]) -> Self {
        let largest = members.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(1).max(1);
        let mut points = Vec::new();
        for (number, (name, weight)) in (0..).zip(members) {
            let own = hash(0, name.as_bytes());
            let count = (POINTS * u64::from(*weight) / largest).max(1);
            points.extend((0..count).map(|point| (mix(own.wrapping_add(point)), number)));
        }
        points.sort_unstable();
        Self { points }
    }

    /// The number of the member that a key belongs to, of those that may be used.
    pub fn find(&self, key: u64, mut may_be: impl FnMut(usize) -> bool) -> Option<usize> {
        let first = self.points.partition_point(|(point, _)| *point < key);
        let (before, after) = self.points.split_at(first);
        after.iter().chain(before).map(|(_, number)| *number as usize).find(|number| may_be(*number))
    }
}

impl Maglev {
    /// A table of these; their numbers are their places in `members`. Of more members than it has places, some have none.
    pub fn new(members: &[Member]) -> Self {
        const FREE: u32 = u32::MAX;
        if members.is_empty() {
            return Self { places: Vec::new() };
        }
        let places = PLACES as u64;
        #[expect(clippy::cast_possible_truncation, reason = "less than the number of places")]
        let place = |value: u64| value as usize;
        let mut turns: Vec<Turns> = members
            .iter()
            .map(|(name, weight)| Turns {
                next: place(hash(1, name.as_bytes()) % places),
                step: place(hash(2, name.as_bytes()) % (places - 1) + 1),
                weight: u64::from((*weight).max(1)),
                due: 0,
            })
            .collect();
        let largest = turns.iter().map(|turns| turns.weight).max().unwrap_or(1);
        let mut table = vec![FREE; PLACES];
        let mut left = PLACES;
        'full: loop {
            for (number, member) in (0..).zip(&mut turns) {
                // The one with the largest weight has a turn in every round, the others in proportion.
                member.due += member.weight;
                if member.due < largest {
                    continue;
                }
                member.due -= largest;
                while table[member.next] != FREE {
                    member.next = (member.next + member.step) % PLACES;
                }
                table[member.next] = number;
                left -= 1;
                if left == 0 {
                    break 'full;
                }
            }
        }
        Self { places: table }
    }

    /// The number of the member that a key belongs to, of those that may be used.
    pub fn find(&self, key: u64, mut may_be: impl FnMut(usize) -> bool) -> Option<usize> {
        if self.places.is_empty() {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "less than the number of places")]
        let at = |key: u64| (key % PLACES as u64) as usize;
        // Each key in its own order: the keys of one that may not be used spread over all others.
        let order = (1..REHASHES).map(|round| mix(key.wrapping_add(round)));
        let own = std::iter::once(key).chain(order).map(|key| self.places[at(key)] as usize);
        if let Some(found) = own.into_iter().find(|number| may_be(*number)) {
            return Some(found);
        }
        let (before, after) = self.places.split_at(at(key));
        after.iter().chain(before).map(|number| *number as usize).find(|number| may_be(*number))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEYS: u32 = 4000;

    fn members(weights: &[u32]) -> Vec<Member> {
        weights.iter().enumerate().map(|(number, weight)| (format!("e{number}").into(), *weight)).collect()
    }

    type Find = Box<dyn Fn(u64, &dyn Fn(usize) -> bool) -> Option<usize>>;

    fn both(members: &[Member]) -> [Find; 2] {
        let (ring, maglev) = (Ring::new(members), Maglev::new(members));
        [
            Box::new(move |key, may_be| ring.find(key, may_be)),
            Box::new(move |key, may_be| maglev.find(key, may_be)),
        ]
    }

    fn keys() -> impl Iterator<Item = u64> {
        (0..KEYS).map(|key| mix(key.into()))
    }

    #[test]
    fn hashes_are_what_they_were() {
        // Other values would move every key and every subset when proxies are upgraded.
        assert_eq!(hash(0, b""), 17_665_956_581_633_026_203);
        assert_eq!(hash(0, b"a"), 198_367_012_849_983_736);
        assert_eq!(hash(7, b"endpoint"), 10_203_242_198_415_824_552);
    }

    #[test]
    fn shares_follow_the_weights() {
        let members = members(&[1, 2, 3, 4, 10]);
        for (find, slack) in both(&members).iter().zip([0.35, 0.08]) {
            let mut shares = [0_u32; 5];
            for key in keys() {
                shares[find(key, &|_| true).unwrap()] += 1;
            }
            for (share, (_, weight)) in shares.iter().zip(&members) {
                let (share, fair) = (f64::from(*share), f64::from(*weight) * f64::from(KEYS) / 20.0);
                assert!((share - fair).abs() <= fair * slack + 30.0, "{shares:?}");
            }
        }
    }

    #[test]
    fn a_table_deals_out_evenly() {
        let maglev = Maglev::new(&members(&[1; 50]));
        let mut shares = [0_usize; 50];
        maglev.places.iter().for_each(|number| shares[*number as usize] += 1);
        assert!(shares.iter().all(|share| share.abs_diff(PLACES / 50) <= 1), "{shares:?}");
    }

    #[test]
    fn nobody_is_found_among_none() {
        for find in both(&[]) {
            assert_eq!(find(7, &|_| true), None);
        }
        for find in both(&members(&[1, 1])) {
            assert_eq!(find(7, &|_| false), None);
            assert_eq!(find(7, &|number| number == 1), Some(1));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn few_keys_move_when_one_leaves(count in 2_usize..60, leaves: prop::sample::Index) {
            let leaves = leaves.index(count);
            let all = members(&vec![1; count]);
            let mut fewer = all.clone();
            fewer.remove(leaves);
            for (at, (before, after)) in both(&all).iter().zip(both(&fewer)).enumerate() {
                let mut moved = 0;
                for key in keys() {
                    let (was, is) = (before(key, &|_| true).unwrap(), after(key, &|_| true).unwrap());
                    let stays = all[was].0 == fewer[is].0;
                    moved += usize::from(!stays);
                    prop_assert!(at == 1 || stays || was == leaves, "on a ring nobody else's keys move");
                }
                prop_assert!(moved * count <= 2 * KEYS as usize, "{moved} of {count}");
            }
        }

        #[test]
        fn keys_of_one_that_may_not_be_used_spread_and_the_others_stay(count in 3_usize..20, out: prop::sample::Index) {
            let out = out.index(count);
            for find in both(&members(&vec![1; count])) {
                let mut heirs = std::collections::BTreeSet::new();
                for key in keys() {
                    let (own, other) = (find(key, &|_| true).unwrap(), find(key, &|number| number != out).unwrap());
                    let is_right = if own == out { other != out } else { other == own };
                    prop_assert!(is_right, "{own} {other}");
                    if own == out {
                        heirs.insert(other);
                    }
                }
                prop_assert!(heirs.len() > (count - 1) / 2, "{heirs:?}");
            }
        }
    }
}
