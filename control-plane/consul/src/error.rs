//! What can go wrong with a call. Every error names the call and the agent; none holds a token.

use std::{fmt, io, path::PathBuf, time::Duration};

/// Which call failed, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `GET`, `PUT` or `DELETE`.
    pub method: http::Method,
    /// Percent-encoded path, without the query.
    pub path: String,
    /// `host:port` of the agent.
    pub agent: String,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at Consul agent {}", self.method, self.path, self.agent)
    }
}

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot work; nothing was sent.
    #[error("Consul client configuration: {0}")]
    Config(String),
    /// An argument that cannot be put into a request; nothing was sent.
    #[error("{what} {value:?} cannot be asked of Consul: {why}")]
    Argument {
        /// "service name", "key", ...
        what: &'static str,
        /// The offending value.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The token file could not be read; nothing was sent.
    #[error("reading the Consul token file {}: {source}; check the path and its permissions", path.display())]
    Token {
        /// The configured path.
        path: PathBuf,
        /// Why it could not be read.
        source: io::Error,
    },
    /// No connection; nothing was sent.
    #[error("{call}: no connection: {source}; is the agent running and its address right?")]
    Connect {
        /// The call.
        call: Call,
        /// Why there is no connection.
        source: io::Error,
    },
    /// The connection broke before the answer was complete. The request may have taken effect.
    #[error("{call}: the exchange broke off: {message}")]
    Broken {
        /// The call.
        call: Call,
        /// What the HTTP layer says.
        message: String,
    },
    /// No complete answer in time. The request may have taken effect.
    #[error("{call}: no complete answer within {after:?}")]
    Timeout {
        /// The call.
        call: Call,
        /// The deadline.
        after: Duration,
    },
    /// Any status that the call does not expect.
    #[error("{call}: status {status}: {message}")]
    Status {
        /// The call.
        call: Call,
        /// HTTP status.
        status: u16,
        /// Start of the body: Consul's own words.
        message: String,
    },
    /// The answer is larger than the client reads.
    #[error("{call}: the answer is larger than {limit} bytes")]
    TooLarge {
        /// The call.
        call: Call,
        /// The limit, bytes.
        limit: usize,
    },
    /// The answer is not what Consul's API says.
    #[error("{call}: the answer cannot be understood: {message}")]
    Answer {
        /// The call.
        call: Call,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    /// True where another agent may do better: this one is away, overloaded, broken or without a leader.
    pub(crate) fn blames_agent(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken { .. } | Self::Timeout { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }

    /// The HTTP status, where there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// True where it is not known whether the request took effect: it broke off on its way, or the agent broke over it.
    pub fn may_have_happened(&self) -> bool {
        match self {
            Self::Config(_) | Self::Argument { .. } | Self::Token { .. } | Self::Connect { .. } => false,
            Self::Broken { .. } | Self::Timeout { .. } | Self::TooLarge { .. } | Self::Answer { .. } => true,
            Self::Status { status, .. } => *status >= 500,
        }
    }

    /// True where Consul refused the token.
    pub fn is_unauthorized(&self) -> bool {
        matches!(self.status(), Some(401 | 403))
    }
}
