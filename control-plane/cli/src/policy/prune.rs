//! `outrigger policy apply --prune`: what the files do not hold any more goes, in the write that applies them.
//!
//! What is to go is what the controller holds of a namespace, or of all, and no file does. That somebody may have objects there who
//! does not know of these files is why the namespace has to be named: the context's is not enough.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use clap::Args;
use outrigger_policy::{Key, Object};

use super::{Scope, api};

#[derive(Args)]
pub(super) struct Prune {
    /// Also delete what the controller holds and the files do not, in the namespace of -n or, with -A, in all
    #[arg(long, requires = "pruned")]
    prune: bool,
    /// With --prune: in all namespaces
    #[arg(short = 'A', long, requires = "prune")]
    all_namespaces: bool,
}

impl Prune {
    /// What goes beside `objects`, with the revision at which it was read: what somebody changes meanwhile stays.
    pub(super) async fn deletions(
        &self,
        scope: &Scope,
        objects: &[&Object],
    ) -> Result<BTreeMap<String, u64>> {
        if !self.prune {
            return Ok(BTreeMap::new());
        }
        let namespace = scope.namespace()?;
        let kept: BTreeSet<Key> = objects.iter().map(|object| object.key()).collect();
        let namespace = (!self.all_namespaces).then_some(&*namespace);
        let held = api::list(&scope.server()?, None, namespace).await?.into_iter();
        let gone = held.filter(|item| !kept.contains(&item.object.key()));
        Ok(gone.map(|item| (item.object.key().to_string(), item.revision)).collect())
    }
}
