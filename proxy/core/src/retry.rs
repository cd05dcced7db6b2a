//! Whether a failed try is followed by another one.
//!
//! Four things must agree. **The policy** names the failure. **The request** can be repeated: its body is still there, nothing of an
//! answer has gone out, and to repeat it does no harm (RFC 9110, 9.2.2, an `Idempotency-Key`, or the policy's word for
//! it; gRPC is POST, so it needs one of the latter two). **Nobody else** repeats it: where each hop of a chain tries three times, the last one
//! is asked 3^n times, so a request that says that it is a repetition is not repeated again, unless it is certain that nothing has happened.
//! **There is room**: attempts, time until the deadline, a pause that the endpoint asks for and that is not too long; and the
//! service's [`Budget`], which the caller asks last, for it counts what it grants.

mod after;
mod budget;

use std::{sync::Arc, time::Duration};

use outrigger_api::v1;

pub use self::budget::Budget;
use crate::{
    request::View,
    traffic::{ms, percent},
};

/// The header that says how many times a request was repeated before. Not one of `outrigger-`: these end at each
/// application, and an application that passes on what it does not know is what makes a chain visible.
pub const ATTEMPT_HEADER: &str = "x-retry-attempt";

/// What gRPC clients say the same with (gRFC A6).
const GRPC_ATTEMPT_HEADER: &str = "grpc-previous-rpc-attempts";

/// Tries beside the first one that a policy may ask for: more only make an outage worse.
const MAX_ATTEMPTS: u32 = 100;

/// Bytes of a body that a policy may have kept, for each request under way: 16 MiB.
const MAX_BODY: u32 = 16 * 1024 * 1024;

/// What is tried again, how often, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Tries beside the first one.
    pub attempts: u32,
    /// Response statuses that are tried again.
    pub statuses: Vec<u16>,
    /// gRPC status codes that are tried again, where the response is without messages.
    pub grpc_codes: Vec<u8>,
    /// Whether a connection that ended, or a stream that was reset, before there was an answer is.
    pub reset: bool,
    /// Whether a try that took longer than its time-out is.
    pub per_try_timeout: bool,
    /// Also requests that are not safe to repeat.
    pub unsafe_methods: bool,
    /// The first pause; doubled each time, drawn between half and the whole.
    pub backoff: Duration,
    /// The longest pause; also the longest that an endpoint may ask for.
    pub max_backoff: Duration,
    /// Retries may be this share of requests.
    pub budget_percent: u32,
    /// And so many a second beside.
    pub budget_floor: u32,
    /// Bytes of a request's body that are kept; a request with more is not tried again.
    pub max_body: usize,
    /// Who said so.
    pub origin: Arc<str>,
}

impl Default for Retry {
    /// No failure is named that would be tried again; the rest is what a policy gets that says nothing of it. Its budget, a fifth and
    /// ten a second, is what hedges of services without a policy for retries are taken from.
    fn default() -> Self {
        Self {
            attempts: 1,
            statuses: Vec::new(),
            grpc_codes: Vec::new(),
            reset: false,
            per_try_timeout: false,
            unsafe_methods: false,
            backoff: Duration::from_millis(25),
            max_backoff: Duration::from_millis(250),
            budget_percent: 20,
            budget_floor: 10,
            max_body: 64 * 1024,
            origin: Arc::default(),
        }
    }
}

impl Retry {
    pub(crate) fn from_wire(wire: &v1::Retry) -> Result<Self, String> {
        if wire.attempts > MAX_ATTEMPTS {
            return Err(format!("{} attempts are more than {MAX_ATTEMPTS}", wire.attempts));
        }
        if wire.max_body > MAX_BODY {
            return Err(format!("to keep {} bytes of a body is more than {MAX_BODY}", wire.max_body));
        }
        let status = |status: &u32| match u16::try_from(*status) {
            Ok(status @ 400..=599) => Ok(status),
            _ => Err(format!("{status} is no status of a failure")),
        };
        let code = |code: &u32| match u8::try_from(*code) {
            Ok(code @ 1..=16) => Ok(code),
            _ => Err(format!("{code} is no gRPC status of a failure")),
        };
        Ok(Self {
            attempts: wire.attempts,
            statuses: wire.statuses.iter().map(status).collect::<Result<_, _>>()?,
            grpc_codes: wire.grpc_codes.iter().map(code).collect::<Result<_, _>>()?,
            reset: wire.reset,
            per_try_timeout: wire.per_try_timeout,
            unsafe_methods: wire.unsafe_methods,
            backoff: ms(wire.backoff),
            max_backoff: ms(wire.max_backoff.max(wire.backoff)),
            budget_percent: percent("the budget", wire.budget_percent)?,
            budget_floor: wire.budget_floor,
            max_body: wire.max_body as usize,
            origin: (&*wire.origin).into(),
        })
    }
}

