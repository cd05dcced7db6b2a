//! A socket and, above it, mutual TLS or nothing: what HTTP connections and relays read and write.
//!
//! Nothing here owns bytes while it is idle. Reads go into one scratch buffer per thread, and a connection keeps only what
//! is incomplete (the rest of a TLS record); what was written and not taken by the socket is kept until it goes. HTTP collects
//! in [`Wire::out`] what a turn of the run queue produced, so that it leaves in one batch of records and one write
//! ([`Turn`](super::turn::Turn)); relays write at once.

use std::{
    cell::{Cell, RefCell, RefMut},
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{buffers, exchanges::Key, session::Session};

/// Bytes read from a socket at once: the kernel's receive buffer under load, and four TLS records.
const READ_BYTES: usize = 64 * 1024;

/// A partial record that waits in front of a read: 16 KiB of text and what TLS adds (RFC 8446, 5.2).
const RECORD_BYTES: usize = 16 * 1024 + 256 + 5;

/// Bytes that may wait to be sent before nobody may add a body to them. Two reads' worth: one on its way to the
/// socket, one that comes meanwhile.
pub(crate) const HIGH_WATER: usize = 2 * READ_BYTES;

/// Bytes that may wait to be sent before nothing more is read from the same peer. Only heads and answers to control
/// frames get beyond [`HIGH_WATER`]: a peer that provokes these and does not read them waits for itself.
const TOO_MUCH: usize = 1024 * 1024;

/// A piece of a body that is sent from where it lies: a system call of its own, which costs as much as to copy 20 KiB and more.
const MIN_THROUGH: usize = 32 * 1024;

/// What opening and sealing may keep of their scratch buffers: all of one read, and what waits for one flush.
const MAX_SCRATCH: usize = HIGH_WATER + READ_BYTES;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What a thread reads into.
struct Scratch {
    raw: Box<[u8]>,
    plain: Vec<u8>,
}

impl Scratch {
    fn new() -> Self {
        Self { raw: vec![0; READ_BYTES + RECORD_BYTES].into(), plain: Vec::new() }
    }
}

/// A connection.
pub(crate) struct Wire {
    tcp: RefCell<TcpStream>,
    tls: Option<RefCell<Tls>>,
    /// Read before this was made: given out first.
    early: RefCell<Vec<u8>>,
    /// Text that waits for the end of the turn.
    out: RefCell<Vec<u8>>,
    /// Bytes in the socket's own form that it did not take.
    unsent: RefCell<Unsent>,
    /// In the list of what the end of this turn flushes.
    pub(super) dirty: Cell<bool>,
    /// Of the task that reads; it also waits for room in the socket.
    waker: RefCell<Option<Waker>>,
    /// Exchanges that wait until there is room for more of a body.
    waiting: RefCell<VecDeque<Key>>,
    /// Nothing more will be written; close_notify and the end of the stream follow the last byte.
    finishing: Cell<bool>,
    finished: Cell<bool>,
    /// The socket refuses what is written.
    broken: Cell<Option<io::ErrorKind>>,
}

struct Tls {
    session: Session,
    /// The beginning of a record.
    records: Vec<u8>,
    /// The peer said `close_notify`.
    closed: bool,
}

#[derive(Default)]
struct Unsent {
    bytes: Vec<u8>,
    at: usize,
}

impl Unsent {
    fn len(&self) -> usize {
        self.bytes.len() - self.at
    }
}

impl Wire {
    /// In clear; `early` was read from the socket already.
    pub(crate) fn plain(tcp: TcpStream, early: Vec<u8>) -> Self {
        Self::new(tcp, None, early)
    }

    /// After a handshake.
    pub(crate) fn tls(tcp: TcpStream, established: super::session::Established) -> Self {
        let super::session::Established { session, plain, records, closed } = established;
        let tls = Tls { session, records, closed };
        Self::new(tcp, Some(RefCell::new(tls)), plain)
    }

    fn new(tcp: TcpStream, tls: Option<RefCell<Tls>>, early: Vec<u8>) -> Self {
        Self {
            tcp: RefCell::new(tcp),
            tls,
            early: RefCell::new(early),
            out: RefCell::default(),
            unsent: RefCell::default(),
            dirty: Cell::new(false),
            waker: RefCell::default(),
            waiting: RefCell::default(),
            finishing: Cell::new(false),
            finished: Cell::new(false),
            broken: Cell::new(None),
        }
    }

    /// Makes closing send a reset.
    pub(crate) fn reset_on_close(&self) {
        reset_on_close(&self.tcp.borrow());
    }

    /// Reads once and hands `take` what came, in clear: empty at the end of the stream. A stream under TLS that
    /// ends without saying so is an error.
    ///
    /// `take` may write to any connection, and read from none.
    pub(crate) fn poll_read<T>(
        &self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&[u8]) -> T,
    ) -> Poll<io::Result<T>> {
        let early = self.early.take();
        if !early.is_empty() {
            return Poll::Ready(Ok(take(&early)));
        }
        SCRATCH.with_borrow_mut(|Scratch { raw, plain }| {
            let Some(tls) = &self.tls else {
                let read = ready!(self.poll_read_raw(cx, &mut raw[..READ_BYTES]))?;
                return Poll::Ready(Ok(take(&raw[..read])));
            };
            loop {
                let mut tls = tls.borrow_mut();
                if tls.closed {
                    return Poll::Ready(Ok(take(&[])));
                }
                let begun = tls.records.len();
                // What a handshake left behind may hold whole records: these are looked at before the socket is.
                let fresh = begun > 0 && tls.fresh();
                if begun + READ_BYTES > raw.len() {
                    // More than one record waits: only after a handshake, and bounded by it.
                    let mut records = std::mem::take(&mut tls.records);
                    let consumed = self.open(&mut tls, &mut records, plain)?;
                    records.drain(..consumed);
                    tls.records = records;
                } else {
                    raw[..begun].copy_from_slice(&tls.records);
                    let mut filled = begun;
                    if !fresh {
                        let read = ready!(self.poll_read_raw(cx, &mut raw[begun..begun + READ_BYTES]))?;
                        if read == 0 {
                            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                        }
                        filled += read;
                    }
                    let consumed = self.open(&mut tls, &mut raw[..filled], plain)?;
                    tls.keep(&raw[consumed..filled]);
                }
                let closed = tls.closed;
                drop(tls);
                if !plain.is_empty() || closed {
                    let result = take(plain);
                    if plain.capacity() > MAX_SCRATCH {
                        *plain = Vec::new();
                    }
                    return Poll::Ready(Ok(result));
                }
            }
        })
    }

    /// Waits for what comes next; empty at the end.
    pub(crate) async fn read(&self) -> io::Result<Vec<u8>> {
        std::future::poll_fn(|cx| self.poll_read(cx, <[u8]>::to_vec)).await
    }

    /// Drops what was not sent and ends the stream: nobody takes it.
    pub(super) fn give_up(&self) {
        self.broke(io::ErrorKind::TimedOut);
    }

    fn poll_read_raw(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(buffer);
        // `poll_read` and not `try_read`: after a short read it knows that the socket is empty.
        ready!(Pin::new(&mut *self.tcp.borrow_mut()).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Opens the whole records in `records`; their text is in `plain`. Returns how many bytes they were.
    fn open(&self, tls: &mut Tls, records: &mut [u8], plain: &mut Vec<u8>) -> io::Result<usize> {
        plain.clear();
        let mut answer = Vec::new();
        let opened = tls.session.open(records, plain, &mut answer);
        if !answer.is_empty() {
            self.send_raw(&answer);
        }
        let opened = opened.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        tls.closed |= opened.closed;
        Ok(opened.consumed)
    }

    /// The buffer whose content leaves at the end of the turn. Whoever adds to it has the turn flush it.
    pub(super) fn out(&self) -> RefMut<'_, Vec<u8>> {
        let mut out = self.out.borrow_mut();
        if out.capacity() == 0 {
            *out = buffers::take(0);
        }
        out
    }

    /// Sends [`out`](Self::out). What the socket does not take waits for room, which the reading task waits for.
    pub(super) fn flush(&self) {
        let out = self.out.take();
        if !out.is_empty() {
            self.write(&out);
        }
        buffers::give(out);
        self.after_sending();
    }

    /// Sends text now, as far as the socket takes it; the rest waits for [`poll_sent`](Self::poll_sent).
    pub(crate) fn write(&self, text: &[u8]) {
        if self.broken.get().is_some() || text.is_empty() {
            return;
        }
        let Some(tls) = &self.tls else { return self.send_raw(text) };
        SEALED.with_borrow_mut(|sealed| {
            sealed.clear();
            match tls.borrow_mut().session.seal(text, sealed) {
                Ok(()) => self.send_raw(sealed),
                Err(error) => {
                    tracing::debug!(%error, "cannot encrypt");
                    self.broken.set(Some(io::ErrorKind::InvalidData));
                }
            }
            if sealed.capacity() > MAX_SCRATCH {
                *sealed = Vec::new();
            }
        });
    }

    /// Sends what was collected and `body` behind it now, the body from where it lies. Returns false, and does nothing, where
    /// that would not spare a copy: under TLS, behind bytes that wait, or for little.
    pub(super) fn write_through(&self, body: &[u8]) -> bool {
        let waits = self.unsent.borrow().len() > 0;
        if self.tls.is_some() || waits || body.len() < MIN_THROUGH || self.is_broken() {
            return false;
        }
        let head = self.out.take();
        let written = self.tcp.borrow().try_write_vectored(&[IoSlice::new(&head), IoSlice::new(body)]);
        let count = match written {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                self.broke(error.kind());
                return true;
            }
        };
        self.send_raw(head.get(count..).unwrap_or_default());
        self.send_raw(&body[count.saturating_sub(head.len())..]);
        buffers::give(head);
        true
    }

    /// Sends bytes in the socket's own form.
    fn send_raw(&self, mut bytes: &[u8]) {
        let mut unsent = self.unsent.borrow_mut();
        if unsent.len() == 0 {
            while !bytes.is_empty() {
                match self.tcp.borrow().try_write(bytes) {
                    Ok(0) => return self.broke(io::ErrorKind::WriteZero),
                    Ok(count) => bytes = &bytes[count..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return self.broke(error.kind()),
                }
            }
        }
        if !bytes.is_empty() {
            if unsent.bytes.capacity() == 0 {
                unsent.bytes = buffers::take(bytes.len());
            }
            unsent.bytes.extend_from_slice(bytes);
            drop(unsent);
            self.wake();
        }
    }

    fn broke(&self, kind: io::ErrorKind) {
        self.broken.set(Some(kind));
        self.wake();
    }

    /// Waits until everything that was written has gone to the socket.
    pub(crate) fn poll_sent(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(kind) = self.broken.get() {
            return Poll::Ready(Err(kind.into()));
        }
        let mut unsent = self.unsent.borrow_mut();
        while unsent.len() > 0 {
            let tcp = self.tcp.borrow();
            ready!(tcp.poll_write_ready(cx))?;
            match tcp.try_write(&unsent.bytes[unsent.at..]) {
                Ok(0) => {
                    self.broken.set(Some(io::ErrorKind::WriteZero));
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                Ok(count) => unsent.at += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.broken.set(Some(error.kind()));
                    return Poll::Ready(Err(error));
                }
            }
        }
        buffers::give(std::mem::take(&mut *unsent).bytes);
        drop(unsent);
        self.after_sending();
        Poll::Ready(Ok(()))
    }

    fn after_sending(&self) {
        if self.finishing.get()
            && !self.finished.get()
            && self.out.borrow().is_empty()
            && self.unsent.borrow().len() == 0
        {
            self.finished.set(true);
            // Of a TCP stream it never waits; it fails where the peer has gone before.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = Pin::new(&mut *self.tcp.borrow_mut()).poll_shutdown(&mut cx);
        }
    }

    /// Ends the stream after what was written so far.
    pub(crate) fn finish(&self) {
        if self.finishing.replace(true) {
            return;
        }
        self.flush_tls_end();
        self.after_sending();
    }

    fn flush_tls_end(&self) {
        let Some(tls) = &self.tls else { return };
        let out = self.out.take();
        self.write(&out);
        let mut notify = Vec::new();
        tls.borrow_mut().session.close(&mut notify);
        if self.broken.get().is_none() {
            self.send_raw(&notify);
        }
    }

    /// Whether everything was sent and the stream ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.get() || (self.finishing.get() && self.broken.get().is_some())
    }

    /// Whether [`finish`](Self::finish) was called.
    pub(crate) fn is_finishing(&self) -> bool {
        self.finishing.get()
    }

    /// Whether writing has failed.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.get().is_some()
    }

    /// Bytes that wait to be sent.
    pub(crate) fn queued(&self) -> usize {
        self.out.borrow().len() + self.unsent.borrow().len()
    }

    /// Room for a body, in bytes. None is left where the peer reads slower than we write.
    pub(super) fn room(&self) -> usize {
        if self.broken.get().is_some() {
            // What is written goes nowhere: who reads will find the end.
            return usize::MAX;
        }
        if self.queued() >= HIGH_WATER && self.unsent.borrow().len() == 0 {
            // The socket has not refused anything: there is nothing to wait for, and the batch is large enough.
            self.flush();
        }
        HIGH_WATER.saturating_sub(self.queued())
    }

    /// Whether nothing more is to be read before something was sent.
    pub(super) fn is_choked(&self) -> bool {
        self.queued() >= TOO_MUCH
    }

    /// Has an exchange told when there is room again.
    pub(super) fn wait_for_room(&self, key: Key) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.contains(&key) {
            waiting.push_back(key);
        }
        drop(waiting);
        self.wake();
    }

    /// Those that waited, if there is room again.
    pub(super) fn take_waiting(&self) -> Option<VecDeque<Key>> {
        if self.waiting.borrow().is_empty() || self.room() < HIGH_WATER / 2 {
            return None;
        }
        Some(self.waiting.take())
    }

    /// Remembers the task that reads.
    pub(super) fn set_waker(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    /// Runs the task that reads.
    pub(super) fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

impl Tls {
    /// Whether [`records`](Self::records) came with the handshake and have not been looked at.
    fn fresh(&self) -> bool {
        // A record that was looked at and is incomplete stays incomplete until more comes.
        let [_, _, _, high, low, ..] = self.records[..] else { return false };
        self.records.len() >= 5 + usize::from(u16::from_be_bytes([high, low]))
    }

    fn keep(&mut self, rest: &[u8]) {
        if rest.is_empty() {
            self.records = Vec::new();
        } else {
            self.records.clear();
            self.records.extend_from_slice(rest);
        }
    }
}

/// Makes closing send a reset. It can only fail on a socket that is gone already.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    let _ = outrigger_intercept::sockets::reset_on_close(stream);
}
