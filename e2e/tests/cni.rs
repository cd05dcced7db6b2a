//! The CNI plugin as a container runtime calls it: on network namespaces that have no process yet, from another one.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use nix::unistd::{getpid, gettid};
use outrigger_e2e::network::{Host, Network};
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use serde_json::{Value, json};

/// What an injected pod's annotation says, but for the proxy: here it is told by its mark, because there is one uid only.
const FLAGS: &str = "--proxy-mark 20306 --exclude-outbound-ports 5432";

fn main() -> ExitCode {
    suite(
        "cni",
        Network::new,
        vec![
            case("an injected pod is redirected before its first container runs", injected),
            case("a pod of nobody's mesh is left alone", not_injected),
            case("a pod whose annotation is wrong does not start", wrong),
            case("a runtime that says no annotations leaves a pod that is held", held),
        ],
    )
}

async fn injected(network: Arc<Network>) -> anyhow::Result<()> {
    let pod = network.host("injected").await?;
    ensure!(!is_redirected(&pod).await?, "a fresh namespace has no rules");
    let answer = add(&network, &pod, Some(json!({ "outrigger.dev/redirect": FLAGS }))).await?;
    ensure!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stdout));
    ensure!(
        serde_json::from_slice::<Value>(&answer.stdout)? == result(),
        "the result of the plugins before is passed on"
    );
    ensure!(is_redirected(&pod).await?, "outgoing connections reach the proxy's port");
    // A runtime that calls twice, as after a crash of its own, changes nothing.
    let answer = add(&network, &pod, Some(json!({ "outrigger.dev/redirect": FLAGS }))).await?;
    ensure!(answer.status.success() && is_redirected(&pod).await?);
    Ok(())
}

async fn not_injected(network: Arc<Network>) -> anyhow::Result<()> {
    let pod = network.host("plain").await?;
    let answer = add(&network, &pod, Some(json!({ "kubernetes.io/config.source": "api" }))).await?;
    ensure!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stdout));
    ensure!(!is_redirected(&pod).await?);
    Ok(())
}

async fn wrong(network: Arc<Network>) -> anyhow::Result<()> {
    let pod = network.host("wrong").await?;
    let answer =
        add(&network, &pod, Some(json!({ "outrigger.dev/redirect": "--proxy-uid 15400 --colour red" })))
            .await?;
    ensure!(!answer.status.success(), "it was let through");
    let error: Value = serde_json::from_slice(&answer.stdout)?;
    let text = error["msg"].as_str().context("an error has a text")?;
    ensure!(text.contains("outrigger.dev/redirect") && text.contains("--colour"), "{text}");
    ensure!(error["cniVersion"] == "1.0.0" && error["code"] == 100, "{error}");
    Ok(())
}

async fn held(network: Arc<Network>) -> anyhow::Result<()> {
    let pod = network.host("held").await?;
    let answer = add(&network, &pod, None).await?;
    ensure!(answer.status.success());
    let refused = check(&pod).await.err().context("the check passed without rules")?;
    ensure!(format!("{refused:#}").contains("delete the pod"), "{refused:#}");
    Ok(())
}

fn result() -> Value {
    json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.77.0.9/24" }] })
}

/// Calls the plugin for a pod, from the network's hub.
async fn add(network: &Network, pod: &Host, annotations: Option<Value>) -> anyhow::Result<Output> {
    let namespace = pod.run(|| async { Ok(format!("/proc/{}/task/{}/ns/net", getpid(), gettid())) }).await?;
    let mut runtime = json!({});
    if let Some(annotations) = annotations {
        runtime["io.kubernetes.cri.pod-annotations"] = annotations;
    }
    let input = json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "outrigger-cni", "runtimeConfig": runtime, "prevResult": result(),
    });
    let mut command = Command::new(plugin()?);
    command.env_clear().env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", "1").env("CNI_IFNAME", "eth0");
    command.env("CNI_NETNS", namespace).stdin(Stdio::piped()).stdout(Stdio::piped());
    let call = move || async move {
        let mut process = command.spawn().context("starting the plugin")?;
        process.stdin.take().context("it has an input")?.write_all(input.to_string().as_bytes())?;
        Ok(process.wait_with_output()?)
    };
    network.hub().run(call).await
}

/// The plugin is the proxy's program under another name.
fn plugin() -> anyhow::Result<PathBuf> {
    let sandbox = sandbox::get();
    let folder = tempfile::Builder::new().prefix("cni").tempdir_in(&sandbox.work)?.keep();
    let plugin = folder.join("outrigger-cni");
    std::os::unix::fs::symlink(sandbox.binary("outrigger-proxy")?, &plugin)?;
    Ok(plugin)
}

async fn is_redirected(pod: &Host) -> anyhow::Result<bool> {
    Ok(check(pod).await.is_ok())
}

/// What the first init container of an injected pod does where there is a plugin.
async fn check(pod: &Host) -> anyhow::Result<()> {
    let mut command = Command::new(sandbox::get().binary("outrigger-proxy")?);
    command.args(["redirect", "--check"]);
    pod.output(command).await.map(drop)
}
