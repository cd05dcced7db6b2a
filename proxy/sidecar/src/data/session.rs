//! A TLS session that does no I/O and owns no bytes, and the handshakes that make one.
//!
//! Buffered TLS holds what it has read and what it will write, for every connection and for as long as it lives. Here
//! the caller brings both buffers: one for reads that all connections of a thread share, and one for writes that is
//! only there while something is written. An idle connection is then its keys and nothing else, all records of a read
//! are opened in one go, and what one turn of the run queue has to say is sealed in one go. rustls offers that as its
//! unbuffered API; this module turns its state machine into two plain calls, [`Session::open`] and [`Session::seal`].
//!
//! Two things of TLS are left out on purpose. Sessions are not resumed: the configurations neither ask for tickets nor
//! give any, because a resumed session would carry an identity past the end of its certificate or of its root, and to
//! bind tickets to both saves little where one connection between two sidecars carries all their requests. And there is
//! no early data, because it can be replayed.
//!
//! One thing is stricter than RFC 8446: after the handshake, a handshake message that spans records is refused. rustls
//! would leave its first part in the caller's buffer and then demand that buffer for every call, sealing included. No
//! message that exists after the handshake is long enough to need it.

use std::{cell::Cell, io, sync::Arc};

use rustls::{
    ClientConfig, CommonState, Error, ServerConfig,
    client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus},
};
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::{Semaphore, SemaphorePermit},
    task::yield_now,
};

#[cfg(test)]
mod tests;

/// Bytes of a record's header: type, version, length (RFC 8446, section 5.1).
const HEADER: usize = 5;

/// Plaintext bytes in a record, at most (RFC 8446, section 5.1).
const MAX_PLAINTEXT: usize = 16 * 1024;

/// Bytes by which a sealed record is longer than its plaintext: its header, the content type inside, and the tag, which
/// has the same length in all suites of TLS 1.3.
const OVERHEAD: usize = HEADER + 1 + 16;

/// Bytes that a record may claim to have, from which on rustls refuses its header without waiting for the rest.
const TOO_LONG: usize = 16 * 1024 + 2048;

/// Bytes that are read until a handshake is complete, at most: many times what two chains of certificates need, and
/// what bounds a stranger's use of our memory.
const MAX_HANDSHAKE: usize = 64 * 1024;

/// Bytes of one read during a handshake: a whole flight in most cases.
const READ: usize = 4 * 1024;

/// Handshakes that wait for their first turn, at most. A turn takes less than a millisecond, so that the last of them
/// waits for less than the time after which its peer gives up.
const MAX_WAITING: usize = 256;

/// An established TLS 1.3 connection: records in, bytes out. After an error it is of no use: every later call fails, or
/// does nothing.
pub(crate) struct Session {
    connection: Connection,
    // rustls must not be called again after an error: what it kept of the caller's buffer is gone by then, and it
    // panics where it looks for it.
    failed: bool,
}

enum Connection {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// What [`Session::open`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opened {
    /// Bytes at the start of the records that are done with. The rest is the beginning of a record.
    pub(crate) consumed: usize,
    /// The peer has said `close_notify`, now or earlier: it sends nothing more. An end of the stream without it is a
    /// truncation.
    pub(crate) closed: bool,
}

impl Session {
    /// Opens all whole records at the start of `records`, in place, and appends their plaintext to `plain`. What the
    /// protocol wants said, alerts above all, is appended to `out`, also where the result is an error.
    ///
    /// A key update that asks for one of ours is answered by the next [`seal`](Self::seal), in front of its data: RFC
    /// 8446, section 4.6.3 wants no more, and a side that is silent has no keys to wear out.
    pub(crate) fn open(
        &mut self,
        records: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<Opened, Error> {
        // Once for all of them.
        plain.reserve(records.len());
        let mut consumed = 0;
        // One by one: rustls keeps a copy of the text of all records that it was shown until it has handed them out, and
        // memory that comes and goes by the hundred KiB is given back to the kernel each time.
        while !self.peer_has_closed()
            && let Some(len) = first_record(&records[consumed..])
        {
            let used = self.advance(&mut records[consumed..consumed + len], &Wish::Open, plain, out)?;
            consumed += used;
            if used < len && !self.peer_has_closed() {
                return Err(self.fragment());
            }
        }
        let closed = self.peer_has_closed();
        if closed {
            // Whatever follows is to be ignored (RFC 8446, section 6.1).
            consumed = records.len();
        }
        Ok(Opened { consumed, closed })
    }

    /// Seals `plain` into records of at most 16 KiB, appended to `out`.
    pub(crate) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        self.advance(&mut [], &Wish::Seal(plain), &mut Vec::new(), out).map(|_| ())
    }

