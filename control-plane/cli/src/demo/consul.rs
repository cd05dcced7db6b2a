//! A real Consul for `outrigger demo --consul`: one development agent, and the replicas registered in it as any
//! deployment tool would.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{net::TcpStream, time::Instant};

use super::{
    plan::Plan,
    processes::{Process, Site},
};

/// A development agent elects itself in a few seconds.
const READY_DEADLINE: Duration = Duration::from_secs(30);

/// Starts the agent and waits until it has a leader.
pub(super) async fn start(site: &Site, plan: &Plan, program: &Path) -> Result<Process> {
    let port = |at: usize| plan.consul[at].port().to_string();
    let [http, server, lan, wan, grpc, dns] = [0, 1, 2, 3, 4, 5].map(port);
    let mut process = site.start_program(
        "consul",
        program,
        &[
            "agent",
            "-dev",
            "-bind=127.0.0.1",
            "-client=127.0.0.1",
            "-node=demo",
            "-disable-host-node-id",
            "-log-level=warn",
            &format!("-http-port={http}"),
            &format!("-server-port={server}"),
            &format!("-serf-lan-port={lan}"),
            &format!("-serf-wan-port={wan}"),
            &format!("-grpc-port={grpc}"),
            "-grpc-tls-port=-1",
            &format!("-dns-port={dns}"),
        ],
    )?;
    let deadline = Instant::now() + READY_DEADLINE;
    loop {
        process.check()?;
        match call(plan.consul[0], "GET", "/v1/status/leader", String::new()).await {
            Ok(leader) if leader.len() > 2 => return Ok(process),
            _ if Instant::now() > deadline => {
                bail!("Consul has no leader after {} s", READY_DEADLINE.as_secs())
            }
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Registers every replica that has an endpoint.
pub(super) async fn register(plan: &Plan) -> Result<()> {
    for replica in &plan.replicas {
        let Some(address) = replica.inbound else { continue };
        let body = json!({
            "ID": replica.name,
            "Name": replica.service,
            "Address": address.ip().to_string(),
            "Port": address.port(),
        });
        call(plan.consul[0], "PUT", "/v1/agent/service/register", body.to_string())
            .await
            .with_context(|| format!("registering {} in Consul", replica.name))?;
    }
    Ok(())
}

async fn call(address: SocketAddr, method: &str, path: &str, body: String) -> Result<String> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, address.to_string())
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let text = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
    if !status.is_success() {
        bail!("Consul answered {method} {path} with {status}: {text}");
    }
    Ok(text)
}
