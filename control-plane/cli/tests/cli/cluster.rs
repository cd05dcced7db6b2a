//! An API server as the command line sees one, in front of a controller: fixed answers, and a port-forward that speaks
//! Kubernetes' WebSocket protocol (`v4.channel.k8s.io`).

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use k8s_openapi::jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use crate::fake::{Fake, Ran, TOKEN};

/// A cluster of a test with a controller in it.
pub(crate) struct Cluster {
    pub(crate) fake: Fake,
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// What it answers.
#[derive(Default)]
pub(crate) struct State {
    /// Of a path (without its query): status and body. What is not here is an empty list, or missing.
    pub(crate) answers: BTreeMap<String, (u16, Value)>,
    /// What is said in place of a stream to the pod's port.
    pub(crate) fault: Option<&'static str>,
    /// `<method> <path>` of what was asked.
    pub(crate) asked: Vec<String>,
    /// Where forwards end.
    controller: Option<SocketAddr>,
}

const PODS: &str = "/api/v1/namespaces/outrigger-system/pods";

impl Cluster {
    /// One with a ready controller.
    pub(crate) fn start() -> Self {
        let fake = Fake::start();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State { controller: Some(fake.address()), ..State::default() }));
        let shared = Arc::clone(&state);
        // It ends with the test's process.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                listener.set_nonblocking(true).unwrap();
                let listener = TcpListener::from_std(listener).unwrap();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(serve(stream, Arc::clone(&shared)));
                }
            });
        });
        let cluster = Self { fake, address, state };
        cluster.answer(PODS, 200, list(&[pod("outrigger-controller-1", "outrigger-controller", true)]));
        cluster.kubeconfig("kubeconfig", &format!("token: {TOKEN}"));
        cluster
    }

    /// Writes a kubeconfig whose user has `credentials`.
    pub(crate) fn kubeconfig(&self, name: &str, credentials: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\ncontexts:\n\
             - {{name: lab, context: {{cluster: lab, user: ann, namespace: shop}}}}\n\
             - {{name: here, context: {{cluster: lab, user: ann}}}}\n\
             clusters:\n- {{name: lab, cluster: {{server: 'http://{}'}}}}\n\
             users:\n- {{name: ann, user: {{{credentials}}}}}\n",
            self.address
        );
        self.fake.write(name, &text);
    }

    pub(crate) fn answer(&self, path: &str, status: u16, body: Value) {
        self.change(|state| state.answers.insert(path.to_owned(), (status, body)));
    }

    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    /// Whether it was asked this.
    pub(crate) fn was_asked(&self, what: &str) -> bool {
        self.change(|state| state.asked.iter().any(|asked| asked.starts_with(what)))
    }

    /// Runs `outrigger` in the home folder with that kubeconfig.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.run_in(arguments, &[("KUBECONFIG", "kubeconfig")])
    }

    pub(crate) fn run_in(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let mut ran = self.fake.run_in(arguments, "", environment);
        for text in [&mut ran.stdout, &mut ran.stderr] {
            *text = text.replace(&self.address.to_string(), "[cluster]");
        }
        ran
    }
}

pub(crate) fn list(items: &[Value]) -> Value {
    json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": "1" }, "items": items })
}

pub(crate) fn pod(name: &str, account: &str, is_ready: bool) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "outrigger-system" },
        "spec": { "serviceAccountName": account, "containers": [{ "name": "controller", "image": "outrigger:1" }] },
        "status": { "conditions": [{ "type": "Ready", "status": if is_ready { "True" } else { "False" } }] },
    })
}

pub(crate) fn failure(code: u16, message: &str) -> Value {
    let reason = if code == 404 { "NotFound" } else { "Unknown" };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) {
    let mut stream = BufStream::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
            return;
        }
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        let fits = |line: &&String| line.to_ascii_lowercase().starts_with(&format!("{name}: "));
        head.iter().find(fits).map(|line| line[name.len() + 2..].to_owned())
    };
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    let mut words = head[0].split(' ');
    let (method, target) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let path = target.split('?').next().unwrap().to_owned();
    let (answer, fault, controller) = {
        let mut state = state.lock().unwrap();
        state.asked.push(format!("{method} {path}"));
        (state.answers.get(&path).cloned(), state.fault, state.controller.unwrap())
    };
    if path.ends_with("/portforward") && answer.is_none() {
        let port: u16 = target.rsplit('=').next().unwrap().parse().unwrap();
        let accept = derive_accept_key(header("sec-websocket-key").unwrap().as_bytes());
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
             sec-websocket-accept: {accept}\r\nsec-websocket-protocol: v4.channel.k8s.io\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
        return forward(socket, port, fault, controller).await;
    }
    let (status, answer) = answer.unwrap_or_else(|| default_answer(&method, &path, &body));
    let answer = answer.to_string();
    let date = date();
    let head = format!(
        "HTTP/1.1 {status} X\r\ndate: {date}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        answer.len()
    );
    let _ = stream.write_all((head + &answer).as_bytes()).await;
    let _ = stream.flush().await;
}

fn default_answer(method: &str, path: &str, body: &[u8]) -> (u16, Value) {
    let mut object: Value = serde_json::from_slice(body).unwrap_or_default();
    match (method, path) {
        ("GET", "/version") => {
            let version = json!({
                "major": "1", "minor": "34", "gitVersion": "v1.34.4", "gitCommit": "", "gitTreeState": "", "buildDate": "",
                "goVersion": "", "compiler": "", "platform": "",
            });
            (200, version)
        }
        ("POST", path) if path.ends_with("/selfsubjectaccessreviews") => {
            object["status"] = json!({ "allowed": true });
            (201, object)
        }
        ("POST", path) if path.ends_with("/token") => {
            object["status"] = json!({ "token": TOKEN, "expirationTimestamp": "2100-01-01T00:00:00Z" });
            (201, object)
        }
        // An object, where the last segment is a name.
        ("GET", path)
            if ["/outrigger-controller", "/outrigger-injector", "/cilium-config"]
                .iter()
                .any(|name| path.ends_with(name))
                || path.contains("/customresourcedefinitions/") =>
        {
            (404, failure(404, "not found"))
        }
        _ => (200, list(&[])),
    }
}

/// Now, as HTTP writes it.
fn date() -> String {
    DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now()).unwrap()
}

/// Channel 0 carries the bytes of the port, channel 1 what is wrong with it; each begins with the port's number.
async fn forward(
    mut socket: WebSocketStream<BufStream<TcpStream>>,
    port: u16,
    fault: Option<&'static str>,
    controller: SocketAddr,
) {
    let message = |channel: u8, bytes: &[u8]| Message::Binary(Bytes::from([&[channel], bytes].concat()));
    for channel in [0, 1] {
        socket.send(message(channel, &port.to_le_bytes())).await.unwrap();
    }
    if let Some(fault) = fault {
        socket.send(message(1, fault.as_bytes())).await.unwrap();
        let _ = socket.close(None).await;
        return;
    }
    let mut stream = TcpStream::connect(controller).await.unwrap();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        tokio::select! {
            received = socket.next() => match received {
                Some(Ok(Message::Binary(bytes))) => {
                    assert_eq!(bytes[0], 0, "a client only writes to the port");
                    stream.write_all(&bytes[1..]).await.unwrap();
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
            read = stream.read(&mut buffer) => match read {
                Ok(0) | Err(_) => {
                    let _ = socket.close(None).await;
                    return;
                }
                Ok(count) => socket.send(message(0, &buffer[..count])).await.unwrap(),
            },
        }
    }
}