    /// Says `close_notify`, once. Nothing may be sealed afterwards; the peer's records may still be opened.
    pub(crate) fn close(&mut self, out: &mut Vec<u8>) {
        // A session that has failed has said its alert already.
        let _ = self.advance(&mut [], &Wish::Close, &mut Vec::new(), out);
    }

    /// What the handshake agreed on: the protocol, the peer's certificates, the key exchange.
    pub(crate) fn state(&self) -> &CommonState {
        match &self.connection {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        }
    }

    fn new(connection: Connection) -> Self {
        Self { connection, failed: false }
    }

    /// Of an established session between two calls, this is the only reason why it does not want to read.
    fn peer_has_closed(&self) -> bool {
        !self.state().wants_read()
    }

    /// A whole record that was not consumed holds a part of a handshake message.
    fn fragment(&mut self) -> Error {
        self.failed = true;
        Error::General("the peer's handshake message spans records after the handshake".to_owned())
    }

    /// Drives rustls until it waits for more records. Returns the bytes of `records` that are done with.
    fn advance(
        &mut self,
        records: &mut [u8],
        wish: &Wish<'_>,
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<usize, Error> {
        if self.failed {
            return Err(Error::General("the session has failed before".to_owned()));
        }
        let mut consumed = 0;
        loop {
            let (done, next) = self.step(&mut records[consumed..], wish, plain, out);
            consumed += done;
            match next {
                Ok(Next::Again) => {}
                Ok(Next::Rest) => return Ok(consumed),
                Err(error) => {
                    self.failed = true;
                    // The alert. It is handed out before rustls looks at any record, so that none need to be shown.
                    while self.state().wants_write() && self.step(&mut [], wish, plain, out).1.is_ok() {}
                    return Err(error);
                }
            }
        }
    }

    fn step(
        &mut self,
        records: &mut [u8],
        wish: &Wish<'_>,
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> (usize, Result<Next, Error>) {
        match &mut self.connection {
            Connection::Client(tls) => handle(tls.process_tls_records(records), wish, plain, out),
            Connection::Server(tls) => handle(tls.process_tls_records(records), wish, plain, out),
        }
    }
}

/// What to do once rustls has nothing to say and nothing to hear.
enum Wish<'a> {
    Open,
    Seal(&'a [u8]),
    Close,
}

/// Whether rustls has to be asked again.
enum Next {
    Again,
    Rest,
}

/// Handles one state of rustls' machine. Returns the bytes of the records that are done with.
fn handle<Side>(
    status: UnbufferedStatus<'_, '_, Side>,
    wish: &Wish<'_>,
    plain: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> (usize, Result<Next, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let next = match state {
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    plain.extend_from_slice(record.payload);
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(Next::Again),
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            append(out, 0, |room| data.encode(room)).map(|()| Next::Again)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // It is in `out`: from here on the caller's to send.
            data.done();
            Ok(Next::Again)
        }
        Ok(ConnectionState::WriteTraffic(mut traffic)) => match *wish {
            Wish::Open => Ok(()),
            Wish::Seal(bytes) => append(out, sealed_len(bytes.len()), |room| traffic.encrypt(bytes, room)),
            Wish::Close => append(out, sealed_len(ALERT), |room| traffic.queue_close_notify(room)),
        }
        .map(|()| Next::Rest),
        // It is said once only; `peer_has_closed` knows it for ever.
        Ok(ConnectionState::PeerClosed) => Ok(Next::Again),
        Ok(ConnectionState::BlockedHandshake | ConnectionState::Closed) => match wish {
            Wish::Seal(_) => Err(Error::General("the session does not take data".to_owned())),
            Wish::Open | Wish::Close => Ok(Next::Rest),
        },
        // Early data, which no configuration allows.
        Ok(other) => Err(Error::General(format!("an unexpected state: {other:?}"))),
        Err(error) => Err(error),
    };
    (discard, next)
}

/// Bytes of an alert (RFC 8446, section 6).
const ALERT: usize = 2;

/// Bytes that `plain` bytes make as records.
fn sealed_len(plain: usize) -> usize {
    plain + plain.div_ceil(MAX_PLAINTEXT) * OVERHEAD
}

/// Why rustls did not write.
enum Short {
    Needs(usize),
    Failed(Error),
}

impl From<EncodeError> for Short {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::InsufficientSize(InsufficientSizeError { required_size }) => {
                Self::Needs(required_size)
            }
            EncodeError::AlreadyEncoded => Self::Failed(Error::General(error.to_string())),
        }
    }
}

