//! Identity: who may serve what, who is believed to be whom, and where keys and tokens are not.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use outrigger_e2e::capture::Capture;
use outrigger_e2e::client;
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};

const HTTP: u16 = 8080;
const ORDERS: &str = "orders.service.consul";
const LIMIT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    suite(
        "identity",
        World::build,
        vec![
            case("B1: identity fields of a client are replaced", identity_fields),
            case("a service that the token does not name gets no traffic", unnamed_service),
            case("a claim of somebody else's address is refused", foreign_address),
            case("D2: a workload in another's place is refused", wrong_workload),
            case("a meshed endpoint without its sidecar is not called in plaintext", no_fallback),
            case("D7: a one-time token works once", one_time_token),
            case("D7: a revoked token does not work", revoked_token),
            case("D7: an expired token does not work", expired_token),
            case("D7: a made-up token does not work", forged_token),
            case("no token may name the controller", controller_identity),
            case("D10: the API does nothing without its token", api_needs_token),
            case("D14: no key and no token anywhere", secrets_nowhere),
        ],
    )
}

struct World {
    mesh: Mesh,
    web: Workload,
    orders: Workload,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup::default()).await?;
        let orders = mesh.workload("orders").serves("orders", HTTP).app(["--http", "8080"]).start().await?;
        let web = mesh.workload("web").start().await?;
        web.wait_for_service(ORDERS, HTTP, LIMIT).await?;
        Ok(Self { mesh, web, orders })
    }
}

async fn identity_fields(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.web.look_up(ORDERS, HTTP).await?;
    let (one, two) = world
        .web
        .host
        .run(move || async move {
            let forged = "spiffe://outrigger.local/ns/default/sa/admin";
            let fields = |request: http::request::Builder| {
                let names = [
                    "outrigger-client-id",
                    "Outrigger-Client-Id",
                    "l5d-client-id",
                    "x-forwarded-client-cert",
                ];
                let more = ["outrigger-h1", "outrigger-anything"];
                names.iter().chain(&more).fold(request, |request, name| request.header(*name, forged))
            };
            let request = fields(Request::get("/describe").header("host", ORDERS));
            let one = client::request(address, request.body(Full::<Bytes>::default())?).await?.expect(200)?;
            let mut http2 = client::http2(address).await?;
            let request = fields(Request::get(format!("http://{ORDERS}/describe")));
            let two =
                client::read(http2.send_request(request.body(Full::<Bytes>::default())?).await?).await?;
            Ok((one, two.expect(200)?))
        })
        .await?;
    for reply in [one, two] {
        let seen: Value = serde_json::from_slice(&reply.body).context("reading the description")?;
        let fields = seen["headers"].as_array().context("fields")?;
        let ids: Vec<_> = fields.iter().filter(|field| field[0] == "outrigger-client-id").collect();
        let expected = json!(["outrigger-client-id", "spiffe://outrigger.local/ns/default/sa/web"]);
        ensure!(ids == [&expected], "the application saw {ids:?}");
        let text = reply.text();
        ensure!(!text.contains("sa/admin"), "a forged identity arrived: {text}");
    }
    Ok(())
}

/// The claims that a sidecar has made, with the answers.
async fn claims(workload: &Workload) -> anyhow::Result<Vec<Value>> {
    let knowledge = workload.knowledge().await?;
    Ok(knowledge["discovery"]["claims"].as_array().cloned().unwrap_or_default())
}

async fn expect_refused(workload: &Workload, service: &str) -> anyhow::Result<String> {
    wait_until(LIMIT, "the claim to be judged", || async {
        let claims = claims(workload).await?;
        let claim = claims
            .iter()
            .find(|claim| claim["service"].as_str().is_some_and(|name| name.starts_with(service)));
        let claim = claim.with_context(|| format!("no claim of {service}: {claims:?}"))?;
        ensure!(claim["accepted"] == false, "the claim was accepted: {claim}");
        let message = claim["message"].as_str().unwrap_or_default();
        ensure!(!message.is_empty(), "no reason was given");
        Ok(message.to_owned())
    })
    .await
}

