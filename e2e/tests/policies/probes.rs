//! Where nothing is reachable but what a policy names, probes are: of the port, method and path that are declared, or of a node.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::client::{self, Raw};
use outrigger_e2e::mesh::ADMIN_PORT;
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;

use crate::world::{STORE, World, ports};

const IN_FORCE: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case<World>> {
    ["Permissive", "Strict"]
        .map(|mtls| {
            case(format!("probes pass where all is denied, {mtls}"), move |world| probes(world, mtls))
        })
        .into()
}

async fn probes(world: Arc<World>, mtls: &'static str) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    let node = world.bare.host.v4();
    let (http, tcp) = (ports::HTTP1, ports::DETECTED_ECHO);
    world
        .mesh
        .apply(&format!(
            "
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: {{name: default, namespace: outrigger-system}}
spec:
  mtls: {mtls}
  inbound: Deny
  probes:
  - {{port: {http}, method: GET, path: /whoami}}
  - {{port: {tcp}, nodes: [{node}/32]}}
"
        ))
        .await?;
    let stranger = world.mesh.workload("stranger").bare().start().await?;
    let store = &world.store.host;
    let get = async |from: &outrigger_e2e::mesh::Workload, port, path: &'static str| {
        let address = store.at(port);
        let reply = from.host.run(move || client::get(address, "store", path)).await;
        reply.map_or(0, |reply| reply.status.as_u16())
    };
    let echo = async |from: &outrigger_e2e::mesh::Workload| {
        let address = store.at(tcp);
        let echoed = from.host.run(move || async move {
            let mut raw = Raw::connect(address).await?;
            raw.send("ping\n").await?;
            raw.read_exact(5).await
        });
        echoed.await.is_ok()
    };
    wait_until(IN_FORCE, "only probes to pass", || async {
        for (what, passed, wanted) in [
            ("the declared probe", get(&world.bare, http, "/whoami").await == 200, true),
            ("the same with a query", get(&world.bare, http, "/whoami?a=b").await == 200, true),
            ("another path", get(&world.bare, http, "/describe").await == 200, false),
            ("the path with more behind it", get(&world.bare, http, "/whoami/x").await == 404, false),
            ("another port", get(&world.bare, ports::DETECTED, "/whoami").await == 200, false),
            ("the sidecar's readiness", get(&world.bare, ADMIN_PORT, "/ready").await == 200, true),
            ("the node's TCP probe", echo(&world.bare).await, true),
            ("a TCP connection that is none of a node", echo(&stranger).await, false),
            (
                "a workload of the mesh, another path",
                world.web.get(STORE, http, "/describe").await.is_ok_and(|reply| reply.status == 200),
                false,
            ),
        ] {
            ensure!(passed == wanted, "{what}: passed is {passed}");
        }
        Ok(())
    })
    .await
}
