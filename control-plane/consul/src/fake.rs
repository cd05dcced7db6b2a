//! A Consul for tests: speaks the blocking-query protocol over in-memory connections, so that tests can stop the
//! clock, and misbehaves on request.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    convert::Infallible,
    io,
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
    transport::{Dial, Io, Transport},
};

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
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
pub(crate) struct World {
    pub(crate) index: u64,
    /// Service name -> entries of its health answer.
    pub(crate) services: BTreeMap<String, Vec<Value>>,
    /// Key -> (value, modify index).
    pub(crate) keys: BTreeMap<String, (Bytes, u64)>,
    /// The token that is accepted; empty: any.
    pub(crate) token: String,
    /// One for each of the next requests.
    pub(crate) faults: VecDeque<Fault>,
    /// Holds for every request.
    pub(crate) permanent_fault: Option<Fault>,
    pub(crate) filtered: bool,
    /// Blocking queries are answered like Consul's streaming backend does.
    pub(crate) streaming: bool,
    /// No leader is known: stale reads answer and say so, others fail.
    pub(crate) leaderless: bool,
    /// What stale reads see instead of `services`.
    pub(crate) stale_services: Option<BTreeMap<String, Vec<Value>>>,
    pub(crate) last_contact_ms: u64,
    /// Hosts of agents that refuse connections.
    pub(crate) down: BTreeSet<String>,
    /// `host method target` of every request.
    pub(crate) log: Vec<String>,
    pub(crate) bodies: Vec<Bytes>,
}

#[derive(Clone)]
pub(crate) struct FakeConsul {
    world: Arc<Mutex<World>>,
    changed: watch::Sender<()>,
}

impl FakeConsul {
    pub(crate) fn new() -> Self {
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
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut World) -> R) -> R {
        let result = {
            let mut world = self.world();
            world.index += 1;
            change(&mut world)
        };
        self.changed.send_replace(());
        result
    }

    /// Looks, or changes something behind the clients' backs.
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub(crate) fn client(&self, config: &ClientConfig) -> Client {
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
        let index = if fault == Some(Fault::IndexZero) { 0 } else { world.index };
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
            let cas = parameter("cas").map(|cas| cas.parse().unwrap());
            answer_key(&mut world.keys, &head.method, key, cas, parameter("recurse").is_some(), body)
        } else {
            (200, json!({"Config": {"Version": "1.20.6", "Datacenter": "dc1", "NodeName": "n1"}}))
        };
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

fn answer_key(
    keys: &mut BTreeMap<String, (Bytes, u64)>,
    method: &http::Method,
    key: &str,
    cas: Option<u64>,
    recurse: bool,
    body: Bytes,
) -> (u16, Value) {
    let version = keys.get(key).map_or(0, |(_, version)| *version);
    match (method.as_str(), cas) {
        ("PUT", Some(cas)) if cas == version => {
            keys.insert(key.to_owned(), (body, version + 7));
            (200, json!(true))
        }
        ("DELETE", Some(cas)) if cas == version => {
            keys.remove(key);
            (200, json!(true))
        }
        ("PUT" | "DELETE", _) => (200, json!(false)),
        _ => {
            let wanted = keys.iter().filter(|(have, _)| *have == key || recurse && have.starts_with(key));
            let pair = |(key, (value, version)): (&String, &(Bytes, u64))| {
                // Base64 of "{}", the only value that tests store.
                assert_eq!(value, "{}");
                json!({"Key": key, "Value": "e30=", "ModifyIndex": version, "Flags": 0, "LockIndex": 0})
            };
            let pairs: Vec<Value> = wanted.map(pair).collect();
            (if pairs.is_empty() { 404 } else { 200 }, json!(pairs))
        }
    }
}

/// A body that can end or stop early.
pub(crate) struct Script {
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
pub(crate) fn entry(service: &str, id: &str, address: &str, status: &str) -> Value {
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
