//! What would be in force if files were applied: what is there, and the files over it.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use outrigger_policy::{Object, Policies, Stored};

/// `policies`, as they would be with `objects` applied.
///
/// An object that is there keeps its age, which decides conflicts; a new one is the youngest.
pub(super) fn overlay<'a>(policies: &Policies, objects: impl IntoIterator<Item = &'a Object>) -> Policies {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let mut all = policies.clone();
    for object in objects {
        let key = object.key();
        let created = all.get(&key).map_or(now, |stored| stored.created);
        let stored = Stored {
            object: object.clone(),
            revision: 0,
            created,
            updated: now,
            author: "these files".to_owned(),
        };
        all.insert(key, Arc::new(stored));
    }
    all
}
