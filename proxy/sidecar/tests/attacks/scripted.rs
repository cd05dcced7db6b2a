//! An HTTP/1.1 application that works on bytes: it keeps what it was sent, and answers what a test tells it to.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

/// What is kept of the bytes that came.
const MOST_KEPT: usize = 4 * 1024 * 1024;

/// What a scripted application does with its answer.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// Sends these bytes and goes on reading requests.
    Say(Vec<u8>),
    /// Sends these bytes and closes.
    SayAndClose(Vec<u8>),
    /// Sends the first once, then the second again and again, so many times at most; then nothing more.
    Repeat(Vec<u8>, Vec<u8>, usize),
}

/// A request as the application saw it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Of which connection: they count up.
    pub(crate) connection: usize,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

/// Everything that came to a scripted application, but for `/good`.
#[derive(Debug, Default)]
pub(crate) struct Record {
    connections: AtomicUsize,
    requests: Mutex<Vec<Request>>,
    bytes: Mutex<Vec<u8>>,
}

impl Record {
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The first lines of all requests.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.requests().iter().map(|request| request.head.lines().next().unwrap_or_default().into()).collect()
    }

    /// What came and was not for `/good`, whole or not.
    pub(crate) fn bytes(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.lock().unwrap().is_empty()
    }

    pub(crate) fn clear(&self) {
        self.requests.lock().unwrap().clear();
        self.bytes.lock().unwrap().clear();
    }

    /// Nothing of a request for `/never` has come.
    #[track_caller]
    pub(crate) fn assert_never(&self, what: &impl std::fmt::Debug) {
        let bytes = self.bytes();
        assert!(!bytes.contains("/never"), "{what:?} reached the application: {bytes:?}");
    }
}

/// Answers `/good` well, everything else by `script`, which is given the method and the path.
pub(crate) async fn scripted<F>(script: F) -> (SocketAddr, Arc<Record>)
where
    F: Fn(&str, &str) -> Script + Clone + Send + Sync + 'static,
{
    let record = Arc::new(Record::default());
    let shared = record.clone();
    let address = tcp_app(move |stream| run(stream, script.clone(), shared.clone())).await;
    (address, record)
}

/// Answers everything with two bytes.
pub(crate) async fn recorder() -> (SocketAddr, Arc<Record>) {
    scripted(|_, _| Script::Say(response("ok"))).await
}

/// A plain answer.
pub(crate) fn response(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn run<F: Fn(&str, &str) -> Script>(mut stream: TcpStream, script: F, record: Arc<Record>) {
    let connection = record.connections.fetch_add(1, Ordering::SeqCst);
    let mut waiting: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let Ok(read @ 1..) = stream.read(&mut buffer).await else { return };
        waiting.extend_from_slice(&buffer[..read]);
        if !waiting.starts_with(b"GET /good ") {
            let mut bytes = record.bytes.lock().unwrap();
            let room = MOST_KEPT.saturating_sub(bytes.len()).min(read);
            bytes.extend_from_slice(&buffer[..room]);
        }
        while let Some((head, end)) = whole_request(&waiting) {
            let request: Vec<u8> = waiting.drain(..end).collect();
            let text = String::from_utf8_lossy(&request[..head]).into_owned();
            let mut words = text.split([' ', '\r']).map(str::to_owned);
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let script = if path == "/good" {
                Script::Say(response("good"))
            } else {
                let body = request[head..].to_vec();
                record.requests.lock().unwrap().push(Request { connection, head: text, body });
                script(&method, &path)
            };
            let sent = match script {
                Script::Say(bytes) => stream.write_all(&bytes).await,
                Script::SayAndClose(bytes) => {
                    let _ = stream.write_all(&bytes).await;
                    let _ = stream.shutdown().await;
                    return;
                }
                Script::Repeat(first, again, times) => {
                    let mut sent = stream.write_all(&first).await;
                    for _ in 0..times {
                        if sent.is_err() {
                            break;
                        }
                        sent = stream.write_all(&again).await;
                    }
                    sent
                }
            };
            if sent.is_err() {
                return;
            }
        }
    }
}

/// Where the first request's head and the request itself end, once it is there. This reader takes chunked before a
/// length, and is otherwise strict.
fn whole_request(bytes: &[u8]) -> Option<(usize, usize)> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    if text.contains("\r\ntransfer-encoding: chunked\r\n") {
        let mut at = head;
        loop {
            let line = at + bytes[at..].windows(2).position(|window| window == b"\r\n")?;
            let digits = std::str::from_utf8(&bytes[at..line]).ok()?.split(';').next()?;
            let size = usize::from_str_radix(digits, 16).ok()?;
            at = line + 2;
            if size > 0 {
                at += size + 2;
                if at > bytes.len() {
                    return None;
                }
                continue;
            }
            // Trailers, to an empty line.
            loop {
                let line = at + bytes[at..].windows(2).position(|window| window == b"\r\n")?;
                let is_last = line == at;
                at = line + 2;
                if is_last {
                    return Some((head, at));
                }
            }
        }
    }
    let length = text.split("\r\ncontent-length: ").nth(1);
    let length = length.map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap_or(0));
    (bytes.len() >= head + length).then_some((head, head + length))
}