/// How a try has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// By a response's status.
    Status {
        /// 400 or more.
        status: u16,
        /// How long the endpoint asks to wait; [`Duration::MAX`]: for ever.
        retry_after: Option<Duration>,
    },
    /// By a gRPC status.
    Grpc {
        /// Never 0.
        code: u8,
        /// The response's HTTP status: other than 200 where something between answered that does not speak gRPC, and `code` is
        /// what gRPC's mapping makes of it.
        status: u16,
        /// As in [`Failure::Status`].
        retry_after: Option<Duration>,
    },
    /// The connection ended, or the stream was reset, after the request was sent and before there was an answer.
    Reset,
    /// The time-out of one try has passed.
    PerTryTimeout,
    /// Certainly nobody has acted on the request: there was no connection, or it was refused unread.
    NothingHappened,
}

/// What is known of the request whose try has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tried {
    /// Retries so far.
    pub retries: u32,
    /// See [`is_safe_to_repeat`].
    pub is_safe: bool,
    /// Everything that was sent is still there.
    pub is_repeatable: bool,
    /// Something of an answer has gone out.
    pub is_answered: bool,
    /// See [`attempt_of`].
    pub callers_attempt: u32,
    /// Until the deadline; `None`: there is none.
    pub left: Option<Duration>,
}

/// Whether there is another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Yes, if the budget has room.
    Again {
        /// After this pause.
        after: Duration,
    },
    /// No.
    No(Why),
}

/// Why there is no other try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Something of an answer has gone out.
    Answered,
    /// The request's body was not kept.
    Body,
    /// The policy does not name this failure.
    NotNamed,
    /// All attempts were made.
    Attempts,
    /// The request is a repetition itself.
    CallersRetry,
    /// To repeat the request could do harm.
    Unsafe,
    /// The endpoint asks for a longer pause than there may be.
    RetryAfter,
    /// The deadline would have passed.
    Deadline,
}

impl Why {
    /// As a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Body => "body",
            Self::NotNamed => "not_named",
            Self::Attempts => "attempts",
            Self::CallersRetry => "callers_retry",
            Self::Unsafe => "unsafe",
            Self::RetryAfter => "retry_after",
            Self::Deadline => "deadline",
        }
    }
}

impl Failure {
    /// Whether it speaks against the endpoint, and not against the request.
    pub fn is_the_endpoints_fault(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status >= 500,
            Self::Grpc { code, status, .. } => is_endpoints_fault(*code) && !(400..500).contains(status),
            Self::Reset | Self::PerTryTimeout | Self::NothingHappened => true,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } | Self::Grpc { retry_after, .. } => *retry_after,
            Self::Reset | Self::PerTryTimeout | Self::NothingHappened => None,
        }
    }
}

impl Retry {
    /// Whether, and after which pause, a try that has failed is followed by another one.
    pub fn decide(&self, failure: &Failure, tried: &Tried, rng: &mut fastrand::Rng) -> Verdict {
        let certain = *failure == Failure::NothingHappened;
        let no = if tried.is_answered {
            Why::Answered
        } else if !tried.is_repeatable {
            Why::Body
        } else if !self.names(failure) {
            Why::NotNamed
        } else if tried.retries >= self.attempts {
            Why::Attempts
        } else if tried.callers_attempt > 0 && !certain {
            Why::CallersRetry
        } else if !tried.is_safe && !self.unsafe_methods && !certain {
            Why::Unsafe
        } else {
            return self.pause(failure, tried, rng);
        };
        Verdict::No(no)
    }

