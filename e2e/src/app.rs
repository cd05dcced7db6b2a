//! What a suite tells `e2e-app` to do badly, and asks it about: its control port (`--control`).

use std::net::SocketAddr;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use serde::{Deserialize, Serialize};

use crate::client::{self, Reply};
use crate::mesh::Workload;

/// The control port of every application that has one.
pub const CONTROL_PORT: u16 = 9901;

/// What `/work` and gRPC calls suffer; nothing by default.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Faults {
    /// So many of a thousand calls fail, evenly spread.
    pub fail_per_mille: u64,
    /// What they fail with; 0: 503.
    pub status: u16,
    /// What gRPC calls fail with, in trailers; 0: 14, unavailable.
    pub grpc_status: u32,
    /// They fail by a reset of the connection or stream.
    pub reset: bool,
    /// Further header fields of a failure.
    pub headers: Vec<(String, String)>,
    /// Every answer comes so much later.
    pub latency_ms: u64,
    /// No answer ever.
    pub hang: bool,
    /// So many calls are worked on at once, each for `service_ms`; others wait, however many. 0: no bound.
    pub concurrency: usize,
    /// How long a call is worked on.
    pub service_ms: u64,
}

impl Faults {
    /// Every call fails with this status.
    pub fn every(status: u16) -> Self {
        Self { fail_per_mille: 1000, status, ..Self::default() }
    }
}

/// What an application has seen since its start.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Counts {
    /// Calls of `/work` and of gRPC that arrived.
    pub calls: u64,
    /// Those that failed on request.
    pub failed: u64,
}

impl Workload {
    /// From now on the application does this badly.
    pub async fn suffer(&self, faults: Faults) -> anyhow::Result<()> {
        let body = serde_json::to_vec(&faults).context("faults are plain data")?;
        self.control(Method::PUT, "/faults", body).await.map(drop)
    }

    /// What the application has seen.
    pub async fn counts(&self) -> anyhow::Result<Counts> {
        let reply = self.control(Method::GET, "/counts", Vec::new()).await?;
        serde_json::from_slice(&reply.body).context("reading an application's counts")
    }

    async fn control(&self, method: Method, path: &'static str, body: Vec<u8>) -> anyhow::Result<Reply> {
        let control = SocketAddr::from(([127, 0, 0, 1], CONTROL_PORT));
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let request = request.body(Full::new(Bytes::from(body)))?;
        self.host.run(move || client::request(control, request)).await?.expect(200)
    }
}
