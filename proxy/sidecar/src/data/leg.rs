//! One side of an exchange: a stream of an HTTP/2 connection, or an HTTP/1.x connection for as long as it serves it.

use std::rc::Rc;

use outrigger_http::{
    fields::Fields,
    h2::{Code, StreamId},
};

use super::{Worker, exchanges::Key, h1::H1, h2::H2};

/// Bytes that one exchange may add to a connection before others have their turn.
const QUANTUM: usize = 64 * 1024;

/// Where the messages of an exchange come from and go to. Dropping it does nothing: an exchange says how it ends.
#[derive(Clone)]
pub(crate) enum Leg {
    H1(Rc<H1>),
    H2(Rc<H2>, StreamId),
}

impl Leg {
    /// Bytes of a body that may be sent now. Where there are none, the exchange is told when there are.
    pub(super) fn room(&self, key: Key) -> usize {
        let wire = match self {
            Self::H1(connection) => &connection.wire,
            Self::H2(connection, _) => &connection.wire,
        };
        let room = wire.room();
        if room == 0 {
            wire.wait_for_room(key);
            return 0;
        }
        let room = room.min(QUANTUM);
        match self {
            Self::H1(_) => room,
            Self::H2(connection, id) => room.min(connection.capacity(*id)),
        }
    }

    /// Sends what is within [`room`](Self::room); `end`: and nothing follows. Returns how many bytes were taken; the end
    /// was only if all of them were.
    pub(super) fn send(&self, worker: &Worker, data: &[u8], end: bool) -> usize {
        match self {
            Self::H1(connection) => connection.send(worker, data, end),
            Self::H2(connection, id) => connection.send(worker, *id, data, end),
        }
    }

    /// Ends the message, with trailers.
    pub(super) fn send_trailers(&self, worker: &Worker, trailers: &Fields) {
        match self {
            Self::H1(connection) => connection.send_trailers(worker, trailers),
            Self::H2(connection, id) => connection.send_trailers(worker, *id, trailers),
        }
    }

    /// Says that bytes which came from here have gone: as many more may come.
    pub(super) fn release(&self, worker: &Worker, bytes: usize) {
        if let Self::H2(connection, id) = self
            && bytes > 0
        {
            connection.release(worker, *id, bytes);
        }
    }

    /// Has another exchange told of what comes from here.
    pub(super) fn belongs_to(&self, key: Key) {
        match self {
            Self::H1(connection) => connection.belongs_to(key),
            Self::H2(connection, id) => connection.belongs_to(*id, key),
        }
    }

    /// Says that more may come, where nothing else does.
    pub(super) fn resume(&self) {
        if let Self::H1(connection) = self {
            connection.resume();
        }
    }

    /// Ends it in the middle, so that its peer cannot take what it has for all.
    pub(super) fn abort(&self, worker: &Worker, code: Code) {
        match self {
            Self::H1(connection) => connection.abort(),
            Self::H2(connection, id) => connection.reset(worker, *id, code),
        }
    }
}