    fn names(&self, failure: &Failure) -> bool {
        match failure {
            Failure::Status { status, .. } => self.statuses.contains(status),
            Failure::Grpc { code, status, .. } => {
                self.grpc_codes.contains(code) || self.statuses.contains(status)
            }
            Failure::Reset => self.reset,
            Failure::PerTryTimeout => self.per_try_timeout,
            Failure::NothingHappened => true,
        }
    }

    fn pause(&self, failure: &Failure, tried: &Tried, rng: &mut fastrand::Rng) -> Verdict {
        let asked = failure.retry_after().unwrap_or_default();
        if asked > self.max_backoff {
            return Verdict::No(Why::RetryAfter);
        }
        let whole = self.backoff.saturating_mul(1 << tried.retries.min(16)).min(self.max_backoff);
        let after = whole.mul_f64(0.5 + rng.f64() / 2.0).max(asked);
        if tried.left.is_some_and(|left| left <= after) {
            return Verdict::No(Why::Deadline);
        }
        Verdict::Again { after }
    }
}

/// Whether to repeat a request does no harm: its method is idempotent (RFC 9110, 9.2.2), or it has an `Idempotency-Key`.
pub fn is_safe_to_repeat<V: View>(view: &V) -> bool {
    matches!(view.method(), b"GET" | b"HEAD" | b"PUT" | b"DELETE" | b"OPTIONS" | b"TRACE")
        || view.values("idempotency-key").next().is_some()
}

/// How many times the request was repeated before it came here; 0: it says nothing of it.
pub fn attempt_of<V: View>(view: &V) -> u32 {
    let attempts = [ATTEMPT_HEADER, GRPC_ATTEMPT_HEADER].map(|name| {
        let numbers = view.values(name).filter_map(|value| after::number(value.trim_ascii()));
        numbers.max().unwrap_or(0)
    });
    u32::try_from(attempts[0].max(attempts[1])).unwrap_or(u32::MAX)
}

/// Says in a request's head that this is the `attempt`th repetition; `set` sets a header. The first try says nothing.
pub fn mark_attempt(attempt: u32, set: impl FnOnce(&str, &[u8])) {
    if attempt > 0 {
        set(ATTEMPT_HEADER, attempt.to_string().as_bytes());
    }
}

/// What a response's status says of the try; `field` finds a header, or a trailer where the status is there. `None`: it has not failed.
pub fn failure<'a>(is_grpc: bool, status: u16, field: impl Fn(&str) -> Option<&'a [u8]>) -> Option<Failure> {
    let code = is_grpc.then(|| grpc_status(&field).or_else(|| grpc_status_of(status))).flatten();
    match code {
        Some(0) => None,
        Some(code) => Some(Failure::Grpc { code, status, retry_after: after::asked(true, &field) }),
        None if !is_grpc && status >= 400 => {
            Some(Failure::Status { status, retry_after: after::asked(false, &field) })
        }
        None => None,
    }
}

/// The gRPC status that is in these fields. One that cannot be read is 2, UNKNOWN.
pub fn grpc_status<'a>(field: impl Fn(&str) -> Option<&'a [u8]>) -> Option<u8> {
    let code = after::number(field("grpc-status")?.trim_ascii());
    Some(code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code <= 16).unwrap_or(2))
}

/// What gRPC makes of a response that has no status of its own (grpc/doc/http-grpc-status-mapping.md).
fn grpc_status_of(http_status: u16) -> Option<u8> {
    match http_status {
        200 => None,
        400 => Some(13),
        401 => Some(16),
        403 => Some(7),
        404 => Some(12),
        429 | 502 | 503 | 504 => Some(14),
        _ => Some(2),
    }
}

/// Whether a gRPC status speaks against the endpoint: `UNKNOWN`, `DEADLINE_EXCEEDED`,
/// `RESOURCE_EXHAUSTED`, `INTERNAL`, `UNAVAILABLE`.
pub fn is_endpoints_fault(grpc_status: u8) -> bool {
    matches!(grpc_status, 2 | 4 | 8 | 13 | 14)
}

#[cfg(test)]
mod tests;
