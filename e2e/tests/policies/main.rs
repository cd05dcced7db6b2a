//! Policies on a live mesh: who may call whom, what changes while traffic flows, what is refused, and that `outrigger policy
//! test` says what the mesh does.
//!
//! One mesh for all cases: `store`, which serves every kind of port, three replicas of `orders` in two versions, and callers with an
//! identity (`web`, and `batch` of another namespace) and without (`bare`). Policies are applied by the CLI, from files.

mod access;
mod agree;
mod between;
mod change;
mod echo;
mod gateway;
mod nack;
mod probes;
mod refused;
mod transcript;
mod world;

use std::process::ExitCode;

use outrigger_e2e::suite::suite;

use world::World;

fn main() -> ExitCode {
    let mut cases = access::cases();
    cases.extend(probes::cases());
    cases.extend(refused::cases());
    cases.extend(change::cases());
    cases.extend(nack::cases());
    cases.extend(agree::cases());
    cases.extend(gateway::cases());
    cases.extend(transcript::cases());
    suite("policies", World::build, cases)
}
