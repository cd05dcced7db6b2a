//! Policies: where they are kept, how they change, and what they come to.
//!
//! The modules are the steps that a policy takes: `api` (what people send) -> `writer` (validate, compare, write) -> a
//! store (`embedded`, `consul` or `kubernetes`, behind [`PolicyStore`]) -> `resolver` (what all policies and the catalog come to) ->
//! [`crate::mesh`], which answers proxies with it. `status` goes the other way: what proxies said to it.
//!
//! One number orders everything: the store's *revision*, which grows with each write. A write names the revision that
//! it was judged against and fails where the store has moved on, so that no two writers ever judge what the other one
//! overwrites. A policy store is small (thousands of objects, written by people): to compare the whole costs nothing, and
//! leaves nothing to reason about.
//!
//! Last good wins here too. A store that cannot be read keeps its last picture and says so; one that lost what it held
//! (its revision is gone) is not believed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand;
use outrigger_policy::catalog::Grant;
use outrigger_policy::{Key, Object, Policies, Stored};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use crate::sources::{Fault, Sync};
use crate::tokens::hex;

pub(crate) mod consul;
pub(crate) mod counts;
pub(crate) mod embedded;
pub(crate) mod kubernetes;
pub(crate) mod resolver;
pub(crate) mod writer;

/// Writes of one object that are remembered.
pub(crate) const HISTORY: usize = 20;
/// Objects in a store: a bound on what a resolution can cost.
pub(crate) const MAX_POLICIES: usize = 10_000;
/// Deleted objects whose history is kept; beyond, those that were deleted first are forgotten.
const MAX_DELETED: usize = 1000;

/// All that a store holds at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Picture {
    /// Grows with each write; 0 where nothing was ever written.
    pub(crate) revision: u64,
    /// What is in force.
    pub(crate) policies: Arc<Policies>,
    /// Who may name Services of other namespaces as backends; `None`: everybody (see [`outrigger_policy::Catalog`]).
    pub(crate) grants: Option<BTreeSet<Grant>>,
    /// How far to trust it.
    pub(crate) sync: Sync,
    /// Records that cannot be read; of each the last good stays.
    pub(crate) faults: Vec<Fault>,
}

impl Picture {
    /// Whether a store elsewhere, `whose` policies these are, can be written by what this picture says: it is known how it is
    /// now, and the write was judged against that.
    fn takes(&self, write: &Write, whose: &str) -> Result<(), WriteError> {
        match &self.sync {
            Sync::Synced => {}
            Sync::Never => {
                return Err(WriteError::Unavailable(format!("{whose} policies were not read yet")));
            }
            Sync::Degraded { reason, .. } => return Err(WriteError::Unavailable(reason.clone())),
        }
        if self.revision == write.based_on { Ok(()) } else { Err(WriteError::Conflict) }
    }
}

/// One change of one object.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a write holds a few, and mostly of the large kind")]
pub(crate) enum Change {
    /// Creates or replaces it.
    Put(Object),
    /// Takes it away.
    Delete(Key),
}

impl Change {
    /// Whose it is.
    pub(crate) fn key(&self) -> Key {
        match self {
            Self::Put(object) => object.key(),
            Self::Delete(key) => key.clone(),
        }
    }
}

/// What is written together.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    /// The revision of the picture that the changes were judged against.
    pub(crate) based_on: u64,
    /// Who writes.
    pub(crate) author: String,
    /// When.
    pub(crate) at: SystemTime,
    /// At most one for each object.
    pub(crate) changes: Vec<Change>,
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// Somebody else wrote meanwhile.
    #[error("the policies have changed since they were read; read them again")]
    Conflict,
    /// The changes do not fit into one write.
    #[error("{0}")]
    TooLarge(String),
    /// The store cannot be written now.
    #[error("{0}")]
    Unavailable(String),
}

/// What happened to an object at one revision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Past {
    /// The store's revision.
    pub(crate) revision: u64,
    /// Unix seconds.
    pub(crate) time: i64,
    /// Who did it.
    pub(crate) author: String,
    /// What was done.
    pub(crate) action: Action,
    /// The object from then on; `None`: deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<Object>,
}

