//! A Consul for tests: speaks the blocking-query protocol over in-memory connections, so that tests can stop the
//! clock, or over TCP for tests of other crates, and misbehaves on request.
#![allow(
    clippy::unwrap_used,
    clippy::new_without_default,
    missing_docs,
    reason = "what fails here fails a test; the names say it all"
)]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    Client, ClientConfig,
    kv::{decode_base64, encode_base64},
    transport::{Dial, Io, Transport},
};

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Status(u16, &'static str),
    /// Half of the body, then the end of the connection.
    Truncated,
    /// A body that is no JSON.
    Nonsense,
    /// No answer for ten minutes.
    Stall,
    /// The status line and headers, then nothing for ten minutes.
    StallInBody,
    /// The real answer, with index 0.
    IndexZero,
    /// The real answer, without waiting for a change.
    AtOnce,
}

/// What a test sets and looks at.
pub struct World {
    pub index: u64,
    /// Service name -> entries of its health answer.
    pub services: BTreeMap<String, Vec<Value>>,
    /// Key -> (value, modify index).
    pub keys: BTreeMap<String, (Bytes, u64)>,
    /// The token that is accepted; empty: any.
    pub token: String,
    /// One for each of the next requests.
    pub faults: VecDeque<Fault>,
    /// Holds for every request.
    pub permanent_fault: Option<Fault>,
    pub filtered: bool,
    /// Blocking queries are answered like Consul's streaming backend does.
    pub streaming: bool,
    /// No leader is known: stale reads answer and say so, others fail.
    pub leaderless: bool,
    /// What stale reads see instead of `services`.
    pub stale_services: Option<BTreeMap<String, Vec<Value>>>,
    pub last_contact_ms: u64,
    /// Hosts of agents that refuse connections.
    pub down: BTreeSet<String>,
    /// `host method target` of every request.
    pub log: Vec<String>,
    pub bodies: Vec<Bytes>,
}

#[derive(Clone)]
pub struct FakeConsul {
    world: Arc<Mutex<World>>,
    changed: watch::Sender<()>,
}

impl FakeConsul {
    pub fn new() -> Self {
        let world = World {
            index: 10,
            services: BTreeMap::new(),
            keys: BTreeMap::new(),
            token: String::new(),
            faults: VecDeque::new(),
            permanent_fault: None,
            filtered: false,
            streaming: false,
            leaderless: false,
            stale_services: None,
            last_contact_ms: 0,
            down: BTreeSet::new(),
            log: Vec::new(),
            bodies: Vec::new(),
        };
        Self { world: Arc::new(Mutex::new(world)), changed: watch::Sender::new(()) }
    }

    /// Changes what clients see: a new index, and whoever waits is woken.
    pub fn change<R>(&self, change: impl FnOnce(&mut World) -> R) -> R {
        let result = {
            let mut world = self.world();
            world.index += 1;
            change(&mut world)
        };
        self.changed.send_replace(());
        result
    }

    /// Looks, or changes something behind the clients' backs.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub fn client(&self, config: &ClientConfig) -> Client {
        let fake = self.clone();
        let dial: Dial = Arc::new(move |agent| {
            let fake = fake.clone();
            Box::pin(async move {
                if fake.world().down.contains(&agent.host) {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                let (ours, theirs) = tokio::io::duplex(64 * 1024);
                tokio::spawn(fake.serve(agent.host, theirs));
                Ok(Box::new(ours) as Box<dyn Io>)
            })
        });
        Client::with_transport(config, Transport::with_dial(config, dial))
    }

    /// Serves on a port of loopback until the runtime ends.
    pub async fn listen(&self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let fake = self.clone();
        tokio::spawn(async move {
            while let Ok((io, _)) = listener.accept().await {
                tokio::spawn(fake.clone().serve("tcp".into(), io));
            }
        });
        address
    }

