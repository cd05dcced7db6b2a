//! Bytes that are no HTTP.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::client::{self, Raw};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::{BANNER, CLOSE_FIRST, ECHO, Observed, RESET, Target};

pub(crate) async fn echo(target: Target) -> anyhow::Result<Observed> {
    let mut raw = Raw::connect(target.at(ECHO)).await?;
    for piece in [&b"\0\x01\x02hello"[..], b"GET", b"PRI * HT", &vec![0xff; 100_000]] {
        raw.send(piece).await?;
        ensure!(raw.read_exact(piece.len()).await? == piece, "bytes changed on the way");
    }
    Ok(Observed::default())
}

/// The client closes its side first; what it sent before still comes back, then the server's end.
pub(crate) async fn client_closes_first(target: Target) -> anyhow::Result<Observed> {
    let mut raw = Raw::connect(target.at(ECHO)).await?;
    raw.send("\x05all of this").await?;
    raw.finish().await?;
    let back = raw.read_to_end().await?;
    ensure!(back == b"\x05all of this", "{:?} came back", String::from_utf8_lossy(&back));
    // Nothing sent at all: only the end travels, there and back.
    let mut raw = Raw::connect(target.at(ECHO)).await?;
    raw.finish().await?;
    ensure!(raw.read_to_end().await?.is_empty());
    Ok(Observed::default())
}

/// The server closes its side first; what the client still sends arrives.
pub(crate) async fn server_closes_first(target: Target) -> anyhow::Result<Observed> {
    let mut raw = Raw::connect(target.at(CLOSE_FIRST)).await?;
    raw.send("\x01\x02\x03\x04").await?;
    let answer = raw.read_to_end().await?;
    ensure!(answer == b"bye\n", "{answer:?}");
    // The other direction is open: a megabyte fits only if the server goes on reading.
    raw.send(vec![7; 1 << 20]).await.context("sending after the server's end")?;
    raw.finish().await.context("closing after the server's end")?;
    Ok(Observed::default())
}

/// The server speaks first, and not much later than without a mesh.
pub(crate) async fn server_speaks_first(target: Target) -> anyhow::Result<Observed> {
    let mut seen = Observed::default();
    for attempt in 0..3 {
        let start = Instant::now();
        let mut raw = Raw::connect(target.at(BANNER)).await?;
        let banner = raw.read_until(b"\n").await?;
        let waited = start.elapsed();
        // The first connection may pay for detection, later ones know.
        let limit = if attempt == 0 { Duration::from_millis(1500) } else { Duration::from_millis(400) };
        ensure!(waited < limit, "connection {attempt} waited {waited:?} for the banner");
        seen.note(String::from_utf8_lossy(&banner).into_owned());
        raw.send("HELO me\r\n").await?;
        ensure!(raw.read_exact(9).await? == b"HELO me\r\n");
    }
    Ok(seen)
}

/// A reset arrives as a reset or at least as the end, never as a connection that hangs.
pub(crate) async fn reset(target: Target) -> anyhow::Result<Observed> {
    let mut stream = client::connect(target.at(RESET)).await?;
    stream.write_all(b"\x01").await.context("sending a byte")?;
    let mut answer = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    let end = end.context("the connection hangs after a reset")?;
    ensure!(answer.is_empty(), "bytes from nowhere: {answer:?}");
    let mut seen = Observed::default();
    seen.note(match end {
        Ok(_) => "end of stream".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    });
    Ok(seen)
}

/// Much data both ways at once.
pub(crate) async fn bulk(target: Target) -> anyhow::Result<Observed> {
    const SIZE: usize = 30_000_000;
    let stream = client::connect(target.at(ECHO)).await?;
    let (mut from, mut to) = stream.into_split();
    let send = async move {
        let piece: Vec<u8> = (0..65_521_u32).map(|i| u8::try_from(i % 251).unwrap_or_default()).collect();
        let mut left = SIZE;
        while left > 0 {
            let length = left.min(piece.len());
            to.write_all(&piece[..length]).await.context("sending")?;
            left -= length;
        }
        to.shutdown().await.context("closing our side")
    };
    let receive = async move {
        let mut all = Vec::with_capacity(SIZE);
        from.read_to_end(&mut all).await.context("receiving")?;
        let intact = all.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 65_521 % 251);
        ensure!(all.len() == SIZE && intact, "{} bytes came back, intact: {intact}", all.len());
        Ok(())
    };
    tokio::try_join!(send, receive)?;
    Ok(Observed::default())
}
