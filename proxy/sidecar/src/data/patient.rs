//! A connection to an application that is read to its end even when it takes no more bytes.
//!
//! An application may answer before it has read the request, 413 say, and close. What is written after that fails;
//! hyper would give up there, with the answer unread in the socket. So a write that fails waits instead, until reading
//! has come to an end as well.
//!
//! And it takes turns: an application that sends without end (interim responses, which hyper skips in a loop) must not
//! keep the thread from everybody else's connections.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::Stream;

/// Bytes that are read before others get their turn: some hundred microseconds of parsing.
const TURN: usize = 128 * 1024;

pub(crate) struct Patient {
    stream: Stream,
    /// Bytes read in this turn.
    taken: usize,
    /// A write failed so.
    failed: Option<io::ErrorKind>,
    writer: Option<Waker>,
    read_ended: bool,
}

impl Patient {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, taken: 0, failed: None, writer: None, read_ended: false }
    }

    fn written<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match result {
            Poll::Ready(Err(error)) if !self.read_ended => {
                self.failed = Some(error.kind());
                self.writer = Some(cx.waker().clone());
                Poll::Pending
            }
            result => result,
        }
    }

    /// What a write meets after one has failed; `None`: none has.
    fn after_failure<T>(&mut self, cx: &mut Context<'_>) -> Option<Poll<io::Result<T>>> {
        let failed = self.failed?;
        if self.read_ended {
            return Some(Poll::Ready(Err(failed.into())));
        }
        self.writer = Some(cx.waker().clone());
        Some(Poll::Pending)
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.taken >= TURN {
            self.taken = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        match result {
            Poll::Pending => self.taken = 0,
            Poll::Ready(_) => self.taken += buf.filled().len() - before,
        }
        let ended = match &result {
            Poll::Ready(Ok(())) => buf.filled().len() == before && buf.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.read_ended = true;
            if let Some(writer) = self.writer.take() {
                writer.wake();
            }
        }
        result
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(result) = self.after_failure(cx) {
            return result;
        }
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(result) = self.after_failure(cx) {
            return result;
        }
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(result) = self.after_failure(cx) {
            return result;
        }
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::data::stream::Rewind;

    #[tokio::test]
    async fn who_sends_without_end_waits_for_its_turn() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let waiting = vec![b'x'; 3 * TURN];
        let mut stream = Patient::new(Stream::Plain(Rewind::new(client, waiting)));
        let mut buffer = vec![0; 4096];
        let (mut read, mut turns) = (0, 1);
        while read < 3 * TURN {
            let got = poll_fn(|cx| {
                let mut buffer = ReadBuf::new(&mut buffer);
                match Pin::new(&mut stream).poll_read(cx, &mut buffer) {
                    Poll::Ready(result) => Poll::Ready(result.map(|()| Some(buffer.filled().len()))),
                    Poll::Pending => Poll::Ready(Ok(None)),
                }
            });
            match got.await.unwrap() {
                Some(bytes) => read += bytes,
                None => turns += 1,
            }
        }
        assert_eq!(turns, 3);
    }
}
