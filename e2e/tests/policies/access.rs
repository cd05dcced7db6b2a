//! Each cell of (policy, its mode, default) x (identity, protocol, port kind): what the mesh does is what a table says.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use outrigger_e2e::client::{self, Raw};
use outrigger_e2e::network::Host;
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::{wait_until, within};
use std::net::SocketAddr;

use crate::world::{STORE, World, defaults, ports};

/// A policy is in force 500 ms after it was applied; this is for a busy machine, and for how long 33 questions take.
const IN_FORCE: Duration = Duration::from_secs(5);
/// No answer by then is one, too: nobody is refused so slowly.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Identity {
    /// `default/web`, which the policies name.
    Named,
    /// `other/batch`, which they do not.
    Other,
    /// None: plaintext.
    None,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Protocol {
    Http1,
    Http2,
    Grpc,
    Bytes,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// The catalog names the protocol.
    Named,
    /// The catalog says nothing.
    Detected,
    /// The catalog says bytes.
    Opaque,
}

/// What the one policy says of `web`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Rule {
    /// There is no policy.
    Absent,
    /// `web` may, or may not.
    Whole { deny: bool },
    /// `web` may, or may not, GET: what only HTTP has.
    Get { deny: bool },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Answer {
    /// The application answered.
    Served,
    /// 403, or gRPC status 7, of the mesh.
    Forbidden,
    /// The connection ended.
    Cut,
}

const CELLS: &[(Protocol, Kind, u16)] = &[
    (Protocol::Http1, Kind::Named, ports::HTTP1),
    (Protocol::Http2, Kind::Named, ports::HTTP2),
    (Protocol::Grpc, Kind::Named, ports::GRPC),
    (Protocol::Http1, Kind::Detected, ports::DETECTED),
    (Protocol::Http2, Kind::Detected, ports::DETECTED),
    (Protocol::Grpc, Kind::Detected, ports::DETECTED),
    (Protocol::Bytes, Kind::Detected, ports::DETECTED_ECHO),
    (Protocol::Http1, Kind::Opaque, ports::OPAQUE),
    (Protocol::Http2, Kind::Opaque, ports::OPAQUE),
    (Protocol::Grpc, Kind::Opaque, ports::OPAQUE),
    (Protocol::Bytes, Kind::Opaque, ports::OPAQUE_ECHO),
];

pub(crate) fn cases() -> Vec<Case<World>> {
    let mut cases = Vec::new();
    for default in ["Allow", "Audit", "Deny"] {
        for mode in ["Enforce", "Audit"] {
            for rule in [
                Rule::Absent,
                Rule::Whole { deny: false },
                Rule::Whole { deny: true },
                Rule::Get { deny: false },
                Rule::Get { deny: true },
            ] {
                if rule == Rule::Absent && mode == "Audit" {
                    continue;
                }
                let name = format!("access: default {default}, {rule:?}, {mode}");
                cases.push(case(name, move |world| table(world, default, mode, rule)));
            }
        }
    }
    cases
}

/// What must come of one cell: the rule of the design, written down a second time.
fn expected(
    default: &str,
    mode: &str,
    rule: Rule,
    (identity, (protocol, kind, _)): (Identity, (Protocol, Kind, u16)),
) -> Answer {
    let is_http = protocol != Protocol::Bytes && (kind != Kind::Opaque || identity == Identity::None);
    let matches = match rule {
        Rule::Absent => false,
        Rule::Whole { .. } => identity == Identity::Named,
        // gRPC calls are POSTs. Of bytes, what only HTTP has denies all and allows nothing.
        Rule::Get { deny } => {
            identity == Identity::Named
                && if is_http { matches!(protocol, Protocol::Http1 | Protocol::Http2) } else { deny }
        }
    };
    let deny = matches!(rule, Rule::Whole { deny: true } | Rule::Get { deny: true });
    let allowed = if matches && mode == "Enforce" { !deny } else { default != "Deny" };
    match (allowed, is_http) {
        (true, _) => Answer::Served,
        (false, true) => Answer::Forbidden,
        (false, false) => Answer::Cut,
    }
}

