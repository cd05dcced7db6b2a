//! What holds for every input of the HTTP/1.1 decoder.

#[path = "h1_drive/generate.rs"]
mod generate;
mod h1_drive;

use h1_drive::{Event, Side, check, drive};
use outrigger_http::h1::Asked;
use proptest::collection::vec;
use proptest::prelude::*;

fn asked() -> impl Strategy<Value = Asked> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(head, connect, upgrade)| Asked {
        head,
        connect,
        upgrade,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn requests_read_alike_however_they_are_cut(input in generate::requests(), cuts in vec(any::<usize>(), 0..8)) {
        check(Side::Requests, &input, &cuts);
    }

    #[test]
    fn responses_read_alike_however_they_are_cut(
        input in generate::responses(), asked in asked(), cuts in vec(any::<usize>(), 0..8)
    ) {
        check(Side::Responses(asked), &input, &cuts);
    }

    #[test]
    fn arbitrary_bytes_never_panic_and_never_loop(
        input in vec(prop_oneof![1 => any::<u8>(), 1 => proptest::sample::select(&b"\r\n :01a"[..])], 0..1500),
        asked in asked(),
        cuts in vec(any::<usize>(), 0..8),
    ) {
        check(Side::Requests, &input, &cuts);
        check(Side::Responses(asked), &input, &cuts);
        // Behind heads that make bodies of them.
        for head in ["POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: 700\r\n\r\n"] {
            check(Side::Requests, &[head.as_bytes(), &input].concat(), &cuts);
        }
    }
}

/// The generators are of no use if nearly all that they make is refused.
#[test]
fn most_messages_that_are_made_up_are_read() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let (mut read, mut refused) = (0, 0);
    for _ in 0..1000 {
        let input = generate::requests().new_tree(&mut runner).expect("no filters").current();
        for event in drive(Side::Requests, &input, &[]).events {
            read += usize::from(matches!(event, Event::End(_)));
            refused += usize::from(matches!(event, Event::Refused(_)));
        }
    }
    assert!(read > 500 && refused > 100, "{read} read, {refused} refused");
}
