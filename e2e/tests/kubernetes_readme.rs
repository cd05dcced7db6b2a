//! The README's chapter on Kubernetes, from `helm install` to `helm uninstall`, on a node that has the images and nothing else.
#![allow(clippy::doc_markdown, reason = "Kubernetes' words")]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use outrigger_e2e::kubernetes::node::Node;
use outrigger_e2e::network::Network;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::transcript::{self, Shell};

/// Some 90 s: pods start five times.
const LIMIT: Duration = Duration::from_mins(8);
/// The client writes a line every 10 s.
const LOGGED: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let replay = case("the README's Kubernetes chapter is a transcript", replay);
    suite("kubernetes_readme", Node::with_mesh, vec![replay.within(LIMIT)])
}

async fn replay(world: Arc<(Node, Network)>) -> anyhow::Result<()> {
    let (node, _) = &*world;
    let home = sandbox::get().work.join("home").display().to_string();
    let kubeconfig = node.cluster().kubeconfig().display().to_string();
    transcript::replay("kubernetes", |command| {
        let patience = if command.starts_with("kubectl logs") { LOGGED } else { Duration::ZERO };
        // Helm and kubectl keep what they cache at home.
        let environment =
            vec![("KUBECONFIG".to_owned(), kubeconfig.clone()), ("HOME".to_owned(), home.clone())];
        Ok(Shell { host: node.host().clone(), environment, patience })
    })
    .await
}
