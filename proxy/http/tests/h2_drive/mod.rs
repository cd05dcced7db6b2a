//! Drives HTTP/2 connections by arbitrary bytes: what a fuzzer or a property test makes up decides who does what next.
//!
//! - [`one`]: one end against a peer that may send anything
//! - [`pair`]: our client against our server
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)] // not every user needs all of it

pub(crate) mod one;
pub(crate) mod pair;

/// The bytes that decide, from front to back; zeros when they are used up.
pub(crate) struct Plan<'a>(&'a [u8]);

impl<'a> Plan<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    pub(crate) fn number(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// True once in `count` times.
    pub(crate) fn once_in(&mut self, count: u8) -> bool {
        self.byte().is_multiple_of(count)
    }

    /// Up to `count` bytes.
    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }
}