impl From<EncryptError> for Short {
    fn from(error: EncryptError) -> Self {
        match error {
            EncryptError::InsufficientSize(InsufficientSizeError { required_size }) => {
                Self::Needs(required_size)
            }
            EncryptError::EncryptExhausted => Self::Failed(Error::EncryptError),
        }
    }
}

/// Lets `write` append to `out`. It is called a second time where `expected` bytes were not enough: for handshake
/// messages, whose length nobody knows before, and for data that goes behind a key update.
fn append<E: Into<Short>>(
    out: &mut Vec<u8>,
    expected: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
) -> Result<(), Error> {
    let start = out.len();
    out.resize(start + expected, 0);
    let mut written = write(&mut out[start..]).map_err(Into::into);
    if let Err(Short::Needs(needed)) = written {
        out.resize(start + needed, 0);
        written = write(&mut out[start..]).map_err(Into::into);
    }
    out.truncate(start + *written.as_ref().unwrap_or(&0));
    match written {
        Ok(_) => Ok(()),
        Err(Short::Needs(needed)) => Err(Error::General(format!("{needed} bytes are never enough"))),
        Err(Short::Failed(error)) => Err(error),
    }
}

/// The length of the first record, if there is enough for rustls to make something of it: a whole record, or a header that
/// it refuses, and then everything.
fn first_record(bytes: &[u8]) -> Option<usize> {
    let &[kind, major, _, high, low] = bytes.first_chunk::<HEADER>()?;
    let len = usize::from(u16::from_be_bytes([high, low]));
    // From change_cipher_spec to application_data.
    if !(20..=23).contains(&kind) || major != 3 || len >= TOO_LONG {
        return Some(bytes.len());
    }
    Some(HEADER + len).filter(|whole| bytes.len() >= *whole)
}

/// What a handshake leaves.
pub(crate) struct Established {
    pub(crate) session: Session,
    /// Data that came with the peer's last flight.
    pub(crate) plain: Vec<u8>,
    /// The beginning of a record behind it.
    pub(crate) records: Vec<u8>,
    /// The peer has said `close_notify` behind it.
    pub(crate) closed: bool,
}

/// Admits handshakes to a thread, so that a storm of them starves no request.
///
/// The public-key work between two waits of a handshake takes some tenths of a millisecond, a request some hundredths.
/// Were each handshake to work when its bytes are there, hundreds of them would follow one another while every request
/// waits. So there are turns: one handshake works, then the run queue goes round, then the next one works. A request
/// waits for one of them, or two, however many there are.
///
/// Turns are given in the order of arrival. Those that wait for their first one are counted, and refused beyond a bound.
/// A handshake that has begun is never refused: the work in it would be lost, and its number is bounded by the
/// connections of the thread.
pub(crate) struct Gate {
    turns: Semaphore,
    waiting: Cell<usize>,
    most: usize,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new(MAX_WAITING)
    }
}

impl Gate {
    /// `most`: handshakes that wait for their first turn.
    pub(crate) fn new(most: usize) -> Self {
        Self { turns: Semaphore::new(1), waiting: Cell::new(0), most }
    }

