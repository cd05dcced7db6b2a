//! HTTP/2 connections under arbitrary input, as the fuzz targets have it, for a moment and with a stable compiler.

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
