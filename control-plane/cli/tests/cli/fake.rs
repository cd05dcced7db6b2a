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

pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef";
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
    /// `<kind> <namespace>/<name>` to its revisions; the last one is what holds, unless it has no object.
    objects: BTreeMap<String, Vec<Value>>,
    is_down: bool,
    /// Who said last who it is.
    author: String,
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
            .env("USER", "ann")
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
            "outrigger-author" => value.clone_into(&mut state.author),
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
    let _ =
        write!(head, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", answer.len());
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
        ("GET", ["controller"]) => ("200 OK", controller()),
        ("GET", ["proxies"]) => ("200 OK", json!({ "proxies": proxies() })),
        ("GET", ["endpoints"]) => {
            let mut items = endpoints();
            if let Some(service) = query.get("service") {
                items.retain(|endpoint| endpoint["service"] == *service);
            }
            ("200 OK", json!({ "items": items }))
        }
        ("GET", ["catalog"]) => ("200 OK", catalog()),
        ("GET", ["policies"]) => ("200 OK", state.list(&query)),
        ("POST", ["policies", "apply"]) => state.apply(body),
        (_, ["policies", kind, namespace, name, rest @ ..]) => {
            let key = format!("{kind} {namespace}/{name}");
            match (method, rest) {
                ("GET", []) if state.item(&key).is_some() => ("200 OK", state.item(&key).unwrap()),
                ("DELETE", []) if state.item(&key).is_some() => state.delete(&key, &query),
                ("GET", ["history"]) if state.objects.contains_key(&key) => {
                    let past: Vec<&Value> = state.objects[&key].iter().rev().collect();
                    ("200 OK", json!({ "items": past }))
                }
                ("POST", ["rollback"]) if state.objects.contains_key(&key) => state.rollback(&key, body),
                _ => error("404 Not Found", "missing", &format!("there is no {key}")),
            }
        }
        _ => error("404 Not Found", "missing", "there is no such thing"),
    }
}

impl State {
    /// An object as the API gives it, if it is there.
    fn item(&self, key: &str) -> Option<Value> {
        let past = self.objects.get(key)?;
        let last = past.last()?;
        let object = last.get("object")?;
        // An object that says so has not been taken by everybody.
        let labels = &object["metadata"]["labels"];
        let status = match labels["fate"].as_str() {
            Some("refused") => json!({
                "conditions": [{ "type": "Accepted", "status": "True", "reason": "Accepted", "message": "" }],
                "proxies": { "on": 2, "accepted": 1, "refused": [
                    { "proxy": "spiffe://outrigger.local/ns/shop/sa/web (10.0.0.3)", "reason": "route 0: no such filter" },
                ] },
            }),
            Some("conflicted") => json!({
                "conditions": [{ "type": "Accepted", "status": "False", "reason": "Conflicted",
                    "message": "TrafficPolicy shop/older has the same target" }],
                "proxies": { "on": 0, "accepted": 0, "refused": [] },
            }),
            _ => json!({
                "conditions": [{ "type": "Accepted", "status": "True", "reason": "Accepted", "message": "" }],
                "proxies": { "on": 2, "accepted": 2, "refused": [] },
            }),
        };
        Some(json!({
            "object": object, "revision": last["revision"], "created": past[0]["time"], "updated": last["time"],
            "author": last["author"], "status": status,
        }))
    }

    fn list(&self, query: &BTreeMap<&str, &str>) -> Value {
        let is_wanted = |item: &Value| {
            query.get("kind").is_none_or(|kind| item["object"]["kind"] == *kind)
                && query.get("namespace").is_none_or(|name| item["object"]["metadata"]["namespace"] == *name)
        };
        let items: Vec<Value> =
            self.objects.keys().filter_map(|key| self.item(key)).filter(is_wanted).collect();
        json!({ "revision": self.revision, "items": items })
    }

