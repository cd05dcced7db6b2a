//! Sockets and epoll, for the load and the backend: one thread, no runtime, no allocation per request.
//!
//! A load generator must cost less than what it measures: direct calls have to come out at three times the rate of any
//! proxy, or the figures would show the generator. Hence epoll by hand, level-triggered, one read per event.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Events that one wait returns at most.
const EVENTS: usize = 256;
/// A proxy that takes longer than this for a connection is not at work.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What is ready.
pub(crate) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub(crate) fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?;
        Ok(Self { epoll, events: vec![EpollEvent::empty(); EVENTS] })
    }

    /// Reports `what` as `key` whenever it can be read.
    pub(crate) fn add(&self, what: impl AsFd, key: usize) -> Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, key as u64);
        self.epoll.add(what, event).context("watching a socket")
    }

    /// Waits for events until `limit` has passed, to the millisecond; returns how many there are.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<usize> {
        let limit = EpollTimeout::try_from(limit).unwrap_or(EpollTimeout::MAX);
        match self.epoll.wait(&mut self.events, limit) {
            Ok(ready) => Ok(ready),
            Err(nix::errno::Errno::EINTR) => Ok(0),
            Err(error) => Err(error).context("waiting for sockets"),
        }
    }

    /// The key of one of the events of the last [`wait`](Self::wait).
    #[expect(clippy::cast_possible_truncation, reason = "keys were usize when they were added")]
    pub(crate) fn key(&self, at: usize) -> usize {
        self.events[at].data() as usize
    }

    /// Waits until something happens; `None` when `end` has come.
    pub(crate) fn wait_until(&mut self, end: Instant) -> Result<Option<usize>> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // Rounded up: a wait of 0 ms would spin through the last millisecond.
        self.wait(left + Duration::from_micros(999)).map(Some)
    }
}

/// A connection that never blocks: what the socket does not take waits in a buffer.
pub(crate) struct Line {
    stream: TcpStream,
    key: usize,
    pub(crate) out: Vec<u8>,
    sent: usize,
    /// Whether the poller reports room to write.
    watched: bool,
}

impl Line {
    /// Connects and registers as `key`.
    pub(crate) fn connect(poller: &Poller, address: SocketAddr, key: usize) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)
            .with_context(|| format!("connecting to {address}"))?;
        Self::new(poller, stream, key)
    }

    /// Takes over a connection and registers it as `key`.
    pub(crate) fn new(poller: &Poller, stream: TcpStream, key: usize) -> Result<Self> {
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        stream.set_nonblocking(true).context("making a socket non-blocking")?;
        poller.add(&stream, key)?;
        Ok(Self { stream, key, out: Vec::new(), sent: 0, watched: false })
    }

    /// Reads once; `None`: nothing there. The peer's end is an error: nobody here expects it.
    pub(crate) fn read(&mut self, scratch: &mut [u8]) -> Result<Option<usize>> {
        match self.stream.read(scratch) {
            Ok(0) => bail!("the peer closed the connection"),
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("reading"),
        }
    }

    /// Sends what is queued in `out`, as far as the socket takes it.
    pub(crate) fn flush(&mut self, poller: &Poller) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.watch(poller, true),
                Err(error) => return Err(error).context("writing"),
            }
        }
        self.out.clear();
        self.sent = 0;
        self.watch(poller, false)
    }

    /// Sends bytes past `out`, which must be empty; returns how many the socket took.
    pub(crate) fn offer(&mut self, bytes: &[u8]) -> Result<usize> {
        match self.stream.write(bytes) {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error).context("writing"),
        }
    }

    /// Has the poller report room to write as well, or no longer.
    pub(crate) fn watch(&mut self, poller: &Poller, room: bool) -> Result<()> {
        if self.watched == room {
            return Ok(());
        }
        self.watched = room;
        let flags = if room { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        let mut event = EpollEvent::new(flags, self.key as u64);
        poller.epoll.modify(&self.stream, &mut event).context("watching a socket")
    }
}