    pub(crate) async fn serve(self, host: String, io: impl Io + 'static) {
        let service = service_fn(move |request| {
            let (fake, host) = (self.clone(), host.clone());
            async move { Ok::<_, Infallible>(fake.answer(&host, request).await) }
        });
        // A client that drops its connection is part of the tests.
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service).await;
    }

    async fn answer(&self, host: &str, request: http::Request<Incoming>) -> Response<Script> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let parameter = |name: &str| {
            let mut pairs =
                head.uri.query().unwrap_or("").split('&').map(|p| p.split_once('=').unwrap_or((p, "")));
            pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
        };
        let token = head.headers.get("x-consul-token").map_or("", |value| value.to_str().unwrap());
        let mut changes = self.changed.subscribe();
        let fault = {
            let mut world = self.world();
            world.log.push(format!("{host} {} {}", head.method, head.uri));
            world.bodies.push(body.clone());
            if !world.token.is_empty() && token != world.token {
                return Script::new("ACL not found").response(403);
            }
            let next = world.faults.pop_front();
            next.or(world.permanent_fault)
        };
        let stall = Duration::from_mins(10);
        match fault {
            Some(Fault::Status(status, text)) => return Script::new(text).response(status),
            Some(Fault::Nonsense) => return Script::new("<html>502</html>").response(200),
            Some(Fault::Stall) => tokio::time::sleep(stall).await,
            _ => {}
        }
        if let Some(wait) = parameter("wait")
            && fault != Some(Fault::AtOnce)
        {
            let wait: u64 = wait.strip_suffix("ms").unwrap().parse().unwrap();
            let asked: u64 = parameter("index").unwrap().parse().unwrap();
            let moved = async {
                while self.world().index == asked {
                    changes.changed().await.unwrap();
                }
            };
            let _ = tokio::time::timeout(Duration::from_millis(wait), moved).await;
        }
        let stale = parameter("stale").is_some();
        if !stale && self.world().leaderless {
            // Consul hopes for a leader meanwhile, and looks rarely.
            tokio::time::sleep(Duration::from_secs(7)).await;
        }
        let world = &mut *self.world();
        if world.leaderless && !stale {
            return Script::new("No cluster leader").response(500);
        }
        let before = world.index;
        let path = head.uri.path().to_owned();
        let services = world.stale_services.as_ref().filter(|_| stale).unwrap_or(&world.services);
        let (status, answer) = if let Some(name) = path.strip_prefix("/v1/health/service/") {
            (200, json!(services.get(name).cloned().unwrap_or_default()))
        } else if path == "/v1/catalog/services" {
            (
                200,
                json!(
                    services.keys().map(|name| (name.clone(), json!([]))).collect::<serde_json::Map<_, _>>()
                ),
            )
        } else if let Some(key) = path.strip_prefix("/v1/kv/") {
            let asked = KeyRequest {
                method: &head.method,
                key,
                cas: parameter("cas").map(|cas| cas.parse().unwrap()),
                recurse: parameter("recurse").is_some(),
                keys: parameter("keys").is_some(),
            };
            asked.answer(world, body)
        } else if path == "/v1/txn" {
            transact(world, &serde_json::from_slice::<Vec<Value>>(&body).unwrap())
        } else {
            (200, json!({"Config": {"Version": "1.20.6", "Datacenter": "dc1", "NodeName": "n1"}}))
        };
        if world.index != before {
            self.changed.send_replace(());
        }
        let index = if fault == Some(Fault::IndexZero) { 0 } else { world.index };
        let text = if status == 404 { String::new() } else { answer.to_string() };
        let mut script = Script::new(text);
        match fault {
            Some(Fault::Truncated) => script.cut = true,
            Some(Fault::StallInBody) => script.stall = true,
            _ => {}
        }
        let mut response = script.response(status);
        let headers = response.headers_mut();
        headers.insert("x-consul-index", index.into());
        headers.insert("x-consul-lastcontact", world.last_contact_ms.into());
        let streamed = world.streaming && parameter("wait").is_some();
        let known = if world.leaderless || streamed { "false" } else { "true" };
        headers.insert("x-consul-knownleader", known.parse().unwrap());
        let backend = if streamed { "streaming" } else { "blocking-query" };
        headers.insert("x-consul-query-backend", backend.parse().unwrap());
        if world.filtered && !streamed {
            headers.insert("x-consul-results-filtered-by-acls", "true".parse().unwrap());
        }
        response
    }
}

struct KeyRequest<'a> {
    method: &'a http::Method,
    key: &'a str,
    cas: Option<u64>,
    recurse: bool,
    keys: bool,
}

