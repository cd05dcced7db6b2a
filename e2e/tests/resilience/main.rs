//! Failures of endpoints, of all of them, of the callers' patience: the figures L8 to L12, L18 and L19 of the reliability research.
//!
//! Three replicas of `orders` behind real sidecars, and `web`, which calls them at a fixed rate whatever comes back. What an
//! endpoint suffers is real where it can be (processes killed or stopped, a host that falls silent) and else done by the
//! application on request. `make test` holds each fault for some 20 s, `make soak` for five minutes.

mod all_down;
mod bad_answers;
mod flapping;
mod gone;
mod overload;
mod slow;
mod storm;
mod world;

use std::process::ExitCode;

use outrigger_e2e::suite::suite;

use world::World;

fn main() -> ExitCode {
    let mut cases = gone::cases();
    cases.extend(bad_answers::cases());
    cases.extend(slow::cases());
    cases.extend(storm::cases());
    cases.extend(overload::cases());
    cases.extend(flapping::cases());
    // Last: everything is down at its end, were it to fail.
    cases.extend(all_down::cases());
    suite("resilience", World::build, cases)
}
