//! The whole mesh on a real Kubernetes node: Helm installs it, pods get their sidecars by themselves, and what is promised of
//! them is looked at from inside the pods and from the wires between them.
#![allow(clippy::doc_markdown, reason = "Kubernetes' words")]

mod away;
mod calls;
mod cni;
mod people;
mod pods;
mod rolls;
mod world;

use std::process::ExitCode;

use outrigger_e2e::suite::{case, suite};

use world::World;

fn main() -> ExitCode {
    let mut cases = vec![case("Helm installs the mesh, and its pods are ready", world::installed)];
    cases.extend(calls::cases());
    cases.extend(pods::cases());
    cases.extend(rolls::cases());
    cases.extend(away::cases());
    cases.extend(people::cases());
    cases.extend(cni::cases());
    cases.push(case("the mesh's accounts use all that they may, and are denied nothing", people::rights));
    cases.push(case("helm uninstall leaves pods that start and policies that are kept", world::uninstalled));
    suite("kubernetes_mesh", World::build, cases)
}
