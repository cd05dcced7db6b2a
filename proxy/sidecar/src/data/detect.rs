//! The I/O of detection: reading first bytes without losing any.

use std::{io, time::Duration};

use outrigger_core::{
    detect::{Detection, detect},
    speaks_first::INCOMPLETE_TIMEOUT,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::config::Timeouts;

/// Room for a first read: a request line, or a `ClientHello` with a post-quantum key share.
const FIRST_BYTES: usize = 2048;

/// What came first on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    /// Bytes, and what they are.
    Bytes(Detection),
    /// The end of the stream: the client has nothing to say, and may yet listen.
    End,
    /// Nothing, for as long as was waited.
    Silence,
}

impl First {
    /// A word for metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bytes(Detection::Http1) => "http1",
            Self::Bytes(Detection::Http2) => "http2",
            Self::Bytes(Detection::Tls) => "tls",
            Self::Bytes(Detection::Opaque | Detection::NeedMore) => "opaque",
            Self::End => "end",
            Self::Silence => "silence",
        }
    }
}

/// Waits up to `patience` for a first byte, then reads until it is decided what the bytes are. They stay in `buffer`.
/// Losing the future loses no bytes.
pub(crate) async fn first_bytes(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    patience: Option<Duration>,
) -> io::Result<First> {
    if buffer.is_empty() {
        let read = read_more(stream, buffer);
        let read = match patience {
            None => read.await?,
            Some(patience) => match timeout(patience, read).await {
                Ok(read) => read?,
                Err(_) => return Ok(First::Silence),
            },
        };
        if read == 0 {
            return Ok(First::End);
        }
    }
    let decide = async {
        loop {
            match detect(buffer) {
                // The end of the stream within a first line: nobody can complete it.
                Detection::NeedMore if read_more(stream, buffer).await? > 0 => {}
                Detection::NeedMore => return Ok(First::Bytes(Detection::Opaque)),
                decided => return Ok(First::Bytes(decided)),
            }
        }
    };
    timeout(INCOMPLETE_TIMEOUT, decide).await.unwrap_or(Ok(First::Bytes(Detection::Opaque)))
}

/// Waits until nobody has spoken for too long; for ever where there is no such limit.
pub(crate) async fn silent_for_too_long(timeouts: &Timeouts) {
    match timeouts.idle.enabled() {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Appends what there is to `buffer`.
pub(crate) async fn read_more(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> io::Result<usize> {
    buffer.reserve(FIRST_BYTES);
    stream.read_buf(buffer).await
}
