//! What the cases share.

use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::mesh::{Mesh, Setup, Workload, identity};
use outrigger_e2e::wait::wait_until;
use serde_json::json;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

use crate::echo::Echo;

pub(crate) const HTTP: u16 = 8080;
pub(crate) const ORDERS: &str = "orders.service.consul";
pub(crate) const STORE: &str = "store.default.mesh";
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Ports of `store`, by what the catalog says of them.
pub(crate) mod ports {
    /// HTTP/1.1, said to be.
    pub(crate) const HTTP1: u16 = 8081;
    /// HTTP/2, said to be.
    pub(crate) const HTTP2: u16 = 8082;
    /// gRPC, said to be.
    pub(crate) const GRPC: u16 = 8083;
    /// All of these, and nothing is said.
    pub(crate) const DETECTED: u16 = 8084;
    /// An echo of bytes, and nothing is said.
    pub(crate) const DETECTED_ECHO: u16 = 8085;
    /// HTTP, said to be bytes.
    pub(crate) const OPAQUE: u16 = 8086;
    /// An echo, said to be bytes.
    pub(crate) const OPAQUE_ECHO: u16 = 8087;
}

pub(crate) struct World {
    pub(crate) mesh: Mesh,
    pub(crate) web: Workload,
    pub(crate) batch: Workload,
    pub(crate) bare: Workload,
    pub(crate) store: Workload,
    pub(crate) orders: Vec<Workload>,
    echo: OnceCell<Echo>,
    /// Policies are everybody's: one case at a time.
    turn: Mutex<()>,
}

impl World {
    pub(crate) async fn build() -> anyhow::Result<Self> {
        // The bare client has to get as far as the question whether it may.
        let mesh = Mesh::start(Setup { mtls: "Permissive", files: true, ..Setup::default() }).await?;
        let mut orders = Vec::new();
        for name in ["orders-1", "orders-2", "orders-3"] {
            let plan = mesh.workload(name).account("orders").serves("orders", HTTP);
            orders.push(plan.app(["--http", "8080", "--control", "9901"]).start().await?);
        }
        let store = mesh.workload("store").app([
            "--http", "8081", "--http", "8082", "--http", "8083", "--http", "8084", "--echo", "8085",
            "--http", "8086", "--echo", "8087",
        ]);
        let store = store.start().await?;
        mesh.publish(
            "store",
            &json!({
                "kind": "Service", "name": "store", "namespace": "default",
                "ports": [
                    { "port": ports::HTTP1, "protocol": "HTTP1" },
                    { "port": ports::HTTP2, "protocol": "HTTP2" },
                    { "port": ports::GRPC, "protocol": "GRPC" },
                    { "port": ports::DETECTED },
                    { "port": ports::DETECTED_ECHO },
                    { "port": ports::OPAQUE, "protocol": "TCP" },
                    { "port": ports::OPAQUE_ECHO, "protocol": "TCP" },
                ],
                "endpoints": [{ "address": store.host.v4(), "identity": identity("store") }],
            }),
        )?;
        let web = mesh.workload("web").start().await?;
        let batch = mesh.workload("batch").account("other/batch").start().await?;
        let bare = mesh.workload("bare").bare().start().await?;
        for client in [&web, &batch] {
            client.wait_for_service(ORDERS, HTTP, LIMIT).await?;
            client.wait_for_service(STORE, ports::HTTP1, LIMIT).await?;
        }
        Ok(Self { mesh, web, batch, bare, store, orders, echo: OnceCell::new(), turn: Mutex::default() })
    }

    /// The services that only some cases need.
    pub(crate) async fn echo(&self) -> anyhow::Result<&Echo> {
        self.echo.get_or_try_init(|| Echo::start(&self.mesh)).await
    }

    /// The mesh without any policy, for as long as the answer is held.
    pub(crate) async fn without_policies(&self) -> anyhow::Result<MutexGuard<'_, ()>> {
        let turn = self.turn.lock().await;
        self.mesh.clear_policies().await?;
        for client in [&self.web, &self.batch] {
            client.wait_for_service(ORDERS, HTTP, LIMIT).await?;
        }
        wait_until(LIMIT, "no policy to be in force", || async {
            let reply = self.batch.get(STORE, ports::HTTP1, "/whoami").await?;
            ensure!(reply.status == 200, "{:?}", reply.reason());
            Ok(())
        })
        .await?;
        Ok(turn)
    }
}

/// The defaults of the whole mesh.
pub(crate) fn defaults(inbound: &str) -> String {
    format!(
        "
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: {{name: default, namespace: outrigger-system}}
spec: {{inbound: {inbound}}}
"
    )
}
