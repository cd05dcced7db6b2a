//! What an HTTP/1.x connection sends, how its messages are framed, and what follows when one has been sent.
//!
//! Everything is collected in the wire and leaves at the end of the turn.

use std::time::Instant;

use outrigger_http::{
    fields::Fields,
    h1::{Asked, Framing, write_chunk, write_last_chunk, write_request, write_response},
    head::{RequestHead, ResponseHead},
};

use super::{H1, Reading};
use crate::data::{Worker, exchanges::Key};

impl H1 {
    /// Sends a request. On the application's side.
    pub(in crate::data) fn send_request(
        &self,
        worker: &Worker,
        key: Key,
        head: &RequestHead,
        framing: Framing,
        asked: Asked,
    ) {
        self.key.set(Some(key));
        self.asked.set(asked);
        self.keep.set(!asked.connect && !asked.upgrade);
        self.reading.set(Reading::Head);
        write_request(head, framing, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.sending.set(Some(framing));
        if framing.is_empty() {
            self.sending.set(None);
        }
    }

    /// Bytes will follow the request, whatever its framing said: a switch was accepted.
    pub(in crate::data) fn switch_sending(&self) {
        self.sending.set(Some(Framing::Tunnel));
    }

    /// What comes from the client is bytes from now on. On the client's side.
    pub(in crate::data) fn switch_reading(&self) {
        self.decoder.borrow_mut().switch();
        self.keep.set(false);
        self.reading.set(Reading::Body);
        self.wire.wake();
    }

    /// Sends an interim response.
    pub(in crate::data) fn send_interim(&self, worker: &Worker, head: &ResponseHead) {
        write_response(head, Framing::Empty, &mut self.wire.out());
        worker.turn.flush(&self.wire);
    }

    /// Sends the head of a response. Returns whether the connection is to be kept after it.
    pub(in crate::data) fn send_response(&self, worker: &Worker, head: &ResponseHead, framing: Framing) {
        write_response(head, framing, &mut self.wire.out());
        worker.turn.flush(&self.wire);
        self.sending.set(Some(framing));
        if framing.is_empty() {
            self.message_sent(worker);
        }
    }

    /// Whether the client's connection serves more requests, as far as is known now.
    pub(in crate::data) fn keeps(&self) -> bool {
        self.keep.get()
    }

    /// The response will say that the connection ends.
    pub(in crate::data) fn close_after(&self) {
        self.keep.set(false);
    }

    pub(in crate::data) fn send(&self, worker: &Worker, data: &[u8], end: bool) -> usize {
        let Some(framing) = self.sending.get() else { return data.len() };
        if !data.is_empty() {
            match framing {
                Framing::Chunked => write_chunk(data, &mut self.wire.out()),
                Framing::Length(left) => {
                    // The other side's codec holds its peer to the length that it announced.
                    let fits = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.send_bytes(&data[..fits]);
                    self.sending.set(Some(Framing::Length(left - fits as u64)));
                }
                Framing::UntilClose | Framing::Tunnel => self.send_bytes(data),
                Framing::Empty => {}
            }
        }
        if end {
            if framing == Framing::Chunked {
                write_last_chunk(&Fields::default(), &mut self.wire.out());
            }
            self.message_sent(worker);
        }
        worker.turn.flush(&self.wire);
        data.len()
    }

    fn send_bytes(&self, data: &[u8]) {
        if !self.wire.write_through(data) {
            self.wire.out().extend_from_slice(data);
        }
    }

    pub(in crate::data) fn send_trailers(&self, worker: &Worker, trailers: &Fields) {
        if self.sending.get() == Some(Framing::Chunked) {
            write_last_chunk(trailers, &mut self.wire.out());
        }
        // Another framing has no place for trailers (RFC 9110, 6.5.1: they may be dropped).
        self.message_sent(worker);
        worker.turn.flush(&self.wire);
    }

    /// A message was sent to its end.
    fn message_sent(&self, worker: &Worker) {
        let framing = self.sending.take();
        let cut_short = matches!(framing, Some(Framing::Length(left)) if left > 0);
        if !self.is_server() {
            if framing == Some(Framing::Tunnel) {
                self.wire.finish();
            }
            return;
        }
        if framing == Some(Framing::Tunnel) {
            // The client may still speak; the exchange ends the connection when both have ended.
            return self.wire.finish();
        }
        self.key.set(None);
        self.served.set(self.served.get().saturating_add(1));
        self.since.set(Instant::now());
        let whole = self.reading.get() == Reading::Whole;
        // A client may end its half behind requests that wait for their turn.
        let more_may_come = !self.read_ended.get() || !self.carry.is_empty();
        if whole && self.keep.get() && more_may_come && !cut_short {
            self.reading.set(Reading::Head);
            self.begun.set(false);
            if !self.carry.is_empty() {
                self.wire.wake();
            }
            return;
        }
        if cut_short {
            self.wire.reset_on_close();
        }
        self.reading.set(Reading::Over);
        worker.turn.flush(&self.wire);
        self.wire.finish();
        self.wire.wake();
    }
}