/// What was done to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Action {
    /// It was not there before.
    Created,
    /// It replaced an older one.
    Configured,
    /// It says what it said.
    Unchanged,
    /// It is gone.
    Deleted,
}

impl Action {
    /// As people and the API name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
            Self::Deleted => "deleted",
        }
    }
}

/// Where policies are kept.
#[tonic::async_trait]
pub(crate) trait PolicyStore: Send + std::marker::Sync + Debug {
    /// The newest picture; [`Picture::default`] until the store was read.
    fn pictures(&self) -> watch::Receiver<Arc<Picture>>;

    /// Writes all of it, durably, or nothing; where the store cannot do that for several objects the error says what was written. The
    /// pictures hold it when this returns.
    async fn commit(&self, write: Write) -> Result<Arc<Picture>, WriteError>;

    /// The last [`HISTORY`] writes of an object, the newest first, or those that the store remembers. Empty: it never was there. The error is a text.
    async fn history(&self, key: &Key) -> Result<Vec<Past>, String>;
}

/// What a write comes to.
#[derive(Debug)]
struct Outcome {
    policies: Policies,
    pasts: BTreeMap<Key, Past>,
}

/// Applies a write to what it was judged against. The store numbers it `revision`.
fn outcome(policies: &Policies, write: &Write, revision: u64) -> Result<Outcome, WriteError> {
    let time = unix(write.at);
    let mut policies = policies.clone();
    let mut pasts = BTreeMap::new();
    for change in &write.changes {
        let (key, action, object) = match change {
            Change::Put(object) => {
                let key = object.key();
                let before = policies.get(&key).cloned();
                let object =
                    stamped(object, before.as_deref().map(|stored| &stored.object), revision, write.at);
                let stored = Stored {
                    object: object.clone(),
                    revision,
                    created: before.as_ref().map_or(time, |before| before.created),
                    updated: time,
                    author: write.author.clone(),
                };
                policies.insert(key.clone(), Arc::new(stored));
                let action = if before.is_some() { Action::Configured } else { Action::Created };
                (key, action, Some(object))
            }
            Change::Delete(key) => {
                if policies.remove(key).is_none() {
                    return Err(WriteError::Conflict);
                }
                (key.clone(), Action::Deleted, None)
            }
        };
        pasts.insert(key, Past { revision, time, author: write.author.clone(), action, object });
    }
    if policies.len() > MAX_POLICIES {
        return Err(WriteError::TooLarge(format!(
            "there would be {} objects, and a mesh holds at most {MAX_POLICIES}",
            policies.len()
        )));
    }
    Ok(Outcome { policies, pasts })
}

/// The object with the server's part of its metadata, whatever the caller wrote there.
fn stamped(object: &Object, before: Option<&Object>, revision: u64, now: SystemTime) -> Object {
    let mut object = object.clone();
    let old = before.map(|before| &before.metadata);
    let same_spec = before.is_some_and(|before| before.spec == object.spec);
    let generation = old.and_then(|old| old.generation).unwrap_or(0) + i64::from(!same_spec);
    let metadata = &mut object.metadata;
    metadata.generation = Some(generation.max(1));
    metadata.resource_version = Some(revision.to_string());
    metadata.uid = Some(old.and_then(|old| old.uid.clone()).unwrap_or_else(new_uid));
    let created = || OffsetDateTime::from(now).replace_nanosecond(0).ok()?.format(&Rfc3339).ok();
    metadata.creation_timestamp = old.and_then(|old| old.creation_timestamp.clone()).or_else(created);
    object
}

/// Whether a write of `object` would change nothing: the server's part of the metadata does not count.
pub(crate) fn says_the_same(object: &Object, other: &Object) -> bool {
    let (a, b) = (&object.metadata, &other.metadata);
    object.spec == other.spec && a.labels == b.labels && a.annotations == b.annotations
}

/// 128 random bits in the form of RFC 9562, version 4.
fn new_uid() -> String {
    let mut bytes = [0; 16];
    // It tells two objects of one name apart and guards nothing: without the kernel's randomness a weaker one does.
    if rand::fill(&mut bytes).is_err() {
        fastrand::fill(&mut bytes);
    }
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

fn unix(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
