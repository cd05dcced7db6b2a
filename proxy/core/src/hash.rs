//! Hashes that stay the same: over restarts, builds and proxies.

/// FNV-1a, then the finalizer of splitmix64, for FNV alone orders similar names alike. Not the standard library's
/// hash: what is chosen by it must be the same after a restart with a newer build. Not for keys that an attacker gains by colliding.
pub fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed;
    mix(bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// The finalizer of splitmix64: every bit of the result depends on every bit of `value`.
pub fn mix(value: u64) -> u64 {
    let mixed = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
