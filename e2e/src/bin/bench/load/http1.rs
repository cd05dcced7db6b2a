//! HTTP/1.1, closed loop: each connection sends its next request when the last answer is complete.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context as _, Result, ensure};

use super::{Load, Stretch, nanoseconds};
use crate::{
    cases::Exchange,
    poller::{Line, Poller},
};

/// What one read takes at most.
const SCRATCH: usize = 256 * 1024;

/// One connection and what is missing of its answer.
pub(crate) struct Client {
    pub(crate) line: Line,
    /// An incomplete head.
    head: Vec<u8>,
    body: Option<usize>,
    pub(crate) begun: Instant,
}

impl Client {
    pub(crate) fn connect(poller: &Poller, address: SocketAddr, key: usize) -> Result<Self> {
        let line = Line::connect(poller, address, key)?;
        Ok(Self { line, head: Vec::new(), body: None, begun: Instant::now() })
    }

    pub(crate) fn send(&mut self, poller: &Poller, request: &[u8]) -> Result<()> {
        self.line.out.extend_from_slice(request);
        self.line.flush(poller)
    }

    /// Handles an event; `true` when the answer is complete.
    pub(crate) fn turn(&mut self, poller: &Poller, scratch: &mut [u8]) -> Result<bool> {
        self.line.flush(poller)?;
        let Some(count) = self.line.read(scratch)? else { return Ok(false) };
        let mut bytes = &scratch[..count];
        let joined;
        let left = if let Some(left) = self.body {
            left
        } else {
            if !self.head.is_empty() {
                self.head.extend_from_slice(bytes);
                joined = std::mem::take(&mut self.head);
                bytes = &joined;
            }
            let Some(end) = head_end(bytes) else {
                self.head = bytes.to_vec();
                return Ok(false);
            };
            let head = &bytes[..end];
            ensure!(
                head.starts_with(b"HTTP/1.1 200"),
                "the answer is {:?}",
                String::from_utf8_lossy(&head[..end.min(200)])
            );
            bytes = &bytes[end..];
            content_length(head).context("the answer has no Content-Length")?
        };
        ensure!(bytes.len() <= left, "the answer is longer than its Content-Length");
        let left = left - bytes.len();
        self.body = (left > 0).then_some(left);
        Ok(left == 0)
    }
}

/// The bytes of a request.
pub(crate) fn request(exchange: Exchange) -> Vec<u8> {
    let fields = "Host: app.bench\r\nUser-Agent: bench/1\r\nAccept: */*\r\n";
    let (line, body) = match exchange {
        Exchange::Small => ("GET / HTTP/1.1".to_owned(), None),
        Exchange::Download(bytes) => (format!("GET /{bytes} HTTP/1.1"), None),
        Exchange::Upload(bytes) => ("POST /2 HTTP/1.1".to_owned(), Some(bytes)),
    };
    let length = body.map(|bytes| format!("Content-Length: {bytes}\r\n")).unwrap_or_default();
    let mut request = format!("{line}\r\n{fields}{length}\r\n").into_bytes();
    request.resize(request.len() + body.unwrap_or(0), b'x');
    request
}

/// Length of the head that `bytes` begin with, up to and with the empty line.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// The value of Content-Length in a head.
pub(crate) fn content_length(head: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"content-length:";
    head.split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = line.split_at_checked(NAME.len())?;
        if !name.eq_ignore_ascii_case(NAME) {
            return None;
        }
        std::str::from_utf8(value).ok()?.trim().parse().ok()
    })
}

pub(super) struct Closed {
    poller: Poller,
    clients: Vec<Client>,
    request: Vec<u8>,
    scratch: Vec<u8>,
}

impl Closed {
    pub(super) fn open(address: SocketAddr, connections: usize, exchange: Exchange) -> Result<Self> {
        let poller = Poller::new()?;
        let request = request(exchange);
        let mut clients = Vec::new();
        for key in 0..connections {
            clients.push(Client::connect(&poller, address, key)?);
        }
        for client in &mut clients {
            client.begun = Instant::now();
            client.send(&poller, &request)?;
        }
        Ok(Self { poller, clients, request, scratch: vec![0; SCRATCH] })
    }
}

impl Load for Closed {
    fn run(&mut self, end: Instant) -> Result<Stretch> {
        let begun = Instant::now();
        let mut latencies = Vec::new();
        while let Some(ready) = self.poller.wait_until(end)? {
            for at in 0..ready {
                let client = &mut self.clients[self.poller.key(at)];
                if client.turn(&self.poller, &mut self.scratch)? {
                    let now = Instant::now();
                    latencies.push(nanoseconds(now - client.begun));
                    client.begun = now;
                    client.send(&self.poller, &self.request)?;
                }
            }
        }
        Ok(Stretch::of(begun, latencies))
    }
}
