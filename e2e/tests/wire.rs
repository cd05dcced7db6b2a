//! On the wire: what somebody between the hosts sees, and what a stranger to the mesh is told.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use outrigger_e2e::capture::{Capture, Flow};
use outrigger_e2e::client::{self, Raw};
use outrigger_e2e::consul::Mode;
use outrigger_e2e::mesh::{DISCOVERY_PORT, INBOUND_PORT, Mesh, Setup, Workload};
use outrigger_e2e::suite::{case, suite};
use outrigger_e2e::tls::{self, Authority, Handshake};
use outrigger_e2e::wait::wait_until;

/// TLS 1.3 (RFC 8446, section 4.2.1).
const TLS13: u16 = 0x0304;
/// X25519MLKEM768 (IANA's registry of TLS supported groups).
const X25519_MLKEM768: u16 = 0x11ec;
/// What no frame may hold: sent as path, field, body and raw bytes.
const SECRET: &str = "PAYLOAD-f5b1c0de-in-the-clear";

const HTTP: u16 = 8080;
const ECHO: u16 = 9000;

fn main() -> ExitCode {
    suite(
        "wire",
        World::build,
        vec![
            case(
                "between sidecars: TLS 1.3, a hybrid key exchange, no byte of the payload",
                nothing_in_the_clear,
            ),
            case("the capture does see an unprotected payload", capture_sees_plaintext),
            case("a client without a certificate is refused", no_certificate),
            case("a client with a stranger's certificate is refused", strangers_certificate),
            case("TLS 1.2 is refused", tls12),
            case("plaintext to a strict workload is refused", plaintext),
            case("the controller's port speaks TLS 1.3 only", controller),
        ],
    )
}

struct World {
    mesh: Mesh,
    web: Workload,
    orders: Workload,
    orders6: Workload,
    outsider: Workload,
    plain: Workload,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup { consul: Mode::Dev, ..Setup::default() }).await?;
        let app = ["--http", "8080", "--echo", "9000"];
        let orders = mesh.workload("orders").serves("orders", HTTP).serves("orders-echo", ECHO).app(app);
        let orders = orders.start().await?;
        let orders6 = mesh.workload("orders6").serves("orders6", HTTP).at_ipv6().app(app).start().await?;
        let web = mesh.workload("web").start().await?;
        let outsider = mesh.workload("outsider").bare().start().await?;
        let plain = mesh.workload("plain").bare().app(app).start().await?;
        web.wait_for_service("orders.service.consul", HTTP, Duration::from_secs(20)).await?;
        Ok(Self { mesh, web, orders, orders6, outsider, plain })
    }
}

/// Talks to the echo of `address` by raw bytes, there and back.
async fn talk(address: std::net::SocketAddr) -> anyhow::Result<()> {
    let mut raw = Raw::connect(address).await?;
    raw.send(format!("\x01{SECRET}")).await?;
    ensure!(raw.read_exact(SECRET.len() + 1).await?.ends_with(SECRET.as_bytes()), "the echo was wrong");
    raw.finish().await
}

async fn nothing_in_the_clear(world: Arc<World>) -> anyhow::Result<()> {
    let capture = Capture::start(&world.mesh.network).await?;
    let address = world.web.look_up("orders.service.consul", HTTP).await?;
    let echo = world.web.look_up("orders-echo.service.consul", ECHO).await?;
    let over_ipv6 = world.orders6.host.at6(HTTP);
    world
        .web
        .host
        .run(move || async move {
            for address in [address, over_ipv6] {
                let request = Request::post(format!("/echo?{SECRET}"))
                    .header("host", SECRET)
                    .header("x-secret", SECRET);
                let reply = client::request(address, request.body(Full::new(Bytes::from(SECRET)))?)
                    .await?
                    .expect(200)?;
                ensure!(reply.text() == SECRET, "the echo was {:?}", reply.text());
            }
            let mut http2 = client::http2(address).await?;
            let request = Request::post(format!("http://orders.service.consul/echo?{SECRET}"));
            let request = request.header("x-secret", SECRET).body(Full::new(Bytes::from(SECRET)))?;
            client::read(http2.send_request(request).await?).await?.expect(200)?;
            talk(echo).await
        })
        .await?;
    let captured = capture.stop().await?;
    ensure!(!captured.is_empty(), "nothing was captured");
    ensure!(!captured.contains(SECRET.as_bytes()), "the payload went over the wire in the clear");

    // Connections from before the capture have no beginning here; new destinations opened new ones.
    let orders: [std::net::IpAddr; 2] = [world.orders.host.v4().into(), world.orders6.host.v6().into()];
    let mut hellos = 0;
    for flow in captured.flows() {
        let towards = orders.contains(&flow.to.ip()) && [HTTP, ECHO].contains(&flow.to.port());
        let back = orders.contains(&flow.from.ip()) && [HTTP, ECHO].contains(&flow.from.port());
        if flow.bytes.is_empty() || !(towards || back) {
            continue;
        }
        flow.tls_records()?;
        if back {
            expect_modern(&flow)?;
            hellos += 1;
        } else {
            let offered = flow.offered_versions().context("a ClientHello without supported_versions")?;
            ensure!(offered == [TLS13], "the client's sidecar offers versions {offered:04x?}");
        }
    }
    ensure!(hellos > 0, "no handshake was captured");
    Ok(())
}

