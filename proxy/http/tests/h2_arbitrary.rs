//! HTTP/2 connections under arbitrary input, as the fuzz targets have it: for a moment, with a stable compiler, and with
//! what the fuzzers have found so far.
#![allow(clippy::unwrap_used)]

mod h2_drive;

use h2_drive::{one, pair};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_server_survives_any_peer(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        one::server(&bytes);
    }

    #[test]
    fn a_client_survives_any_peer(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        one::client(&bytes);
    }

    #[test]
    fn what_one_end_sends_arrives_at_the_other(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        pair::run(&bytes);
    }
}

#[test]
fn the_corpora_of_the_fuzzers_hold() {
    for (target, run) in
        [("h2_server", one::server as fn(&[u8])), ("h2_client", one::client), ("h2_pair", pair::run)]
    {
        let folder = format!("{}/fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
        let mut files = 0;
        for file in std::fs::read_dir(folder).unwrap() {
            run(&std::fs::read(file.unwrap().path()).unwrap());
            files += 1;
        }
        assert!(files > 0, "{target} has no corpus");
    }
}
