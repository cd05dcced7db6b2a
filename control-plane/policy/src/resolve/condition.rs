//! What became of an object: the conditions of its status, in the Gateway API's words.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::kind::Key;
use crate::kinds::ParentReference;

/// What a condition is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionType {
    /// Whether the object is in force.
    Accepted,
    /// Whether all that a route refers to is there.
    ResolvedRefs,
    /// Some of it is not in force, though the object is.
    PartiallyInvalid,
}

/// Whether it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It does.
    True,
    /// It does not.
    False,
}

/// Why, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionReason {
    /// The object is in force.
    Accepted,
    /// An older object has the same target, or a more specific kind of route has the port.
    Conflicted,
    /// It cannot mean this.
    Invalid,
    /// The target does not exist, or not yet.
    TargetNotFound,
    /// No Service, or no port of it, is what a route's parent names.
    NoMatchingParent,
    /// All that it refers to is there.
    ResolvedRefs,
    /// A backend does not exist, or not yet.
    BackendNotFound,
    /// A backend is of another namespace, which does not grant it.
    RefNotPermitted,
    /// A reference is to a kind that is not supported.
    InvalidKind,
    /// A part of it has no effect here.
    UnsupportedValue,
    /// The mesh has as many as it can have; older ones stay.
    LimitReached,
}

/// One condition of an object's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, in one word.
    pub reason: ConditionReason,
    /// Why, for people.
    pub message: String,
    /// Of a route: the parent that it is about, as the route names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentReference>,
}

impl Condition {
    /// Whether the object is not in force, or not whole, by this condition.
    pub fn is_bad(&self) -> bool {
        (self.status == ConditionStatus::True) == (self.kind == ConditionType::PartiallyInvalid)
    }

    fn new(kind: ConditionType, status: ConditionStatus, reason: ConditionReason, message: String) -> Self {
        Self { kind, status, reason, message, parent: None }
    }

    pub(crate) fn accepted(message: impl Into<String>) -> Self {
        Self::new(ConditionType::Accepted, ConditionStatus::True, ConditionReason::Accepted, message.into())
    }

    pub(crate) fn refused(reason: ConditionReason, message: impl Into<String>) -> Self {
        Self::new(ConditionType::Accepted, ConditionStatus::False, reason, message.into())
    }

    pub(crate) fn partial(message: impl Into<String>) -> Self {
        Self::new(
            ConditionType::PartiallyInvalid,
            ConditionStatus::True,
            ConditionReason::UnsupportedValue,
            message.into(),
        )
    }

    /// Whether all references are there; if not, the first fault's reason and all faults' text.
    pub(crate) fn references(faults: &[(ConditionReason, String)]) -> Self {
        match faults.first() {
            None => Self::new(
                ConditionType::ResolvedRefs,
                ConditionStatus::True,
                ConditionReason::ResolvedRefs,
                "all that it refers to is there".to_owned(),
            ),
            Some((reason, _)) => {
                let texts: Vec<&str> = faults.iter().map(|(_, text)| &**text).collect();
                Self::new(ConditionType::ResolvedRefs, ConditionStatus::False, *reason, texts.join("; "))
            }
        }
    }

    pub(crate) fn of_parent(mut self, parent: &ParentReference) -> Self {
        self.parent = Some(parent.clone());
        self
    }
}

/// The conditions of all objects, in the order in which they were found.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Conditions(BTreeMap<Key, Vec<Condition>>);

impl Conditions {
    pub(crate) fn add(&mut self, key: &Key, condition: Condition) {
        self.0.entry(key.clone()).or_default().push(condition);
    }

    pub(crate) fn of(&self, key: &Key) -> &[Condition] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }
}
