//! A cell that shares its cache line with nothing.

/// Threads write to it: 128 bytes, for processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);
