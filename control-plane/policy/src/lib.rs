//! The kinds that people write: parse, validate, compile to the wire, compare, explain. No I/O.
#![forbid(unsafe_code)]