/// Every answer comes from the real orders.
async fn only_orders_answers(world: &World) -> anyhow::Result<()> {
    for _ in 0..50 {
        let reply = world.web.get(ORDERS, HTTP, "/whoami").await?.expect(200)?;
        ensure!(reply.text() == "orders", "{} answered for orders", reply.text());
    }
    Ok(())
}

async fn unnamed_service(world: Arc<World>) -> anyhow::Result<()> {
    let token = world.mesh.token("mallory", &["mallory"], &["--uses", "reusable"]).await?;
    // Consul believes it; the token does not say so.
    let plan = world.mesh.workload("mallory").token(&token).serves("orders", HTTP).app(["--http", "8080"]);
    let mallory = plan.start_unready().await?;
    mallory.wait_ready().await?;
    expect_refused(&mallory, "orders").await?;
    // The controller has the instance in its catalog, and gives it to nobody.
    wait_until(LIMIT, "the false instance to reach the controller", || async {
        let services = world.mesh.cli(&["services", "-o", "json"]).await?;
        ensure!(services.contains(&mallory.host.v4().to_string()), "{services}");
        Ok(())
    })
    .await?;
    let endpoints = world.web.endpoints("orders.default").await?;
    ensure!(endpoints.len() == 1, "the client's sidecar holds {endpoints:?}");
    only_orders_answers(&world).await?;
    let own = mallory.host.at(HTTP);
    let dialled = world.web.host.run(move || client::get(own, ORDERS, "/whoami")).await;
    ensure!(!dialled.is_ok_and(|reply| reply.status == 200), "the stranger was reached at its own address");
    world.mesh.consul.lock().await.deregister("orders-mallory").await
}

async fn foreign_address(world: Arc<World>) -> anyhow::Result<()> {
    let token = world.mesh.token("eve", &["orders"], &["--uses", "reusable"]).await?;
    let claim = json!([{ "service": "orders", "port": HTTP, "address": world.orders.host.v4().to_string() }]);
    let eve = world.mesh.workload("eve").token(&token).set("services", claim).start_unready().await?;
    eve.wait_ready().await?;
    expect_refused(&eve, "orders").await?;
    only_orders_answers(&world).await
}

/// A workload on its own host that serves `service` and is reached by `web`.
async fn victim(world: &World, service: &str) -> anyhow::Result<Workload> {
    let plan = world.mesh.workload(service).serves(service, HTTP).app(["--http", "8080"]);
    let victim = plan.start().await?;
    world.web.wait_for_service(&format!("{service}.service.consul"), HTTP, LIMIT).await?;
    Ok(victim)
}

/// `web` gets an answer of the mesh, or none, from `service`: never one of the application.
async fn expect_mesh_refusal(world: &World, service: &str) -> anyhow::Result<String> {
    match world.web.get(&format!("{service}.service.consul"), HTTP, "/whoami").await {
        Ok(reply) if reply.status == 200 => bail!("the application answered: {:?}", reply.text()),
        Ok(reply) => reply.reason().with_context(|| format!("{} without a reason", reply.status)),
        Err(error) => Ok(format!("{error:#}")),
    }
}

async fn wrong_workload(world: Arc<World>) -> anyhow::Result<()> {
    let mut ledger = victim(&world, "ledger").await?;
    // Another workload's sidecar takes its place, with a certificate of this very mesh.
    ledger.sidecar = None;
    let token = world.mesh.token("mallory", &["mallory"], &["--uses", "reusable"]).await?;
    std::fs::write(ledger.folder.join("token"), token).context("exchanging the token")?;
    ledger.start_sidecar().await?;
    ledger.wait_ready().await?;
    let reason = expect_mesh_refusal(&world, "ledger").await?;
    println!("refused: {reason}");
    Ok(())
}