fn policy(mode: &str, rule: Rule) -> String {
    let (action, to) = match rule {
        Rule::Absent => return String::new(),
        Rule::Whole { deny } => (deny, ""),
        Rule::Get { deny } => (deny, "\n    to: [{methods: [GET]}]"),
    };
    let action = if action { "Deny" } else { "Allow" };
    format!(
        "
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: store, namespace: default}}
spec:
  targetRef: {{kind: Service, name: store}}
  mode: {mode}
  rules:
  - name: web
    action: {action}
    from: [{{serviceAccounts: [default/web]}}]{to}
"
    )
}

async fn table(
    world: Arc<World>,
    default: &'static str,
    mode: &'static str,
    rule: Rule,
) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    world.mesh.apply(&format!("{}{}", defaults(default), policy(mode, rule))).await?;
    let questions: Vec<_> = [Identity::Named, Identity::Other, Identity::None]
        .into_iter()
        .flat_map(|identity| CELLS.iter().map(move |cell| (identity, *cell)))
        .collect();
    wait_until(IN_FORCE, "every cell to be as the table has it", || async {
        let mut wrong = Vec::new();
        for question in &questions {
            let (seen, wanted) = (ask(&world, *question).await?, expected(default, mode, rule, *question));
            if seen != wanted {
                wrong.push(format!("{question:?}: {seen:?} instead of {wanted:?}"));
            }
        }
        ensure!(wrong.is_empty(), "{} of {} cells: {}", wrong.len(), questions.len(), wrong.join("; "));
        Ok(())
    })
    .await
}

async fn ask(
    world: &World,
    (identity, (protocol, _, port)): (Identity, (Protocol, Kind, u16)),
) -> anyhow::Result<Answer> {
    let (host, address) = match identity {
        Identity::Named => (&world.web.host, world.web.look_up(STORE, port).await?),
        Identity::Other => (&world.batch.host, world.batch.look_up(STORE, port).await?),
        Identity::None => (&world.bare.host, world.store.host.at(port)),
    };
    call(host, address, protocol).await
}

async fn call(host: &Host, address: SocketAddr, protocol: Protocol) -> anyhow::Result<Answer> {
    host.run(move || async move {
        let exchange = async {
            match protocol {
                Protocol::Http1 => {
                    let reply = client::get(address, STORE, "/whoami").await?;
                    status(reply.status.as_u16())
                }
                Protocol::Http2 => {
                    let request =
                        Request::get(format!("http://{STORE}/whoami")).body(Full::<Bytes>::default())?;
                    let mut sender = client::http2(address).await?;
                    status(sender.send_request(request).await?.status().as_u16())
                }
                Protocol::Grpc => grpc(address).await,
                Protocol::Bytes => {
                    let mut raw = Raw::connect(address).await?;
                    raw.send("ping\n").await?;
                    ensure!(raw.read_exact(5).await? == b"ping\n", "another echo");
                    Ok(Answer::Served)
                }
            }
        };
        // Whatever goes wrong on the way is a cut; an answer that makes no sense is not.
        match within(PATIENCE, "an answer", exchange).await {
            Ok(answer) => Ok(answer),
            Err(error) if error.is::<Strange>() => Err(error),
            Err(_) => Ok(Answer::Cut),
        }
    })
    .await
}

#[derive(Debug)]
struct Strange(String);

impl std::fmt::Display for Strange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Strange {}

fn status(status: u16) -> anyhow::Result<Answer> {
    match status {
        200 => Ok(Answer::Served),
        403 => Ok(Answer::Forbidden),
        other => Err(Strange(format!("status {other}")).into()),
    }
}

async fn grpc(address: SocketAddr) -> anyhow::Result<Answer> {
    let request = Request::post(format!("http://{STORE}/shop.Store/Buy"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from_static(&[0; 5])))?;
    let response = client::http2(address).await?.send_request(request).await?;
    let head = response.headers().get("grpc-status").cloned();
    let body = response.into_body().collect().await?;
    let code = body.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned().or(head);
    let code = code.context("no gRPC status")?;
    match code.as_bytes() {
        b"0" => Ok(Answer::Served),
        b"7" => Ok(Answer::Forbidden),
        other => Err(Strange(format!("gRPC status {}", String::from_utf8_lossy(other))).into()),
    }
}
