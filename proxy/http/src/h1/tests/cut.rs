//! Heads that come in pieces.

use super::*;

#[test]
fn a_head_is_read_only_when_all_of_it_is_there() {
    let input = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
    for end in 0..input.len() {
        assert_eq!(decoder.request(&input[..end], &mut head), Ok(None));
        assert_eq!(decoder.has_begun(), end > 0);
        assert_eq!(decoder.end(), if end > 0 { Err(Error::Truncated) } else { Ok(()) });
    }
    assert_eq!(decoder.request(input, &mut head), Ok(Some(input.len())));
}

/// The bytes seen before are handed in as ones that would end the head or be refused, had they been looked at again.
#[test]
fn an_incomplete_head_is_not_looked_at_twice() {
    let input = b"GET / HTTP/1.1\r\nhost: a\r\nlong: xxxxxxxxxxxxxxxxxxxx\r\n\r\n";
    for trap in ["\n", "\r\n"] {
        let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
        for seen in 0..input.len() - 1 {
            let mut changed = input[..=seen].to_vec();
            // The byte before an LF is looked at to see the CR.
            for (at, byte) in changed[..seen.saturating_sub(1)].iter_mut().enumerate() {
                *byte = trap.as_bytes()[at % trap.len()];
            }
            // The line's first byte may be looked at when its end comes.
            for (at, byte) in changed.iter_mut().enumerate() {
                if at > 0 && input[at - 1] == b'\n' {
                    *byte = input[at];
                }
            }
            assert_eq!(decoder.request(&changed, &mut head), Ok(None), "{seen}");
        }
        assert_eq!(decoder.request(input, &mut head), Ok(Some(input.len())));
    }
}

#[test]
fn a_wrong_byte_is_refused_as_soon_as_its_line_shows_it() {
    let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
    assert_eq!(decoder.request(b"GET / HTTP/1.1\r", &mut head), Ok(None));
    assert_eq!(decoder.request(b"GET / HTTP/1.1\r\n", &mut head), Ok(None));
    assert_malformed(decoder.request(b"GET / HTTP/1.1\r\na: b\n", &mut head), b"bare LF");
}

#[test]
fn an_idle_decoder_is_small() {
    assert!(size_of::<Decoder>() <= 128, "{}", size_of::<Decoder>());
}
