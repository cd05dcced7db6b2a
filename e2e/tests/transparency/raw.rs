//! HTTP/1.1 byte by byte: what a client library would tidy before it leaves.

use std::fmt::Write as _;

use anyhow::{Context as _, ensure};
use outrigger_e2e::client::Raw;

use crate::{AUTHORITY, HTTP, Observed, RAW, Target};

/// A head: the request line or status code (a reason phrase means nothing, RFC 9112, section 4, and does not survive
/// HTTP/2), then fields by name (names in lower case, in the order in
/// which each name first appears, with all its values). The order among *different* fields of a repeated name is not
/// kept by the HTTP library that the mesh stands on at present, and RFC 9110, section 5.3, gives it no meaning.
fn fields(head: &str) -> Vec<String> {
    let mut lines = head.lines();
    let mut seen: Vec<(String, Vec<String>)> = Vec::new();
    let mut first = lines.next().unwrap_or_default().to_owned();
    if first.starts_with("HTTP/") {
        first = first.split(' ').take(2).collect::<Vec<_>>().join(" ");
    }
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let (name, mut value) = (name.to_ascii_lowercase(), value.trim().to_owned());
        if name == "connection" {
            // Options are tokens without case.
            value = value.to_ascii_lowercase();
        }
        match seen.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => seen.push((name, vec![value])),
        }
    }
    // Who called; the clock; and the length of an echoed head, which says only that it names the caller.
    let ours = |name: &str| ["outrigger-client-id", "date", "content-length"].contains(&name);
    let fields = seen.into_iter().filter(|(name, _)| !ours(name));
    std::iter::once(first).chain(fields.map(|(name, values)| format!("{name}: {values:?}"))).collect()
}

fn note(seen: &mut Observed, what: &str, head: &str) {
    for line in fields(head) {
        seen.note(format!("{what}: {line}"));
    }
}

pub(crate) async fn header_order(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    raw.send(format!(
        "GET /order?x HTTP/1.1\r\nX-Zeta: 1\r\nHost: {AUTHORITY}\r\nAccept: */*\r\nx-alpha: 2\r\nX-Beta:   spaced  \r\n\
         X-Empty:\r\nX-Alpha: 3\r\nUser-Agent: raw\r\n\r\n"
    ))
    .await?;
    let (head, body) = raw.read_response().await?;
    note(&mut seen, "response", &head);
    note(&mut seen, "request", &String::from_utf8_lossy(&body));
    Ok(seen)
}

pub(crate) async fn pipelining(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    let mut requests = String::new();
    for i in 0..10 {
        let body = "b".repeat(i);
        write!(requests, "POST /p{i} HTTP/1.1\r\nHost: {AUTHORITY}\r\nContent-Length: {i}\r\n\r\n{body}")?;
    }
    raw.send(requests).await?;
    for i in 0..10 {
        let (head, body) = raw.read_response().await?;
        let body = String::from_utf8_lossy(&body).into_owned();
        ensure!(body.starts_with(&format!("POST /p{i} ")), "answer {i} was {body:?}");
        note(&mut seen, &format!("response {i}"), &head);
        note(&mut seen, &format!("request {i}"), &body);
    }
    Ok(seen)
}

/// The request leaves byte by byte.
pub(crate) async fn slow_writer(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    let request = format!("GET /slowly HTTP/1.1\r\nHost: {AUTHORITY}\r\nX-A: b\r\n\r\n");
    for byte in request.as_bytes() {
        raw.send([*byte]).await?;
        tokio::task::yield_now().await;
    }
    let (head, body) = raw.read_response().await?;
    note(&mut seen, "response", &head);
    note(&mut seen, "request", &String::from_utf8_lossy(&body));
    Ok(seen)
}

pub(crate) async fn expect_continue(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(HTTP)).await?;
    let head = "HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n";
    raw.send(format!("POST /describe {head}")).await?;
    let interim = raw.read_until(b"\r\n\r\n").await.context("waiting for 100 Continue")?;
    ensure!(interim.starts_with(b"HTTP/1.1 100"), "{:?}", String::from_utf8_lossy(&interim));
    raw.send("0123456789").await?;
    let (status, body) = raw.read_response().await?;
    note(&mut seen, "continued", status.lines().next().unwrap_or_default());
    ensure!(String::from_utf8_lossy(&body).contains("\"length\":10"), "the body did not arrive");

    // Refused: the final status comes without the body having been sent. A proxy may invite the body before it knows
    // (RFC 9110, section 10.1.1, lets any recipient), and ours does until it has codecs of its own.
    let mut raw = Raw::connect(target.at(HTTP)).await?;
    raw.send(format!("POST /early {head}")).await?;
    let (mut status, mut body) = raw.read_response().await?;
    if status.starts_with("HTTP/1.1 100") {
        (status, body) = raw.read_response().await?;
    }
    note(&mut seen, "refused", status.lines().next().unwrap_or_default());
    seen.body("refused", &body);
    ensure!(status.starts_with("HTTP/1.1 417"), "{status}");
    Ok(seen)
}