fn expect_modern(flow: &Flow) -> anyhow::Result<()> {
    let hello = flow.server_hello().with_context(|| format!("{} sent no ServerHello", flow.from))?;
    ensure!(hello.version == TLS13, "version {:04x} was agreed", hello.version);
    ensure!(hello.group == Some(X25519_MLKEM768), "key exchange {:04x?} was agreed", hello.group);
    Ok(())
}

/// The control: without it, an empty capture would look like a safe one.
async fn capture_sees_plaintext(world: Arc<World>) -> anyhow::Result<()> {
    let capture = Capture::start(&world.mesh.network).await?;
    let address = world.plain.host.at(ECHO);
    world.outsider.host.run(move || talk(address)).await?;
    let captured = capture.stop().await?;
    ensure!(captured.contains(SECRET.as_bytes()), "the capture is blind");
    Ok(())
}

/// Shakes hands from outside of the mesh with the sidecar of `orders`, at the workload's port and at the sidecar's own.
async fn handshakes(world: &World, handshake: Handshake) -> anyhow::Result<Vec<anyhow::Result<String>>> {
    let mut results = Vec::new();
    for port in [HTTP, INBOUND_PORT] {
        let (address, handshake) = (world.orders.host.at(port), handshake.clone());
        results.push(world.outsider.host.run(move || tls::shake_hands(address, handshake)).await);
    }
    Ok(results)
}

fn all_refused(results: Vec<anyhow::Result<String>>) -> anyhow::Result<()> {
    match results.into_iter().find_map(Result::ok) {
        Some(answer) => bail!("the sidecar let the stranger in and answered {answer:?}"),
        None => Ok(()),
    }
}

async fn no_certificate(world: Arc<World>) -> anyhow::Result<()> {
    all_refused(handshakes(&world, Handshake::default()).await?)
}

async fn strangers_certificate(world: Arc<World>) -> anyhow::Result<()> {
    let stranger = Authority::new("another mesh")?;
    for id in ["spiffe://outrigger.local/ns/default/sa/web", "spiffe://elsewhere/ns/default/sa/web"] {
        let leaf = stranger.workload(id)?;
        all_refused(handshakes(&world, Handshake { leaf: Some(leaf), ..Handshake::default() }).await?)?;
    }
    Ok(())
}

async fn tls12(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.orders.host.at(HTTP);
    world
        .outsider
        .host
        .run(move || async move {
            let mut raw = Raw::connect(address).await?;
            raw.send(tls::CLIENT_HELLO_12).await?;
            // A reset says no as clearly.
            let answer = raw.read_to_end().await.unwrap_or_default();
            // An alert (RFC 8446, section 6), or nothing; no ServerHello.
            ensure!(answer.first().is_none_or(|kind| *kind == 21), "TLS 1.2 was answered by {answer:02x?}");
            Ok(())
        })
        .await
}

async fn plaintext(world: Arc<World>) -> anyhow::Result<()> {
    let address = world.orders.host.at(HTTP);
    let reply = world.outsider.host.run(move || client::get(address, "orders", "/whoami")).await;
    if let Ok(reply) = reply {
        ensure!(
            reply.status == 403 || reply.status == 400 || reply.status == 503,
            "plaintext got {}",
            reply.status
        );
        ensure!(!reply.text().contains("orders"), "plaintext reached the application");
    }
    Ok(())
}

async fn controller(world: Arc<World>) -> anyhow::Result<()> {
    let capture = Capture::start(&world.mesh.network).await?;
    let joined = world.mesh.workload("joining").start().await?;
    wait_until(Duration::from_secs(10), "the new sidecar's certificate", || async {
        joined.admin("/ready").await?.expect(200)
    })
    .await?;
    let captured = capture.stop().await?;
    let controller = world.mesh.controller_host.at(DISCOVERY_PORT);
    let answers: Vec<_> = captured
        .flows()
        .into_iter()
        .filter(|flow| flow.from == controller && !flow.bytes.is_empty())
        .collect();
    ensure!(!answers.is_empty(), "no connection to the controller was captured");
    for flow in answers {
        flow.tls_records()?;
        expect_modern(&flow)?;
    }
    Ok(())
}
