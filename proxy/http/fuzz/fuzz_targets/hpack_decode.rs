//! Arbitrary field blocks, one connection's worth of them: no panic, and what decodes is what another decoder reads.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../src/h2/hpack/mod.rs"]
#[allow(dead_code, unused_imports)]
mod hpack;

/// RFC 9113, 6.5.2: what an encoder's table may hold before it hears of another size.
const TABLE: u32 = 4096;

fuzz_target!(|input: &[u8]| {
    let mut decoder = hpack::Decoder::new(TABLE as usize);
    let mut other = httlib_hpack::Decoder::with_dynamic_size(TABLE);
    let mut rest = input;
    // Each block is preceded by its length and by how large it may become.
    while let [length, budget, tail @ ..] = rest {
        let (block, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        let budget = usize::from(*budget) << 8;
        let mut lines = Vec::new();
        let mut told = 0;
        let decoded = decoder.decode(block, budget, &mut |name, value| {
            told += name.len() + value.len() + 32;
            lines.push((name.to_vec(), value.to_vec()));
        });
        assert!(told <= budget);
        let Ok(decoded) = decoded else { return };
        assert_eq!(decoded.truncated, decoded.size > budget);
        if !decoded.truncated {
            assert_eq!(decoded.size, told);
        }
        let mut expected = Vec::new();
        other.decode(&mut block.to_vec(), &mut expected).expect("what we read another one reads");
        let size: usize = expected.iter().map(|(name, value, _)| name.len() + value.len() + 32).sum();
        assert_eq!(decoded.size, size);
        let expected = expected.into_iter().map(|(name, value, _)| (name, value));
        assert!(expected.zip(&lines).all(|(theirs, ours)| theirs == *ours));
        if length % 8 == 0 {
            decoder.rest();
        }
    }
});
