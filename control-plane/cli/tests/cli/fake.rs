//! A controller as the command line sees one: the API of policies over a map, and fixed lists for the rest.
//!
//! It is not the controller: it validates nothing and resolves nothing. What it must do like the controller is speak:
//! paths, bodies, statuses and errors.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
/// Three and a half days: an age that a table shows as `3d` however long the test takes.
const LONG_AGO: u64 = 302_400;

/// A controller of a test, and a home folder from which commands are run.
pub(crate) struct Fake {
    address: SocketAddr,
    home: tempfile::TempDir,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    revision: u64,
    /// `kind/namespace/name` to its revisions; the last one is what holds, null is deleted.
    objects: BTreeMap<String, Vec<Value>>,
    is_down: bool,
}

/// What a command did.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {}\n--- stdout\n{}--- stderr\n{}", self.code, self.stdout, self.stderr)
    }
}

impl Fake {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.unwrap(), &mut shared.lock().unwrap());
            }
        });
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), format!("{TOKEN}\n")).unwrap();
        Self { address, home, state }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// A store that takes no writes from now on.
    pub(crate) fn break_store(&self) {
        self.state.lock().unwrap().is_down = true;
    }

    /// A file in the home folder.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.home().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs `outrigger` in the home folder, with this controller.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, "")
    }

    /// The same, with something on standard input.
    pub(crate) fn run_with(&self, arguments: &[&str], stdin: &str) -> Ran {
        let server = self.address.to_string();
        self.run_in(arguments, stdin, &[("OUTRIGGER_SERVER", &server), ("OUTRIGGER_TOKEN_FILE", "token")])
    }

    /// Runs `outrigger` in the home folder with only `environment`.
    pub(crate) fn run_in(&self, arguments: &[&str], stdin: &str, environment: &[(&str, &str)]) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_outrigger"))
            .args(arguments)
            .current_dir(self.home())
            .env_clear()
            .env("HOME", self.home())
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that does not read it has closed it.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        // Ports and folders of this run do not belong into golden files.
        let text = |bytes: Vec<u8>| {
            String::from_utf8(bytes)
                .unwrap()
                .replace(&self.address.to_string(), "[server]")
                .replace(&self.home().display().to_string(), "[home]")
        };
        Ran { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

fn serve(mut stream: &TcpStream, state: &mut State) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return };
    let (method, target) = (method.to_owned(), target.to_owned());
    let (mut length, mut is_known) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => is_known = value == format!("Bearer {TOKEN}"),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (status, answer) = if is_known {
        answer(state, &method, &target, &body)
    } else {
        error("401 Unauthorized", "unauthorized", "who are you?")
    };
    let answer = answer.to_string();
    let mut head = String::new();
    let _ = write!(head, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", answer.len());
    let _ = stream.write_all((head + &answer).as_bytes());
}

type Answer = (&'static str, Value);

fn error(status: &'static str, code: &str, message: &str) -> Answer {
    (status, json!({ "error": { "code": code, "message": message, "faults": [] } }))
}

fn answer(state: &mut State, method: &str, target: &str, body: &Value) -> Answer {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
    let path: Vec<&str> = path.trim_start_matches("/api/v1/").split('/').collect();
    if method != "GET" && state.is_down {
        return error("503 Service Unavailable", "store_unavailable", "Consul does not answer");
    }
    match (method, path.as_slice()) {
        ("GET", ["services"]) => ("200 OK", json!({ "services": services() })),
        ("GET", ["sources"]) => ("200 OK", sources()),
        ("GET", ["proxies"]) => ("200 OK", json!({ "proxies": proxies() })),
        ("GET", ["endpoints"]) => {
            let mut items = endpoints();
            if let Some(service) = query.get("service") {
                items.retain(|endpoint| endpoint["service"] == *service);
            }
            ("200 OK", json!({ "items": items }))
        }
        _ => error("404 Not Found", "not_found", "there is no such thing"),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn services() -> Value {
    json!([
        {
            "name": "orders", "namespace": "shop", "source": "file",
            "ports": [{ "port": 8080, "name": "http", "protocol": "PROTOCOL_HTTP" }],
            "endpoints": [
                { "id": "orders-1", "address": "10.0.0.1", "health": "HEALTHY",
                  "identity": "spiffe://outrigger.local/ns/shop/sa/orders" },
                { "id": "orders-2", "address": "10.0.0.2", "health": "UNHEALTHY", "identity": "" },
            ],
        },
        { "name": "db", "namespace": "shop", "source": "consul",
          "ports": [{ "port": 0, "name": "any", "protocol": "PROTOCOL_TCP" }], "endpoints": [] },
    ])
}

fn sources() -> Value {
    json!({ "sources": [
        { "name": "file", "state": "synced", "since": null, "reason": null, "services": 1, "faults": [] },
        { "name": "consul", "state": "degraded", "since": 1, "reason": "connection refused", "services": 1, "faults": [] },
    ] })
}

fn endpoints() -> Vec<Value> {
    let endpoint = |service: &str, at: u8, health: &str, identity: &str| {
        json!({
            "service": service, "id": format!("{service}-{at}"), "address": format!("10.0.0.{at}"),
            "ports": { "8080": 18080 }, "identity": identity, "health": health, "zone": "a", "weight": 1,
        })
    };
    vec![
        endpoint("orders.shop", 1, "HEALTHY", "spiffe://outrigger.local/ns/shop/sa/orders"),
        endpoint("orders.shop", 2, "UNHEALTHY", ""),
        endpoint("web.shop", 3, "HEALTHY", "spiffe://outrigger.local/ns/shop/sa/web"),
    ]
}

fn proxies() -> Value {
    let claim = |accepted: bool, message: &str| {
        json!({ "service": "orders.shop", "address": "10.0.0.1", "port": 8080, "accepted": accepted, "message": message })
    };
    json!([
        {
            "identity": "spiffe://outrigger.local/ns/shop/sa/orders", "address": "10.0.0.1:40000", "node": "orders-1",
            "agent": "outrigger-proxy 0.1.0", "connected": now() - LONG_AGO, "subscriptions": 2,
            "types": {
                "Inbound": { "in_flight": false, "nack": null,
                    "subscriptions": [{ "name": "self", "version": "7f3a", "state": "acked" }] },
                "Mesh": { "in_flight": false, "nack": null,
                    "subscriptions": [{ "name": "mesh", "version": "1", "state": "acked" }] },
            },
            "claims": [claim(true, "")],
        },
        {
            "identity": "spiffe://outrigger.local/ns/shop/sa/web", "address": "10.0.0.3:40000", "node": "web-1",
            "agent": "outrigger-proxy 0.0.9\u{1b}[2J", "connected": now() - LONG_AGO, "subscriptions": 3,
            "types": {
                "Service": {
                    "in_flight": false,
                    "nack": { "message": "route 0: no such filter", "names": ["orders.shop"], "at": 1 },
                    "subscriptions": [
                        { "name": "nowhere.shop", "version": null, "state": "absent" },
                        { "name": "orders.shop", "version": "9c2e", "state": "refused" },
                    ],
                },
                "Destination": { "in_flight": true, "nack": null,
                    "subscriptions": [{ "name": "10.0.0.1:8080", "version": "3", "state": "sent" }] },
            },
            "claims": [],
        },
    ])
}
