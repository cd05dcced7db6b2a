//! Bytes from one side to the other, both ways, until both have ended.
//!
//! Each direction ends for itself (half-close): an end of file is passed on as a shutdown of the other side's sending
//! half, and the opposite direction goes on. An error is not an end: it is passed on as a reset, because a peer that
//! reads an orderly end believes that it has everything.
//!
//! Reads go into one scratch buffer per thread; a connection owns memory only while its reader is slower than its
//! writer, and then at most one scratch buffer's worth in each direction. That is also the back-pressure: nothing more is read
//! before it has gone.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep_until},
};

/// Bytes read at once: the kernel's receive buffer under load, and four TLS records.
const SCRATCH_BYTES: usize = 64 * 1024;

/// Stands for "no time-out": longer than any process lives.
const NEVER: Duration = Duration::from_hours(24 * 365);

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// How a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Both directions ended in order.
    Closed,
    /// One side failed: the caller resets both.
    Broken,
    /// No byte went either way for the idle time-out.
    Idle,
}

/// What went, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Relayed {
    pub(crate) forth: u64,
    pub(crate) back: u64,
}

/// Relays between `a` and `b`. `idle`: `None` waits for ever.
pub(crate) async fn relay<A, B>(a: &mut A, b: &mut B, idle: Option<Duration>) -> (Ended, Relayed)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let idle = idle.unwrap_or(NEVER);
    let mut forth = Half::default();
    let mut back = Half::default();
    let mut moved = 0;
    let mut timer = pin!(sleep_until(Instant::now() + idle));
    let mut last = Instant::now();
    let ended = poll_fn(|cx| {
        let one = forth.poll(cx, a, b);
        let two = back.poll(cx, b, a);
        match (one, two) {
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => return Poll::Ready(Ended::Broken),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ended::Closed),
            _ => {}
        }
        // The timer is set anew only when it fires: once per idle period, not once per byte.
        if forth.total + back.total != moved {
            moved = forth.total + back.total;
            last = Instant::now();
        }
        while timer.as_mut().poll(cx).is_ready() {
            if last + idle <= Instant::now() {
                return Poll::Ready(Ended::Idle);
            }
            timer.as_mut().reset(last + idle);
        }
        Poll::Pending
    })
    .await;
    (ended, Relayed { forth: forth.total, back: back.total })
}

/// One direction.
#[derive(Default)]
struct Half {
    /// Read and not yet written.
    pending: Vec<u8>,
    written: usize,
    unflushed: bool,
    eof: bool,
    done: bool,
    total: u64,
}

impl Half {
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, reader: &mut R, writer: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            while self.written < self.pending.len() {
                let count = ready!(Pin::new(&mut *writer).poll_write(cx, &self.pending[self.written..]))?;
                self.wrote(count)?;
                self.written += count;
            }
            self.pending = Vec::new();
            self.written = 0;
            if self.eof {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx))?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let read = SCRATCH.with_borrow_mut(|scratch| self.transfer(cx, reader, writer, scratch));
            if read.is_pending() && self.unflushed {
                ready!(Pin::new(&mut *writer).poll_flush(cx))?;
                self.unflushed = false;
            }
            ready!(read)?;
        }
    }

    /// Reads once and writes as much of it as goes; the rest stays pending.
    fn transfer<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        scratch: &mut [u8],
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(reader).poll_read(cx, &mut buffer))?;
        let read = buffer.filled();
        if read.is_empty() {
            self.eof = true;
            return Poll::Ready(Ok(()));
        }
        let mut written = 0;
        while written < read.len() {
            match Pin::new(&mut *writer).poll_write(cx, &read[written..]) {
                Poll::Ready(count) => {
                    let count = count?;
                    self.wrote(count)?;
                    written += count;
                }
                Poll::Pending => {
                    self.pending = read[written..].to_vec();
                    break;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, count: usize) -> io::Result<()> {
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.unflushed = true;
        self.total += count as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_direction_ends_for_itself() {
        let (mut client, mut a) = duplex(8);
        let (mut b, mut server) = duplex(8);
        let asking = async {
            client.write_all(b"question, longer than the pipe").await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let answering = async {
            let mut question = Vec::new();
            server.read_to_end(&mut question).await.unwrap();
            server.write_all(b"answer, after the end of the question").await.unwrap();
            server.shutdown().await.unwrap();
            question
        };
        let idle = Some(Duration::from_secs(5));
        let ((ended, relayed), answer, question) =
            tokio::join!(relay(&mut a, &mut b, idle), asking, answering);
        assert_eq!(ended, Ended::Closed);
        assert_eq!(question, b"question, longer than the pipe");
        assert_eq!(answer, b"answer, after the end of the question");
        assert_eq!((relayed.forth, relayed.back), (30, 37));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_after_the_idle_timeout_counted_from_the_last_byte() {
        let (mut client, mut a) = duplex(64);
        let (mut b, mut server) = duplex(64);
        let start = Instant::now();
        let talk = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            client.write_all(b"x").await.unwrap();
            server.read_u8().await.unwrap()
        };
        let ((ended, _), _) = tokio::join!(relay(&mut a, &mut b, Some(Duration::from_secs(5))), talk);
        assert_eq!(ended, Ended::Idle);
        assert_eq!(start.elapsed(), Duration::from_secs(8));
    }
}
