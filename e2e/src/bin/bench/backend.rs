//! The application behind every proxy: one thread, one epoll, the same for all.
//!
//! Three ports, so that nothing has to be detected: HTTP/1.1, HTTP/2 in clear text (with gRPC), and bytes.

mod bytes;
mod http1;
mod http2;

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};

use crate::{
    machine,
    poller::{Line, Poller},
};

pub(crate) use bytes::FLOOD;

/// Bytes of a small answer: what API answers have.
pub(crate) const SMALL: usize = 1024;
/// What one read takes at most.
const SCRATCH: usize = 256 * 1024;
/// How often the thread looks whether it shall end.
const TICK: Duration = Duration::from_millis(100);

/// The running application.
pub(crate) struct Backend {
    pub(crate) http1: SocketAddr,
    pub(crate) http2: SocketAddr,
    pub(crate) bytes: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What is spoken on a port.
#[derive(Clone, Copy)]
enum Kind {
    Http1,
    Http2,
    Bytes,
}

/// One connection's protocol.
trait Serve {
    /// Handles bytes that came, or room to write (no bytes).
    fn serve(&mut self, line: &mut Line, poller: &Poller, bytes: &[u8]) -> Result<()>;
}

impl Backend {
    /// Starts the thread on the processor of the load.
    pub(crate) fn start(ports: [SocketAddr; 3]) -> Result<Self> {
        let listen = |address| TcpListener::bind(address).with_context(|| format!("listening on {address}"));
        let listeners = [
            (listen(ports[0])?, Kind::Http1),
            (listen(ports[1])?, Kind::Http2),
            (listen(ports[2])?, Kind::Bytes),
        ];
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("backend".to_owned()).spawn(move || {
            if let Err(error) = machine::pin(machine::LOAD_CPU).and_then(|()| run(&listeners, &stopped)) {
                eprintln!("bench: the backend failed: {error:#}");
            }
        });
        let thread = Some(thread.context("starting the backend's thread")?);
        Ok(Self { http1: ports[0], http2: ports[1], bytes: ports[2], stop, thread })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has said what went wrong.
            let _ = thread.join();
        }
    }
}

fn run(listeners: &[(TcpListener, Kind)], stop: &AtomicBool) -> Result<()> {
    let mut poller = Poller::new()?;
    for (key, (listener, _)) in listeners.iter().enumerate() {
        listener.set_nonblocking(true).context("making a listener non-blocking")?;
        poller.add(listener, key)?;
    }
    let mut scratch = vec![0; SCRATCH];
    let mut connections: Vec<Option<(Line, Box<dyn Serve>)>> = Vec::new();
    let mut free = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for at in 0..poller.wait(TICK)? {
            let key = poller.key(at);
            if let Some((listener, kind)) = listeners.get(key) {
                while let Ok((stream, _)) = listener.accept() {
                    let slot = free.pop().unwrap_or_else(|| {
                        connections.push(None);
                        connections.len() - 1
                    });
                    connections[slot] = Some(accept(&poller, stream, *kind, slot + listeners.len())?);
                }
                continue;
            }
            let slot = key - listeners.len();
            let Some((line, protocol)) = &mut connections[slot] else { continue };
            if turn(line, protocol.as_mut(), &poller, &mut scratch).is_err() {
                // The peer left, as loads do.
                connections[slot] = None;
                free.push(slot);
            }
        }
    }
    Ok(())
}

fn accept(poller: &Poller, stream: TcpStream, kind: Kind, key: usize) -> Result<(Line, Box<dyn Serve>)> {
    let line = Line::new(poller, stream, key)?;
    let protocol: Box<dyn Serve> = match kind {
        Kind::Http1 => Box::new(http1::Http1::default()),
        Kind::Http2 => Box::new(http2::Http2::default()),
        Kind::Bytes => Box::new(bytes::Bytes::default()),
    };
    Ok((line, protocol))
}

fn turn(line: &mut Line, protocol: &mut dyn Serve, poller: &Poller, scratch: &mut [u8]) -> Result<()> {
    let count = line.read(scratch)?.unwrap_or(0);
    let bytes = scratch.get(..count).ok_or_else(|| anyhow!("a read is no longer than its buffer"))?;
    protocol.serve(line, poller, bytes)?;
    line.flush(poller)
}