    /// A first turn.
    async fn admit(&self) -> io::Result<SemaphorePermit<'_>> {
        if self.waiting.get() >= self.most {
            let text = format!("{} handshakes are waiting on this thread already", self.most);
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
        }
        let _place = Place::take(&self.waiting);
        Ok(self.turn().await)
    }

    /// The turn ends when the permit is dropped, and must not be held while anything is awaited.
    async fn turn(&self) -> SemaphorePermit<'_> {
        let permit = self.turns.acquire().await.expect("the semaphore is never closed");
        // With the permit held, so that between the turn before and this one the run queue goes round.
        yield_now().await;
        permit
    }
}

/// A place among those that wait, given back also by a future that is dropped.
struct Place<'a>(&'a Cell<usize>);

impl<'a> Place<'a> {
    fn take(waiting: &'a Cell<usize>) -> Self {
        waiting.set(waiting.get() + 1);
        Self(waiting)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The client's side of a handshake. What it has to say is written when this returns; data may follow at once. As in all
/// of TLS 1.3 the server has not judged our certificate by then: its refusal comes as an alert out of
/// [`Session::open`].
///
/// Errors that TLS makes are `InvalidData` with a [`rustls::Error`] inside, and the peer has been sent its alert;
/// `ConnectionRefused` comes from the gate. There is no limit in time: that is the caller's, who also does well to box
/// the future, which is of no use after it.
pub(crate) async fn connect(
    tcp: &TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    gate: &Gate,
) -> io::Result<Established> {
    let turn = gate.admit().await?;
    // Makes the key shares.
    let connection = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    let session = Session::new(Connection::Client(Box::new(connection)));
    complete(tcp, session, Vec::new(), turn, gate).await
}

/// The server's side of a handshake. `first`: what was read of the stream before. Errors are those of [`connect`].
pub(crate) async fn accept(
    tcp: &TcpStream,
    config: Arc<ServerConfig>,
    first: Vec<u8>,
    gate: &Gate,
) -> io::Result<Established> {
    let mut records = first;
    while first_record(&records).is_none() {
        // One record is less than a handshake may be.
        read(tcp, &mut records, READ).await?;
    }
    let turn = gate.admit().await?;
    let connection = UnbufferedServerConnection::new(config).map_err(invalid)?;
    let session = Session::new(Connection::Server(Box::new(connection)));
    complete(tcp, session, records, turn, gate).await
}

/// Runs a handshake from its first turn to its end.
async fn complete<'a>(
    tcp: &TcpStream,
    mut session: Session,
    mut records: Vec<u8>,
    mut turn: SemaphorePermit<'a>,
    gate: &'a Gate,
) -> io::Result<Established> {
    let mut plain = Vec::new();
    let mut out = Vec::new();
    let mut left = MAX_HANDSHAKE.saturating_sub(records.len());
    loop {
        let advanced = session.advance(&mut records, &Wish::Open, &mut plain, &mut out);
        drop(turn);
        let written = write(tcp, &out).await;
        // The reason for an alert matters more than whether it could be sent.
        records.drain(..advanced.map_err(invalid)?);
        written?;
        out.clear();
        if !session.state().is_handshaking() {
            break;
        }
        // At least one more read, then as many as a record needs.
        loop {
            left -= read(tcp, &mut records, READ.min(left)).await?;
            if first_record(&records).is_some() {
                break;
            }
        }
        turn = gate.turn().await;
    }
    let closed = session.peer_has_closed();
    if closed {
        records.clear();
    }
    if first_record(&records).is_some() {
        return Err(invalid(session.fragment()));
    }
    records.shrink_to_fit();
    Ok(Established { session, plain, records, closed })
}

/// As tokio-rustls has it, and [`outrigger_certs::refusal`] reads it.
fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Appends what one read brings, `most` bytes.
async fn read(tcp: &TcpStream, bytes: &mut Vec<u8>, most: usize) -> io::Result<usize> {
    if most == 0 {
        let text = format!("the peer's handshake is longer than {MAX_HANDSHAKE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let start = bytes.len();
    loop {
        tcp.readable().await?;
        bytes.resize(start + most, 0);
        let result = tcp.try_read(&mut bytes[start..]);
        bytes.truncate(start + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

async fn write(tcp: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        tcp.writable().await?;
        match tcp.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