impl KeyRequest<'_> {
    fn answer(&self, world: &mut World, body: Bytes) -> (u16, Value) {
        let version = world.version(self.key);
        let holds = self.cas.is_none_or(|cas| cas == version);
        match self.method.as_str() {
            "PUT" | "DELETE" if !holds => (200, json!(false)),
            "PUT" => {
                world.put_key(self.key, body);
                (200, json!(true))
            }
            "DELETE" => {
                world.index += 1;
                world.keys.remove(self.key);
                (200, json!(true))
            }
            _ => {
                let many = self.recurse || self.keys;
                let wanted = world
                    .keys
                    .iter()
                    .filter(|(have, _)| *have == self.key || many && have.starts_with(self.key));
                let pairs: Vec<Value> = wanted
                    .map(
                        |(key, (value, version))| {
                            if self.keys { json!(key) } else { pair(key, value, *version) }
                        },
                    )
                    .collect();
                (if pairs.is_empty() { 404 } else { 200 }, json!(pairs))
            }
        }
    }
}

fn pair(key: &str, value: &Bytes, version: u64) -> Value {
    json!({"Key": key, "Value": encode_base64(value), "ModifyIndex": version, "Flags": 0, "LockIndex": 0})
}

/// All or nothing, with Consul's words where a version does not hold.
fn transact(world: &mut World, operations: &[Value]) -> (u16, Value) {
    let field = |operation: &Value, name: &str| operation["KV"][name].clone();
    let key = |operation: &Value| field(operation, "Key").as_str().unwrap().to_owned();
    let verb = |operation: &Value| field(operation, "Verb").as_str().unwrap().to_owned();
    if operations.len() > crate::MAX_TRANSACTION {
        return (413, json!(null));
    }
    let stale = |(at, operation): (usize, &Value)| {
        let checked = matches!(verb(operation).as_str(), "cas" | "delete-cas");
        let holds = !checked || field(operation, "Index") == world.version(&key(operation));
        let what = format!("failed to set key \"{}\", index is stale", key(operation));
        (!holds).then(|| json!({"OpIndex": at, "What": what}))
    };
    let errors: Vec<Value> = operations.iter().enumerate().filter_map(stale).collect();
    if !errors.is_empty() {
        return (409, json!({"Results": null, "Errors": errors}));
    }
    world.index += 1;
    let mut results = Vec::new();
    for operation in operations {
        let key = key(operation);
        if verb(operation).starts_with("delete") {
            world.keys.remove(&key);
        } else {
            let value = Bytes::from(decode_base64(field(operation, "Value").as_str().unwrap()).unwrap());
            world.keys.insert(key.clone(), (value, world.index));
            results.push(json!({"KV": {"Key": key, "Value": null, "ModifyIndex": world.index}}));
        }
    }
    (200, json!({"Results": results, "Errors": null}))
}

impl World {
    fn version(&self, key: &str) -> u64 {
        self.keys.get(key).map_or(0, |(_, version)| *version)
    }

    /// Writes a key as another client would.
    pub fn put_key(&mut self, key: &str, value: impl Into<Bytes>) {
        self.index += 1;
        self.keys.insert(key.to_owned(), (value.into(), self.index));
    }
}

/// A body that can end or stop early.
pub struct Script {
    data: Bytes,
    sent: bool,
    cut: bool,
    stall: bool,
}

impl Script {
    fn new(text: impl Into<String>) -> Self {
        Self { data: text.into().into(), sent: false, cut: false, stall: false }
    }

    fn response(self, status: u16) -> Response<Self> {
        let mut response = Response::new(self);
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.stall {
            return Poll::Pending;
        }
        if self.sent {
            return Poll::Ready(self.cut.then(|| Err(io::ErrorKind::BrokenPipe.into())));
        }
        self.sent = true;
        let end = if self.cut { self.data.len() / 2 } else { self.data.len() };
        Poll::Ready(Some(Ok(Frame::data(self.data.slice(..end)))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.data.len() as u64)
    }
}

/// An entry of a health answer, as a plain registration makes it.
pub fn entry(service: &str, id: &str, address: &str, status: &str) -> Value {
    json!({
        "Node": {"Node": "node-a", "Address": "10.0.0.9", "Datacenter": "dc1", "Meta": null},
        "Service": {
            "ID": id, "Service": service, "Tags": ["v1"], "Address": address, "Port": 8080,
            "Meta": {}, "Weights": {"Passing": 10, "Warning": 2},
        },
        "Checks": [
            {"CheckID": "serfHealth", "Status": "passing", "Output": "Agent alive"},
            {"CheckID": format!("service:{id}"), "Status": status, "Output": ""},
        ],
    })
}
