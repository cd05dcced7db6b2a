//! Our client against our server: see `pair` for what must arrive.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/h2_drive/mod.rs"]
mod h2_drive;

fuzz_target!(|input: &[u8]| h2_drive::pair::run(input));
