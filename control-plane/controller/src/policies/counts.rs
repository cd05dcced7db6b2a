//! How many proxies have a policy, of one controller. What is shown of it is the sum over all ([`crate::replicas`]).

use std::collections::BTreeMap;

use outrigger_policy::Key;
use serde::Serialize;

use crate::push::{Proxies, Taken};

/// Proxies that are listed as having refused an object.
const LISTED_REFUSALS: usize = 100;

/// The proxies that an object was sent to.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Counts {
    pub(crate) on: usize,
    pub(crate) accepted: usize,
    /// Some of them, [`LISTED_REFUSALS`] at most.
    pub(crate) refused: Vec<Refusal>,
    /// All of them.
    #[serde(skip)]
    pub(crate) refusing: usize,
}

/// A proxy that keeps what it had.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Refusal {
    pub(crate) proxy: String,
    pub(crate) reason: String,
}

impl Counts {
    /// Adds those of other proxies.
    pub(crate) fn add(&mut self, others: &Self) {
        self.on += others.on;
        self.accepted += others.accepted;
        self.refusing += others.refusing;
        let room = LISTED_REFUSALS.saturating_sub(self.refused.len());
        self.refused.extend(others.refused.iter().take(room).cloned());
    }
}

/// Of each object that any proxy of this controller has.
pub(crate) fn counts(proxies: &Proxies) -> BTreeMap<Key, Counts> {
    let mut counts: BTreeMap<Key, Counts> = BTreeMap::new();
    for (proxy, policies) in proxies.policies() {
        for (key, taken) in policies {
            let count = counts.entry(key).or_default();
            count.on += 1;
            match taken {
                Taken::Accepted => count.accepted += 1,
                Taken::Refused(reason) => {
                    count.refusing += 1;
                    if count.refused.len() < LISTED_REFUSALS {
                        count.refused.push(Refusal { proxy: proxy.clone(), reason: reason.to_string() });
                    }
                }
                Taken::Sent => {}
            }
        }
    }
    counts
}
