//! HTTP/1.1 (RFC 9112) and HTTP/2 (RFC 9113) without I/O, clocks or async: bytes in, events and bytes out.
//!
//! A codec here never reads, writes, waits or asks what time it is. Its caller hands in what it has read and is told
//! what it means; what is to be sent is appended to the caller's buffer. That is what lets the codecs be fuzzed and
//! property-tested alone, and what lets the proxy decide when a buffer becomes a write.
//!
//! - [`fields`] and [`head`]: one concrete head for both versions, in one buffer, case and order kept
//! - [`h1`]: heads, framing, chunks
//! - [`h2`]: frames, HPACK, streams, flow control
//!
//! The README says what is refused that the RFCs would allow.
#![forbid(unsafe_code)]

pub mod fields;
pub mod h1;
pub mod h2;
pub mod head;