async fn no_fallback(world: Arc<World>) -> anyhow::Result<()> {
    const MARKER: &str = "marker-7d1f-plaintext";
    let mut vault = victim(&world, "vault").await?;
    vault.sidecar = None;
    vault.remove_redirection().await?;
    // Without sidecar and redirection the application itself is at the endpoint's address.
    let direct = vault.host.at(HTTP);
    let capture = Capture::start(&world.mesh.network).await?;
    world
        .mesh
        .controller_host
        .run(move || async move { client::get(direct, "vault", "/whoami").await?.expect(200) })
        .await
        .context("the application can be reached in plaintext")?;
    for _ in 0..5 {
        let path = format!("/whoami?{MARKER}");
        match world.web.get("vault.service.consul", HTTP, &path).await {
            Ok(reply) if reply.status == 200 => bail!("the application answered: {:?}", reply.text()),
            _ => {}
        }
    }
    let captured = capture.stop().await?;
    ensure!(!captured.contains(MARKER.as_bytes()), "the request went over the wire in plaintext");
    Ok(())
}

/// A sidecar with this token never gets a certificate.
async fn expect_useless(world: &World, name: &str, token: &str) -> anyhow::Result<()> {
    let sidecar = world.mesh.workload(name).token(token).start_unready().await?;
    let log = wait_until(LIMIT, "the refusal in the sidecar's log", || async {
        let log = sidecar.sidecar.as_ref().map(outrigger_e2e::process::Process::log).unwrap_or_default();
        let lower = log.to_lowercase();
        ensure!(lower.contains("token") || lower.contains("unauthenticated"), "the log says {log}");
        Ok(log)
    })
    .await?;
    let ready = sidecar.admin("/ready").await?;
    ensure!(ready.status == 503, "a sidecar without a certificate says {}", ready.text());
    ensure!(sidecar.admin("/live").await?.status == 200, "it should live and try again");
    ensure!(!log.contains(token), "the token is in the sidecar's log");
    ensure!(!world.mesh.controller_log().await.contains(token), "the token is in the controller's log");
    Ok(())
}

async fn one_time_token(world: Arc<World>) -> anyhow::Result<()> {
    let token = world.mesh.token("once", &[], &[]).await?;
    let first = world.mesh.workload("once").token(&token).start().await?;
    expect_useless(&world, "twice", &token).await?;
    drop(first);
    Ok(())
}

async fn revoked_token(world: Arc<World>) -> anyhow::Result<()> {
    let token = world.mesh.token("revoked", &[], &["--uses", "reusable"]).await?;
    let tokens: Vec<Value> = serde_json::from_str(&world.mesh.cli(&["token", "list", "-o", "json"]).await?)?;
    let entry =
        tokens.iter().find(|entry| entry["identity"].as_str().is_some_and(|id| id.ends_with("/sa/revoked")));
    let id = entry.and_then(|entry| entry["id"].as_str()).context("the token is not listed")?;
    ensure!(!serde_json::to_string(&tokens)?.contains(&token), "the list shows the secret");
    world.mesh.cli(&["token", "revoke", id]).await?;
    expect_useless(&world, "revoked", &token).await
}

async fn expired_token(world: Arc<World>) -> anyhow::Result<()> {
    let token = world.mesh.token("expired", &[], &["--uses", "reusable", "--ttl-seconds", "1"]).await?;
    wait_until(Duration::from_secs(10), "the token to expire", || async {
        let tokens: Vec<Value> =
            serde_json::from_str(&world.mesh.cli(&["token", "list", "-o", "json"]).await?)?;
        let usable = tokens.iter().any(|entry| {
            entry["usable"] == true
                && entry["identity"].as_str().is_some_and(|id| id.ends_with("/sa/expired"))
        });
        ensure!(!usable, "it is still usable");
        Ok(())
    })
    .await?;
    expect_useless(&world, "expired", &token).await
}

