//! What is wrong, and where.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kind::Key;

/// Something wrong in a file. `Display` is `file:line:column: path: message`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The file, as the caller names it.
    pub file: String,
    /// From 1; 0: not known.
    pub line: u64,
    /// In characters from 1; 0: not known.
    pub column: u64,
    /// The field, as in `spec.rules[0].name`; empty: the document.
    pub path: String,
    /// What was tried, why it failed and what to do.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Something wrong, or doubtful, in an object. `Display` is `kind namespace/name: path: message`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// The object.
    pub key: Key,
    /// The field, as in `spec.rules[0].name`; empty: the object.
    pub path: String,
    /// What it is and what to do.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.key)?;
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// What `validate` finds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Findings {
    /// With one of these nothing is taken.
    pub errors: Vec<Finding>,
    /// These are said, and hold nothing up.
    pub warnings: Vec<Finding>,
}
