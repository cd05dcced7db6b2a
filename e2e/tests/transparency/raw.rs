//! HTTP/1.1 byte by byte: what a client library would tidy before it leaves.

use std::fmt::Write as _;

use anyhow::{Context as _, ensure};
use outrigger_e2e::client::Raw;

use crate::{AUTHORITY, HTTP, Observed, RAW, Target};

/// A head as it came: its first line, then every field in its place and with its name in its own case. White space
/// around a value is no part of it (RFC 9112, section 5). The fields that belong to one connection (RFC 9110, section
/// 7.6.1) are the sender's own: they come last, without case.
fn lines(head: &str) -> Vec<String> {
    let mut lines = head.lines();
    let first = lines.next().unwrap_or_default().to_owned();
    let (mut end_to_end, mut hop_by_hop) = (vec![first], Vec::new());
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            // Who called; and the clock.
            "outrigger-client-id" | "date" => {}
            "connection" | "upgrade" => hop_by_hop.push(line.to_ascii_lowercase().replace(": ", ":")),
            // The length of an echoed head, which says only that it names the caller.
            "content-length" if head.starts_with("HTTP/") => end_to_end.push(format!("{name}: ...")),
            _ => end_to_end.push(format!("{name}: {value}")),
        }
    }
    hop_by_hop.sort();
    end_to_end.extend(hop_by_hop);
    end_to_end
}

fn note(seen: &mut Observed, what: &str, head: &str) {
    for line in lines(head) {
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
    ensure!(head.starts_with("HTTP/1.1 200 Fine By Me\r\n"), "{head}");
    Ok(seen)
}

/// Targets that a URI library would tidy or refuse, and browsers send.
pub(crate) async fn odd_targets(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    for path in ["/a//b/./../c", "/%7e%2F%zz", "/a?b?c=/&&=%00", "/q?brackets[]={}|", "/?"] {
        raw.send(format!("GET {path} HTTP/1.1\r\nHost: {AUTHORITY}\r\n\r\n")).await?;
        let (head, body) = raw.read_response().await.with_context(|| format!("asking for {path}"))?;
        // The fields have cases of their own.
        let body = String::from_utf8_lossy(&body).into_owned();
        seen.note(format!("{path}: {} {}", &head[..12], body.lines().next().unwrap_or_default()));
    }
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

    // Refused: the final status comes without the body having been asked for.
    let mut raw = Raw::connect(target.at(HTTP)).await?;
    raw.send(format!("POST /early {head}")).await?;
    let (status, body) = raw.read_response().await?;
    note(&mut seen, "refused", status.lines().next().unwrap_or_default());
    seen.body("refused", &body);
    ensure!(status.starts_with("HTTP/1.1 417"), "{status}");
    Ok(seen)
}

pub(crate) async fn interim(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    raw.send(format!("GET /interim HTTP/1.1\r\nHost: {AUTHORITY}\r\n\r\n")).await?;
    // Only the 100 that a proxy asked for itself may stay with it (RFC 9110, section 15.2).
    let (hint, _) = raw.read_response().await?;
    ensure!(hint.starts_with("HTTP/1.1 103 Early Hints\r\n"), "{hint}");
    note(&mut seen, "hint", &hint);
    let (head, body) = raw.read_response().await?;
    note(&mut seen, "response", &head);
    note(&mut seen, "request", &String::from_utf8_lossy(&body));
    Ok(seen)
}

/// A 304 says how long the body would be that it does not have (RFC 9110, section 8.6).
pub(crate) async fn not_modified(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    let mut raw = Raw::connect(target.at(RAW)).await?;
    for i in 0..3 {
        let condition = "If-None-Match: \"v1\"\r\n";
        raw.send(format!("GET /not-modified/{i} HTTP/1.1\r\nHost: {AUTHORITY}\r\n{condition}\r\n")).await?;
        let head = String::from_utf8_lossy(&raw.read_until(b"\r\n\r\n").await?).into_owned();
        ensure!(head.contains("\r\nContent-Length: 1234\r\n"), "{head}");
        note(&mut seen, "not modified", &head);
    }
    Ok(seen)
}

/// A request that is framed twice has two ends, and whoever reads the other one reads another request behind it (RFC
/// 9112, section 6.3). It is refused, the connection closed, and the application sees nothing.
pub(crate) async fn framed_twice(target: Target) -> anyhow::Result<()> {
    let (length, chunked) = ("Content-Length: 6\r\n", "Transfer-Encoding: chunked\r\n");
    for framing in [[length, chunked], [chunked, length]] {
        let framing = framing.concat();
        let mut raw = Raw::connect(target.at(RAW)).await?;
        let smuggled = format!("GET /smuggled HTTP/1.1\r\nHost: {AUTHORITY}\r\n\r\n");
        raw.send(format!("POST / HTTP/1.1\r\nHost: {AUTHORITY}\r\n{framing}\r\n0\r\n\r\n{smuggled}")).await?;
        let all = String::from_utf8_lossy(&raw.read_to_end().await?).into_owned();
        ensure!(all.starts_with("HTTP/1.1 400 "), "the answer is {all:?}");
        ensure!(all.to_ascii_lowercase().contains("\r\noutrigger-reason: "), "no reason is given: {all:?}");
        ensure!(!all.contains("POST /") && !all.contains("/smuggled"), "the application answered: {all:?}");
    }
    Ok(())
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
