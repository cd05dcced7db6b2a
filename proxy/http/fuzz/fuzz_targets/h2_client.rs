//! A client against a peer that may send anything: see `one` for what must hold.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/h2_drive/mod.rs"]
mod h2_drive;

fuzz_target!(|input: &[u8]| h2_drive::one::client(input));
