//! What the controller tells: where addresses and names lead, which services there are, who we may trust.

pub mod directory;
