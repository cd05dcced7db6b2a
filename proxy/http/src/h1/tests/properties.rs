//! What holds for every input.

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(input in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
        let _ = decoder.request(&input, &mut head);
    }
}