    fn apply(&mut self, body: &Value) -> Answer {
        let mut results = Vec::new();
        let objects = body["objects"].as_array().unwrap();
        for object in objects {
            let key = key_of(object);
            let held = self.item(&key).map_or(json!(0), |item| item["revision"].clone());
            if let Some(expected) = body["expect"].get(&key).filter(|expected| **expected != held) {
                let text = format!("{key} is at revision {held}, not at {expected}; read it again");
                return error("409 Conflict", "conflict", &text);
            }
            // What the controller finds wrong beyond the shape.
            if object["spec"]["targetRef"]["name"] == "nowhere" {
                let fault = json!({ "file": key, "line": 0, "column": 0, "path": "spec.targetRef.name",
                    "message": "there is no service nowhere.shop" });
                let error =
                    json!({ "code": "invalid", "message": "the objects have faults", "faults": [fault] });
                return ("422 Unprocessable Entity", json!({ "error": error }));
            }
        }
        for object in objects {
            let key = key_of(object);
            let item = self.item(&key);
            let action = match &item {
                Some(item) if item["object"]["spec"] == object["spec"] => "unchanged",
                Some(_) => "configured",
                None => "created",
            };
            if action != "unchanged" && body["dryRun"] == false {
                self.write(&key, action, Some(object));
            }
            let revision = self.item(&key).map_or(json!(0), |item| item["revision"].clone());
            let warnings = if object["spec"]["mode"] == "Audit" {
                vec!["spec.mode: nothing is refused by it"]
            } else if object["spec"] == json!({}) {
                vec!["spec: says nothing"]
            } else {
                Vec::new()
            };
            results.push(json!({ "key": key, "action": action, "revision": revision, "warnings": warnings }));
        }
        for key in body["deletions"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let held = self.item(key).unwrap()["revision"].clone();
            assert_eq!(body["expect"][key], held, "what is pruned is what was read");
            if body["dryRun"] == false {
                self.write(key, "deleted", None);
            }
            results.push(json!({ "key": key, "action": "deleted", "revision": held, "warnings": [] }));
        }
        ("200 OK", json!({ "revision": self.revision, "results": results }))
    }

    fn delete(&mut self, key: &str, query: &BTreeMap<&str, &str>) -> Answer {
        let held = self.item(key).unwrap()["revision"].to_string();
        if query.get("revision").is_some_and(|revision| *revision != held) {
            return error("409 Conflict", "conflict", &format!("{key} is at revision {held}"));
        }
        let warnings: Vec<String> = self
            .objects
            .keys()
            .filter(|other| **other == key.replace("HTTPRoute", "TrafficPolicy") && **other != key)
            .filter(|other| self.item(other).is_some())
            .map(|other| format!("{other} refers to it"))
            .collect();
        if query["dryRun"] == "false" {
            self.write(key, "deleted", None);
        }
        ("200 OK", json!({ "revision": self.revision, "warnings": warnings }))
    }

    fn rollback(&mut self, key: &str, body: &Value) -> Answer {
        let past = self.objects[key].iter().find(|past| past["revision"] == body["revision"]);
        match past.and_then(|past| past.get("object")).cloned() {
            Some(object) => {
                self.apply(&json!({ "objects": [object], "dryRun": body["dryRun"], "expect": {} }))
            }
            None => error("404 Not Found", "missing", "there is no such revision"),
        }
    }

    fn write(&mut self, key: &str, action: &str, object: Option<&Value>) {
        self.revision += 1;
        let mut past = json!({
            "revision": self.revision, "time": now() - LONG_AGO, "author": self.author, "action": action,
        });
        if let Some(object) = object {
            past["object"] = object.clone();
        }
        self.objects.entry(key.to_owned()).or_default().push(past);
    }
}

fn key_of(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let metadata = &object["metadata"];
    format!("{} {}/{}", text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"]))
}

/// Two services of the namespace `shop`, one workload each.
fn catalog() -> Value {
    let service = |name: &str, at: u8| {
        json!({
            "name": name, "namespace": "shop",
            "ports": [{ "port": 8080, "name": "http", "protocol": "HTTP1" }],
            "endpoints": [{
                "id": format!("{name}-1"), "address": format!("10.0.0.{at}"), "ports": { "8080": 8080 },
                "identity": format!("spiffe://outrigger.local/ns/shop/sa/{name}"), "zone": "a",
                "health": "Healthy", "labels": {},
            }],
        })
    };
    json!({
        "trustDomain": "outrigger.local", "meshNamespace": "outrigger-system",
        "defaults": { "mtls": "Strict", "inbound": "Allow", "outbound": "Allow" },
        "services": [service("orders", 1), service("web", 3)],
    })
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

fn controller() -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"), "trust_domain": "outrigger.local", "ranges": ["10.0.0.0/8"],
        // Some hours more, so that the days are the same however long the test takes.
        "issuer_expires": now() + 365 * 86_400 + 3600, "leaf_expires": now() + 86_400,
    })
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
    let claim = |accepted: bool, message: &str| json!({ "service": "orders.shop", "address": "10.0.0.1", "port": 8080, "accepted": accepted, "message": message });
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
            "policies": [
                { "key": "HTTPRoute shop/orders", "state": "refused", "reason": "route 0: no such filter" },
                { "key": "TrafficPolicy shop/orders", "state": "accepted" },
            ],
        },
    ])
}
