//! HTTP/1.1 responses on one connection: see `h1_drive::check` for what must hold.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/h1_drive/mod.rs"]
mod h1_drive;

use h1_drive::{Side, check, plan};

fuzz_target!(|bytes: &[u8]| {
    if let Some((asked, cuts, input)) = plan(bytes) {
        check(Side::Responses(asked), input, &cuts);
    }
});
