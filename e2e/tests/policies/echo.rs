//! The services of Gateway API's mesh conformance tests, as far as its routes need them: `echo-v1` and `echo-v2`, `echo` of both,
//! and a client in another namespace. An answer is what was seen of the request.

use std::collections::BTreeMap;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::Full;
use outrigger_e2e::client::{self, Reply};
use outrigger_e2e::mesh::{Mesh, Workload, identity};
use serde_json::{Value, json};

use crate::world::LIMIT;

pub(crate) const NAMESPACE: &str = "gateway-conformance-mesh";
const CONSUMERS: &str = "gateway-conformance-mesh-consumer";

/// The workloads.
pub(crate) struct Echo {
    pub(crate) v1: Workload,
    pub(crate) v2: Workload,
    pub(crate) consumer: Workload,
}

impl Echo {
    pub(crate) async fn start(mesh: &Mesh) -> anyhow::Result<Self> {
        let start = async |name: &str| {
            let plan = mesh.workload(name).account(&format!("{NAMESPACE}/{name}"));
            plan.app(["--reflect", "8080", "--reflect", "7070"]).start().await
        };
        let (v1, v2) = (start("echo-v1").await?, start("echo-v2").await?);
        let consumer = mesh.workload("consumer").account(&format!("{CONSUMERS}/echo-v1")).start().await?;
        let endpoint = |workload: &Workload| {
            let account = format!("{NAMESPACE}/{}", workload.host.name());
            json!({ "address": workload.host.v4(), "identity": identity(&account) })
        };
        for (name, endpoints) in [
            ("echo-v1", vec![endpoint(&v1)]),
            ("echo-v2", vec![endpoint(&v2)]),
            ("echo", vec![endpoint(&v1), endpoint(&v2)]),
        ] {
            mesh.publish(
                name,
                &json!({
                    "kind": "Service", "name": name, "namespace": NAMESPACE,
                    "ports": [
                        { "name": "http", "port": 80, "targetPort": 8080, "protocol": "HTTP1" },
                        { "name": "http-alt", "port": 8080, "protocol": "HTTP1" },
                        { "name": "grpc", "port": 7070, "protocol": "GRPC" },
                    ],
                    "endpoints": endpoints,
                }),
            )?;
        }
        let echo = Self { v1, v2, consumer };
        for client in [&echo.v1, &echo.consumer] {
            for name in ["echo-v1", "echo-v2", "echo"] {
                client.wait_for_service(&service(name), 80, LIMIT).await?;
            }
        }
        Ok(echo)
    }
}

/// The name that a client dials.
pub(crate) fn service(name: &str) -> String {
    format!("{name}.{NAMESPACE}.mesh")
}

/// A request, by its text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) host: String,
    pub(crate) headers: Vec<(String, String)>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Answered {
    pub(crate) reply: Reply,
    /// Who answered; `None`: the mesh.
    pub(crate) app: Option<String>,
    /// The request as the application saw it.
    pub(crate) target: String,
    /// Its header fields; the values of one name joined by commas.
    pub(crate) headers: BTreeMap<String, String>,
}

/// Asks `name` at `port`.
pub(crate) async fn ask(from: &Workload, name: &str, port: u16, asked: &Asked) -> anyhow::Result<Answered> {
    let address = from.look_up(name, port).await?;
    let mut request = Request::builder().method(asked.method.as_str()).uri(&asked.target);
    request = request.header("host", &asked.host);
    for (name, value) in &asked.headers {
        request = request.header(name, value);
    }
    let request = request.body(Full::<Bytes>::default()).with_context(|| format!("making {asked:?}"))?;
    let reply = from.host.run(move || client::request(address, request)).await?;
    let text = |headers: &HeaderMap, name: &str| {
        headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let app = text(&reply.headers, "x-app");
    let seen: Value = match app {
        Some(_) if !reply.body.is_empty() => {
            serde_json::from_slice(&reply.body).context("reading what an application saw")?
        }
        _ => Value::Null,
    };
    let mut headers = BTreeMap::<String, String>::new();
    for field in seen["headers"].as_array().into_iter().flatten() {
        let (name, value) = (field[0].as_str().unwrap_or_default(), field[1].as_str().unwrap_or_default());
        headers
            .entry(name.to_owned())
            .and_modify(|values| *values = format!("{values},{value}"))
            .or_insert_with(|| value.to_owned());
    }
    let target = seen["target"].as_str().unwrap_or_default().to_owned();
    Ok(Answered { reply, app, target, headers })
}