async fn forged_token(world: Arc<World>) -> anyhow::Result<()> {
    let real = world.mesh.token("forged", &[], &["--uses", "reusable"]).await?;
    let flipped: String = real
        .chars()
        .rev()
        .enumerate()
        .map(|(i, c)| if i == 3 { if c == 'a' { 'b' } else { 'a' } } else { c })
        .collect();
    let forged: String = flipped.chars().rev().collect();
    expect_useless(&world, "forged", &forged).await
}

async fn controller_identity(world: Arc<World>) -> anyhow::Result<()> {
    let controller = "spiffe://outrigger.local/ns/outrigger-system/sa/outrigger-controller";
    let result = world.mesh.cli(&["token", "create", "--identity", controller]).await;
    ensure!(result.is_err(), "a token for the controller's identity was made");
    Ok(())
}

async fn api_needs_token(world: Arc<World>) -> anyhow::Result<()> {
    let api = ([127, 0, 0, 1], outrigger_e2e::mesh::API_PORT).into();
    let ask = |authorization: Option<&'static str>| {
        world.mesh.controller_host.run(move || async move {
            let mut request = Request::get("/api/v1/tokens").header("host", "api");
            if let Some(value) = authorization {
                request = request.header("authorization", value);
            }
            client::request(api, request.body(Full::default())?).await
        })
    };
    for authorization in [None, Some("Bearer"), Some("Bearer guess"), Some("Basic YTpi")] {
        let reply = ask(authorization).await?;
        ensure!(reply.status == 401, "{authorization:?} got {}", reply.status);
    }
    // From outside the API is not there at all.
    let outside = world.mesh.controller_host.at(outrigger_e2e::mesh::API_PORT);
    let dialled = world.web.host.run(move || client::get(outside, "api", "/api/v1/tokens")).await;
    ensure!(
        dialled.is_err() || dialled.is_ok_and(|reply| reply.status != 200),
        "the API is open to other hosts"
    );
    Ok(())
}

async fn secrets_nowhere(world: Arc<World>) -> anyhow::Result<()> {
    let token = std::fs::read_to_string(world.orders.folder.join("token"))?;
    let token = token.trim();
    let secrets = [token, "PRIVATE KEY"];
    let clean = |what: &str, text: &str| {
        for secret in secrets {
            ensure!(!text.contains(secret), "{what} holds a secret");
        }
        anyhow::Ok(())
    };
    for path in ["/config", "/metrics"] {
        clean(path, &world.orders.admin(path).await?.expect(200)?.text())?;
    }
    for entry in std::fs::read_dir(&sandbox::get().logs)? {
        let path = entry?.path();
        clean(&path.display().to_string(), &String::from_utf8_lossy(&std::fs::read(&path)?))?;
    }
    let sidecar = world.orders.sidecar.as_ref().context("a sidecar")?.id();
    clean(
        "the sidecar's environment",
        &String::from_utf8_lossy(&std::fs::read(format!("/proc/{sidecar}/environ"))?),
    )?;
    clean(
        "the sidecar's arguments",
        &String::from_utf8_lossy(&std::fs::read(format!("/proc/{sidecar}/cmdline"))?),
    )?;
    // On disk: the token's own file, and the CA's store, are the exceptions.
    for file in std::fs::read_dir(&world.orders.folder)? {
        let path = file?.path();
        if path.file_name() != Some("token".as_ref()) {
            clean(&path.display().to_string(), &String::from_utf8_lossy(&std::fs::read(&path)?))?;
        }
    }
    controller_files(&sandbox::get().work.join("controller"), token)
}

/// The controller's store keeps tokens as hashes, and the CA's key where nobody else can read it.
fn controller_files(folder: &Path, token: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut keys = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            controller_files(&path, token)?;
            continue;
        }
        let content = std::fs::read(&path)?;
        let text = String::from_utf8_lossy(&content);
        ensure!(!text.contains(token), "{} holds a join token", path.display());
        if text.contains("PRIVATE KEY") {
            keys += 1;
            let mode = path.metadata()?.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "{} has mode {mode:o}", path.display());
        }
    }
    println!("{}: {keys} key files, all 0600", folder.display());
    Ok(())
}
