//! The harness itself: if this fails, no other suite says anything.

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Method;
use outrigger_e2e::consul::{Consul, Mode, Registration};
use outrigger_e2e::network::Network;
use outrigger_e2e::suite::{case, suite};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

fn main() -> ExitCode {
    suite(
        "harness",
        Network::new,
        vec![
            case("hosts reach each other over IPv4 and IPv6", hosts_reach_each_other),
            case("a dropped process is gone", dropped_process_is_gone),
            case("Consul runs in development mode", |network| consul_runs(network, Mode::Dev)),
            case("Consul runs as three servers and survives its leader", three_servers),
            case("Consul runs with ACLs that deny", |network| consul_runs(network, Mode::AclDeny)),
            case("Consul runs with TLS", |network| consul_runs(network, Mode::Tls)),
        ],
    )
}

async fn hosts_reach_each_other(network: Arc<Network>) -> anyhow::Result<()> {
    let (a, b) = (network.host("a").await?, network.host("b").await?);
    for target in [b.at(7000), b.at6(7000)] {
        let listener = b.run(move || async move { Ok(TcpListener::bind(target).await?) }).await?;
        let serve = b.run(move || async move {
            let (mut stream, peer) = listener.accept().await?;
            stream.write_all(b"hello").await?;
            Ok(peer.ip())
        });
        let dial = a.run(move || async move {
            let mut stream = TcpStream::connect(target).await.context("dialling the other host")?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            Ok(text)
        });
        let (peer, text) = tokio::try_join!(serve, dial)?;
        ensure!(text == "hello");
        ensure!(peer == a.v4() || peer == a.v6(), "the peer was {peer}");
    }
    Ok(())
}

async fn dropped_process_is_gone(network: Arc<Network>) -> anyhow::Result<()> {
    let host = network.host("c").await?;
    let mut sleep = Command::new("sleep");
    sleep.arg("1000");
    let mut process = host.spawn("sleep", sleep).await?;
    process.expect_running()?;
    let id = process.id();
    drop(process);
    ensure!(!std::path::Path::new(&format!("/proc/{id}")).exists(), "process {id} outlived its handle");
    let mut short = Command::new("true").spawn()?;
    ensure!(short.wait()?.success());
    let mut process = host.spawn("false", Command::new("false")).await?;
    let status = process.wait_exit(Duration::from_secs(5)).await?;
    ensure!(status.code() == Some(1), "false ended with {status}");
    ensure!(process.expect_running().is_err());
    Ok(())
}

async fn consul_runs(network: Arc<Network>, mode: Mode) -> anyhow::Result<()> {
    let mut consul = Consul::start(&network, mode).await?;
    let web =
        Registration { name: "web".into(), id: "web-1".into(), address: "10.77.0.200".into(), port: 80 };
    consul.register(&web).await?;
    let reply = consul.call(Method::GET, "/v1/health/service/web", None).await?.expect(200)?;
    ensure!(reply.text().contains("10.77.0.200"), "the instance is missing: {}", reply.text());
    if let Some(token) = consul.controller_token("").await? {
        consul.revoke(&token).await?;
    }
    consul.kill();
    consul.restart().await?;
    let reply = consul.call(Method::GET, "/v1/health/service/web", None).await?.expect(200)?;
    ensure!(reply.text() == "[]", "a development agent starts empty: {}", reply.text());
    Ok(())
}

async fn three_servers(network: Arc<Network>) -> anyhow::Result<()> {
    let mut consul = Consul::start(&network, Mode::ThreeServers).await?;
    ensure!(consul.urls().len() == 3);
    let leader = consul.kill_leader().await?;
    println!("new leader: {leader}");
    Ok(())
}
