//! A controller as a process: where it runs, what it keeps, and its API.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::mesh::{ADMIN_PORT, API_PORT, DISCOVERY_PORT};
use crate::network::Host;
use crate::process::Process;
use crate::sandbox;
use crate::wait::wait_until;

/// Starting and reading its sources, on two busy cores.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// A running controller. Dropping it kills it, as a crash would.
#[derive(Debug)]
pub struct Controller {
    host: Host,
    data_dir: PathBuf,
    process: Process,
}

impl Controller {
    /// Starts one on `host`, with `config` beside its ports and its data, which an earlier one may have left.
    pub async fn start(host: &Host, data_dir: PathBuf, mut config: Value) -> anyhow::Result<Self> {
        config["data_dir"] = json!(data_dir);
        config["listen"] = json!(format!("[::]:{DISCOVERY_PORT}"));
        config["api_listen"] = json!(format!("127.0.0.1:{API_PORT}"));
        config["metrics_listen"] = json!(format!("[::]:{ADMIN_PORT}"));
        let file = sandbox::get().work.join(format!("{}.yaml", host.name()));
        std::fs::write(&file, config.to_string()).context("writing a controller's configuration")?;
        let mut command = Command::new(sandbox::get().binary("outrigger-controller")?);
        command.arg("--config").arg(&file).env("RUST_BACKTRACE", "1");
        let process = host.spawn("controller", command).await?;
        Ok(Self { host: host.clone(), data_dir, process })
    }

    /// Waits until it is ready.
    pub async fn wait_ready(&mut self) -> anyhow::Result<()> {
        wait_until(READY_LIMIT, "the controller to be ready", || {
            let alive = self.process.expect_running();
            let host = self.host.clone();
            async move {
                alive?;
                let ready = SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT));
                host.run(move || client::get(ready, "controller", "/ready")).await?.expect(200)
            }
        })
        .await
        .map(drop)
    }

    /// What it has logged so far, and others before it on its host.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Its memory, as the kernel counts it.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<u64> {
        self.process.resident_bytes()
    }

    /// Calls its API at `/api/v1<path>`.
    pub async fn api(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Reply> {
        call(&self.host, &self.data_dir, method, path, body).await
    }
}

/// Calls the API of the controller on `host` with the token in its data, at `/api/v1<path>`.
pub(crate) async fn call(
    host: &Host,
    data_dir: &Path,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> anyhow::Result<Reply> {
    let token = std::fs::read_to_string(data_dir.join("admin-token")).context("reading the API's token")?;
    let api = SocketAddr::from(([127, 0, 0, 1], API_PORT));
    let request = Request::builder()
        .method(method)
        .uri(format!("/api/v1{path}"))
        .header(header::HOST, "localhost")
        .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body.map(|body| Bytes::from(body.to_string())).unwrap_or_default()))?;
    host.run(move || client::request(api, request)).await
}
