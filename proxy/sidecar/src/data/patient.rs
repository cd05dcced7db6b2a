//! A connection to an application that is read to its end even when it takes no more bytes.
//!
//! An application may answer before it has read the request, 413 say, and close. What is written after that fails;
//! hyper would give up there, with the answer unread in the socket. So a write that fails waits instead, until reading
//! has come to an end as well.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::Stream;

pub(crate) struct Patient {
    stream: Stream,
    /// A write failed so.
    failed: Option<io::ErrorKind>,
    writer: Option<Waker>,
    read_ended: bool,
}

impl Patient {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, failed: None, writer: None, read_ended: false }
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
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
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
