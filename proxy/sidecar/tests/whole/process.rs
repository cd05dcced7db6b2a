//! The binary: exit codes, port locks, the admin port, the end.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::support::{Fake, TOKEN, eventually};

const PROXY: &str = env!("CARGO_BIN_EXE_outrigger-proxy");

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Proxy {
    child: Child,
    admin: SocketAddr,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(fake: &Fake, folder: &Path, admin: u16) -> Command {
    let config = fake.config(folder);
    let mut command = Command::new(PROXY);
    command
        .env_clear()
        .env("OUTRIGGER_CONTROLLER", fake.address.to_string())
        .env("OUTRIGGER_TOKEN_FILE", config.token_file)
        .env("OUTRIGGER_TRUST_BUNDLE", config.trust_bundle)
        .env("OUTRIGGER_PORTS_DNS", "0")
        .env("OUTRIGGER_PORTS_ADMIN", admin.to_string())
        .env("OUTRIGGER_BIND_ADMIN", "0.0.0.0")
        .env("OUTRIGGER_DRAIN_MIN", "100ms")
        .stderr(Stdio::piped());
    command
}

fn start(fake: &Fake, folder: &Path) -> Proxy {
    let admin = free_port();
    let child = command(fake, folder, admin).spawn().unwrap();
    Proxy { child, admin: SocketAddr::from(([127, 0, 0, 1], admin)) }
}

/// Status code and body; `None` while nobody listens.
fn request(method: &str, at: SocketAddr, path: &str) -> Option<(u16, String)> {
    request_with(method, at, path, &format!("host: {at}\r\n"))
}

fn request_with(method: &str, at: SocketAddr, path: &str, headers: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(at).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\n{headers}connection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

async fn get(at: SocketAddr, path: &'static str) -> Option<(u16, String)> {
    tokio::task::spawn_blocking(move || request("GET", at, path)).await.unwrap()
}

async fn ready(proxy: &Proxy) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while get(proxy.admin, "/ready").await.is_none_or(|(status, _)| status != 200) {
        assert!(Instant::now() < deadline, "not ready in ten seconds");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ended(proxy: &mut Proxy) -> ExitStatus {
    let mut status = None;
    eventually("the process ends", || {
        status = proxy.child.try_wait().unwrap();
        status.is_some()
    })
    .await;
    status.unwrap()
}

#[test]
fn bad_configuration_exits_64_with_all_faults() {
    let output = Command::new(PROXY)
        .env_clear()
        .env("OUTRIGGER_THREADS", "0")
        .env("OUTRIGGER_TRUST_DOMAIN", "A")
        .arg("--check-config")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(text.contains("threads") && text.contains("trust_domain"), "{text}");
    let missing = Command::new(PROXY).env_clear().args(["--config", "/nowhere.yaml"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(64));
}

#[tokio::test]
async fn a_second_proxy_on_a_port_says_so() {
    let fake = Fake::new().await;
    let folder = tempfile::tempdir().unwrap();
    let first = start(&fake, folder.path());
    eventually("the first one runs", || TcpStream::connect(first.admin).is_ok()).await;
    let second = command(&fake, folder.path(), first.admin.port()).output().unwrap();
    let text = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text.contains(&format!("port {}", first.admin.port())) && text.contains("another"), "{text}");
}

#[tokio::test]
async fn the_admin_port_tells_what_there_is_and_no_secret() {
    let fake = Fake::new().await;
    let folder = tempfile::tempdir().unwrap();
    let proxy = start(&fake, folder.path());
    eventually("it listens", || TcpStream::connect(proxy.admin).is_ok()).await;
    assert_eq!(get(proxy.admin, "/live").await.unwrap().0, 200);
    let (status, missing) = get(proxy.admin, "/ready").await.unwrap();
    assert!(status == 503 && missing.contains("certificate") && missing.contains("mesh"), "{missing}");

    fake.start().await;
    ready(&proxy).await;
    let (status, config) = get(proxy.admin, "/config").await.unwrap();
    assert!(status == 200 && config.contains("spiffe://outrigger.local/ns/shop/sa/web"), "{config}");
    assert!(!config.contains(TOKEN) && !config.contains("PRIVATE"));
    let (_, metrics) = get(proxy.admin, "/metrics").await.unwrap();
    assert!(metrics.contains("outrigger_controller_connected 1"), "{metrics}");
    assert_eq!(get(proxy.admin, "/nothing").await.unwrap().0, 404);
    assert_eq!(get(proxy.admin, "/drain").await.unwrap().0, 405);
    // What a browser would send for a page that somebody else wrote.
    for (method, path, headers) in [
        ("GET", "/config", "host: rebound.example\r\n"),
        ("POST", "/drain", "host: rebound.example\r\n"),
        ("POST", "/drain", "host: localhost\r\norigin: https://evil.example\r\n"),
        ("POST", "/drain", "host: localhost\r\nsec-fetch-site: cross-site\r\n"),
    ] {
        let answer = request_with(method, proxy.admin, path, headers).unwrap();
        assert_eq!(answer.0, 403, "{method} {path} {headers:?}: {}", answer.1);
    }
    assert_eq!(get(proxy.admin, "/live").await.unwrap().0, 200);

    // From an address of the host that is not loopback, if it has one.
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    if probe.connect("192.0.2.1:9").is_ok() {
        let outside = SocketAddr::new(probe.local_addr().unwrap().ip(), proxy.admin.port());
        assert_eq!(get(outside, "/live").await.unwrap().0, 200);
        assert_eq!(get(outside, "/config").await.unwrap().0, 403);
        assert_eq!(request("POST", outside, "/drain").unwrap().0, 403);
    }
}

#[tokio::test]
async fn a_shutdown_drains_and_a_second_signal_does_not_wait() {
    let fake = Fake::new().await;
    fake.start().await;
    let folder = tempfile::tempdir().unwrap();
    let mut proxy = start(&fake, folder.path());
    ready(&proxy).await;
    assert_eq!(request("POST", proxy.admin, "/drain").unwrap().0, 202);
    assert!(ended(&mut proxy).await.success());

    let admin = free_port();
    let child = command(&fake, folder.path(), admin).env("OUTRIGGER_DRAIN_MIN", "20s").spawn().unwrap();
    let mut proxy = Proxy { child, admin: SocketAddr::from(([127, 0, 0, 1], admin)) };
    fake.state().token_uses = 1;
    ready(&proxy).await;
    let terminate = |proxy: &Proxy| {
        let pid = nix::unistd::Pid::from_raw(proxy.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    };
    terminate(&proxy);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !get(proxy.admin, "/ready").await.unwrap().1.contains("draining") {
        assert!(Instant::now() < deadline);
    }
    terminate(&proxy);
    assert!(ended(&mut proxy).await.success());
}

#[tokio::test]
async fn the_most_talkative_log_holds_no_token() {
    let fake = Fake::new().await;
    fake.state().token_uses = 0;
    fake.start().await;
    let folder = tempfile::tempdir().unwrap();
    let (admin, log) = (free_port(), folder.path().join("log"));
    let child = command(&fake, folder.path(), admin)
        .env("OUTRIGGER_LOG_LEVEL", "trace")
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let proxy = Proxy { child, admin: SocketAddr::from(([127, 0, 0, 1], admin)) };
    let said = |what: &str| std::fs::read_to_string(&log).unwrap().contains(what);
    eventually("a refused token is reported", || said("refuses to sign")).await;
    fake.state().token_uses = 1;
    ready(&proxy).await;
    assert!(said("new certificate in use"));
    assert!(!said(TOKEN), "the token is in the log");
}
