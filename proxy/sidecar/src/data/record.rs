//! What is counted of a request, and when: at the response's head, or for gRPC, whose outcome is in the trailers, at the
//! end of its body. The duration is until the head in either case.

use std::{rc::Rc, time::Duration};

use http::{HeaderMap, Response};
use outrigger_core::reason::Reason;
use tokio::time::Instant;

use super::{
    body::Body,
    reasons::{is_grpc, reason_of},
};
use crate::metrics::{Edge, Outcome};

/// Stands for the status of a gRPC response that ended without one: it was cut off.
const NO_GRPC_STATUS: &str = "none";

/// Records a request when it is dropped.
pub(crate) struct Recorder {
    edge: Rc<Edge>,
    outcome: Outcome,
    duration: Duration,
}

impl Recorder {
    /// The trailers have come.
    pub(crate) fn trailers(&mut self, trailers: &HeaderMap) {
        self.outcome.grpc_status = grpc_status(trailers).unwrap_or(NO_GRPC_STATUS);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.edge.request(self.outcome, self.duration);
    }
}

/// Has a request recorded that began at `begun` and is answered with `response`.
pub(crate) fn record(
    edge: &Rc<Edge>,
    protocol: &'static str,
    begun: Instant,
    response: Response<Body>,
) -> Response<Body> {
    let headers = response.headers();
    let status = grpc_status(headers);
    let in_trailers = is_grpc(headers) && status.is_none();
    let outcome = Outcome {
        protocol,
        code: response.status().as_u16(),
        grpc_status: status.unwrap_or(if in_trailers { NO_GRPC_STATUS } else { "" }),
        reason: reason_of(headers).map_or("", Reason::code),
    };
    let recorder = Recorder { edge: edge.clone(), outcome, duration: begun.elapsed() };
    if in_trailers { response.map(|body| body.recorded(recorder)) } else { response }
}

/// A gRPC status, as a word for metrics.
fn grpc_status(headers: &HeaderMap) -> Option<&'static str> {
    const CODES: [&str; 17] =
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"];
    let value = headers.get("grpc-status")?;
    Some(CODES.iter().find(|code| code.as_bytes() == value.as_bytes()).unwrap_or(&"other"))
}