pub(crate) async fn interim(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    raw.send(format!("GET /interim HTTP/1.1\r\nHost: {AUTHORITY}\r\n\r\n")).await?;
    let (mut head, mut body) = raw.read_response().await?;
    // Forwarding a 1xx is optional for a proxy that did not ask for it (RFC 9110, section 15.2), the answer is not.
    if head.starts_with("HTTP/1.1 103") {
        (head, body) = raw.read_response().await?;
    }
    note(&mut seen, "response", &head);
    note(&mut seen, "request", &String::from_utf8_lossy(&body));
    Ok(seen)
}

/// The end of the connection is the end of the body.
pub(crate) async fn until_close(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    for version in ["1.1", "1.0"] {
        let mut raw = Raw::connect(target.at(RAW)).await?;
        let head = format!("Host: {AUTHORITY}\r\nConnection: close\r\n\r\n");
        raw.send(format!("GET /close HTTP/{version}\r\n{head}")).await?;
        let all = String::from_utf8_lossy(&raw.read_to_end().await?).into_owned();
        let (head, body) = all.split_once("\r\n\r\n").context("a head")?;
        ensure!(body.contains("/close"), "the body is {body:?}");
        // To a 1.1 client the mesh may frame the body by chunks instead.
        // An HTTP/1.0 client may be answered in its own version.
        seen.note(format!("{version}: {}", head.split(' ').nth(1).unwrap_or_default()));
    }
    Ok(seen)
}

pub(crate) async fn http10(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(HTTP)).await?;
    raw.send(format!("GET /describe HTTP/1.0\r\nHost: {AUTHORITY}\r\nX-Old: yes\r\n\r\n")).await?;
    let all = String::from_utf8_lossy(&raw.read_to_end().await?).into_owned();
    let (head, body) = all.split_once("\r\n\r\n").context("a head")?;
    seen.note(head.lines().next().unwrap_or_default().to_owned());
    ensure!(!head.to_ascii_lowercase().contains("chunked"), "an HTTP/1.0 client got chunks: {head}");
    seen.body("description", body.as_bytes());
    Ok(seen)
}

pub(crate) async fn upgrade(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    for protocol in ["websocket", "x-custom/1"] {
        let mut raw = Raw::connect(target.at(HTTP)).await?;
        raw.send(format!(
            "GET /upgrade HTTP/1.1\r\nHost: {AUTHORITY}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ))
        .await?;
        let head = String::from_utf8_lossy(&raw.read_until(b"\r\n\r\n").await?).into_owned();
        ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
        note(&mut seen, protocol, &head);
        // Any bytes, HTTP among them.
        for piece in [&b"\x81\x05hello"[..], b"GET / HTTP/1.1\r\n\r\n", &vec![0; 70_000]] {
            raw.send(piece).await?;
            ensure!(raw.read_exact(piece.len()).await? == piece, "the tunnel changed bytes");
        }
        raw.send("last words").await?;
        raw.finish().await?;
        ensure!(raw.read_to_end().await? == b"last words", "bytes before a half-close were lost");
    }
    Ok(seen)
}

/// Bytes of the new protocol that follow the upgrade request at once.
pub(crate) async fn upgrade_refused(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(HTTP)).await?;
    let head = format!("HTTP/1.1\r\nHost: {AUTHORITY}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    raw.send(format!("GET /status/403 {head}")).await?;
    let (status, _) = raw.read_response().await?;
    note(&mut seen, "refused", status.lines().next().unwrap_or_default());
    // The connection is an HTTP connection still.
    raw.send(format!("GET /whoami HTTP/1.1\r\nHost: {AUTHORITY}\r\n\r\n")).await?;
    let (status, body) = raw.read_response().await?;
    note(&mut seen, "next", status.lines().next().unwrap_or_default());
    seen.body("next", &body);
    Ok(seen)
}

pub(crate) async fn connect(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(HTTP)).await?;
    raw.send("CONNECT inner.example:443 HTTP/1.1\r\nHost: inner.example:443\r\n\r\n").await?;
    let head = String::from_utf8_lossy(&raw.read_until(b"\r\n\r\n").await?).into_owned();
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    seen.note(head.lines().next().unwrap_or_default().to_owned());
    raw.send("through the tunnel").await?;
    ensure!(raw.read_exact(18).await? == b"through the tunnel", "the tunnel changed bytes");
    raw.finish().await?;
    ensure!(raw.read_to_end().await?.is_empty(), "bytes after the end");
    Ok(seen)
}
