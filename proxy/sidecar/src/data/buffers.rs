//! Buffers that a thread uses again.
//!
//! What is in a buffer moves on within a turn of the run queue, or waits for a slow reader. So a thread needs few at a time, and
//! the same ones all the time: to allocate them anew costs page faults, which for bodies are dearer than copying. The
//! youngest is given out first: it is in the cache, and has grown to what the present traffic needs.

use std::cell::RefCell;

/// Bytes that a thread keeps. Two bodies of one window in each direction, or a few hundred heads.
const MAX_KEPT: usize = 1024 * 1024;

/// The largest buffer that is kept: what waits for one connection, at most, but for heads.
const MAX_BUFFER: usize = 256 * 1024;

#[derive(Default)]
struct Spare {
    buffers: Vec<Vec<u8>>,
    /// The sum of their capacities.
    bytes: usize,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

/// An empty buffer for so many bytes, or more.
pub(super) fn take(bytes: usize) -> Vec<u8> {
    let spare = SPARE.with_borrow_mut(|spare| {
        let at = spare.buffers.iter().rposition(|buffer| buffer.capacity() >= bytes)?;
        let buffer = spare.buffers.remove(at);
        spare.bytes -= buffer.capacity();
        Some(buffer)
    });
    spare.unwrap_or_else(|| Vec::with_capacity(bytes))
}

/// Takes a buffer back.
pub(super) fn give(mut buffer: Vec<u8>) {
    let capacity = buffer.capacity();
    if capacity == 0 || capacity > MAX_BUFFER {
        return;
    }
    buffer.clear();
    SPARE.with_borrow_mut(|spare| {
        if spare.bytes + capacity <= MAX_KEPT {
            spare.bytes += capacity;
            spare.buffers.push(buffer);
        }
    });
}

/// Frees all that wait to be used: nothing is under way.
pub(super) fn free() {
    SPARE.take();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_youngest_comes_first_and_too_much_is_freed() {
        free();
        give(Vec::with_capacity(100));
        give(vec![1; 200]);
        give(Vec::with_capacity(MAX_BUFFER + 1));
        let buffer = take(0);
        assert!(buffer.is_empty() && buffer.capacity() == 200);
        assert_eq!((take(101).capacity(), take(1).capacity(), take(0).capacity()), (101, 100, 0));
        for _ in 0..100 {
            give(Vec::with_capacity(MAX_BUFFER));
        }
        SPARE.with_borrow(|spare| assert!(spare.bytes <= MAX_KEPT && spare.buffers.len() == 4));
        free();
        assert_eq!(take(0).capacity(), 0);
    }
}
