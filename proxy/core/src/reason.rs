//! Why the mesh answered in the application's stead.
//!
//! One list for every component, so that a header, a log line and a metric label say the same word, and a word can be
//! looked up in the documentation. A code, once released, keeps its meaning.

use std::fmt;

/// The header that carries a reason: `<component>; <code>; <text>`.
pub const REASON_HEADER: &str = "outrigger-reason";

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $http:literal, $grpc:literal;)+) => {
        /// A documented reason code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $variant,)+ }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The code, as it stands in headers and metric labels.
            pub fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)+ }
            }

            /// The HTTP status that goes with it.
            pub fn http_status(self) -> u16 {
                match self { $(Self::$variant => $http,)+ }
            }

            /// The gRPC status that goes with it (grpc/doc/statuscodes.md).
            pub fn grpc_status(self) -> u8 {
                match self { $(Self::$variant => $grpc,)+ }
            }

            /// What it means, for the documentation.
            pub fn description(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii_start(),)+ }
            }
        }
    };
}

reasons! {
    /// An address of the mesh was dialled and discovery did not answer in time.
    DiscoveryUnavailable = "discovery_unavailable", 503, 14;
    /// An address or name of the mesh was dialled that no synced source knows.
    NoSuchDestination = "no_such_destination", 503, 14;
    /// The destination is outside the mesh and the outbound default refuses it.
    OutboundDenied = "outbound_denied", 403, 7;
    /// The service is known and has no endpoint for the dialled port.
    NoEndpoints = "no_endpoints", 503, 14;
    /// No endpoint accepted a connection.
    ConnectFailed = "connect_failed", 503, 14;
    /// No endpoint accepted a connection in time.
    ConnectTimeout = "connect_timeout", 503, 14;
    /// The peer could not prove the identity that the catalog names for it.
    IdentityMismatch = "identity_mismatch", 503, 14;
    /// This proxy has no valid certificate.
    NoCertificate = "no_certificate", 503, 14;
    /// The peer's sidecar or application closed the connection before it answered.
    UpstreamReset = "upstream_reset", 502, 14;
    /// The application answered something that is no valid HTTP.
    UpstreamProtocol = "upstream_protocol", 502, 13;
    /// No response began within the request time-out.
    RequestTimeout = "request_timeout", 504, 4;
    /// The caller is not allowed to do this.
    AccessDenied = "access_denied", 403, 7;
    /// Plaintext, or a certificate that is not the mesh's, on a port that requires mutual TLS.
    PlaintextRefused = "plaintext_refused", 403, 7;
    /// The request is ambiguous or malformed; passing it on would let two readers see two requests.
    BadRequest = "bad_request", 400, 13;
    /// The request head is larger than the proxy accepts.
    HeadersTooLarge = "headers_too_large", 431, 8;
    /// A bound was hit: connections, streams or queue.
    Overloaded = "overloaded", 503, 8;
    /// The workload is shutting down.
    Draining = "draining", 503, 14;
    /// The service has routes, and none of them takes the request.
    NoRoute = "no_route", 404, 12;
    /// The route leads to a backend that does not exist or may not be used.
    InvalidBackend = "invalid_backend", 500, 14;
    /// A policy injects faults, and this request was one of its share.
    FaultInjected = "fault_injected", 503, 14;
    /// The caller, or all callers together, have used up what a rate limit allows.
    RateLimited = "rate_limited", 429, 8;
    /// A bound that a policy sets was reached: requests, connections or waiting requests of one service.
    LimitReached = "limit_reached", 503, 8;
    /// Every endpoint of the service has failed just now; one is tried again soon.
    EndpointsFailing = "endpoints_failing", 503, 14;
    /// A connection would have led back into this proxy.
    Loop = "loop", 508, 13;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_distinct_words_that_fit_a_header_and_a_label() {
        let codes: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert!(reason.code().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{reason}");
            assert!((400..600).contains(&reason.http_status()), "{reason}");
            assert!((1..=16).contains(&reason.grpc_status()), "{reason}");
            let description = reason.description();
            assert!(description.starts_with(char::is_uppercase) && description.ends_with('.'), "{reason}");
        }
    }
}
