//! Whether a failed try is followed by another one.

use std::{sync::Arc, time::Duration};

use outrigger_api::v1;

use crate::traffic::{ms, percent};

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
