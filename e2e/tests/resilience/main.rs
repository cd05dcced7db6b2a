//! Failures of endpoints, of all of them, of the callers' patience: the figures L8 to L12, L18 and L19 of the reliability bar.
//!
//! Three replicas of `orders` behind real sidecars, and `web`, which calls them at a fixed rate whatever comes back. What an
//! endpoint suffers is real where it can be (processes killed or stopped, a host that falls silent) and else done by the
//! application on request. `make test` holds a fault for some 20 s, `make soak` for five minutes.

mod all_down;
mod bad_answers;
mod flapping;
mod gone;
mod overload;
mod slow;
mod storm;
mod world;

use std::process::ExitCode;

use outrigger_e2e::suite::{is_soak, suite};

use world::World;

/// Cases that run in `make soak` only: what they would add to `make test` is not worth its time.
const LONG: [&str; 5] = [
    "L8: one of three is gone: without application",
    "L8: one of three is gone: hung",
    "L9: one of three answers 503, retries",
    "L18: every request fails, the default",
    "L18: the same, budgets alone",
];

fn main() -> ExitCode {
    let mut cases = gone::cases();
    cases.extend(bad_answers::cases());
    cases.extend(slow::cases());
    cases.extend(storm::cases());
    cases.extend(overload::cases());
    cases.extend(flapping::cases());
    // Last: everything is down at its end, were it to fail.
    cases.extend(all_down::cases());
    if !is_soak() {
        cases.retain(|case| !LONG.iter().any(|long| case.name().starts_with(long)));
    }
    suite("resilience", World::build, cases)
}
