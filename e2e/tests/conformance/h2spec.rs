//! h2spec, whole, against each side on which a sidecar speaks HTTP/2 with somebody else.
//!
//! Nothing may fail, and nothing may be skipped: h2spec skips where a server sets no limit to streams at once or has
//! too short a body to test flow control with, and neither is so here.
//!
//! The application speaks HTTP/2 alone: what begins as no HTTP at all is bytes for the mesh, and it is the application
//! that h2spec then sees close the connection.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::mesh;
use outrigger_e2e::network::Host;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::tls::{self, Handshake};

use crate::{HTTP2, World, tool};

/// A case that waits in vain waits this long, in seconds: long beside what an answer takes on a busy machine.
const PATIENCE: &str = "4";
/// How many cases version 2.2.1 has, the strict one among them: a report that misses some proves nothing.
const CASES: usize = 146;
/// The length of its large header fields. Five of them, Huffman coded to seven bits a byte, have to exceed any frame that
/// the sidecar takes (64 KiB), one has to fit into a frame of 16 KiB.
const FIELD_LENGTH: &str = "15500";
/// What h2spec asks for. Its body has to be longer than the five bytes that the flow control cases want.
const PATH: &str = "/bytes/1000";
/// What h2spec expects where it expects the connection's end. It means to take a reset for one, too, but has not
/// recognised it since Go wraps that error; so it is recognised here.
const CLOSED: &str = "Connection closed";
const RESET: &str = "connection reset by peer";
/// The whole run, within the suite's own limit.
const RUN_LIMIT: Duration = Duration::from_secs(140);

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("h2spec: the outbound side", outbound),
        case("h2spec: the inbound side, in clear", inbound_in_clear),
        case("h2spec: the inbound side, as a peer's sidecar", inbound_as_a_peer),
    ]
}

/// The workload's own client.
async fn outbound(world: Arc<World>) -> anyhow::Result<()> {
    judge(&world.web.host, "http2.service.consul", HTTP2.port, "outbound").await
}

/// A client outside the mesh.
async fn inbound_in_clear(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.servers.host.v4().to_string();
    judge(&world.stranger, &address, HTTP2.port, "inbound-in-clear").await
}

/// A peer that proves an identity of the mesh and then behaves as h2spec does.
async fn inbound_as_a_peer(world: Arc<World>) -> anyhow::Result<()> {
    let leaf = world.mesh.authority()?.workload(&mesh::identity("judge"))?;
    let handshake = Handshake { leaf: Some(leaf), alpn: "outrigger-h2" };
    let target = world.servers.host.at(HTTP2.port);
    let address = tls::relay(&world.stranger, target, handshake).await?;
    judge(&world.stranger, &address.ip().to_string(), address.port(), "inbound-as-a-peer").await
}

async fn judge(host: &Host, server: &str, port: u16, side: &str) -> anyhow::Result<()> {
    let report = sandbox::get().logs.join(format!("h2spec-{side}.xml"));
    let mut command = tool("h2spec", &["--strict", "--timeout", PATIENCE, "--path", PATH])?;
    command.args(["--max-header-length", FIELD_LENGTH, "--host", server, "--port", &port.to_string()]);
    command.arg("--junit-report").arg(&report);
    let mut process = host.spawn(&format!("h2spec-{side}"), command).await?;
    // How it ends says whether something failed; the report says what.
    let end = process.wait_exit(RUN_LIMIT).await?;
    let text = std::fs::read_to_string(&report)
        .with_context(|| format!("h2spec wrote no report ({end}); its log:\n{}", process.log()))?;
    let outcomes = read_report(&text)?;
    let amiss: Vec<String> = outcomes
        .iter()
        .filter_map(|(case, outcome)| Some(format!("{case}: {}", outcome.as_ref()?)))
        .collect();
    ensure!(amiss.is_empty(), "{} of {} cases:\n{}", amiss.len(), outcomes.len(), amiss.join("\n"));
    ensure!(outcomes.len() == CASES, "the report has {} cases instead of {CASES}", outcomes.len());
    Ok(())
}

/// The cases of a `JUnit` report as h2spec writes it: name (as h2spec takes it on its command line, then its title), and
/// what was amiss. h2spec puts its texts into the report unescaped, so that no XML parser would do.
fn read_report(text: &str) -> anyhow::Result<Vec<(String, Option<String>)>> {
    let mut outcomes = Vec::new();
    let (mut section, mut number) = (String::new(), 0);
    for part in text.split("<testcase ").skip(1) {
        let (tag, rest) = part.split_once('>').context("a case has no end of its tag")?;
        let (content, _) = rest.split_once("</testcase>").context("a case has no end")?;
        let package = attribute(tag, "package")?;
        if package != section {
            (section, number) = (package, 0);
        }
        number += 1;
        let title = attribute(tag, "classname")?;
        let amiss = match content.trim() {
            "" => None,
            text if text.starts_with("<skipped") => Some("skipped".to_owned()),
            text if text.contains(CLOSED) && text.contains(RESET) => None,
            text => {
                let text = ["<error>", "</error>", "<failure>", "</failure>"]
                    .iter()
                    .fold(text.to_owned(), |text, tag| text.replace(tag, ""));
                Some(text.lines().map(str::trim).collect::<Vec<_>>().join(" | "))
            }
        };
        outcomes.push((format!("{section}/{number} ({title})"), amiss));
    }
    Ok(outcomes)
}

fn attribute(tag: &str, name: &str) -> anyhow::Result<String> {
    let start = format!("{name}=\"");
    let value = tag.split_once(&start).and_then(|(_, rest)| rest.split_once('"'));
    let (value, _) = value.with_context(|| format!("a case has no {name}: {tag}"))?;
    Ok(value.replace("&#39;", "'").replace("&#34;", "\"").replace("&amp;", "&"))
}
