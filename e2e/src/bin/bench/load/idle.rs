//! Connections that are opened, used and left idle: what they cost in memory.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::http1;
use crate::{backend::SMALL, cases::Exchange};

/// An answer that takes longer does not come.
const LIMIT: Duration = Duration::from_secs(20);

/// What is spoken on the connections.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Http1,
    Bytes,
}

/// Open connections.
pub(crate) struct Held {
    kind: Kind,
    connections: Vec<TcpStream>,
}

impl Held {
    /// Opens `count` connections, with one exchange on each after the other.
    pub(crate) fn open(address: SocketAddr, kind: Kind, count: usize) -> Result<Self> {
        let mut held = Self { kind, connections: Vec::with_capacity(count) };
        for _ in 0..count {
            let mut stream = connect(address)?;
            stream.write_all(&held.request()).context("sending a request")?;
            held.read(&mut stream)?;
            held.connections.push(stream);
        }
        Ok(held)
    }

    /// One request on every connection at once.
    pub(crate) fn burst(&mut self) -> Result<()> {
        let request = self.request();
        for mut stream in &self.connections {
            stream.write_all(&request).context("sending a request")?;
        }
        for at in 0..self.connections.len() {
            let mut stream = self.connections[at].try_clone().context("sharing a socket")?;
            self.read(&mut stream)?;
        }
        Ok(())
    }

    fn request(&self) -> Vec<u8> {
        match self.kind {
            Kind::Http1 => http1::request(Exchange::Small),
            Kind::Bytes => vec![1; SMALL],
        }
    }

    fn read(&self, stream: &mut TcpStream) -> Result<()> {
        if self.kind == Kind::Bytes {
            return stream.read_exact(&mut [0; SMALL]).context("reading an answer");
        }
        let mut answer = Vec::new();
        let mut scratch = [0; 8192];
        loop {
            let count = stream.read(&mut scratch).context("reading an answer")?;
            ensure!(count > 0, "the connection closed before its answer");
            answer.extend_from_slice(&scratch[..count]);
            let Some(end) = http1::head_end(&answer) else { continue };
            ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..end]));
            let length = http1::content_length(&answer[..end]).context("no Content-Length")?;
            if answer.len() >= end + length {
                return Ok(());
            }
        }
    }
}

/// Connects, with time limits on everything that follows.
pub(crate) fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream =
        TcpStream::connect_timeout(&address, LIMIT).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    stream.set_read_timeout(Some(LIMIT)).context("setting a time-out")?;
    stream.set_write_timeout(Some(LIMIT)).context("setting a time-out")?;
    Ok(stream)
}
